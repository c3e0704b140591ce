"""IvfIndex: FAISS inverted lists over centred keys, trained again each time the rows have doubled."""

import math
from typing import Any, Self

import numpy as np
import torch

from ..config import RetrievalConfig
from ..query.usage import Rates, Work, Workload
from ._faiss import FaissIndex, Ids, Rows, Unit, on_gpu
from .base import Arrays, expect, require_faiss

# Rows below which nothing is trained: an exact scan of so few costs less than probing.
MIN_ROWS = 1024
# Lists for each root of the rows trained on.
LISTS_PER_ROOT = 8


class IvfIndex(FaissIndex):
    """Inverted lists: k-means cells of the keys, of which ``nprobe`` are read per query.

    Training happens on the first 1024, 2048, 4096, ... rows it is given and makes ``8 * sqrt(rows)`` lists; the rows
    between two trainings join the lists of the latest. Cells are found by distance and ranked by ``q.mean`` of the
    rows they hold now: on real keys, which drift, this recalls far more than FAISS's own training for inner products,
    which normalises the centroids and keeps them as trained.
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
        """See KeyIndex."""
        lists, augmented = _lists_for(_rows_to_train(rows)), dim + config.samples
        return (rows + 2 * lists) * 4 * augmented + 8 * rows + 8 * lists * augmented if rows else 0

    def __init__(self, window: int, nprobe: int, *, sample: bool = False) -> None:
        super().__init__(window, sample)
        self._nprobe = nprobe

    def _new_unit(self) -> Unit:
        return _IvfUnit(self._nprobe)


class _IvfUnit(Unit):
    def __init__(self, nprobe: int) -> None:
        self.nprobe = nprobe
        self.rows = self.trained_rows = self.lists = 0
        self.index: Any = None
        self.gpu_index: Any = None
        self.cells: Any = None
        self.mean: Rows = np.zeros(0, dtype=np.float32)
        self.sums: np.ndarray[Any, Any] = np.zeros((0, 0))
        self.sizes: np.ndarray[Any, Any] = np.zeros(0)

    def build(self, keys: Rows, stops: list[int], device: torch.device) -> None:
        training = _rows_to_train(stops[-1])
        if training != self.trained_rows:
            self._train(keys[:training])
        for stop in stops:
            if stop > self.rows:
                self._add(keys[self.rows : stop])
        self.gpu_index = on_gpu(self.index, device)

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

    def restore(self, keys: Rows, stops: list[int], device: torch.device, state: Arrays) -> None:
        rows = stops[-1]
        training = _rows_to_train(rows)
        lists, dim = _lists_for(training), keys.shape[1]
        centroids, sums = expect(state, "centroids", np.float32, lists, dim), expect(state, "sums", float, lists, dim)
        nearest = expect(state, "nearest", np.int32, rows)
        if rows and (nearest.min() < 0 or nearest.max() >= lists):
            raise ValueError(f"nearest has cells from {nearest.min()} to {nearest.max()}, expected 0 to {lists - 1}")
        self._start(keys[:training], centroids)
        self.sums = sums.copy()
        self._join(keys[:rows] - self.mean, nearest.astype(np.int64))
        self.gpu_index = on_gpu(self.index, device)

    def _train(self, keys: Rows) -> None:
        kmeans = require_faiss().Kmeans(
            keys.shape[1], _lists_for(len(keys)), niter=10, seed=1, min_points_per_centroid=1
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
        if self.gpu_index is not None and stop is None:
            _, ids = self.gpu_index.search(query, k, params=params)
            return ids, len(query) * (self.lists + probed * self.rows // self.lists)
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


def _rows_to_train(length: int) -> int:
    """How many rows the latest training covers: a function of the length alone, not of the calls that led to it."""
    training = MIN_ROWS
    while 2 * training <= length:
        training *= 2
    return min(training, length)


def _lists_for(rows: int) -> int:
    return min(rows, round(LISTS_PER_ROOT * math.sqrt(rows)))
