"""The arena's table, its verdicts on dbattn's default, and the page that shows both with the plots."""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .._common import show
from . import DEFAULT, OPERATORS

# A budget counts as kept up to here: rows come in lists and pages.
SLACK = 1.05
CLAIMED = (0.02, 0.05, 0.1)
# The figure of merit is the share of dense's bytes that brings the mean error down to this.
MERIT = 0.05

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; }
td.text, th.text { text-align: left; white-space: normal; }
tr.default { background: #e3eefc; font-weight: 600; }
img { max-width: 100%; }
"""
_INTRO = (
    "Every operator answers the same decode steps over the same captured rows of a model and is compared with dense "
    "attention over them; dbattn learns from queries before them, as it does from a prompt's. Figures are means over "
    "layers, steps and query heads. A budget is a share of the bytes that a dense scan reads; each operator takes the "
    "largest setting that keeps within it, and where its bytes are not within 5 % of the budget the share it really "
    f"read stands beside the error. The figure of merit is the share that mean error {MERIT} costs.",
    "Bytes count everything that grows with the text: a row is its key and value in float32, read once for the query "
    "heads that share it; summaries count two bytes an element, running sums four, codes their bits, row ids four. The "
    "first 4 rows and the newest 64 are read exactly by all, unless an operator's definition says otherwise.",
    "Operators that score every key in order to choose (exact top-k, vAttention, SoftmaxLift) or search per query head "
    "(flat, ivf, hnsw) get the rows that the budget would pay for were the choice free; the bytes are what they read.",
    "Time: operators marked torch are plain torch around dbattn's row kernel, so their time says how they grow, not "
    "what a tuned kernel would take. The exponent is that of time in T at the bytes of 400 rows per KV head, 2K to 32K "
    "rows. Operators that need training run untrained here.",
)


def point_at(operator: dict[str, Any], budget: float | None) -> dict[str, Any] | None:
    """The operator's point at a budget; None if it was not measured."""
    return next((p for p in operator["points"] if p["budget"] == budget), None)


def share_for_error(points: Sequence[dict[str, Any]], error: float = MERIT) -> float | None:
    """The least share of dense's bytes at which the mean error is ``error``, between points that were measured.

    Interpolated in the logarithms of both. None where no point is as good; where all are, the least share measured.
    """
    ordered = sorted((p["share"], p["error"]) for p in points if p["budget"] is not None)
    at = next((i for i, (_, found) in enumerate(ordered) if found <= error), None)
    if at is None:
        return None
    if at == 0 or ordered[at][1] <= 0:
        return float(ordered[at][0])
    (less, worse), (more, better) = ordered[at - 1 : at + 1]
    part = math.log(worse / error) / math.log(worse / better)
    return float(less * (more / less) ** part)


def columns(budgets: Sequence[float], shown: float) -> list[str]:
    """The table's head; the figures beside the errors are those at the budget ``shown``."""
    errors = [f"error at {b:.3g}".replace("0.", ".") if b < 0.01 else f"error at {100 * b:.3g} %" for b in budgets]
    at = f"at {100 * shown:.3g} %"
    return [
        "operator",
        *errors,
        f"% for {MERIT}",
        f"recall@100 {at}",
        "mass",
        "rows",
        "MB",
        "ms",
        "T^",
        "needs training",
        "by",
    ]


def table(result: dict[str, Any], budgets: Sequence[float], shown: float) -> list[list[Any]]:
    """One row per operator, as ``columns`` heads them."""
    rows = []
    for operator in result["operators"]:
        at = point_at(operator, shown)
        figures: list[Any] = [None] * 5
        if at is not None:
            figures = [at["recall"], at["mass"], at["rows"], at["bytes"] / 1e6, at["ms"]]
        training = "yes" if operator["needs_training"] else "no"
        errors = [_error_cell(operator, budget) for budget in budgets]
        exponent = operator["exponent"]
        needed = operator.get("share_for_error")
        merit = None if needed is None else f"{100 * needed:.3g}"
        rows.append([operator["name"], *errors, merit, *figures, exponent, training, operator["implementation"]])
    return rows


def ours_at(operators: Sequence[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    """The point of dbattn's default at a budget."""
    return next((point_at(operator, budget) for operator in operators if operator["name"] == DEFAULT), None)


def rivals(operators: Sequence[dict[str, Any]], budget: float) -> list[tuple[float, str]]:
    """Error and name of the others' operators that keep a budget with all they read, and need no training."""
    points = [(operator, point_at(operator, budget)) for operator in operators]
    return [
        (point["error"], operator["name"])
        for operator, point in points
        if point is not None
        and operator["family"] not in ("exact", "dbattn")
        and not operator["needs_training"]
        and point["share"] <= SLACK * budget
    ]


def verdicts(result: dict[str, Any]) -> list[str]:
    """For each claimed budget: whether dbattn's default has the lowest error of all training-free operators of others.

    Compared are operators that keep within the budget with all they read; where dbattn does not, that is why it lost.
    """
    notes = []
    for budget in CLAIMED:
        ours, fair = ours_at(result["operators"], budget), rivals(result["operators"], budget)
        if ours is not None and ours["share"] <= SLACK * budget:
            fair.append((ours["error"], DEFAULT))
        if ours is None or not fair:
            continue
        notes.append(f"{budget:.0%}: {_verdict(budget, ours, sorted(fair))}")
    return notes


def _verdict(budget: float, ours: dict[str, Any], fair: Sequence[tuple[float, str]]) -> str:
    error, winner = fair[0]
    others = [f"{name} {e:.3f}" for e, name in fair if name != DEFAULT][:2]
    if winner == DEFAULT:
        return f"dbattn's default has the lowest error, {error:.3f}; next {', '.join(others) or 'nobody'}."
    lost = (
        f"{winner} has the lowest error, {error:.3f} ({OPERATORS[winner].about}); dbattn's default {ours['error']:.3f}."
    )
    if ours["share"] > SLACK * budget:
        least = f"{ours['share']:.1%}"
        lost += f" It cannot read so little: hot rows and the summaries of all lists come to {least} of dense's bytes."
    return lost


def write_page(path: Path, results: Sequence[dict[str, Any]], budgets: Sequence[float], shown: float) -> None:
    """One HTML file that needs no other: the plots, ``result["plots"]`` beside it, are inside."""
    parts = ["<h1>The arena: attention operators on real keys, at the same bytes read</h1>"]
    parts += [f"<p>{escape(text)}</p>" for text in _INTRO]
    for result in results:
        layers = ", ".join(str(layer) for layer in result["layers"])
        parts.append(f"<h2>{escape(result['model'])}, {result['rows']:,} rows, layers {layers}</h2>")
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in verdicts(result)) + "</ul>")
        parts.append(_html_table(columns(budgets, shown), table(result, budgets, shown)))
        for plot in result["plots"]:
            image = base64.b64encode((path.parent / plot).read_bytes()).decode()
            parts.append(f'<p><img alt="{escape(plot)}" src="data:image/png;base64,{image}"></p>')
    parts.append("<h2>The operators</h2>")
    described = [[e.name, e.about, e.make().paper] for e in OPERATORS.values()]
    parts.append(_html_table(["operator", "what it reads", "source"], described, text=True))
    title = "<title>dbattn: the arena</title>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{_STYLE}</style>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *parts, "</html>", ""]), encoding="utf-8")


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, text: bool = False) -> str:
    def cell(tag: str, value: Any, place: int) -> str:
        kind = ' class="text"' if text or place == 0 else ""
        return f"<{tag}{kind}>{escape(show(value))}</{tag}>"

    lines = ["<table><tr>" + "".join(cell("th", name, i) for i, name in enumerate(head)) + "</tr>"]
    for row in rows:
        mark = ' class="default"' if row[0] == DEFAULT else ""
        lines.append(f"<tr{mark}>" + "".join(cell("td", value, i) for i, value in enumerate(row)) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _error_cell(operator: dict[str, Any], budget: float) -> str | None:
    """The error at a budget, with the share that was really read where it is not about the budget."""
    point = point_at(operator, budget)
    if point is None:
        return None
    error = "0" if point["error"] < 1e-5 else f"{point['error']:.3f}"
    kept = budget / SLACK <= point["share"] <= SLACK * budget
    share = 100 * point["share"]
    return error if kept else f"{error} @ {share:.{0 if share >= 9.95 else 1}f} %"
