"""attend_segmented on the CPU: every row source of one query position in one compiled call."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import time
from functools import lru_cache

import numpy as np
import torch
from numba import njit

from ._cpu_addresses import Addresses, at_address
from ._cpu_code_vectors import code_lanes
from ._cpu_common import FAST, F, flat_rows, inner, merge_parts
from ._cpu_list_steps import cycles, log_sum_exp
from ._cpu_parts import call_part, each_part, part_address
from ._cpu_segmented_read import answer_part
from ._cpu_segmented_scan import (
    ask,
    choose_lists,
    choose_rows,
    code_part,
    hot_masses,
    open_supers,
    scan_part,
    score_part,
)
from ._cpu_segmented_types import (
    ASKED_AT,
    BESIDE_AT,
    CALL_AT,
    CYCLES,
    LISTS_READ,
    LISTS_SCORED,
    MASSES_AT,
    OF_STORE,
    ROWS_CODED,
    ROWS_READ,
    STATES_AT,
    STATS,
    SUPERS_AT,
    SUPERS_SCORED,
    VALUES_READ,
    Reading,
    Rows,
    read_asked,
    read_beside,
    read_call,
    read_lists,
    read_masses,
    read_scratch,
    read_states,
    read_supers,
    scratch_for,
)
from ._cpu_start import use_torchs_threads
from ._cpu_vectors import lanes
from .lists import weights_by_place
from .summaries import SegmentedAnswer

# The phases of a call. Not Python's integers: Numba compiles a function once for each literal it gets.
ASK, SCAN, SCORE, CODE, ANSWER = np.arange(5)
# In place of lse and lse_by_source.
_NOT_WANTED = torch.empty(0, 0, 0), torch.empty(0, 0, 0, 0)


@inner
def _reading(call):
    """The call's Reading."""
    n, x = call.counts, call.factors
    return Reading(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], x[0], x[1], x[2])


@lru_cache
def _part(key_type, value_type, group, dim, value_dim):
    """The address of the parts of all phases, for rows of these types and sizes; see part_address."""
    heads, ck, cv, width = lanes(group, dim, value_dim)
    code_chunks, code_width = code_lanes(dim)

    def segmented_part(phase, w, memory):
        working = at_address(memory, (1,), np.int64)
        scratch, asked, call = read_scratch(working, 0), read_asked(working, ASKED_AT), read_call(working, CALL_AT)
        states, masses, how = read_states(working, STATES_AT), read_masses(working, MASSES_AT), _reading(call)
        store = at_address(call.addresses[1], (1,), np.int64)
        lists, supers, beside = read_lists(store, 0), read_supers(store, SUPERS_AT), read_beside(store, BESIDE_AT)
        at = beside.rows
        keys = Rows(at_address(at[0], (1,), key_type), at[1], at[2], at[3])
        values = Rows(at_address(at[4], (1,), value_type), at[5], at[6], at[7])
        if phase == ASK:
            query = at_address(call.addresses[0], (beside.start.size, len(call.weight), asked.query.shape[3]), F)
            ask(query, call.weight, call.factors[3], how, beside.start, beside.shape, asked, heads, ck, width)
        elif phase == SCAN:
            scan_part(w, asked, keys, values, lists, supers, how, scratch, states, heads, ck, cv, width)
        elif phase == SCORE:
            score_part(w, asked, lists, supers, how, scratch, heads, ck, width)
        elif phase == CODE:
            code_part(w, asked, lists, beside.codes, how, masses, scratch, heads, ck, width, code_chunks, code_width)
        else:
            answer_part(
                w, asked, keys, values, lists, supers, how, masses, scratch, states, beside.cross, heads, ck, cv, width
            )

    return part_address(segmented_part)


@njit(fastmath=FAST, cache=True, nogil=True)
def _attend_segmented(
    part, query_at, out_at, lses_at, weight, store_at, memory, working, scale, n_sink, sealed, length, opened, coded,
    read, tail, parts, softcap, alpha, beta,
):  # fmt: skip
    """The door, the same for all rows: what depends on their types and sizes is in the phases' parts.

    Few arguments, as each takes its time; arrays by address: query ``[B, Hq, D]``, out ``[B, Hq, Dv]``, lses
    ``[5, B, Hq]`` (of all, then of sinks and hot rows, rows, codes, summaries), the store's table, and as ``memory``
    the table ``working`` of what a call works in.
    """
    store = at_address(store_at, (1,), np.int64)
    lists, supers = read_lists(store, 0), read_supers(store, SUPERS_AT)
    scratch, asked, call = read_scratch(working, 0), read_asked(working, ASKED_AT), read_call(working, CALL_AT)
    states, masses = read_states(working, STATES_AT), read_masses(working, MASSES_AT)
    call.addresses[0], call.addresses[1] = query_at, store_at
    counts, factors = (
        (n_sink, sealed, length, opened, coded, read, np.int64(tail), parts),
        (softcap, alpha, beta, scale),
    )
    for i in range(len(counts)):
        call.counts[i] = counts[i]
    for i in range(len(factors)):
        call.factors[i] = F(factors[i])
    for i in range(len(weight)):
        call.weight[i] = weight[i]
    how = _reading(call)
    B, H, G, _ = asked.query.shape
    Hq = H * G
    out, lses = at_address(out_at, (B, Hq, states.acc.shape[3]), F), at_address(lses_at, (5, B, Hq), F)
    stats, n = scratch.stats, B * H * parts
    call_part(part, ASK, 0, memory)
    each_part(part, SCAN, n, memory)
    began = cycles()
    hot_masses(states, parts, masses)
    if asked.two_level.any():
        open_supers(asked, supers, how, masses, scratch)
        each_part(part, SCORE, n, memory)
    choose_lists(asked, lists, supers, how, masses, scratch, stats)
    chose = cycles() - began
    each_part(part, CODE, n, memory)
    began = cycles()
    choose_rows(how, masses, scratch, stats)
    chose += cycles() - began
    each_part(part, ANSWER, n, memory)
    for source in range(4):
        for b in range(B):
            for i in range(Hq):
                lses[1 + source, b, i] = log_sum_exp(
                    states.top, states.total, source * parts, (source + 1) * parts, b, i
                )
    merge_parts(states.top, states.total, states.acc, 4 * parts, out, lses[0])
    for b in range(B):
        for i in range(CYCLES, STATS):
            stats[b, i] = 0
    # Choosing runs on one thread while the others wait, so it counts on all of them.
    stats[0, CYCLES + 1] = chose * parts
    for w in range(n):
        for i in range(5):
            stats[w % (B * H) // H, CYCLES + i] += scratch.spent[w, i]


@lru_cache
def _weights(head_weights, heads):
    """``[Hq]`` float32, ones for None."""
    return np.ones(heads, F) if head_weights is None else np.array(head_weights, F)


def _placed(table, keys, values, start):
    """The types of keys and values, the addresses of all that a store's kernel reads, and what holds the rows."""
    (key_memory, *key_steps), (value_memory, *value_steps) = flat_rows(keys), flat_rows(values)
    rows = np.array([key_memory.ctypes.data, *key_steps, value_memory.ctypes.data, *value_steps])
    arrays = *table.lists, *table.supers, rows, start.contiguous().numpy(), table.shape, table.cross, table.codes
    return key_memory.dtype.type, value_memory.dtype.type, Addresses.of(OF_STORE, arrays), (key_memory, value_memory)


def attend_segmented(query, keys, values, table, how, *, start, with_lse, details, unread):
    """See segmented.attend_segmented."""
    batch, heads, _, dim = query.shape
    kv_heads, value_dim = table.cross.shape[1], table.cross.shape[3]
    lists, supers = table.lists, table.supers
    parts = use_torchs_threads()
    scratch, working = scratch_for(
        batch, kv_heads, heads // kv_heads, (dim, value_dim), supers.size.shape[2], lists.size.shape[2],
        min(how.sealed, how.rows_coded), parts,
    )  # fmt: skip
    if query.dtype != torch.float32 or not query.is_contiguous() or query.is_neg():
        query = query.float().contiguous().resolve_neg()
    out = torch.empty((batch, heads, 1, value_dim), dtype=torch.float32)
    lses = torch.empty((5, batch, heads, 1), dtype=torch.float32)
    key_type, value_type, store, _held = table.beside(keys, values, start, _placed)
    began = time.perf_counter()
    _attend_segmented(
        _part(key_type, value_type, heads // kv_heads, dim, value_dim), query.data_ptr(), out.data_ptr(),
        lses.data_ptr(), _weights(how.head_weights, heads), store.at, working.at, working.numbers, float(how.scale),
        how.n_sink, how.sealed, how.length, how.rows_opened, how.rows_coded, how.rows_read, how.tail, parts,
        float(how.softcap or 0.0), how.alpha, how.beta,
    )  # fmt: skip
    took = time.perf_counter() - began
    taken = _taken(table, how, scratch) if details else None
    weights = _unread(table, how, scratch, lses[..., 0]) if details and unread else None
    stats = scratch.stats
    counts = (stats[0] if batch == 1 else stats.sum(axis=0)).tolist()
    spent = counts[CYCLES:VALUES_READ]
    share = took / max(1, sum(spent))
    return SegmentedAnswer(
        out,
        *((lses[0], lses[1:]) if with_lse else _NOT_WANTED),
        counts[ROWS_READ],
        counts[ROWS_CODED],
        counts[LISTS_READ],
        counts[LISTS_SCORED] + counts[SUPERS_SCORED],
        counts[VALUES_READ],
        tuple(each * share for each in spent) if sum(spent) else (0.0, took, 0.0, 0.0),
        taken,
        weights,
    )


def _rows_read(table, scratch):
    """Of each batch row and KV head of the latest call: lists scored, places of opened rows, which were read."""
    for b, h in np.ndindex(*scratch.total.shape):
        scored = scratch.id[b, h, : scratch.total[b, h]].astype(np.int64)
        opened = scored[scratch.chosen[b, h, : scratch.count[b, h]]]
        begin, size = (array[b, h, opened].astype(np.int64) for array in (table.lists.begin, table.lists.size))
        # NumPy's repeat: torch's starts its threads for it.
        place = torch.from_numpy(np.repeat(begin + size - size.cumsum(), size) + np.arange(size.sum()))
        yield b, h, torch.from_numpy(scored), place, torch.from_numpy(scratch.row_taken[b, h, : len(place)])


def _taken(table, how, scratch):
    """Which rows the latest call read; see SegmentedAnswer."""
    taken = torch.zeros(*scratch.total.shape, how.sealed, dtype=torch.bool)
    for b, h, _, place, read in _rows_read(table, scratch):
        taken[b, h, place] = read
    return taken


def _unread(table, how, scratch, lses):
    """What rows weigh that it did not read, through codes and summaries; likewise."""
    batch, kv_heads, group, _ = scratch.logit.shape
    levels = table.levels(torch.device("cpu"))
    unread = torch.zeros(batch, kv_heads, group, how.sealed)
    weights = [torch.zeros(batch, kv_heads, group, level.size.shape[2]) for level in (levels.lists, levels.supers)]
    for b, h, scored, place, read in _rows_read(table, scratch) if how.tail else ():
        weights[0][b, h][:, scored] = torch.from_numpy(scratch.logit[b, h, :, : len(scored)])
        logits = torch.from_numpy(scratch.row_logit[b, h, :, : len(place)])
        unread[b, h][:, place] = torch.exp(logits - lses[0].view(batch, kv_heads, group)[b, h, :, None]) * ~read
        if scratch.stats[b, SUPERS_SCORED] > 0:
            weights[1][b, h] = torch.from_numpy(scratch.super_logit[b, h, :, : weights[1].shape[3]])
    # They are settled: those of all rows of a list, 0 where it was opened, and known up to a factor for each head.
    weights = [weight.flatten(1, 2) for weight in weights]
    share = torch.exp(lses[4] - lses[0]).nan_to_num() / sum(weight.sum(dim=-1) for weight in weights).clamp(min=1e-30)
    unread = unread.flatten(1, 2)
    for weight, level in zip(weights, (levels.lists, levels.supers), strict=True):
        size = level.size.repeat_interleave(group, dim=1)
        own = weight * share[..., None] / size.clamp(min=1)
        # Of a list and its super-list only one answers: the other's weight is 0.
        unread += weights_by_place(level.begin, level.size, own, how.sealed)
    return unread
