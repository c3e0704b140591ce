"""Crossovers: the lengths from which on attention costs more than the weights, and the index less than dense."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import RetrievalConfig
from ..query.plan import QueryPlan
from ..query.usage import scan_usage
from .operators import Operator, dense_attention, multiply, plan_of, total, workload_of
from .shape import Matrices, ModelShape

# Crossovers are looked for up to here.
LONGEST = 1 << 26


@dataclass(frozen=True)
class Crossovers:
    """Shortest lengths T at which one thing costs more than another; None: at no T up to LONGEST.

    Attributes:
        flops_over_projections, bytes_over_projections: dense scores and values cost more than the projections.
        flops_over_weights, bytes_over_weights: more than projections and MLP together.
        index_bytes: a decode step's plan reads fewer bytes through the index than a dense scan.
        index_seconds: it is estimated to take less time; None also where time is not estimated.
    """

    flops_over_projections: int | None
    flops_over_weights: int | None
    bytes_over_projections: int | None
    bytes_over_weights: int | None
    index_bytes: int | None
    index_seconds: int | None


def find_crossovers(
    shape: ModelShape, batch: int, config: RetrievalConfig | None, phase: str, threads: int | None
) -> Crossovers:
    """All of a model's, for calls of this batch and phase; see ``model_cost``."""

    def attention_over(matrices: Matrices) -> tuple[int | None, int | None]:
        def costs(tokens: int) -> tuple[Operator, Operator]:
            new = tokens if phase == "prefill" else 1
            return (
                total(
                    (op, count)
                    for window, count in Counter(shape.windows).items()
                    for op in dense_attention(shape, tokens, new, batch, window)
                ),
                total([(multiply("", matrices, shape.element_size, batch * new), len(shape.windows))]),
            )

        def flops(tokens: int) -> bool:
            attention, weights = costs(tokens)
            return attention.flops > weights.flops

        def size(tokens: int) -> bool:
            attention, weights = costs(tokens)
            return attention.bytes > weights.bytes

        return _shortest(flops), _shortest(size)

    # The index is compared with dense, not with what the planner would rather do.
    always = None if config is None else replace(config, dense_below=0)

    def plan_at(tokens: int) -> QueryPlan | None:
        """What the index would read; None where only a dense scan is left."""
        plan = plan_of(shape, tokens, 1, batch, always, threads)
        return None if plan.is_dense else plan

    def fewer_bytes(tokens: int) -> bool:
        plan, dense = plan_at(tokens), scan_usage(workload_of(shape, tokens, 1, batch), tokens, None)
        return plan is not None and sum(source.estimated.bytes for source in plan.sources) < dense.bytes

    def less_time(tokens: int) -> bool:
        plan = plan_at(tokens)
        if plan is None or plan.seconds_estimated is None or plan.seconds_dense is None:
            return False
        return plan.seconds_estimated < plan.seconds_dense

    flops_alone, bytes_alone = attention_over(shape.projections)
    flops_all, bytes_all = attention_over(shape.projections + shape.mlp)
    index_bytes = index_seconds = None
    if config is not None and None in shape.windows:
        index_bytes = _shortest(fewer_bytes)
        index_seconds = None if threads is None else _shortest(less_time)
    return Crossovers(flops_alone, flops_all, bytes_alone, bytes_all, index_bytes, index_seconds)


def _shortest(holds: Callable[[int], bool]) -> int | None:
    """The least length at which ``holds``, which must go on to hold beyond it; None above LONGEST."""
    above = 1
    while not holds(above):
        if above == LONGEST:
            return None
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        above, below = (middle, below) if holds(middle) else (above, middle)
    return above
