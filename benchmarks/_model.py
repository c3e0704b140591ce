"""A model with caches of any length, plain and wrapped, for the benchmarks that run one end to end."""

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from dbattn.hf.load import model_folder

from ._common import progress

CHUNK = 512


def with_yarn(path: Path | None, tokens: int) -> Any:
    """The model (None: SmolLM2) with its rotary positions scaled to so many tokens, where they go beyond its range."""
    folder = model_folder(path)
    config = AutoConfig.from_pretrained(folder)
    limit = config.max_position_embeddings
    factor = max(1.0, tokens / limit)
    scaled = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": limit}
    config.rope_parameters = {**config.rope_parameters, **scaled}
    config.max_position_embeddings = int(factor * limit)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def twin_of(model: Any) -> Any:
    """A second model over the same weights, so that one can be wrapped and the other left alone."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def prefill(model: Any, ids: Tensor) -> tuple[DynamicCache, float]:
    """Read ``ids [1, n]`` in chunks of 512; the cache, and the seconds it took."""
    cache = DynamicCache(config=model.config)
    began = time.perf_counter()
    with (
        torch.inference_mode(),
        progress(f"the model reads {ids.shape[1]:,} tokens", ids.shape[1] // CHUNK + 1) as tick,
    ):
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
            tick()
    return cache, time.perf_counter() - began


def stretched(cache: DynamicCache, rows: int, config: Any) -> DynamicCache:
    """A plain cache of ``rows`` rows per layer: the first of ``cache``'s, or its rows repeated with noise.

    A tenth of each dimension's spread is added to repeated rows, so that no two are equal: what a step costs does not
    depend on what rows say, but an index of equal rows would be an unusual one.
    """
    made = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    for i, layer in enumerate(cache.layers):
        made.update(*(_stretch(x, rows, generator) for x in (layer.keys, layer.values)), i)
    return made


def _stretch(x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    have = x.shape[2]
    if rows <= have:
        return x[:, :, :rows].clone()
    out = torch.empty(*x.shape[:2], rows, x.shape[3])
    spread = 0.1 * x.std(dim=2, keepdim=True)
    for at in range(0, rows, have):
        part = out[:, :, at : at + have]
        part.copy_(x[:, :, : part.shape[2]])
        if at:
            part.add_(torch.randn(part.shape, generator=generator).mul_(spread))
    return out


def decode_ms(model: Any, cache: DynamicCache, steps: int) -> list[float]:
    """Milliseconds of each of ``steps`` greedy decode steps; the cache grows by them."""
    token, times = torch.tensor([[1]]), []
    with torch.inference_mode():
        for _ in range(steps):
            began = time.perf_counter()
            token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(dim=-1, keepdim=True)
            times.append(1e3 * (time.perf_counter() - began))
    return times


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache holds: rows, spare capacity in use, indexes."""
    total = 0
    for layer in cache.layers:
        db = getattr(layer, "db", None)
        total += db.nbytes if db is not None else layer.keys.nbytes + layer.values.nbytes
    return total


@contextmanager
def memory_growth() -> Iterator[list[int]]:
    """Yields a list of one number: the bytes by which the process has outgrown its size at the start of the block."""
    process, growth, stop = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.005):
            growth[0] = max(growth[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield growth
    finally:
        stop.set()
        thread.join()
        growth[0] = max(growth[0], process.memory_info().rss - before)


def compare_logits(dense: Tensor, other: Tensor) -> dict[str, float]:
    """Means over positions of ``[n, V]`` logits: relative L2 distance, KL(dense || other) in nats, top-1 agreement."""
    p, q = dense.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
    return {
        "logits_l2": float(((other - dense).norm(dim=-1) / dense.norm(dim=-1)).mean()),
        "kl": float((p.exp() * (p - q)).sum(dim=-1).mean()),
        "top1": float((dense.argmax(dim=-1) == other.argmax(dim=-1)).float().mean()),
    }


def teacher_forced(model: Any, cache: DynamicCache, ids: Tensor, *, step: int) -> Tensor:
    """Logits ``[n, V]`` after each of ``ids [1, n]``, fed ``step`` tokens at a time whatever the model would say."""
    parts: Sequence[Tensor] = ids.split(step, dim=1)
    logits = []
    with torch.inference_mode(), progress("teacher-forced tokens", len(parts)) as tick:
        for part in parts:
            logits.append(model(part, past_key_values=cache).logits[0].float())
            tick()
    return torch.cat(logits)
