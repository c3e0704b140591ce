"""Report: what retrieval did in each layer of a model, as a table and as data."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .audit import RunningStats


@dataclass(frozen=True)
class LayerReport:
    """One layer. Recall, mass and error are means over its audited calls, None where nothing was audited.

    Attributes:
        layer: index of the layer in the model.
        rows_stored: rows in the store at the last call.
        rows_retrieved: rows the index retrieved per query head, mean over retrieving calls.
        rows_read: rows read per query head, sinks and hot rows included, mean over retrieving calls.
        recall: share of the true top-k that was retrieved.
        attention_mass: share of the dense softmax weight on the rows read.
        relative_error: of the layer's attention output against dense.
        stream_error: of the residual stream after the layer against dense, where it was followed, else None.
        audited: calls that were audited.
        retrieving: calls that read less than all rows.
        dense: calls answered densely, by reason.
        rungs: with ``max_error``, how often each rung of the ladder gave the answer.
        within: with ``max_error``, share of audited queries (one per head and position) whose error kept the bound.
        heads: per query head, its audited queries and their mean recall, attention mass and relative error.
        index: what the index had built.
    """

    layer: int
    rows_stored: int
    rows_retrieved: float
    rows_read: float
    recall: float | None
    attention_mass: float | None
    relative_error: float | None
    stream_error: float | None
    audited: int
    retrieving: int
    dense: dict[str, int]
    rungs: dict[str, int]
    within: float | None
    heads: tuple[dict[str, float], ...]
    index: dict[str, Any]

    @property
    def remarks(self) -> str:
        """What was built, the rungs taken, and why calls were answered densely."""
        built = ", ".join(f"{name} {value}" for name, value in self.index.items() if name != "rows")
        rungs = "; ".join(f"{count}x {rung}" for rung, count in self.rungs.items())
        dense = "; ".join(f"{count}x {reason}" if count else reason for reason, count in self.dense.items())
        return " | ".join(part for part in (built, rungs, dense) if part)


@dataclass(frozen=True)
class Report:
    """All layers of a model; ``str()`` is a table, ``to_dict()`` is data."""

    layers: tuple[LayerReport, ...]

    @classmethod
    def of(cls, stats: list[RunningStats]) -> "Report":
        """Summarise the statistics of each layer."""
        return cls(tuple(_layer_report(i, s) for i, s in enumerate(stats)))

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        followed = any(row.stream_error is not None for row in self.layers)
        title = "Retrieval per layer (recall, mass and error from audited calls)"
        table = Table(title=title + ("; stream: error of the residual stream after the layer" if followed else ""))
        numbers: dict[str, Callable[[LayerReport], str]] = {
            "layer": lambda row: str(row.layer),
            "rows stored": lambda row: str(row.rows_stored),
            "retrieved": lambda row: f"{row.rows_retrieved:.0f}",
            "read": lambda row: f"{row.rows_read:.0f}",
            "recall@k": lambda row: _figure(row.recall, ".3f"),
            "mass": lambda row: _figure(row.attention_mass, ".3f"),
            "rel. error": lambda row: _figure(row.relative_error, ".4f"),
            **({"stream": lambda row: _figure(row.stream_error, ".4f")} if followed else {}),
            "calls": lambda row: str(row.retrieving),
            "audited": lambda row: str(row.audited),
        }
        for name in numbers:
            table.add_column(name, justify="right")
        table.add_column("index / rungs / answered densely because")
        for row in self.layers:
            table.add_row(*(show(row) for show in numbers.values()), row.remarks)
        console = Console(width=150)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def _layer_report(layer: int, stats: RunningStats) -> LayerReport:
    calls = max(1, stats.retrieving)
    recall, mass, error = (
        torch.tensor([getattr(audit, name) for audit in stats.audits]).nanmean().item() if stats.audits else None
        for name in ("recall", "attention_mass", "relative_error")
    )
    return LayerReport(
        layer=layer,
        rows_stored=stats.rows_stored,
        rows_retrieved=stats.rows_retrieved / calls,
        rows_read=stats.rows_read / calls,
        recall=recall,
        attention_mass=mass,
        relative_error=error,
        stream_error=sum(stats.stream_errors) / len(stats.stream_errors) if stats.stream_errors else None,
        audited=len(stats.audits),
        retrieving=stats.retrieving,
        dense=dict(stats.dense_reasons),
        rungs=dict(stats.rungs),
        within=stats.heads.share_within if stats.heads and stats.rungs else None,
        heads=stats.heads.means() if stats.heads else (),
        index=dict(stats.index),
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
