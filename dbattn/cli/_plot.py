"""The plot of dbattn compare, and what every plot here has: colours, error bars, where its figures come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from ..files import written_whole
from ..origin import origin_line

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen, so that no display is needed

__all__ = ["MARKERS", "PALETTE", "draw", "plot_comparison", "plt", "save"]

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; a dark one in place of their yellow.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7F7F2A", "#000000")
MARKERS = "os^vDP*X"
_PANELS = (("relative_error", "relative error against dense"), ("recall", "recall@k"), ("ms", "ms per token"))


def plot_comparison(results: list[dict[str, Any]], title: str, origin: dict[str, Any], path: Path) -> None:
    """Error, recall and time against bytes read, a line per index; ``results``: dense, then the others' figures."""
    dense, others = results[0], results[1:]
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(15, 4.8), layout="constrained")
    for panel, (name, label) in zip(panels, _PANELS, strict=True):
        for index, colour, marker in zip(dict.fromkeys(row["index"] for row in others), PALETTE, MARKERS, strict=False):
            points = sorted((row for row in others if row["index"] == index), key=lambda row: row["bytes_read"])
            draw(
                panel,
                [row["bytes_read"] / 1e6 for row in points],
                [row[name] for row in points],
                [row["spread"][name] for row in points],
                {"color": colour, "marker": marker, "markersize": 4, "label": index},
            )
            for row in points:
                at = row["bytes_read"] / 1e6, row[name]
                panel.annotate(f"k={row['k']}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        style = {"color": "black", "marker": "*", "markersize": 9, "label": "dense"}
        draw(panel, [dense["bytes_read"] / 1e6], [dense[name]], [dense["spread"][name]], style)
        panel.set(xlabel="MB read per token", title=label)
        panel.set(xlim=(0, None), ylim=(0, None))
        panel.grid(True, which="both", alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path, origin, "bars: 10th to 90th percentile of the answers")


def draw(
    panel: Any,
    x: Sequence[float],
    y: Sequence[float],
    spread: Sequence[tuple[float | None, float | None]],
    style: dict[str, Any],
) -> None:
    """A line with bars from the lower to the upper end of each point's spread; None: the point itself."""
    panel.plot(x, y, **style)
    ends = [[at if end is None else end for end in pair] for pair, at in zip(spread, y, strict=True)]
    # A mean may lie outside the percentiles of its own figures.
    bars = [[max(0.0, at - low) for (low, _), at in zip(ends, y, strict=True)]]
    bars += [[max(0.0, high - at) for (_, high), at in zip(ends, y, strict=True)]]
    order = style.get("zorder", 2)
    panel.errorbar(x, y, bars, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2, alpha=0.5, zorder=order)


def save(figure: Any, path: Path, origin: dict[str, Any], spread: str, axis: str = "") -> None:
    """Write the figure with a line under it (and under the name of a shared axis): where it is from, what bars show."""
    note = f"{origin_line(origin)}\n{spread}"
    figure.supxlabel(f"{axis}\n{note}" if axis else note, fontsize=8, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    plt.close(figure)
