"""What the phases of attend_segmented hand each other. Numba takes NamedTuples apart where it compiles.

States [4 * parts, B, Hq] hold sinks and hot rows, then rows of lists, then codes, then summaries, each cut into one
part per thread.
"""

import threading
from typing import Any, NamedTuple

import numpy as np
from numba import typeof
from numba.types import float32, int8, int32, int64, uint16

from ._cpu_addresses import Addresses, reader, width
from ._cpu_list_steps import BUCKETS
from .summaries import Array, ListArrays, SuperListArrays

# What the columns of stats [B, STATS] count; four of cycles, one for each source.
ROWS_READ, LISTS_READ, LISTS_SCORED, SUPERS_SCORED, ROWS_CODED, CYCLES, VALUES_READ, STATS = 0, 1, 2, 3, 4, 5, 9, 10


class Rows(NamedTuple):
    """Flat memory of ``[B, Hkv, T, D]`` rows, with the steps of batch row, KV head and row in elements."""

    memory: Any
    batch: Any
    head: Any
    row: Any


class Call(NamedTuple):
    """What a call hands its parts: ``addresses`` of its query ``[B, Hq, D]`` and of the store's table, the heads'
    ``weight [Hq]``, and what Reading has: its ``counts``, then its ``factors`` and the scale of logits."""

    addresses: Any
    weight: Any
    counts: Any
    factors: Any


class Reading(NamedTuple):
    """What a call reads: rows ``sealed .. length`` are hot; budgets are of rows, for all KV heads of a batch row."""

    n_sink: Any
    sealed: Any
    length: Any
    opened: Any
    coded: Any
    read: Any
    tail: Any
    parts: Any
    softcap: Any
    alpha: Any
    beta: Any


class Asked(NamedTuple):
    """The query, scaled ``[B, Hkv, G, D]``, and turned as codes are, in int8 with ``steps`` ``[B, Hkv, G, 3]`` (see
    score_codes); the spread ``[B, Hq]`` of its logits; ``weight [Hq]`` of its heads, ``pull [B, Hq]`` their weight
    times the deviation of their logits; ``start [B]``; whether super-lists are opened, ``[B]``."""

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
    lists (list after list from ``row_at`` on; ``row_bins`` counts each part's by rank, and read are those from bin
    ``row_cut`` on, and ``row_more`` of the one below), cycles spent; ``stats [B, STATS]``: what was read."""

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
    row_logit: Any
    row_rank: Any
    row_taken: Any
    row_bins: Any
    row_cut: Any
    row_more: Any
    spent: Any
    stats: Any


class Beside(NamedTuple):
    """What a store has beside its lists, see ListTable: ``rows [8]``, the address of its keys and their strides as
    Rows has them, then those of its values."""

    rows: Any
    start: Any
    shape: Any
    cross: Any
    codes: Any


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


# The types of these arrays, as tables of addresses have them: a store's lists, super-lists and what is beside them.
_LEVEL = int32[:, :, ::1], int32[:, :, ::1], float32[:, :, ::1], int8[:, :, :, ::1], int8[:, :, :, ::1], int64[:, ::1]
_BESIDE = int64[::1], int64[::1], uint16[:, :, :, ::1], uint16[:, :, :, ::1], int8[:, :, :, ::1]
OF_STORE = *_LEVEL, *_LEVEL, *_BESIDE
SUPERS_AT, BESIDE_AT = width(*_LEVEL), 2 * width(*_LEVEL)
read_lists, read_supers = reader(ListArrays, *_LEVEL), reader(SuperListArrays, *_LEVEL)
read_beside = reader(Beside, *_BESIDE)

# One scratch serves all layers of a model, so that it stays in the cache; each thread has its own.
_kept = threading.local()
# Scratch of so many shapes is kept.
SHAPES = 4


def scratch_for(
    batch: int, kv_heads: int, group: int, dims: tuple[int, int], supers: int, lists: int, rows: int, parts: int
) -> tuple[Scratch, Addresses]:
    """This thread's scratch for a store of such a shape, and the table of all arrays that a call works in; ``dims`` are
    D and Dv, ``rows`` at most are coded for a KV head."""
    # In few sizes: one scratch then serves a store while it grows. weigh_codes reads up to 7 numbers past the last.
    key = batch, kv_heads, group, dims, supers, lists, (1 << max(0, rows - 1).bit_length()) + 8, parts
    kept: dict[Any, tuple[Scratch, Addresses]] = _kept.__dict__.setdefault("arrays", {})
    if key not in kept:
        if len(kept) > SHAPES:
            kept.clear()
        working = _working(*key)
        kept[key] = working[0], Addresses.of(_OF_WORKING, [array for part in working for array in part])
    return kept[key]


def _working(
    batch: int, kv_heads: int, group: int, dims: tuple[int, int], supers: int, lists: int, rows: int, parts: int
) -> tuple[Scratch, Asked, States, Masses, Call]:
    dim, value_dim = dims
    heads, slots = kv_heads * group, 4 * parts

    def zeros(dtype: type, *shape: int) -> Array:
        return np.zeros((batch, kv_heads, *shape), dtype)

    def floats(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    scratch = Scratch(
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
        row_logit=zeros(np.float32, group, rows),
        row_rank=zeros(np.float32, rows),
        row_taken=zeros(np.bool_, rows),
        row_bins=zeros(np.int32, parts, BUCKETS),
        row_cut=np.zeros(batch, np.int64),
        row_more=zeros(np.int64, parts),
        spent=np.zeros((parts * batch * kv_heads, 5), np.int64),
        stats=np.zeros((batch, STATS), np.int64),
    )
    asked = Asked(
        query=zeros(np.float32, group, dim),
        turned=zeros(np.int8, group, dim + dim % 2),
        steps=zeros(np.float32, group, 3),
        spread=floats(batch, heads),
        weight=floats(heads),
        pull=floats(batch, heads),
        start=np.zeros(batch, np.int64),
        two_level=np.zeros(batch, np.bool_),
    )
    states = States(floats(slots, batch, heads), floats(slots, batch, heads), floats(slots, batch, heads, value_dim))
    call = Call(np.zeros(2, np.int64), floats(heads), np.zeros(8, np.int64), floats(4))
    return scratch, asked, states, Masses(*(floats(batch, heads) for _ in range(4))), call


_KINDS = [[typeof(array) for array in part] for part in _working(1, 1, 1, (1, 1), 1, 1, 1, 1)]
_OF_WORKING = [kind for kinds in _KINDS for kind in kinds]
ASKED_AT, STATES_AT, MASSES_AT, CALL_AT = (
    width(*(kind for kinds in _KINDS[:i] for kind in kinds)) for i in range(1, 5)
)
read_scratch, read_asked, read_states, read_masses, read_call = (
    reader(named, *kinds) for named, kinds in zip((Scratch, Asked, States, Masses, Call), _KINDS, strict=True)
)
