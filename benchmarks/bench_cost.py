"""The cost model against the clock: a decode step of SmolLM2-135M beside the time its bytes take to be read.

Lengths from 1K to 8K rows per layer; the unwrapped model (SDPA), the wrapped one under handle.dense(), and retrieving
at the default config whatever the length. The estimate is the bytes of dbattn.cost over the measured read bandwidth:
what no kernel can beat, so the ratio tells what is lost to anything but memory. Rows beyond the text that was read are
its own, repeated with noise; time does not care.

  python -m benchmarks.bench_cost --json cost.json
  python -m benchmarks.bench_cost --sizes 1K 4K --quick

JSON: results = {bandwidth, sizes[]}; sizes[] = {rows, sides: {unwrapped, dense, retrieval: {ms, ms_p10, steps, quiet,
flops, bytes, estimated_ms, ratio}}}.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from transformers import DynamicCache

from dbattn import RetrievalConfig
from dbattn.cost import model_cost
from dbattn.hf import Handle, load_model, wrap
from index_kernels import read_bandwidth

from ._common import QuietGuard, console, parser, print_table, progress, timings_of, write_json
from ._model import decode_ms, prefill, stretched, twin_of
from .capture import prose_ids

SIZES = {"1K": 1024, "2K": 2048, "4K": 4096, "8K": 8192}
# The text that is really read; longer stores repeat it.
READ = 1024
STEPS = 4


def bench_size(
    plain: Any, handle: Handle, cache: DynamicCache, rows: int, *, bandwidth: float, rounds: int
) -> dict[str, Any]:
    """All sides at one length, in turn: an entry of ``sizes``. ``bandwidth`` in bytes a second."""
    caches = {name: stretched(cache, rows - 1, plain.config) for name in ("unwrapped", "wrapped")}
    # With its first step a cache's rows move into databases, which takes a while and is not timed.
    decode_ms(handle.model, caches["wrapped"], 1)
    guard = QuietGuard()
    batches: dict[str, list[tuple[bool, list[float]]]] = {"unwrapped": [], "dense": [], "retrieval": []}
    with progress(f"{rows:,} rows per layer: decoding", rounds) as tick:
        for _ in range(rounds):
            for name, found in batches.items():
                model, own = (plain, "unwrapped") if name == "unwrapped" else (handle.model, "wrapped")
                guard.wait(1.0)
                with handle.dense() if name == "dense" else nullcontext():
                    # The first step brings this side's working set back into the caches.
                    times = decode_ms(model, caches[own], STEPS + 1)[1:]
                found.append((guard.was_quiet(), times))
            tick()
    sides = {}
    for name, timing in timings_of(batches).items():
        cost = model_cost(plain.config, rows, config=handle.config if name == "retrieval" else None)
        estimated = 1e3 * cost.bytes / bandwidth
        sides[name] = {
            "ms": timing.median, "ms_p10": timing.p10, "steps": len(timing.times), "quiet": timing.quiet,
            "flops": cost.flops, "bytes": cost.bytes, "estimated_ms": estimated, "ratio": timing.median / estimated,
        }  # fmt: skip
    return {"rows": rows, "sides": sides}


def _print(results: dict[str, Any]) -> None:
    columns = ("rows per layer, side", "MFLOP", "MB", "ms estimated", "ms measured", "p10", "ratio", "quiet")
    rows = [
        [
            f"{size['rows']:,}  {name}", s["flops"] / 1e6, s["bytes"] / 1e6, s["estimated_ms"], s["ms"], s["ms_p10"],
            s["ratio"], f"{s['quiet']:.0%}",
        ]
        for size in results["sizes"]
        for name, s in size["sides"].items()
    ]  # fmt: skip
    bandwidth = results["bandwidth"] / 1e9
    print_table(f"SmolLM2-135M, float32: one decode step, estimated at {bandwidth:.1f} GB/s", columns, rows)


def run(names: Sequence[str], *, quick: bool = False) -> dict[str, Any]:
    """Read a text once, then time every length; prints and returns the results."""
    with console.status("loading the model"):
        plain, tokenizer = load_model()
        ids = prose_ids(tokenizer, READ)[None]
    bandwidth = read_bandwidth()
    cache, _ = prefill(plain, ids[:, :READ])
    config = RetrievalConfig(dense_below=0, audit_rate=0.0)
    with wrap(twin_of(plain), config) as handle:
        rounds = 3 if quick else 6
        sizes = [bench_size(plain, handle, cache, SIZES[name], bandwidth=bandwidth, rounds=rounds) for name in names]
    results = {"bandwidth": bandwidth, "sizes": sizes}
    _print(results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parser(__doc__, list(SIZES), list(SIZES)).parse_args(argv)
    results = run(args.sizes, quick=args.quick)
    write_json(args.json, "cost", {"sizes": args.sizes, "quick": args.quick}, results)


if __name__ == "__main__":
    main()
