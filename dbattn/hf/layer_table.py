"""layer_table: the layers of a report as a table, those that are alike in one row."""

from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..query.audit import figure
from .layer_report import CLOSE, FAR, LayerReport, percent, remarks, rows_per_call, span


def layer_table(layers: Sequence[LayerReport], *, all_layers: bool) -> str:
    """See ``Report.table``."""
    groups: dict[Any, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(layer.layer if all_layers else _kind(layer), []).append(layer)
    followed = any(layer.stream_error is not None for layer in layers)
    folded = len(groups) < len(layers)
    title = "Retrieval per layer (recall, mass and error from audited calls"
    title += "; in brackets the worst layer's)" if folded else ")"
    table = Table(title=title + ("; stream: error of the residual stream after the layer" if followed else ""))
    columns: dict[str, Callable[[list[LayerReport]], str]] = {
        "layers" if folded else "layer": _ranges,
        "decode calls": lambda rows: str(sum(row.calls for row in rows)),
        "retrieved": lambda rows: str(sum(row.retrieving for row in rows)),
        "rows read / stored": _rows_read,
        "bytes": lambda rows: percent(_share_of_layers(rows)),
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
        lines += [f"layer{'s'[: len(rows) > 1]} {_ranges(rows)}: {remark}" for remark in remarks(rows)]
    if folded:
        lines.append("Every layer on its own: report.table(all_layers=True)")
    return "\n".join(lines)


def _kind(row: LayerReport) -> Any:
    """What layers share that are shown as one."""
    error = -1 if row.relative_error is None else bisect((CLOSE, FAR), row.relative_error)
    reasons = frozenset(row.dense), frozenset(row.prompts)
    return row.rows_stored, row.calls > 0, row.retrieving > 0, reasons, error, row.index.get("index"), bool(row.rungs)


def _ranges(rows: Sequence[LayerReport]) -> str:
    """Numbers of layers, runs of them as ``first-last``."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row.layer == runs[-1][1] + 1:
            runs[-1][1] = row.layer
        else:
            runs.append([row.layer, row.layer])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def _rows_read(rows: Sequence[LayerReport]) -> str:
    read = rows_per_call(rows)
    return f"{'-' if read is None else format(read, '.0f')} / {span([row.rows_stored for row in rows])}"


def _share_of_layers(rows: Sequence[LayerReport]) -> float | None:
    known = [(row.calls, row.bytes_share) for row in rows if row.bytes_share is not None]
    return sum(calls * share for calls, share in known) / sum(calls for calls, _ in known) if known else None


def _mean_and_worst(rows: Sequence[LayerReport], name: str, worst: Callable[[list[tuple[float, int]]], Any]) -> str:
    """The mean over layers, weighted by their audits, and the worst layer's own figure."""
    known = [(getattr(row, name), max(1, row.audited)) for row in rows if getattr(row, name) is not None]
    if not known:
        return "-"
    audits = sum(audited for _, audited in known)
    mean = figure(sum(value * audited for value, audited in known) / audits, audits)
    return mean if len(rows) == 1 else f"{mean} ({figure(*worst(known))})"
