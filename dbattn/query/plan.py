"""The plan of a query: steps that run, why they were chosen, and (EXPLAIN) what they really read."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from torch import Tensor

from .call import Call
from .usage import Usage


@dataclass(frozen=True)
class Source:
    """One set of rows in a plan.

    Attributes:
        kind: "sinks + hot rows", "index scan", "list scan", "summary scan", "dense scan", "extra rows", ...
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


class StepAnswer(NamedTuple):
    """What a step that ran made of a call.

    Attributes:
        out: ``[B, Hq, m, Dv]``; float32, or in the query's dtype where no lse comes with it.
        lse: ``[B, Hq, m]``; None where the call does not need it and the step is faster without.
        usages: what each of the step's sources read; empty unless the call is measured.
        bytes_read: bytes read, what is scored to choose rows included.
        lses: ``[S, B, Hq, m]``, lse of each source; None where the step has one source.
        exact_lse: ``[B, Hq, m]`` over the rows that were read; None: all that answered was read.
        rows_read: rows read, per query head and position, mean.
        rows_retrieved: those of them that an index retrieved.
        slots: places of the rows retrieved, ``[B, Hq, m, n]``, -1 = none; None unless measured, or none.
        deviation: of the lse of a whole answer, gives ``[B, Hq, m]``: what the error of the step's share over the
            output's norm is estimated from. None where the step is exact, or no bound is kept.
        unread: ``[B, Hq, n]`` by place, the share of the newest query's weight that rows have though they were not
            read; None unless measured, or where none have any.
        log_weights: those of ``slots``, where they are a sample.
        counted: where rows are counted on a device.
        tail: what answered for rows not read: "none", "centroid" or "sample".
    """

    out: Tensor
    lse: Tensor | None
    usages: tuple[Usage, ...] = ()
    lses: Tensor | None = None
    exact_lse: Tensor | None = None
    rows_read: float = 0.0
    rows_retrieved: float = 0.0
    bytes_read: int = 0
    slots: Tensor | None = None
    deviation: Callable[[Tensor], Tensor] | None = None
    tail: str = "none"
    unread: Tensor | None = None
    log_weights: Tensor | None = None
    counted: "Counted | None" = None


class Counted(NamedTuple):
    """Rows that are counted on a device: an answer says no more of them than the budget, until they are asked for.

    Attributes:
        totals: int64 tensor there, rows retrieved by all calls that share it, KV heads of all batch rows together.
        rows: of them, what this answer says.
        units: by which its rows are divided, for a mean.
        row_bytes: bytes of a row.
    """

    totals: Tensor
    rows: int
    units: int
    row_bytes: int


@dataclass(frozen=True)
class Step(ABC):
    """One part of a plan: row sources that are read together. Immutable; plans share and cache steps."""

    sources: tuple[Source, ...]

    @abstractmethod
    def run(self, call: Call) -> StepAnswer:
        """Read the sources for a call."""

    def measured(self, usages: Sequence[Usage], masses: Sequence[float]) -> Self:
        """The step with what each source read, and its share of the softmax weight."""
        found = zip(self.sources, usages, masses, strict=True)
        return replace(self, sources=tuple(replace(source, actual=usage, mass=mass) for source, usage, mass in found))


@dataclass(frozen=True)
class QueryPlan:
    """A union of row sources; the states of the steps that read them merge to the answer.

    Attributes:
        steps: what runs.
        reason: why this plan.
        hot: rows from here on are scanned exactly.
        backend: kernels that run it.
        seconds_estimated, seconds_dense: expected time of this plan, and of a dense scan; None where this machine has
            no rates, or none were needed.
        seconds: time it took (None until it has run).
        given_up: sources read on the way and not used (with ``max_error``).
        kept: what rows are kept as where they are no floats ("" also until it has run).
    """

    steps: tuple[Step, ...]
    reason: str
    hot: int = 0
    backend: str = "reference"
    seconds_estimated: float | None = None
    seconds_dense: float | None = None
    seconds: float | None = None
    given_up: tuple[Source, ...] = ()
    kept: str = ""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is read; estimated, and actual once the plan has run."""
        return (*(source for step in self.steps for source in step.sources), *self.given_up)

    @property
    def is_dense(self) -> bool:
        """True where all rows are read."""
        return self.steps[0].sources[0].kind == "dense scan"

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
        sources = self.sources
        kept = f"; rows kept as {self.kept}" if self.kept else ""
        lines = [f"Merge of {len(sources)} row sources   {times}", f"│  {self.reason}; kernels: {self.backend}{kept}"]
        for i, source in enumerate(sources):
            last = i == len(sources) - 1
            mass = "" if source.mass is None else f" mass={source.mass:.1%}"
            lines.append(f"{'└─' if last else '├─'} {source.kind}: {source.detail}{mass}")
            lines += [f"{'  ' if last else '│ '}   {line}" for line in _usage_lines(source)]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Summed(Step):
    """Steps of several layers, added up; it cannot run."""

    def run(self, call: Call) -> StepAnswer:
        raise TypeError("this plan is the sum of several layers' plans: it is for reading, not for running")


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
    estimated, dense, took = totals
    return QueryPlan(
        (_Summed(tuple(sources)),), reason, plans[0].hot, plans[0].backend, estimated, dense, took, kept=plans[0].kept
    )


def _sum_usages(usages: Sequence[Usage], layers: int) -> Usage:
    """Bytes and seconds of all, rows and lists per layer."""
    seconds = [usage.seconds for usage in usages if usage.seconds is not None]
    return Usage(
        sum(usage.rows for usage in usages) / layers,
        sum(usage.bytes for usage in usages),
        sum(usage.lists for usage in usages) / layers,
        sum(seconds) if len(seconds) == len(usages) else None,
        sum(usage.copies for usage in usages) / layers,
    )


def _usage_lines(source: Source) -> list[str]:
    """What was read beside what was expected."""

    def line(name: str, usage: Usage) -> str:
        lists = f" lists={usage.lists:.0f}" if usage.lists else ""
        copies = f" (copies on the GPU: {usage.copies:.0f})" if usage.copies else ""
        seconds = "" if usage.seconds is None else f" time={_ms(usage.seconds)}"
        return f"{name} rows={usage.rows:.0f}{copies}{lists} bytes={usage.bytes:,}{seconds}"

    actual = [] if source.actual is None else [line("actual   ", source.actual)]
    return [*actual, line("estimated", source.estimated)]


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{1000 * seconds:.3g} ms"
