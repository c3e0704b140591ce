"""The plan of a query: a union of row sources, why it was chosen, and (EXPLAIN) what it really read."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .config import RetrievalConfig


@dataclass(frozen=True)
class Source:
    """One set of rows in a plan.

    Attributes:
        kind: "sinks + hot rows", "index scan", "list scan", "summary scan" or "dense scan".
        detail: which rows, in words.
        rows: rows read per query head and position, mean (None until the plan has run).
        bytes: bytes read for it by the whole call, keys scored by the index included (None until it has run).
        mass: share of the plan's softmax weight that lies on these rows, mean (None until it has run).
    """

    kind: str
    detail: str
    rows: float | None = None
    bytes: int | None = None
    mass: float | None = None


@dataclass(frozen=True)
class QueryPlan:
    """A union of row sources; the states of the sources merge to the answer."""

    sources: tuple[Source, ...]
    reason: str
    hot: int = 0
    backend: str = "reference"

    @property
    def is_dense(self) -> bool:
        """True where all rows are read."""
        return self.sources[0].kind == "dense scan"

    @property
    def bytes_read(self) -> int:
        """Bytes read by the whole call; 0 until the plan has run."""
        return sum(source.bytes or 0 for source in self.sources)

    def with_actuals(self, sources: list[Source]) -> "QueryPlan":
        """The plan with what each source really read."""
        return replace(self, sources=tuple(sources))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        sources = [
            {name: getattr(s, name) for name in ("kind", "detail", "rows", "bytes", "mass")} for s in self.sources
        ]
        return {"reason": self.reason, "backend": self.backend, "sources": sources}

    def __str__(self) -> str:
        lines = [f"Merge of {len(self.sources)} row sources   ({self.reason}; kernels: {self.backend})"]
        for i, source in enumerate(self.sources):
            actual = ""
            if source.rows is not None and source.bytes is not None:
                actual = f"   rows={source.rows:.1f} bytes={source.bytes:,}"
            if source.mass is not None:
                actual += f" mass={source.mass:.1%}"
            lines.append(f"{'└─' if i == len(self.sources) - 1 else '├─'} {source.kind}: {source.detail}{actual}")
        return "\n".join(lines)


@lru_cache(maxsize=64)  # the layers of a model ask the same
def choose_plan(
    config: RetrievalConfig,
    *,
    rows: int,
    queries: int,
    indexed: int,
    first_index_row: int,
    backend: str,
    retrieve: bool,
) -> QueryPlan:
    """The cheapest plan the config allows for the ``queries`` newest positions of a store of ``rows`` rows.

    ``indexed``: rows below this are in the index. ``first_index_row``: the least row that the index answers for.
    Rows from ``hot`` on are scanned exactly: the window of the oldest query and all that is not indexed yet.
    Reasons hold no number that changes from step to step: reports count them.
    """
    segmented = config.index_name == "segmented"
    hot = indexed if segmented else max(0, min(rows - queries - config.window + 1, indexed))
    eligible = hot - first_index_row

    def dense(reason: str) -> QueryPlan:
        return QueryPlan((Source("dense scan", f"all {rows} rows"),), reason, backend=backend)

    if not retrieve:
        return dense("dense was asked for")
    if queries > config.max_queries:
        return dense(f"more queries in one call than max_queries={config.max_queries}")
    if rows < config.least_rows:
        return dense(f"fewer rows than dense_below={config.least_rows}")
    if eligible <= 0:
        return dense("sinks and hot rows are all there is" if indexed else "no rows in the index yet")
    if segmented and hot > rows - queries:
        return dense("rows after the first query are sealed already")
    if (config.k or 0 if segmented else config.rows_retrieved) >= eligible:
        return dense(f"k={config.rows_retrieved} covers every row in the index")
    exact = Source("sinks + hot rows", f"first {config.n_sink} rows and rows {hot} to {rows - 1}")
    if segmented:
        budget = "budget by size" if config.k is None else f"k={config.k}"
        sources = [exact, Source("list scan", f"segmented, {budget} of {eligible} rows")]
        if config.tail_name == "centroid":
            sources.append(Source("summary scan", "one summary for each list not read"))
        return QueryPlan(tuple(sources), f"{rows} rows, {budget}", hot=hot, backend=backend)
    k, drawn = config.rows_retrieved, " sampled" if config.tail_name == "sample" else ""
    scan = Source("index scan", f"{config.index_name}, k={k}{drawn} of {eligible} rows")
    return QueryPlan((exact, scan), f"{rows} rows, k={k}", hot=hot, backend=backend)
