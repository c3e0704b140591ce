"""The plan of a query: a union of row sources, why it was chosen, and (EXPLAIN) what it really read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .config import DENSE_BELOW, RetrievalConfig
from .machine import BUILT_IN, Rates, rates
from .usage import Usage, Workload, index_usage, scan_usage, summary_usage


@dataclass(frozen=True)
class Source:
    """One set of rows in a plan.

    Attributes:
        kind: "sinks + hot rows", "index scan", "list scan", "summary scan" or "dense scan".
        detail: which rows, in words.
        estimated: what it is expected to read.
        actual: what it read (None until the plan has run).
        mass: share of the plan's softmax weight that lies on these rows, mean (None until it has run).
    """

    kind: str
    detail: str
    estimated: Usage
    actual: Usage | None = None
    mass: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The source as plain data."""
        actual = None if self.actual is None else self.actual.to_dict()
        estimated = self.estimated.to_dict()
        return {"kind": self.kind, "detail": self.detail, "estimated": estimated, "actual": actual, "mass": self.mass}


@dataclass(frozen=True)
class QueryPlan:
    """A union of row sources; the states of the sources merge to the answer.

    Attributes:
        sources: what is read; estimated, and actual once the plan has run.
        reason: why this plan.
        hot: rows from here on are scanned exactly.
        backend: kernels that run it.
        seconds_estimated, seconds_dense: expected time of this plan, and of a dense scan; None where this machine has
            no rates, or none were needed.
        seconds: time it took (None until it has run).
    """

    sources: tuple[Source, ...]
    reason: str
    hot: int = 0
    backend: str = "reference"
    seconds_estimated: float | None = None
    seconds_dense: float | None = None
    seconds: float | None = None

    @property
    def is_dense(self) -> bool:
        """True where all rows are read."""
        return self.sources[0].kind == "dense scan"

    @property
    def is_segmented(self) -> bool:
        """True where lists are read."""
        return any(source.kind == "list scan" for source in self.sources)

    @property
    def bytes_read(self) -> int:
        """Bytes read by the whole call; 0 until the plan has run."""
        return sum(source.actual.bytes for source in self.sources if source.actual is not None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "reason": self.reason,
            "backend": self.backend,
            "seconds_estimated": self.seconds_estimated,
            "seconds_dense": self.seconds_dense,
            "seconds": self.seconds,
            "sources": [source.to_dict() for source in self.sources],
        }

    def __str__(self) -> str:
        times = f"time={_ms(self.seconds)}" if self.seconds is not None else ""
        if self.seconds_estimated is not None:
            times += f" (estimated {_ms(self.seconds_estimated)}, dense {_ms(self.seconds_dense)})"
        lines = [f"Merge of {len(self.sources)} row sources   {times}", f"│  {self.reason}; kernels: {self.backend}"]
        for i, source in enumerate(self.sources):
            last = i == len(self.sources) - 1
            mass = "" if source.mass is None else f" mass={source.mass:.1%}"
            lines.append(f"{'└─' if last else '├─'} {source.kind}: {source.detail}{mass}")
            lines += [f"{'  ' if last else '│ '}   {line}" for line in _usage_lines(source)]
        return "\n".join(lines)


@lru_cache(maxsize=64)  # the layers of a model ask the same
def choose_plan(
    config: RetrievalConfig,
    work: Workload,
    *,
    backend: str,
    threads: int | None,
    retrieve: bool,
    estimate: bool,
) -> QueryPlan:
    """The cheapest plan the config allows for one call.

    ``threads``: of the CPU that will run it, None on other devices, for which there are no rates. ``estimate``:
    expected seconds are wanted even where no choice depends on them. Rows from ``hot`` on are scanned exactly: the
    window of the oldest query and all that is not indexed yet. Reasons hold no number that changes from step to step:
    reports count them.
    """
    segmented, auto = config.index_name == "segmented", config.dense_below_rows is None
    hot = work.indexed if segmented else max(0, min(work.rows - work.queries - config.window + 1, work.indexed))
    eligible = hot - work.first_index_row

    def rates_of(engine: str) -> Rates | None:
        return rates(engine, threads) if threads is not None and (estimate or auto) else None

    def dense(reason: str) -> QueryPlan:
        usage = scan_usage(work, work.rows, rates_of("dense") if estimate else None, alone=True)
        source = Source("dense scan", f"all {work.rows} rows", usage)
        return QueryPlan((source,), reason, hot, backend, usage.seconds, usage.seconds)

    if not retrieve:
        return dense("dense was asked for")
    if work.queries > config.max_queries:
        return dense(f"more queries in one call than max_queries={config.max_queries}")
    least = config.dense_below_rows
    if least is not None and work.rows < least:
        return dense(f"fewer rows than dense_below={least}")
    if eligible <= 0:
        return dense("sinks and hot rows are all there is" if work.indexed else "no rows in the index yet")
    if segmented and hot > work.rows - work.queries:
        return dense("rows after the first query are sealed already")
    if (config.k or 0 if segmented else config.rows_retrieved) >= eligible:
        return dense(f"k={config.rows_retrieved} covers every row in the index")

    if auto and config.k is None and work.rows < DENSE_BELOW[config.index_name]:
        return dense(f"fewer rows than {DENSE_BELOW[config.index_name]}")
    if auto and threads is not None and not estimate and _is_clear(config, work, hot, threads):
        auto = False

    scan_rates = rates_of("dense")
    exact_rows = work.rows - hot + config.n_sink - (work.queries - 1) / 2
    exact = Source(
        "sinks + hot rows",
        f"first {config.n_sink} rows and rows {hot} to {work.rows - 1}",
        scan_usage(work, exact_rows, scan_rates),
    )
    found = index_usage(work, config, config.k, rates_of(config.index_name))
    if segmented:
        asked = "budget by size" if config.k is None else f"k={config.k}"
        sources = [exact, Source("list scan", f"segmented, {asked} of {eligible} rows", found)]
        if config.tail_name == "centroid":
            sources.append(Source("summary scan", "one summary for each list not read", summary_usage(work, config.k)))
    else:
        asked = f"k={config.rows_retrieved}"
        drawn = " sampled" if config.tail_name == "sample" else ""
        sources = [exact, Source("index scan", f"{config.index_name}, {asked}{drawn} of {eligible} rows", found)]
    seconds = seconds_dense = None
    if scan_rates is not None and found.seconds is not None and exact.estimated.seconds is not None:
        seconds = exact.estimated.seconds + found.seconds
        seconds_dense = scan_usage(work, work.rows, scan_rates, alone=True).seconds
    if auto:
        if seconds is None or seconds_dense is None:
            device = "cuda" if backend == "triton" else f"the {backend} kernels"
            if not config.wishes_retrieval:
                return dense(
                    f"no rates for {device}: answered densely; "
                    "ask for an index by name, k= or dense_below= to retrieve all the same"
                )
            if work.rows < DENSE_BELOW[config.index_name]:
                return dense(f"fewer rows than {DENSE_BELOW[config.index_name]} (no rates for {device})")
        elif seconds_dense <= seconds:
            return replace(dense("a dense scan is estimated to be faster"), seconds_dense=seconds_dense)
    return QueryPlan(tuple(sources), f"{work.rows} rows, {asked}", hot, backend, seconds, seconds_dense)


def _is_clear(config: RetrievalConfig, work: Workload, hot: int, threads: int) -> bool:
    """Whether the index is faster by so much on the machine of the built-in rates that none need be measured here.

    By four times there, with two threads; more threads may speed up a scan, but not the choosing of rows.
    """
    exact = scan_usage(work, work.rows - hot + config.n_sink, BUILT_IN["dense"]).seconds or 0.0
    found = index_usage(work, config, config.k, BUILT_IN[config.index_name]).seconds or 0.0
    dense = scan_usage(work, work.rows, BUILT_IN["dense"], alone=True).seconds or 0.0
    return dense > 2 * max(2, threads) * (exact + found)


def sum_plans(plans: Sequence[QueryPlan]) -> QueryPlan:
    """One plan for several layers: sources of one kind added up, rows and lists as means, mass as a mean.

    Raises:
        ValueError: no plan that has run.
    """
    if not plans:
        raise ValueError("no plan has run yet: decode a token inside `with handle.audit():` first")
    kinds = dict.fromkeys(source.kind for plan in plans for source in plan.sources)
    sources = []
    for kind in kinds:
        same = [source for plan in plans for source in plan.sources if source.kind == kind]
        actuals = [source.actual for source in same if source.actual is not None]
        sources.append(
            Source(
                kind,
                f"in {len(same)} layers",
                _sum_usages([source.estimated for source in same], len(plans)),
                _sum_usages(actuals, len(plans)) if actuals else None,
                sum(source.mass or 0.0 for source in same) / len(plans),
            )
        )
    reasons = Counter(plan.reason for plan in plans)
    reason = f"{len(plans)} layers; {'; '.join(f'{count}x {reason}' for reason, count in reasons.most_common())}"
    times = [[getattr(plan, name) for plan in plans] for name in ("seconds_estimated", "seconds_dense", "seconds")]
    totals = [None if None in each else sum(each) for each in times]
    return QueryPlan(tuple(sources), reason, plans[0].hot, plans[0].backend, *totals)


def _sum_usages(usages: Sequence[Usage], layers: int) -> Usage:
    """Bytes and seconds of all, rows and lists per layer."""
    seconds = [usage.seconds for usage in usages if usage.seconds is not None]
    return Usage(
        sum(usage.rows for usage in usages) / layers,
        sum(usage.bytes for usage in usages),
        sum(usage.lists for usage in usages) / layers,
        sum(seconds) if len(seconds) == len(usages) else None,
    )


def _usage_lines(source: Source) -> list[str]:
    """What was read beside what was expected."""

    def line(name: str, usage: Usage) -> str:
        lists = f" lists={usage.lists:.0f}" if usage.lists else ""
        seconds = "" if usage.seconds is None else f" time={_ms(usage.seconds)}"
        return f"{name} rows={usage.rows:.0f}{lists} bytes={usage.bytes:,}{seconds}"

    actual = [] if source.actual is None else [line("actual   ", source.actual)]
    return [*actual, line("estimated", source.estimated)]


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{1000 * seconds:.3g} ms"
