"""Choosing a plan: the cheapest that the config allows for one call."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from ..config import RetrievalConfig
from .call import Call
from .plan import QueryPlan, Step
from .rates import SCAN, rates
from .steps import DenseScan
from .timed import TimedIndex
from .usage import Rates, Workload

# A GPU scans fewer bytes in less time than launching anything else takes.
LEAST_BYTES = 32 << 20
# A growing store is planned for anew after so many rows, where the rules of the plan allow it.
ROWS_PER_PLAN = 64


class PlannedIndex(TimedIndex, Protocol):
    """What a planner asks an index's class; see ``index.KeyIndex``."""

    moves_rows: bool

    @classmethod
    def hot(cls, config: RetrievalConfig, work: Workload) -> int:
        """Rows from here on are scanned exactly."""

    @classmethod
    def covers(cls, config: RetrievalConfig, eligible: int) -> bool:
        """Whether the budget asked for covers every row in the index."""

    @classmethod
    def asked(cls, config: RetrievalConfig, work: Workload) -> str:
        """The budget in words."""

    @classmethod
    def steps(cls, config: RetrievalConfig, work: Workload, own: Rates | None, scan: Rates | None) -> tuple[Step, ...]:
        """What the index offers for a call."""

    @classmethod
    def rows_indexed(cls, config: RetrievalConfig, rows: int) -> int:
        """How many of so many rows in a store it takes in."""

    def calibrate(self, call: Call) -> bool:
        """Find what budget calls like this one need, where that may have changed; returns whether ``needs`` did."""


@lru_cache(maxsize=512)  # the layers of a model ask alike
def choose_plan(
    index: type[PlannedIndex],
    config: RetrievalConfig,
    work: Workload,
    *,
    backend: str,
    processor: int | str | None,
    retrieve: bool,
    estimate: bool,
) -> QueryPlan:
    """The cheapest plan the config allows for one call.

    ``processor``: threads of the CPU that will run it, or the GPU's name; None where there are no rates, or none for
    such rows. ``estimate``: expected seconds are wanted even where no choice depends on them. Rows from ``hot`` on are
    scanned exactly: the window of the oldest query and all that is not indexed yet. Reasons hold no number that changes
    from step to step: reports count them.
    """
    auto = config.dense_below_rows is None
    # On a GPU, what was asked for by name is used whatever it takes.
    wish = auto and backend == "triton" and config.wishes_retrieval
    hot = index.hot(config, work)
    eligible = hot - work.first_index_row

    def rates_of(engine: type[PlannedIndex] | None) -> Rates | None:
        return rates(engine, processor) if processor is not None and (estimate or (auto and not wish)) else None

    def dense(reason: str) -> QueryPlan:
        step = DenseScan.of(work, rates_of(None) if estimate else None)
        seconds = step.sources[0].estimated.seconds
        return QueryPlan((step,), reason, hot, backend, seconds, seconds)

    if not retrieve:
        return dense("dense was asked for")
    if work.queries > config.max_queries:
        return dense(f"more queries in one call than max_queries={config.max_queries}")
    device = "cuda" if backend == "triton" else f"the {backend} kernels"
    no_rates = (
        f"no rates for {device}: answered densely; "
        "ask for an index by name, k= or dense_below= to retrieve all the same"
    )
    if backend == "triton" and auto and not wish:
        # Whatever is indexed: nothing is, where nothing may be retrieved.
        if processor is None:
            return dense(no_rates)
        if work.units * work.rows * work.row_bytes < LEAST_BYTES:
            return dense("a GPU scans so few rows as fast as it is asked to")
        if not work.indexed:
            return dense("a dense scan is estimated to be faster: no rows are in the index")
    least = config.dense_below_rows
    if least is not None and work.rows < least:
        return dense(f"fewer rows than dense_below={least}")
    if eligible <= 0:
        return dense("sinks and hot rows are all there is" if work.indexed else "no rows in the index yet")
    if index.moves_rows and hot > work.rows - work.queries:
        return dense("rows after the first query are sealed already")
    if index.covers(config, eligible):
        return dense(f"k={config.rows_retrieved} covers every row in the index")

    needs = work.needs if config.finds_budget else None
    if needs is not None and needs.scan:
        return dense(f"audits found no budget for target_error={needs.target:g}")

    below = config.traits.dense_below
    if auto and config.k is None and work.rows < below:
        return dense(f"fewer rows than {below}")
    if auto and isinstance(processor, int) and not estimate and _is_clear(index, config, work, processor):
        auto = False
    scan_rates, own = rates_of(None), rates_of(index)
    steps = index.steps(config, work, own, scan_rates)
    seconds = seconds_dense = None
    if scan_rates is not None and own is not None:
        seconds = seconds_of(steps)
        seconds_dense = DenseScan.of(work, scan_rates).sources[0].estimated.seconds
    if auto:
        if wish or seconds is None or seconds_dense is None:
            if not config.wishes_retrieval:
                return dense(no_rates)
            if work.rows < below:
                return dense(f"fewer rows than {below}")
        elif seconds_dense <= seconds:
            return replace(dense("a dense scan is estimated to be faster"), seconds_dense=seconds_dense)
    reason = f"{work.rows} rows, {index.asked(config, work)}"
    return QueryPlan(steps, reason, hot, backend, seconds, seconds_dense)


def recurring(hot_of: Callable[[RetrievalConfig, Workload], int], config: RetrievalConfig, work: Workload) -> Workload:
    """A call whose plan runs as the one for ``work`` does, the same for neighbouring calls; only its words differ."""
    near = Workload(work.rows + -work.rows % ROWS_PER_PLAN, *work[1:])
    hot, least = hot_of(config, work), max(config.dense_below_rows or 0, config.traits.dense_below)
    # In between no rule about rows may apply, nor may the rows that are scanned exactly differ.
    same = work.rows >= least and hot <= work.rows - work.queries and hot == hot_of(config, near)
    return near if same else work


def seconds_of(steps: tuple[Step, ...]) -> float:
    """What steps are estimated to take, where it is known."""
    parts = (source.estimated.seconds for step in steps for source in step.sources)
    return sum(part for part in parts if part is not None)


def _is_clear(index: type[PlannedIndex], config: RetrievalConfig, work: Workload, threads: int) -> bool:
    """Whether the index is faster by so much on the machine of the built-in rates that none need be measured here.

    By four times there, with two threads; more threads may speed up a scan, but not the choosing of rows.
    """
    dense = DenseScan.of(work, SCAN).sources[0].estimated.seconds or 0.0
    return dense > 2 * max(2, threads) * seconds_of(index.steps(config, work, index.built_in, SCAN))
