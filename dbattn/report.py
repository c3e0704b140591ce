"""Report: whether retrieval is safe for a model and what it saves, as a verdict, a table and data."""

import statistics
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .audit import AuditReport, RunningStats, figure, percentile95

# Mean errors of the attention output up to which answers are called close to dense, and not far from it.
CLOSE, FAR = 0.05, 0.1
# Share of dense's bytes above which reading less is no gain.
LITTLE_SAVED = 0.9
# Fewer timed calls than this have no median worth telling.
LEAST_TIMED = 5


@dataclass(frozen=True)
class LayerReport:
    """One layer. Recall, mass and error are means over its audited calls, None where nothing was audited.

    A call with more positions than ``max_queries`` reads a prompt, densely by design; all others are decode calls.

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

    @property
    def remarks(self) -> str:
        """What was built, the rungs taken, and why calls were answered densely."""
        return " | ".join(_remarks([self]))


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
        left: reasons that hold for whole layers, with the number of layers.
        rows_read: rows read per query, mean over all decode calls, those answered densely included; None without any.
        rows_stored: rows in the fullest layer.
        bytes_share: bytes that decode calls read over those that dense scans would have read; None without any.
        error, error_p95: relative error of the attention output, mean and 95th percentile over the audited queries (one
            per head and position); None where nothing was audited.
        audited: audited calls behind them.
        seconds, seconds_dense: see LayerReport, over all layers; None with fewer than 5 timed calls.
        timed: audited calls behind them.
        within: with ``max_error``, share of audited queries whose error kept the bound.
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
    audited: int
    seconds: float | None
    seconds_dense: float | None
    timed: int
    within: float | None

    @property
    def verdict(self) -> str:
        """One line: is it safe, and what does it save?"""
        if not self.calls:
            return "No decode call yet: nothing to judge"
        if not self.retrieving:
            return (
                f"Nothing was retrieved: all {self.calls} decode calls scanned everything, so answers are dense's, "
                "and no faster"
            )
        share = _percent(self.retrieving / self.calls)
        parts = [
            f"{self.layers_retrieving} of {self.layers} layers and {self.retrieving} of {self.calls} decode calls "
            f"({share}) retrieved",
            self._error(),
            f"{_percent(self.bytes_share)} of dense's bytes read",
            self._time(),
        ]
        return f"{self._closeness()}: {', '.join(parts)}"

    @property
    def lines(self) -> list[str]:
        """The verdict; why calls scanned everything; what to do where it is bad."""
        lines = [self.verdict]
        if self.dense:
            lines.append(
                f"Of {self.calls} decode calls {self.retrieving} retrieved; {sum(self.dense.values())} scanned "
                f"everything: {counted(self.dense)}"
            )
        lines += [f"{count} of {self.layers} layers: {reason}" for reason, count in self.left.items()]
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
        bound = "" if self.within is None else f", {_percent(self.within)} within max_error"
        mean, most = figure(self.error, self.audited), figure(self.error_p95, self.audited)
        return f"error mean {mean}, 95th percentile {most} ({audits}{bound})"

    def _time(self) -> str:
        if self.seconds is None or self.seconds_dense is None:
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
    def of(cls, stats: Sequence[RunningStats]) -> "Report":
        """Summarise the statistics of each layer."""
        layers = tuple(_layer_report(i, s) for i, s in enumerate(stats))
        return cls(layers, _summary(stats, layers))

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data: the summary, and every layer whole."""
        return {"summary": self.summary.to_dict(), "layers": [asdict(layer) for layer in self.layers]}

    def table(self, *, all_layers: bool = False) -> str:
        """Layers as a table and remarks; those that are alike are one row, unless ``all_layers``.

        Layers are alike that hold as many rows, retrieved or did not, for the same reasons, and whose error is close to
        dense, not far, or far. Their figures are means, with the worst layer's in brackets.
        """
        groups: dict[Any, list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(layer.layer if all_layers else _kind(layer), []).append(layer)
        followed = any(layer.stream_error is not None for layer in self.layers)
        folded = len(groups) < len(self.layers)
        title = "Retrieval per layer (recall, mass and error from audited calls"
        title += "; in brackets the worst layer's)" if folded else ")"
        table = Table(title=title + ("; stream: error of the residual stream after the layer" if followed else ""))
        columns: dict[str, Callable[[list[LayerReport]], str]] = {
            "layers" if folded else "layer": _ranges,
            "decode calls": lambda rows: str(sum(row.calls for row in rows)),
            "retrieved": lambda rows: str(sum(row.retrieving for row in rows)),
            "rows read / stored": _rows_read,
            "bytes": lambda rows: _percent(_share_of_layers(rows)),
            "recall@k": lambda rows: _mean_and_worst(rows, "recall", min),
            "mass": lambda rows: _mean_and_worst(rows, "attention_mass", min),
            "rel. error": lambda rows: _mean_and_worst(rows, "relative_error", max),
            "p95": lambda rows: _mean_and_worst(rows, "error_p95", max),
            **({"stream": lambda rows: _mean_and_worst(rows, "stream_error", max)} if followed else {}),
            "audits": lambda rows: str(sum(row.audited for row in rows)),
        }
        for name in columns:
            table.add_column(name, justify="right")
        for rows in groups.values():
            table.add_row(*(show(rows) for show in columns.values()))
        console = Console(width=150)
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().rstrip().splitlines()]
        for rows in groups.values():
            lines += [f"layer{'s'[: len(rows) > 1]} {_ranges(rows)}: {remark}" for remark in _remarks(rows)]
        if folded:
            lines.append("Every layer on its own: report.table(all_layers=True)")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.summary}\n\n{self.table()}"


def restart_report(cache: Any) -> None:
    """Let the report of the wrapped model that a cache belongs to count from here on."""
    for stats in next(layer.session.stats for layer in cache.layers if hasattr(layer, "session")):
        stats.restart()


def _layer_report(layer: int, stats: RunningStats) -> LayerReport:
    recall, mass, error = (
        torch.tensor([getattr(audit, name) for audit in stats.audits]).nanmean().item() if stats.audits else None
        for name in ("recall", "attention_mass", "relative_error")
    )
    seconds, seconds_dense, timed = _times(stats.audits)
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
        stream_error=sum(stats.stream_errors) / len(stats.stream_errors) if stats.stream_errors else None,
        audited=len(stats.audits),
        calls=calls,
        retrieving=stats.retrieving,
        dense_calls=dense,
        dense=dict(stats.dense_reasons),
        prompts=dict(stats.prompt_reasons),
        bytes_read=stats.bytes_read,
        bytes_dense=stats.bytes_dense,
        bytes_share=_share([stats]),
        seconds=seconds,
        seconds_dense=seconds_dense,
        timed=timed,
        rungs=dict(stats.rungs),
        within=stats.heads.share_within if stats.heads and stats.rungs else None,
        heads=stats.heads.means() if stats.heads else (),
        index=dict(stats.index),
    )


def _summary(stats: Sequence[RunningStats], layers: Sequence[LayerReport]) -> Summary:
    audits = [audit for s in stats for audit in s.audits]
    errors = [audit.relative_error_by_query.flatten().double().cpu() for audit in audits]
    seconds, seconds_dense, timed = _times(audits)
    told = timed >= LEAST_TIMED
    bounded = [s.heads for s in stats if s.heads is not None and s.rungs]
    kept, asked = (sum(float(getattr(heads, name).sum()) for heads in bounded) for name in ("within", "count"))
    return Summary(
        layers=len(layers),
        layers_retrieving=sum(layer.retrieving > 0 for layer in layers),
        calls=sum(layer.calls for layer in layers),
        retrieving=sum(layer.retrieving for layer in layers),
        dense=_reasons(layers)[0],
        prompts=_reasons(layers)[1],
        left=dict(Counter(reason for layer in layers for reason, count in layer.dense.items() if not count)),
        rows_read=_rows_per_call(layers),
        rows_stored=max((layer.rows_stored for layer in layers), default=0),
        bytes_share=_share(stats),
        error=torch.cat(errors).nanmean().item() if errors else None,
        error_p95=percentile95(audits),
        audited=len(audits),
        seconds=seconds if told else None,
        seconds_dense=seconds_dense if told else None,
        timed=timed,
        within=kept / asked if asked else None,
    )


def _counts(stats: RunningStats) -> tuple[int, int, int]:
    """Decode calls; those answered densely; and those whose rows and bytes were counted."""
    dense = stats.dense_reasons.total() - stats.prompt_reasons.total()
    return stats.retrieving + dense, dense, stats.retrieving + stats.dense_counted


def _share(stats: Sequence[RunningStats]) -> float | None:
    """Bytes read over a dense scan's; calls that were not counted read all, at the bytes of the others."""
    calls, _, known = (sum(counts) for counts in zip(*(_counts(s) for s in stats), strict=True)) if stats else (0, 0, 0)
    dense = sum(s.bytes_dense for s in stats)
    if not calls or not dense:
        return 1.0 if calls else None
    more = (calls - known) * dense / known
    return (sum(s.bytes_read for s in stats) + more) / (dense + more)


def _share_of_layers(rows: Sequence[LayerReport]) -> float | None:
    known = [(row.calls, row.bytes_share) for row in rows if row.bytes_share is not None]
    return sum(calls * share for calls, share in known) / sum(calls for calls, _ in known) if known else None


def _times(audits: Sequence[AuditReport]) -> tuple[float | None, float | None, int]:
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


def _reasons(rows: Sequence[LayerReport]) -> tuple[dict[str, int], dict[str, int]]:
    """Why decode calls were answered densely, and prompts, with how often; the most frequent first."""
    prompts = sum((Counter(row.prompts) for row in rows), Counter[str]())
    steps = sum((Counter(row.dense) for row in rows), Counter[str]()) - prompts
    return dict(steps.most_common()), dict(prompts.most_common())


def _kind(row: LayerReport) -> Any:
    """What layers share that are shown as one."""
    error = -1 if row.relative_error is None else bisect((CLOSE, FAR), row.relative_error)
    reasons = frozenset(row.dense), frozenset(row.prompts)
    return row.rows_stored, row.calls > 0, row.retrieving > 0, reasons, error, row.index.get("index"), bool(row.rungs)


def _remarks(rows: Sequence[LayerReport]) -> list[str]:
    """What was built, the rungs taken, and why calls were answered densely."""
    built = ", ".join(
        f"{name} {_span([row.index[name] for row in rows if name in row.index])}"
        for name in dict.fromkeys(name for row in rows for name in row.index)
        if name != "rows"
    )
    rungs = sum((Counter(row.rungs) for row in rows), Counter[str]())
    steps, prompts = _reasons(rows)
    standing = dict.fromkeys(reason for row in rows for reason, count in row.dense.items() if not count)
    parts = built, counted(dict(rungs)), "; ".join(standing), counted(steps), counted(prompts)
    heads = "", "rungs: ", "", "dense: ", "prompts, dense: "
    return [head + part for head, part in zip(heads, parts, strict=True) if part]


def counted(counts: Mapping[str, int]) -> str:
    """What was counted, in words."""
    return "; ".join(f"{count}x {what}" for what, count in counts.items())


def _span(values: Sequence[Any]) -> str:
    """One value, or the least and the greatest of several numbers."""
    different = sorted(set(values), key=lambda value: (str(type(value)), value))
    return str(different[0]) if len(different) == 1 else f"{different[0]} to {different[-1]}"


def _ranges(rows: Sequence[LayerReport]) -> str:
    """Numbers of layers, runs of them as ``first-last``."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row.layer == runs[-1][1] + 1:
            runs[-1][1] = row.layer
        else:
            runs.append([row.layer, row.layer])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def _rows_per_call(rows: Sequence[LayerReport]) -> float | None:
    calls = sum(row.calls for row in rows)
    return sum(row.rows_read_all_calls * row.calls for row in rows) / calls if calls else None


def _rows_read(rows: Sequence[LayerReport]) -> str:
    read = _rows_per_call(rows)
    return f"{'-' if read is None else format(read, '.0f')} / {_span([row.rows_stored for row in rows])}"


def _mean_and_worst(rows: Sequence[LayerReport], name: str, worst: Callable[[list[tuple[float, int]]], Any]) -> str:
    """The mean over layers, weighted by their audits, and the worst layer's own figure."""
    known = [(getattr(row, name), max(1, row.audited)) for row in rows if getattr(row, name) is not None]
    if not known:
        return "-"
    audits = sum(audited for _, audited in known)
    mean = figure(sum(value * audited for value, audited in known) / audits, audits)
    return mean if len(rows) == 1 else f"{mean} ({figure(*worst(known))})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.{0 if share >= 0.1 else 1}f}%"
