"""Report: whether retrieval is safe for a model and what it saves, as a verdict, a table and data."""

from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..query.audit import figure, percentile95
from ..query.stats import RunningStats
from ..windows import Reading, Windows
from .layer_report import (
    CLOSE,
    FAR,
    LayerReport,
    bytes_share,
    counted,
    layer_report,
    median_times,
    percent,
    reasons,
    rows_per_call,
)
from .layer_table import layer_table

# Share of dense's bytes above which reading less is no gain.
LITTLE_SAVED = 0.9
# Fewer timed calls than this have no median worth telling.
LEAST_TIMED = 5


@dataclass(frozen=True)
class Summary:
    """All layers together; ``str()`` is the verdict, with what speaks against it on lines below.

    Attributes:
        layers: layers of the model.
        layers_retrieving: those in which a call retrieved.
        calls: decode calls: one per layer and step.
        retrieving: decode calls that read less than all rows.
        dense: why the other decode calls scanned everything, with how often.
        prompts: calls that read a prompt, by why they were answered densely.
        prompts_by_lists: what was read of prompts through lists, in words; "" for nothing.
        left: reasons that hold for whole layers, with the number of layers.
        rows_read: rows read per query, mean over all decode calls, those answered densely included; None without any.
        rows_stored: rows in the fullest layer, those of windows that are not read included.
        bytes_share: bytes that decode calls read over those that dense scans of all that would have read; None without
            any.
        error, error_p95: relative error of the attention output, mean and 95th percentile over the audited queries (one
            per head and position); None where nothing was audited.
        expected_error: what audits of sampled queries and of answers let expect, mean over the layers that have such
            budgets.
        drifting: layers whose audits find far more than that.
        audited: audited calls behind them.
        seconds, seconds_dense: see LayerReport, over all layers; None with fewer than 5 timed calls.
        timed: audited calls behind them.
        within: with ``max_error``, share of audited queries whose error kept the bound.
        windows: how the rows were read, in words, where that was by windows, and which of these the newest question
            reads; else "".
        windows_read: the share of these windows' rows, where not all are read; else None.
        exact: what became of drafts, in words, where answers are exact; else "".
        graphs: how passes over one token ran, in words, where CUDA graphs were asked for; else "".
    """

    layers: int
    layers_retrieving: int
    calls: int
    retrieving: int
    dense: dict[str, int]
    prompts: dict[str, int]
    left: dict[str, int]
    rows_read: float | None
    rows_stored: int
    bytes_share: float | None
    error: float | None
    error_p95: float | None
    expected_error: float | None
    drifting: int
    audited: int
    seconds: float | None
    seconds_dense: float | None
    timed: int
    within: float | None
    prompts_by_lists: str = ""
    windows: str = ""
    windows_read: float | None = None
    exact: str = ""
    graphs: str = ""

    @property
    def verdict(self) -> str:
        """One line: is it safe, and what does it save?"""
        if not self.calls:
            return "No decode call yet: nothing to judge"
        if not self.retrieving and self.windows_read is not None:
            return (
                f"Windows were chosen: all {self.calls} decode calls scanned the rows of those that the question "
                f"reads, {percent(self.windows_read)} of the text's, and no others"
            )
        if not self.retrieving:
            return (
                f"Nothing was retrieved: all {self.calls} decode calls scanned everything, so answers are dense's, "
                "and no faster"
            )
        share = percent(self.retrieving / self.calls)
        parts = [
            f"{self.layers_retrieving} of {self.layers} layers and {self.retrieving} of {self.calls} decode calls "
            f"({share}) retrieved",
            self._error(),
            f"{percent(self.bytes_share)} of dense's bytes read",
            self._time(),
        ]
        return f"{self._closeness()}: {', '.join(parts)}"

    @property
    def lines(self) -> list[str]:
        """The verdict; why calls scanned everything; what to do where it is bad."""
        lines = [self.verdict, *(line for line in (self.exact, self.graphs) if line)]
        if self.dense:
            lines.append(
                f"Of {self.calls} decode calls {self.retrieving} retrieved; {sum(self.dense.values())} scanned "
                f"everything: {counted(self.dense)}"
            )
        lines += [f"{count} of {self.layers} layers: {reason}" for reason, count in self.left.items()]
        if self.windows:
            lines.append(f"Rows: {self.windows}")
        if self.prompts_by_lists:
            lines.append(self.prompts_by_lists)
        if self.prompts:
            lines.append(f"{sum(self.prompts.values())} calls read a prompt densely: {counted(self.prompts)}")
        return lines + self._advice()

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, with the verdict."""
        return {"verdict": self.verdict, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def _closeness(self) -> str:
        if self.error is None:
            return "Not audited"
        return ("Close to dense", "Not far from dense", "Far from dense")[bisect((CLOSE, FAR), self.error)]

    def _error(self) -> str:
        if self.error is None:
            return "error unknown"
        audits = f"{self.audited} audit{'s'[: self.audited > 1]}"
        if self.expected_error is not None:
            audits += f", {self.expected_error:.2g} expected"
        bound = "" if self.within is None else f", {percent(self.within)} within max_error"
        mean, most = figure(self.error, self.audited), figure(self.error_p95, self.audited)
        return f"error mean {mean}, 95th percentile {most} ({audits}{bound})"

    def _time(self) -> str:
        if not self.seconds or not self.seconds_dense:
            return "time not measured"
        retrieving, dense = self.seconds, self.seconds_dense
        times = (
            f"{figure(dense / retrieving, 1)}x as fast" if retrieving <= dense else f"{retrieving / dense:.2g}x as slow"
        )
        return f"a retrieving call {times} as a dense scan (medians of {self.timed} audited calls)"

    def _advice(self) -> list[str]:
        if not self.retrieving:
            return []
        lines = []
        if self.drifting:
            lines.append(
                f"{self.drifting} of {self.layers} layers are more than twice as far from dense as audits let expect: "
                "consider a smaller target_error, or max_error=0.05"
            )
        if self.error is None:
            lines.append("To know the error: audit_rate above 0, or decode inside `with handle.audit():`")
        elif self.error > FAR and self.within is None:
            lines.append("Answers may differ from the model's own: consider max_error=0.05, or a larger k")
        elif self.error > FAR:
            lines.append(
                "Answers may differ from the model's own: consider a smaller max_error, or none and a larger k"
            )
        slower = self.seconds is not None and self.seconds_dense is not None and self.seconds > self.seconds_dense
        if slower or (self.bytes_share or 0.0) > LITTLE_SAVED:
            lines.append("Little is gained at this length: consider dense_below='auto', a smaller k, or no wrap")
        return lines


@dataclass(frozen=True)
class Report:
    """All layers of a model; ``str()`` is a verdict and a table, ``to_dict()`` is data."""

    layers: tuple[LayerReport, ...]
    summary: Summary

    @classmethod
    def of(
        cls,
        stats: Sequence[RunningStats],
        windows: Windows | None = None,
        reading: Reading | None = None,
        exact: str = "",
        graphs: str = "",
    ) -> "Report":
        """Summarise the statistics of each layer.

        ``windows``, ``reading``: how the rows of the newest cache were read, and which of the windows it reads.
        ``exact``, ``graphs``: what became of drafts and how passes ran, in words.
        """
        layers = tuple(layer_report(i, s) for i, s in enumerate(stats))
        summary = replace(_summary(stats, layers), windows=str(reading or windows or ""), exact=exact, graphs=graphs)
        if reading is not None and not reading.is_whole:
            rows = summary.rows_stored + reading.rows - reading.read
            share = None if summary.bytes_share is None else summary.bytes_share * summary.rows_stored / max(1, rows)
            read = reading.read / reading.rows
            summary = replace(summary, rows_stored=rows, bytes_share=share, windows_read=read)
        return cls(layers, summary)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data: the summary, and every layer whole."""
        return {"summary": self.summary.to_dict(), "layers": [asdict(layer) for layer in self.layers]}

    def table(self, *, all_layers: bool = False) -> str:
        """Layers as a table and remarks; those that are alike are one row, unless ``all_layers``.

        Layers are alike that hold as many rows, retrieved or did not, for the same reasons, and whose error is close to
        dense, not far, or far. Their figures are means, with the worst layer's in brackets.
        """
        return layer_table(self.layers, all_layers=all_layers)

    def __str__(self) -> str:
        return f"{self.summary}\n\n{self.table()}"


def _summary(stats: Sequence[RunningStats], layers: Sequence[LayerReport]) -> Summary:
    audits = [audit for s in stats for audit in s.audits]
    errors = [audit.relative_error_by_query.flatten().double().cpu() for audit in audits]
    seconds, seconds_dense, timed = median_times(audits)
    told = timed >= LEAST_TIMED
    bounded = [s.heads for s in stats if s.heads is not None and s.rungs]
    kept, asked = (sum(float(getattr(heads, name).sum()) for heads in bounded) for name in ("within", "count"))
    expected = [layer.expected_error for layer in layers if layer.expected_error is not None]
    return Summary(
        layers=len(layers),
        layers_retrieving=sum(layer.retrieving > 0 for layer in layers),
        calls=sum(layer.calls for layer in layers),
        retrieving=sum(layer.retrieving for layer in layers),
        dense=reasons(layers)[0],
        prompts=reasons(layers)[1],
        left=dict(Counter(reason for layer in layers for reason, count in layer.dense.items() if not count)),
        rows_read=rows_per_call(layers),
        rows_stored=max((layer.rows_stored for layer in layers), default=0),
        bytes_share=bytes_share(stats),
        error=torch.cat(errors).nanmean().item() if errors else None,
        error_p95=percentile95(audits),
        expected_error=sum(expected) / len(expected) if expected else None,
        drifting=sum(layer.drifts for layer in layers),
        audited=len(audits),
        seconds=seconds if told else None,
        seconds_dense=seconds_dense if told else None,
        timed=timed,
        within=kept / asked if asked else None,
        prompts_by_lists=_by_lists(layers),
    )


def _by_lists(layers: Sequence[LayerReport]) -> str:
    """What was read of prompts through lists, in all layers together; "" for nothing."""
    read = [layer for layer in layers if layer.by_lists]
    if not read:
        return ""
    positions = sum(layer.by_lists for layer in read)
    rows = sum(layer.by_lists * layer.by_lists_rows for layer in read) / positions
    errors = [layer.by_lists_error for layer in read if layer.by_lists_error is not None]
    error = f"error {figure(sum(errors) / len(errors), len(errors))}" if errors else "error not audited"
    return (
        f"Prompts: {positions / len(read):,.0f} positions were read through lists in {len(read)} of {len(layers)} "
        f"layers, {rows:,.0f} rows each, {error}"
    )
