"""What the phases of attend_segmented hand each other. Numba takes NamedTuples apart where it compiles.

States [4 * parts, B, Hq] hold sinks and hot rows, then rows of lists, then codes, then summaries, each cut into one
part per thread.
"""

import threading
from typing import Any, NamedTuple

import numpy as np

from .summaries import Array

# What the columns of stats [B, STATS] count; four of cycles, one for each source.
ROWS_READ, LISTS_READ, LISTS_SCORED, SUPERS_SCORED, ROWS_CODED, CYCLES, VALUES_READ, STATS = 0, 1, 2, 3, 4, 5, 9, 10


class Rows(NamedTuple):
    """Flat memory of ``[B, Hkv, T, D]`` rows, with the steps of batch row, KV head and row in elements."""

    memory: Any
    batch: Any
    head: Any
    row: Any


class Reading(NamedTuple):
    """What a call reads: rows ``sealed .. length`` are hot; budgets are of rows, for all KV heads of a batch row."""

    n_sink: Any
    sealed: Any
    length: Any
    opened: Any
    coded: Any
    read: Any
    softcap: Any
    alpha: Any
    beta: Any
    tail: Any
    parts: Any


class Asked(NamedTuple):
    """The query, scaled ``[B, Hkv, G, D]``, and turned as codes are, in int8 with ``steps`` ``[B, Hkv, G, 3]`` (see
    score_codes); the spread ``[B, Hq]`` of its logits; ``weight [Hq]`` of its heads, ``pull [B, Hq]`` their weight
    times the deviation of their logits; whether super-lists are opened."""

    query: Any
    turned: Any
    steps: Any
    spread: Any
    weight: Any
    pull: Any
    start: Any
    two_level: Any


class Scratch(NamedTuple):
    """Arrays a call works in: super-lists ``[B, Hkv, ..]``, lists under opened ones ("candidates"), the rows of chosen
    lists (list after list from ``row_at`` on), cycles spent."""

    super_logit: Any
    super_rank: Any
    super_taken: Any
    super_chosen: Any
    super_count: Any
    super_offset: Any
    id: Any
    size: Any
    variance: Any
    logit: Any
    rank: Any
    taken: Any
    chosen: Any
    count: Any
    total: Any
    mean: Any
    sum: Any
    lean: Any
    row_at: Any
    row_list: Any
    row_logit: Any
    row_rank: Any
    row_taken: Any
    row_chosen: Any
    row_read: Any
    row_count: Any
    row_one: Any
    spent: Any


class States(NamedTuple):
    """Running states: top and total ``[n, B, Hq]``, acc ``[n, B, Hq, Dv]``."""

    top: Any
    total: Any
    acc: Any


class Masses(NamedTuple):
    """Weights relative to exp(peak), ``[B, Hq]`` each: of sinks and hot rows, of super-lists not opened, of all."""

    peak: Any
    hot: Any
    supers: Any
    whole: Any


# One scratch serves all layers of a model, so that it stays in the cache; each thread has its own.
_kept = threading.local()
# Scratch of so many shapes is kept.
SHAPES = 4


def scratch_for(
    batch: int, kv_heads: int, group: int, supers: int, lists: int, rows: int, parts: int
) -> tuple[Scratch, Array]:
    """This thread's scratch for a store of such a shape, and its stats; ``rows`` at most are coded for a KV head."""
    # In few sizes: one scratch then serves a store while it grows. weigh_codes reads up to 7 numbers past the last.
    rows = (1 << max(0, rows - 1).bit_length()) + 8
    key = batch, kv_heads, group, supers, lists, rows, parts
    kept: dict[Any, tuple[Scratch, Array]] = _kept.__dict__.setdefault("arrays", {})
    if key not in kept:
        if len(kept) > SHAPES:
            kept.clear()

        def zeros(dtype: type, *shape: int) -> Array:
            return np.zeros((batch, kv_heads, *shape), dtype)

        kept[key] = (
            Scratch(
                super_logit=zeros(np.float32, group, supers),
                super_rank=zeros(np.float32, supers),
                super_taken=zeros(np.bool_, supers),
                super_chosen=zeros(np.int32, supers),
                super_count=zeros(np.int64),
                super_offset=zeros(np.int32, supers),
                id=zeros(np.int32, lists),
                size=zeros(np.int32, lists),
                variance=zeros(np.float32, lists),
                logit=zeros(np.float32, group, lists),
                rank=zeros(np.float32, lists),
                taken=zeros(np.bool_, lists),
                chosen=zeros(np.int32, lists),
                count=zeros(np.int64),
                total=zeros(np.int64),
                mean=zeros(np.float32, group, lists),
                sum=zeros(np.float32, group, lists),
                lean=zeros(np.float32, group, lists),
                row_at=zeros(np.int32, lists),
                row_list=zeros(np.int32, rows),
                row_logit=zeros(np.float32, group, rows),
                row_rank=zeros(np.float32, rows),
                row_taken=zeros(np.bool_, rows),
                row_chosen=zeros(np.int32, rows),
                row_read=zeros(np.int64),
                row_count=zeros(np.int64),
                row_one=np.ones((batch, kv_heads, rows), np.int32),
                spent=np.zeros((parts * batch * kv_heads, 5), np.int64),
            ),
            np.zeros((batch, STATS), np.int64),
        )
    return kept[key]
