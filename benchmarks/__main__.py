"""Run all benchmarks and compare with what the engine must reach.

Captures rows of SmolLM2-135M first where the cache lacks them (about ten minutes, once). Each benchmark writes its
figures to the results folder as soon as it is done; the table at the end takes in all that the folder holds.

  python -m benchmarks                        everything, half an hour on two cores
  python -m benchmarks --quick                a few minutes, smaller sizes; the figures wobble
  python -m benchmarks --only decode insert   some of them; the table takes the others from their latest run

Writes decode.json, model.json, plan.json, insert.json, frontier.json, frontier.png and summary.png. The repository
keeps the records, and benchmarks/README.md is written from them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import bench_decode, bench_frontier, bench_insert, bench_model, bench_plan, readme
from ._common import OUT_HELP, SIZES, console, results_folder, write_json
from ._plots import plot_summary
from ._targets import print_targets, targets
from .capture import fill_cache

NAMES = ("decode", "model", "plan", "insert", "frontier")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="benchmarks to run")
    options.add_argument("--quick", action="store_true", help="smaller sizes and fewer repetitions")
    options.add_argument("--out", type=Path, metavar="FOLDER", help=OUT_HELP)
    args = options.parse_args(argv)
    quick: bool = args.quick
    args.out = args.out or results_folder(quick)
    sizes = ["8K", "32K"] if quick else ["8K", "32K", "131K", "524K"]

    benchmarks: dict[str, Callable[[], Any]] = {
        "decode": lambda: bench_decode.run(sizes, quick=quick),
        "model": lambda: bench_model.run(["4K", "8K"] if quick else ["4K", "8K", "32K", "131K"], quick=quick),
        "plan": lambda: bench_plan.run(["8K"] if quick else ["8K", "32K"], quick=quick),
        "insert": lambda: bench_insert.run(["8K"] if quick else ["8K", "32K"], quick=quick),
        "frontier": lambda: bench_frontier.run(
            ["8K"] if quick else ["8K", "32K"], quick=quick, plot=args.out / "frontier.png"
        ),
    }
    if "decode" in args.only and not quick:
        fill_cache(SIZES["524K"], 8)
    # Figures of benchmarks that do not run now stay in the table, from their own latest run.
    records = readme.records_in(args.out, quick=quick)
    results: dict[str, Any] = {name: record["results"] for name, record in records.items()}
    for name in (n for n in NAMES if n in args.only):
        console.rule(name)
        began = time.perf_counter()
        results[name] = benchmarks[name]()
        records[name] = write_json(args.out / f"{name}.json", name, {"quick": quick}, results[name])
        console.print(f"{name} took {time.perf_counter() - began:.0f} s")

    print_targets(targets(results))
    if "decode" in results:
        decode = results["decode"]
        plot_summary(decode["sizes"], decode["exponent"]["points"], records["decode"], args.out / "summary.png")
        print(f"plot: {args.out / 'summary.png'}")
    readme.write(args.out)


if __name__ == "__main__":
    main()
