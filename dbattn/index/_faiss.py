"""FaissIndex: what IVF and HNSW share. Each batch row and KV head has a FAISS index of its own, a unit."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from index_kernels import floats

from ..config import RetrievalConfig
from ..store import KVStore, exponential_noise
from ._scan import SearchIndex
from .base import BLOCK, Arrays, Candidates, expect_no_more, require_faiss

Rows = np.ndarray[Any, np.dtype[np.float32]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


class Unit:
    """The FAISS index of one batch row and KV head; row ids are local, counted from the unit's first row."""

    @abstractmethod
    def build(self, keys: Rows, stops: list[int], device: torch.device) -> None:
        """Bring the unit to the rows ``keys[:stops[-1]]``, of which it may hold some; queries will come on device.

        ``stops`` are where blocks end. Rows go in block by block, always the same ones together, so that what is
        built does not depend on the chunks they came in.
        """

    @abstractmethod
    def search(self, query: Rows, k: int, stop: int | None) -> tuple[Ids, int]:
        """Ids ``[n, k]`` (-1 = none) below ``stop`` for queries ``[n, D]``, and how many keys were scored."""

    @abstractmethod
    def state(self) -> Arrays:
        """What ``restore`` cannot find again cheaply from the rows."""

    @abstractmethod
    def restore(self, keys: Rows, stops: list[int], device: torch.device, state: Arrays) -> None:
        """What ``build`` does for an empty unit, with the slow part taken out of ``state``, which is checked."""

    @abstractmethod
    def clone(self) -> Self:
        """A copy that can be changed alone."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was built."""


class FaissIndex(SearchIndex):
    """Units on a ``[B][Hkv]`` grid. Copies share units until one of them is about to change."""

    # Rows below which nothing is built.
    min_rows = BLOCK

    def __init__(self, window: int, sample: bool) -> None:
        require_faiss()
        # The newest rows are scanned exactly anyway; leaving them out, small truncations never reach the index.
        self._window = window
        # Rows that will be sampled carry their noise as one more dimension, which queries weigh by the lift or by 0.
        self._sample = sample
        self._length = 0
        self._units: list[list[Unit]] = []
        self._owned: list[list[bool]] = []
        # The metric that keys were indexed in, and its inverse for queries: products stay what they are. It is made
        # anew, and all rows indexed by it, each time they have doubled.
        self._metric: tuple[Tensor, Tensor] | None = None

    @classmethod
    def rows_indexed(cls, config: RetrievalConfig, rows: int) -> int:
        """See KeyIndex; whole blocks, once there are enough rows."""
        whole = max(0, rows - config.window) // BLOCK * BLOCK
        return whole if whole >= cls.min_rows else 0

    @abstractmethod
    def _new_unit(self) -> Unit:
        """An empty unit."""

    def __len__(self) -> int:
        return self._length

    def extend(self, store: KVStore, lo: Tensor) -> None:
        """See KeyIndex; nothing is built below the index's least size."""
        length = max(0, len(store) - self._window) // BLOCK * BLOCK
        if length < self.min_rows or length <= self._length:
            return
        if not self._units or (store.sample is not None and _doubled(length) != _doubled(self._length)):
            self._make_units(store, length)

        def build(b: int, h: int, keys: Rows, stops: list[int]) -> None:
            if not self._owned[b][h]:
                self._units[b][h], self._owned[b][h] = self._units[b][h].clone(), True
            self._units[b][h].build(keys, stops, store.start.device)

        self._for_each_unit(store, lo, length, build)
        self._length = length

    def state(self, first: int, stop: int) -> Arrays:
        """See KeyIndex; arrays are named ``batch row.KV head.name``."""
        return {
            f"{b}.{h}.{name}": array
            for b, units in enumerate(self._units)
            for h, unit in enumerate(units)
            for name, array in unit.state().items()
        }

    def load_state(self, store: KVStore, lo: Tensor, first: int, stop: int, state: Arrays) -> None:
        """See KeyIndex."""
        if stop % BLOCK or not self.min_rows <= stop <= len(store) - self._window:
            raise ValueError(f"{stop} indexed rows are not whole blocks of {BLOCK} within {len(store)} rows")
        self._make_units(store, stop)
        batch, heads = len(self._units), store.num_kv_heads
        by_unit: dict[str, Arrays] = {f"{b}.{h}": {} for b in range(batch) for h in range(heads)}
        for key, array in state.items():
            unit, _, name = key.rpartition(".")
            if unit not in by_unit:
                raise ValueError(f"{key} is not part of {batch} batch rows and {heads} KV heads")
            by_unit[unit][name] = array

        def restore(b: int, h: int, keys: Rows, stops: list[int]) -> None:
            arrays = by_unit[f"{b}.{h}"]
            try:
                self._units[b][h].restore(keys, stops, store.start.device, arrays)
            except ValueError as error:
                raise ValueError(f"{b}.{h}: {error}") from None

        self._for_each_unit(store, lo, stop, restore)
        for arrays in by_unit.values():
            expect_no_more(arrays)
        self._length = stop

    def _make_units(self, store: KVStore, length: int) -> None:
        """Empty units, to be filled up to row ``length`` in the metric that the store's queries tell, if any."""
        batch, heads = len(store.start), store.num_kv_heads
        self._metric, self.learnt = None, False
        if store.sample is not None:
            metric, enough = store.sample.metric(_doubled(length), store.start, heads)
            if bool(enough.all()):
                self._metric, self.learnt = (metric, torch.linalg.inv(metric)), True
        self._units = [[self._new_unit() for _ in range(heads)] for _ in range(batch)]
        self._owned = [[True] * heads for _ in range(batch)]

    def _for_each_unit(
        self, store: KVStore, lo: Tensor, length: int, run: Callable[[int, int, Rows, list[int]], None]
    ) -> None:
        """``run(b, h, keys, stops)`` once per unit that has rows below ``length``; see Unit.build."""
        keys, first = store.rows[0], lo.tolist()
        batch, heads = keys.shape[:2]

        def run_one(b: int, h: int) -> None:
            # One thread per unit keeps the graph that HNSW builds the same from run to run.
            with _one_faiss_thread():
                stops = [stop - first[b] for stop in range(BLOCK, length + 1, BLOCK) if stop > first[b]]
                if stops:
                    rows = floats(keys[b, h, first[b] : length])
                    if self._metric is not None:
                        rows = rows.float() @ self._metric[0][b, h].to(rows.device)
                    if self._sample:
                        noise = exponential_noise(heads, first[b], length, keys.device)[h]
                        rows = torch.cat([rows, noise[:, None]], dim=-1)
                    run(b, h, _to_numpy(rows), stops)

        # As many threads as torch uses; FAISS releases the GIL.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            for done in [pool.submit(run_one, b, h) for b in range(batch) for h in range(heads)]:
                done.result()

    def search(
        self, query: Tensor, store: KVStore, k: int, lo: Tensor, stop: int, lift: float | None = None
    ) -> Candidates:
        """See KeyIndex."""
        batch, heads, m, dim = query.shape
        kv_heads = store.num_kv_heads
        asked = query.float().reshape(batch, kv_heads, -1, dim)
        if self._metric is not None:
            asked = asked @ self._metric[1].to(asked.device)
        if self._sample:
            asked = pad(asked, (0, 1), value=lift or 0.0)
        grouped = _to_numpy(asked)
        found = np.full((batch, kv_heads, grouped.shape[2], k), -1, dtype=np.int64)
        scored = 0
        with _one_faiss_thread():
            for b, first in enumerate(lo.tolist()):
                limit = None if stop >= self._length else max(0, stop - first)
                for h in range(kv_heads):
                    ids, count = self._units[b][h].search(grouped[b, h], k, limit)
                    found[b, h] = np.where(ids >= 0, ids + first, -1)
                    scored += count
        return Candidates(
            torch.from_numpy(found).view(batch, heads, m, k).to(query.device), 4 * asked.shape[3] * scored
        )

    def truncate(self, store: KVStore, length: int, lo: Tensor) -> None:
        """See KeyIndex; a cut into the indexed rows drops the units, and the next extend builds them again."""
        if length < self._length:
            self._length, self._units, self._owned, self._metric = 0, [], [], None

    def select(self, batch: Tensor) -> None:
        """See KeyIndex; repeated rows share their units."""
        self._units = [list(self._units[b]) for b in batch.tolist()] if self._units else []
        if self._metric is not None:
            metric, inverse = self._metric
            self._metric = metric[batch.cpu()], inverse[batch.cpu()]
        self._disown()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)
        copy._units = [list(units) for units in self._units]
        self._disown()
        copy._disown()
        return copy

    @property
    def nbytes(self) -> int:
        """See KeyIndex; a shared unit counts once."""
        return sum(unit.nbytes for unit in {id(u): u for units in self._units for u in units}.values())

    def describe(self) -> dict[str, Any]:
        """See KeyIndex; the figures of the first unit stand for all."""
        built = self._units[0][0].describe() if self._units else {}
        learnt = {"learnt_from": "queries"} if self._metric is not None else {}
        return {"index": self.name, "rows": self._length, **built, **learnt}

    def _disown(self) -> None:
        self._owned = [[False] * len(units) for units in self._units]


def _doubled(rows: int) -> int:
    """The largest power of two up to ``rows``."""
    return 1 << rows.bit_length() >> 1


def on_gpu(index: Any, device: torch.device) -> Any:
    """A copy of a CPU index on the rows' GPU; None where rows are on the CPU or faiss-gpu is not installed."""
    faiss = require_faiss()
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return None
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)


def _to_numpy(rows: Tensor) -> Rows:
    return np.ascontiguousarray(rows.detach().float().cpu().numpy())


@contextmanager
def _one_faiss_thread() -> Iterator[None]:
    """FAISS on one thread inside the block. Its setting is OpenMP's, which torch shares, so it is put back."""
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
