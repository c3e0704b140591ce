"""A context's rows over several processes: exactness, error at one budget, what is exchanged and what it costs.

  python -m benchmarks.bench_shards                       2 and 4 processes on this machine, random rows
  python -m benchmarks.bench_shards --captured smollm2.safetensors qwen.safetensors

Processes talk over gloo, with one thread each. Per layer and number of ranks, a store of the same rows in one process
answers the same queries with the same budget of all ranks together: its own by size, asked for as ``k``. Both learn
from the earlier half of the captured queries and answer the later half, rows inserted on the way.

JSON: results = {layers[], exchange[], steps[], model}. layers[] = {model, layer, ranks, rows, exact (largest relative
error where k covers all rows), k, one_error, error, ratio, one_rows, rows_read (hot rows included), parts, moves (of
the weight, between ranks, from call to call)}; exchange[] = {ranks, cores, bytes (that a rank sends for a layer and
token), us (median of a gather)}; steps[] = {rows, ms (a layer's step in one process, one thread)}. model: tokens/s of
clusters of other sizes and lengths, not measured, by

  seconds a token = weights + layers * (step(rows / ranks, k / ranks) + (ranks - 1) * hop)

with ``weights`` the time of all that is not attention, ``step`` interpolated in steps[] on log-log scales (extrapolated
beyond the longest), and ``hop`` what a gather takes for each rank more, where each has a core (exchange[]), at least a
network's ``--hop-us``.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from dbattn import AttentionDB, RetrievalConfig, dense_attention
from dbattn.index._list_scan import default_rows_read
from dbattn.metrics import relative_error
from dbattn.sharded import ShardedDB
from dbattn.shards import Shards

from . import readme
from ._common import RESULTS, print_table, write_json
from .capture import Rows, rows_of_file

RANKS, STEPS, EXCHANGES = (2, 4), 48, 300
# SmolLM2-135M, as the model of clusters has it.
LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64
CLUSTERS, LENGTHS = (1, 2, 4, 8, 16, 64), (131_072, 1_000_000, 10_000_000, 100_000_000)
STEP_ROWS = (4096, 8192, 32768, 131072)
Figures = dict[str, Any]


def random_rows(rows: int) -> Rows:
    """Rows in clusters along the text, and queries near them: nothing of a model, but not all alike."""
    made = torch.Generator().manual_seed(0)
    topics = torch.randn(1, KV_HEADS, rows // 256, 1, DIM, generator=made)
    keys = (1.2 * topics + 0.8 * torch.randn(1, KV_HEADS, rows // 256, 256, DIM, generator=made)).flatten(2, 3)
    values = torch.randn(1, KV_HEADS, keys.shape[2], DIM, generator=made)
    chosen = keys[:, :, torch.randint(keys.shape[2], (256,), generator=made)]
    query = chosen.repeat_interleave(HEADS // KV_HEADS, dim=1) + torch.randn(1, HEADS, 256, DIM, generator=made)
    return Rows(keys, values, query)


def layers_of(paths: Sequence[Path], rows: int) -> list[tuple[str, int, Rows]]:
    """Model, layer and rows of each captured layer; random ones without files."""
    if not paths:
        return [("random", 0, random_rows(rows))]
    return [(path.stem, layer, found) for path in paths for layer, found in rows_of_file(path, rows).items()]


def in_ranks(ranks: int, work: Any, *given: Any) -> list[Any]:
    """What ``work(shards, *given)`` gives in each of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, folder, work, given), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, work: Any, given: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    # The first ones compile kernels.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=ranks, timeout=timedelta(minutes=10)
    )
    assert dist.group.WORLD is not None
    found = work(Shards(dist.group.WORLD), *given)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def quality(shards: Shards | None, rows: Rows, k: int | None) -> Figures:
    """Errors of answers over the later half of the queries, as shards or (None) as one store; k None: by size."""
    half = rows.query.shape[2] // 2
    first = len(rows) - half
    if k is None:
        k = default_rows_read(first)
    db = _learnt(shards, rows, first, RetrievalConfig(k=k, dense_below=0, audit_rate=0.0))
    errors = []
    for i in range(1, STEPS + 1):
        stop = first + i * half // STEPS
        db.insert(rows.keys[:, :, len(db) : stop], rows.values[:, :, len(db) : stop])
        at = stop - len(rows) + rows.query.shape[2]
        query = rows.query[:, :, at - 1 : at].contiguous()
        out = db.attend(query)
        errors.append(_error(out, query, rows, stop))
    found: Figures = {"k": k, "error": statistics.fmean(errors), "rows_read": db.stats.rows_read / db.stats.retrieving}
    if shards is not None:
        assert isinstance(db, ShardedDB)
        found["parts"], found["moves"] = db.budget.parts(k, shards.held_by_each(len(db))), db.budget.moves
        exact = _learnt(shards, rows, first, RetrievalConfig(k=10**9, dense_below=0, audit_rate=0.0))
        query = rows.query[:, :, half - 1 : half].contiguous()
        found["exact"] = _error(exact.attend(query), query, rows, first, worst=True)
    return found


def _learnt(shards: Shards | None, rows: Rows, stop: int, config: RetrievalConfig) -> AttentionDB:
    db = AttentionDB(rows.keys.shape[1], rows.keys.shape[3], config=config, group=shards)
    db.insert(rows.keys[:, :, :stop], rows.values[:, :, :stop])
    if config.k is not None and config.k < stop:
        db.analyze(rows.query[:, :, : rows.query.shape[2] // 2])
    return db


def _error(out: Tensor | tuple[Tensor, Tensor], query: Tensor, rows: Rows, stop: int, *, worst: bool = False) -> float:
    assert isinstance(out, Tensor)
    dense = dense_attention(query, rows.keys[:, :, :stop], rows.values[:, :, :stop])
    assert isinstance(dense, Tensor)
    errors = relative_error(out, dense)
    return float(errors.max() if worst else errors.mean())


def qualities(shards: Shards, layers: Sequence[tuple[str, int, Rows]]) -> list[Figures]:
    """``quality`` of each layer."""
    return [quality(shards, rows, None) for *_, rows in layers]


def exchange(shards: Shards) -> Figures:
    """What a rank sends for a token of a layer of SmolLM2, and the time of the gather alone."""
    db = AttentionDB(KV_HEADS, DIM, config=RetrievalConfig(audit_rate=0.0), group=shards)
    db.insert(torch.randn(1, KV_HEADS, 64, DIM), torch.randn(1, KV_HEADS, 64, DIM))
    sent: list[Tensor] = []
    gather = shards.gather
    shards.gather = lambda numbers: (sent.append(numbers), gather(numbers))[1]  # type: ignore[method-assign, func-returns-value]
    db.attend(torch.randn(1, HEADS, 1, DIM))
    times = []
    for _ in range(EXCHANGES):
        began = time.perf_counter()
        gather(sent[-1])
        times.append(time.perf_counter() - began)
    cores = len(os.sched_getaffinity(0))
    return {"ranks": shards.ranks, "cores": cores, "bytes": sent[-1].nbytes, "us": 1e6 * statistics.median(times)}


def steps(sizes: Sequence[int]) -> list[Figures]:
    """Times of a layer's decode step in one process with one thread, by rows; the budget by size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    for size in sizes:
        rows = random_rows(size)
        db = _learnt(None, rows, size, RetrievalConfig(k=default_rows_read(size), dense_below=0, audit_rate=0.0))
        times = []
        for i in range(60):
            query = rows.query[:, :, i : i + 1].contiguous()
            began = time.perf_counter()
            db.attend(query)
            times.append(time.perf_counter() - began)
        found.append({"rows": size, "ms": 1e3 * statistics.median(times[10:])})
    torch.set_num_threads(before)
    return found


def interpolated(points: Sequence[Figures], rows: float) -> float:
    """Milliseconds of a step over ``rows`` rows, on log-log scales; beyond the ends as between the last two."""
    x, y = ([math.log(point[name]) for point in points] for name in ("rows", "ms"))
    at = math.log(max(rows, 1))
    i = next((i for i in range(1, len(x) - 1) if at <= x[i]), len(x) - 1)
    # Fewer rows than the fewest measured take what these do.
    return math.exp(max(y[0], y[i - 1] + (at - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])))


def clusters(found: Figures, weights_ms: float, hop_us: float) -> Figures:
    """The model of clusters; see above."""
    # Processes that share a core wait for each other: that is no network's doing.
    alone = [one["us"] / (one["ranks"] - 1) for one in found["exchange"] if one["ranks"] <= one["cores"]]
    hop = max([hop_us, *alone]) / 1e3
    points = []
    for rows in LENGTHS:
        for ranks in CLUSTERS:
            step = interpolated(found["steps"], rows / ranks)
            ms = weights_ms + LAYERS * (step + (ranks - 1) * hop)
            gigabytes = LAYERS * KV_HEADS * 2 * DIM * 4 * rows / ranks / 1e9
            points.append({"rows": rows, "ranks": ranks, "tokens_per_s": 1e3 / ms, "gb_per_rank": gigabytes})
    return {"weights_ms": weights_ms, "hop_us": 1e3 * hop, "points": points}


def weights_time() -> float:
    """Milliseconds of a token of SmolLM2 with next to no context, one thread."""
    from dbattn.hf import load_model

    model, _ = load_model()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    with torch.inference_mode():
        cache = model(torch.ones(1, 8, dtype=torch.int64)).past_key_values
        for _ in range(12):
            began = time.perf_counter()
            model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
            times.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return 1e3 * statistics.median(times[2:])


def compared(layers: Sequence[tuple[str, int, Rows]], ranks: Sequence[int]) -> list[Figures]:
    """Shards against one store of the same rows, at the same budget."""
    alone = [quality(None, rows, None) for *_, rows in layers]
    found = []
    for count in ranks:
        by_layer = in_ranks(count, qualities, layers)[0]
        for (model, layer, rows), one, each in zip(layers, alone, by_layer, strict=True):
            names = {"model": model, "layer": layer, "ranks": count, "rows": len(rows)}
            ratio = {"one_error": one["error"], "one_rows": one["rows_read"], "ratio": each["error"] / one["error"]}
            found.append({**names, **each, **ratio})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--captured", nargs="*", type=Path, default=[], metavar="FILE", help="default: random rows")
    options.add_argument("--rows", type=int, default=16384, metavar="N", help="rows of each layer (default: 16384)")
    options.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), metavar="N", help="default: 2 4")
    options.add_argument("--weights-ms", type=float, help="of a token, without attention (default: measured, SmolLM2)")
    options.add_argument("--hop-us", type=float, default=30.0, help="the least a network takes (default: 30)")
    options.add_argument("--json", type=Path, metavar="OUT", default=RESULTS / "shards.json", help="the record")
    args = options.parse_args(argv)
    if min(args.ranks) < 2 or args.rows < 4096:
        options.error(f"--ranks are {args.ranks}, --rows {args.rows}, expected at least 2 ranks and 4096 rows")
    found: Figures = {"layers": compared(layers_of(args.captured, args.rows), args.ranks)}
    print_table("Shards against one store", readme.SHARDS_HEAD, readme.shard_rows(found["layers"]))
    found["exchange"] = [in_ranks(count, exchange)[0] for count in args.ranks]
    found["steps"] = steps(STEP_ROWS)
    found["model"] = clusters(found, args.weights_ms or weights_time(), args.hop_us)
    found["model"]["weights_given"] = args.weights_ms is not None
    settings = {"captured": [path.name for path in args.captured], "rows": args.rows, "ranks": args.ranks}
    write_json(args.json, "shards", settings, found)
    readme.write(args.json.parent.resolve())


if __name__ == "__main__":
    main()
