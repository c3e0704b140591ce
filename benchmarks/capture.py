"""Capture queries, keys and values of a real model over real prose, for tests and benchmarks.

Keys are stored as they enter the cache (after rotary embedding): ``{layer}.key`` and ``{layer}.value`` are
``[1, Hkv, T, D]``, ``{layer}.query`` holds the last positions, ``[1, Hq, m, D]``; float16.

Up to the model's context (8192 tokens) the rows are one window of prose. Beyond it, windows of 4096 other tokens are
put in front of that one: every window starts at position 0, and its first rows, on which a model parks attention it
has no use for, are kept only once, at the front. The queries always belong to the last window.

  python benchmarks/capture.py --tokens 12288 --layers 8 --queries 16 --kv-heads 1 --out rows.safetensors
                                                               dbattn/data/smollm2_12k.safetensors was made like this
  python benchmarks/capture.py --tokens 524288 --layers 8      fills the cache that the benchmarks read
"""

import argparse
import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from dbattn.files import cache_folder, written_whole
from dbattn.hf import load_model
from dbattn.text.haystack import read_haystack

CONTEXT, WINDOW = 8192, 4096
SINKS = 8
KEPT_QUERIES = 512
NAME = "dbattn-capture"


@dataclass(frozen=True)
class Rows:
    """Captured rows of one layer: keys, values ``[1, Hkv, n, D]``, query ``[1, Hq, m, D]`` (last m positions); fp32."""

    keys: Tensor
    values: Tensor
    query: Tensor

    def __len__(self) -> int:
        return self.keys.shape[2]


def window_lengths(tokens: int) -> list[int]:
    """Lengths of the windows that a store of ``tokens`` tokens is made of; the one with the queries comes first."""
    if tokens <= CONTEXT:
        return [tokens]
    return [CONTEXT] + [WINDOW] * ((tokens - CONTEXT) // WINDOW)


def load_rows(tokens: int, layer: int) -> Rows:
    """The rows of ``layer`` over about ``tokens >= 8192`` tokens, from the cache; what it lacks is captured first."""
    return join_windows([load_file(path) for path in fill_cache(tokens, layer)], layer)


def rows_of_file(path: Path, rows: int) -> dict[int, Rows]:
    """Captured rows of any model by layer: the file's first rows and its newest, ``rows`` in all, and its queries.

    Tensors are named as here, with or without a batch dimension.

    Raises:
        ValueError: the file holds no layer, or a layer lacks a tensor.
    """
    held = load_file(path)
    layers = sorted({int(name.split(".")[0]) for name in held if name.endswith(".key")})
    if not layers:
        raise ValueError(f"{path} holds {sorted(held)[:3]}, expected tensors named 'LAYER.key', '.value', '.query'")
    found = {}
    for layer in layers:
        names = [f"{layer}.{name}" for name in ("key", "value", "query")]
        if missing := [name for name in names if name not in held]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        keys, values, query = (x if x.ndim == 4 else x[None] for x in (held[name].float() for name in names))
        if keys.shape[2] > rows:
            keys, values = (torch.cat([x[:, :, :SINKS], x[:, :, SINKS - rows :]], dim=2) for x in (keys, values))
        found[layer] = Rows(keys, values, query)
    return found


def join_windows(windows: list[dict[str, Tensor]], layer: int) -> Rows:
    """One store from windows: the first one's sinks, the other windows and then the first, without their sinks."""
    last = windows[0]
    joined = []
    for name in ("key", "value"):
        parts = [last[f"{layer}.{name}"][:, :, :SINKS]]
        parts += [w[f"{layer}.{name}"][:, :, SINKS:] for w in reversed(windows)]
        joined.append(torch.cat(parts, dim=2).float())
    keys, values = joined
    return Rows(keys, values, last[f"{layer}.query"].float())


def fill_cache(tokens: int, layer: int) -> list[Path]:
    """Capture what the cache lacks of one layer of a store of ``tokens`` tokens; its files, as ``fill_caches``."""
    return fill_caches(tokens, [layer])[0]


def fill_caches(tokens: int, layers: Sequence[int]) -> list[list[Path]]:
    """Capture what the cache lacks of a store of ``tokens`` tokens, all layers in one pass of the model over a window.

    Returns each layer's files, the window with the queries first. One file per window and layer, written aside and
    renamed: an interrupted run loses the window it was in.
    """
    folder = cache_folder() / "captures" / f"smollm2-135m-{CONTEXT}-{WINDOW}"
    lengths = window_lengths(max(tokens, CONTEXT))
    windows = range(len(lengths))
    paths = [[folder / f"window{i:03d}-layer{layer}.safetensors" for i in windows] for layer in layers]
    lacking = {
        i: [layer for layer, files in zip(layers, paths, strict=True) if not files[i].is_file()] for i in windows
    }
    missing = [i for i in windows if lacking[i]]
    if not missing:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with console.status("loading the model and collecting prose"):
        model, tokenizer = load_model()
        ids = _cached_ids(folder / "tokens.safetensors", tokenizer, sum(lengths))
    offsets = [sum(lengths[:i]) for i in windows]
    columns: tuple[str | ProgressColumn, ...]
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), "left:", TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("capturing rows", total=sum(lengths[i] for i in missing))
        for i in missing:
            part = capture_window(model, ids[None, offsets[i] : offsets[i] + lengths[i]], lacking[i])
            for layer in lacking[i]:
                rows = {f"{layer}.{n}": part[f"{layer}.{n}"] for n in ("query", "key", "value")}
                rows[f"{layer}.query"] = rows[f"{layer}.query"][:, :, -KEPT_QUERIES:]
                _save(
                    {n: x for n, x in rows.items() if i == 0 or not n.endswith("query")}, paths[layers.index(layer)][i]
                )
            progress.advance(task, lengths[i])
    return paths


def capture_window(model: Any, ids: Tensor, layers: list[int]) -> dict[str, Tensor]:
    """Run the model over ``ids [1, T]`` as far as the last of ``layers`` needs; queries, keys and values, float32."""
    seen: dict[str, Tensor] = {}

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx in layers:
            seen.update({f"{module.layer_idx}.{n}": x for n, x in (("query", query), ("key", key), ("value", value))})
        if module.layer_idx == max(layers):
            raise _SeenAllError
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, record)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode():
            model(ids, use_cache=False)
    except _SeenAllError:
        pass
    finally:
        model.set_attn_implementation(before)
    return seen


class _SeenAllError(Exception):
    """The last layer that was asked for has been seen."""


def prose_ids(tokenizer: Any, tokens: int) -> Tensor:
    """``tokens`` token ids ``[tokens]`` of prose: the language reference, then docstrings of installed packages.

    Raises:
        ValueError: there is not that much prose on this machine.
    """
    found = tokenizer(read_haystack(), return_tensors="pt")["input_ids"][0]
    docstrings = _long_docstrings()
    parts, have = [found], len(found)
    while have < tokens:
        batch = list(islice(docstrings, 200))
        if not batch:
            raise ValueError(f"this machine's docstrings give {have} tokens of prose, {tokens} are needed")
        parts.append(tokenizer("\n\n".join(batch), return_tensors="pt")["input_ids"][0])
        have += len(parts[-1])
    return torch.cat(parts)[:tokens]


def _long_docstrings() -> Iterator[str]:
    """Docstrings of 600 characters and more, without doctests; modules are parsed, not imported."""
    seen = set()
    standard, installed = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for root in (standard, installed):
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).parts
            if {"test", "tests", "site-packages"} & set(inside):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue  # Python 2 sources and templates
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= 600 and ">>>" not in text and text not in seen:
                        seen.add(text)
                        yield text


def _cached_ids(path: Path, tokenizer: Any, tokens: int) -> Tensor:
    """Ids of all windows. Kept, so that windows captured later do not overlap when packages have changed."""
    if path.is_file():
        ids = load_file(path)["ids"]
        if len(ids) >= tokens:
            return ids
        # Only ever made longer: the windows captured already stay the start of it.
        ids = torch.cat([ids, prose_ids(tokenizer, tokens)[len(ids) :]])
    else:
        ids = prose_ids(tokenizer, tokens)
    _save({"ids": ids}, path)
    return ids


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with written_whole(path) as aside:
        save_file({n: (x.half() if x.is_floating_point() else x).contiguous() for n, x in tensors.items()}, aside)


def capture(tokens: int, layers: list[int], queries: int, kv_heads: int | None) -> dict[str, Tensor]:
    """Rows of ``layers`` over ``tokens`` tokens as they are stored in a file; within the context, not cached."""
    if tokens <= CONTEXT:
        model, tokenizer = load_model()
        rows = capture_window(model, prose_ids(tokenizer, tokens)[None], layers)
    else:
        rows = {}
        for layer in layers:
            joined = load_rows(tokens, layer)
            rows |= {f"{layer}.key": joined.keys, f"{layer}.value": joined.values, f"{layer}.query": joined.query}
    group = rows[f"{layers[0]}.query"].shape[1] // rows[f"{layers[0]}.key"].shape[1]
    kept = {n: x[:, :, -queries:] if n.endswith("query") else x for n, x in rows.items()}
    if kv_heads is not None:
        kept = {n: x[:, : kv_heads * (group if n.endswith("query") else 1)] for n, x in kept.items()}
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of prose to read (default 4096)")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 22], help="layers to keep (default 8 22)")
    parser.add_argument("--queries", type=int, default=64, help="last query positions to keep (default 64, most 512)")
    parser.add_argument("--kv-heads", type=int, help="keep only the first KV heads and their query heads")
    parser.add_argument("--out", type=Path, help="safetensors file to write; without it, the cache is filled")
    args = parser.parse_args()
    if args.out is None:
        for each, files in zip(args.layers, fill_caches(args.tokens, args.layers), strict=True):
            print(f"{len(files)} windows of layer {each} in {cache_folder() / 'captures'}")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        _save(capture(args.tokens, args.layers, args.queries, args.kv_heads), args.out)
        print(f"{args.out}: {args.out.stat().st_size:,} bytes")
