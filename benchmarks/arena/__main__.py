"""Every operator over a sweep of budgets, on captured rows of real models: a table, four plots and a page.

SmolLM2's rows are captured where the cache lacks them (one pass of the model over each window, about a minute); files
bring those of other models, as benchmarks/capture.py writes them. Operators may learn from the earlier half of the
captured queries and are asked some of the later half. Writes arena.json, arena.html and the plots as PNG files. Ctrl-C
stops measuring; what is done by then is reported. Other models stay in arena.json as they are.

  python -m benchmarks.arena                                     8K, 8 layers, under 15 minutes on two cores
  python -m benchmarks.arena --tokens 8192 32768                 longer rows too
  python -m benchmarks.arena --quick --operators dbattn Quest    a first look
  python -m benchmarks.arena --steps 3 --files qwen.safetensors  other models beside SmolLM2

JSON: results[] = {model, tokens, rows, layers, steps, bytes_dense, plots[], verdicts[], operators[]}; an operator =
{name, family, about, paper, needs_training, implementation, points[], times[] = {rows, ms, ms_p10, ms_p90}, exponent,
share_for_error}; a point = {budget, share, share_if_free, bytes, bytes_if_free, rows, error, error_p95, recall,
recall_p05, mass, ms, error_by_layer_and_head[layer][head]}.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dbattn.origin import origin

from .. import readme
from .._common import (
    OUT_HELP,
    SMOLLM2,
    console,
    fit_exponent,
    print_table,
    progress,
    results_folder,
    with_earlier,
    write_json,
)
from ..capture import CONTEXT, Rows, fill_caches, load_rows, rows_of_file
from . import OPERATORS, Entry
from ._figures import plot_against_bytes, plot_heads, plot_time
from ._measure import TIMED_ROWS, Layer, measure, time_at_sizes
from ._report import columns, share_for_error, table, verdicts, write_page

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)
SHOWN = 0.05
LAYERS, QUICK_LAYERS = tuple(range(0, 30, 4)), (8, 22)
STEPS, QUICK_STEPS = 8, 2


def smollm2(tokens: int, layers: Sequence[int]) -> dict[int, Rows]:
    """Captured rows of SmolLM2 by layer."""
    fill_caches(tokens, layers)
    return {number: load_rows(tokens, number) for number in layers}


def run(
    model: str, tokens: int, rows: dict[int, Rows], entries: Sequence[Entry], budgets: Sequence[float], *,
    steps: int, times: bool,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """All operators on the rows of one model by layer: an entry of the results, and whether all were measured."""
    captured = [Layer.of(number, layer, steps) for number, layer in rows.items()]
    sizes = [*TIMED_ROWS, *([tokens] if tokens > max(TIMED_ROWS) else [])]
    operators: list[dict[str, Any]] = []
    try:
        with torch.inference_mode(), progress(f"{model}, {tokens:,} tokens", len(entries)) as tick:
            for entry in entries:
                operators.append(_measured(entry, captured, budgets, sizes if times else []))
                tick()
    except KeyboardInterrupt:
        done = f"{len(operators)} of {len(entries)} operators"
        console.print(f"[yellow]interrupted: the report holds {done} on {model}, {tokens:,} tokens[/yellow]")
    first, stop = captured[0].rows, captured[0].steps[-1].stop
    dense = first.keys[:, :, :stop].nbytes + first.values[:, :, :stop].nbytes
    result = {
        "model": model,
        "tokens": tokens,
        "rows": stop,
        "layers": list(rows),
        "steps": steps,
        "bytes_dense": dense,
    }
    result["operators"] = operators
    return {**result, "verdicts": verdicts(result), "plots": []}, len(operators) == len(entries)


def _measured(entry: Entry, layers: Sequence[Layer], budgets: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
    """An entry of ``operators``."""
    began = time.perf_counter()
    operator = entry.make()
    points = measure(entry, layers, budgets)
    times = time_at_sizes(entry, layers[0].rows, sizes) if sizes else []
    exponent = fit_exponent([p["rows"] for p in times], [p["ms"] for p in times]) if times else None
    console.print(f"[dim]{entry.name}: {time.perf_counter() - began:.0f} s[/dim]", highlight=False)
    facts: dict[str, Any] = {"name": entry.name, "family": entry.family, "about": entry.about, "paper": operator.paper}
    facts |= {"needs_training": operator.needs_training, "implementation": operator.implementation}
    needed = share_for_error(points)
    return {**facts, "points": points, "times": times, "exponent": exponent, "share_for_error": needed}


def report(results: list[dict[str, Any]], budgets: Sequence[float], out: Path, json: Path | None) -> None:
    """Print the tables, draw the plots, write the page and the figures."""
    shown = SHOWN if SHOWN in budgets else budgets[len(budgets) // 2]
    measured = origin()
    for result in results:
        print_table(
            f"{result['model']}, {result['rows']:,} rows",
            columns(budgets, shown),
            table(result, budgets, shown),
            width=190,
        )
        for note in result["verdicts"]:
            print(f"  {note}")
        kind = result["tokens"] if result["model"] == SMOLLM2 else result["model"].replace(" ", "-")
        names = [out / f"arena-{kind}-{what}.png" for what in ("error", "recall", "time", "heads")]
        plot_against_bytes(result, "error", measured, names[0])
        plot_against_bytes(result, "recall", measured, names[1])
        plot_heads(result, shown, measured, names[3])
        timed = any(operator["times"] for operator in result["operators"])
        if timed:
            plot_time(result, measured, names[2])
        drawn = [name for name in names if timed or name != names[2]]
        result["plots"] = [name.name for name in drawn]
    write_page(out / "arena.html", results, budgets, shown)
    record, settings = json or out / "arena.json", {"budgets": list(budgets)}
    write_json(record, "arena", settings, with_earlier(record, results, ("model", "tokens"), settings))
    print(f"page: {out / 'arena.html'}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokens", type=int, nargs="+", default=[CONTEXT], help=f"at least {CONTEXT} (the default)")
    options.add_argument("--files", type=Path, nargs="+", default=[], help="captured rows of other models")
    options.add_argument("--file-rows", type=int, default=16384, metavar="N", help="rows kept of files (default 16384)")
    options.add_argument("--steps", type=int, default=STEPS, help=f"decode steps of each layer (default {STEPS})")
    options.add_argument("--layers", type=int, nargs="+", help="layers of SmolLM2 (default: every fourth)")
    options.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="shares of dense's bytes")
    options.add_argument("--operators", nargs="+", choices=list(OPERATORS), metavar="NAME", help="default: all")
    options.add_argument(
        "--quick", action="store_true", help="two layers, two steps each, nothing timed at other sizes"
    )
    options.add_argument("--json", type=Path, metavar="OUT", help="default: arena.json in the folder")
    options.add_argument("--out", type=Path, metavar="FOLDER", help=OUT_HELP)
    args = options.parse_args(argv)
    if min(args.tokens) < CONTEXT:
        options.error(f"--tokens is {min(args.tokens)}, expected at least {CONTEXT}: the captures' shortest window")
    if not all(0 < budget <= 1 for budget in args.budgets):
        options.error(f"--budgets are {args.budgets}, expected shares above 0 and up to 1")
    if args.steps < 1 or args.file_rows < CONTEXT:
        options.error(f"--steps is {args.steps}, --file-rows {args.file_rows}, expected at least 1 and {CONTEXT}")
    args.out = args.out or results_folder(args.quick)
    layers = args.layers or (QUICK_LAYERS if args.quick else LAYERS)
    entries = [OPERATORS[name] for name in args.operators or OPERATORS]
    steps = QUICK_STEPS if args.quick else args.steps
    results: list[dict[str, Any]] = []
    for name, tokens in [*((SMOLLM2, n) for n in args.tokens), *((file, args.file_rows) for file in args.files)]:
        rows = rows_of_file(name, tokens) if isinstance(name, Path) else smollm2(tokens, layers)
        model = name.stem if isinstance(name, Path) else name
        # Times do not depend on the captures, so they are taken once.
        times = not args.quick and not results
        result, complete = run(model, tokens, rows, entries, sorted(args.budgets), steps=steps, times=times)
        if result["operators"]:
            results.append(result)
        if not complete:
            break
    if results:
        report(results, sorted(args.budgets), args.out, args.json)
        readme.write(args.out)


if __name__ == "__main__":
    main()
