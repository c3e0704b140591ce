"""The benchmarks' plots, as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import NullFormatter

from dbattn.cli._plot import PALETTE, draw, plt, save

COLOURS = dict(zip(("segmented", "ivf", "hnsw", "flat"), PALETTE, strict=False))
DASHES = {"none": ":", "sample": "--", "centroid": "-"}


def plot_frontier(sizes: list[dict[str, Any]], origin: dict[str, Any], path: Path) -> None:
    """Error and recall against bytes read, one row of panels per size; ``sizes`` as bench_frontier's results."""
    figure, panels = plt.subplots(len(sizes), 2, figsize=(12, 4.2 * len(sizes)), squeeze=False, layout="constrained")
    for size, (left, right) in zip(sizes, panels, strict=True):
        for curve in size["curves"]:
            style = {
                "color": COLOURS[curve["index"]],
                "linestyle": DASHES[curve["tail"]],
                "marker": "o",
                "markersize": 3,
                "label": f"{curve['index']}, tail {curve['tail']}",
            }
            points = curve["points"]
            read = [p["bytes_read"] / 1e6 for p in points]
            draw(left, read, [p["error"] for p in points], [(None, p["error_p95"]) for p in points], style)
            draw(right, read, [p["recall"] for p in points], [(p["recall_p05"], None) for p in points], style)
        for panel, title in ((left, "mean relative error against dense"), (right, "recall@k of the rows chosen")):
            panel.axvline(size["bytes_dense"] / 1e6, color="black", linewidth=0.8)
            panel.annotate("dense", (size["bytes_dense"] / 1e6, 0.9), xycoords=("data", "axes fraction"), rotation=90)
            panel.set(xscale="log", xlabel="MB read per call", title=f"{size['rows']:,} rows: {title}")
            panel.grid(True, which="both", alpha=0.25)
        left.set(yscale="log")
        right.set(ylim=(0, 1.03))
        left.legend(fontsize=8)
    save(figure, path, origin, "bars: to the 95th percentile of the errors, to the 5th of the recalls")


def plot_summary(sizes: list[dict[str, Any]], points: list[dict[str, Any]], origin: dict[str, Any], path: Path) -> None:
    """Time against T: SDPA, dense_decode and the fastest segmented setting within the error bound, log-log.

    ``sizes`` and ``points`` as bench_decode's ``results.sizes`` and ``results.exponent.points``.
    """
    figure, panel = plt.subplots(figsize=(8, 5.4), layout="constrained")
    rows = [size["rows"] for size in sizes]
    best = {
        kind: [min((s for s in size["sides"] if s["kind"] == kind), key=lambda s: s["ms"]) for size in sizes]
        for kind in ("sdpa", "dense_decode")
    }
    for label, colour, marker, found in (
        ("torch SDPA", PALETTE[1], "s", list(zip(rows, best["sdpa"], strict=True))),
        ("dense_decode (exact)", PALETTE[2], "^", list(zip(rows, best["dense_decode"], strict=True))),
        ("segmented, fastest setting within the error", PALETTE[0], "o", [(p["rows"], p) for p in points]),
    ):
        style = {"color": colour, "marker": marker, "label": label}
        # Records of earlier versions have no such percentiles.
        spread = [(side.get("ms_p10"), side.get("ms_p90")) for _, side in found]
        draw(panel, [n for n, _ in found], [side["ms"] for _, side in found], spread, style)
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
    save(figure, path, origin, "points: medians; bars: 10th to 90th percentile of the calls")
