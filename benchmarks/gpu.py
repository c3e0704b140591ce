"""A GPU's decode steps, against torch's flash attention in the same process.

  python -m benchmarks.gpu                                    checked, then timed: under a minute
  python -m benchmarks.gpu --sizes 8192 --batches 1 8         other sizes and batches
  python -m benchmarks.gpu --snapshot FOLDER                  errors on a snapshot's rows, too

Heads of Llama-3-8B (32 query heads over 8 KV heads, D=128) in bfloat16. Each step is replayed from a CUDA graph that
goes through several stores, so that their rows are in no cache; the median of replays. Rows are random, in clusters of
clusters, in lists of 20 to 44 rows; snapshots hold rows of a model. Stages are written to gpu.json as they end.
A kernel that fails its check is not timed. Without a GPU it says so and ends.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dbattn.index._list_scan import ALPHA, BETA, budget
from index_kernels import ListReading, attend_segmented
from index_kernels.segmented import rows_opened

from ._common import OUT_HELP, results_folder, write_json
from ._gpu_stores import DIM, HEADS, KV_HEADS, Store, exact, made_store, relative_error, snapshot_errors

SIZES = (8192, 32768, 131072, 1048576)
# Bytes that a graph goes through at least: several times the second-level caches of an H100 and an H200.
ROTATED = 400 << 20
MOST_STORES = 12
REPLAYS = 30
# Sinks and hot rows are not among the rows that stand in lists.
N_SINK, HOT = 4, 128


def reading(sealed: int, rows: int, kv_heads: int, k: int | None, scale: float) -> ListReading:
    """How the library reads so many rows by default, or with ``k``."""
    asks = budget(sealed, k)
    return ListReading(
        sealed, rows, N_SINK, asks.read * kv_heads, asks.coded * kv_heads, sealed * kv_heads, scale, None, ALPHA, BETA,
        True,
    )  # fmt: skip


def graph_seconds(steps: Sequence[Callable[[], object]]) -> float:
    """Seconds of one step: the median of replays of a graph that takes all steps, over their number."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for _ in range(REPLAYS + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3 / len(steps))
    return float(statistics.median(times[3:]))


def flash(store: Store) -> Tensor:
    """The step as torch's flash attention takes it."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(store.query, store.keys, store.values, enable_gqa=True)


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
    dense_error = relative_error(flash(first), exact(first))
    found = attend_segmented(first.query, first.keys, first.values, first.table, how, start=first.start, details=True)
    again = [ours(first, how) for _ in range(2)]
    line: dict[str, Any] = {
        "rows": rows, "batch": batch, "k": k, "stores": count, "error": statistics.mean(checked),
        "error_flash": dense_error, "rows_read": found.rows_read / (batch * KV_HEADS), "bytes_kv": each,
        "bytes_summaries": summaries, "same_bits": bool(torch.equal(*again)),
    }  # fmt: skip
    if not (line["error"] < 0.2 and dense_error < 0.02 and line["same_bits"]):
        return line | {"failed": "the answers are wrong: not timed"}
    line["flash"] = graph_seconds([lambda s=s: flash(s) for s in stores])  # type: ignore[misc]
    line["ours"] = graph_seconds([lambda s=s: ours(s, how) for s in stores])  # type: ignore[misc]
    line["flash_again"] = graph_seconds([lambda s=s: flash(s) for s in stores])  # type: ignore[misc]
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
    options.add_argument("--snapshot", nargs="+", type=Path, default=[], help="FOLDER, beside FOLDER.query.safetensors")
    options.add_argument("--out", type=Path, metavar="FOLDER", help=OUT_HELP)
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    path = (args.out or results_folder(False)) / "gpu.json"
    results: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "heads": HEADS, "kv_heads": KV_HEADS,
        "errors": [], "steps": [],
    }  # fmt: skip

    def keep() -> None:
        write_json(path, "gpu", {"sizes": args.sizes, "batches": args.batches, "k": args.k}, results)

    for folder in args.snapshot:
        results["errors"] += snapshot_errors(folder)
        keep()
        print(results["errors"][-1], flush=True)
    for batch in args.batches:
        for rows in args.sizes:
            for k in args.k or [None]:
                began = time.perf_counter()
                try:
                    line = time_size(rows, batch, k)
                except torch.OutOfMemoryError:
                    line = {"rows": rows, "batch": batch, "k": k, "failed": "out of memory"}
                torch.cuda.empty_cache()
                results["steps"].append(line | {"took": time.perf_counter() - began})
                keep()
                print(line, flush=True)
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
    return "\n".join(lines)


if __name__ == "__main__":
    main()
