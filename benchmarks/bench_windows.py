"""A text longer than the model's own window: what is found in it, how it is read, what that takes.

Ten needles (``dbattn.text.haystack``) are hidden in a text, evenly spread. A needle counts as found where the model,
given question and the answer's first words, names all of its number greedily. Ways to read the text:

  one        in one piece; at 4,000 tokens this is the yardstick, beyond the model's window what positions never
             trained on do
  windows    by windows, as ``dbattn ingest`` reads long texts (``--window-tokens``, ``--overlap``); a question reads
             some of them (``--read``), and with ``--all`` once more all
  yarn       in one piece, rotary positions scaled by YaRN to the length, as transformers has it

``passages``: negative log-likelihood per token of 96 tokens that the text has said before (ten places), after the 32
before them, beside that without the text. Texts: ``--text FILE``, or prose of this machine. Seconds of ingest are the
process's on the clock and of the processor: on a shared machine only the latter tells.

  python -m benchmarks.bench_windows --ways one --tokens 4000
  python -m benchmarks.bench_windows --ways windows yarn --tokens 16000
  python -m benchmarks.bench_windows --ways windows --tokens 118000 --text book.txt --storage int8 --json windows.json
  python -m benchmarks.bench_windows --context book.dbattn      needles that dbattn ingest read along with a text

JSON: results[] = {way, tokens, windows, s, cpu_s, found, found_by_depth, nll, question_s, passages, passages_alone,
rows_read, ms_per_token, cpu_ms_per_token, bytes_per_token (of windows), all: {found, found_by_depth, nll, question_s}
or null}.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dbattn import RetrievalConfig
from dbattn.config import STORAGES
from dbattn.hf import Handle, load_model, wrap
from dbattn.snapshot import describe
from dbattn.text.haystack import hide, make_needles
from dbattn.text.prompt import CHUNK, OVERLAP, QUESTION_TOKENS, context_ids, question_ids, read_text, windows_for
from dbattn.windows import Windows

from . import readme
from ._common import SMOLLM2, console, print_table, progress, with_earlier, write_json
from ._model import with_yarn
from .capture import prose_ids

WAYS = ("one", "windows", "yarn")
NEEDLES = make_needles(10)
GIVEN, JUDGED = 32, 96
STEPS = 16


def text_ids(tokenizer: Any, tokens: int, file: Path | None) -> Tensor:
    """Token ids ``[1, n]`` of about ``tokens`` tokens with the needles hidden in them, after the instruction."""
    text = tokenizer.decode(prose_ids(tokenizer, tokens)) if file is None else read_text(file)
    return context_ids(hide(NEEDLES, text, tokens, tokenizer), tokenizer)


def read(handle: Handle, ids: Tensor, windows: Windows | None) -> tuple[DynamicCache, float, float]:
    """The cache after ``ids [1, n]``, and the seconds it took: on the clock, of the processor."""
    cache, began, cpu = handle.new_cache(), time.perf_counter(), time.process_time()
    parts = ids.shape[1] // CHUNK + 1 if windows is None else len(windows.of(ids.shape[1]))
    with progress(f"the model reads {ids.shape[1]:,} tokens", parts) as tick:
        while (held := cache.get_seq_length()) < ids.shape[1]:
            if windows is None:
                with handle.dense():
                    handle.model(ids[:, held : held + CHUNK], past_key_values=cache, logits_to_keep=1)
            else:
                handle.read_window(ids, cache, windows)
            tick()
    return cache, time.perf_counter() - began, time.process_time() - cpu


def needles_found(handle: Handle, tokenizer: Any, cache: DynamicCache) -> dict[str, Any]:
    """Which needles are named after a cache, and the mean negative log-likelihood per token of their numbers.

    ``question_s``: median seconds in which question and number are read, choosing windows included.
    """
    found, nll, seconds = [], [], []
    for needle in NEEDLES:
        question = question_ids(needle.question, tokenizer, needle.answer_start)
        number = tokenizer(f" {needle.number}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        began = time.perf_counter()
        logits = _judged(handle.model, cache, torch.cat([question, number], dim=1), number.shape[1])
        seconds.append(time.perf_counter() - began)
        found.append(bool((logits.argmax(dim=-1) == number[0]).all()))
        nll.append(_nll(logits, number[0]))
    figures = {"nll": statistics.fmean(nll), "question_s": statistics.median(seconds)}
    return {"found": sum(found), "found_by_depth": found, **figures}


def passages(handle: Handle, ids: Tensor, cache: DynamicCache | None) -> float:
    """Negative log-likelihood per token of passages of the text, said again after a cache, or after nothing."""
    nll = []
    for part in range(10):
        first = int((part + 0.5) / 10 * (ids.shape[1] - GIVEN - JUDGED))
        said = ids[:, first : first + GIVEN + JUDGED]
        where = DynamicCache(config=handle.model.config) if cache is None else cache
        nll.append(_nll(_judged(handle.model, where, said, JUDGED), said[0, GIVEN:]))
    return statistics.fmean(nll)


def _judged(model: Any, cache: DynamicCache, ids: Tensor, newest: int) -> Tensor:
    """Logits ``[newest, V]`` that foretell the newest of ``ids``; the cache is left as it was."""
    rows = cache.get_seq_length()
    logits: Tensor = model(ids, past_key_values=cache, logits_to_keep=newest + 1).logits[0, :-1].float()
    cache.crop(rows - cache.get_seq_length())
    return logits


def _nll(logits: Tensor, ids: Tensor) -> float:
    return float(-logits.log_softmax(dim=-1).gather(1, ids[:, None]).mean())


def ms_per_token(handle: Handle, tokenizer: Any, cache: DynamicCache) -> tuple[float, float]:
    """Medians of some decode steps after a question: on the clock, and of the processor, all threads together."""
    rows, token, times, cpu_times = cache.get_seq_length(), torch.tensor([[1]]), [], []
    handle.model(question_ids(NEEDLES[0].question, tokenizer), past_key_values=cache, logits_to_keep=1)
    for _ in range(STEPS):
        began, cpu = time.perf_counter(), time.process_time()
        token = handle.model(token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        times.append(1e3 * (time.perf_counter() - began))
        cpu_times.append(1e3 * (time.process_time() - cpu))
    cache.crop(rows - cache.get_seq_length())
    return statistics.median(times[1:]), statistics.median(cpu_times[1:])


def judge(handle: Handle, tokenizer: Any, cache: DynamicCache, ids: Tensor, *, all_too: bool) -> dict[str, Any]:
    """What is found after a cache of ``ids [1, n]``; ``all_too``: once more in all windows."""
    handle.restart_report()
    result = needles_found(handle, tokenizer, cache)
    result["rows_read"] = handle.report().summary.rows_read
    result["ms_per_token"], result["cpu_ms_per_token"] = ms_per_token(handle, tokenizer, cache)
    result["passages"] = passages(handle, ids, cache)
    result["all"] = None
    with handle.dense():
        result["passages_alone"] = passages(handle, ids, None)
        if all_too:
            result["all"] = needles_found(handle, tokenizer, cache)
    return result


def bench(way: str, path: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """One entry of ``results``."""
    with console.status("loading the model"):
        model, tokenizer = load_model(path)
    ids = text_ids(tokenizer, args.tokens, args.text)
    windows = None
    if way == "windows":
        windows = replace(windows_for(model, tokenizer, args.window_tokens), overlap=args.overlap)
    if way == "yarn":
        model = with_yarn(path, ids.shape[1] + QUESTION_TOKENS)
    by_windows = (
        {"storage": args.storage or "int8", "n_windows": args.read}
        if way == "windows"
        else {"dense_below": ids.numel() + QUESTION_TOKENS}
    )
    config = RetrievalConfig(max_queries=QUESTION_TOKENS, audit_rate=0.0, **by_windows)
    with torch.inference_mode(), wrap(model, config) as handle:
        cache, s, cpu_s = read(handle, ids, windows)
        result = {"way": way, "tokens": ids.shape[1], "windows": windows and len(windows.of(ids.shape[1]))}
        result |= {
            "s": s,
            "cpu_s": cpu_s,
            **judge(handle, tokenizer, cache, ids, all_too=args.all and way == "windows"),
        }
        if way == "windows":
            with tempfile.TemporaryDirectory() as folder:
                handle.save(Path(folder) / "context", cache)
                result["bytes_per_token"] = describe(Path(folder) / "context").nbytes / ids.shape[1]
    return result


def bench_context(context: Path, path: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """The same of a context that was ingested; of its needles, those that the text has are looked for."""
    info = describe(context)
    with console.status("loading the model"):
        model, tokenizer = load_model(path)
    config = replace(info.config, max_queries=QUESTION_TOKENS, audit_rate=0.0, n_windows=args.read)
    with torch.inference_mode(), wrap(model, config, context=context) as handle:
        cache, ids = handle.new_cache(), handle.context
        assert ids is not None
        windows = None if info.windows is None else len(info.windows.of(info.windows.rows))
        result = {"way": "windows", "tokens": ids.shape[1], "windows": windows, "s": None, "cpu_s": None}
        result |= judge(handle, tokenizer, cache, ids, all_too=args.all)
    return result | {"bytes_per_token": info.nbytes / ids.shape[1]}


def _print(results: Sequence[dict[str, Any]]) -> None:
    columns = (
        "way", "tokens", "windows", "s", "CPU s", "found", "by depth", "nll", "question s", "passages", "alone",
        "rows read", "ms/token", "CPU", "bytes/token", "all: found", "nll",
    )  # fmt: skip
    rows = []
    for r in results:
        whole = r["all"] or {}
        depths = "".join("x" if found else "." for found in r["found_by_depth"])
        rows.append([
            r["way"], r["tokens"], r["windows"], r["s"], r["cpu_s"], r["found"], depths, r["nll"], r["question_s"],
            r["passages"], r["passages_alone"], r["rows_read"], r["ms_per_token"], r["cpu_ms_per_token"],
            r.get("bytes_per_token"), whole.get("found"), whole.get("nll"),
        ])  # fmt: skip
    print_table("needles in a long text, found of 10", columns, rows, width=190)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ways", nargs="+", default=["windows"], choices=WAYS)
    options.add_argument("--tokens", type=int, default=16000, help="length of the text (default 16000)")
    options.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose of this machine)")
    options.add_argument("--context", type=Path, metavar="FOLDER", help="an ingested text with needles, in their place")
    options.add_argument("--model", type=Path, metavar="DIR_OR_GGUF", help="default: SmolLM2-135M-Instruct")
    options.add_argument("--name", help="what the record calls the model (default: the file's name)")
    options.add_argument("--window-tokens", type=int, metavar="N", help="new tokens of a window (default: as ingest)")
    options.add_argument("--overlap", type=int, default=OVERLAP, metavar="N", help=f"default {OVERLAP}")
    options.add_argument("--storage", choices=STORAGES, help="keep rows of windows as this type (default int8)")
    options.add_argument(
        "--read", type=int, default=RetrievalConfig().n_windows, metavar="N", help="windows that a question reads"
    )
    options.add_argument("--all", action="store_true", help="ask once more with all windows read")
    options.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")
    args = options.parse_args(argv)
    if args.context is not None:
        results = [bench_context(args.context, args.model, args)]
    else:
        results = [bench(way, args.model, args) for way in args.ways]
    _print(results)
    name = args.name or (SMOLLM2 if args.model is None else args.model.stem)
    results = [{"model": name, **result} for result in results]
    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.json, "windows", settings, with_earlier(args.json, results, ("model", "way", "tokens")))
    if args.json is not None:
        readme.write(args.json.parent)


if __name__ == "__main__":
    main()
