"""Logits of a whole model that retrieves in all layers, against the same model unwrapped, on prose and on code.

A text is read densely, then tokens of it are fed one by one, whatever the model would say. Means over those tokens.

  python -m benchmarks.bench_fidelity                                      SmolLM2, 128 tokens of prose after 7,900
  python -m benchmarks.bench_fidelity --model qwen.gguf --name Qwen2.5-Coder-0.5B --text code

JSON: results[] = {model, text, context, tokens, retrieving, layers, logits_l2, kl, top1}; retrieving counts layers. A
run adds its line to the record, in place of the one of the same model and text.
"""

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dbattn import RetrievalConfig
from dbattn.hf import Handle, load_model, wrap

from . import readme
from ._common import RESULTS, SMOLLM2, console, print_table, with_earlier, write_json
from ._model import compare_logits, prefill, stretched, teacher_forced, twin_of
from .capture import prose_ids

CONTEXT, FORCED = 7900, 128
CODE = ("asyncio", "email", "http", "json", "unittest")


def fidelity(plain: Any, handle: Handle, cache: DynamicCache, ids: Tensor) -> dict[str, float]:
    """Logits after the last of ``ids [1, n]``, fed one by one with all layers retrieving, against the unwrapped model.

    ``cache`` holds the rows before them as the unwrapped model read them. The wrapped model reads them once more, so
    that it learns from their queries as it would in use.
    """
    config, rows = plain.config, cache.get_seq_length()
    forced = ids[:, rows:]
    dense = teacher_forced(plain, stretched(cache, rows, config), forced, step=forced.shape[1])
    read, _ = prefill(handle.model, ids[:, :rows])
    other = teacher_forced(handle.model, read, forced, step=1)
    steps, layers = forced.shape[1], handle.report().layers
    retrieving = sum(layer.retrieving == steps for layer in layers)
    reasons = {reason for layer in layers for reason in layer.dense if "max_queries" not in reason}
    # Where audits ask for a scan it is the default's own choice; anything else would make the figure meaningless.
    if any("audits found no budget" not in reason for reason in reasons):
        raise RuntimeError(
            f"{retrieving} of {len(layers)} layers retrieved at every step, others were dense: {reasons}"
        )
    figures = {"context": rows, "tokens": steps, "retrieving": retrieving, "layers": len(layers)}
    return {**figures, **compare_logits(dense, other)}


def code_ids(tokenizer: Any, tokens: int) -> Tensor:
    """``tokens`` token ids ``[tokens]`` of Python source: packages of the standard library, in the order of CODE.

    Raises:
        ValueError: they are not that long.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_text(encoding="utf-8") for name in CODE for path in sorted((root / name).glob("*.py"))]
    ids: Tensor = tokenizer("\n".join(sources), return_tensors="pt")["input_ids"][0]
    if len(ids) < tokens:
        raise ValueError(f"{', '.join(CODE)} give {len(ids)} tokens of code, {tokens} are needed")
    return ids[:tokens]


TEXTS = {"prose": prose_ids, "code": code_ids}


def run(path: Path | None, name: str, text: str, *, context: int = CONTEXT, forced: int = FORCED) -> dict[str, Any]:
    """One model on one text: an entry of the results."""
    with console.status("loading the model"):
        plain, tokenizer = load_model(path)
        ids = TEXTS[text](tokenizer, context + forced)[None]
    twin = twin_of(plain)
    cache, _ = prefill(plain, ids[:, :context])
    with torch.inference_mode(), wrap(twin, RetrievalConfig(dense_below=0)) as handle:
        return {"model": name, "text": text, **fidelity(plain, handle, cache, ids)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, metavar="FOLDER_OR_GGUF", help="default: SmolLM2-135M-Instruct")
    options.add_argument("--name", help="what the record calls the model (default: the file's name)")
    options.add_argument("--text", choices=list(TEXTS), default="prose", help="what is read (default: prose)")
    options.add_argument("--context", type=int, default=CONTEXT, help=f"tokens read densely (default {CONTEXT:,})")
    options.add_argument("--tokens", type=int, default=FORCED, help=f"tokens compared (default {FORCED})")
    options.add_argument("--json", type=Path, metavar="OUT", default=RESULTS / "fidelity.json", help="the record")
    args = options.parse_args(argv)
    if args.context < 512 or args.tokens < 1:
        options.error(f"--context is {args.context}, --tokens {args.tokens}, expected at least 512 and 1")
    name = args.name or (SMOLLM2 if args.model is None else args.model.stem)
    found = run(args.model, name, args.text, context=args.context, forced=args.tokens)
    results = with_earlier(args.json, [found], ("model", "text"))
    print_table("Logits, all layers retrieving", readme.FIDELITY_HEAD, readme.fidelity_rows(results))
    write_json(args.json, "fidelity", {"model": name, "text": args.text}, results)
    readme.write(args.json.parent)


if __name__ == "__main__":
    main()
