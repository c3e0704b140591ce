"""What reading a prompt through lists costs and loses: one layer at growing length, and the whole model at 8K.

One layer: all queries, keys and values of layer 8 of SmolLM2-135M over 8K of prose; beyond, rows are those of windows
of prose, as in the other benchmarks, asked by the queries of the 8K again and again and, at the end, by the 512 that
belong there: errors are theirs. A store takes rows in and is asked in calls of 2,048 positions with prefill="lists",
aiming at errors below 0.05; torch's causal SDPA answers all at once. From 65,536 rows on SDPA is timed on 16 evenly
spread blocks of 512 positions, which stand for all. Sealing is what lists take while the prompt is read and to become
what a decode call finds. With --threads 1 seconds are of the processor, which other load leaves nearly alone; else they
are the clock's.

The whole model reads a text but for its last 256 tokens in one call, unwrapped and wrapped (prefill="lists") in turn,
--runs times, of which seconds are medians, and then those, which both read densely from the rows that reading left:
their logits are compared. Beyond the model's range its rotary positions are scaled by YaRN. All of it is float32, but
for rows of lists and summaries, which are multiplied as bfloat16 where a processor does that faster.

Needles: two texts of 8K with ten needles each are read both ways, and both are asked densely; a needle is found where
the model names all of its number.

Parts and sizes may be measured one at a time: with --json, what the file has of others stays.

  python -m benchmarks.bench_prefill --json prefill.json
  python -m benchmarks.bench_prefill --parts layer --sizes 8K --threads 1
  python -m benchmarks.bench_prefill --parts model --lengths 16K --model qwen.gguf --name Qwen2.5-Coder-0.5B --text code

JSON: results.threads; results.call, positions of a call of one layer; results.chunk, of those of a wrapped model;
results.sizes[] = {rows, s, sealing_s, sealing_share, sdpa_s, speedup, rows_read, error, p95, quiet}; results.exponent,
of s in rows (None for one size); results.models[] = {model, text, threads, tokens, runs, dense_s, s, settle_s, speedup,
sealing_share, positions_by_lists, rows_read, error, logits_l2, kl, top1}; results.needles[] = {model, tokens, asked,
dense, lists, both}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from dbattn import AttentionDB, RetrievalConfig, dense_attention
from dbattn.hf import load_model, wrap
from dbattn.hf.chunks import CHUNK
from dbattn.index.segmented import SegmentedIndex
from dbattn.metrics import relative_error
from dbattn.text.haystack import hide, make_needles
from dbattn.text.prompt import context_ids, question_ids

from . import readme
from ._common import SMOLLM2, QuietGuard, console, fit_exponent, parser, print_table, progress, write_json
from ._model import compare_logits, twin_of, with_yarn
from .bench_fidelity import TEXTS
from .capture import capture_window, load_rows, prose_ids

PARTS = ("layer", "model", "needles")
LAYER, CONTEXT, HELD_BACK = 8, 8192, 256
KEYS = ("model", "text", "tokens")
# Positions of a call: the end of a long one, whose errors are those that are measured, would read more than others.
CALL = 2048
# Blocks aim at half of it. What they audit asks rows it does not belong to and errs more than what is measured, which
# has to stay below 0.05.
LAYER_TARGET = 0.22
# Tokens that are read before anything is timed: so many are read through lists, whose code is compiled then.
COMPILED = 2560
# Texts with needles, each with ten.
TEXTS_WITH_NEEDLES = 2
KEPT_QUERIES = 512
SIZES = {"4K": 4096, "8K": 8192, "16K": 16384, "32K": 32768, "65K": 65536, "131K": 131072}
# SDPA over more rows is timed in part.
WHOLE, BLOCKS, BLOCK = 32768, 16, 512
AUDITED = 96


def _now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextmanager
def _sealing_timed() -> Iterator[list[float]]:
    """Adds up the seconds that all segmented indexes spend sealing, in a list of one number."""
    seal, spent = SegmentedIndex._seal, [0.0]

    def timed(self: SegmentedIndex, *args: Any, **kwargs: Any) -> None:
        began = _now()
        seal(self, *args, **kwargs)
        spent[0] += _now() - began

    SegmentedIndex._seal = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        SegmentedIndex._seal = seal  # type: ignore[method-assign]


def bench_layer(rows: Sequence[Tensor], repeats: int) -> dict[str, Any]:
    """One entry of ``results.sizes``; rows are queries ``[1, Hq, T, D]``, keys and values ``[1, Hkv, T, D]``."""
    query, keys, values = rows
    guard = QuietGuard()
    took, sealing, dense, quiet = [], [], [], []
    for _ in range(repeats):
        guard.wait(2.0)
        dense.append(sdpa_seconds(query, keys, values))
        db = AttentionDB(
            keys.shape[1], keys.shape[3], config=RetrievalConfig(prefill="lists", target_error=LAYER_TARGET)
        )
        with _sealing_timed() as spent:
            parts: list[Any] = []
            began = _now()
            db.reserve(keys.shape[2])  # as a wrapped model's cache does, which knows where its prompt ends
            for first in range(0, keys.shape[2], CALL):
                part = slice(first, first + CALL)
                db.store.append(keys[:, :, part], values[:, :, part])
                db.store.set_start(db.store.start)
                parts.append(db.attend(query[:, :, part]))
                db.sync(reading=True)
            db.sync()
            took.append(_now() - began)
        out = torch.cat(parts, dim=2)
        sealing.append(spent[0])
        quiet.append(guard.was_quiet())
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


def plain_rows(model: Any, cache: DynamicCache) -> DynamicCache:
    """The rows of a wrapped model's cache as an unwrapped one's."""
    plain = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        plain.update(layer.keys, layer.values, i)
    return plain


def bench_model(model: Any, ids: Tensor, runs: int) -> dict[str, Any]:
    """An entry of ``results.models``; ids ``[1, n]``, the last 256 held back."""
    twin, prompt, rest = twin_of(model), ids[:, :-HELD_BACK], ids[:, -HELD_BACK:]
    dense_s, lists_s, settle_s, sealing_s = [], [], [], []
    with wrap(twin, RetrievalConfig(prefill="lists")) as handle, _sealing_timed() as spent:
        read(twin, prompt[:, :COMPILED])
        for run in range(1, runs + 1):
            with console.status(f"reading {prompt.shape[1]:,} tokens unwrapped, {run} of {runs}"):
                plain, seconds = read(model, prompt)
                dense_s.append(seconds)
            dense = held_back_logits(model, plain, rest)
            del plain
            handle.restart_report()
            spent[0] = 0.0
            with console.status(f"reading {prompt.shape[1]:,} tokens through lists, {run} of {runs}"):
                cache, seconds = read(twin, prompt)
                lists_s.append(seconds)
                began = _now()
                for layer in cache.layers:
                    layer.db.sync()
                settle_s.append(_now() - began)
            sealing_s.append(spent[0])
        prompts = [layer.db.stats.prompt for layer in cache.layers]
        plain = plain_rows(model, cache)
    seconds, took, settle, sealing = (statistics.median(times) for times in (dense_s, lists_s, settle_s, sealing_s))
    positions, errors = sum(each.by_lists for each in prompts), [e for each in prompts for e in each.errors]
    return {
        "tokens": prompt.shape[1], "runs": runs, "dense_s": seconds, "s": took, "settle_s": settle,
        "speedup": seconds / (took + settle), "sealing_share": sealing / (took + settle),
        "positions_by_lists": positions / len(prompts),
        "rows_read": sum(each.rows_read for each in prompts) / max(1, positions),
        "error": statistics.fmean(errors) if errors else None,
        **compare_logits(dense, held_back_logits(model, plain, rest)),
    }  # fmt: skip


def bench_needles(model: Any, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """An entry of ``results.needles``."""
    twin, found = twin_of(model), []
    haystack = tokenizer.decode(prose_ids(tokenizer, 2 * tokens))
    for seed in range(TEXTS_WITH_NEEDLES):
        needles = make_needles(10, seed)
        text = haystack[seed * len(haystack) // TEXTS_WITH_NEEDLES :]
        ids = context_ids(hide(needles, text, tokens - HELD_BACK, tokenizer), tokenizer)
        with wrap(twin, RetrievalConfig(prefill="lists")), console.status("reading a text with needles"):
            ours = plain_rows(model, read(twin, ids)[0])
        theirs, _ = read(model, ids)
        for needle in needles:
            question = question_ids(needle.question, tokenizer, needle.answer_start)
            number = tokenizer(f" {needle.number}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            found.append([_names(model, cache, question, number) for cache in (theirs, ours)])
    dense, lists = zip(*found, strict=True)
    both = sum(all(each) for each in found)
    return {"tokens": tokens, "asked": len(found), "dense": sum(dense), "lists": sum(lists), "both": both}


def _names(model: Any, cache: DynamicCache, question: Tensor, number: Tensor) -> bool:
    """Whether the model, asked a question after a cache, which stays as it was, names a number greedily."""
    rows = cache.get_seq_length()
    logits = held_back_logits(model, cache, torch.cat([question, number], dim=1))
    cache.crop(rows - cache.get_seq_length())
    return bool((logits[-number.shape[1] - 1 : -1].argmax(dim=-1) == number[0]).all())


def held_back_logits(model: Any, cache: DynamicCache, ids: Tensor) -> Tensor:
    """Logits ``[n, V]`` of ids ``[1, n]`` read densely after a cache."""
    with torch.inference_mode():
        logits: Tensor = model(ids, past_key_values=cache).logits[0].float()
    return logits


def _print(results: dict[str, Any]) -> None:
    columns = ("rows", "lists s", "SDPA s", "x SDPA", "sealing", "rows read", "error", "p95", "quiet")
    if results["sizes"]:
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
    for m in results["models"]:
        print(
            f"{m['model']}, {m['tokens']:,} tokens of {m['text']}: {m['s']:.1f} s and {m['settle_s']:.1f} s to settle "
            f"for {m['dense_s']:.1f} s unwrapped, {m['speedup']:.2f}x, sealing {m['sealing_share']:.1%}; logits "
            f"afterwards relative L2 {m['logits_l2']:.4f}, KL {m['kl']:.5f}, top-1 agreement {m['top1']:.3f}"
        )
    for n in results["needles"]:
        print(
            f"{n['model']}, needles in {n['tokens']:,} tokens: {n['both']} of the {n['dense']} that are found after "
            f"dense reading, {n['lists']} of {n['asked']} in all"
        )


def merged(earlier: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """Results of a run in place of earlier ones of the same size, model, text and length; others stay."""
    results = dict(found)
    for name, same in (("sizes", ("rows",)), ("models", KEYS), ("needles", ("model", "tokens"))):

        def key(one: dict[str, Any], same: tuple[str, ...] = same) -> tuple[Any, ...]:
            return tuple(one[name] for name in same)

        new = {key(one) for one in found[name]}
        kept = [] if earlier is None else [one for one in earlier[name] if key(one) not in new]
        results[name] = sorted([*kept, *found[name]], key=key)
    if earlier is not None and not found["sizes"]:
        results["threads"] = earlier["threads"]
    sizes = results["sizes"]
    fitted = len(sizes) > 1
    results["exponent"] = fit_exponent([s["rows"] for s in sizes], [s["s"] for s in sizes]) if fitted else None
    return results


def bench_sizes(names: Sequence[str], *, quick: bool) -> list[dict[str, Any]]:
    """``results.sizes``."""
    with console.status("capturing a layer"):
        model, tokenizer = load_model()
        ids = prose_ids(tokenizer, CONTEXT)[None]
        rows = [capture_window(model, ids, [LAYER])[f"{LAYER}.{name}"] for name in ("query", "key", "value")]
    bench_layer([part[:, :, :3072] for part in rows], 1)  # compiles
    sizes = []
    with progress("one layer", len(names)) as tick:
        for length in (SIZES[name] for name in names):
            sizes.append(bench_layer(rows_of(length, rows), 1 if quick or length >= WHOLE else 3))
            tick()
    return sizes


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The parts asked for; prints and returns the results."""
    results: dict[str, Any] = {
        "threads": torch.get_num_threads(), "call": CALL, "chunk": CHUNK, "sizes": [], "models": [], "needles": [],
    }  # fmt: skip
    with torch.inference_mode():
        if "layer" in args.parts:
            results["sizes"] = bench_sizes(args.sizes, quick=args.quick)
        if {"model", "needles"} & set(args.parts):
            with console.status("loading the model"):
                model, tokenizer = load_model(args.model)
        if "model" in args.parts:
            for length in [4096] if args.quick else [SIZES[name] for name in args.lengths]:
                within = length <= model.config.max_position_embeddings
                reads = model if within else with_yarn(args.model, length)
                found = bench_model(reads, TEXTS[args.text](tokenizer, length)[None], 1 if args.quick else args.runs)
                entry = {"model": args.name, "text": args.text, "threads": torch.get_num_threads()}
                results["models"].append(entry | found)
        if "needles" in args.parts:
            found = bench_needles(model, tokenizer, 4096 if args.quick else CONTEXT)
            results["needles"].append({"model": args.name, **found})
    earlier = None
    if args.json is not None and args.json.is_file():
        earlier = json.loads(args.json.read_text(encoding="utf-8"))["results"]
    results = merged(earlier, results)
    _print(results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options: argparse.ArgumentParser = parser(__doc__, ["8K", "16K", "32K", "131K"], list(SIZES))
    options.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options.add_argument(
        "--lengths", nargs="+", default=["8K", "16K"], choices=list(SIZES), metavar="T",
        help="tokens that the whole model reads (default 8K 16K; 32K takes ten minutes)",
    )  # fmt: skip
    options.add_argument("--model", type=Path, metavar="DIR_OR_GGUF", help="default: SmolLM2-135M-Instruct")
    options.add_argument("--name", default=SMOLLM2, help="what the record calls the model")
    options.add_argument("--text", default="prose", choices=list(TEXTS))
    options.add_argument("--runs", type=int, default=3, help="how often the whole model reads, each way (default 3)")
    options.add_argument("--threads", type=int, help="of torch and Numba (default: as they are)")
    args = options.parse_args(argv)
    if args.threads is not None:
        import numba

        torch.set_num_threads(args.threads)
        numba.set_num_threads(args.threads)
    results = run(args)
    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.json, "prefill", settings, results)
    if args.json is not None:
        readme.write(args.json.parent)


if __name__ == "__main__":
    main()
