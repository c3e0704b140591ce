"""Operators: the FLOPs and bytes of one layer's parts, by the formulas of this package, and what a plan reads."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..config import RetrievalConfig
from ..index import index_class
from ..query.choose import choose_plan
from ..query.plan import QueryPlan
from ..query.usage import Workload, scan_usage
from .shape import Matrices, ModelShape


@dataclass(frozen=True)
class Operator:
    """One part of a layer: its FLOPs (2 per multiply-add), and the bytes it reads and writes."""

    name: str
    flops: int
    bytes: int


def total(operators: Iterable[tuple[Operator, int]]) -> Operator:
    """The sum of operators, each so many times; named as the last of them."""
    name, flops, size = "", 0, 0
    for op, count in operators:
        name, flops, size = op.name, flops + count * op.flops, size + count * op.bytes
    return Operator(name, flops, size)


def multiply(name: str, matrices: Matrices, size: int, vectors: int) -> Operator:
    """So many vectors times each matrix."""
    numbers = sum(inputs * outputs + vectors * (inputs + outputs) for inputs, outputs in matrices)
    return Operator(name, sum(2 * vectors * inputs * outputs for inputs, outputs in matrices), size * numbers)


def _attention(shape: ModelShape, batch: int, new: int, pairs: float, rows_bytes: int) -> tuple[Operator, Operator]:
    """Scores and values: ``pairs`` per query head and text, and the bytes of rows that are read for them."""
    flops = int(2 * batch * shape.heads * pairs * shape.head_dim)
    size = rows_bytes // 2 + shape.element_size * batch * new * shape.heads * shape.head_dim
    return Operator("scores", flops, size), Operator("values", flops, size)


def dense_attention(
    shape: ModelShape, tokens: int, new: int, batch: int, window: int | None = None
) -> tuple[Operator, Operator]:
    """Scores and values of the ``new`` newest positions over all rows that they see."""
    seen = min(tokens, window or tokens)
    # The first positions of a prompt see fewer rows than the window holds.
    pairs = seen if new == 1 else seen * (seen + 1) // 2 + (tokens - seen) * seen
    read = scan_usage(workload_of(shape, tokens, new, batch), seen if new == 1 else tokens, None)
    return _attention(shape, batch, new, pairs, read.bytes)


def retrieving_attention(
    shape: ModelShape, tokens: int, batch: int, config: RetrievalConfig, plan: QueryPlan
) -> tuple[Operator, ...]:
    """Scores, values, index and tail of a decode step under a plan that retrieves."""
    work = workload_of(shape, tokens, 1, batch, config)
    index, (exact, found, *tail) = index_class(config.index_name), (source.estimated for source in plan.sources)
    rows_bytes = int(index.work(config, work).bytes)
    operators = (
        *_attention(shape, batch, 1, exact.rows + found.rows, exact.bytes + rows_bytes),
        Operator("index", int(2 * index.operations_to_choose(config, work)), found.bytes - rows_bytes),
    )
    answered = int(sum(usage.lists for usage in tail) * 2 * batch * shape.heads * shape.head_dim)
    return (*operators, Operator("tail", answered, sum(usage.bytes for usage in tail))) if tail else operators


def plan_of(
    shape: ModelShape, tokens: int, new: int, batch: int, config: RetrievalConfig | None, threads: int | None
) -> QueryPlan:
    """What a layer that sees all rows reads."""
    retrieve, config = config is not None, config or RetrievalConfig()
    if threads is None and config.dense_below_rows is None:
        # No machine is meant: asked for by name, an index is used from where it usually pays.
        config = replace(config, index=config.index_name, dense_below=None)
    return choose_plan(
        index_class(config.index_name),
        config,
        workload_of(shape, tokens, new, batch, config if retrieve else None),
        backend="numba" if threads else "reference",
        processor=threads,
        retrieve=retrieve,
        estimate=threads is not None and new == 1,
    )


def workload_of(
    shape: ModelShape, tokens: int, new: int, batch: int, config: RetrievalConfig | None = None
) -> Workload:
    """The planner's view of a call with ``new`` positions over ``tokens`` rows."""
    indexed = 0 if config is None else index_class(config.index_name).rows_indexed(config, tokens)
    return Workload(
        tokens, new, indexed, 0 if config is None else config.n_sink, batch, shape.heads, shape.kv_heads,
        shape.head_dim, shape.head_dim, 2 * shape.head_dim * shape.element_size,
    )  # fmt: skip
