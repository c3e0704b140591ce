"""Every operator over a sweep of budgets, on captured rows of SmolLM2: a table, four plots and a page.

Rows are captured where the cache lacks them (one pass of the model over each window, about a minute). Writes
arena.json, arena.html and the plots as PNG files. Ctrl-C stops measuring; what is done by then is reported.

  python -m benchmarks.arena                                     8K, 8 layers, under 15 minutes on two cores
  python -m benchmarks.arena --tokens 8192 32768                 longer rows too
  python -m benchmarks.arena --quick --operators dbattn Quest    a first look

JSON: results[] = {tokens, rows, layers, bytes_dense, plots[], verdicts[], operators[]}; an operator = {name, family,
about, paper, needs_training, implementation, points[], times[] = {rows, ms, ms_p10, ms_p90}, exponent}; a point =
{budget, share, share_if_free, bytes, bytes_if_free, rows, error, error_p95, recall, recall_p05, mass, ms,
error_by_layer_and_head[layer][head]}.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dbattn.origin import origin

from .. import readme
from .._common import OUT_HELP, console, fit_exponent, print_table, progress, results_folder, write_json
from .._stores import STEPS_FROM, STEPS_TO
from ..capture import CONTEXT, fill_caches, load_rows
from . import OPERATORS, Entry
from ._figures import plot_against_bytes, plot_heads, plot_time
from ._measure import TIMED_ROWS, Layer, measure, time_at_sizes
from ._report import columns, table, verdicts, write_page

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)
SHOWN = 0.05
LAYERS, QUICK_LAYERS = tuple(range(0, 30, 4)), (8, 22)
STEPS, QUICK_STEPS = 8, 2


def run(
    tokens: int, layers: Sequence[int], entries: Sequence[Entry], budgets: Sequence[float], *, steps: int, times: bool
) -> tuple[dict[str, Any], bool]:
    """All operators at one size: an entry of the results, and whether all of them were measured."""
    fill_caches(tokens, layers)
    captured = []
    for number in layers:
        rows = load_rows(tokens, number)
        stride = (STEPS_FROM - STEPS_TO) // steps
        stops = range(len(rows) - STEPS_FROM + stride, len(rows) - STEPS_TO + 1, stride)
        captured.append(Layer.of(number, rows, stops))
    sizes = [*TIMED_ROWS, *([tokens] if tokens > max(TIMED_ROWS) else [])]
    operators: list[dict[str, Any]] = []
    try:
        with torch.inference_mode(), progress(f"{tokens:,} tokens", len(entries)) as tick:
            for entry in entries:
                operators.append(_measured(entry, captured, budgets, sizes if times else []))
                tick()
    except KeyboardInterrupt:
        done = f"{len(operators)} of {len(entries)} operators"
        console.print(f"[yellow]interrupted: the report holds {done} at {tokens:,} tokens[/yellow]")
    rows, stop = captured[0].rows, captured[0].steps[-1].stop
    dense = rows.keys[:, :, :stop].nbytes + rows.values[:, :, :stop].nbytes
    result = {"tokens": tokens, "rows": stop, "layers": list(layers), "bytes_dense": dense, "operators": operators}
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
    return {**facts, "points": points, "times": times, "exponent": exponent}


def report(results: list[dict[str, Any]], budgets: Sequence[float], out: Path, json: Path | None) -> None:
    """Print the tables, draw the plots, write the page and the figures."""
    shown = SHOWN if SHOWN in budgets else budgets[len(budgets) // 2]
    measured = origin()
    for result in results:
        print_table(f"{result['rows']:,} rows", columns(budgets, shown), table(result, budgets, shown), width=190)
        for note in result["verdicts"]:
            print(f"  {note}")
        names = [out / f"arena-{result['tokens']}-{what}.png" for what in ("error", "recall", "time", "heads")]
        plot_against_bytes(result, "error", measured, names[0])
        plot_against_bytes(result, "recall", measured, names[1])
        plot_heads(result, shown, measured, names[3])
        timed = any(operator["times"] for operator in result["operators"])
        if timed:
            plot_time(result, measured, names[2])
        drawn = [name for name in names if timed or name != names[2]]
        result["plots"] = [name.name for name in drawn]
    write_page(out / "arena.html", results, budgets, shown)
    write_json(json or out / "arena.json", "arena", {"budgets": list(budgets)}, results)
    print(f"page: {out / 'arena.html'}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokens", type=int, nargs="+", default=[CONTEXT], help=f"at least {CONTEXT} (the default)")
    options.add_argument("--layers", type=int, nargs="+", help="layers to sample (default: every fourth)")
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
    args.out = args.out or results_folder(args.quick)
    layers = args.layers or (QUICK_LAYERS if args.quick else LAYERS)
    entries = [OPERATORS[name] for name in args.operators or OPERATORS]
    results = []
    for i, tokens in enumerate(args.tokens):
        # Times do not depend on the captures, so they are taken once.
        times = not args.quick and i == 0
        steps = QUICK_STEPS if args.quick else STEPS
        result, complete = run(tokens, layers, entries, sorted(args.budgets), steps=steps, times=times)
        if result["operators"]:
            results.append(result)
        if not complete:
            break
    if results:
        report(results, sorted(args.budgets), args.out, args.json)
        readme.write(args.out)


if __name__ == "__main__":
    main()
