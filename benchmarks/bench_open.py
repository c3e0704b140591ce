"""What opening a context takes, and each cache that begins with it: time and memory.

The context has ``--rows`` rows of random numbers, the same in every layer: sizes and times are those of a text that was
read. By default it is that of a tiny model; ``--model`` takes another's shape and weights, ``--context`` a context that
``dbattn ingest`` made.

Time on the clock. Memory is the process's own that no file holds (Anonymous in /proc/self/smaps_rollup, so Linux only):
pages that a cache shared until it wrote to them are in it. Beside it, what the pages hold that caches share.

  python -m benchmarks.bench_open
  python -m benchmarks.bench_open --rows 120000 --model DIR_OR_GGUF
  python -m benchmarks.bench_open --context book.dbattn --model DIR_OR_GGUF --json open.json

JSON: results[] = {step, ms, own_mb, shared_mb}, in this order: open, first cache, hundredth cache (the median of
the last ten), its first token, its next tokens (the median of eight).
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dbattn import AttentionDB, RetrievalConfig
from dbattn.config import STORAGES
from dbattn.hf import load_model, wrap
from dbattn.hf.decoder import find_decoder
from dbattn.hf.fingerprint import fingerprint
from dbattn.snapshot import describe, save

from . import readme
from ._common import console, print_table, write_json

CACHES, LAST, TOKENS = 100, 10, 8


def model_of(path: Path | None) -> Any:
    """A model to open the context of: the tiny one where there is no path."""
    if path is not None:
        return load_model(path)[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_context(folder: Path, path: Path | None, rows: int, storage: str | None) -> None:
    """Save a context of random rows."""
    model = model_of(path)
    # A budget by size: audits of random rows would ask for all of them.
    config = RetrievalConfig(storage=storage, audit_rate=0.0, k=1024, dense_below=0)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    db = AttentionDB(text.num_key_value_heads, dim, config=config)
    keys, values = (torch.randn(1, text.num_key_value_heads, rows, dim) for _ in range(2))
    db.insert(keys, values, torch.randn(1, heads, rows, dim))
    layers = [db.fork() for _ in range(text.num_hidden_layers)]
    save(
        folder,
        [(layer.store, layer.index) for layer in layers],
        config,
        model=fingerprint(find_decoder(model)),
        token_ids=torch.randint(2, 126, (1, rows)),
    )


def own_mb() -> float:
    """Memory of the process that no file holds."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def shared_mb() -> float:
    """Memory that the pages of forks hold."""
    sizes = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(fd).startswith("/memfd:dbattn"):
                sizes.append(512 * fd.stat().st_blocks)
        except FileNotFoundError:
            continue  # the folder's own
    return sum(sizes) / (1 << 20)


def bench(context: Path, path: Path | None) -> list[dict[str, Any]]:
    """``results``."""
    results: list[dict[str, Any]] = []

    def measured(step: str, run: Callable[[], Any], *, times: int = 1, of_last: int = 1) -> Any:
        """Run a step ``times`` times; the time is the median of the last ones, the memory is each's."""
        own, shared, ms, found = own_mb(), shared_mb(), [], []
        for _ in range(times):
            began = time.perf_counter()
            found.append(run())
            ms.append(1e3 * (time.perf_counter() - began))
        results.append(
            {
                "step": step,
                "ms": statistics.median(ms[-of_last:]),
                "own_mb": (own_mb() - own) / times,
                "shared_mb": shared_mb() - shared,
            }
        )
        return found

    with console.status("loading the model"):
        model = model_of(path)
    token = torch.tensor([[5]])
    with torch.inference_mode():
        model(token)
        (handle,) = measured("open", lambda: wrap(model, context=context))
        with handle:
            first = measured("first cache", handle.new_cache)
            # What is compiled or loaded once is not what a cache takes.
            model(token, past_key_values=first[0])
            caches = measured("hundredth cache", handle.new_cache, times=CACHES, of_last=LAST)
            measured("its first token", lambda: model(token, past_key_values=caches[-1]))

            measured("its next tokens", lambda: model(token, past_key_values=caches[-1]), times=TOKENS, of_last=TOKENS)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=16384, help="rows of the context that is made (default 16384)")
    options.add_argument("--context", type=Path, metavar="FOLDER", help="one that dbattn ingest made, in its place")
    options.add_argument("--model", type=Path, metavar="DIR_OR_GGUF", help="default: a tiny one with random weights")
    options.add_argument("--storage", choices=STORAGES, help="keep rows as this type (default: as they come)")
    options.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        context = args.context
        if context is None:
            context = Path(folder) / "context"
            # In a process of its own: what it leaves behind in memory is not measured.
            making = (context, args.model, args.rows, args.storage)
            maker = multiprocessing.get_context("spawn").Process(target=make_context, args=making)
            with console.status("making the context"):
                maker.start()
                maker.join()
            if maker.exitcode:
                raise SystemExit("the context could not be made")
        info = describe(context)
        results = bench(context, args.model)
    console.print(f"{info.rows:,} rows, {len(info.layers)} layers, {info.nbytes / (1 << 20):,.0f} MB on disk")
    columns = ("step", "ms", "own MB", "shared MB")
    print_table("a context and its caches", columns, [list(result.values()) for result in results])
    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.json, "open", {**settings, "rows": info.rows, "layers": len(info.layers)}, results)
    if args.json is not None:
        readme.write(args.json.parent)


if __name__ == "__main__":
    main()
