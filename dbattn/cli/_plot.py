"""The plot of dbattn compare; needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

from ..files import written_whole

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen, so that no display is needed

_PANELS = (("relative_error", "relative error against dense"), ("recall", "recall@k"), ("ms", "ms per token"))


def plot_comparison(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """Error, recall and time against bytes read, a line per index; ``results``: dense, then the others' figures."""
    dense, others = results[0], results[1:]
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(15, 4.4), layout="constrained")
    for panel, (name, label) in zip(panels, _PANELS, strict=True):
        for index in dict.fromkeys(row["index"] for row in others):
            points = sorted((row["bytes_read"] / 1e6, row[name], row["k"]) for row in others if row["index"] == index)
            panel.plot([x for x, *_ in points], [y for _, y, _ in points], "o-", markersize=4, label=index)
            for x, y, k in points:
                panel.annotate(f"k={k}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        panel.plot(dense["bytes_read"] / 1e6, dense[name], "k*", label="dense")
        panel.set(xlabel="MB read per token", title=label)
        panel.set(xlim=(0, None), ylim=(0, None))
        panel.grid(True, which="both", alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.suptitle(title)
    with written_whole(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    plt.close(figure)
