"""IndexedRows: the rows of one attention layer, and the index that follows them."""

import copy
from typing import Any, Self

import torch
from torch import Tensor

from index_kernels.fork import check_fork
from index_kernels.inference import inference_only
from index_kernels.integer import is_integer

from .config import RetrievalConfig
from .index import make_index
from .query.call import Call
from .query.planner import Planner, may_retrieve
from .query.prompt import PromptLog
from .store import KVStore, on_device, rows_at


class IndexedRows:
    """An ``AttentionDB`` without its questions: rows come, are cut, selected and forked, and the index follows."""

    def __init__(self, num_kv_heads: int, head_dim: int, value_dim: int | None, config: RetrievalConfig | None) -> None:
        self.config = RetrievalConfig.checked(config)
        value_dim = head_dim if value_dim is None else value_dim
        self.store = KVStore(num_kv_heads, head_dim, value_dim, self.config.storage, host=self.config.rows == "host")
        self.index = make_index(self.config)
        # Whether a prompt is being read, so that the index is behind; see ``sync``.
        self.is_reading = False
        # Why rows are not put into the index, and so scanned; "" where they are.
        self.unindexed = ""
        self._planner = Planner()
        self._prompt_log = PromptLog()

    def insert(
        self, keys: Tensor, values: Tensor, queries: Tensor | None = None, *, start: Tensor | None = None
    ) -> None:
        """Append rows and index them.

        Args:
            keys, values: ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]``, float32, float16 or bfloat16; any n, 0 included.
            queries: ``[B, Hq, n, D]`` of the same positions, from which an index learns which keys it must tell apart;
                every 32nd is kept.
            start: int64 ``[B]``, first valid row of each batch row (left padding); with the first rows only.

        Raises:
            ValueError: shapes, dtype or device that do not fit the rows stored, or elements that are not finite or
                larger than ``storage.LARGEST``. The store is unchanged then.
        """
        check_fork()  # before anything changes: the index may need kernels
        before = len(self)
        if queries is not None and keys.ndim == 4:
            self.store.check_queries(queries, keys.shape[0], keys.shape[2], keys.device)
        self.append(keys, values)
        try:
            self.set_start(self.start if start is None else start)
        except ValueError:
            self._cut(before)
            raise
        if queries is not None:
            self.note_queries(queries, before)
        try:
            self.sync()
        except Exception:
            # Whatever the index made of the new rows goes with them; it is built again from the rows that stay.
            self._begin_index()
            self._cut(before)
            raise

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows after the newest, for callers that say later which queries came, and ``sync``; see ``KVStore``."""
        self.store.append(keys, values)

    def reserve(self, rows: int) -> None:
        """Say how many rows there will be in all, where they come in parts: none is then copied as more come.

        Raises:
            ValueError: not a number of rows.
        """
        self.store.reserve(rows)

    def note_queries(self, queries: Tensor, first: int) -> None:
        """Sample queries ``[B, Hq, n, D]`` of the rows from ``first`` on, likewise."""
        self.store.note_queries(queries, first)

    @property
    def start(self) -> Tensor:
        """The first valid row ``[B]`` of each batch row."""
        return self.store.start

    @property
    def has_padding(self) -> bool:
        """Whether any of them is not 0."""
        return self.store.has_padding

    def can_start_at(self, start: Tensor) -> bool:
        """Whether ``set_start`` would accept ``start [B]``."""
        return self.store.can_start_at(start)

    def set_start(self, start: Tensor) -> None:
        """Declare left padding; see ``KVStore``."""
        self.store.set_start(start)

    def analyze(self, queries: Tensor) -> None:
        """Learn from queries in place of what was learnt before, and index all rows anew by it.

        Keys are clustered ("segmented", "ivf") and linked ("hnsw") so that rows which such queries tell apart are far
        from each other; "flat" learns nothing. ``insert(..., queries)`` and wrapped models learn as rows come: this is
        for rows that came without. What is learnt stays when rows are cut.

        Args:
            queries: ``[B, Hq, m, D]`` of the m newest positions; those of the latest 2,048 rows tell most.

        Raises:
            ValueError: an empty store, or queries that do not fit it.
        """
        self._call(queries)
        self.store.check_queries(queries, queries.shape[0], queries.shape[2], queries.device)
        self._begin_index()
        # Of rows that are dealt over ranks, each has some: all of the queries asked them.
        m = min(queries.shape[2], len(self.store))
        if m:
            self.store.learn(queries[:, :, -m:], len(self.store) - m)
        self.sync()

    @inference_only
    def sync(self, *, reading: bool = False) -> None:
        """Bring the index up to the store's rows; for callers that append to ``store`` themselves, as a cache does.

        ``reading``: more of a prompt may come. Where rows were sealed as it was read, they stay as they are until the
        next decode call, save or ``sync``.
        """
        self.store.set_start(self.store.start)
        self.is_reading = reading and self.index.in_pieces
        if self.is_reading or self.unindexed or self.store.is_empty:
            return
        if on_device(self.store.start) and not may_retrieve(self.config, self.index, self.store):
            return
        if self.index.is_due(len(self.store)):
            self.store.look_at_rows()  # while they stand where they came
            self.index.extend(self.store, self._first_index_row())

    def release(self) -> None:
        """Put rows that the index moved back in the order of their positions; the next ``sync`` moves them again."""
        if not self.store.is_empty:
            self.index.release(self.store, self._first_index_row())

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows, as if the others had never come.

        Raises:
            ValueError: a length below 0 or above ``len(db)``.
        """
        if not is_integer(length, 0, len(self)):
            raise ValueError(f"length is {length!r}, expected an integer from 0 to {len(self)}")
        indexed = len(self.index)
        if len(self.store):
            self.index.truncate(self.store, self._held(length), self._first_index_row())
        self._cut(length)
        self._prompt_log = PromptLog()
        # Rows that were never indexed stay so until their owner says that their padding is known.
        if indexed:
            self.sync()

    def select(self, batch: Tensor) -> None:
        """Keep the batch rows ``batch [B']`` int64; an index may repeat (beam search)."""
        self._planner = Planner()
        self.store.select(batch)
        self.index.select(batch)

    def fork(self) -> Self:
        """A database with the same rows; neither ever sees what comes to the other later, or what is cut there.

        Time and memory do not depend on the number of rows, but for the first fork, which moves them (and lists of
        "segmented", and sampled queries) into pages that all forks share: one copy. A page is copied by the system when
        one of them writes to it, so a fork costs what is done to it: its new rows, and rows that it seals anew. What
        was added or sealed since those pages were made is copied at each fork, up to a 32nd of the rows; then all is
        moved again. Indexes of FAISS are shared as by ``copy.deepcopy``. On a GPU, and where there are no such pages
        (Windows), a fork is a copy.

        What calls did is counted (``stats``), and what audits taught is learnt, in one place for all.
        """
        twin = copy.copy(self)
        twin.store = self.store.fork()
        twin.index = self.index.fork(twin.store.capacity)
        twin._planner, twin._prompt_log = copy.copy(self._planner), copy.deepcopy(self._prompt_log)
        return twin

    def __len__(self) -> int:
        """Rows stored per batch row, padding included."""
        return len(self.store)

    @property
    def keys(self) -> Tensor:
        """Keys ``[B, Hkv, n, D]`` as floats, by row position: a copy, whatever order an index keeps them in.

        Raises:
            ValueError: an empty store.
        """
        return self._by_position(self.store.keys)

    @property
    def values(self) -> Tensor:
        """Values ``[B, Hkv, n, Dv]`` likewise."""
        return self._by_position(self.store.values)

    @property
    def requires_grad(self) -> bool:
        """Whether rows came out of a graph: backward through answers is refused then."""
        return self.store.requires_grad

    @property
    def nbytes(self) -> int:
        """Bytes held: the rows' buffers (spare capacity included), the index, and sampled queries.

        What forks share is counted in each of them.
        """
        sample = self.store.sample
        return self.store.nbytes + self.index.nbytes + (0 if sample is None else sample.nbytes)

    @property
    def own_nbytes(self) -> int:
        """The part of ``nbytes`` that no fork shares: what would be free if this database went."""
        return self.store.own_nbytes + self.index.own_nbytes

    def _call(self, query: Tensor, *asked: Any) -> Call:
        """What is asked, checked; see ``Call.checked``."""
        call = Call.checked(query, self.store, self.index, self.config, len(self), *asked)
        if self.is_reading and not call.is_prompt:
            self.sync()  # the prompt has been read
        return call

    def _begin_index(self) -> None:
        """Put rows back in order and begin with an empty index."""
        self.release()
        self.index = make_index(self.config)
        self._planner = Planner()

    def _cut(self, length: int) -> None:
        """Keep the first ``length`` rows of the store, of which the index has no later ones."""
        self.store.truncate(self._held(length))

    def _held(self, length: int) -> int:
        """How many of the first ``length`` rows are in the store."""
        return length

    def _by_position(self, rows: Tensor) -> Tensor:
        if not self.index.moves_rows:
            return rows.clone()
        slots = torch.arange(rows.shape[2], device=rows.device).expand(*rows.shape[:2], 1, -1)
        return rows_at(rows, self.index.positions(slots)[:, :, 0].argsort(dim=-1))

    def _first_index_row(self) -> Tensor:
        return self.store.start + self.config.n_sink
