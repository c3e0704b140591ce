"""Measuring an operator: decode steps over captured rows, each answer compared with the dense one of the same rows."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbattn.metrics import relative_error

from .._stores import query_at
from ..capture import Rows
from . import DEFAULT, Answer, Entry, Operator
from .database import Database

RECALL_K = 100
# Rows of the sizes at which a step's time is taken, and the bytes it may read: those of 400 rows per KV head.
TIMED_ROWS, TIMED_BUDGET_ROWS = (2048, 8192, 32768), 400


@dataclass(frozen=True)
class Step:
    """One decode step and its dense answer: out ``[Hq, Dv]``, softmax weights and best rows ``[Hq, stop]``."""

    stop: int
    query: Tensor
    out: Tensor
    weights: Tensor
    best: Tensor


@dataclass(frozen=True)
class Layer:
    """A layer's captured rows and the steps that are measured on them.

    Operators may learn from the earlier half of the captured queries; the steps are spread over the later half.
    """

    number: int
    rows: Rows
    steps: Sequence[Step]

    @classmethod
    def of(cls, number: int, rows: Rows, steps: int) -> "Layer":
        """``steps`` steps, each in the middle of its share of the later half."""
        half = rows.query.shape[2] // 2
        stops = [len(rows) - half + (2 * i + 1) * half // (2 * steps) for i in range(steps)]
        return cls(number, rows, [dense_step(rows, stop) for stop in stops])

    def start(self, operator: Operator) -> int:
        """Give an operator the rows before the later half of the queries, and the earlier half; how many rows."""
        half = self.rows.query.shape[2] // 2
        stop = len(self.rows) - half
        operator.fit(self.rows.keys[:, :, :stop], self.rows.values[:, :, :stop])
        operator.learn(self.rows.query[:, :, :-half])
        return stop


def dense_step(rows: Rows, stop: int) -> Step:
    """The step of the row before ``stop``, answered densely in float64."""
    query = query_at(rows, stop - 1)
    keys, values = rows.keys[0, :, :stop].double(), rows.values[0, :, :stop].double()
    grouped = query[0, :, 0].view(keys.shape[0], -1, query.shape[3]).double()
    weights = torch.softmax(grouped @ keys.transpose(1, 2) * query.shape[3] ** -0.5, dim=-1)
    out, weights = (weights @ values).flatten(0, 1).float(), weights.flatten(0, 1).float()
    top = weights.topk(min(RECALL_K, stop), dim=-1).indices
    best = torch.zeros(weights.shape, dtype=torch.bool).scatter_(1, top, True)
    return Step(stop, query, out, weights, best)


def measure(entry: Entry, layers: Sequence[Layer], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """One operator at every budget: means over layers, steps and query heads; one point per budget.

    The default of dbattn also gets a point with budget None: what it reads where nobody chooses.
    """
    asked: list[float | None] = [*budgets]
    if entry.name == DEFAULT:
        asked.append(None)
    found: dict[float | None, list[dict[str, Any]]] = {budget: [] for budget in asked}
    dense = []
    for layer in layers:
        operator = entry.make()
        at = layer.start(operator)
        for step in layer.steps:
            operator.fit(layer.rows.keys[:, :, at : step.stop], layer.rows.values[:, :, at : step.stop])
            at = step.stop
            dense.append(layer.rows.keys[0, :, :at].nbytes + layer.rows.values[0, :, :at].nbytes)
            for budget in asked:
                found[budget].append(compare(operator, step, budget))
    return [_point(budget, answers, len(layers), statistics.fmean(dense)) for budget, answers in found.items()]


def compare(operator: Operator, step: Step, budget: float | None) -> dict[str, Any]:
    """One answer against the dense one: figures per query head ``[Hq]``, counts and milliseconds."""
    # Once untimed where the setting for a budget is still to be found.
    if budget is not None and not operator.has_setting(budget):
        operator.attend(step.query, budget)
    answer, took = timed(operator, step.query, budget)
    recall = mass = None
    if answer.ids is not None:
        ids = answer.ids[0, :, 0]
        there, ids = ids >= 0, ids.clamp(min=0)
        recall = (step.best.gather(1, ids) & there).sum(dim=1) / step.best.sum(dim=1)
        mass = (step.weights.gather(1, ids) * there).sum(dim=1)
    return {
        "error": relative_error(answer.out[0, :, 0], step.out),
        "recall": recall,
        "mass": mass,
        "rows": answer.rows_read,
        "bytes": float(answer.bytes_read),
        "bytes_if_free": answer.bytes_if_free,
        "ms": took,
    }


def timed(operator: Operator, query: Tensor, budget: float | None) -> tuple[Answer, float]:
    """An answer and its milliseconds; budget None is the default of dbattn."""
    began = time.perf_counter()
    if budget is None:
        assert isinstance(operator, Database)
        answer = operator.answer(query, 0)
    else:
        answer = operator.attend(query, budget)
    took = time.perf_counter() - began
    return answer, 1e3 * (took if answer.seconds is None else answer.seconds)


def _point(budget: float | None, answers: Sequence[dict[str, Any]], layers: int, dense: float) -> dict[str, Any]:
    errors = torch.stack([a["error"] for a in answers])
    means = {name: _mean(answers, name) for name in ("recall", "mass", "rows", "bytes", "bytes_if_free")}
    free = means["bytes_if_free"]
    return {
        "budget": budget,
        "error": float(errors.mean()),
        "error_p95": float(errors.quantile(0.95)),
        "recall_p05": _low(answers, "recall"),
        **means,
        "share": (means["bytes"] or 0.0) / dense,
        "share_if_free": None if free is None else free / dense,
        "ms": statistics.median(a["ms"] for a in answers),
        "error_by_layer_and_head": errors.unflatten(0, (layers, -1)).mean(dim=1).tolist(),
    }


def _mean(answers: Sequence[dict[str, Any]], name: str) -> float | None:
    """Mean of a figure over answers and, where it has them, query heads; None where an operator has no such figure."""
    if answers[0][name] is None:
        return None
    return statistics.fmean(float(torch.as_tensor(a[name]).float().mean()) for a in answers)


def _low(answers: Sequence[dict[str, Any]], name: str) -> float | None:
    """5th percentile of a figure over answers and query heads; None where an operator has no such figure."""
    if answers[0][name] is None:
        return None
    return float(torch.cat([a[name] for a in answers]).float().quantile(0.05))


def time_at_sizes(entry: Entry, rows: Rows, sizes: Sequence[int], calls: int = 9) -> list[dict[str, float]]:
    """Milliseconds of a step (median, p10, p90) at each number of rows, always for the bytes of 400 rows per KV head.

    Rows beyond the captured ones are repeated with noise: what a step takes hardly depends on what rows say.
    """
    points = []
    for size in sizes:
        keys, values = (_stretched(x, size) for x in (rows.keys, rows.values))
        operator = entry.make()
        operator.fit(keys, values)
        budget = min(1.0, TIMED_BUDGET_ROWS / size)
        queries = [rows.query[:, :, i : i + 1].contiguous() for i in range(calls)]
        operator.attend(queries[0], budget)
        times = torch.tensor([timed(operator, query, budget)[1] for query in queries])
        low, middle, high = times.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        points.append({"rows": size, "ms": middle, "ms_p10": low, "ms_p90": high})
    return points


def _stretched(x: Tensor, rows: int) -> Tensor:
    """The first ``rows`` rows of ``x [1, H, n, D]``, repeated with a tenth of their spread as noise beyond n."""
    repeats = -(-rows // x.shape[2])
    if repeats == 1:
        return x[:, :, :rows]
    noise = torch.randn(x.shape[0], x.shape[1], rows, x.shape[3], generator=torch.Generator().manual_seed(0))
    noise[:, :, : x.shape[2]] = 0
    return x.repeat(1, 1, repeats, 1)[:, :, :rows] + 0.1 * x.std(dim=2, keepdim=True) * noise
