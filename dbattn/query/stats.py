"""What the calls of one store did, summed as they come."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import RetrievalConfig
from ..store.drift import AUDITS_TO_LEARN
from .audit import AuditReport
from .ladder import Ladder
from .plan import Counted, QueryPlan

GAVE_UP = "audits of a prompt's blocks found lists too far off: the rest was read densely"
# A long generation audits without end; reports are for the present state of affairs.
AUDITS_KEPT = 1000


@dataclass
class HeadStats:
    """Sums over audited queries of each query head, ``[Hq]`` float64; divide by ``count``."""

    count: Tensor
    recall: Tensor
    attention_mass: Tensor
    relative_error: Tensor
    within: Tensor

    @classmethod
    def of(cls, heads: int) -> "HeadStats":
        """No audits yet."""
        return cls(*(torch.zeros(heads, dtype=torch.float64) for _ in range(5)))

    def means(self) -> tuple[dict[str, float], ...]:
        """Each head's count, and its means of recall, attention mass and relative error."""
        names = ("recall", "attention_mass", "relative_error")
        return tuple(
            {"audited": count, **{name: float(getattr(self, name)[h]) / max(1.0, count) for name in names}}
            for h, count in enumerate(self.count.tolist())
        )

    @property
    def share_within(self) -> float:
        """Share of audited queries whose error kept the bound."""
        return float(self.within.sum() / self.count.sum().clamp(min=1))

    def add(self, report: AuditReport, max_error: float | None) -> None:
        """Count a report; ``within`` counts queries whose error is at most ``max_error``."""
        errors = report.relative_error_by_query
        seen = ~errors.isnan()
        parts = {
            "count": seen,
            "recall": report.recall_by_query,
            "attention_mass": report.attention_mass_by_query,
            "relative_error": errors,
            "within": errors <= (max_error or 0.0),
        }
        for name, part in parts.items():
            total = torch.where(seen & ~part.double().isnan(), part.double(), 0.0).sum(dim=(0, 2)).cpu()
            setattr(self, name, getattr(self, name) + total)


@dataclass
class PromptStats:
    """Positions of prompts of which parts were read through lists; sums over positions.

    Attributes:
        positions: those in such prompts; by_lists: those of them that were read through lists.
        rows_read: rows that these read.
        errors: mean relative error of each audited position.
    """

    positions: int = 0
    by_lists: int = 0
    rows_read: float = 0.0
    errors: list[float] = field(default_factory=list)


class Told(NamedTuple):
    """What a retrieving call says of itself: see ``RunningStats.add_answer``; over ``rows_stored`` rows."""

    rows_retrieved: float
    rows_read: float
    bytes_read: int
    bytes_dense: int
    counted: Counted | None
    rows_stored: int


@dataclass
class RunningStats:
    """What the calls of one store did; audits join when they happen.

    A call with more positions than ``max_queries`` reads a prompt; all others are decode calls. Retrieving calls are
    decode calls.

    Attributes:
        retrieving: calls that read less than all rows.
        rows_retrieved: rows the index retrieved, summed over retrieving calls (mean per query head and position).
        rows_read: rows read, sinks and hot rows included, summed likewise.
        rows_stored: rows in the store at the last call.
        dense_reasons: why calls were answered densely, with how often; prompts included. What is counted here alone,
            and not by ``add_dense``, is taken for a decode call that read all rows.
        prompt_reasons: the part of them that read a prompt.
        dense_counted: decode calls answered densely that ``add_dense`` counted.
        rows_dense: rows that those read, summed (mean per query).
        bytes_read: bytes that decode calls read, dense ones included.
        bytes_dense: bytes that dense scans would have read for the same calls.
        index: what the index had built at the last retrieving call.
        audits: reports of the latest audited calls.
        audited: retrieving calls up to the latest audited one.
        heads: sums over all audited calls, per query head (None until the first).
        rungs: how often each rung of the ladder gave the answer (with ``max_error`` only).
        ladder: what was learnt about errors (with ``max_error`` only).
        plan: the plan of the latest audited call, with what it read.
        expected_error: what audits of sampled queries and of answers said of the latest retrieving call, or None.
        counted: rows counted on a device since the last ``settle``.
        stream_errors: relative errors of the residual stream after the layer, where they were followed.
        prompt: prompts that were read through lists.

    Copies of a store go on counting in the same place.
    """

    retrieving: int = 0
    rows_retrieved: float = 0.0
    rows_read: float = 0.0
    rows_stored: int = 0
    dense_reasons: Counter[str] = field(default_factory=Counter)
    prompt_reasons: Counter[str] = field(default_factory=Counter)
    dense_counted: int = 0
    rows_dense: float = 0.0
    bytes_read: int = 0
    bytes_dense: int = 0
    index: dict[str, Any] = field(default_factory=dict)
    audits: list[AuditReport] = field(default_factory=list)
    audited: int = 0
    heads: HeadStats | None = None
    rungs: Counter[str] = field(default_factory=Counter)
    ladder: Ladder | None = None
    plan: QueryPlan | None = None
    expected_error: float | None = None
    stream_errors: list[float] = field(default_factory=list)
    counted: list[Counted] = field(default_factory=list)
    prompt: PromptStats = field(default_factory=PromptStats)
    # The latest retrieving call.
    latest: "Told | None" = None

    def audit_is_due(self, config: RetrievalConfig, *, learning: bool = False) -> bool:
        """The first retrieving call, then evenly spread ones; all while something is to be learnt, as by a ladder.

        One that was due at a call that was not audited is due at the next.
        """
        rate, calls = config.audit_rate, self.retrieving
        learning = learning or (config.max_error is not None and calls < AUDITS_TO_LEARN)
        return rate > 0 and (learning or math.ceil((calls + 1) * rate) > math.ceil(self.audited * rate))

    def add_answer(
        self,
        rows_retrieved: float,
        rows_read: float,
        bytes_read: int,
        bytes_dense: int,
        counted: Counted | None = None,
    ) -> None:
        """Count a retrieving call; what is ``counted`` on a device is put right by ``settle``."""
        if counted is not None:
            if not self.counted or self.counted[-1].totals is not counted.totals:
                self.counted.append(counted._replace(rows=0))
            self.counted[-1] = counted._replace(rows=self.counted[-1].rows + counted.rows)
        self.latest = Told(rows_retrieved, rows_read, bytes_read, bytes_dense, counted, self.rows_stored)
        self.retrieving += 1
        self.rows_retrieved += rows_retrieved
        self.rows_read += rows_read
        self.bytes_read += bytes_read
        self.bytes_dense += bytes_dense

    def repeat(self, told: "Told", rows: int, row_bytes: int) -> None:
        """Count a call like one before, over ``rows`` rows: it read those that came since; of all heads each has so
        many bytes."""
        self.rows_stored, more = rows, rows - told.rows_stored
        size = more * row_bytes
        self.add_answer(
            told.rows_retrieved, told.rows_read + more, told.bytes_read + size, told.bytes_dense + size, told.counted
        )

    def copy(self) -> "RunningStats":
        """What is counted now, for it to be put back."""
        return replace(self, counted=list(self.counted))

    def settle(self) -> None:
        """Ask the device for the rows that were counted there, in place of what calls were expected to read."""
        for counted in self.counted:
            surplus = counted.rows - int(counted.totals.sum())
            counted.totals.zero_()
            self.rows_retrieved -= surplus / counted.units
            self.rows_read -= surplus / counted.units
            self.bytes_read -= surplus * counted.row_bytes
        self.counted = []

    def add_dense(self, reason: str, rows: float, size: int, *, prompt: bool) -> None:
        """Count a call answered densely, which read ``rows`` rows a query and ``size`` bytes in all."""
        self.dense_reasons[reason] += 1
        if prompt:
            self.prompt_reasons[reason] += 1
            return
        self.dense_counted += 1
        self.rows_dense += rows
        self.bytes_read += size
        self.bytes_dense += size

    def add_prompt(self, plan: QueryPlan, positions: int, rows_read: float) -> None:
        """Count a part of a prompt that was read through lists, at least from some position on."""
        self.prompt.positions += positions
        if plan.is_dense:
            if plan.reason == GAVE_UP:
                self.dense_reasons[plan.reason] += 1
                self.prompt_reasons[plan.reason] += 1
            return
        self.prompt.by_lists += positions
        self.prompt.rows_read += positions * rows_read

    def restart(self) -> None:
        """Count from here on; what was learnt and what the index had built stay."""
        never = Counter({reason: 0 for reason, count in self.dense_reasons.items() if not count})
        fresh = RunningStats(rows_stored=self.rows_stored, dense_reasons=never, index=self.index, ladder=self.ladder)
        vars(self).update(vars(fresh))

    def add_stream_error(self, error: float) -> None:
        """Keep an error of the residual stream, and no more than the latest thousand."""
        self.stream_errors = [*self.stream_errors[-AUDITS_KEPT + 1 :], error]

    def add_audit(self, report: AuditReport, max_error: float | None = None) -> None:
        """Keep a report, and no more than the latest few thousand; the sums per head are over all."""
        heads = report.relative_error_by_query.shape[1]
        if self.heads is None or len(self.heads.count) != heads:
            self.heads = HeadStats.of(heads)
        self.heads.add(report, max_error)
        self.audits.append(report)
        self.audited = self.retrieving
        if len(self.audits) > 2 * AUDITS_KEPT:
            del self.audits[:AUDITS_KEPT]

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunningStats":
        return self
