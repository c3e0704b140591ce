"""Audit: the same query answered densely and compared with what retrieval said."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from index_kernels import top_k

from ..metrics import attention_mass, recall_at_k, relative_error
from .call import Call
from .execute import Answer, run_plan
from .ladder import Ladder
from .plan import QueryPlan
from .steps import DenseScan, steps_of_call


@dataclass(frozen=True)
class AuditReport:
    """What retrieval lost on one call.

    Means are over batch, query heads and positions; ``*_by_query`` are ``[B, Hq, m]``, NaN for padded queries.

    Attributes:
        recall: share of the true top-k (among the rows the index answers for) that was retrieved.
        attention_mass: share of the dense softmax weight on the rows that were read.
        relative_error: L2 distance of the output from the dense one over the norm of the dense one.
        rows_retrieved: rows the index retrieved, per query head and position.
        rows_read: rows whose key and value were read, likewise; sinks and hot rows included.
        rows_stored: rows a dense scan reads.
        bytes_read: bytes the call read, keys scored by the index included.
        bytes_dense: bytes a dense scan reads.
        seconds, seconds_dense: what the call and the dense scan took; None on a device that works asynchronously, and
            where the call was answered densely anyway.
    """

    recall_by_query: Tensor
    attention_mass_by_query: Tensor
    relative_error_by_query: Tensor
    rows_retrieved: float
    rows_read: float
    rows_stored: int
    bytes_read: int
    bytes_dense: int
    seconds: float | None = None
    seconds_dense: float | None = None

    @property
    def recall(self) -> float:
        """Mean recall@k."""
        return float(self.recall_by_query.nanmean())

    @property
    def attention_mass(self) -> float:
        """Mean attention mass."""
        return float(self.attention_mass_by_query.nanmean())

    @property
    def relative_error(self) -> float:
        """Mean relative error."""
        return float(self.relative_error_by_query.nanmean())

    def __str__(self) -> str:
        recall, mass, error, worst = (
            figure(value, 1)
            for value in (self.recall, self.attention_mass, self.relative_error, percentile95([self]) or 0.0)
        )
        return (
            f"recall {recall}, attention mass {mass}, relative error {error} (95th percentile {worst}), "
            f"{self.rows_read:.0f} of {self.rows_stored} rows read, "
            f"{self.bytes_read:,} of {self.bytes_dense:,} bytes"
        )


def figure(value: float | None, audits: int) -> str:
    """A figure for a reader: two digits where one audit is behind it, else three; "-" for None."""
    return "-" if value is None else format(value, "#.2g" if audits <= 1 else "#.3g").removesuffix(".")


def percentile95(audits: Sequence[AuditReport]) -> float | None:
    """The relative error that 95 % of the audited queries (one per head and position) keep; None without any."""
    parts = [audit.relative_error_by_query.flatten().float().cpu() for audit in audits]
    errors = torch.cat(parts) if parts else torch.empty(0)
    errors = errors[~errors.isnan()]
    # Not torch.quantile, which takes 16 million elements at most.
    return float(errors.kthvalue(math.ceil(0.95 * len(errors))).values) if len(errors) else None


def compare_with_dense(
    answer: tuple[Tensor, Tensor],
    dense: tuple[Tensor, Tensor],
    scores: Tensor,
    exact_scores: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recall, attention mass and relative error, each ``[B, Hq, m]``, NaN for a padded query, which sees no row.

    ``answer`` and ``dense`` are ``(out, lse)``; ``scores`` are those of the retrieved rows, ``exact_scores`` the true
    top-k's.
    """
    seen = dense[1] > float("-inf")
    parts = (
        recall_at_k(scores, exact_scores),
        attention_mass(answer[1], dense[1]),
        relative_error(answer[0], dense[0]),
    )
    recall, mass, error = (torch.where(seen, part, torch.nan) for part in parts)
    return recall, mass, error


@torch.no_grad()
def audit(call: Call, answer: Answer, ladder: Ladder | None = None) -> AuditReport:
    """Compare the measured answer to a call with dense; a ladder learns from it."""
    store, k = call.store, call.config.rows_retrieved
    # Before anything else reads the rows: a scan of rows that are still in the processor's cache takes less time.
    began = time.perf_counter()
    dense = dense_state(call)
    seconds_dense = time.perf_counter() - began if call.is_synchronous else None
    keys = store.rows[0][:, :, : answer.plan.hot]
    _, exact_scores = top_k(call.query, keys, k, scale=call.scale, start=call.first_index_row)
    assert answer.slots is not None
    assert answer.exact_lse is not None
    if ladder is not None and answer.tried is not None:
        ladder.learn(answer.tried, relative_error(answer.tried.out, dense[0]))
    scores = store.scores(call.query, answer.slots, call.scale)
    recall, mass, error = compare_with_dense((answer.out, answer.exact_lse), dense, scores, exact_scores)
    counts = answer.rows_retrieved, answer.rows_read, len(store), answer.bytes_read, call.bytes_dense
    seconds = answer.plan.seconds if call.is_synchronous else None
    return AuditReport(recall, mass, error, *counts, seconds, seconds_dense)


def audit_dense(call: Call) -> AuditReport:
    """The report of a call that is answered densely anyway."""
    seen = dense_state(call)[1] > float("-inf")
    ones = torch.where(seen, 1.0, torch.nan)
    rows, read = call.rows_visible, call.bytes_dense
    return AuditReport(ones, ones, ones - 1.0, 0.0, rows, len(call.store), read, read)


def audit_prompt(call: Call, parts: Sequence[Answer]) -> AuditReport:
    """The report of a prompt, some parts of which were read through lists, as they say how many rows they read.

    Recall is not told: rows are chosen for blocks of positions.
    """
    dense = dense_state(call)
    out, exact = (torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("out", "exact_lse"))
    seen = dense[1] > float("-inf")
    found = attention_mass(exact, dense[1]), relative_error(out, dense[0])
    mass, error = (torch.where(seen, part, torch.nan) for part in found)
    shares = [part.out.shape[2] / call.query.shape[2] for part in parts]
    retrieved, read = (
        sum(share * getattr(part, name) for share, part in zip(shares, parts, strict=True))
        for name in ("rows_retrieved", "rows_read")
    )
    size = sum(part.bytes_read for part in parts)
    return AuditReport(
        torch.full_like(mass, torch.nan), mass, error, retrieved, read, len(call.store), size, call.bytes_dense
    )


def dense_state(call: Call) -> tuple[Tensor, Tensor]:
    """The exact ``(out [B, Hq, m, Dv], lse [B, Hq, m])``, float32, with what the call brings along."""
    plan = QueryPlan((DenseScan.of(call.workload, None), *steps_of_call(call)), "the yardstick")
    return run_plan(plan, call.plainly()).state
