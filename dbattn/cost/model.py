"""Cost: what one call of a model costs, and model_cost, which adds it up."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from index_kernels.integer import is_integer

from ..config import RetrievalConfig
from ..index import index_class
from ..query.plan import QueryPlan
from .crossovers import LONGEST, Crossovers, find_crossovers
from .operators import (
    Operator,
    dense_attention,
    multiply,
    plan_of,
    retrieving_attention,
    total,
)
from .shape import ModelShape

PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class LayerCost:
    """A layer, and how many of the model's are like it.

    Attributes:
        window: newest rows a query sees, None for all.
        count: layers of this window.
        operators: "projections", "MLP", "scores", "values", and, where the plan retrieves, "index" and "tail".
    """

    window: int | None
    count: int
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes held: all matrices, the rows of all layers, and their indexes (room to grow not counted)."""

    weights: int
    rows: int
    index: int


@dataclass(frozen=True)
class Cost:
    """The cost of one call; ``str()`` is a table, ``to_dict()`` is data.

    Attributes:
        shape, tokens, batch, phase, config: what was asked about; ``tokens`` is T, the newest row included.
        plan: what a decode step reads in a layer that sees all rows; of a prompt, all.
        layers: one entry for each kind of layer.
        output: the matrix that makes logits, of one position a text.
        seconds, seconds_dense: estimated time of attention in a decode step, by the plan and by a dense scan, of all
            layers that see all rows; None where it is not estimated.
    """

    shape: ModelShape
    tokens: int
    batch: int
    phase: str
    config: RetrievalConfig | None
    plan: QueryPlan
    layers: tuple[LayerCost, ...]
    output: Operator
    memory: Memory
    crossovers: Crossovers
    seconds: float | None
    seconds_dense: float | None

    @property
    def totals(self) -> dict[str, Operator]:
        """Each operator summed over the layers, and "output"."""
        names = dict.fromkeys(op.name for layer in self.layers for op in layer.operators)
        each = [(op, layer.count) for layer in self.layers for op in layer.operators]
        sums = {name: total((op, count) for op, count in each if op.name == name) for name in names}
        return {**sums, self.output.name: self.output}

    @property
    def flops(self) -> int:
        """FLOPs of the call."""
        return sum(op.flops for op in self.totals.values())

    @property
    def bytes(self) -> int:
        """Bytes that the call reads and writes."""
        return sum(op.bytes for op in self.totals.values())

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        totals = {name: {"flops": op.flops, "bytes": op.bytes} for name, op in self.totals.items()}
        sums = {"totals": totals, "flops": self.flops, "bytes": self.bytes}
        return asdict(self) | {"plan": self.plan.to_dict()} | sums

    def __str__(self) -> str:
        return "\n".join([self.table(), *self._facts()])

    def table(self) -> str:
        """Each operator's FLOPs and bytes, per layer and in all."""
        shape, what = self.shape, "one decode step over" if self.phase == "decode" else "a prompt of"
        table = Table(
            title=f"{what} {self.tokens:,} tokens, batch {self.batch}, {shape.dtype}; {shape.variant}: "
            f"{shape.heads} query heads on {shape.kv_heads} KV heads of {shape.head_dim}",
            title_justify="left",
        )
        table.add_column("operator")
        for name in ("MFLOP per layer", "MB per layer", "layers", "MFLOP", "MB", "share of FLOPs", "of bytes"):
            table.add_column(name, justify="right")

        def add(op: Operator, count: int, name: str) -> None:
            each = [f"{op.flops / 1e6:,.2f}", f"{op.bytes / 1e6:,.2f}"] if count else ["", ""]
            flops, size = max(1, count) * op.flops, max(1, count) * op.bytes
            shares = f"{flops / self.flops:.1%}", f"{size / self.bytes:.1%}"
            table.add_row(name, *each, str(count or ""), f"{flops / 1e6:,.2f}", f"{size / 1e6:,.2f}", *shares)

        for layer in self.layers:
            for op in layer.operators:
                add(op, layer.count, op.name + ("" if layer.window is None else f" (window {layer.window:,})"))
        add(self.output, 0, self.output.name)
        table.add_section()
        add(Operator("all", self.flops, self.bytes), 0, "all")
        console = Console(width=130)
        with console.capture() as capture:
            console.print(table)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def _facts(self) -> list[str]:
        memory, cross = self.memory, self.crossovers

        def at(length: int | None) -> str:
            return "never" if length is None else f"at {length:,} tokens"

        lines = [
            f"plan: {self.plan.reason}",
            f"memory: weights {memory.weights / 1e6:,.1f} MB, rows {memory.rows / 1e6:,.1f} MB, "
            f"index {memory.index / 1e6:,.1f} MB",
            f"dense attention overtakes the projections in FLOPs {at(cross.flops_over_projections)}, in bytes "
            f"{at(cross.bytes_over_projections)}; with the MLP {at(cross.flops_over_weights)}, "
            f"{at(cross.bytes_over_weights)}",
        ]
        if self.config is not None:
            faster = f", is estimated faster {at(cross.index_seconds)}" if self.seconds is not None else ""
            lines.append(
                f"a decode step through the index reads fewer bytes than dense {at(cross.index_bytes)}{faster}"
            )
        if self.seconds is not None and self.seconds_dense is not None:
            lines.append(
                f"attention of a decode step, estimated: {1e3 * self.seconds:.2f} ms, "
                f"dense {1e3 * self.seconds_dense:.2f} ms"
            )
        return lines


def model_cost(
    model: Any,
    tokens: int,
    *,
    config: RetrievalConfig | None = None,
    batch: int = 1,
    phase: str = "decode",
    dtype: str | None = None,
    threads: int | None = None,
) -> Cost:
    """The cost of one decode step, or of a prompt.

    Args:
        model: what ``ModelShape.of`` reads: a transformers config, a dict, a path, a ModelShape.
        tokens: T, rows per store: those that the step's query may see, or the prompt's.
        config: what a query reads; None: a dense scan, and no index is held.
        batch: texts of this length.
        phase: "decode" or "prefill". Prompts are read densely, and make logits of their last position alone.
        dtype: of weights and rows, see ModelShape.of.
        threads: of this CPU, to estimate time as well; its rates are measured first where they are not known, which
            takes a second or two. None: no times.

    Raises:
        FileNotFoundError: the model is a path, and not there.
        ValueError: an argument or a field of the model's config out of range; names it.
    """
    for name, value in (("tokens", tokens), ("batch", batch)):
        if not is_integer(value, 1, LONGEST):
            raise ValueError(f"{name} is {value!r}, expected an integer from 1 to {LONGEST}")
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")
    shape = ModelShape.of(model, dtype)
    new = tokens if phase == "prefill" else 1
    kinds = Counter(shape.windows)
    size, weights = shape.element_size, (("projections", shape.projections), ("MLP", shape.mlp))
    matrices = tuple(multiply(name, parts, size, batch * new) for name, parts in weights)
    chosen = plan_of(shape, tokens, new, batch, config, threads)
    layers = tuple(
        LayerCost(
            window,
            count,
            matrices
            + (
                dense_attention(shape, tokens, new, batch, window)
                if window is not None or chosen.is_dense
                else retrieving_attention(shape, tokens, batch, config or RetrievalConfig(), chosen)
            ),
        )
        for window, count in kinds.items()
    )
    step = plan_of(shape, tokens, 1, batch, config, threads)
    times = [
        None if each is None or None not in kinds else kinds[None] * each
        for each in (step.seconds_estimated, step.seconds_dense)
    ]
    return Cost(
        shape, tokens, batch, phase, config, chosen, layers,
        output=multiply("output", shape.output, size, batch),
        memory=_memory(shape, tokens, batch, config),
        crossovers=find_crossovers(shape, batch, config, phase, threads),
        seconds=times[0],
        seconds_dense=times[1],
    )  # fmt: skip


def _memory(shape: ModelShape, tokens: int, batch: int, config: RetrievalConfig | None) -> Memory:
    row = batch * shape.kv_heads * 2 * shape.head_dim * shape.element_size
    # A layer with a window forgets the oldest row that the next query will no longer see.
    rows = sum(tokens if window is None else min(tokens, window - 1) for window in shape.windows)
    index = 0
    if config is not None:
        engine = index_class(config.index_name)
        rows = engine.rows_indexed(config, tokens)
        index = batch * shape.kv_heads * engine.bytes_for(config, rows, shape.head_dim)
    return Memory(shape.weights * shape.element_size, row * rows, shape.windows.count(None) * index)
