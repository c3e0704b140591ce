"""attend_segmented on the CPU: every row source of one query position in one compiled call."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import time
from functools import lru_cache

import numpy as np
import torch
from numba import njit, prange

from ._cpu_code_vectors import code_lanes
from ._cpu_common import FAST, F, flat_rows, inner_parallel, merge_parts, numpy_queries
from ._cpu_list_steps import cycles, log_sum_exp
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
    CYCLES,
    LISTS_READ,
    LISTS_SCORED,
    ROWS_CODED,
    ROWS_READ,
    STATS,
    SUPERS_SCORED,
    VALUES_READ,
    Masses,
    Reading,
    Rows,
    Scratch,
    States,
    scratch_for,
)
from ._cpu_start import use_torchs_threads
from ._cpu_vectors import lanes
from .lists import row_places, weights_by_place
from .summaries import ListArrays, SegmentedAnswer, SuperListArrays

_lanes, _code_lanes = lru_cache(lanes), lru_cache(code_lanes)
# The phases that run in parallel. Not Python's integers: Numba compiles a function once for each literal it gets.
SCAN, SCORE, CODE, ANSWER = np.arange(4)


@inner_parallel
def _each_part(
    phase, asked, keys, values, lists, supers, codes, how, masses, scratch, states, cross, lanes, code_lanes
):
    """A phase's parts in parallel. One loop for all phases: Numba takes ten seconds to compile each loop."""
    heads, ck, cv, width = lanes
    code_chunks, code_width = code_lanes
    for i in prange(how.parts * asked.query.shape[0] * asked.query.shape[1]):
        # An index of the loop is unsigned inside it and signed outside, which would compile the parts twice.
        w = np.int64(i)
        if phase == SCAN:
            scan_part(w, asked, keys, values, lists, supers, how, scratch, states, heads, ck, cv, width)
        elif phase == SCORE:
            score_part(w, asked, lists, supers, how, scratch, heads, ck, width)
        elif phase == CODE:
            code_part(w, asked, lists, codes, how, masses, scratch, heads, ck, width, code_chunks, code_width)
        else:
            answer_part(
                w, asked, keys, values, lists, supers, how, masses, scratch, states, cross, heads, ck, cv, width
            )


@njit(fastmath=FAST, cache=True, nogil=True)
def _attend_segmented(
    query, weight, key_memory, kb, kh, kt, value_memory, vb, vh, vt, start, scale,
    begin, size, variance, key, value, count,
    first, super_size, super_variance, super_key, super_value, n_supers, shape, cross, codes,
    n_sink, sealed, length, opened, coded, read, softcap, alpha, beta, tail, parts, heads, ck, cv, width,
    code_chunks, code_width, super_logit, super_rank, super_taken, super_chosen, super_count, super_offset, c_id,
    c_size, c_variance, c_logit, c_rank, c_taken, c_chosen, c_count, c_total, mean, list_sum, list_lean, row_at,
    row_list, row_logit, row_rank, row_taken, row_chosen, row_read, row_count, row_one, spent, out, lse,
    lse_by_source, stats,
):  # fmt: skip
    """The door: Numba takes flat arguments fastest; the phases get them as the NamedTuples they came from.

    out [B, Hq, Dv], lse [B, Hq], lse_by_source [4, B, Hq] (sinks and hot rows, rows, codes, summaries), stats
    [B, STATS].
    """
    lanes_, code_lanes_ = (heads, ck, cv, width), (code_chunks, code_width)
    keys, values = Rows(key_memory, kb, kh, kt), Rows(value_memory, vb, vh, vt)
    lists = ListArrays(begin, size, variance, key, value, count)
    supers = SuperListArrays(first, super_size, super_variance, super_key, super_value, n_supers)
    how = Reading(n_sink, sealed, length, opened, coded, read, softcap, alpha, beta, tail, parts)
    scratch = Scratch(
        super_logit, super_rank, super_taken, super_chosen, super_count, super_offset, c_id, c_size, c_variance,
        c_logit, c_rank, c_taken, c_chosen, c_count, c_total, mean, list_sum, list_lean, row_at, row_list,
        row_logit, row_rank, row_taken, row_chosen, row_read, row_count, row_one, spent,
    )  # fmt: skip
    B, Hq, Dv = out.shape
    n = 4 * parts
    states = States(np.empty((n, B, Hq), F), np.empty((n, B, Hq), F), np.empty((n, B, Hq, Dv), F))
    asked, any_two = ask(query, weight, start, scale, shape, sealed, n_sink, opened, lanes_)
    peak, hot = np.empty((B, Hq), F), np.empty((B, Hq), F)
    masses = Masses(peak, hot, np.zeros((B, Hq), F), np.empty((B, Hq), F))
    _each_part(
        SCAN, asked, keys, values, lists, supers, codes, how, masses, scratch, states, cross, lanes_, code_lanes_
    )
    began = cycles()
    hot_masses(states, parts, masses)
    if any_two:
        open_supers(asked, supers, how, masses, scratch)
        _each_part(
            SCORE, asked, keys, values, lists, supers, codes, how, masses, scratch, states, cross, lanes_, code_lanes_
        )
    choose_lists(asked, lists, supers, how, masses, scratch, stats)
    chose = cycles() - began
    _each_part(
        CODE, asked, keys, values, lists, supers, codes, how, masses, scratch, states, cross, lanes_, code_lanes_
    )
    began = cycles()
    choose_rows(how, masses, scratch, stats)
    chose += cycles() - began
    _each_part(
        ANSWER, asked, keys, values, lists, supers, codes, how, masses, scratch, states, cross, lanes_, code_lanes_
    )
    for source in range(4):
        for b in range(B):
            for i in range(Hq):
                lse_by_source[source, b, i] = log_sum_exp(
                    states.top, states.total, source * parts, (source + 1) * parts, b, i
                )
    merge_parts(states.top, states.total, states.acc, n, out, lse)
    H = key.shape[1]
    for b in range(B):
        for i in range(CYCLES, STATS):
            stats[b, i] = 0
    # Choosing runs on one thread while the others wait, so it counts on all of them.
    stats[0, CYCLES + 1] = chose * parts
    for w in range(parts * B * H):
        for i in range(5):
            stats[w % (B * H) // H, CYCLES + i] += spent[w, i]


@lru_cache
def _weights(head_weights, heads):
    """``[Hq]`` float32, ones for None."""
    return np.ones(heads, F) if head_weights is None else np.array(head_weights, F)


def attend_segmented(query, keys, values, table, how, *, start, details):
    """See segmented.attend_segmented."""
    batch, heads, _, dim = query.shape
    kv_heads, value_dim = table.cross.shape[1], table.cross.shape[3]
    lists, supers = table.lists, table.supers
    parts = use_torchs_threads()
    scratch, stats = scratch_for(
        batch, kv_heads, heads // kv_heads, supers.size.shape[2], lists.size.shape[2],
        min(how.sealed, how.rows_coded), parts,
    )  # fmt: skip
    # Made by numpy, and with the axis of positions already: cheaper than torch's views of its own.
    out, lses = np.empty((batch, heads, 1, value_dim), F), np.empty((5, batch, heads, 1), F)
    lses_out, asked = lses[..., 0], numpy_queries(query)
    reading = Reading(
        how.n_sink, how.sealed, how.length, how.rows_opened, how.rows_coded, how.rows_read, F(how.softcap or 0.0),
        F(how.alpha), F(how.beta), how.tail, parts,
    )  # fmt: skip
    began = time.perf_counter()
    _attend_segmented(
        asked, _weights(how.head_weights, heads), *table.flat(keys, values, start, flat_rows), F(how.scale), *lists,
        *supers, table.shape, table.cross, table.codes, *reading, *_lanes(heads // kv_heads, dim, value_dim),
        *_code_lanes(dim), *scratch, out[:, :, 0], lses_out[0], lses_out[1:], stats,
    )  # fmt: skip
    took = time.perf_counter() - began
    taken = unread = None
    if details:
        taken, unread = _details(table, how, scratch, stats, torch.from_numpy(lses_out))
    counts = (stats[0] if batch == 1 else stats.sum(axis=0)).tolist()
    spent = counts[CYCLES:VALUES_READ]
    share = took / max(1, sum(spent))
    return SegmentedAnswer(
        torch.from_numpy(out),
        torch.from_numpy(lses[0]),
        torch.from_numpy(lses[1:]),
        counts[ROWS_READ],
        counts[ROWS_CODED],
        counts[LISTS_READ],
        counts[LISTS_SCORED] + counts[SUPERS_SCORED],
        counts[VALUES_READ],
        tuple(each * share for each in spent) if sum(spent) else (0.0, took, 0.0, 0.0),
        taken,
        unread,
    )


def _details(table, how, scratch, stats, lses):
    """Which rows the latest call read, and what others weigh through codes and summaries; see SegmentedAnswer."""
    batch, kv_heads, group, _ = scratch.logit.shape
    levels = table.levels(torch.device("cpu"))
    taken = torch.zeros(batch, kv_heads, how.sealed, dtype=torch.bool)
    unread = torch.zeros(batch, kv_heads, group, how.sealed)
    weights = [torch.zeros(batch, kv_heads, group, level.size.shape[2]) for level in (levels.lists, levels.supers)]
    for b, h in np.ndindex(batch, kv_heads):
        scored = torch.from_numpy(scratch.id[b, h, : scratch.total[b, h]]).long()
        opened = scored[torch.from_numpy(scratch.chosen[b, h, : scratch.count[b, h]]).long()]
        place = row_places(levels.lists.begin[b, h, opened], levels.lists.size[b, h, opened])
        read = torch.from_numpy(scratch.row_taken[b, h, : len(place)])
        taken[b, h, place] = read
        if how.tail:
            weights[0][b, h][:, scored] = torch.from_numpy(scratch.logit[b, h, :, : len(scored)])
            logits = torch.from_numpy(scratch.row_logit[b, h, :, : len(place)])
            unread[b, h][:, place] = torch.exp(logits - lses[0].view(batch, kv_heads, group)[b, h, :, None]) * ~read
        if how.tail and stats[b, SUPERS_SCORED] > 0:
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
    return taken, unread
