"""attend_segmented on the CPU, its last phase: rows that are read, others by their codes or by summary."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np

from ._cpu_common import NEG, TILE, F, exp32, flush, inner, store_state
from ._cpu_list_steps import add_tail, bucket_of, cycles, settle_tail
from ._cpu_vectors import add_rows, prefetch, score_rows

# Summary rows are read eight at a time; eights that hold under 1 / (TAIL_FLOOR * lists) of the mass are skipped.
TAIL_FLOOR = F(60.0)
# The same of opened lists, one by one.
CODE_FLOOR = F(500.0)


@inner
def _read_rows(b, h, part, q, first, last, lists, keys, values, how, peak, scratch, logits, acc, top, total, lanes):
    """Add the rows taken of the chosen lists first..last of one KV head to its state, tile by tile, and take them out
    of their lists' sums."""
    place, size, chosen, at = scratch.id[b, h], scratch.size[b, h], scratch.chosen[b, h], scratch.row_at[b, h]
    rank, taken, begin = scratch.row_rank[b, h], scratch.row_taken[b, h], lists.begin[b, h]
    cut, more = scratch.row_cut[b], scratch.row_more[b, h, part]
    key_at, value_at = b * keys.batch + h * keys.head, b * values.batch + h * values.head
    n_key, n_value = len(lanes[1]) << (len(lanes[3]) - 1), len(lanes[2]) << (len(lanes[3]) - 1)
    tile = np.empty((3, TILE), np.int64)
    filled = np.int64(0)
    for j in range(first, last):
        lo = np.int64(at[j])
        away = np.int64(begin[place[chosen[j]]]) - lo
        for e in range(lo, lo + size[chosen[j]]):
            bucket = bucket_of(rank[e])
            taken[e] = bucket >= cut
            if bucket == cut - 1 and more > 0:
                more -= 1
                taken[e] = True
            if not taken[e]:
                continue
            # They stand anywhere: all of a tile are asked for before the first is read.
            row = e + away
            prefetch(keys.memory, key_at + row * keys.row, n_key)
            prefetch(values.memory, value_at + row * values.row, n_value)
            tile[0, filled], tile[1, filled], tile[2, filled] = row, e, j
            filled += 1
            if filled == TILE:
                _read_tile(b, h, q, tile, filled, keys, values, how, peak, scratch, logits, acc, top, total, lanes)
                filled = np.int64(0)
    _read_tile(b, h, q, tile, filled, keys, values, how, peak, scratch, logits, acc, top, total, lanes)


@inner
def _read_tile(b, h, q, tile, filled, keys, values, how, peak, scratch, logits, acc, top, total, lanes):
    """Add the rows of a tile, of which it has the place in the store, among coded rows, and of the list."""
    heads, ck, _, width = lanes
    coded, mean, sums, leans = scratch.row_logit[b, h], scratch.mean[b, h], scratch.sum[b, h], scratch.lean[b, h]
    key_at, value_at = b * keys.batch + h * keys.head, b * values.batch + h * values.head
    for i in range(filled):
        row = key_at + tile[0, i] * keys.row
        score_rows(q, 0, keys.memory, row, keys.row, 1, logits, i, TILE, heads, ck, width)
    by_code = np.empty(TILE, F)
    for g in range(acc.shape[0]):
        for i in range(filled):
            by_code[i] = coded[g, tile[1, i]] - peak[g]
        for i in range(filled):
            by_code[i] = exp32(by_code[i])
        for i in range(filled):
            j = tile[2, i]
            sums[g, j] -= by_code[i]
            leans[g, j] -= by_code[i] * (coded[g, tile[1, i]] - mean[g, j])
    flush(
        values.memory, value_at, values.row, tile[0], np.ones(TILE, np.int64), filled, filled, how.softcap, logits, acc,
        top, total, lanes,
    )  # fmt: skip


@inner
def _add_codes(b, h, first, last, lists, spread, floor, scratch, acc, total, tilt, lanes):
    """Add the rows of chosen lists first..last of one KV head that were not read, by their codes, at their list's mean
    value. Returns the mean values read: those of negligible weight are not worth a cache miss."""
    heads, _, cv, width = lanes
    G = acc.shape[0]
    value, sums, leans = lists.value[b, h], scratch.sum[b, h], scratch.lean[b, h]
    row = value.shape[1]
    weight = np.empty((G, 1), F)
    read = 0
    for j in range(first, last):
        most = F(0.0)
        for g in range(G):
            s = max(sums[g, j], F(0.0))
            weight[g, 0] = s
            total[g] += s
            tilt[g] += leans[g, j] / spread[g]
            most = max(most, s * floor[g])
        if most >= F(1.0):
            read += 1
            i = np.int64(scratch.id[b, h, scratch.chosen[b, h, j]])
            add_rows(weight, 0, 1, value, i * row, row, 1, acc, heads, cv, width)
    return read


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
def _lean(tilt, q, cross, beta, acc, lanes):
    """Move the sums acc [G, Dv] along cross [D, Dv] by how far the rows' logits are from their lists' [G]."""
    heads, _, cv, width = lanes
    G, D = q.shape
    lean = np.empty((G, D), F)
    for g in range(G):
        for d in range(D):
            lean[g, d] = beta * tilt[g] * q[g, d]
    add_rows(lean, 0, D, cross, 0, cross.shape[1], D, acc, heads, cv, width)


@inner
def _clear(acc, total, tilt):
    for g in range(acc.shape[0]):
        total[g] = F(0.0)
        tilt[g] = F(0.0)
        for d in range(acc.shape[1]):
            acc[g, d] = F(0.0)


@inner
def answer_part(w, asked, keys, values, lists, supers, how, masses, scratch, states, cross, heads, ck, cv, width):
    """One part of one KV head: rows of its share of the chosen lists, their others by code, and a share of the
    summaries of all other lists."""
    mark = cycles()
    lanes = (heads, ck, cv, width)
    B, H, G, _ = asked.query.shape
    parts = how.parts
    part = w // (B * H)
    b = (w % (B * H)) // H
    h = w % H
    q = asked.query[b, h]
    logits = np.empty((G, TILE), F)
    acc = np.zeros((G, states.acc.shape[3]), F)
    top = np.full(G, NEG, F)
    total = np.zeros(G, F)
    tilt = np.zeros(G, F)
    n = scratch.count[b, h]
    first, last = n * part // parts, n * (part + 1) // parts
    peak = masses.peak[b, h * G : h * G + G]
    step = lists.value.shape[3]
    for j in range(first, last):
        prefetch(lists.value[b, h], np.int64(scratch.id[b, h, scratch.chosen[b, h, j]]) * step, step)
    _read_rows(b, h, part, q, first, last, lists, keys, values, how, peak, scratch, logits, acc, top, total, lanes)
    store_state(parts + part, b, h, acc, top, total, states.top, states.total, states.acc)
    unread = cycles()
    spent = scratch.spent[w]
    spent[1] += unread - mark
    _clear(acc, total, tilt)
    whole = masses.whole[b, h * G : h * G + G]
    floor = np.empty(G, F)
    for g in range(G):
        top[g] = peak[g]
        floor[g] = CODE_FLOOR * F(n) / whole[g]
    if how.tail:
        spent[4] += _add_codes(
            b, h, first, last, lists, asked.spread[b, h * G : h * G + G], floor, scratch, acc, total, tilt, lanes
        )
        _lean(tilt, q, cross[b, h], how.beta, acc, lanes)
    store_state(2 * parts + part, b, h, acc, top, total, states.top, states.total, states.acc)
    coded = cycles()
    spent[2] += coded - unread
    _clear(acc, total, tilt)
    if how.tail:
        spent[4] += _add_summaries(
            b, h, part, lists, supers, how, asked.two_level[b], whole, scratch, acc, total, tilt, lanes
        )
        _lean(tilt, q, cross[b, h], how.beta, acc, lanes)
    store_state(3 * parts + part, b, h, acc, top, total, states.top, states.total, states.acc)
    spent[3] += cycles() - coded
