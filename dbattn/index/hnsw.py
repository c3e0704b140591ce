"""HnswIndex: FAISS HNSW graphs over keys whose inner product was made a distance."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from ..config import RetrievalConfig
from ..query.usage import Rates, Work, Workload
from ._faiss import FaissIndex, FaissUnit, Ids, Keys, Rows, to_numpy
from .base import Arrays, expect, require_faiss

# Head room of M above the longest key seen, so that a slightly longer key does not open another graph.
HEADROOM = 1.1
# Links of a row for each neighbour asked for: two on the ground layer, and about 7 % more above it.
LINKS_PER_NEIGHBOR = 2.07
# A key longer than this many times the median of its block does not set the radius of the others' graph.
OUTLIER = 4.0


class HnswIndex(FaissIndex):
    """A graph walked greedily, keeping ``ef_search`` candidates.

    Keys become ``(k, sqrt(M^2 - |k|^2))`` and queries ``(q, 0)``: the nearest row by distance is then the row with
    the largest inner product. A key longer than M cannot be placed so; it opens another graph with a larger M. A row
    joins the graph with the smallest M that fits it, every graph is searched, and hits compare by
    ``q.k = (|q|^2 + M^2 - d^2) / 2``, which holds across graphs.
    """

    name = "hnsw"
    built_in = Rates(4e-4, 3e-8, 8e-10, 1.2e-11)
    typical = Work(1 << 14, 1 << 18, 1 << 16)

    @classmethod
    def of(cls, config: RetrievalConfig) -> Self:
        """See KeyIndex."""
        return cls(config.window, **config.index_options, sample=config.samples)

    @classmethod
    def rows_scored(cls, config: RetrievalConfig, work: Workload) -> float:
        """See SearchIndex; places of the search queue, for each level of the graph."""
        queue = max(config.index_options["ef_search"], config.rows_retrieved)
        return work.asked * queue * math.log2(work.eligible + 1) * work.dim / 64

    @classmethod
    def bytes_for(cls, config: RetrievalConfig, rows: int, dim: int) -> int:
        """See KeyIndex."""
        return _bytes_for(rows, dim + config.samples, config.index_options["neighbors"])

    def __init__(self, window: int, ef_search: int, neighbors: int, *, sample: bool = False) -> None:
        super().__init__(window, sample)
        self._ef_search, self._neighbors = ef_search, neighbors

    def _new_unit(self) -> FaissUnit:
        return _HnswUnit(self._ef_search, self._neighbors)


@dataclass
class _Graph:
    """Rows no longer than ``radius`` (M); ``rows[i]`` is the local id of the graph's i-th row, rising."""

    radius: float
    index: Any
    rows: Ids


class _HnswUnit(FaissUnit):
    def __init__(self, ef_search: int, neighbors: int) -> None:
        self.ef_search, self.neighbors = ef_search, neighbors
        self.rows = self.dim = 0
        self.mean: Rows = np.zeros(0, dtype=np.float32)
        self.graphs: list[_Graph] = []  # by rising radius

    def build(self, keys: Keys, stops: list[int]) -> None:
        # FAISS has no HNSW for GPUs: the graph lives and is walked on the CPU, whatever the device.
        self._take(to_numpy(keys(0, stops[-1])), stops, lambda graph, vectors: graph.index.add(vectors))

    def state(self) -> Arrays:
        arrays: Arrays = {}
        array_of = require_faiss().vector_to_array
        for number, graph in enumerate(self.graphs):
            hnsw = graph.index.hnsw
            arrays[f"links{number}"] = array_of(hnsw.neighbors)
            arrays[f"entry{number}"] = np.array([hnsw.entry_point], np.int32)
        return arrays

    def restore(self, keys: Keys, stops: list[int], state: Arrays) -> None:
        # The vectors and each node's levels follow from the rows; only the links are slow to find.
        self._take(to_numpy(keys(0, stops[-1])), stops, lambda graph, vectors: graph.index.storage.add(vectors))
        for number, graph in enumerate(self.graphs):
            _link(graph, expect(state, f"links{number}", np.int32, None), expect(state, f"entry{number}", np.int32, 1))

    def _take(self, keys: Rows, stops: list[int], add: Callable[["_Graph", Rows], None]) -> None:
        if not self.graphs:
            self.mean, self.dim = keys[: stops[0]].mean(axis=0, dtype=np.float32), keys.shape[1]
        for stop in stops:
            if stop > self.rows:
                self._add(keys[self.rows : stop] - self.mean, add)
                self.rows = stop

    def _add(self, keys: Rows, add: Callable[["_Graph", Rows], None]) -> None:
        norms = np.einsum("nd,nd->n", keys, keys, dtype=np.float64)
        lengths = np.sqrt(norms)
        if not self.graphs or lengths.max() > self.graphs[-1].radius:
            # The radius fits the ordinary rows of the block, so that one outlier opens a graph for itself alone.
            ordinary = lengths if self.graphs else lengths[lengths <= OUTLIER * np.median(lengths)]
            for longest in (ordinary.max(), lengths.max()):
                if not self.graphs or longest > self.graphs[-1].radius:
                    index = require_faiss().IndexHNSWFlat(self.dim + 1, self.neighbors)
                    index.hnsw.efConstruction = max(64, 2 * self.neighbors)
                    self.graphs.append(_Graph(max(longest * HEADROOM, 1e-6), index, np.zeros(0, np.int64)))
        below = -np.inf
        for graph in self.graphs:
            chosen = np.flatnonzero((lengths > below) & (lengths <= graph.radius))
            below = graph.radius
            if len(chosen):
                height = np.sqrt(np.maximum(graph.radius**2 - norms[chosen], 0.0)).astype(np.float32)
                add(graph, np.hstack([keys[chosen], height[:, None]]))
                graph.rows = np.concatenate([graph.rows, self.rows + chosen])

    def search(self, query: Rows, k: int, stop: int | None) -> tuple[Ids, int]:
        faiss = require_faiss()
        flat = np.hstack([query, np.zeros((len(query), 1), dtype=np.float32)])
        ids = np.full((len(query), k), -1, dtype=np.int64)
        scores = np.full((len(query), k), -np.inf)
        faiss.cvar.hnsw_stats.reset()
        for graph in self.graphs:
            seen = len(graph.rows) if stop is None else int(np.searchsorted(graph.rows, stop))
            if not seen:
                continue
            options = {} if seen == len(graph.rows) else {"sel": faiss.IDSelectorRange(0, seen)}
            params = faiss.SearchParametersHNSW(efSearch=max(min(self.ef_search, len(graph.rows)), k), **options)
            distances, local = graph.index.search(flat, k, params=params)
            products = np.where(local >= 0, graph.radius**2 - distances.astype(np.float64), -np.inf)
            found = np.where(local >= 0, graph.rows[np.maximum(local, 0)], -1)
            ids, scores = np.hstack([ids, found]), np.hstack([scores, products])
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
        return _bytes_for(self.rows, self.dim, self.neighbors)

    def describe(self) -> dict[str, Any]:
        return {"graphs": len(self.graphs), "ef_search": self.ef_search, "neighbors": self.neighbors}


def _bytes_for(rows: int, dim: int, neighbors: int) -> int:
    """Bytes of a graph: for each row the augmented key, and its links."""
    return rows * (4 * (dim + 1) + round(4 * LINKS_PER_NEIGHBOR * neighbors))


def _link(graph: _Graph, links: Ids, entry: Ids) -> None:
    """Give a graph whose vectors are stored the links that its nodes had; raises ValueError for links it cannot have.

    FAISS follows links without looking: each must lead to a node that exists on the level it is on.
    """
    faiss = require_faiss()
    hnsw, rows = graph.index.hnsw, len(graph.rows)
    if not rows:
        return
    # Levels are drawn from a generator of fixed seed, so the graph can go on as if it had never been saved.
    hnsw.prepare_level_tab(rows, False)
    levels, offsets = faiss.vector_to_array(hnsw.levels), faiss.vector_to_array(hnsw.offsets).astype(np.int64)
    if len(links) != offsets[-1]:
        raise ValueError(f"links are {len(links)}, expected {offsets[-1]} for {rows} rows")
    if links.min() < -1 or links.max() >= rows:
        raise ValueError(f"links lead to rows {links.min()} to {links.max()}, expected -1 to {rows - 1}")
    top = int(levels.max())
    for level in range(1, top):
        first, stop = hnsw.cum_nb_neighbors(level), hnsw.cum_nb_neighbors(level + 1)
        found = links[offsets[:-1][levels > level][:, None] + np.arange(first, stop)]
        if (levels[found[found >= 0]] <= level).any():
            raise ValueError(f"links of level {level} lead to rows that are not on it")
    if not 0 <= entry[0] < rows or levels[entry[0]] != top:
        raise ValueError(f"entry is {entry[0]}, expected a row on the highest level")
    faiss.copy_array_to_vector(np.ascontiguousarray(links), hnsw.neighbors)
    hnsw.entry_point, hnsw.max_level, graph.index.ntotal = int(entry[0]), top - 1, rows
