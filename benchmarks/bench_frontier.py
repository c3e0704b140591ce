"""Error and recall against bytes read: every index with every tail, over a sweep of k, as a table and a plot.

And every type that rows can be kept in: its error against dense over the rows as they were captured, of a scan of all
rows and of the segmented index. (Elsewhere errors are against dense over the same stored rows.)

Captured rows of layers 8 and 22, 32 decode steps each. Bytes are all that a call reads: rows, and the keys, centroids
or summaries that the index scores to choose them. Nothing is timed here, so other load does not matter.

  python -m benchmarks.bench_frontier --sizes 8K --json frontier.json --plot frontier.png
  python -m benchmarks.bench_frontier --sizes 8K --quick            three values of k

JSON: results[] = {tokens, rows, bytes_dense, curves[] = {index, tail, points[] = {k, error, error_p95, recall,
recall_p05, attention_mass, rows_read, bytes_read, bytes_dense}}, storages[] = {storage, row_bytes, bytes_dense,
error_dense, bytes_read, error}}.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dbattn import dense_attention, relative_error
from dbattn.config import INDEX_TRAITS, STORAGES
from dbattn.origin import origin

from ._common import RESULTS, SIZES, parser, print_table, progress, write_json
from ._plots import plot_frontier
from ._stores import STEPS_FROM, STEPS_TO, STRIDE, Quality, build, config_of, decode_and_audit, query_at
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


def storage_point(captures: Sequence[Rows], storage: str) -> dict[str, Any]:
    """Rows kept in one type: an entry of ``storages``. Bytes are those of one row of a KV head, and of a call."""
    found: dict[str, list[float]] = {name: [] for name in ("bytes_dense", "error_dense", "bytes_read", "error")}
    row_bytes = 0
    for rows in captures:
        db = build(rows, replace(config_of("segmented", None), storage=storage), len(rows) - STEPS_FROM)
        row_bytes = db.store.row_bytes
        for stop in range(len(rows) - STEPS_FROM + STRIDE, len(rows) - STEPS_TO + 1, STRIDE):
            keys, values = rows.keys[:, :, :stop], rows.values[:, :, :stop]
            db.insert(keys[:, :, len(db) :], values[:, :, len(db) :])
            query = query_at(rows, stop - 1)
            exact, report = dense_attention(query, keys, values), db.audit(query)
            assert isinstance(exact, Tensor)
            for name, out in (("error_dense", db.attend(query, retrieve=False)), ("error", db.attend(query))):
                assert isinstance(out, Tensor)
                found[name].append(float(relative_error(out, exact).mean()))
            found["bytes_dense"].append(report.bytes_dense)
            found["bytes_read"].append(report.bytes_read)
    return {
        "storage": storage,
        "row_bytes": row_bytes,
        **{name: statistics.fmean(all_) for name, all_ in found.items()},
    }


def bench_size(captures: Sequence[Rows], tokens: int, budgets: Sequence[int]) -> dict[str, Any]:
    """All indexes and tails at one size: an entry of the results."""
    pairs = [(index, tail) for index in ("flat", "ivf", "hnsw", "segmented") for tail in INDEX_TRAITS[index].tails]
    curves = []
    with progress(f"{tokens:,} tokens: indexes and tails", len(pairs)) as tick:
        for index, tail in pairs:
            curves.append(curve(captures, index, tail, budgets))
            tick()
    storages = [storage_point(captures, storage) for storage in STORAGES]
    rows, bytes_dense = len(captures[0]) - STEPS_TO, curves[0]["points"][0]["bytes_dense"]
    return {"tokens": tokens, "rows": rows, "bytes_dense": bytes_dense, "curves": curves, "storages": storages}


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
    title = f"{size['rows']:,} rows, layers {' and '.join(map(str, LAYERS))}"
    print_table(title, columns, rows)
    kept = ("rows kept as", "bytes a row", "MB dense", "error dense", "MB segmented", "error segmented")
    rows = [
        [p["storage"], p["row_bytes"], p["bytes_dense"] / 1e6, p["error_dense"], p["bytes_read"] / 1e6, p["error"]]
        for p in size["storages"]
    ]
    print_table(f"{title}, errors against the rows as captured", kept, rows)


def run(names: Sequence[str], *, quick: bool = False, plot: Path | None = None) -> list[dict[str, Any]]:
    """Run the sizes, print their tables, draw the plot where a path is given; returns the results."""
    results = []
    for tokens in (SIZES[name] for name in names):
        captures = [load_rows(tokens, layer) for layer in LAYERS]
        results.append(bench_size(captures, tokens, BUDGETS[::2] if quick else BUDGETS))
        _print(results[-1])
    if plot is not None:
        plot_frontier(results, origin(), plot)
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
    main()
