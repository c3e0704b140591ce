"""SmolLM2-135M with exact=True: are its tokens dense's, and how many times as fast are they written?

Tokens: ten prompts from different places of prose, each continued greedily by the unwrapped model and by the wrapped
one with exact=True, at a config that retrieves at that length. The two must be the same.

Time: a cache of real rows, repeated with noise (time does not care what rows say, but acceptance does: there it is that
of repeated rows, and said). From it two calls of generate go on in turn: all dense, through our own kernel, and exact.
An uncounted exact call comes first: kernels are compiled, rows to read are learnt, and whether drafts pay is found out,
which later calls go on from. How many drafts were accepted is in the figures.

  python -m benchmarks.bench_exact                                   ten prompts, then 8K, 32K and 131K
  python -m benchmarks.bench_exact --prompts 0 1 2 3 4 --sizes       these prompts alone
  python -m benchmarks.bench_exact --prompts --sizes 131K            times at 131K alone

A run adds what it measured to the record. JSON: results[] = {what: "tokens", number, rows, weights, drafts, written,
same, drafted, accepted} and {what: "time", number: 0, rows, weights, drafts, dense_ms, exact_ms, speedup, a_pass,
acceptance, same, real, told}: ms per token, medians of the runs.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dbattn import RetrievalConfig
from dbattn.config import WEIGHTS
from dbattn.hf import Handle, load_model, wrap

from ._common import RESULTS, SIZES, QuietGuard, console, print_table, progress, with_earlier, write_json
from ._model import prefill, stretched, twin_of
from .capture import prose_ids
from .readme import write

LENGTH, WRITTEN, PROMPTS = 1024, 256, 10
# At a length that would be scanned by default: retrieves, and is wrong often enough for rejections to matter.
RETRIEVING = RetrievalConfig(k=64, dense_below=0)
# Rows that are real; runs, tokens of each, and those of the call before. All stay within the window of newest rows: one
# more, and all rows would be sealed anew as one segment, as they are once on the way from these sizes to their doubles.
REAL, RUNS, STEPS, UNCOUNTED = 2048, 4, 48, 16


def same_tokens(plain: Any, handle: Handle, prose: Tensor, number: int, written: int) -> dict[str, Any]:
    """Continue prompt ``number`` of the prose on both sides: an entry of ``results``."""
    at = number * (prose.shape[1] - LENGTH) // (PROMPTS - 1)
    ids = prose[:, at : at + LENGTH]
    handle.restart_report()
    expected, got = (_write(side, ids, written) for side in (plain, handle.model))
    drafts = handle.drafts
    assert drafts is not None
    return {
        "what": "tokens", "number": number, "rows": LENGTH, "written": written, "same": torch.equal(expected, got),
        "drafted": drafts.drafted, "accepted": drafts.accepted,
    }  # fmt: skip


def _write(model: Any, ids: Tensor, written: int, cache: Any = None) -> Tensor:
    tokens: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=written, do_sample=False, eos_token_id=None,
        pad_token_id=0, past_key_values=cache,
    )  # fmt: skip
    return tokens[:, ids.shape[1] :]


def bench_size(handle: Handle, cache: Any, ids: Tensor, rows: int, *, runs: int, steps: int) -> dict[str, Any] | None:
    """Times of both ways to decode from a cache of ``rows`` rows: an entry of ``results``; None if memory is short."""
    one = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) * rows // cache.get_seq_length()
    needs, free = 2.4 * one + (1 << 30), psutil.virtual_memory().available
    if free < needs:
        print(f"{rows:,} rows: skipped, needs {needs / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
        return None
    model, token = handle.model, ids[:, -1:]
    with console.status(f"{rows:,} rows per layer: sealing"), torch.inference_mode():
        moved = stretched(cache, rows, model.config)
        model(token, past_key_values=moved)
        moved.crop(-1)
    # generate wants the tokens of what the cache holds; which ones does not matter.
    prompt = torch.cat([ids.repeat(1, -(-rows // ids.shape[1]))[:, :rows], token], dim=1)
    guard = QuietGuard()
    times: dict[str, list[float]] = {"dense": [], "exact": []}
    texts: dict[str, Tensor] = {}
    _write(model, prompt, UNCOUNTED, moved)
    moved.crop(rows - moved.get_seq_length())
    handle.restart_report()
    with progress(f"{rows:,} rows per layer: decoding", 2 * runs) as tick:
        for _ in range(runs):
            for name in times:
                guard.wait(2.0)
                began = time.perf_counter()
                with handle.dense() if name == "dense" else nullcontext():
                    texts[name] = _write(model, prompt, steps, moved)
                times[name].append(1e3 * (time.perf_counter() - began) / steps)
                moved.crop(rows - moved.get_seq_length())
                tick()
    drafts = handle.drafts
    assert drafts is not None
    dense, exact = (statistics.median(each) for each in times.values())
    return {
        "what": "time",
        "number": 0,
        "rows": rows,
        "dense_ms": dense,
        "exact_ms": exact,
        "speedup": dense / exact,
        "a_pass": drafts.drafted / max(1, drafts.passes),
        "acceptance": drafts.accepted / max(1, drafts.drafted),
        "same": torch.equal(texts["dense"], texts["exact"]),
        "real": cache.get_seq_length(),
        "told": str(drafts),
    }


def run(names: Sequence[str], numbers: Sequence[int], *, written: int, weights: str, drafts: str) -> Iterator[Any]:
    """The entries of ``results``, each when it has been measured."""
    with console.status("loading the model"):
        plain, tokenizer = load_model(weights=weights)
        ids = prose_ids(tokenizer, SIZES["8K"])[None]
    common = {"weights": weights, "drafts": drafts}
    if numbers:
        with wrap(twin_of(plain), RETRIEVING, exact=True, draft_weights=drafts) as handle:
            for number in numbers:
                yield same_tokens(plain, handle, ids, number, written) | common
    if names:
        cache, _ = prefill(plain, ids[:, :REAL])
        with wrap(twin_of(plain), exact=True, draft_weights=drafts) as handle:
            for rows in (SIZES[name] for name in names):
                if (found := bench_size(handle, cache, ids[:, :REAL], rows, runs=RUNS, steps=STEPS)) is not None:
                    yield found | common


def _print(results: Sequence[dict[str, Any]]) -> None:
    for one in results:
        if one["what"] == "tokens":
            print(
                f"prompt {one['number']}: {'the same' if one['same'] else 'NOT the same'} {one['written']} tokens; "
                f"{one['accepted']} of {one['drafted']} drafted ones were accepted"
            )
    columns = ("rows per layer", "dense, ms", "exact, ms", "times as fast", "drafted a pass", "accepted", "same")
    sizes = [one for one in results if one["what"] == "time"]
    rows = [
        [
            f"{one['rows']:,}", *(one[name] for name in ("dense_ms", "exact_ms", "speedup", "a_pass")),
            f"{one['acceptance']:.0%}", "yes" if one["same"] else "no",
        ]
        for one in sizes
    ]  # fmt: skip
    if sizes:
        print_table("SmolLM2-135M: one token", columns, rows)
    for one in sizes:
        print(f"{one['rows']:,}: {one['told']}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_exact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--sizes", nargs="*", choices=sorted(SIZES), default=["8K", "32K", "131K"], help="rows")
    options.add_argument(
        "--prompts", nargs="*", type=int, choices=range(PROMPTS), default=range(PROMPTS), metavar="N",
        help=f"which prompts to continue, of 0 to {PROMPTS - 1} (default all)",
    )  # fmt: skip
    options.add_argument("--tokens", type=int, default=WRITTEN, metavar="N", help="tokens of each (default 256)")
    options.add_argument("--weights", default="float32", choices=WEIGHTS, help="of all sides (default float32)")
    options.add_argument("--drafts", default="float32", choices=WEIGHTS, help="weights of drafts (default float32)")
    options.add_argument("--json", type=Path, default=RESULTS / "exact.json", metavar="OUT", help="the record")
    args = options.parse_args(argv)
    found, settings = [], {"tokens": args.tokens}
    for one in run(args.sizes, args.prompts, written=args.tokens, weights=args.weights, drafts=args.drafts):
        found.append(one)
        held = with_earlier(args.json, found, ("what", "rows", "weights", "drafts", "number"))
        write_json(args.json, "exact", settings, held)
    _print(found)
    write(args.json.parent)


if __name__ == "__main__":
    main()
