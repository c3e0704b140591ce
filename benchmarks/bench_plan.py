"""The planner and the ladder: is the plan that is chosen the fastest, and is a bound on the error kept?

Choices: over a grid of rows, heads and k, a dense scan and the segmented index are timed in turn from cold caches; the
planner (dense_below="auto", rates measured on this machine) is charged for the one it chooses. Bounds: decode steps on
captured rows of layers 8 and 22 with max_error; every query is audited beside its answer.

  python -m benchmarks.bench_plan --json plan.json
  python -m benchmarks.bench_plan --sizes 8K --quick          a coarser grid, bounds at 8K only

JSON: results.choices[] = {rows, kv_heads, heads, k, ms_dense, ms_index, ms_dense_estimated, ms_index_estimated, chosen,
regret}, regret = time of the chosen plan over the faster one's; results.within_20 = the share with regret <= 1.2;
results.bounds[] = {tokens, max_error, queries, within, error, bytes_of_dense, rungs}.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dbattn import AttentionDB, RetrievalConfig

from ._common import SIZES, Side, parser, print_table, progress, time_sides, write_json
from ._stores import STEPS_TO, query_at
from .capture import load_rows

LAYERS = (8, 22)
GRID_ROWS, GRID_HEADS, GRID_K = (640, 1280, 2560, 5120, 10240, 32768), ((1, 1), (3, 9), (8, 32)), (None, 128, 1024)
BOUNDS = (0.02, 0.05, 0.1)
# Decode steps audited per layer and bound.
STEPS = 150


def choices(quick: bool) -> list[dict[str, Any]]:
    """Time both plans at every point of the grid, and see which one the planner takes."""
    rows = GRID_ROWS[1::2] if quick else GRID_ROWS
    points = [(n, heads, k) for n in rows for heads in GRID_HEADS for k in GRID_K if k is None or k < n // 2]
    found = []
    stores: list[AttentionDB] = []
    with progress("timing both plans", len(points)) as advance:
        for n, (kv_heads, heads), k in points:
            if not stores or (len(stores[0]), stores[0].store.num_kv_heads) != (n, kv_heads):
                stores = [_store(n, kv_heads, seed) for seed in range(3)]
            found.append(_choice(stores, heads, k))
            advance()
    return found


def _store(rows: int, kv_heads: int, seed: int) -> AttentionDB:
    """Rows of one size: time hardly depends on what they hold."""
    generator = torch.Generator().manual_seed(seed)
    db = AttentionDB(kv_heads, 64, config=RetrievalConfig(index="segmented", audit_rate=0.0))
    db.insert(*(torch.randn(1, kv_heads, rows, 64, generator=generator) for _ in range(2)))
    return db


def _choice(stores: Sequence[AttentionDB], heads: int, k: int | None) -> dict[str, Any]:
    asked, forced = ([copy.copy(db) for db in stores] for _ in range(2))
    for db, free in zip(forced, asked, strict=True):
        db.config, free.config = replace(db.config, k=k, dense_below=0), replace(free.config, k=k, dense_below="auto")
    query = torch.randn(1, heads, 1, 64)
    sides = [Side("dense", forced, _dense), Side("index", forced, _attend)]
    timings = time_sides(sides, [query], rounds=15, seconds=0.4, label="")
    dense, index = timings["dense"].median, timings["index"].median
    chosen, plan = asked[0].explain(query), forced[0].explain(query)
    took = dense if chosen.is_dense else index
    return {
        "rows": len(stores[0]), "kv_heads": stores[0].store.num_kv_heads, "heads": heads, "k": k,
        "ms_dense": 1e3 * dense, "ms_index": 1e3 * index,
        "ms_dense_estimated": 1e3 * (plan.seconds_dense or 0.0),
        "ms_index_estimated": 1e3 * (plan.seconds_estimated or 0.0),
        "chosen": "dense" if chosen.is_dense else "index", "regret": took / min(dense, index),
    }  # fmt: skip


def _dense(db: AttentionDB, query: Tensor) -> Any:
    return db.attend(query, retrieve=False)


def _attend(db: AttentionDB, query: Tensor) -> Any:
    return db.attend(query)


def bounds(tokens: int, max_error: float, steps: int) -> dict[str, Any]:
    """Decode with a bound at the default audit_rate; what callers got is compared with dense on the side."""
    errors, read, dense, rungs = [], 0, 0, Counter[str]()
    for layer in LAYERS:
        rows = load_rows(tokens, layer)
        db = AttentionDB(
            rows.keys.shape[1], rows.keys.shape[3], config=RetrievalConfig(max_error=max_error, dense_below=0)
        )
        first = len(rows) - STEPS_TO - 2 * steps
        db.insert(rows.keys[:, :, :first], rows.values[:, :, :first])
        for stop in range(first + 2, len(rows) - STEPS_TO + 1, 2):
            db.insert(rows.keys[:, :, stop - 2 : stop], rows.values[:, :, stop - 2 : stop])
            query = query_at(rows, stop - 1)
            report = db.audit(query)
            db.attend(query)
            errors.append(report.relative_error_by_query.flatten())
            read, dense = read + report.bytes_read, dense + report.bytes_dense
        rungs.update(db.stats.rungs)
    all_errors = torch.cat(errors)
    return {
        "tokens": tokens,
        "max_error": max_error,
        "queries": len(all_errors),
        "within": float((all_errors <= max_error).float().mean()),
        "error": float(all_errors.mean()),
        "bytes_of_dense": read / dense,
        "rungs": dict(rungs.most_common()),
    }


def run(names: Sequence[str], *, quick: bool = False) -> dict[str, Any]:
    """Run both parts, print their tables; returns the results."""
    grid = choices(quick)
    within = sum(point["regret"] <= 1.2 for point in grid) / len(grid)
    columns = ("rows", "heads", "k", "dense ms", "estimated", "index ms", "estimated", "chosen", "regret")
    cells = [
        [
            f"{p['rows']:,}", f"{p['heads']}/{p['kv_heads']}", p["k"], p["ms_dense"], p["ms_dense_estimated"],
            p["ms_index"], p["ms_index_estimated"], p["chosen"], p["regret"],
        ]
        for p in grid
    ]  # fmt: skip
    print_table(f"Plans chosen: {within:.0%} take at most 1.2 times the faster one", columns, cells)
    found = [bounds(SIZES[name], bound, STEPS // 3 if quick else STEPS) for name in names for bound in BOUNDS]
    print_table(
        "max_error: what callers got",
        ("tokens", "max_error", "queries", "within", "mean error", "bytes of dense", "rungs"),
        [
            [
                f"{b['tokens']:,}", b["max_error"], b["queries"], b["within"], b["error"], b["bytes_of_dense"],
                "; ".join(f"{count}x {rung}" for rung, count in list(b["rungs"].items())[:4]),
            ]
            for b in found
        ],
    )  # fmt: skip
    return {"choices": grid, "within_20": within, "bounds": found}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parser(__doc__, ["8K", "32K"], ["8K", "32K"]).parse_args(argv)
    write_json(args.json, "plan", {"sizes": args.sizes, "quick": args.quick}, run(args.sizes, quick=args.quick))


if __name__ == "__main__":
    main()
