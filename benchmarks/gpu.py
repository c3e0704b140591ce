"""A GPU's decode steps, against torch's flash attention in the same process; sealing; rows in host memory; the default.

  python -m benchmarks.gpu                                    checked, then timed
  python -m benchmarks.gpu --stages decode --batches 1 8      a stage alone, other sizes
  python -m benchmarks.gpu --captured FILE                    errors on rows of a model, too

Checked are the tests that a GPU runs, and small steps under compute-sanitizer (memcheck, racecheck); figures are of
heads of Llama-3-8B (32 query heads over 8 KV heads, D=128) in bfloat16. Each step is replayed from a CUDA graph that
goes through several stores, so that their rows are in no cache; the median of replays. Rows are random, in clusters of
clusters, in lists of 20 to 44 rows; captured files hold rows of a model, which are sealed here. The default config is
timed outside graphs, as a call takes it. Stages are written to gpu.json as they end. What fails its check is not timed.
Without a GPU it says so and ends.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbattn.index._list_scan import ALPHA, BETA, budget
from index_kernels import ListReading, attend_segmented
from index_kernels.segmented import rows_opened

from ._common import OUT_HELP, results_folder, write_json
from ._gpu_checks import checks
from ._gpu_model import GRAPHED, model_speed
from ._gpu_stages import captured_errors, default, flash, graph_seconds, offload, rates_here, sealing
from ._gpu_stores import DIM, HEADS, KV_HEADS, Store, exact, made_store, relative_error

SIZES = (8192, 32768, 131072, 1048576)
# Bytes that a graph goes through at least: several times the second-level caches of an H100 and an H200.
ROTATED = 400 << 20
MOST_STORES = 12
STAGES = ("checks", "decode", "sealing", "offload", "default", "model")
MODEL_ROWS = 32768
# Sinks and hot rows are not among the rows that stand in lists.
N_SINK, HOT = 4, 128


def reading(sealed: int, rows: int, kv_heads: int, k: int | None, scale: float) -> ListReading:
    """How the library reads so many rows by default, or with ``k``."""
    asks = budget(sealed, k)
    return ListReading(
        sealed, rows, N_SINK, asks.read * kv_heads, asks.coded * kv_heads, asks.opened * kv_heads, scale, None, ALPHA,
        BETA, True,
    )  # fmt: skip


def ours(store: Store, how: ListReading) -> Tensor:
    """The step as attend_segmented takes it."""
    return attend_segmented(store.query, store.keys, store.values, store.table, how, start=store.start).out


def time_size(rows: int, batch: int, k: int | None) -> dict[str, Any]:
    """One line of the table: both steps, their ratio, and the error of ours on the made rows."""
    if 10 * batch * rows * KV_HEADS * DIM > torch.cuda.get_device_properties().total_memory:
        return {"rows": rows, "batch": batch, "k": k, "failed": "two stores do not fit"}
    first = made_store(rows, batch, N_SINK, HOT, seed=0)
    each = first.keys.nbytes + first.values.nbytes
    how = reading(first.sealed, rows, KV_HEADS, k, first.scale)
    read = rows_opened(how.rows_read, how.rows_coded, KV_HEADS)
    summaries = first.table_bytes
    touched = batch * read * each // (batch * KV_HEADS * rows) + summaries
    free = torch.cuda.mem_get_info()[0]
    count = max(2, min(MOST_STORES, -(-ROTATED // touched), int(0.6 * free / (2 * each + summaries))))
    stores = [first, *(made_store(rows, batch, N_SINK, HOT, seed=i) for i in range(1, count))]
    checked = [relative_error(ours(store, how), exact(store)) for store in stores[:2]]
    dense_error = relative_error(flash(first.query, first.keys, first.values), exact(first))
    found = attend_segmented(first.query, first.keys, first.values, first.table, how, start=first.start, details=True)
    again = [ours(first, how) for _ in range(2)]
    line: dict[str, Any] = {
        "rows": rows, "batch": batch, "k": k, "stores": count, "error": statistics.mean(checked),
        "error_flash": dense_error, "rows_read": found.rows_read / (batch * KV_HEADS), "bytes_kv": each,
        "bytes_summaries": summaries, "same_bits": bool(torch.equal(*again)),
    }  # fmt: skip
    if not (line["error"] < 0.2 and dense_error < 0.02 and line["same_bits"]):
        return line | {"failed": "the answers are wrong: not timed"}
    line["flash"] = graph_seconds([lambda s=s: flash(s.query, s.keys, s.values) for s in stores])  # type: ignore[misc]
    line["ours"] = graph_seconds([lambda s=s: ours(s, how) for s in stores])  # type: ignore[misc]
    line["flash_again"] = graph_seconds([lambda s=s: flash(s.query, s.keys, s.values) for s in stores])  # type: ignore[misc]
    line["times"] = min(line["flash"], line["flash_again"]) / line["ours"]
    return line


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="rows of a store")
    options.add_argument("--batches", nargs="+", type=int, default=[1], help="batch sizes")
    options.add_argument("--k", nargs="+", type=int, help="rows asked for; default: as many as the size asks for")
    options.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what is done, in this order"
    )
    options.add_argument("--captured", nargs="+", type=Path, default=[], metavar="FILE", help="rows of a model")
    options.add_argument("--out", type=Path, metavar="FOLDER", help=OUT_HELP)
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    path = (args.out or results_folder(False)) / "gpu.json"
    results: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "heads": HEADS, "kv_heads": KV_HEADS,
        "checks": [], "errors": [], "steps": [], "sealing": [], "offload": [], "rates": [], "default": [],
        "model": [],
    }  # fmt: skip

    def stage(name: str, run: Callable[[], Any], **what: Any) -> None:
        """Run a part, and keep what it says, or why it failed, in the file and on the screen."""
        began = time.perf_counter()
        try:
            found = run()
        except Exception as error:  # the next part may do all the same
            found = what | {"failed": f"{type(error).__name__}: {error}"[:500]}
        torch.cuda.empty_cache()
        lines = found if isinstance(found, list) else [found]
        results[name] += [line | {"took": time.perf_counter() - began} for line in lines]
        write_json(path, "gpu", {"sizes": args.sizes, "batches": args.batches, "k": args.k}, results)
        for line in lines:
            print(name, {key: value for key, value in line.items() if key != "plan"}, flush=True)

    if "checks" in args.stages:
        stage("checks", checks)
        if any("failed" in line for line in results["checks"]):
            print(table(results))
            raise SystemExit("the checks failed, see gpu.json: nothing was timed")
    for file in args.captured:
        stage("errors", partial(captured_errors, file), file=file.name)
    if "decode" in args.stages:
        for batch, rows, k in product(args.batches, args.sizes, args.k or [None]):
            stage("steps", partial(time_size, rows, batch, k), rows=rows, batch=batch, k=k)
    if "sealing" in args.stages:
        stage("sealing", partial(sealing, 131072))
    if "offload" in args.stages:
        stage("offload", partial(offload, 131072, reading))
    if "default" in args.stages:
        stage("rates", rates_here)
        for batch, rows in product(args.batches, args.sizes):
            stage("default", partial(default, rows, batch), rows=rows, batch=batch)
    if "model" in args.stages:
        stage("model", partial(model_speed, MODEL_ROWS))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        f"One layer, one token, bfloat16, {HEADS} query heads over {KV_HEADS} KV heads, D=128, {results['card']}:",
        "",
        "| rows | batch | rows read | flash µs | dbattn µs | times | error |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for line in results["steps"]:
        if "failed" in line:
            lines.append(f"| {line['rows']:,} | {line['batch']} | | | | {line['failed']} | |")
            continue
        micro = " | ".join(f"{1e6 * line[name]:.1f}" for name in ("flash", "ours"))
        lines.append(
            f"| {line['rows']:,} | {line['batch']} | {line['rows_read']:,.0f} | {micro} | {line['times']:.2f} | "
            f"{line['error']:.4f} |"
        )
    lines += [f"\n{line['check']}: {line.get('says') or 'FAILED, see gpu.json'}" for line in results["checks"]]
    lines += [
        f"\nSealing {line['rows']:,} rows of {KV_HEADS} heads: {1e3 * line['seconds']:.1f} ms a layer."
        for line in results["sealing"]
        if "seconds" in line
    ]
    for line in results["offload"]:
        if "steps" not in line:
            continue
        dense = " and ".join(f"{name} {1e3 * line[name]:.2f} ms" for name in ("copied", "flash"))
        lines.append(
            f"\n{line['rows']:,} rows in host memory, {line['bytes_per_second'] / 1e9:.0f} GB/s; dense: {dense}"
        )
        lines += [
            f"{'by code' if step['by_code'] else 'whole lists'}, rows read {step['budget']:,}: "
            f"{step['copies']:.0%} of them copies, {1e6 * step['seconds']:.0f} µs, {step['times']:.1f} times faster, "
            f"error {step['error']:.4f}"
            for step in line["steps"]
        ]
    for line in results["default"]:
        if "flash" in line:
            micro = ", ".join(f"{name} {1e6 * line[name]:.0f}" for name in ("default", "dense", "flash"))
            lines.append(f"default at {line['rows']:,} x {line['batch']}: µs {micro}; {line['reason']}")
    for line in results["model"]:
        if "alone" in line:
            speeds = ", ".join(f"{name} {line[name]:.1f}" for name in ("alone", "default", "retrieving", GRAPHED))
            off = ", ".join(
                f"{name} {line[f'{name} logits']:.2g}" for name in ("alone, plainly", "default", "retrieving", GRAPHED)
            )
            lines.append(
                f"{line['layers']} layers of Llama-3-8B after {line['rows']:,} tokens, tokens/s: {speeds}; "
                f"first logits off those alone: {off}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
