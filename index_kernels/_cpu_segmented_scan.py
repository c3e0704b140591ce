"""attend_segmented on the CPU, up to the choice of rows: scan, open super-lists, score lists, then codes, choose.

The work of each KV head is cut into one part per thread. Functions named _part answer for one; others run once.
"""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np

from ._cpu_code_vectors import score_codes, weigh_codes
from ._cpu_common import NEG, TILE, F, exp32, inner, load_query, scan_range, softcapped, store_state
from ._cpu_list_steps import BUCKETS, bucket_of, choose, correct, cycles, rank_entries, rescale, threshold
from ._cpu_seal_lists import code_signs, round_to_int8, turn_for_codes
from ._cpu_segmented_types import LISTS_READ, LISTS_SCORED, ROWS_CODED, ROWS_READ, SUPERS_SCORED
from ._cpu_vectors import add_rows, prefetch, score_rows
from .packed import NOISE_DIVISOR

# Lists stand anywhere: one is asked for so many before it is read.
AHEAD = 2


@inner
def ask(query, weight, scale, how, start, shape, asked, heads, ck, width):
    """Fill in the query ``[B, Hq, D]`` as the phases take it, and whether super-lists are opened."""
    B, H, G, D = asked.query.shape
    scaled, turned, steps = asked.query, asked.turned, asked.steps
    copy, signs, one, two = np.empty(D, F), code_signs(D), np.empty(D, F), np.empty(D, F)
    for b in range(B):
        asked.start[b] = start[b]
        asked.two_level[b] = how.opened < H * (how.sealed - start[b] - how.n_sink)
        for h in range(H):
            q = scaled[b, h]
            load_query(query, b, h, scale, q)
            for g in range(G):
                square = F(0.0)
                for d in range(D):
                    copy[d] = q[g, d]
                    square += q[g, d] * q[g, d]
                steps[b, h, g, 2] = square / F(NOISE_DIVISOR)
                turn_for_codes(copy, signs, one, two)
                unit = round_to_int8(copy, turned[b, h, g])
                count = np.int32(0)
                for d in range(D):
                    count += turned[b, h, g, d]
                steps[b, h, g, 0] = unit
                steps[b, h, g, 1] = F(8 * count)
            product = np.zeros((G, D), F)
            add_rows(q, 0, D, shape[b, h], 0, D, D, product, heads, ck, width)
            for g in range(G):
                x = F(0.0)
                for d in range(D):
                    x += product[g, d] * q[g, d]
                i = h * G + g
                asked.spread[b, i] = max(x, F(1e-12))
                asked.weight[i] = weight[i]
                asked.pull[b, i] = weight[i] * np.sqrt(asked.spread[b, i])


@inner
def scan_part(w, asked, keys, values, lists, supers, how, scratch, states, heads, ck, cv, width):
    """One part of one KV head: sinks and hot rows exactly, super-lists (in a small store all lists) by mean key."""
    began = cycles()
    lanes = (heads, ck, cv, width)
    B, H, G, _ = asked.query.shape
    BH = B * H
    parts = how.parts
    part = w // BH
    b = (w % BH) // H
    h = w % H
    q = asked.query[b, h]
    start = asked.start[b]
    key_at = b * keys.batch + h * keys.head
    value_at = b * values.batch + h * values.head
    logits = np.empty((G, TILE), F)
    acc = np.zeros((G, states.acc.shape[3]), F)
    top = np.full(G, NEG, F)
    total = np.zeros(G, F)
    if part == 0:
        n = min(how.n_sink, how.length - start)
        scan_range(
            q, keys.memory, values.memory, key_at + start * keys.row, value_at + start * values.row, keys.row,
            values.row, n, how.softcap, logits, acc, top, total, lanes,
        )  # fmt: skip
    first = max(how.sealed, start + how.n_sink)
    n = max(0, how.length - first)
    lo = first + n * part // parts
    hi = first + n * (part + 1) // parts
    scan_range(
        q, keys.memory, values.memory, key_at + lo * keys.row, value_at + lo * values.row, keys.row, values.row,
        hi - lo, how.softcap, logits, acc, top, total, lanes,
    )  # fmt: skip
    store_state(part, b, h, acc, top, total, states.top, states.total, states.acc)
    mark = cycles()
    spent = scratch.spent[w]
    spent[0] = mark - began
    spread = asked.spread[b, h * G : h * G + G]
    if asked.two_level[b]:
        logit, key, variance = scratch.super_logit[b, h], supers.key[b, h], supers.variance[b, h]
        n = supers.used[b, h]
        lo = n * part // parts
        hi = n * (part + 1) // parts
    else:
        logit, key, variance = scratch.logit[b, h], lists.key[b, h], lists.variance[b, h]
        n = lists.used[b, h]
        lo = n * part // parts
        hi = n * (part + 1) // parts
        place, rows, own = scratch.id[b, h], scratch.size[b, h], scratch.variance[b, h]
        size = lists.size[b, h]
        for i in range(lo, hi):
            place[i] = i
            rows[i] = size[i]
            own[i] = variance[i]
    row = key.shape[1]
    score_rows(q, 0, key, lo * row, row, hi - lo, logit, lo, logit.shape[1], heads, ck, width)
    correct(logit, variance, spread, lo, hi, how.alpha, how.softcap)
    spent[1] = cycles() - mark
    spent[2] = 0
    spent[3] = 0
    spent[4] = 0


@inner
def hot_masses(states, parts, masses):
    """Peak and mass of sinks and hot rows, from their parts' states; no super-lists weigh anything yet."""
    B, Hq = states.top.shape[1:]
    for b in range(B):
        for i in range(Hq):
            peak = NEG
            for p in range(parts):
                peak = max(peak, states.top[p, b, i])
            mass = F(0.0)
            for p in range(parts):
                mass += states.total[p, b, i] * exp32(states.top[p, b, i] - peak)
            masses.peak[b, i] = peak
            masses.hot[b, i] = mass
            masses.supers[b, i] = F(0.0)


@inner
def open_supers(asked, supers, how, masses, scratch):
    """Choose the super-lists to open, best first, and lay their lists' places out behind each other."""
    B, H, G, _ = asked.query.shape
    mass = np.empty(G, F)
    old = np.empty(G, F)
    for b in range(B):
        if not asked.two_level[b]:
            continue
        for h in range(H):
            lo, hi = h * G, h * G + G
            peak, hot = masses.peak[b, lo:hi], masses.hot[b, lo:hi]
            rest, whole = masses.supers[b, lo:hi], masses.whole[b, lo:hi]
            for g in range(G):
                old[g] = peak[g]
            count = supers.used[b, h]
            rescale(scratch.super_logit[b, h], supers.size[b, h], count, peak, mass)
            for g in range(G):
                hot[g] *= exp32(old[g] - peak[g])
                rest[g] = mass[g]
                whole[g] = hot[g] + mass[g]
            rank_entries(
                scratch.super_logit[b, h], supers.variance[b, h], asked.pull[b, lo:hi], whole, count,
                scratch.super_rank[b, h],
            )  # fmt: skip
        choose(
            scratch.super_rank, supers.size, b, supers.used, how.opened, scratch.super_taken, scratch.super_chosen,
            scratch.super_count,
        )  # fmt: skip
        for h in range(H):
            first, size, weight = supers.first[b, h], supers.size[b, h], scratch.super_logit[b, h]
            chosen, offset, rest = scratch.super_chosen[b, h], scratch.super_offset[b, h], masses.supers[b]
            places = 0
            for j in range(scratch.super_count[b, h]):
                i = chosen[j]
                offset[j] = places
                places += first[i + 1] - first[i]
                for g in range(G):
                    rest[h * G + g] -= weight[g, i] * F(size[i])
            scratch.total[b, h] = places


@inner
def score_part(w, asked, lists, supers, how, scratch, heads, ck, width):
    """One part of one KV head: score the lists under opened super-lists."""
    B, H, G, _ = asked.query.shape
    part = w // (B * H)
    b = (w % (B * H)) // H
    h = w % H
    if not asked.two_level[b]:
        return
    q, key, size, variance = asked.query[b, h], lists.key[b, h], lists.size[b, h], lists.variance[b, h]
    place, rows, own, logit = scratch.id[b, h], scratch.size[b, h], scratch.variance[b, h], scratch.logit[b, h]
    row = key.shape[1]
    opened = scratch.super_count[b, h]
    for j in range(opened * part // how.parts, opened * (part + 1) // how.parts):
        i = scratch.super_chosen[b, h, j]
        to = np.int64(scratch.super_offset[b, h, j])
        lo = np.int64(supers.first[b, h, i])
        n = supers.first[b, h, i + 1] - lo
        score_rows(q, 0, key, lo * row, row, n, logit, to, logit.shape[1], heads, ck, width)
        for e in range(n):
            place[to + e] = lo + e
            rows[to + e] = size[lo + e]
            own[to + e] = variance[lo + e]
        correct(logit, own, asked.spread[b, h * G : h * G + G], to, to + n, how.alpha, how.softcap)


@inner
def choose_lists(asked, lists, supers, how, masses, scratch, stats):
    """Choose the lists to open under the budget, over the KV heads of a batch row together; counts go to stats."""
    B, H, G, _ = asked.query.shape
    mass = np.empty(G, F)
    old = np.empty(G, F)
    for b in range(B):
        for h in range(H):
            lo, hi = h * G, h * G + G
            peak, hot = masses.peak[b, lo:hi], masses.hot[b, lo:hi]
            rest, whole = masses.supers[b, lo:hi], masses.whole[b, lo:hi]
            if not asked.two_level[b]:
                scratch.total[b, h] = lists.used[b, h]
            count = scratch.total[b, h]
            for g in range(G):
                old[g] = peak[g]
            rescale(scratch.logit[b, h], scratch.size[b, h], count, peak, mass)
            for g in range(G):
                shrink = exp32(old[g] - peak[g])
                hot[g] *= shrink
                rest[g] = max(rest[g] * shrink, F(0.0))
                whole[g] = hot[g] + rest[g] + mass[g]
                if asked.two_level[b] and shrink < F(1.0):
                    weight = scratch.super_logit[b, h, g]
                    for j in range(supers.used[b, h]):
                        weight[j] *= shrink
            rank_entries(
                scratch.logit[b, h], scratch.variance[b, h], asked.pull[b, lo:hi], whole, count, scratch.rank[b, h]
            )
        counts = stats[b]
        counts[ROWS_CODED] = choose(
            scratch.rank, scratch.size, b, scratch.total, how.coded, scratch.taken, scratch.chosen, scratch.count
        )
        counts[LISTS_READ] = 0
        counts[LISTS_SCORED] = 0
        counts[SUPERS_SCORED] = 0
        for h in range(H):
            rows = 0
            for j in range(scratch.count[b, h]):
                scratch.row_at[b, h, j] = rows
                rows += scratch.size[b, h, scratch.chosen[b, h, j]]
            counts[LISTS_READ] += scratch.count[b, h]
            counts[LISTS_SCORED] += scratch.total[b, h]
            if asked.two_level[b]:
                counts[SUPERS_SCORED] += supers.used[b, h]


@inner
def code_part(w, asked, lists, codes, how, masses, scratch, heads, ck, width, code_chunks, code_width):
    """One part of one KV head: logits of the rows of its share of the chosen lists from their codes, and their ranks.

    A row's rank is its share of the softmax, weighted and summed over the group. Sums over the rows of a list, of
    weights and of weights times residual logits, stand ready for those that are not read.
    """
    began = cycles()
    B, H, G, _ = asked.query.shape
    part = w // (B * H)
    b = (w % (B * H)) // H
    h = w % H
    q, turned, steps = asked.query[b, h], asked.turned[b, h], asked.steps[b, h]
    key, begin, size, own = lists.key[b, h], lists.begin[b, h], lists.size[b, h], codes[b, h]
    mean, logit, rank, bins = (
        scratch.mean[b, h],
        scratch.row_logit[b, h],
        scratch.row_rank[b, h],
        scratch.row_bins[b, h],
    )
    sums, leans, peak = scratch.sum[b, h], scratch.lean[b, h], masses.peak[b, h * G : h * G + G]
    share = np.empty(G, F)
    for g in range(G):
        share[g] = asked.weight[h * G + g] / masses.whole[b, h * G + g]
    row, of_lists, of_rows, bytes_ = key.shape[1], mean.shape[1], logit.shape[1], own.shape[1]
    bins[part] = 0
    n = scratch.count[b, h]
    last = n * (part + 1) // how.parts
    for j in range(n * part // how.parts, last):
        if j + AHEAD < last:
            i = np.int64(scratch.id[b, h, scratch.chosen[b, h, j + AHEAD]])
            prefetch(key, i * row, row)
            prefetch(own, begin[i] * bytes_, size[i] * bytes_)
        i = np.int64(scratch.id[b, h, scratch.chosen[b, h, j]])
        at = np.int64(scratch.row_at[b, h, j])
        rows = np.int64(size[i])
        score_rows(q, 0, key, i * row, row, 1, mean, j, of_lists, heads, ck, width)
        score_codes(
            turned, steps, own, begin[i] * bytes_, bytes_, rows, mean, j, of_lists, logit, at, of_rows,
            heads, code_chunks, code_width,
        )  # fmt: skip
        if how.softcap > F(0.0):
            for g in range(G):
                mean[g, j] = softcapped(mean[g, j], how.softcap)
                for e in range(at, at + rows):
                    logit[g, e] = softcapped(logit[g, e], how.softcap)
        weigh_codes(logit, at, of_rows, rows, mean, j, of_lists, peak, share, rank, sums, leans, of_lists, heads)
        for e in range(at, at + rows):
            bins[part, bucket_of(rank[e])] += 1
    scratch.spent[w, 1] += cycles() - began


@inner
def choose_rows(how, masses, scratch, stats):
    """Choose the rows to read under the budget, over the KV heads of a batch row together: the highest ranks, as
    ``choose`` does, but of a threshold; the parts take theirs. From here on the weight of opened lists is what their
    codes say, no more what their summaries did."""
    H, G = scratch.sum.shape[1:3]
    for b in range(stats.shape[0]):
        for h in range(H):
            size, chosen = scratch.size[b, h], scratch.chosen[b, h]
            for g in range(G):
                weight, sums = scratch.logit[b, h, g], scratch.sum[b, h, g]
                opened = F(0.0)
                coded = F(0.0)
                for j in range(scratch.count[b, h]):
                    opened += weight[chosen[j]] * F(size[chosen[j]])
                    coded += sums[j]
                i = h * G + g
                rest = max(masses.whole[b, i] - masses.hot[b, i] - opened, F(0.0))
                masses.whole[b, i] = masses.hot[b, i] + coded + rest
        histogram = np.zeros(BUCKETS, np.int64)
        for h in range(H):
            for part in range(how.parts):
                for i in range(BUCKETS):
                    histogram[i] += scratch.row_bins[b, h, part, i]
        cut, left = threshold(histogram, how.read)
        scratch.row_cut[b] = cut
        for h in range(H):
            for part in range(how.parts):
                more = min(left, np.int64(scratch.row_bins[b, h, part, cut - 1])) if cut > 0 else np.int64(0)
                scratch.row_more[b, h, part] = more
                left -= more
        stats[b, ROWS_READ] = how.read - left
