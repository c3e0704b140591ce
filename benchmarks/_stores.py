"""Stores of captured rows, and decoding through them with audits."""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dbattn import AttentionDB, AuditReport, RetrievalConfig

from .capture import Rows

# Decoding starts this many rows before the end of the capture and stops 192 before it: an audit every 8 rows on the
# way. What is left over keeps the stores at an ordinary length, not at a multiple of an index's block.
STEPS_FROM, STEPS_TO, STRIDE = 448, 192, 8
SINK_AND_WINDOW: dict[str, Any] = {"n_sink": 4, "window": 64, "dense_below": 0, "audit_rate": 0.0}


@dataclass(frozen=True)
class Quality:
    """How far answers were from dense: means over audited steps and query heads; bytes are those of one call.

    ``error_p95`` is the 95th percentile over steps and heads, ``recall_p05`` the 5th over steps.
    """

    error: float
    error_p95: float
    recall: float
    recall_p05: float
    attention_mass: float
    rows_read: float
    bytes_read: float
    bytes_dense: float

    @classmethod
    def of(cls, reports: Sequence[AuditReport]) -> "Quality":
        """Summarise audits."""
        errors = torch.cat([report.relative_error_by_query.flatten().float() for report in reports])
        names = ("recall", "attention_mass", "rows_read", "bytes_read", "bytes_dense")
        means = {name: statistics.fmean(float(getattr(r, name)) for r in reports) for name in names}
        recalls = torch.tensor([float(report.recall) for report in reports])
        spread = {"error_p95": float(errors.quantile(0.95)), "recall_p05": float(recalls.quantile(0.05))}
        return cls(error=float(errors.mean()), **spread, **means)

    def to_dict(self) -> dict[str, float]:
        """The figures as plain data."""
        return asdict(self)


def config_of(index: str, k: int | None, tail: str | None = None) -> RetrievalConfig:
    """4 sinks, a window of 64, and an index that is asked however short the store is."""
    return RetrievalConfig(index=index, k=k, tail=tail, **SINK_AND_WINDOW)


def build(rows: Rows, config: RetrievalConfig, stop: int) -> AttentionDB:
    """A store of the first ``stop`` rows, which has learnt from the queries captured up to there."""
    db = AttentionDB(rows.keys.shape[1], rows.keys.shape[3], config=config)
    db.insert(rows.keys[:, :, :stop], rows.values[:, :, :stop])
    known = rows.query[:, :, : max(0, rows.query.shape[2] - (len(rows) - stop))][:, :, -stop:]
    if known.shape[2]:
        db.analyze(known)
    return db


def with_config(db: AttentionDB, *, k: int | None) -> AttentionDB:
    """The same rows and index under another budget."""
    view = copy.copy(db)
    view.config = replace(db.config, k=k)
    return view


def decode_and_audit(db: AttentionDB, rows: Rows, budgets: Sequence[int | None]) -> dict[int | None, list[AuditReport]]:
    """Go on inserting ``rows`` after those of ``db`` and audit a query at every 8th, once for each budget k.

    ``db`` holds the rows up to ``len(rows) - STEPS_FROM``, and holds them up to ``len(rows) - STEPS_TO`` afterwards.
    """
    reports: dict[int | None, list[AuditReport]] = {k: [] for k in budgets}
    for stop in range(len(rows) - STEPS_FROM + STRIDE, len(rows) - STEPS_TO + 1, STRIDE):
        db.insert(rows.keys[:, :, len(db) : stop], rows.values[:, :, len(db) : stop])
        query = query_at(rows, stop - 1)
        for k in budgets:
            reports[k].append(with_config(db, k=k).audit(query))
    return reports


def query_at(rows: Rows, position: int) -> Tensor:
    """The query ``[1, Hq, 1, D]`` of the row at ``position``, one of the last that were captured."""
    at = position - len(rows) + rows.query.shape[2]
    if not 0 <= at < rows.query.shape[2]:
        raise ValueError(f"position is {position}, queries are kept for the last {rows.query.shape[2]} of {len(rows)}")
    return rows.query[:, :, at : at + 1].contiguous()
