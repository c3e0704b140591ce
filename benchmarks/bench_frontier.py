"""Error and recall against bytes read: every index with every tail, over a sweep of k, as a table and a plot.

Captured rows of layers 8 and 22, 32 decode steps each. Bytes are all that a call reads: rows, and the keys, centroids
or summaries that the index scores to choose them. Nothing is timed here, so other load does not matter.

  python -m benchmarks.bench_frontier --sizes 8K --json frontier.json --plot frontier.png
  python -m benchmarks.bench_frontier --sizes 8K --quick            three values of k

JSON: results[] = {tokens, rows, bytes_dense, curves[] = {index, tail, points[] = {k, error, error_p95, recall,
attention_mass, rows_read, bytes_read, bytes_dense}}}.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbattn.config import TAILS

from ._common import RESULTS, SIZES, parser, print_table, progress, write_json
from ._plots import plot_frontier
from ._stores import STEPS_FROM, STEPS_TO, Quality, build, config_of, decode_and_audit
from .capture import Rows, load_rows

LAYERS = (8, 22)
BUDGETS = (32, 64, 128, 256, 512, 1024)


def curve(captures: Sequence[Rows], index: str, tail: str, budgets: Sequence[int]) -> dict[str, Any]:
    """One index with one tail at every k: an entry of ``curves``."""
    reports: dict[int | None, list[Any]] = {k: [] for k in budgets}
    for rows in captures:
        db = build(rows, config_of(index, max(budgets), tail), len(rows) - STEPS_FROM)
        for k, found in decode_and_audit(db, rows, budgets).items():
            reports[k] += found
    points = [{"k": k, **Quality.of(found).to_dict()} for k, found in reports.items()]
    return {"index": index, "tail": tail, "points": points}


def bench_size(captures: Sequence[Rows], tokens: int, budgets: Sequence[int]) -> dict[str, Any]:
    """All indexes and tails at one size: an entry of the results."""
    pairs = [(index, tail) for index in ("flat", "ivf", "hnsw", "segmented") for tail in TAILS[index]]
    curves = []
    with progress(f"{tokens:,} tokens: indexes and tails", len(pairs)) as tick:
        for index, tail in pairs:
            curves.append(curve(captures, index, tail, budgets))
            tick()
    rows = len(captures[0]) - STEPS_TO
    return {"tokens": tokens, "rows": rows, "bytes_dense": curves[0]["points"][0]["bytes_dense"], "curves": curves}


def _print(size: dict[str, Any]) -> None:
    columns = ("index, tail", "k", "rows read", "MB read", "of dense", "error", "p95", "recall@k", "mass")
    rows = [
        [
            f"{curve['index']}, {curve['tail']}", p["k"], p["rows_read"], p["bytes_read"] / 1e6,
            p["bytes_read"] / p["bytes_dense"], p["error"], p["error_p95"], p["recall"], p["attention_mass"],
        ]
        for curve in size["curves"]
        for p in curve["points"]
    ]  # fmt: skip
    print_table(f"{size['rows']:,} rows, layers {' and '.join(map(str, LAYERS))}", columns, rows)


def run(names: Sequence[str], *, quick: bool = False, plot: Path | None = None) -> list[dict[str, Any]]:
    """Run the sizes, print their tables, draw the plot where a path is given; returns the results."""
    results = []
    for tokens in (SIZES[name] for name in names):
        captures = [load_rows(tokens, layer) for layer in LAYERS]
        results.append(bench_size(captures, tokens, BUDGETS[::2] if quick else BUDGETS))
        _print(results[-1])
    if plot is not None:
        plot_frontier(results, plot)
        print(f"plot: {plot}")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser(__doc__, ["8K", "32K"], ["8K", "32K"])
    options.add_argument("--plot", type=Path, default=RESULTS / "frontier.png", metavar="PNG", help="where to draw it")
    args = options.parse_args(argv)
    results = run(args.sizes, quick=args.quick, plot=args.plot)
    write_json(args.json, "frontier", {"sizes": args.sizes, "quick": args.quick}, results)


if __name__ == "__main__":
    sys.exit(main())
