"""Chunked prefill: a long prompt that is read through lists goes through the model a chunk at a time.

What a layer makes of a chunk fits the caches, and memory is asked for again and again in sizes that are kept at hand:
of 16K positions at once a fourth of the time goes into pages of new memory.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..index import index_class
from ..query.prompt import LEAST_ROWS
from .cache import DatabaseLayer
from .session import Session

# Positions of a chunk, fastest of 512 to 4,096. Calls of up to two are left whole.
CHUNK = 2048
# What is cut along its last dimension or its second, of all else that a call may hold nothing is.
_LAST, _SECOND = ("position_ids", "cache_position"), ("input_ids", "inputs_embeds")


def chunks_of(session: Session, cache: Any, given: dict[str, Any]) -> tuple[list[dict[str, Any]], int] | None:
    """A call of the decoder as several, one after the other, and the rows that there are after them.

    They end at multiples of CHUNK. None where the call is left whole: it is short or not read through lists, somebody
    watches it, or it holds or asks for what is of all its positions together.
    """
    if not isinstance(cache, DynamicCache) or not _reads_lists(session, cache):
        return None
    tokens = given.get("input_ids")
    new: Tensor | None = given.get("inputs_embeds") if tokens is None else tokens
    if new is None or new.shape[1] <= 2 * CHUNK or not _may_be_cut(given):
        return None
    held = cache.get_seq_length()
    total = held + new.shape[1]
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[1] != total:
        return None
    if session.config.prefill == "auto" and (total <= LEAST_ROWS or new.device.type != "cpu"):
        return None
    bounds = [held, *range(held - held % CHUNK + CHUNK, total, CHUNK), total]
    return [_cut(given, held, first, stop) for first, stop in pairwise(bounds)], total


def _reads_lists(session: Session, cache: DynamicCache) -> bool:
    switches, config = session.switches, session.config
    return (
        config.prefill != "dense"
        and index_class(config.index_name).block > 0
        and session.shards is None
        and switches.retrieve
        and switches.watcher is None
        and session.windows_of(cache) is None
        and all(type(layer) in (DatabaseLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    )


def _may_be_cut(given: dict[str, Any]) -> bool:
    known = {*_LAST, *_SECOND, "attention_mask", "past_key_values", "use_cache", "return_dict"}
    if given.get("return_dict") is False or any(
        name not in known and value is not None and value is not False for name, value in given.items()
    ):
        return False
    mask = given.get("attention_mask")
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


def _cut(given: dict[str, Any], held: int, first: int, stop: int) -> dict[str, Any]:
    at = slice(first - held, stop - held)
    cuts = {**dict.fromkeys(_SECOND, (slice(None), at)), **dict.fromkeys(_LAST, (..., at))}
    cuts["attention_mask"] = slice(None), slice(stop)
    return {name: value[cuts[name]] if name in cuts and value is not None else value for name, value in given.items()}


def joined(output: Any, before: list[Tensor]) -> Any:
    """The output of the last chunk with the hidden states of those ``before`` it."""
    output["last_hidden_state"] = torch.cat([*before, output["last_hidden_state"]], dim=1)
    return output
