"""HnswIndex: FAISS HNSW graphs over keys whose inner product was made a distance."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from ._faiss import FaissIndex, Ids, Rows, Unit
from .base import BLOCK, require_faiss

# Head room of M above the longest key seen, so that a slightly longer key does not open another graph.
HEADROOM = 1.1


class HnswIndex(FaissIndex):
    """A graph walked greedily, keeping ``ef_search`` candidates.

    Keys become ``(k, sqrt(M^2 - |k|^2))`` and queries ``(q, 0)``: the nearest row by distance is then the row with
    the largest inner product. A key longer than M cannot be placed so; it opens another graph with a larger M, every
    graph is searched, and hits compare by ``q.k = (|q|^2 + M^2 - d^2) / 2``, which holds across graphs.
    """

    name = "hnsw"

    def __init__(self, ef_search: int, neighbors: int) -> None:
        super().__init__(min_rows=BLOCK)
        self._ef_search, self._neighbors = ef_search, neighbors

    def _new_unit(self) -> Unit:
        return _HnswUnit(self._ef_search, self._neighbors)


@dataclass(frozen=True)
class _Graph:
    """Rows from ``first`` on, all of them no longer than ``radius`` (M)."""

    first: int
    radius: float
    index: Any


class _HnswUnit(Unit):
    def __init__(self, ef_search: int, neighbors: int) -> None:
        self.ef_search, self.neighbors = ef_search, neighbors
        self.rows = self.dim = 0
        self.mean: Rows = np.zeros(0, dtype=np.float32)
        self.graphs: list[_Graph] = []

    def build(self, keys: Rows, stops: list[int], device: torch.device) -> None:
        # FAISS has no HNSW for GPUs: the graph lives and is walked on the CPU, whatever the device.
        if not self.graphs:
            self.mean, self.dim = keys[: stops[0]].mean(axis=0, dtype=np.float32), keys.shape[1]
        for stop in stops:
            if stop > self.rows:
                self._add(self.rows, keys[self.rows : stop] - self.mean)
                self.rows = stop

    def _add(self, first: int, keys: Rows) -> None:
        norms = np.einsum("nd,nd->n", keys, keys, dtype=np.float64)
        longest = float(np.sqrt(norms.max()))
        if not self.graphs or longest > self.graphs[-1].radius:
            faiss = require_faiss()
            index = faiss.IndexHNSWFlat(self.dim + 1, self.neighbors)
            index.hnsw.efConstruction = max(64, 2 * self.neighbors)
            self.graphs.append(_Graph(first, max(longest * HEADROOM, 1e-6), index))
        graph = self.graphs[-1]
        height = np.sqrt(np.maximum(graph.radius**2 - norms, 0.0)).astype(np.float32)
        graph.index.add(np.hstack([keys, height[:, None]]))

    def search(self, query: Rows, k: int, stop: int | None) -> tuple[Ids, int]:
        faiss = require_faiss()
        flat = np.hstack([query, np.zeros((len(query), 1), dtype=np.float32)])
        ids = np.full((len(query), k), -1, dtype=np.int64)
        scores = np.full((len(query), k), -np.inf, dtype=np.float32)
        faiss.cvar.hnsw_stats.reset()
        for graph in self.graphs:
            options = {} if stop is None else {"sel": faiss.IDSelectorRange(0, max(0, stop - graph.first))}
            params = faiss.SearchParametersHNSW(efSearch=max(self.ef_search, k), **options)
            distances, local = graph.index.search(flat, k, params=params)
            products = np.where(local >= 0, graph.radius**2 - distances, -np.inf)
            ids, scores = np.hstack([ids, np.where(local >= 0, local + graph.first, -1)]), np.hstack([scores, products])
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            ids, scores = np.take_along_axis(ids, best, 1), np.take_along_axis(scores, best, 1)
        return ids, int(faiss.cvar.hnsw_stats.ndis)

    def clone(self) -> Self:
        copy = type(self)(self.ef_search, self.neighbors)
        copy.__dict__.update(self.__dict__)
        clone_index = require_faiss().clone_index
        copy.graphs = [replace(graph, index=clone_index(graph.index)) for graph in self.graphs]
        return copy

    @property
    def nbytes(self) -> int:
        # Per row: the augmented key, and two links a neighbour on the ground layer with about 7 % more above it.
        return self.rows * (4 * (self.dim + 1) + round(4 * 2.07 * self.neighbors))

    def describe(self) -> dict[str, Any]:
        return {"graphs": len(self.graphs), "ef_search": self.ef_search, "neighbors": self.neighbors}
