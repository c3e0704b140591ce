"""The arena's four plots, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, NullFormatter

from dbattn.cli._plot import MARKERS, PALETTE, draw, plt, save

from . import DEFAULT

# Lines with a name and a colour; the others of a plot are grey. First those that the field argues about; the rows in
# 8 bits take the look of dense, which no plot of errors shows.
LABELLED = 8
FIRST = (
    DEFAULT, "RetroInfer", "three stages", "MagicPIG", "Quest", "StreamingLLM", "exact top-k", "dense",
    "dbattn, int8 rows",
)  # fmt: skip
LOOKS = tuple(zip(PALETTE, MARKERS, strict=True))
# Where errors and times are drawn as if they were no better: float32 noise, and what a log axis needs.
LEAST_ERROR = 1e-4


def plot_against_bytes(result: dict[str, Any], figure: str, origin: dict[str, Any], path: Path) -> None:
    """Error (log) or recall, ``figure`` "error" or "recall", against the share of dense's bytes that was read.

    Operators whose choice of rows reads every key are drawn twice: with all they read, and dotted as if it were free.
    """
    canvas, panel = plt.subplots(figsize=(12, 7), layout="constrained")
    drawn = []
    for operator in result["operators"]:
        points = sorted((p for p in operator["points"] if p[figure] is not None), key=lambda p: p["share"])
        if points and (figure != "error" or max(p["error"] for p in points) >= LEAST_ERROR):
            drawn.append((operator["name"], points))
    for (_, points), style in zip(drawn, _styles([name for name, _ in drawn]), strict=True):
        heights = [max(p["error"], LEAST_ERROR) if figure == "error" else p[figure] for p in points]
        if figure == "error":
            spread = [(None, p["error_p95"]) for p in points]
        else:
            spread = [(p["recall_p05"], None) for p in points]
        _line(panel, [p["share"] for p in points], heights, spread, style)
        if points[0]["share_if_free"] is not None:
            free = {**style, "linestyle": ":", "markerfacecolor": "none", "label": None}
            panel.plot([p["share_if_free"] for p in points], heights, **free)
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.annotate("dense", (1.0, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right")
    title = {"error": "mean relative error against dense", "recall": "recall@100"}[figure]
    panel.set(xscale="log", xlabel="bytes read, share of dense's", ylabel=title, title=_title(result, title))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    if figure == "error":
        panel.set(yscale="log")
    else:
        panel.set(ylim=(0, 1.03))
    end = "95th percentile of the errors" if figure == "error" else "5th percentile of the recalls"
    spread_note = f"bars: to the {end} over layers, steps and heads; dotted: as if choosing rows read nothing"
    _finish(canvas, panel, path, origin, spread_note)


def plot_time(result: dict[str, Any], origin: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step against rows in the store, always for the bytes of 400 rows per KV head."""
    canvas, panel = plt.subplots(figsize=(12, 7), layout="constrained")
    drawn = [operator for operator in result["operators"] if operator["times"]]
    for operator, style in zip(drawn, _styles([operator["name"] for operator in drawn]), strict=True):
        times = operator["times"]
        dashes = "-" if operator["implementation"] == "kernel" else "--"
        label = style["label"] and f"{operator['name']}  T^{operator['exponent']:.2f}"
        spread = [(p["ms_p10"], p["ms_p90"]) for p in times]
        look = {**style, "linestyle": dashes, "label": label}
        _line(panel, [p["rows"] for p in times], [p["ms"] for p in times], spread, look)
    sizes = sorted({point["rows"] for operator in drawn for point in operator["times"]})
    panel.set(
        xscale="log", yscale="log", xlabel="rows in the store (T)", ylabel="ms per step of one layer",
        title="Time for the bytes of 400 rows per KV head (dense: all rows); dashed: plain torch around a row kernel",
    )  # fmt: skip
    panel.set_xticks(sizes, [f"{n:,}" for n in sizes], minor=False)
    panel.xaxis.set_minor_formatter(NullFormatter())
    _finish(canvas, panel, path, origin, "points: medians; bars: 10th to 90th percentile of the calls")


def plot_heads(result: dict[str, Any], budget: float, origin: dict[str, Any], path: Path) -> None:
    """Error per layer (down) and query head (across) of every operator that errs, at one budget."""
    shown = [(o, p) for o in result["operators"] for p in o["points"] if p["budget"] == budget]
    shown = [(o, p) for o, p in shown if p["error"] >= LEAST_ERROR]
    columns = 6
    down = -(-max(1, len(shown)) // columns)
    canvas, panels = plt.subplots(
        down, columns, figsize=(15, 0.9 + 2.2 * down), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for panel in panels.flat[len(shown) :]:
        panel.axis("off")
    image = None
    for panel, (operator, point) in zip(panels.flat, shown, strict=False):
        errors = [[max(e, 1e-3) for e in heads] for heads in point["error_by_layer_and_head"]]
        image = panel.imshow(errors, norm=LogNorm(1e-3, 1), cmap="magma_r", aspect="auto")
        weight = "bold" if operator["name"] == DEFAULT else "normal"
        panel.set_title(f"{operator['name']}\n{point['error']:.3f}", fontsize=9, fontweight=weight)
        panel.set_yticks(range(len(result["layers"])), [str(layer) for layer in result["layers"]], fontsize=7)
        panel.tick_params(axis="x", labelsize=7)
    if image is not None:
        canvas.colorbar(image, ax=panels, label="relative error", shrink=0.6)
    canvas.supylabel("layer")
    canvas.suptitle(_title(result, f"error per layer and head at {budget:.0%} of dense's bytes, or the least possible"))
    save(canvas, path, origin, "a cell: the mean of its layer and head over the steps", axis="query head")


def _styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """A line style for each operator: a colour, marker and label for at most eight, thin and grey for the others.

    An operator of ``FIRST`` looks the same in every plot.
    """
    named = sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))[:LABELLED]
    taken = {name: LOOKS[min(FIRST.index(name), LABELLED - 1)] for name in named if name in FIRST}
    spare = [look for look in LOOKS if look not in taken.values()]
    taken |= {name: spare.pop(0) for name in named if name not in FIRST}
    styles: list[dict[str, Any]] = []
    for name in names:
        if name not in taken:
            styles.append({"color": "#BBBBBB", "marker": ".", "linewidth": 0.8, "zorder": 1, "label": None})
            continue
        colour, marker = taken[name]
        default = name == DEFAULT
        size, width = (7, 3.0) if default else (5, 1.4)
        style = {"color": colour, "marker": marker, "markersize": size, "linewidth": width, "label": name}
        styles.append({**style, "zorder": 5 if default else 3})
    return styles


def _line(panel: Any, x: Sequence[float], y: Sequence[float], spread: Sequence[Any], style: dict[str, Any]) -> None:
    """A line; with bars where it has a name."""
    if style["label"] is None:
        panel.plot(x, y, **style)
    else:
        draw(panel, x, y, spread, style)


def _title(result: dict[str, Any], what: str) -> str:
    return f"{result['rows']:,} rows, {len(result['layers'])} layers of {result['model']}: {what}"


def _finish(canvas: Any, panel: Any, path: Path, origin: dict[str, Any], spread: str) -> None:
    panel.grid(True, which="both", alpha=0.2)
    canvas.legend(loc="outside right upper", fontsize=8)
    save(canvas, path, origin, f"{spread}; grey: the other operators, in the table")
