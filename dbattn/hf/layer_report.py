"""LayerReport: what retrieval did in one layer, and the figures and words of several together."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..query.audit import AuditReport, percentile95
from ..query.stats import RunningStats

# Mean errors of the attention output up to which answers are called close to dense, and not far from it.
CLOSE, FAR = 0.05, 0.1
# A layer drifts whose audits, at least so many, find so many times the error that was expected.
LEAST_AUDITS, DRIFT = 8, 2.0


@dataclass(frozen=True)
class LayerReport:
    """One layer. Recall, mass and error are means over its audited calls, None where nothing was audited.

    A call with more positions than ``max_queries`` reads a prompt; all others are decode calls.

    Attributes:
        layer: index of the layer in the model.
        rows_stored: rows in the store at the last call.
        rows_retrieved: rows the index retrieved per query head, mean over retrieving calls alone.
        rows_read: rows read per query head, sinks and hot rows included, mean over retrieving calls alone.
        rows_read_all_calls: the same over all decode calls; one answered densely reads all rows that it sees.
        recall: share of the true top-k that was retrieved.
        attention_mass: share of the dense softmax weight on the rows read.
        relative_error: of the layer's attention output against dense.
        error_p95: what 95 % of the audited queries (one per head and position) keep of it.
        expected_error: what audits of the sampled queries said it would be, where the budget was found by them.
        stream_error: of the residual stream after the layer against dense, where it was followed, else None.
        audited: calls that were audited.
        calls: decode calls.
        retrieving: decode calls that read less than all rows.
        dense_calls: decode calls answered densely.
        dense: calls answered densely by reason, prompts included; 0 is a reason that holds for the layer as a whole.
        prompts: the part of them that read a prompt.
        bytes_read: bytes that decode calls read, those answered densely included.
        bytes_dense: bytes that dense scans would have read for the same calls.
        bytes_share: the one over the other; None without decode calls.
        seconds, seconds_dense: of audited calls of one position, and of dense scans for them: medians over ``timed``.
        timed: audited calls that were timed.
        rungs: with ``max_error``, how often each rung of the ladder gave the answer.
        within: with ``max_error``, share of audited queries (one per head and position) whose error kept the bound.
        heads: per query head, its audited queries and their mean recall, attention mass and relative error.
        index: what the index had built.
        by_lists: positions of prompts that were read through lists.
        by_lists_rows: rows that these read, mean per query head.
        by_lists_error: mean relative error of those of them that were audited; None: none were.
    """

    layer: int
    rows_stored: int
    rows_retrieved: float
    rows_read: float
    rows_read_all_calls: float
    recall: float | None
    attention_mass: float | None
    relative_error: float | None
    error_p95: float | None
    expected_error: float | None
    stream_error: float | None
    audited: int
    calls: int
    retrieving: int
    dense_calls: int
    dense: dict[str, int]
    prompts: dict[str, int]
    bytes_read: int
    bytes_dense: int
    bytes_share: float | None
    seconds: float | None
    seconds_dense: float | None
    timed: int
    rungs: dict[str, int]
    within: float | None
    heads: tuple[dict[str, float], ...]
    index: dict[str, Any]
    by_lists: int = 0
    by_lists_rows: float = 0.0
    by_lists_error: float | None = None

    @property
    def drifts(self) -> bool:
        """Whether enough audits found far more error than the sampled queries let expect."""
        if self.expected_error is None or self.relative_error is None or self.audited < LEAST_AUDITS:
            return False
        return self.relative_error > max(DRIFT * self.expected_error, CLOSE / 2)

    @property
    def remarks(self) -> str:
        """What was built, the rungs taken, and why calls were answered densely."""
        return " | ".join(remarks([self]))


def layer_report(layer: int, stats: RunningStats) -> LayerReport:
    """Summarise the statistics of one layer."""
    stats.settle()
    recall, mass, error = (
        torch.tensor([getattr(audit, name) for audit in stats.audits]).nanmean().item() if stats.audits else None
        for name in ("recall", "attention_mass", "relative_error")
    )
    seconds, seconds_dense, timed = median_times(stats.audits)
    calls, dense, known = _counts(stats)
    rows = stats.rows_read + stats.rows_dense + (calls - known) * stats.rows_stored
    return LayerReport(
        layer=layer,
        rows_stored=stats.rows_stored,
        rows_retrieved=stats.rows_retrieved / max(1, stats.retrieving),
        rows_read=stats.rows_read / max(1, stats.retrieving),
        rows_read_all_calls=rows / max(1, calls),
        recall=recall,
        attention_mass=mass,
        relative_error=error,
        error_p95=percentile95(stats.audits),
        expected_error=stats.expected_error,
        stream_error=sum(stats.stream_errors) / len(stats.stream_errors) if stats.stream_errors else None,
        audited=len(stats.audits),
        calls=calls,
        retrieving=stats.retrieving,
        dense_calls=dense,
        dense=dict(stats.dense_reasons),
        prompts=dict(stats.prompt_reasons),
        bytes_read=stats.bytes_read,
        bytes_dense=stats.bytes_dense,
        bytes_share=bytes_share([stats]),
        seconds=seconds,
        seconds_dense=seconds_dense,
        timed=timed,
        rungs=dict(stats.rungs),
        within=stats.heads.share_within if stats.heads and stats.rungs else None,
        heads=stats.heads.means() if stats.heads else (),
        index=dict(stats.index),
        by_lists=stats.prompt.by_lists,
        by_lists_rows=stats.prompt.rows_read / max(1, stats.prompt.by_lists),
        by_lists_error=sum(errors) / len(errors) if (errors := stats.prompt.errors) else None,
    )


def _counts(stats: RunningStats) -> tuple[int, int, int]:
    """Decode calls; those answered densely; and those whose rows and bytes were counted."""
    dense = stats.dense_reasons.total() - stats.prompt_reasons.total()
    return stats.retrieving + dense, dense, stats.retrieving + stats.dense_counted


def bytes_share(stats: Sequence[RunningStats]) -> float | None:
    """Bytes read over a dense scan's; calls that were not counted read all, at the bytes of the others."""
    calls, _, known = (sum(counts) for counts in zip(*(_counts(s) for s in stats), strict=True)) if stats else (0, 0, 0)
    dense = sum(s.bytes_dense for s in stats)
    if not calls or not dense:
        return 1.0 if calls else None
    more = (calls - known) * dense / known
    return (sum(s.bytes_read for s in stats) + more) / (dense + more)


def median_times(audits: Sequence[AuditReport]) -> tuple[float | None, float | None, int]:
    """Medians of retrieving and dense over the timed audits of one position, and how many those are."""
    pairs = [
        (audit.seconds, audit.seconds_dense)
        for audit in audits
        if audit.seconds is not None and audit.seconds_dense is not None and audit.relative_error_by_query.shape[2] == 1
    ]
    if not pairs:
        return None, None, 0
    retrieving, dense = (statistics.median(times) for times in zip(*pairs, strict=True))
    return retrieving, dense, len(pairs)


def rows_per_call(rows: Sequence[LayerReport]) -> float | None:
    """Rows read per query, mean over all decode calls of some layers; None without any."""
    calls = sum(row.calls for row in rows)
    return sum(row.rows_read_all_calls * row.calls for row in rows) / calls if calls else None


def reasons(rows: Sequence[LayerReport]) -> tuple[dict[str, int], dict[str, int]]:
    """Why decode calls were answered densely, and prompts, with how often; the most frequent first."""
    prompts = sum((Counter(row.prompts) for row in rows), Counter[str]())
    steps = sum((Counter(row.dense) for row in rows), Counter[str]()) - prompts
    return dict(steps.most_common()), dict(prompts.most_common())


def remarks(rows: Sequence[LayerReport]) -> list[str]:
    """What was built, the rungs taken, and why calls were answered densely."""
    built = ", ".join(
        f"{name} {span([row.index[name] for row in rows if name in row.index])}"
        for name in dict.fromkeys(name for row in rows for name in row.index)
        if name != "rows"
    )
    rungs = sum((Counter(row.rungs) for row in rows), Counter[str]())
    steps, prompts = reasons(rows)
    standing = dict.fromkeys(reason for row in rows for reason, count in row.dense.items() if not count)
    parts = built, counted(dict(rungs)), "; ".join(standing), counted(steps), counted(prompts)
    heads = "", "rungs: ", "", "dense: ", "prompts, dense: "
    return [head + part for head, part in zip(heads, parts, strict=True) if part]


def counted(counts: Mapping[str, int]) -> str:
    """What was counted, in words."""
    return "; ".join(f"{count}x {what}" for what, count in counts.items())


def span(values: Sequence[Any]) -> str:
    """One value, or the least and the greatest of several numbers."""
    different = sorted(set(values), key=lambda value: (str(type(value)), value))
    return str(different[0]) if len(different) == 1 else f"{different[0]} to {different[-1]}"


def percent(share: float | None) -> str:
    """A share in words, ``-`` for None."""
    return "-" if share is None else f"{100 * share:.{0 if share >= 0.1 else 1}f}%"
