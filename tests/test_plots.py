"""What a reader can tell from a plot: whose figures they are, how far they spread, which line is which."""

import itertools

import pytest

from dbattn.origin import origin, origin_line

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer

from benchmarks._plots import plot_frontier, plot_summary
from benchmarks.arena import DEFAULT, OPERATORS
from benchmarks.arena._figures import LABELLED, plot_against_bytes, plot_heads, plot_time
from dbattn.cli import _plot
from dbattn.cli._plot import PALETTE, plot_comparison

MEASURED = {
    "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "torch": "2.9"},
    "date": "2025-03-04T05:06:07+00:00",
    "commit": "commit 1a2b3c4",
}
INDEXES = ("segmented", "flat", "ivf", "hnsw")


def comparison(path):
    def figures(index, k, read, error):
        spread = {"relative_error": [error / 2, error * 2], "recall": [0.5, 1.0], "ms": [0.8, 1.5]}
        return {
            "index": index, "k": k, "bytes_read": read, "relative_error": error, "recall": 0.9, "ms": 1.0,
            "spread": spread,
        }  # fmt: skip

    rows = [figures(index, k, 1e4 * k, 10 / k) for index in INDEXES for k in (64, 128)]
    plot_comparison([figures("dense", None, 9e6, 0.0), *rows], "book.dbattn: 8000 rows", MEASURED, path)


def frontier(path):
    def points(index):
        for k in (64, 128):
            yield {
                "error": (2 + len(index)) / k, "error_p95": 20 / k, "recall": 0.9, "recall_p05": 0.7,
                "bytes_read": 1e4 * k,
            }  # fmt: skip

    tails = {"segmented": ("centroid", "none")}
    curves = [
        {"index": index, "tail": tail, "points": list(points(index))}
        for index in INDEXES
        for tail in tails.get(index, ("none", "sample"))
    ]
    plot_frontier([{"rows": 8000, "bytes_dense": 9e6, "curves": curves}], MEASURED, path)


def summary(path):
    def time(ms, **more):
        return {"ms": ms, "ms_p10": 0.9 * ms, "ms_p90": 1.3 * ms, **more}

    sizes = [
        {"rows": n, "sides": [time(n / 1e3, kind="sdpa"), time(n / 2e3, kind="dense_decode")]} for n in (8000, 32000)
    ]
    plot_summary(sizes, [time(n**0.5 / 1e3, rows=n, error=0.04) for n in (8000, 32000)], MEASURED, path)


def arena_result(names):
    def point(i, budget):
        error = 0.02 * (1 + i) * 0.02 / budget
        return {
            "budget": budget, "share": budget, "share_if_free": None if i % 5 else budget / 2, "error": error,
            "error_p95": 2 * error, "recall": 0.9, "recall_p05": 0.6, "error_by_layer_and_head": [[error] * 4] * 2,
        }  # fmt: skip

    operators = [
        {
            "name": name, "implementation": "kernel" if i % 2 else "torch", "exponent": 0.5,
            "points": [point(i, budget) for budget in (0.02, 0.05, 0.1)],
            "times": [{"rows": n, "ms": n / 1e4 + i, "ms_p10": n / 2e4, "ms_p90": n / 5e3 + i} for n in (2048, 8192)],
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    return {"model": "SmolLM2-135M", "rows": 8000, "layers": [3, 5], "operators": operators}


def every_operator(draw):
    return lambda path: draw(arena_result(OPERATORS), path)


PLOTS = {
    "comparison": comparison,
    "frontier": frontier,
    "summary": summary,
    "arena error": every_operator(lambda result, path: plot_against_bytes(result, "error", MEASURED, path)),
    "arena recall": every_operator(lambda result, path: plot_against_bytes(result, "recall", MEASURED, path)),
    "arena time": every_operator(lambda result, path: plot_time(result, MEASURED, path)),
    "arena heads": lambda path: plot_heads(arena_result(("Quest", DEFAULT)), 0.05, MEASURED, path),
}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a plot; its figure, and its file."""
    kept = []
    monkeypatch.setattr(_plot.plt, "close", kept.append)

    def draw(name):
        PLOTS[name](tmp_path / "plot.png")
        return kept.pop()

    return draw


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_says_machine_date_commit_and_what_its_spread_is(drawn, name, tmp_path):
    figure = drawn(name)
    note = figure.get_supxlabel()
    for fact in ("Some CPU", "2 cores", "2025-03-04", "commit 1a2b3c4"):
        assert fact in note
    assert "percentile" in note or name == "arena heads"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name in PLOTS if name != "arena heads"])
def test_at_most_eight_lines_have_a_name_and_all_of_them_bars_and_looks_of_their_own(drawn, name):
    figure = drawn(name)
    for panel in figure.axes:
        named = [line for line in panel.lines if not line.get_label().startswith("_")]
        assert 1 <= len(named) <= LABELLED
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in named}
        assert len(looks) == len(named)
        bars = [each for each in panel.containers if isinstance(each, ErrorbarContainer)]
        assert len(bars) == len(named)


def test_the_arena_names_its_default_and_greys_the_rest(drawn):
    (panel,) = drawn("arena error").axes
    labels = {line.get_label(): line.get_color() for line in panel.lines if not line.get_label().startswith("_")}
    assert labels[DEFAULT] == PALETTE[0]
    assert len(set(labels.values())) == len(labels) == LABELLED
    assert sum(line.get_color() == "#BBBBBB" for line in panel.lines) >= len(OPERATORS) - LABELLED


def test_colours_can_be_told_apart_in_any_colour_vision():
    """Distances in sRGB as it is seen, and as dichromats see it (Machado et al. 2009)."""
    seen_as = (
        ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
        ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    )
    for matrix in seen_as:
        colours = [tuple(sum(m * c for m, c in zip(row, to_rgb(x), strict=True)) for row in matrix) for x in PALETTE]
        for one, other in itertools.combinations(colours, 2):
            assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.15


def test_an_origin_is_one_line():
    line = origin_line(origin())
    assert "\n" not in line
    assert "cores" in line
    assert "commit" in line or "dbattn" in line
    assert "not recorded" in origin_line({name: MEASURED[name] for name in ("machine", "date")})
