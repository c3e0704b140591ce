"""The benchmarks' plots, as PNG files."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import NullFormatter

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen, so that no display is needed

COLOURS = {"flat": "tab:gray", "ivf": "tab:orange", "hnsw": "tab:green", "segmented": "tab:blue"}
DASHES = {"none": ":", "sample": "--", "centroid": "-"}


def plot_frontier(sizes: list[dict[str, Any]], path: Path) -> None:
    """Error and recall against bytes read, one row of panels per size; ``sizes`` as bench_frontier's results."""
    figure, panels = plt.subplots(len(sizes), 2, figsize=(12, 4.2 * len(sizes)), squeeze=False, layout="constrained")
    for size, (left, right) in zip(sizes, panels, strict=True):
        for curve in size["curves"]:
            style = {
                "color": COLOURS[curve["index"]],
                "linestyle": DASHES[curve["tail"]],
                "marker": "o",
                "markersize": 3,
            }
            label = f"{curve['index']}, tail {curve['tail']}"
            read = [point["bytes_read"] / 1e6 for point in curve["points"]]
            left.plot(read, [point["error"] for point in curve["points"]], label=label, **style)
            right.plot(read, [point["recall"] for point in curve["points"]], label=label, **style)
        for panel, title in ((left, "mean relative error against dense"), (right, "recall@k of the rows chosen")):
            panel.axvline(size["bytes_dense"] / 1e6, color="black", linewidth=0.8)
            panel.annotate("dense", (size["bytes_dense"] / 1e6, 0.9), xycoords=("data", "axes fraction"), rotation=90)
            panel.set(xscale="log", xlabel="MB read per call", title=f"{size['rows']:,} rows: {title}")
            panel.grid(True, which="both", alpha=0.25)
        left.set(yscale="log")
        right.set(ylim=(0, 1.03))
        left.legend(fontsize=8)
    _save(figure, path)


def plot_summary(sizes: list[dict[str, Any]], points: list[dict[str, Any]], path: Path) -> None:
    """Time against T: SDPA, dense_decode and the fastest segmented setting within the error bound, log-log.

    ``sizes`` and ``points`` as bench_decode's ``results.sizes`` and ``results.exponent.points``.
    """
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = [size["rows"] for size in sizes]
    for kind, label, colour in (
        ("sdpa", "torch SDPA", "tab:red"),
        ("dense_decode", "dense_decode (exact)", "tab:gray"),
    ):
        best = [min(side["ms"] for side in size["sides"] if side["kind"] == kind) for size in sizes]
        panel.plot(rows, best, "o-", color=colour, label=label)
    panel.plot(
        [p["rows"] for p in points],
        [p["ms"] for p in points],
        "o-",
        color="tab:blue",
        label="segmented, fastest setting within the error",
    )
    for p in points:
        panel.annotate(
            f"error {p['error']:.3f}", (p["rows"], p["ms"]), xytext=(0, -14), textcoords="offset points", ha="center"
        )
    panel.set(
        xscale="log", yscale="log", xlabel="rows in the store (T)", ylabel="ms per query position, one layer",
        title="One decode step of one layer (3 KV heads x 3 query heads, D = 64, float32)",
    )  # fmt: skip
    panel.set_xticks(rows, [f"{n / 1000:.0f}K" for n in rows], minor=False)
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(0.1)
    panel.grid(True, which="both", alpha=0.25)
    panel.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
