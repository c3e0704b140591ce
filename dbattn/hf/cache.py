"""DatabaseLayer: the cache layer that keeps its rows in an AttentionDB."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from index_kernels.inference import refuse_gradients

from ..attention import AttentionDB
from ..config import RetrievalConfig
from ..index import KeyIndex, make_index
from ..query.stats import RunningStats
from ..shards import Shards
from ..store import KVStore, MappedRows, Part
from ..windows import Reading, Windows
from .adapters import Adapters
from .stored_rows import rows_as, rows_elsewhere
from .switches import Switches

# Cache layers of transformers that keep every row; the second kind keeps a state of linear attention beside them.
SERVED = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
# So many rows of windows are scanned: to index them takes longer than an answer.
MOST_SCANNED = 16384
SCANNED = "rows of the windows that the question reads are scanned, not indexed"


class LayerSession(Protocol):
    """What a layer knows of the session that made it; ``session.Session`` is all of it."""

    config: RetrievalConfig
    stats: list[RunningStats]
    shards: Shards | None

    @property
    def serving(self) -> bool:
        """Whether a pass is under way whose attention goes through dbattn's function."""

    @property
    def switches(self) -> Switches:
        """Those of the present thread or task."""

    def note_dense(self, number: int, reason: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Count a call that no database answered."""


class DatabaseLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A cache layer whose rows live in an AttentionDB.

    ``update`` returns zero-copy views of them, or stand-ins. They carry the layer as an attribute; any tensor operation
    drops it, so that code which transforms keys or values before attention stays exact. In a pass that our attention
    function serves they stand as the index keeps them; everybody else gets rows by position.
    """

    def __init__(self, session: LayerSession, layer_index: int) -> None:
        # Not super().__init__(), which assigns keys and values: here they are read from the database.
        self.is_initialized = False
        self.session = session
        self.layer_index = layer_index
        self._db: AttentionDB | None = None
        # What is forked when the layer's rows are first asked for.
        self._begins_with: AttentionDB | None = None
        # Of the rows stored, [B, n]; kept by the first layer for all. Shorter where some are not known.
        self.token_ids: Tensor | None = None
        # The adapters that rows were written under, each with the first of its rows; kept by the first layer.
        self.adapters: list[tuple[int, Adapters]] = []
        # All rows of a text that was read by windows, by position; ``db`` then has those that are read, if any yet, and
        # those that came after.
        self.base: KVStore | None = None
        # How many rows of ``db`` are the base's, too.
        self._taken = 0
        # How the base's first rows were read, and which of them are read; kept by the first layer.
        self.windows: Windows | None = None
        # Calls that did not come to their end: layers may differ in what they read; kept by the first layer.
        self.unfinished = 0
        self.reading: Reading | None = None

    @property
    def db(self) -> AttentionDB | None:
        """The layer's rows, of windows those that are read; None until the first."""
        if self._begins_with is not None:
            self._db, self._begins_with = self._begins_with.fork(), None
            self._db.stats = self.session.stats[self.layer_index]
        return self._db

    @db.setter
    def db(self, db: AttentionDB | None) -> None:
        self._db, self._begins_with = db, None

    @property
    def keys(self) -> Tensor | None:
        """Keys ``[B, Hkv, n, D]`` by row position: a copy, in the model's type. None until the first rows."""
        return self._by_position("keys")

    @property
    def values(self) -> Tensor | None:
        """Values ``[B, Hkv, n, Dv]`` likewise."""
        return self._by_position("values")

    def _by_position(self, name: str) -> Tensor | None:
        if not self.get_seq_length():
            return None
        rows = [] if self.base is None else [getattr(self.base, name)]
        if self.db is not None:
            rows.append(getattr(self.db, name)[:, :, self._taken :])
        return torch.cat(rows, dim=2).to(self.dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the database from the first rows' shapes."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.db = self._new_db(key_states.shape[1], key_states.shape[3], value_states.shape[3], self.session.config)

    def _new_db(self, heads: int, dim: int, value_dim: int, config: RetrievalConfig) -> AttentionDB:
        db = AttentionDB(heads, dim, value_dim=value_dim, config=config, group=self.session.shards)
        db.stats = self.session.stats[self.layer_index]
        return db

    def begin_with(self, db: AttentionDB) -> None:
        """Take over the rows of a database, which nobody changes: a fork of it, made when they are first asked for."""
        self._db, self._begins_with = None, db
        self._note_kind(db.store)

    def begin_with_windows(self, base: KVStore) -> None:
        """Take over the rows of a text that was read by windows, which are frozen; none is read yet."""
        self.base, self.db, self._taken = copy.copy(base), None, 0
        self.base.sample = None  # that of others; nobody asks these rows
        self._note_kind(base)

    def _note_kind(self, store: KVStore) -> None:
        # The model's own type is known with its first rows.
        self.dtype = store.kept_dtype if store.kept_dtype.is_floating_point else torch.float32
        self.device, self.is_initialized = store.device, True

    def add_window(self, keys: Tensor, values: Tensor) -> None:
        """Add the rows of a window to those of the windows before it. What was read of them is forgotten."""
        if self.base is None:
            self.lazy_initialization(keys, values)
            assert self.db is not None
            self.base, self.db = self.db.store, None
        self.base.append(keys, values)
        self.base.set_start(self.base.start)
        self.base.freeze()
        self.db, self._taken = None, 0

    def read(self, runs: Sequence[tuple[int, int]]) -> None:
        """Let ``db`` be rows ``first .. stop`` of the base, for each of ``runs``.

        Raises:
            SnapshotError (a ValueError): a file that has some of them is damaged.
        """
        base = self.base
        assert base is not None
        config = replace(self.session.config, storage=base.storage)
        db = self._new_db(base.num_kv_heads, base.head_dim, base.value_dim, config)
        parts = tuple(Part(*base.between(first, stop)) for first, stop in runs)
        rows = sum(map(len, parts))
        db.store.restore(MappedRows(parts, base.device), base.start, rows, rotated=base.rotated)
        wished = config.wishes_retrieval or isinstance(config.dense_below, int)
        db.unindexed = "" if wished or rows > MOST_SCANNED else SCANNED
        self.db, self._taken = db, rows

    def whole(self) -> tuple[KVStore, KeyIndex]:
        """All rows, to be saved, and their index: of rows that were read by windows there is none."""
        assert self.db is not None or self.base is not None
        if self.base is None:
            assert self.db is not None
            if self.db.is_reading:
                self.db.sync()
            return self.db.store, self.db.index
        if self.db is not None and len(self.db) > self._taken:
            self.db.release()
            self.base.append_kept(*self.db.store.between(self._taken, len(self.db)))
            self._taken = len(self.db)
            self.db.sync()
        return self.base, make_index(self.session.config)

    def note_tokens(self, token_ids: Tensor | None) -> None:
        """Remember the token ids ``[B, n]`` of the next rows; None if they are unknown."""
        rows = self.get_seq_length()
        known = None if self.token_ids is None else self.token_ids[:, :rows]
        if token_ids is None or (rows and (known is None or known.shape != (len(token_ids), rows))):
            self.token_ids = known
            return
        added = token_ids.detach().cpu()
        self.token_ids = added.clone() if known is None or not rows else torch.cat([known, added], dim=1)

    def note_adapters(self, adapters: Adapters) -> None:
        """Remember the adapters that act while the next rows are written."""
        rows = self.get_seq_length()
        self.adapters = [each for each in self.adapters if each[0] < rows]
        if not self.adapters or self.adapters[-1][1] != adapters:
            self.adapters.append((rows, adapters))

    def adapters_of_rows(self) -> list[Adapters]:
        """The adapters that the rows stored were written under."""
        return [adapters for first, adapters in self.adapters if first < self.get_seq_length()]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo cannot look into the kernels
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows ``[B, Hkv, n, D]``; the index follows when attention knows the padding.

        Under autocast keys and values may differ in type, also from earlier rows: the widest that came is kept.
        """
        if self.db is None and self.base is not None:
            self.read([(0, len(self.base))])  # by a model that knows no windows
        elif self.db is None:
            self.lazy_initialization(key_states, value_states)
        assert self.db is not None
        if self.session.switches.until is not None:
            self.db.reserve(self.session.switches.until)
        self.dtype = self.db.store.widen(torch.promote_types(key_states.dtype, value_states.dtype))
        self.db.append(key_states.to(self.dtype), value_states.to(self.dtype))
        if not self.session.serving:
            self.db.release()
        store = self.db.store
        if self.session.shards is None:
            keys, values = (rows_as(rows, self.dtype, rotated=store.rotated) for rows in store.rows)
        else:
            keys, values = (rows_elsewhere(rows, len(self.db), self.dtype) for rows in (key_states, value_states))
        if torch.is_grad_enabled() and self.db.requires_grad:
            keys, values = refuse_gradients(keys), refuse_gradients(values)
        for rows in (keys, values):
            rows._dbattn = self  # type: ignore[attr-defined]  # rides along to the attention function
        return keys, values

    def get_seq_length(self) -> int:
        """Rows stored, those of windows that are not read included."""
        held = self._db if self._begins_with is None else self._begins_with
        return (0 if held is None else len(held)) - self._taken + (0 if self.base is None else len(self.base))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` rows."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is not supported: pass a negative count of tokens to remove")
        if not tokens_to_remove:
            return
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if self.windows is not None:
            self.windows = self.windows.cut(length)
        if self.base is not None and length < len(self.base):
            self.base.truncate(length)
            self.base, self.db, self._taken = self.base if length else None, None, 0
            self.reading = None
        elif self.db is not None:
            self.db.truncate(length + self._taken - (0 if self.base is None else len(self.base)))

    def reset(self) -> None:
        """Forget everything."""
        self.db = self.base = self.token_ids = self.windows = self.reading = None
        self.adapters, self._taken, self.unfinished = [], 0, 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        if self._starts is not None:
            self._select(torch.arange(len(self._starts)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows: their numbers, or a bool mask."""
        if self._starts is not None:
            self._select(torch.arange(len(self._starts), device=indices.device)[indices])

    @property
    def _starts(self) -> Tensor | None:
        """The first valid row of each batch row; None without rows."""
        if self.base is not None:
            return self.base.start
        return None if self.db is None else self.db.start

    def _select(self, batch: Tensor) -> None:
        # Beams often stay as they are; copying all rows would cost more than the step itself.
        if self._starts is None or torch.equal(batch, torch.arange(len(self._starts)).to(batch)):
            return
        if self.base is not None:
            self.base.select(batch)
            self.base.freeze()
        if self.db is not None:
            self.db.select(batch)
        if self.token_ids is not None:
            self.token_ids = self.token_ids[batch.cpu()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = made = object.__new__(type(self))
        self.db  # noqa: B018  # what it begins with belongs to others: a fork of it is copied
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is an ordinary layer of transformers with the same rows: a database belongs to its model."""
        ordinary = DynamicLayer()
        if (keys := self.keys) is not None:
            ordinary.update(keys, self.values)
        return DynamicLayer, (), ordinary.__dict__


class HybridDatabaseLayer(LinearAttentionAndFullAttentionLayer, DatabaseLayer):  # type: ignore[misc]  # as above
    """A DatabaseLayer with a state of linear attention beside its rows; transformers goes on keeping that."""

    def __init__(self, session: LayerSession, layer_index: int, taken_over: LinearAttentionLayer) -> None:
        DatabaseLayer.__init__(self, session, layer_index)
        for name in vars(LinearAttentionLayer()):
            setattr(self, name, getattr(taken_over, name))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Two tensors by position are the first rows; what comes by name is a first state."""
        (DatabaseLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest rows, and put the state back, where transformers can."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        DatabaseLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        DatabaseLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        DatabaseLayer.reorder_cache(self, beam_idx)

    def __reduce__(self) -> tuple[Any, ...]:
        """See DatabaseLayer; the state goes along."""
        state = {name: getattr(self, name) for name in vars(LinearAttentionLayer())}
        return LinearAttentionAndFullAttentionLayer, (), state | DatabaseLayer.__reduce__(self)[2]
