"""attend_segmented on the CPU, its last phase: the chosen lists' rows, and the summaries of all others."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np

from ._cpu_common import NEG, TILE, F, flush, inner, store_state
from ._cpu_list_steps import add_tail, cycles, settle_tail
from ._cpu_vectors import add_rows, score_rows

# Summary rows are read eight at a time; eights that hold under 1 / (TAIL_FLOOR * lists) of the mass are skipped.
TAIL_FLOOR = F(60.0)


@inner
def _read_lists(q, chosen, place, begin, size, keys, key_at, values, value_at, softcap, logits, acc, top, total, lanes):
    """Add the rows of the chosen lists of one KV head to its state, tile by tile."""
    heads, ck, _, width = lanes
    tile_row = np.empty(TILE, np.int64)
    tile_n = np.empty(TILE, np.int64)
    ranges = 0
    filled = np.int64(0)
    for i in range(chosen.size):
        j = place[chosen[i]]
        row = np.int64(begin[j])
        left = np.int64(size[j])
        while left > 0:
            take = min(left, TILE - filled)
            score_rows(
                q, 0, keys.memory, key_at + row * keys.row, keys.row, take, logits, filled, TILE, heads, ck, width
            )
            tile_row[ranges] = row
            tile_n[ranges] = take
            ranges += 1
            filled += take
            row += take
            left -= take
            if filled == TILE or (left == 0 and i == chosen.size - 1):
                flush(
                    values.memory, value_at, values.row, tile_row, tile_n, ranges, filled, softcap, logits, acc, top,
                    total, lanes,
                )  # fmt: skip
                ranges = 0
                filled = 0


@inner
def _add_summaries(b, h, part, lists, supers, how, two_level, whole, scratch, acc, total, tilt, lanes):
    """Add a part of the summaries not read of one KV head to its state; returns the mean values read."""
    G = acc.shape[0]
    parts = how.parts
    floor = np.empty(G, F)
    weight, size, variance, taken = scratch.logit[b, h], scratch.size[b, h], scratch.variance[b, h], scratch.taken[b, h]
    value = lists.value[b, h]
    read = 0
    for g in range(G):
        floor[g] = TAIL_FLOOR * F(lists.used[b, h]) / whole[g]
    # candidates are contiguous only inside one opened super-list
    runs = scratch.super_count[b, h] if two_level else parts
    for run in range(runs * part // parts, runs * (part + 1) // parts):
        if two_level:
            i = scratch.super_chosen[b, h, run]
            lo = np.int64(scratch.super_offset[b, h, run])
            first = np.int64(supers.first[b, h, i])
            hi = lo + supers.first[b, h, i + 1] - first
        else:
            n = lists.used[b, h]
            lo = n * part // parts
            hi = n * (part + 1) // parts
            first = lo
        settle_tail(weight, size, variance, taken, lo, hi, tilt, total)
        read += add_tail(weight, lo, hi, value, first, floor, acc, lanes)
    if two_level:
        n = supers.used[b, h]
        lo = n * part // parts
        hi = n * (part + 1) // parts
        own = scratch.super_logit[b, h]
        settle_tail(own, supers.size[b, h], supers.variance[b, h], scratch.super_taken[b, h], lo, hi, tilt, total)
        read += add_tail(own, lo, hi, supers.value[b, h], lo, floor, acc, lanes)
    return read


@inner
def answer_part(w, asked, keys, values, lists, supers, how, masses, scratch, states, cross, heads, ck, cv, width):
    """One part of one KV head: the chosen lists' rows, and the summaries of all others, tilted along cross."""
    mark = cycles()
    lanes = (heads, ck, cv, width)
    B, H, G, D = asked.query.shape
    parts = how.parts
    part = w // (B * H)
    b = (w % (B * H)) // H
    h = w % H
    q = asked.query[b, h]
    logits = np.empty((G, TILE), F)
    acc = np.zeros((G, states.acc.shape[3]), F)
    top = np.full(G, NEG, F)
    total = np.zeros(G, F)
    n = scratch.count[b, h]
    _read_lists(
        q, scratch.chosen[b, h, n * part // parts : n * (part + 1) // parts], scratch.id[b, h], lists.begin[b, h],
        lists.size[b, h], keys, b * keys.batch + h * keys.head, values, b * values.batch + h * values.head,
        how.softcap, logits, acc, top, total, lanes,
    )  # fmt: skip
    store_state(parts + part, b, h, acc, top, total, states.top, states.total, states.acc)
    unread = cycles()
    spent = scratch.spent[w]
    spent[1] += unread - mark
    for g in range(G):
        total[g] = F(0.0)
        for d in range(acc.shape[1]):
            acc[g, d] = F(0.0)
    if how.tail:
        tilt = np.zeros(G, F)
        whole = masses.whole[b, h * G : h * G + G]
        spent[3] += _add_summaries(
            b, h, part, lists, supers, how, asked.two_level[b], whole, scratch, acc, total, tilt, lanes
        )
        lean = np.empty((G, D), F)
        for g in range(G):
            for d in range(D):
                lean[g, d] = how.beta * tilt[g] * q[g, d]
        add_rows(lean, 0, D, cross[b, h], 0, cross.shape[3], D, acc, heads, cv, width)
    for g in range(G):
        top[g] = masses.peak[b, h * G + g]
    store_state(2 * parts + part, b, h, acc, top, total, states.top, states.total, states.acc)
    spent[2] += cycles() - unread
