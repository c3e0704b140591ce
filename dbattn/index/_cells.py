"""Cells: the inverted lists of ivf where rows lie on a device, and what both kinds of its units agree on."""

import copy
import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from index_kernels.kmeans import kmeans, nearest

from ._faiss import Keys, Rows, Unit
from .base import Arrays, expect

# Rows below which nothing is trained: an exact scan of so few costs less than probing.
MIN_ROWS = 1024
# Lists for each root of the rows trained on.
LISTS_PER_ROOT = 8
# Rows trained on that are added at once.
ADDED = 1 << 16
# Of k-means.
ITERATIONS = 10


class Cells(Unit):
    """The inverted lists of all KV heads of a batch row: ids alone, no copy of a key.

    Tensors are replaced and never written to, so copies share them.
    """

    of_all_heads = True

    def __init__(self, nprobe: int) -> None:
        self.nprobe = nprobe
        self.rows = self.trained_rows = self.lists = 0
        # Rows in the fullest ``nprobe`` cells of a head. So many are read for each query, whose best ``nprobe`` cells
        # have no more; the next best fill up what is left.
        self.room = 0
        # The mean ``[Hkv, 1, D]`` of the rows trained on, and around it centroids ``[Hkv, lists, D]``.
        self.mean = self.centroids = torch.empty(0)
        # Cells of rows, int32 ``[Hkv, n]``; sums of the rows of a cell, float64, and their means ``[Hkv, lists, D]``.
        self.cell_of = self.sums = self.means = torch.empty(0)
        # Rows cell by cell ``[Hkv, n]``, rising inside a cell; where each cell ends in them, and its size.
        self.order = self.ends = self.sizes = torch.empty(0)

    def build(self, keys: Keys, stops: list[int]) -> None:
        training = rows_to_train(stops[-1])
        if training != self.trained_rows:
            rows = keys(0, training)
            mean, lists = rows.mean(dim=1, keepdim=True), lists_for(training)
            length, count = (torch.full((len(rows), 1), n, device=rows.device) for n in (training, lists))
            centred = rows - mean
            self._start(mean, kmeans(centred, length, count, lists, ITERATIONS, 1), training)
            del rows
            for part in centred.split(ADDED, dim=1):
                self._add(part)
        for stop in stops:
            if stop > self.rows:
                self._add(keys(self.rows, stop) - self.mean)
        self._order()

    def state(self) -> Arrays:
        parts = {"centroids": self.centroids, "nearest": self.cell_of, "sums": self.sums} if self.rows else {}
        arrays = {name: part.cpu().numpy() for name, part in parts.items()}
        return {f"{h}.{name}": array[h] for name, array in arrays.items() for h in range(len(array))}

    def restore(self, keys: Keys, stops: list[int], state: Arrays) -> None:
        training = rows_to_train(stops[-1])
        rows = keys(0, training)
        heads, _, dim = rows.shape
        by_head = [expect_cells(state, f"{h}.", stops[-1], dim) for h in range(heads)]
        centroids, cell_of, sums = (
            torch.from_numpy(np.stack(part)).to(rows.device) for part in zip(*by_head, strict=True)
        )
        self._start(rows.mean(dim=1, keepdim=True), centroids, training)
        self.cell_of, self.sums, self.rows = cell_of, sums, stops[-1]
        self._order()

    def _start(self, mean: Tensor, centroids: Tensor, training: int) -> None:
        """Empty cells around the centroids of the rows that were trained on."""
        self.mean, self.centroids = mean, centroids
        self.trained_rows, self.rows, self.lists = training, 0, centroids.shape[1]
        self.cell_of = torch.empty((len(centroids), 0), dtype=torch.int32, device=centroids.device)
        self.sums = torch.zeros_like(centroids, dtype=torch.float64)

    def _add(self, centred: Tensor) -> None:
        found = nearest(centred, self.centroids).int()
        order, ends = _by_cell(found, self.lists)
        rows = torch.take_along_dim(centred, order[..., None], dim=1).double()
        self.sums = self.sums + torch.segment_reduce(rows, "sum", lengths=_sizes(ends), axis=1, unsafe=True)
        self.cell_of = torch.cat([self.cell_of, found], dim=1)
        self.rows += centred.shape[1]

    def _order(self) -> None:
        """What a search reads, of cells and sums as they are now."""
        self.order, self.ends = _by_cell(self.cell_of, self.lists)
        self.sizes = _sizes(self.ends)
        self.means = (self.sums / self.sizes.clamp(min=1)[..., None]).float()
        self.room = int(self.sizes.topk(min(self.nprobe, self.lists)).values.sum(dim=1).max())

    def most(self, k: int) -> int:
        """Rows scored for a query; as in _IvfUnit, few rows or a k near all of them probe every cell."""
        return self.rows if self.rows < MIN_ROWS or k >= self.rows else self.room

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """Ids ``[Hkv, n, room]`` of the rows in the cells that queries ``[Hkv, n, D]`` probe; waits for nothing."""
        places = torch.arange(self.most(k), device=query.device)
        if not self.rows:
            return places.expand(*query.shape[:2], -1)
        cells = (query @ self.means.mT).argsort(dim=2, descending=True, stable=True)
        ends, sizes = (of[:, None].expand_as(cells).gather(2, cells) for of in (self.ends, self.sizes))
        # Cells one after the other, the best first: a row there is as far before its cell's end as in ``order``.
        ends_here = sizes.cumsum(dim=2)
        places = places.expand(*query.shape[:2], -1).contiguous()
        at = places + (ends - ends_here).gather(2, torch.searchsorted(ends_here, places, right=True))
        return self.order.gather(1, at.flatten(1)).view_as(at)

    def clone(self) -> Self:
        return copy.copy(self)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.__dict__.values() if isinstance(part, Tensor))

    def describe(self) -> dict[str, Any]:
        return {"lists": self.lists, "nprobe": min(self.nprobe, self.lists), "trained on rows": self.trained_rows}


def _by_cell(cells: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their ``cells [Hkv, n]``, and where each cell ends in it ``[Hkv, lists]``."""
    found = cells.sort(dim=1, stable=True)
    numbers = torch.arange(lists, dtype=cells.dtype, device=cells.device).expand(len(cells), -1).contiguous()
    return found.indices, torch.searchsorted(found.values, numbers, right=True)


def _sizes(ends: Tensor) -> Tensor:
    return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))


def rows_to_train(length: int) -> int:
    """How many rows the latest training covers: a function of the length alone, not of the calls that led to it."""
    training = MIN_ROWS
    while 2 * training <= length:
        training *= 2
    return min(training, length)


def lists_for(rows: int) -> int:
    """Cells that so many rows are trained in."""
    return min(rows, round(LISTS_PER_ROOT * math.sqrt(rows)))


def expect_cells(state: Arrays, head: str, rows: int, dim: int) -> tuple[Rows, Any, Any]:
    """Take a head's centroids, nearest cells and sums out of ``state``; raises ValueError where they do not fit."""
    lists = lists_for(rows_to_train(rows))
    centroids = expect(state, f"{head}centroids", np.float32, lists, dim)
    sums, nearest = expect(state, f"{head}sums", float, lists, dim), expect(state, f"{head}nearest", np.int32, rows)
    if rows and (nearest.min() < 0 or nearest.max() >= lists):
        raise ValueError(f"{head}nearest has cells from {nearest.min()} to {nearest.max()}, expected 0 to {lists - 1}")
    return centroids, nearest, sums
