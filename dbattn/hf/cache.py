"""DatabaseLayer: the cache layer that keeps its rows in an AttentionDB."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ..attention import AttentionDB
from ..audit import AuditReport, RunningStats
from ..config import RetrievalConfig
from .adapters import Adapters, in_words
from .stored_rows import plain, rows_as

# Cache layers of transformers that keep every row; the second kind keeps a state of linear attention beside them.
SERVED = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
# Called after every call that a database answered: layer number, database, query, scale of the logits, softcap.
Watcher = Callable[[int, AttentionDB, Tensor, float, float | None], None]


class Session:
    """What the layers of all caches of one wrapped model share. Copies of a cache stay in their session."""

    def __init__(self, config: RetrievalConfig, stats: list[RunningStats]) -> None:
        self.config = config
        self.stats = stats
        self.retrieve = True
        self.audits: list[AuditReport] | None = None
        self.watcher: Watcher | None = None
        # The layers of the context that every new cache begins with, by layer number; and its token ids.
        self.context: dict[int, AttentionDB] = {}
        self.token_ids: Tensor | None = None
        # The adapters that act in the model now; and those that the context was saved with.
        self.adapters: Callable[[], Adapters] = tuple
        self.context_adapters: Adapters = ()
        self._newest: weakref.ref[DynamicCache] | None = None

    @property
    def newest(self) -> DynamicCache | None:
        """The cache that went through the model last, if it is still alive."""
        return None if self._newest is None else self._newest()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def adopt(self, cache: DynamicCache) -> None:
        """Put our database in place of every plain layer of a cache, and of another session's; their rows move over."""
        if cache.offloading:
            raise ValueError("an offloaded cache cannot be served: its rows leave the device between layers")
        if cache.layer_class_to_replicate is DynamicLayer:
            missing = len(self.stats) - len(cache.layers)
            cache.layers.extend(DynamicLayer() for _ in range(missing))
            cache.layer_class_to_replicate = None
        for i, layer in enumerate(cache.layers):
            if type(layer) in SERVED or (isinstance(layer, DatabaseLayer) and layer.session is not self):
                # Assigned when it is complete: rows that are refused stay where they were.
                cache.layers[i] = self._with_rows_of(layer, i)

    def note_call(self, cache: DynamicCache, token_ids: Tensor | None) -> None:
        """Remember that the model is about to read ``token_ids [B, n]`` (None: unknown) into a cache of ours."""
        self._newest = weakref.ref(cache)
        if (first := self._first(cache)) is not None:
            first.note_tokens(token_ids)
            first.note_adapters(self.adapters())

    def check_adapters(self, cache: DynamicCache) -> None:
        """Refuse rows that the model, with the adapters of now, would not write.

        Raises:
            ValueError: some of the cache's rows were written under other adapters; says which.
        """
        now, first = self.adapters(), self._first(cache)
        for adapters in () if first is None else first.adapters_of_rows():
            if adapters != now:
                raise ValueError(
                    f"rows of this cache were written with {in_words(adapters)} active, the model now has "
                    f"{in_words(now)}: make that active again, or read the text anew"
                )

    def tokens_of(self, cache: DynamicCache) -> Tensor | None:
        """Token ids ``[B, n]`` of a cache's rows, as far as they are known."""
        first = self._first(cache)
        return None if first is None else first.token_ids

    def fill(self, cache: DynamicCache) -> None:
        """Give an empty cache of ours the context's rows, a copy of them.

        Raises:
            ValueError: the model's adapters have changed since the context was opened.
        """
        if self.context and (now := self.adapters()) != self.context_adapters:
            raise ValueError(
                f"the context was read with {in_words(self.context_adapters)} active, the model now has "
                f"{in_words(now)}: make that active again, or wrap the model anew with another context"
            )
        for number, db in self.context.items():
            cache.layers[number].hold(copy.deepcopy(db))
        if self.token_ids is not None and (first := self._first(cache)) is not None:
            first.token_ids = self.token_ids
        if self.context and (first := self._first(cache)) is not None:
            first.adapters = [(0, self.context_adapters)]

    def _first(self, cache: DynamicCache) -> "DatabaseLayer | None":
        return next((layer for layer in cache.layers if isinstance(layer, DatabaseLayer)), None)

    def _with_rows_of(self, layer: DynamicLayer, layer_index: int) -> "DatabaseLayer":
        hybrid = isinstance(layer, LinearAttentionAndFullAttentionLayer)
        ours = HybridDatabaseLayer(self, layer_index, layer) if hybrid else DatabaseLayer(self, layer_index)
        if not layer.get_seq_length():
            return ours
        theirs = layer.db if isinstance(layer, DatabaseLayer) else None
        if isinstance(layer, DatabaseLayer):
            ours.token_ids, ours.adapters = layer.token_ids, layer.adapters
        if theirs is not None:
            theirs.release()
        ours.update(plain(layer.keys), plain(layer.values))
        if theirs is not None and theirs.store.has_padding:
            assert ours.db is not None
            ours.db.store.set_start(theirs.store.start)
        return ours


class DatabaseLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A cache layer whose rows live in an AttentionDB. ``update`` returns zero-copy views of them, or stand-ins.

    The key view carries the layer as an attribute; any tensor operation drops it, so that code which transforms the
    keys before attention stays exact.
    """

    def __init__(self, session: Session, layer_index: int) -> None:
        super().__init__()
        self.session = session
        self.layer_index = layer_index
        self.db: AttentionDB | None = None
        # Of the rows stored, [B, n]; kept by the first layer for all. Shorter where some are not known.
        self.token_ids: Tensor | None = None
        # The adapters that rows were written under, each with the first of its rows; kept by the first layer.
        self.adapters: list[tuple[int, Adapters]] = []

    # transformers leaves these untyped; None until the first rows.
    keys: Any
    values: Any

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the database from the first rows' shapes."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.db = AttentionDB(
            key_states.shape[1], key_states.shape[3], value_dim=value_states.shape[3], config=self.session.config
        )
        self.db.stats = self.session.stats[self.layer_index]

    def hold(self, db: AttentionDB) -> None:
        """Take over a database with rows in it."""
        self.db = db
        db.stats = self.session.stats[self.layer_index]
        rows = db.store.rows[0]
        # The model's own type is known with its first rows.
        self.dtype = rows.dtype if rows.is_floating_point() else torch.float32
        self.device, self.is_initialized = rows.device, True
        self._refresh()

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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows ``[B, Hkv, n, D]``; the index follows when attention knows the padding."""
        if self.db is None:
            self.lazy_initialization(key_states, value_states)
        assert self.db is not None
        self.db.store.append(key_states, value_states)
        self.dtype = key_states.dtype
        self._refresh()
        keys: Any = rows_as(self.db.store.rows[0], self.dtype)
        keys._dbattn = self
        return keys, self.values

    def get_seq_length(self) -> int:
        """Rows stored."""
        return 0 if self.db is None else len(self.db)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` rows."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is not supported: pass a negative count of tokens to remove")
        if self.db is not None and tokens_to_remove:
            self.db.truncate(max(0, len(self.db) + tokens_to_remove))
            self._refresh()

    def reset(self) -> None:
        """Forget everything."""
        self.db = self.keys = self.values = self.token_ids = None
        self.adapters = []
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        if self.db is not None:
            self._select(torch.arange(len(self.db.store.start)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows: their numbers, or a bool mask."""
        if self.db is not None:
            self._select(torch.arange(len(self.db.store.start), device=indices.device)[indices])

    def _select(self, batch: Tensor) -> None:
        # Beams often stay as they are; copying all rows would cost more than the step itself.
        if self.db is not None and not torch.equal(batch, torch.arange(len(self.db.store.start)).to(batch)):
            self.db.select(batch)
            if self.token_ids is not None:
                self.token_ids = self.token_ids[batch.cpu()]
            self._refresh()

    def _refresh(self) -> None:
        assert self.db is not None
        store = self.db.store
        if store.is_empty:
            self.keys = self.values = None
        else:
            self.keys, self.values = (rows_as(rows, self.dtype) for rows in store.rows)


class HybridDatabaseLayer(LinearAttentionAndFullAttentionLayer, DatabaseLayer):  # type: ignore[misc]  # as above
    """A DatabaseLayer with a state of linear attention beside its rows; transformers goes on keeping that."""

    def __init__(self, session: Session, layer_index: int, taken_over: LinearAttentionLayer) -> None:
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
