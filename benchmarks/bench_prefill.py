"""What reading a prompt through lists costs and loses: one layer at growing length, and the whole model at 8K.

One layer: all queries, keys and values of layer 8 of SmolLM2-135M over 8K of prose; beyond, rows are those of windows
of prose, as in the other benchmarks, asked by the queries of the 8K again and again and, at the end, by the 512 that
belong there: errors are theirs. A store takes in all rows and is asked by all queries with prefill="lists"; torch's
causal SDPA answers the same. From 65,536 rows on SDPA is timed on 16 evenly spread blocks of 512 positions, which stand
for all. Sealing is what lists take while the prompt is read and to become what a decode call finds. With --threads 1
seconds are of the processor, which other load leaves nearly alone; else they are the clock's.

The whole model reads 7,936 tokens of prose at once, unwrapped and wrapped (prefill="auto" and "lists"), and then 256
more, which both read densely: their logits are compared.

  python -m benchmarks.bench_prefill --sizes 8K 16K 32K 131K --json prefill.json
  python -m benchmarks.bench_prefill --sizes 8K --threads 1 --layer-only

JSON: results.threads; results.sizes[] = {rows, s, sealing_s, sealing_share, sdpa_s, speedup, rows_read, error, p95,
quiet}; results.exponent, of s in rows (None for one size); results.model (None with --layer-only) = {tokens, s,
sides: {auto, lists: {s, settle_s, speedup, positions_by_lists, rows_read, layers_given_up, logits_l2, kl, top1}}}.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from dbattn import AttentionDB, RetrievalConfig, dense_attention
from dbattn.hf import load_model, wrap
from dbattn.index.segmented import SegmentedIndex
from dbattn.metrics import relative_error

from ._common import QuietGuard, console, fit_exponent, parser, print_table, progress, write_json
from ._model import compare_logits, twin_of
from .capture import capture_window, load_rows, prose_ids

LAYER, CONTEXT, HELD_BACK = 8, 8192, 256
KEPT_QUERIES = 512
SIZES = {"4K": 4096, "8K": 8192, "16K": 16384, "32K": 32768, "65K": 65536, "131K": 131072}
# SDPA over more rows is timed in part.
WHOLE, BLOCKS, BLOCK = 32768, 16, 512
AUDITED = 96


def _now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class _TimedIndex(SegmentedIndex):
    """A segmented index that adds up the seconds it spends sealing."""

    sealing = 0.0

    def _seal(self, *args: Any, **kwargs: Any) -> None:
        began = _now()
        super()._seal(*args, **kwargs)
        self.sealing += _now() - began


def bench_layer(rows: Sequence[Tensor], repeats: int) -> dict[str, Any]:
    """One entry of ``results.sizes``; rows are queries ``[1, Hq, T, D]``, keys and values ``[1, Hkv, T, D]``."""
    query, keys, values = rows
    guard = QuietGuard()
    took, sealing, dense, quiet = [], [], [], []
    for _ in range(repeats):
        guard.wait(2.0)
        dense.append(sdpa_seconds(query, keys, values))
        db = AttentionDB(keys.shape[1], keys.shape[3], config=RetrievalConfig(prefill="lists"))
        index = _TimedIndex(db.config.window)
        db.index = index
        db.store.append(keys, values)
        db.store.set_start(db.store.start)
        began = _now()
        out = db.attend(query)
        db.sync()
        took.append(_now() - began)
        sealing.append(index.sealing)
        quiet.append(guard.was_quiet())
    assert isinstance(out, Tensor)
    error = errors_of(out, query, keys, values)
    s, sealing_s, sdpa_s = (statistics.median(times) for times in (took, sealing, dense))
    prompt = db.stats.prompt
    return {
        "rows": keys.shape[2], "s": s, "sealing_s": sealing_s, "sealing_share": sealing_s / s, "sdpa_s": sdpa_s,
        "speedup": sdpa_s / s, "rows_read": prompt.rows_read / max(1, prompt.by_lists), "error": float(error.mean()),
        "p95": float(error.flatten().kthvalue(int(0.95 * error.numel())).values),
        "quiet": statistics.fmean(map(float, quiet)),
    }  # fmt: skip


def sdpa_seconds(query: Tensor, keys: Tensor, values: Tensor) -> float:
    """Seconds of torch's causal attention; of many rows, of BLOCKS blocks times what they stand for."""
    rows = keys.shape[2]
    began = _now()
    if rows <= WHOLE:
        F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        return _now() - began
    group = query.shape[1] // keys.shape[1]
    for i in range(BLOCKS):
        stop = (2 * i + 1) * rows // (2 * BLOCKS)
        asked = query[:, :, stop - BLOCK : stop].reshape(1, keys.shape[1], group * BLOCK, -1)
        F.scaled_dot_product_attention(asked, keys[:, :, :stop], values[:, :, :stop])
    return (_now() - began) * rows / (BLOCKS * BLOCK)


def errors_of(out: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Relative errors ``[1, Hq, AUDITED]`` at positions evenly spread over those whose queries belong there."""
    found, rows = [], keys.shape[2]
    for position in torch.linspace(1 if rows <= CONTEXT else rows - KEPT_QUERIES, rows - 1, AUDITED).long().tolist():
        stop = position + 1
        exact = dense_attention(query[:, :, position:stop], keys[:, :, :stop], values[:, :, :stop])
        assert isinstance(exact, Tensor)
        found.append(relative_error(out[:, :, position:stop], exact))
    return torch.cat(found, dim=2)


def rows_of(length: int, captured: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values of ``length`` positions, from those captured of CONTEXT and, beyond, of windows."""
    if length <= CONTEXT:
        return [part[:, :, :length] for part in captured]
    windows = load_rows(length, LAYER)
    query = captured[0].repeat(1, 1, -(-length // CONTEXT), 1)[:, :, : len(windows)]
    query[:, :, -KEPT_QUERIES:] = windows.query[:, :, -KEPT_QUERIES:]
    return [query, windows.keys, windows.values]


def read(model: Any, ids: Tensor) -> tuple[DynamicCache, float]:
    """The cache after the model has read ``ids [1, n]`` in one call, and the seconds."""
    cache = DynamicCache(config=model.config)
    began = _now()
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache, _now() - began


def bench_model(model: Any, ids: Tensor) -> dict[str, Any]:
    """``results.model``: ids ``[1, n]``, the last 256 held back."""
    twin, prompt, rest = twin_of(model), ids[:, :-HELD_BACK], ids[:, -HELD_BACK:]
    cache, seconds = read(model, prompt)
    dense = held_back_logits(model, cache, rest)
    del cache
    sides: dict[str, Any] = {}
    for prefill in ("auto", "lists"):
        with wrap(twin, RetrievalConfig(prefill=prefill)) as handle:
            read(twin, prompt[:, :3072])  # compiles
            handle.restart_report()
            cache, took = read(twin, prompt)
            began = _now()
            for layer in cache.layers:
                layer.db.sync()
            settle = _now() - began
            layers = handle.report().layers
            plain = DynamicCache(config=model.config)
            for i, layer in enumerate(cache.layers):
                plain.update(layer.keys, layer.values, i)
        positions = sum(layer.by_lists for layer in layers)
        sides[prefill] = {
            "s": took, "settle_s": settle, "speedup": seconds / (took + settle),
            "positions_by_lists": positions / len(layers),
            "rows_read": sum(layer.by_lists * layer.by_lists_rows for layer in layers) / max(1, positions),
            "layers_given_up": sum(any("too far off" in reason for reason in layer.prompts) for layer in layers),
            **compare_logits(dense, held_back_logits(model, plain, rest)),
        }  # fmt: skip
    return {"tokens": prompt.shape[1], "s": seconds, "sides": sides}


def held_back_logits(model: Any, cache: DynamicCache, ids: Tensor) -> Tensor:
    """Logits ``[n, V]`` of ids ``[1, n]`` read densely after a cache."""
    with torch.inference_mode():
        logits: Tensor = model(ids, past_key_values=cache).logits[0].float()
    return logits


def _print(results: dict[str, Any]) -> None:
    columns = ("rows", "lists s", "SDPA s", "x SDPA", "sealing", "rows read", "error", "p95", "quiet")
    print_table(
        f"reading a prompt in one layer, {results['threads']} threads",
        columns,
        [
            [
                f"{s['rows']:,}", s["s"], s["sdpa_s"], s["speedup"], f"{s['sealing_share']:.1%}", s["rows_read"],
                s["error"], s["p95"], f"{s['quiet']:.0%}",
            ]
            for s in results["sizes"]
        ],
    )  # fmt: skip
    if results["exponent"] is not None:
        print(f"time grows as rows to the power of {results['exponent']:.2f}")
    if results["model"] is not None:
        for name, side in results["model"]["sides"].items():
            print(
                f"whole model, prefill={name!r}: {side['s']:.1f} s and {side['settle_s']:.1f} s to settle for "
                f"{results['model']['s']:.1f} s unwrapped, {side['speedup']:.2f}x; logits afterwards relative L2 "
                f"{side['logits_l2']:.4f}, KL {side['kl']:.5f}, top-1 agreement {side['top1']:.3f}; "
                f"{side['layers_given_up']} layers given up"
            )


def run(
    names: Sequence[str], *, quick: bool = False, layer_only: bool = False, repeats: int | None = None
) -> dict[str, Any]:
    """All sizes, then the model; prints and returns the results."""
    with console.status("loading the model"):
        model, tokenizer = load_model()
        ids = prose_ids(tokenizer, CONTEXT)[None]
    with console.status("capturing a layer"):
        rows = [capture_window(model, ids, [LAYER])[f"{LAYER}.{name}"] for name in ("query", "key", "value")]
    with torch.inference_mode():
        bench_layer([part[:, :, :3072] for part in rows], 1)  # compiles
        sizes = []
        with progress("one layer", len(names)) as tick:
            for length in (SIZES[name] for name in names):
                default = 1 if quick or length > WHOLE else 3
                sizes.append(bench_layer(rows_of(length, rows), repeats or default))
                tick()
    fitted = len(sizes) > 1
    results = {
        "threads": torch.get_num_threads(),
        "sizes": sizes,
        "exponent": fit_exponent([s["rows"] for s in sizes], [s["s"] for s in sizes]) if fitted else None,
        "model": None if layer_only else bench_model(model, ids[:, :4096] if quick else ids),
    }
    _print(results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options: argparse.ArgumentParser = parser(__doc__, ["8K", "16K", "32K", "131K"], list(SIZES))
    options.add_argument("--threads", type=int, help="of torch and Numba (default: as they are)")
    options.add_argument("--layer-only", action="store_true", help="leave the whole model out")
    args = options.parse_args(argv)
    if args.threads is not None:
        import numba

        torch.set_num_threads(args.threads)
        numba.set_num_threads(args.threads)
    results = run(args.sizes, quick=args.quick, layer_only=args.layer_only)
    settings = {"sizes": args.sizes, "quick": args.quick, "threads": args.threads, "layer_only": args.layer_only}
    write_json(args.json, "prefill", settings, results)


if __name__ == "__main__":
    main()
