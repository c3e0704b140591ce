"""FaissIndex: what IVF and HNSW share. Each batch row and KV head has an index of its own, a unit: one of FAISS, or
where rows lie on a device one of tensors there, for all KV heads of a batch row.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar, Self

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
# ``keys(first, stop)``: those rows of a unit as they are indexed, ``[n, D]``, or ``[Hkv, n, D]`` of all heads.
Keys = Callable[[int, int], Tensor]


class Unit:
    """The index of a batch row's KV head, or of all its heads; row ids are local, counted from the unit's first row.

    Attributes:
        of_all_heads: whether it is that of all KV heads of a batch row, in tensors where the rows lie.
    """

    of_all_heads: ClassVar[bool] = False

    @abstractmethod
    def build(self, keys: Keys, stops: list[int]) -> None:
        """Bring the unit to the rows before ``stops[-1]``, of which it may hold some.

        ``stops`` are where blocks end. Rows go in block by block, always the same ones together, so that what is
        built does not depend on the chunks they came in.
        """

    @abstractmethod
    def state(self) -> Arrays:
        """What ``restore`` cannot find again cheaply from the rows."""

    @abstractmethod
    def restore(self, keys: Keys, stops: list[int], state: Arrays) -> None:
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


class FaissUnit(Unit):
    """A unit that is searched by FAISS."""

    @abstractmethod
    def search(self, query: Rows, k: int, stop: int | None) -> tuple[Ids, int]:
        """Ids ``[n, k]`` (-1 = none) below ``stop`` for queries ``[n, D]``, and how many keys were scored."""


class FaissIndex(SearchIndex):
    """Units on a ``[B][Hkv]`` grid, ``[B][1]`` of those of all heads.

    Copies share units until one of them is about to change.
    """

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
    def _new_unit(self) -> FaissUnit:
        """An empty unit."""

    def _new_units(self, store: KVStore) -> list[Unit]:
        """Empty units for a batch row."""
        return [self._new_unit() for _ in range(store.num_kv_heads)]

    def __len__(self) -> int:
        return self._length

    def extend(self, store: KVStore, lo: Tensor) -> None:
        """See KeyIndex; nothing is built below the index's least size."""
        length = max(0, len(store) - self._window) // BLOCK * BLOCK
        if length < self.min_rows or length <= self._length:
            return
        if not self._units or (store.sample is not None and _doubled(length) != _doubled(self._length)):
            self._make_units(store, length)

        def build(b: int, u: int, keys: Keys, stops: list[int]) -> None:
            if not self._owned[b][u]:
                self._units[b][u], self._owned[b][u] = self._units[b][u].clone(), True
            self._units[b][u].build(keys, stops)

        self._for_each_unit(store, lo, length, build)
        self._length = length

    def state(self, first: int, stop: int) -> Arrays:
        """See KeyIndex; arrays are named ``batch row.KV head.name``."""
        return {
            f"{self._name(b, u)}.{name}": array
            for b, units in enumerate(self._units)
            for u, unit in enumerate(units)
            for name, array in unit.state().items()
        }

    def load_state(self, store: KVStore, lo: Tensor, first: int, stop: int, state: Arrays) -> None:
        """See KeyIndex."""
        if stop % BLOCK or not self.min_rows <= stop <= len(store) - self._window:
            raise ValueError(f"{stop} indexed rows are not whole blocks of {BLOCK} within {len(store)} rows")
        self._make_units(store, stop)
        by_unit: dict[str, Arrays] = {
            self._name(b, u): {} for b, units in enumerate(self._units) for u in range(len(units))
        }
        for key, array in state.items():
            unit = next((unit for unit in by_unit if key.startswith(f"{unit}.")), None)
            if unit is None:
                raise ValueError(
                    f"{key} is not part of {len(self._units)} batch rows and {store.num_kv_heads} KV heads"
                )
            by_unit[unit][key.removeprefix(f"{unit}.")] = array

        def restore(b: int, u: int, keys: Keys, stops: list[int]) -> None:
            unit = self._name(b, u)
            try:
                self._units[b][u].restore(keys, stops, by_unit[unit])
            except ValueError as error:
                raise ValueError(f"{unit}: {error}") from None

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
                device = store.start.device
                self._metric, self.learnt = (metric.to(device), torch.linalg.inv(metric).to(device)), True
        self._units = [self._new_units(store) for _ in range(batch)]
        self._owned = [[True] * len(units) for units in self._units]

    def _name(self, b: int, u: int) -> str:
        """What the names of a unit's arrays begin with; one of all heads goes on with the head."""
        return f"{b}" if self._units[b][u].of_all_heads else f"{b}.{u}"

    def _for_each_unit(
        self, store: KVStore, lo: Tensor, length: int, run: Callable[[int, int, Keys, list[int]], None]
    ) -> None:
        """``run(b, u, keys, stops)`` once per unit that has rows below ``length``; see Unit.build."""
        stored, first = store.rows[0], lo.tolist()
        units = [(b, u) for b, of_row in enumerate(self._units) for u in range(len(of_row))]

        def run_one(b: int, u: int) -> None:
            heads = slice(None) if self._units[b][u].of_all_heads else u
            stops = [stop - first[b] for stop in range(BLOCK, length + 1, BLOCK) if stop > first[b]]

            def keys(begin: int, stop: int) -> Tensor:
                rows = floats(stored[b, heads, first[b] + begin : first[b] + stop])
                if self._metric is not None:
                    rows = rows @ self._metric[0][b, heads]
                if self._sample:
                    noise = exponential_noise(stored.shape[1], first[b] + begin, first[b] + stop, stored.device)
                    rows = torch.cat([rows, noise[heads, :, None]], dim=-1)
                return rows

            if stops:
                run(b, u, keys, stops)

        def run_faiss(b: int, u: int) -> None:
            # One thread per unit keeps the graph that HNSW builds the same from run to run.
            with _one_faiss_thread():
                run_one(b, u)

        if self._units[0][0].of_all_heads:
            for b, u in units:
                run_one(b, u)  # here: other threads have a current stream of their own
            return
        # As many threads as torch uses; FAISS releases the GIL.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            for done in [pool.submit(run_faiss, b, u) for b, u in units]:
                done.result()

    def _asked(self, query: Tensor, kv_heads: int, lift: float | None) -> Tensor:
        """Queries ``[B, Hq, m, D]`` as they ask for keys in the metric, with noise: ``[B, Hkv, group * m, D]``."""
        batch, _, _, dim = query.shape
        asked = query.float().reshape(batch, kv_heads, -1, dim)
        if self._metric is not None:
            asked = asked @ self._metric[1]
        return pad(asked, (0, 1), value=lift or 0.0) if self._sample else asked

    def search(
        self, query: Tensor, store: KVStore, k: int, lo: Tensor, stop: int, lift: float | None = None
    ) -> Candidates:
        """See KeyIndex."""
        batch, heads, m, _ = query.shape
        kv_heads = store.num_kv_heads
        asked = self._asked(query, kv_heads, lift)
        grouped = to_numpy(asked)
        found = np.full((batch, kv_heads, grouped.shape[2], k), -1, dtype=np.int64)
        scored = 0
        with _one_faiss_thread():
            for b, first in enumerate(lo.tolist()):
                limit = None if stop >= self._length else max(0, stop - first)
                for h, unit in enumerate(self._units[b]):
                    assert isinstance(unit, FaissUnit)
                    ids, count = unit.search(grouped[b, h], k, limit)
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
            batch = batch.to(metric.device)
            self._metric = metric[batch], inverse[batch]
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


def to_numpy(rows: Tensor) -> Rows:
    """A copy or view on the host, float32."""
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
