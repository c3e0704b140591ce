"""SmolLM2-135M end to end: milliseconds per decoded token, memory and fidelity, wrapped against unwrapped.

Three sides decode in turn: the unwrapped model (its own SDPA and DynamicCache), the wrapped model under handle.dense(),
and the wrapped model retrieving in all 30 layers at the default config. At 4K and 8K the rows are those of real prose;
beyond the model's context they are that prose's rows repeated with noise, which time does not care about, and nothing
but time and memory is measured there. Fidelity: 128 tokens of prose are fed one by one after 7,900, and the logits
compared with the unwrapped model's.

  python -m benchmarks.bench_model --sizes 4K 8K --json model.json
  python -m benchmarks.bench_model --sizes 8K --quick
  python -m benchmarks.bench_model --sizes 8K --weights int8      all sides with int8 weights

Peak memory of a side = weights + what its cache holds + the most the process grew while it decoded.

JSON: results.weights; results.prefill = {tokens, s, ms_per_token}; results.fidelity = {context, tokens, logits_l2, kl,
top1}; results.sizes[] = {rows, sides: {unwrapped, dense, retrieval: {ms, ms_p10, steps, quiet, peak_bytes,
cache_bytes}}, speedup, adopt_s}, or {rows, skipped: why}.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import psutil
from transformers import DynamicCache

from dbattn.config import WEIGHTS
from dbattn.hf import Handle, load_model, wrap

from ._common import SIZES, QuietGuard, Timing, console, parser, print_table, progress, timings_of, write_json
from ._model import cache_bytes, decode_ms, memory_growth, prefill, stretched, twin_of
from .bench_fidelity import CONTEXT, FORCED, fidelity
from .capture import prose_ids

STEPS = 4

Step = Callable[[], tuple[list[float], int]]


def bench_size(plain: Any, handle: Handle, cache: DynamicCache, rows: int, *, rounds: int) -> dict[str, Any]:
    """Decode from stores of ``rows`` rows per layer on all sides; the entry of ``results.sizes``."""
    one = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) * rows // cache.get_seq_length()
    free = psutil.virtual_memory().available
    # Moving a plain cache into databases holds it, its copies, and the larger buffers of the next insert for a while.
    if free < 1.4 * one + (2 << 30):
        return {"rows": rows, "skipped": f"needs {1.4 * one / 2**30 + 2:.0f} GiB, {free / 2**30:.0f} are free"}
    together = free > 3 * one + (2 << 30)
    timings: dict[str, Timing] = {}
    figures: dict[str, dict[str, Any]] = {}
    adopt_s = 0.0

    def decode(groups: Sequence[str], caches: dict[str, DynamicCache]) -> None:
        found = _time_in_turn(
            {
                name: _steps(name, plain, handle, caches["unwrapped" if name == "unwrapped" else "wrapped"])
                for name in groups
            },
            rounds,
            f"{rows:,} rows per layer: decoding",
        )
        for name, (timing, growth) in found.items():
            held = cache_bytes(caches["unwrapped" if name == "unwrapped" else "wrapped"])
            timings[name] = timing
            figures[name] = {"cache_bytes": held, "peak_bytes": _weights(plain) + held + growth}

    def wrapped() -> DynamicCache:
        nonlocal adopt_s
        with console.status(f"{rows:,} rows per layer: sealing"):
            moved = stretched(cache, rows, plain.config)
            began = time.perf_counter()
            decode_ms(handle.model, moved, 1)
            adopt_s = time.perf_counter() - began
        return moved

    if together:
        decode(
            ["unwrapped", "dense", "retrieval"],
            {"unwrapped": stretched(cache, rows, plain.config), "wrapped": wrapped()},
        )
    else:
        decode(["unwrapped"], {"unwrapped": stretched(cache, rows, plain.config)})
        decode(["dense", "retrieval"], {"wrapped": wrapped()})
    for name, timing in timings.items():
        figures[name] |= {
            "ms": timing.median,
            "ms_p10": timing.p10,
            "steps": len(timing.times),
            "quiet": timing.quiet,
        }
    speedup = figures["unwrapped"]["ms"] / figures["retrieval"]["ms"]
    return {"rows": rows, "sides": figures, "speedup": speedup, "adopt_s": adopt_s}


def _steps(name: str, plain: Any, handle: Handle, cache: DynamicCache) -> Step:
    """A batch of decode steps on one side: milliseconds, and the bytes the process grew by."""

    def run() -> tuple[list[float], int]:
        model = plain if name == "unwrapped" else handle.model
        with handle.dense() if name == "dense" else nullcontext(), memory_growth() as growth:
            # The first step brings the other side's working set back out of the caches.
            times = decode_ms(model, cache, STEPS + 1)[1:]
        return times, growth[0]

    return run


def _time_in_turn(steps: dict[str, Step], rounds: int, label: str) -> dict[str, tuple[Timing, int]]:
    guard = QuietGuard()
    batches: dict[str, list[tuple[bool, list[float]]]] = {name: [] for name in steps}
    grown = dict.fromkeys(steps, 0)
    with progress(label, rounds) as tick:
        for _ in range(rounds):
            for name, step in steps.items():
                guard.wait(5.0)
                times, growth = step()
                batches[name].append((guard.was_quiet(), times))
                grown[name] = max(grown[name], growth)
            tick()
    timings = timings_of(batches)
    return {name: (timings[name], grown[name]) for name in steps}


def _weights(model: Any) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _print(results: dict[str, Any]) -> None:
    columns = ("rows per layer, side", "ms per token", "p10", "x unwrapped", "peak GB", "cache GB", "quiet")
    rows: list[list[Any]] = []
    for size in results["sizes"]:
        if "skipped" in size:
            rows.append([f"{size['rows']:,}: skipped, {size['skipped']}", *[None] * 6])
            continue
        for name, s in size["sides"].items():
            times = size["sides"]["unwrapped"]["ms"] / s["ms"]
            peak, held = s["peak_bytes"] / 1e9, s["cache_bytes"] / 1e9
            rows.append([f"{size['rows']:,}  {name}", s["ms"], s["ms_p10"], times, peak, held, f"{s['quiet']:.0%}"])
    print_table(f"SmolLM2-135M, weights in {results['weights']}, 30 layers: one decode step", columns, rows)
    f, p = results["fidelity"], results["prefill"]
    print(f"prefill: {p['ms_per_token']:.2f} ms per token over {p['tokens']:,} tokens")
    print(
        f"teacher-forced over {f['tokens']} tokens after {f['context']:,}, all layers retrieving: logits relative L2 "
        f"{f['logits_l2']:.4f}, KL to dense {f['kl']:.5f}, top-1 agreement {f['top1']:.3f}"
    )


def run(names: Sequence[str], *, quick: bool = False, weights: str = "float32") -> dict[str, Any]:
    """Prefill once, measure fidelity, then every size; prints and returns the results."""
    with console.status("loading the model"):
        plain, tokenizer = load_model(weights=weights)
        ids = prose_ids(tokenizer, SIZES["8K"])[None]
    context, forced = (4096, 32) if quick else (CONTEXT, FORCED)
    twin = twin_of(plain)
    cache, seconds = prefill(plain, ids[:, :context])
    results: dict[str, Any] = {
        "weights": weights,
        "prefill": {"tokens": context, "s": seconds, "ms_per_token": 1e3 * seconds / context},
    }
    with wrap(twin) as handle:
        results["fidelity"] = fidelity(plain, handle, cache, ids[:, : context + forced])
        results["sizes"] = []
        for rows in (SIZES[name] for name in names):
            rounds = 3 if quick else 4 if rows > SIZES["8K"] else 8
            results["sizes"].append(bench_size(plain, handle, cache, rows, rounds=rounds))
    _print(results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser(__doc__, ["4K", "8K", "32K", "131K"], ["4K", "8K", "32K", "131K"])
    options.add_argument("--weights", default="float32", choices=WEIGHTS, help="of all sides (default float32)")
    args = options.parse_args(argv)
    results = run(args.sizes, quick=args.quick, weights=args.weights)
    write_json(args.json, "model", {"sizes": args.sizes, "quick": args.quick, "weights": args.weights}, results)


if __name__ == "__main__":
    main()
