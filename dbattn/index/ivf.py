"""IvfIndex: inverted lists over centred keys, trained again each time the rows have doubled."""

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import RetrievalConfig
from ..query.usage import Rates, Work, Workload
from ..store import KVStore, on_device
from ._cells import ITERATIONS, LISTS_PER_ROOT, MIN_ROWS, Cells, expect_cells, lists_for, rows_to_train
from ._faiss import FaissIndex, FaissUnit, Ids, Keys, Rows, Unit, to_numpy
from ._scan import noise_of
from .base import Arrays, Candidates, require_faiss

# Rows whose keys are gathered at once; ids of rows to be scored that are held at once.
GATHERED, CANDIDATES = 1 << 18, 1 << 26


class IvfIndex(FaissIndex):
    """Inverted lists: k-means cells of the keys, of which ``nprobe`` are read per query.

    Training happens on the first 1024, 2048, 4096, ... rows it is given and makes ``8 * sqrt(rows)`` lists; the rows
    between two trainings join the lists of the latest. Cells are found by distance and ranked by ``q.mean`` of the
    rows they hold now: on real keys, which drift, this recalls far more than FAISS's own training for inner products,
    which normalises the centroids and keeps them as trained.

    Where rows are on the CPU, FAISS holds the lists, with a copy of the keys. On a device ``Cells`` does, of ids alone:
    rows are scored where they lie, and ``search`` waits for nothing.
    """

    name = "ivf"
    min_rows = MIN_ROWS
    built_in = Rates(4e-4, 8e-9, 8e-10, 1.2e-11)
    typical = Work(1 << 15, 1 << 18, 1 << 16)

    @classmethod
    def of(cls, config: RetrievalConfig) -> Self:
        """See KeyIndex."""
        return cls(config.window, config.index_options["nprobe"], sample=config.samples)

    @classmethod
    def rows_scored(cls, config: RetrievalConfig, work: Workload) -> float:
        """See SearchIndex; centroids, and the keys of the lists probed."""
        cells = LISTS_PER_ROOT * math.sqrt(work.eligible)
        share = min(1.0, config.index_options["nprobe"] / cells)
        return work.asked * (cells + share * work.eligible) * work.dim / 64

    @classmethod
    def bytes_for(cls, config: RetrievalConfig, rows: int, dim: int) -> int:
        """See KeyIndex; where rows are on the CPU, and more than on a device."""
        lists, augmented = lists_for(rows_to_train(rows)), dim + config.samples
        return (rows + 2 * lists) * 4 * augmented + 8 * rows + 8 * lists * augmented if rows else 0

    def __init__(self, window: int, nprobe: int, *, sample: bool = False) -> None:
        super().__init__(window, sample)
        self._nprobe = nprobe

    def _new_unit(self) -> FaissUnit:
        return _IvfUnit(self._nprobe)

    def _new_units(self, store: KVStore) -> list[Unit]:
        return [Cells(self._nprobe)] if on_device(store.start) else super()._new_units(store)

    def search(
        self, query: Tensor, store: KVStore, k: int, lo: Tensor, stop: int, lift: float | None = None
    ) -> Candidates:
        """See KeyIndex."""
        by_row = [unit for units in self._units for unit in units if isinstance(unit, Cells)]
        if not by_row:
            return super().search(query, store, k, lo, stop, lift)
        width = max(k, *(cells.most(k) for cells in by_row))
        at_once = max(1, CANDIDATES // (query.shape[0] * query.shape[1] * width))
        if query.shape[2] > at_once:
            parts = [self.search(part, store, k, lo, stop, lift) for part in query.split(at_once, dim=2)]
            return Candidates(torch.cat([part.ids for part in parts], dim=2), sum(part.bytes_read for part in parts))
        asked = self._asked(query, store.num_kv_heads, lift)
        found = [cells.candidates(each, k) for cells, each in zip(by_row, asked, strict=True)]
        ids = torch.stack([pad(ids, (0, width - ids.shape[2]), value=-1) for ids in found])
        ids = ids.view(*query.shape[:3], width)
        ids = torch.where(ids < 0, ids, ids + lo[:, None, None, None])
        ids = ids.masked_fill(ids >= stop, -1)
        parts = ids.split(max(1, GATHERED // query.shape[:3].numel()), dim=3)
        scores = torch.cat([store.scores(query, part, 1.0) for part in parts], dim=3)
        if lift is not None:
            scores += lift * noise_of(store, ids)
        ids = ids.gather(3, scores.topk(k, dim=3).indices)
        keys = store.rows[0]
        means = sum(cells.means.nbytes for cells in by_row) * asked.shape[2]
        return Candidates(ids, means + scores.numel() * keys.shape[3] * keys.element_size())


class _IvfUnit(FaissUnit):
    def __init__(self, nprobe: int) -> None:
        self.nprobe = nprobe
        self.rows = self.trained_rows = self.lists = 0
        self.index: Any = None
        self.cells: Any = None
        self.mean: Rows = np.zeros(0, dtype=np.float32)
        self.sums: np.ndarray[Any, Any] = np.zeros((0, 0))
        self.sizes: np.ndarray[Any, Any] = np.zeros(0)

    def build(self, keys: Keys, stops: list[int]) -> None:
        rows, training = to_numpy(keys(0, stops[-1])), rows_to_train(stops[-1])
        if training != self.trained_rows:
            self._train(rows[:training])
        for stop in stops:
            if stop > self.rows:
                self._add(rows[self.rows : stop])

    def state(self) -> Arrays:
        if self.index is None:
            return {}
        faiss = require_faiss()
        cells = faiss.rev_swig_ptr(self.cells.get_xb(), self.cells.ntotal * self.cells.d)
        nearest = np.empty(self.rows, np.int32)
        for cell in range(self.lists):
            size = self.index.invlists.list_size(cell)
            if size:
                nearest[faiss.rev_swig_ptr(self.index.invlists.get_ids(cell), size)] = cell
        return {"centroids": cells.reshape(self.lists, -1).copy(), "nearest": nearest, "sums": self.sums.copy()}

    def restore(self, keys: Keys, stops: list[int], state: Arrays) -> None:
        rows = to_numpy(keys(0, stops[-1]))
        centroids, nearest, sums = expect_cells(state, "", *rows.shape)
        self._start(rows[: rows_to_train(len(rows))], centroids)
        self.sums = sums.copy()
        self._join(rows - self.mean, nearest.astype(np.int64))

    def _train(self, keys: Rows) -> None:
        kmeans = require_faiss().Kmeans(
            keys.shape[1], lists_for(len(keys)), niter=ITERATIONS, seed=1, min_points_per_centroid=1
        )
        kmeans.train(keys - keys.mean(axis=0, dtype=np.float32))
        self._start(keys, kmeans.centroids)

    def _start(self, keys: Rows, centroids: Rows) -> None:
        """Empty lists around the centroids of the rows that were trained on."""
        faiss = require_faiss()
        # Centring shifts every logit of a query by one constant, which softmax ignores, and makes the cells useful:
        # keys share one large mean direction.
        self.mean = keys.mean(axis=0, dtype=np.float32)
        self.trained_rows, self.rows = len(keys), 0
        self.lists = len(centroids)
        self.cells = faiss.IndexFlatL2(keys.shape[1])
        self.cells.add(np.ascontiguousarray(centroids))
        self.index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(keys.shape[1]), keys.shape[1], self.lists, faiss.METRIC_INNER_PRODUCT
        )
        self.index.is_trained = True
        self.sums, self.sizes = np.zeros((self.lists, keys.shape[1])), np.zeros(self.lists)

    def _add(self, keys: Rows) -> None:
        centred = keys - self.mean
        _, nearest = self.cells.search(centred, 1)
        if (nearest < 0).any():
            raise ValueError("keys are too large to cluster: their squared distances overflow float32")
        np.add.at(self.sums, nearest[:, 0], centred)
        self._join(centred, nearest[:, 0].copy())

    def _join(self, centred: Rows, cells: Ids) -> None:
        """Put the next rows into their cells' lists, whose sums hold them already."""
        faiss = require_faiss()
        ids = np.arange(self.rows, self.rows + len(cells), dtype=np.int64)
        self.index.add_core(len(cells), faiss.swig_ptr(centred), faiss.swig_ptr(ids), faiss.swig_ptr(cells))
        self.sizes += np.bincount(cells, minlength=self.lists)
        self.index.quantizer.reset()
        self.index.quantizer.add((self.sums / np.maximum(self.sizes, 1)[:, None]).astype(np.float32))
        self.rows += len(cells)

    def search(self, query: Rows, k: int, stop: int | None) -> tuple[Ids, int]:
        faiss = require_faiss()
        if self.index is None:
            return np.full((len(query), k), -1, dtype=np.int64), 0
        options = {} if stop is None else {"sel": faiss.IDSelectorRange(0, stop)}
        # Few rows (a padded batch row) or a k near all of them: every list is probed, so that nothing can be missed.
        everything = self.rows < MIN_ROWS or k >= self.rows
        probed = self.lists if everything else min(self.nprobe, self.lists)
        params = faiss.SearchParametersIVF(nprobe=probed, **options)
        faiss.cvar.indexIVF_stats.reset()
        _, ids = self.index.search(query, k, params=params)
        return ids, int(faiss.cvar.indexIVF_stats.ndis) + len(query) * self.lists

    def clone(self) -> Self:
        copy = type(self)(self.nprobe)
        copy.__dict__.update(self.__dict__)
        copy.index = None if self.index is None else require_faiss().clone_index(self.index)
        copy.sums, copy.sizes = self.sums.copy(), self.sizes.copy()
        return copy

    @property
    def nbytes(self) -> int:
        # Each row is held once more, with its id, beside two copies of the centroids.
        return (self.rows + 2 * self.lists) * self.mean.nbytes + 8 * self.rows + self.sums.nbytes

    def describe(self) -> dict[str, Any]:
        return {"lists": self.lists, "nprobe": min(self.nprobe, self.lists), "trained on rows": self.trained_rows}
