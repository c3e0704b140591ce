"""attend_segmented on the CPU: every row source of one query position in one compiled call."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import threading
import time
from functools import lru_cache

import numpy as np
import torch
from numba import njit, prange

from ._cpu_common import FAST, F, flat_rows, inner_parallel, merge_parts, numpy_queries, to_f32
from ._cpu_list_steps import cycles, log_sum_exp, squares
from ._cpu_segmented_read import answer_part
from ._cpu_segmented_scan import ask, choose_lists, hot_masses, open_supers, scan_part, score_part
from ._cpu_segmented_types import (
    CYCLES,
    LISTS_READ,
    LISTS_SCORED,
    ROWS_READ,
    SUPERS_SCORED,
    VALUES_READ,
    Asked,
    Masses,
    Reading,
    Rows,
    Scratch,
    States,
)
from ._cpu_start import use_torchs_threads
from ._cpu_vectors import lanes
from .lists import weights_by_place
from .summaries import ListArrays, SegmentedAnswer, SuperListArrays

_lanes = lru_cache(lanes)
# One scratch serves all layers of a model, so that it stays in the cache; each thread has its own.
_kept = threading.local()
# Scratch of so many shapes is kept.
SHAPES = 4
# The phases that run in parallel. Not Python's integers: Numba compiles a function once for each literal it gets.
SCAN, SCORE, ANSWER = np.arange(3)


@inner_parallel
def _each_part(phase, asked, keys, values, lists, supers, how, masses, scratch, states, cross, lanes):
    """A phase's parts in parallel. One loop for all phases: Numba takes ten seconds to compile each loop."""
    heads, ck, cv, width = lanes
    for i in prange(how.parts * asked.query.shape[0] * asked.query.shape[1]):
        # An index of the loop is unsigned inside it and signed outside, which would compile the parts twice.
        w = np.int64(i)
        if phase == SCAN:
            scan_part(w, asked, keys, values, lists, supers, how, scratch, states, heads, ck, cv, width)
        elif phase == SCORE:
            score_part(w, asked, lists, supers, how, scratch, heads, ck, width)
        else:
            answer_part(
                w, asked, keys, values, lists, supers, how, masses, scratch, states, cross, heads, ck, cv, width
            )


@njit(fastmath=FAST, cache=True, nogil=True)
def _attend_segmented(
    query, key_memory, kb, kh, kt, value_memory, vb, vh, vt, start, scale,
    begin, size, variance, key, value, count,
    first, super_size, super_variance, super_key, super_value, n_supers, shape, cross,
    n_sink, sealed, length, opened, rows, softcap, alpha, beta, tail, parts, heads, ck, cv, width,
    super_logit, super_rank, super_taken, super_chosen, super_count, super_offset, c_id, c_size, c_variance, c_logit,
    c_rank, c_taken, c_chosen, c_count, c_total, spent, out, lse, lse_by_source, stats,
):  # fmt: skip
    """The door: Numba takes flat arguments fastest; the phases get them as the NamedTuples they came from.

    out [B, Hq, Dv], lse [B, Hq], lse_by_source [3, B, Hq] (sinks and hot rows, lists, tail), stats [B, 8].
    """
    lanes_ = (heads, ck, cv, width)
    keys, values = Rows(key_memory, kb, kh, kt), Rows(value_memory, vb, vh, vt)
    lists = ListArrays(begin, size, variance, key, value, count)
    supers = SuperListArrays(first, super_size, super_variance, super_key, super_value, n_supers)
    how = Reading(n_sink, sealed, length, opened, rows, softcap, alpha, beta, tail, parts)
    scratch = Scratch(
        super_logit, super_rank, super_taken, super_chosen, super_count, super_offset, c_id, c_size, c_variance,
        c_logit, c_rank, c_taken, c_chosen, c_count, c_total, spent,
    )  # fmt: skip
    B, Hq, Dv = out.shape
    n = 3 * parts
    states = States(np.empty((n, B, Hq), F), np.empty((n, B, Hq), F), np.empty((n, B, Hq, Dv), F))
    scaled, spread, two_level, any_two = ask(query, start, scale, shape, sealed, n_sink, opened, lanes_)
    asked = Asked(scaled, spread, start, two_level)
    peak, hot = np.empty((B, Hq), F), np.empty((B, Hq), F)
    masses = Masses(peak, hot, np.zeros((B, Hq), F), np.empty((B, Hq), F))
    _each_part(SCAN, asked, keys, values, lists, supers, how, masses, scratch, states, cross, lanes_)
    began = cycles()
    hot_masses(states, parts, masses)
    if any_two:
        open_supers(asked, supers, how, masses, scratch)
        _each_part(SCORE, asked, keys, values, lists, supers, how, masses, scratch, states, cross, lanes_)
    choose_lists(asked, lists, supers, how, masses, scratch, stats)
    chose = cycles() - began
    _each_part(ANSWER, asked, keys, values, lists, supers, how, masses, scratch, states, cross, lanes_)
    for source in range(3):
        for b in range(B):
            for i in range(Hq):
                lse_by_source[source, b, i] = log_sum_exp(
                    states.top, states.total, source * parts, (source + 1) * parts, b, i
                )
    merge_parts(states.top, states.total, states.acc, n, out, lse)
    H = key.shape[1]
    for b in range(B):
        for i in range(CYCLES, 8):
            stats[b, i] = 0
    # Choosing runs on one thread while the others wait, so it counts on all of them.
    stats[0, CYCLES + 1] = chose * parts
    for w in range(parts * B * H):
        for i in range(4):
            stats[w % (B * H) // H, CYCLES + i] += spent[w, i]


@njit(fastmath=FAST, cache=True, nogil=True)
def _unread_deviation(
    query, shape, scale, c_logit, c_size, c_variance, c_total, super_logit, super_size, super_variance, n_supers, stats,
    lse_tail, lse, out,
):  # fmt: skip
    """out [B, Hq]: standard deviation of the softmax weight of the unread rows, as a share of all weight.

    Reads what _attend_segmented has left in its scratch (tail=True). A list's rows scatter around its mean
    independently, so that its weight w deviates by w * sqrt(q' S q * variance / size).
    """
    B, Hq, D = query.shape
    H = shape.shape[1]
    G = Hq // H
    for b in range(B):
        for h in range(H):
            for g in range(G):
                i = h * G + g
                spread = F(0.0)
                for d in range(D):
                    x = F(0.0)
                    for e in range(D):
                        x += to_f32(shape[b, h, d, e]) * query[b, i, e]
                    spread += x * query[b, i, d]
                total, squared = squares(c_logit[b, h, g], c_size[b, h], c_variance[b, h], c_total[b, h])
                if stats[b, SUPERS_SCORED] > 0:
                    more, more_squared = squares(
                        super_logit[b, h, g], super_size[b, h], super_variance[b, h], n_supers[b, h]
                    )
                    total += more
                    squared += more_squared
                share = np.exp(lse_tail[b, i] - lse[b, i]) / total if total > F(0.0) else F(0.0)
                out[b, i] = share * scale * np.sqrt(max(spread, F(0.0)) * squared)


def attend_segmented(query, keys, values, table, how, *, start, want_deviation, details):
    """See segmented.attend_segmented."""
    batch, heads, _, dim = query.shape
    kv_heads, value_dim = table.cross.shape[1], table.cross.shape[3]
    lists, supers = table.lists, table.supers
    parts = use_torchs_threads()
    scratch, stats = _scratch(batch, kv_heads, heads // kv_heads, supers.size.shape[2], lists.size.shape[2], parts)
    out, lses = torch.empty(batch, heads, value_dim), torch.empty(4, batch, heads)
    lses_out, asked = lses.numpy(), numpy_queries(query)
    reading = Reading(
        how.n_sink, how.sealed, how.length, how.rows_opened, how.rows_read, F(how.softcap or 0.0), F(how.alpha),
        F(how.beta), how.tail, parts,
    )  # fmt: skip
    began = time.perf_counter()
    _attend_segmented(
        asked, *table.flat(keys, values, flat_rows), start.numpy(), F(how.scale), *lists, *supers, table.shape,
        table.cross, *reading, *_lanes(heads // kv_heads, dim, value_dim), *scratch, out.numpy(), lses_out[0],
        lses_out[1:], stats,
    )  # fmt: skip
    took = time.perf_counter() - began
    deviation = chosen = unread = None
    if want_deviation:
        deviation = torch.empty(batch, heads)
        _unread_deviation(
            asked, table.shape, F(how.scale), scratch.logit, scratch.size, scratch.variance, scratch.total,
            scratch.super_logit, supers.size, supers.variance, supers.used, stats, lses_out[3], lses_out[0],
            deviation.numpy(),
        )  # fmt: skip
        deviation = deviation[..., None]
    if details:
        chosen, unread = _details(table, how, scratch, stats, lses)
    counts = (stats[0] if batch == 1 else stats.sum(axis=0)).tolist()
    spent = counts[CYCLES : CYCLES + 3]
    share = took / max(1, sum(spent))
    return SegmentedAnswer(
        out[:, :, None],
        lses[0][:, :, None],
        lses[1:][..., None],
        counts[ROWS_READ],
        counts[LISTS_READ],
        counts[LISTS_SCORED] + counts[SUPERS_SCORED],
        counts[VALUES_READ],
        (spent[0] * share, spent[1] * share, spent[2] * share) if sum(spent) else (0.0, took, 0.0),
        deviation,
        chosen,
        unread,
    )


def _details(table, how, scratch, stats, lses):
    """Which lists the latest call read, and what rows weigh through summaries; see SegmentedAnswer."""
    batch, kv_heads, group, _ = scratch.logit.shape
    levels = table.levels(torch.device("cpu"))
    count = levels.lists.size.shape[2]
    chosen = torch.zeros(batch, kv_heads, count, dtype=torch.bool)
    weights = [torch.zeros(batch, kv_heads, group, level.size.shape[2]) for level in (levels.lists, levels.supers)]
    for b, h in np.ndindex(batch, kv_heads):
        scored = torch.from_numpy(scratch.id[b, h, : scratch.total[b, h]]).long()
        chosen[b, h, scored[torch.from_numpy(scratch.chosen[b, h, : scratch.count[b, h]]).long()]] = True
        if how.tail:
            weights[0][b, h][:, scored] = torch.from_numpy(scratch.logit[b, h, :, : len(scored)])
        if how.tail and stats[b, SUPERS_SCORED] > 0:
            weights[1][b, h] = torch.from_numpy(scratch.super_logit[b, h, :, : weights[1].shape[3]])
    # They are settled: those of all rows of a list, 0 where it was read, and known up to a factor for each head.
    weights = [weight.flatten(1, 2) for weight in weights]
    share = torch.exp(lses[3] - lses[0]).nan_to_num() / sum(weight.sum(dim=-1) for weight in weights).clamp(min=1e-30)
    unread = torch.zeros(batch, kv_heads * group, how.sealed)
    for weight, level in zip(weights, (levels.lists, levels.supers), strict=True):
        size = level.size.repeat_interleave(group, dim=1)
        own = weight * share[..., None] / size.clamp(min=1)
        # Of a list and its super-list only one answers: the other's weight is 0.
        unread += weights_by_place(level.begin, level.size, own, how.sealed)
    return chosen, unread


def _scratch(batch, kv_heads, group, supers, lists, parts):
    """This thread's scratch for a store of such a shape, and its stats array."""
    key = (batch, kv_heads, group, supers, lists, parts)
    kept = _kept.__dict__.setdefault("arrays", {})
    if key not in kept:
        if len(kept) > SHAPES:
            kept.clear()

        def zeros(dtype, *shape):
            return np.zeros((batch, kv_heads, *shape), dtype)

        kept[key] = (
            Scratch(
                super_logit=zeros(F, group, supers),
                super_rank=zeros(F, supers),
                super_taken=zeros(np.bool_, supers),
                super_chosen=zeros(np.int32, supers),
                super_count=zeros(np.int64),
                super_offset=zeros(np.int32, supers),
                id=zeros(np.int32, lists),
                size=zeros(np.int32, lists),
                variance=zeros(F, lists),
                logit=zeros(F, group, lists),
                rank=zeros(F, lists),
                taken=zeros(np.bool_, lists),
                chosen=zeros(np.int32, lists),
                count=zeros(np.int64),
                total=zeros(np.int64),
                spent=np.zeros((parts * batch * kv_heads, 4), np.int64),
            ),
            np.zeros((batch, 8), np.int64),
        )
    return kept[key]
