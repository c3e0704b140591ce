"""The arena's four plots, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, NullFormatter

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen, so that no display is needed

from . import DEFAULT

COLOURS = {
    "exact": "black",
    "fixed": "tab:brown",
    "hashing": "tab:green",
    "linear": "tab:purple",
    "selection": "tab:orange",
    "dbattn": "tab:blue",
}
MARKERS = "osD^vP<>Xph*"
# Where errors and times are drawn as if they were no better: float32 noise, and what a log axis needs.
LEAST_ERROR = 1e-4


def plot_against_bytes(result: dict[str, Any], figure: str, path: Path) -> None:
    """Error (log) or recall, ``figure`` "error" or "recall", against the share of dense's bytes that was read.

    Operators whose choice of rows reads every key are drawn twice: with all they read, and dotted as if it were free.
    """
    canvas, panel = plt.subplots(figsize=(12, 7), layout="constrained")
    for operator, style in _styled(result["operators"]):
        points = sorted((p for p in operator["points"] if p[figure] is not None), key=lambda p: p["share"])
        if not points or (figure == "error" and max(p["error"] for p in points) < LEAST_ERROR):
            continue
        heights = [max(p["error"], LEAST_ERROR) if figure == "error" else p[figure] for p in points]
        panel.plot([p["share"] for p in points], heights, label=operator["name"], **style)
        if points[0]["share_if_free"] is not None:
            style = {**style, "linestyle": ":", "markerfacecolor": "none", "alpha": 0.7}
            panel.plot([p["share_if_free"] for p in points], heights, label=f"{operator['name']}, choice free", **style)
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.annotate("dense", (1.0, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right")
    title = {"error": "mean relative error against dense", "recall": "recall@100"}[figure]
    panel.set(xscale="log", xlabel="bytes read, share of dense's", ylabel=title, title=_title(result, title))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    if figure == "error":
        panel.set(yscale="log")
    else:
        panel.set(ylim=(0, 1.03))
    _finish(canvas, panel, path)


def plot_time(result: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step against rows in the store, always for the bytes of 400 rows per KV head."""
    canvas, panel = plt.subplots(figsize=(12, 7), layout="constrained")
    sizes: set[int] = set()
    for operator, style in _styled(result["operators"]):
        times = operator["times"]
        if times:
            dashes = "-" if operator["implementation"] == "kernel" else "--"
            label = f"{operator['name']}  T^{operator['exponent']:.2f}"
            rows = [point["rows"] for point in times]
            sizes.update(rows)
            panel.plot(rows, [point["ms"] for point in times], label=label, **{**style, "linestyle": dashes})
    panel.set(
        xscale="log", yscale="log", xlabel="rows in the store (T)", ylabel="ms per step of one layer",
        title="Time for the bytes of 400 rows per KV head (dense: all rows); dashed: plain torch around a row kernel",
    )  # fmt: skip
    panel.set_xticks(sorted(sizes), [f"{n:,}" for n in sorted(sizes)], minor=False)
    panel.xaxis.set_minor_formatter(NullFormatter())
    _finish(canvas, panel, path)


def plot_heads(result: dict[str, Any], budget: float, path: Path) -> None:
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
    canvas.supxlabel("query head")
    canvas.supylabel("layer")
    canvas.suptitle(_title(result, f"error per layer and head at {budget:.0%} of dense's bytes, or the least possible"))
    _save(canvas, path)


def _styled(operators: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Operators with their line style: colour by family, marker within it, the default of dbattn on top."""
    seen: dict[str, int] = {}
    styled = []
    for operator in operators:
        family = operator["family"]
        index = seen[family] = seen.get(family, -1) + 1
        default = operator["name"] == DEFAULT
        style = {
            "color": COLOURS[family],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 7 if default else 4.5,
            "linewidth": 3 if default else 1.1,
            "zorder": 5 if default else 2,
        }
        styled.append((operator, style))
    return styled


def _title(result: dict[str, Any], what: str) -> str:
    return f"{result['rows']:,} rows, {len(result['layers'])} layers of SmolLM2-135M: {what}"


def _finish(canvas: Any, panel: Any, path: Path) -> None:
    panel.grid(True, which="both", alpha=0.2)
    canvas.legend(loc="outside right upper", fontsize=8)
    _save(canvas, path)


def _save(canvas: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)
