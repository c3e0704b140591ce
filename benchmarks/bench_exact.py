"""SmolLM2-135M with exact=True: are its tokens dense's, and how many times as fast are they written?

Tokens: ten prompts from different places of prose, each continued greedily by the unwrapped model and by the wrapped
one with exact=True, at a config that retrieves at that length. The two must be the same.

Time: a cache of real rows, beyond the model's context repeated with noise (time does not care what rows say, but
acceptance does: there it is that of repeated rows, and said). From it plain dense decoding through our own kernel and
exact decoding go on in turn; what drafts were accepted, and how long they were, is in the figures.

  python -m benchmarks.bench_exact --json exact.json                 tokens, then 8K, 32K and 131K
  python -m benchmarks.bench_exact --sizes 32K --prompts 0           times at 32K alone
  python -m benchmarks.bench_exact --sizes --prompts 10              tokens alone

JSON: results.tokens = {prompts, length, written, same, drafted, accepted}; results.sizes[] = {rows, dense_ms, exact_ms,
speedup, drafts, same, acceptance, told}, or {rows, skipped: why}: ms per token, medians of the runs.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dbattn import RetrievalConfig
from dbattn.config import WEIGHTS
from dbattn.hf import Handle, load_model, wrap

from ._common import SIZES, QuietGuard, console, print_table, progress, write_json
from ._model import prefill, stretched, twin_of
from .capture import prose_ids

LENGTH, WRITTEN = 1024, 256
# At a length that would be scanned by default: retrieves, and is wrong often enough for rejections to matter.
RETRIEVING = RetrievalConfig(k=64, dense_below=0)
RUNS, STEPS = 3, 48


def same_tokens(plain: Any, model: Any, prose: Tensor, prompts: int, written: int) -> dict[str, Any]:
    """Continue prompts ``[1, LENGTH]`` of the prose on both sides."""
    same = 0
    with wrap(model, RETRIEVING, exact=True) as handle, progress("prompts", prompts) as tick:
        for i in range(prompts):
            at = i * (prose.shape[1] - LENGTH) // max(1, prompts - 1)
            ids = prose[:, at : at + LENGTH]
            expected, got = (_write(side, ids, written) for side in (plain, handle.model))
            same += torch.equal(expected, got)
            tick()
        drafts = handle.drafts
        assert drafts is not None
        counts = {"drafted": drafts.drafted, "accepted": drafts.accepted}
    return {"prompts": prompts, "length": LENGTH, "written": written, "same": same, **counts}


def _write(model: Any, ids: Tensor, written: int, cache: Any = None) -> Tensor:
    tokens: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=written, do_sample=False, eos_token_id=None,
        pad_token_id=0, past_key_values=cache,
    )  # fmt: skip
    return tokens[:, ids.shape[1] :]


def bench_size(handle: Handle, cache: Any, ids: Tensor, rows: int, *, runs: int, steps: int) -> dict[str, Any]:
    """Times of both ways to decode from a cache of ``rows`` rows; the entry of ``results.sizes``."""
    one = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) * rows // cache.get_seq_length()
    free = psutil.virtual_memory().available
    if free < 1.4 * one + (2 << 30):
        return {"rows": rows, "skipped": f"needs {1.4 * one / 2**30 + 2:.0f} GiB, {free / 2**30:.0f} are free"}
    model, began_with = handle.model, ids[:, -1:]
    with console.status(f"{rows:,} rows per layer: sealing"), torch.inference_mode():
        moved = stretched(cache, rows, model.config)
        model(began_with, past_key_values=moved)
        moved.crop(-1)
    # generate wants the tokens of what the cache holds; which ones does not matter.
    prompt = torch.cat([ids.repeat(1, -(-rows // ids.shape[1]))[:, :rows], began_with], dim=1)
    guard = QuietGuard()
    times: dict[str, list[float]] = {"dense": [], "exact": []}
    handle.restart_report()
    texts: dict[str, Tensor] = {}
    with progress(f"{rows:,} rows per layer: decoding", 2 * runs) as tick:
        for _ in range(runs):
            for name in times:
                guard.wait(5.0)
                began = time.perf_counter()
                if name == "dense":
                    texts[name] = _dense(model, began_with, moved, steps)
                else:
                    texts[name] = _write(model, prompt, steps, moved)
                times[name].append(1e3 * (time.perf_counter() - began) / steps)
                moved.crop(rows - moved.get_seq_length())
                tick()
    drafts = handle.drafts
    assert drafts is not None
    dense, exact = (statistics.median(each) for each in times.values())
    return {
        "rows": rows,
        "dense_ms": dense,
        "exact_ms": exact,
        "speedup": dense / exact,
        "drafts": drafts.drafted / max(1, drafts.passes),
        "same": torch.equal(texts["dense"], texts["exact"]),
        "acceptance": drafts.accepted / max(1, drafts.drafted),
        "told": str(drafts),
    }


@torch.inference_mode()
def _dense(model: Any, token: Tensor, cache: Any, steps: int) -> Tensor:
    found = []
    for _ in range(steps):
        token = model(token, past_key_values=cache).logits[:, -1].argmax(dim=-1, keepdim=True)
        found.append(token)
    return torch.cat(found, dim=1)


def run(names: Sequence[str], *, prompts: int, written: int, weights: str, quick: bool) -> dict[str, Any]:
    """Compare tokens, then time every size; prints and returns the results."""
    with console.status("loading the model"):
        plain, tokenizer = load_model(weights=weights)
        ids = prose_ids(tokenizer, SIZES["8K"])[None]
    results: dict[str, Any] = {"weights": weights, "sizes": []}
    if prompts:
        results["tokens"] = found = same_tokens(plain, twin_of(plain), ids, prompts, written)
        print(
            f"{found['same']} of {prompts} prompts are continued by the same {written} tokens; {found['accepted']} of "
            f"{found['drafted']} drafted ones were accepted"
        )
    if names:
        context = ids[:, :4096] if quick else ids
        cache, _ = prefill(plain, context)
        with wrap(twin_of(plain), exact=True) as handle:
            for rows in (SIZES[name] for name in names):
                results["sizes"].append(
                    bench_size(handle, cache, context, rows, runs=1 if quick else RUNS, steps=STEPS)
                )
        _print(results)
    return results


def _print(results: dict[str, Any]) -> None:
    columns = ("rows per layer", "dense, ms", "exact, ms", "times as fast", "drafted a pass", "accepted", "same")
    rows: list[list[Any]] = []
    for size in results["sizes"]:
        if "skipped" in size:
            rows.append([f"{size['rows']:,}: skipped, {size['skipped']}", *[None] * 6])
            continue
        figures = [size[name] for name in ("dense_ms", "exact_ms", "speedup", "drafts")]
        rows.append([f"{size['rows']:,}", *figures, f"{size['acceptance']:.0%}", "yes" if size["same"] else "no"])
    print_table(f"SmolLM2-135M, weights in {results['weights']}: one token", columns, rows)
    for size in results["sizes"]:
        if "told" in size:
            print(f"{size['rows']:,}: {size['told']}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_exact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--sizes", nargs="*", choices=sorted(SIZES), default=["8K", "32K", "131K"], help="rows")
    options.add_argument("--prompts", type=int, default=10, metavar="N", help="prompts to continue (default 10)")
    options.add_argument("--tokens", type=int, default=WRITTEN, metavar="N", help="tokens of each (default 256)")
    options.add_argument("--weights", default="float32", choices=WEIGHTS, help="of all sides (default float32)")
    options.add_argument("--quick", action="store_true", help="one run of each size, from 4,096 real rows")
    options.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")
    args = options.parse_args(argv)
    results = run(args.sizes, prompts=args.prompts, written=args.tokens, weights=args.weights, quick=args.quick)
    settings = {"sizes": args.sizes, "quick": args.quick, "weights": args.weights}
    write_json(args.json, "exact", settings, results)


if __name__ == "__main__":
    main()
