"""Report: what retrieval did in each layer of a model, as a table and as data."""

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
    audited: int
    retrieving: int
    dense: dict[str, int]
    rungs: dict[str, int]
    within: float | None
    heads: tuple[dict[str, float], ...]
    index: dict[str, Any]


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
        table = Table(title="Retrieval per layer (recall, mass and error from audited calls)")
        for name in ("layer", "rows stored", "retrieved", "read", "recall@k", "mass", "rel. error", "calls", "audited"):
            table.add_column(name, justify="right")
        table.add_column("index / rungs / answered densely because")
        for row in self.layers:
            built = ", ".join(f"{name} {value}" for name, value in row.index.items() if name != "rows")
            dense = "; ".join(f"{count}x {reason}" if count else reason for reason, count in row.dense.items())
            rungs = "; ".join(f"{count}x {rung}" for rung, count in row.rungs.items())
            table.add_row(
                str(row.layer),
                str(row.rows_stored),
                f"{row.rows_retrieved:.0f}",
                f"{row.rows_read:.0f}",
                _figure(row.recall, ".3f"),
                _figure(row.attention_mass, ".3f"),
                _figure(row.relative_error, ".4f"),
                str(row.retrieving),
                str(row.audited),
                " | ".join(part for part in (built, rungs, dense) if part),
            )
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
