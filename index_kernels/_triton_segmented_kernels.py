"""Kernels of attend_segmented in Triton: score, rank, lay out, attend, merge. No count is read by the host.

The query heads of a group are the rows of one matrix, padded to 16, so that summaries and rows are read once for all of
them by the tensor cores. Units are KV heads of all batch rows; ``HQ`` counts query heads of all batch rows. With two
levels the first ranking is of super-lists; lists of the best ones become candidates, which ``names`` lists by unit, and
what follows goes by a candidate's place there.

No program waits for another: the cut of a histogram is made by each that lays out what is opened.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import triton
import triton.language as tl

from ._triton_common import load_rows, rows_of, scaled, softcapped
from .lists import FREEZES, LOG_ROWS

# Costs are ranked by the exponent and 5 more bits of their float32: 32 bins an octave, from 2**-26 to 2**6.
BINS = 1024
LEAST_EXPONENT = -26
# Histograms of a batch row: of lists, of rows of opened lists, of super-lists.
OF_LISTS, OF_ROWS, OF_SUPERS, HISTOGRAMS = 0, 1, 2, 3
# A pack is the bin of an entry above what it holds: rows of a list, lists of a super-list.
HELD_BITS = 20
# States of parts whose log-sum-exps the ranking adds up: of summaries, and of sinks and hot rows.
MOST_PARTS = 64
MOST_HOT_PARTS = 16
_BIN_BITS = tl.constexpr(5)
_FIRST_BIN = tl.constexpr((127 + LEAST_EXPONENT) << 5)
_HISTOGRAMS, _APART = tl.constexpr(HISTOGRAMS), tl.constexpr(64)
_HELD_BITS = tl.constexpr(HELD_BITS)
_HELD = tl.constexpr((1 << HELD_BITS) - 1)
_NEG = tl.constexpr(float("-inf"))
_FREEZES, _LOG_ROWS = tl.constexpr(FREEZES), tl.constexpr(LOG_ROWS)


@triton.jit
def times(x, y, DOT: tl.constexpr):
    """``x @ y`` in DOT, summed in float32."""
    if tl.float32 == DOT:
        return tl.dot(x.to(DOT), y.to(DOT), input_precision="tf32x3")
    return tl.dot(x.to(DOT), y.to(DOT))


@triton.jit
def weigh(peak, logits):
    """Online softmax of logits ``[M, N]``: the new peak, what older sums decay by, and the weights."""
    new = tl.maximum(peak, tl.max(logits, axis=1))
    # While no row was seen the peak is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new == _NEG, 0.0, new)
    return new, tl.exp(peak - shift), tl.exp(logits - shift[:, None])


@triton.jit
def log_sum(peak, mass):
    return peak + tl.log(tl.where(mass == 0, 1.0, mass))


@triton.jit
def fold_rows(peak, mass, acc, x, row, used, keys, values, kt, vt, scale, softcap,
              DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
              DOT: tl.constexpr):  # fmt: skip
    """Fold the rows ``row [N]`` of one KV head into a state of the group's heads."""
    k = load_rows(keys, row, used, kt, DIM, BLOCK_D)
    v = load_rows(values, row, used, vt, VALUE_DIM, BLOCK_DV)
    s = scaled(times(x, tl.trans(k), DOT) * scale, keys, row, used, kt, DIM)
    if softcap is not None:
        s = softcapped(s, softcap)
    peak, decay, w = weigh(peak, tl.where(used[None, :], s, _NEG))
    mass = mass * decay + tl.sum(w, axis=1)
    return peak, mass, acc * decay[:, None] + times(scaled(w, values, row, used, vt, VALUE_DIM), v, DOT)


@triton.jit
def store_state(outs, lses, state, head, live, peak, mass, acc, HQ, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr):
    """What has no weight is not written: it is not read either."""
    e = tl.arange(0, BLOCK_DV)
    at = state.to(tl.int64) * HQ + head
    out = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    stored = (live & (mass > 0))[:, None] & (e < VALUE_DIM)[None, :]
    tl.store(outs + at[:, None] * VALUE_DIM + e[None, :], out, mask=stored)
    tl.store(lses + at, log_sum(peak, mass), mask=live)


@triton.jit
def bin_of(cost, NUM_BINS: tl.constexpr):
    """The bin of a cost, by its leading bits; 0 is of what hardly matters."""
    found = (cost.to(tl.int32, bitcast=True) >> (23 - _BIN_BITS)) - _FIRST_BIN
    return tl.minimum(tl.maximum(found, 0), NUM_BINS - 1)


@triton.jit
def count_at(histogram, b, found, WHICH: tl.constexpr, NUM_BINS: tl.constexpr):
    """Where a bin's rows are counted: bins that are next to each other, which many add to at once, stand apart."""
    place = found % _APART * (NUM_BINS // _APART) + found // _APART
    return histogram + (b * _HISTOGRAMS + WHICH) * NUM_BINS + place


@triton.jit
def cut_of(histogram, b, budget, least_bin, WHICH: tl.constexpr, NUM_BINS: tl.constexpr):
    """From which bin on no more than the budget is in all of a batch row; and what each bin and those above hold."""
    above = tl.cumsum(tl.load(count_at(histogram, b, tl.arange(0, NUM_BINS), WHICH, NUM_BINS)), reverse=True)
    return tl.maximum(tl.sum((above > budget).to(tl.int32), axis=0), least_bin), above


@triton.jit
def add_taken(totals, b, above, budget):
    """Count what the cut lets in; called by one program of a batch row."""
    taken = tl.max(tl.where(above <= budget, above, 0), axis=0)
    tl.store(totals + b, tl.load(totals + b) + taken)


@triton.jit
def share_of(total, part, parts):
    """Where one of as many equal parts begins and ends."""
    share = tl.cdiv(total, parts)
    lo = tl.minimum(part * share, total)
    return lo, tl.minimum(lo + share, total)


@triton.jit
def _entries(packs, begin, names, unit, L, entry, stop):
    """Packs of entries, and where what they hold begins."""
    packed = tl.load(packs + unit * L + entry, mask=entry < stop, other=0)
    name = entry
    if names is not None:
        name = tl.load(names + unit * L + entry, mask=entry < stop, other=0)
    return packed, tl.load(begin + unit * L + name, mask=entry < stop, other=0)


@triton.jit
def _held_if_opened(packed, lowest):
    return tl.where((packed >> _HELD_BITS) >= lowest, packed & _HELD, 0)


@triton.jit(do_not_specialize=["budget", "least_bin", "capacity"])
def lay_kernel(
    packs, begin, names, counts, ids, owners, ends, histogram, cut, totals, budget, least_bin, H, L, capacity,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr, WHICH: tl.constexpr, NUM_BINS: tl.constexpr,
):  # fmt: skip
    """Per (unit, part of the entries): the ids of what opened ones hold, one behind the other; how many, as ``ends``.

    Entries are those of a unit's ``packs``; of ``begin`` those that ``names`` says, where there are any. ids and
    ``owners`` (of which entry they are, where wanted) are ``[units, capacity]``.
    """
    unit = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    count = L
    if counts is not None:
        count = tl.load(counts + unit)
    share = tl.cdiv(tl.cdiv(count, parts), BLOCK) * BLOCK
    lo = tl.minimum(part * share, count)
    hi = tl.minimum(lo + share, count)
    # Asked for before the cut is known.
    entry = lo + tl.arange(0, BLOCK)
    packed, start = _entries(packs, begin, names, unit, L, entry, hi)
    chunk = tl.arange(0, CHUNK)
    earlier = tl.load(packs + unit * L + chunk, mask=chunk < lo, other=0)
    lowest, above = cut_of(histogram, unit // H, budget, least_bin, WHICH, NUM_BINS)
    if (part == 0) & (unit % H == 0):
        tl.store(cut + unit // H, lowest)
        if totals is not None:
            add_taken(totals, unit // H, above, budget)
    before = tl.sum(_held_if_opened(earlier, lowest), axis=0)
    for first in range(CHUNK, lo, CHUNK):
        earlier = tl.load(packs + unit * L + first + chunk, mask=first + chunk < lo, other=0)
        before += tl.sum(_held_if_opened(earlier, lowest), axis=0)
    ids += unit * capacity
    r = tl.arange(0, RUN)
    for _ in range(lo, hi, BLOCK):
        held = _held_if_opened(packed, lowest)
        place = before + tl.cumsum(held) - held
        for begun in range(0, tl.max(held, axis=0), RUN):
            run = begun + r
            to = place[:, None] + run[None, :]
            inside = run[None, :] < held[:, None]
            tl.store(ids + to, start[:, None] + run[None, :], mask=inside)
            if owners is not None:
                tl.store(owners + unit * capacity + to, entry[:, None] + tl.zeros([BLOCK, RUN], tl.int32), mask=inside)
        before += tl.sum(held, axis=0)
        entry += BLOCK
        packed, start = _entries(packs, begin, names, unit, L, entry, hi)
    if part == parts - 1:
        tl.store(ends + unit, before)


@triton.jit
def _held(variance):
    """See lists.held."""
    return tl.where(variance < _FREEZES, variance, (tl.sqrt(variance * _FREEZES) - _LOG_ROWS) * 2)


@triton.jit
def _summaries(key, key_scale, variance, size, at, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the entries ``at [N]``: mean keys and their scales, variances, rows; asked for at once, and before needed."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(key + at[:, None] * DIM + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0)
    unit_of_key = tl.load(key_scale + at, mask=inside, other=0.0)
    return k, unit_of_key, tl.load(variance + at, mask=inside, other=0.0), tl.load(size + at, mask=inside, other=0)


@triton.jit
def _summary_logits(x, k, unit_of_key, varies, its_variance, rows, scale, softcap, alpha, DOT: tl.constexpr):
    """Products with mean keys ``[M, N]``, and logits of summaries, -inf where unused."""
    mean = times(x, tl.trans(k), DOT) * scale * unit_of_key[None, :]
    scatter = varies[:, None] * its_variance[None, :]
    s = mean
    if softcap is not None:
        s = softcapped(s, softcap)
        slope = 1 - (s / softcap) * (s / softcap)
        scatter *= slope * slope
    return mean, tl.where((rows > 0)[None, :], s + alpha * _held(scatter), _NEG)


@triton.jit(do_not_specialize=["parts", "hot_state", "sealed", "length", "n_sink"])
def score_kernel(
    query, keys, values, kb, kh, kt, vb, vh, vt, start, newest,
    key, key_scale, variance, size, shape, cross,
    logits, spread, part_lse, lean, outs, lses,
    means, scale, softcap, alpha, beta, H, G, L, HQ, parts, hot_state, sealed, length, n_sink,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, part): logits of summaries and their log-sum-exp; from ``parts`` on sinks and hot rows; last, lean.

    ``newest [1]``: where the device knows better than ``length`` which row is the newest.
    """
    unit = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if newest is not None:
        length = tl.load(newest).to(tl.int32) + 1
    g, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
    live = g < G
    head = unit * G + g
    x = tl.load(query + head[:, None] * DIM + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
    peak = tl.full([M], _NEG, tl.float32)
    mass = tl.zeros([M], tl.float32)
    c = tl.arange(0, COLUMNS)
    if part < parts:
        varies = tl.zeros([M], tl.float32)
        column = part * BLOCK + tl.arange(0, BLOCK)
        k, unit_of_key, its_variance, rows = _summaries(
            key, key_scale, variance, size, unit * L + column, column < L, DIM, BLOCK_D
        )
        for d0 in range(0, DIM, COLUMNS):
            inside = d0 + c < DIM
            s_at = shape + unit * DIM * DIM + d[:, None] * DIM + (d0 + c)[None, :]
            s = tl.load(s_at, mask=(d < DIM)[:, None] & inside[None, :], other=0.0)
            other = tl.load(
                query + head[:, None] * DIM + (d0 + c)[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            varies += tl.sum(times(x, s, DOT) * other.to(tl.float32), axis=1)
        varies = tl.maximum(varies * scale * scale, 1e-12)
        if part == 0:
            tl.store(spread + head, varies, mask=live)
        for _ in range(part * BLOCK, L, parts * BLOCK):
            mean, s = _summary_logits(x, k, unit_of_key, varies, its_variance, rows, scale, softcap, alpha, DOT)
            to = head[:, None] * L + column[None, :]
            if means is not None:
                tl.store(means + to, mean, mask=live[:, None] & (column < L)[None, :])
            tl.store(logits + to, s, mask=live[:, None] & (column < L)[None, :])
            peak, decay, w = weigh(peak, s)
            mass = mass * decay + tl.sum(w * rows[None, :].to(tl.float32), axis=1)
            column += parts * BLOCK
            k, unit_of_key, its_variance, rows = _summaries(
                key, key_scale, variance, size, unit * L + column, column < L, DIM, BLOCK_D
            )
        tl.store(part_lse + part * HQ + head, log_sum(peak, mass), mask=live)
    elif part == tl.num_programs(1) - 1:
        for e0 in range(0, VALUE_DIM, COLUMNS):
            inside = e0 + c < VALUE_DIM
            c_at = cross + unit * DIM * VALUE_DIM + d[:, None] * VALUE_DIM + (e0 + c)[None, :]
            y = tl.load(c_at, mask=(d < DIM)[:, None] & inside[None, :], other=0.0)
            toward = times(x, y, DOT) * (scale * beta)
            tl.store(lean + head[:, None] * VALUE_DIM + (e0 + c)[None, :], toward, mask=live[:, None] & inside[None, :])
    else:
        mine = part - parts
        begin = tl.load(start + unit // H)
        sinks = tl.maximum(tl.minimum(begin + n_sink, length) - begin, 0)
        hot = tl.minimum(tl.maximum(begin + n_sink, sealed), length)
        count = (sinks + length - hot).to(tl.int32)
        keys = rows_of(keys, unit // H, unit % H, kb, kh, DIM)
        values = rows_of(values, unit // H, unit % H, vb, vh, VALUE_DIM)
        acc = tl.zeros([M, BLOCK_DV], tl.float32)
        for first in range(mine * BLOCK, count, (tl.num_programs(1) - 1 - parts) * BLOCK):
            place = first + tl.arange(0, BLOCK)
            row = tl.where(place < sinks, begin + place, hot + place - sinks)
            peak, mass, acc = fold_rows(
                peak, mass, acc, x, row, place < count, keys, values, kt, vt, scale, softcap,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, DOT,
            )  # fmt: skip
        store_state(outs, lses, hot_state + mine, head, live, peak, mass, acc, HQ, VALUE_DIM, BLOCK_DV)
        tl.store(part_lse + part * HQ + head, log_sum(peak, mass), mask=live)


@triton.jit
def score_named_kernel(
    query, key, key_scale, variance, size, names, counts, super_size, super_packs, super_logits, super_cut, spread,
    logits, means, part_lse, scale, softcap, alpha, H, G, S, L, HQ,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, part): logits of the lists under opened super-lists, ``names [units, L]``, as many as ``counts`` says.

    And the log-sum-exp of these and of the other super-lists.
    """
    unit = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    g, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
    live = g < G
    head = unit * G + g
    lowest = tl.load(super_cut + unit // H)
    lo, hi = share_of(tl.load(counts + unit), part, parts)
    x = tl.load(query + head[:, None] * DIM + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
    varies = tl.load(spread + head, mask=live, other=0.0)
    peak = tl.full([M], _NEG, tl.float32)
    mass = tl.zeros([M], tl.float32)
    for first in range(lo, hi, BLOCK):
        place = first + tl.arange(0, BLOCK)
        used = place < hi
        at = unit * L + tl.load(names + unit * L + place, mask=used, other=0)
        k, unit_of_key, its_variance, rows = _summaries(key, key_scale, variance, size, at, used, DIM, BLOCK_D)
        mean, s = _summary_logits(x, k, unit_of_key, varies, its_variance, rows, scale, softcap, alpha, DOT)
        to = head[:, None] * L + place[None, :]
        if means is not None:
            tl.store(means + to, mean, mask=live[:, None] & used[None, :])
        tl.store(logits + to, s, mask=live[:, None] & used[None, :])
        peak, decay, w = weigh(peak, s)
        mass = mass * decay + tl.sum(w * rows[None, :].to(tl.float32), axis=1)
    for first in range(part * BLOCK, S, parts * BLOCK):
        entry = first + tl.arange(0, BLOCK)
        packed = tl.load(super_packs + unit * S + entry, mask=entry < S, other=0)
        unread = ((packed & _HELD) > 0) & ((packed >> _HELD_BITS) < lowest)
        rows = tl.load(super_size + unit * S + entry, mask=entry < S, other=0)
        s = tl.load(super_logits + head[:, None] * S + entry[None, :], mask=live[:, None] & unread[None, :], other=_NEG)
        peak, decay, w = weigh(peak, s)
        mass = mass * decay + tl.sum(w * rows[None, :].to(tl.float32), axis=1)
    tl.store(part_lse + part * HQ + head, log_sum(peak, mass), mask=live)


@triton.jit
def _ranked(logits, variance, size, held, names, unit, head, live, L, entry, count):
    """Of entries: rows, what they hold, variances, and logits ``[G, N]``."""
    inside = entry < count
    name = entry
    if names is not None:
        name = tl.load(names + unit * L + entry, mask=inside, other=0)
    at = unit * L + name
    rows = tl.load(size + at, mask=inside, other=0)
    holds = rows
    if held is not None:
        holds = tl.load(held + at, mask=inside, other=0)
    s = tl.load(logits + head[:, None] * L + entry[None, :], mask=live[:, None] & inside[None, :], other=_NEG)
    return rows, holds, tl.load(variance + at, mask=inside, other=0.0), s


@triton.jit(do_not_specialize=["parts", "least_bin"])
def rank_kernel(
    logits, variance, size, held, names, counts, spread, weights, part_lse, packs, histogram, wholes, least_bin,
    H, G, L, HQ, parts,
    GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, WHICH: tl.constexpr, NUM_BINS: tl.constexpr,
):  # fmt: skip
    """Per (unit, part of the entries): what they cost unread, as ``packs``, and rows by bin.

    Bin 0 is of lists that hardly matter: they are opened only where all are, and ``least_bin`` is 0. ``wholes``: the
    log of all weight of each head, as far as summaries, sinks and hot rows tell, less that of the head's own weight.
    """
    unit = tl.program_id(0).to(tl.int64)
    b = unit // H
    g, p = tl.arange(0, GROUP), tl.arange(0, PARTS)
    live = g < G
    head = unit * G + g
    count = L
    if counts is not None:
        count = tl.load(counts + unit)
    # Asked for before the weight of all is known.
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows, holds, its_variance, s = _ranked(logits, variance, size, held, names, unit, head, live, L, entry, count)
    lse = tl.load(part_lse + p[:, None] * HQ + head[None, :], mask=(p < parts)[:, None] & live[None, :], other=_NEG)
    peak = tl.max(lse, axis=0)
    peak = tl.where(peak == _NEG, 0.0, peak)
    whole = tl.where(live, log_sum(peak, tl.sum(tl.exp(lse - peak[None, :]), axis=0)), 0.0)
    deviation = tl.sqrt(tl.load(spread + head, mask=live, other=0.0))
    shared = whole
    if weights is not None:
        weight = tl.load(weights + unit % H * G + g, mask=live, other=1.0)
        deviation *= weight
        shared -= tl.log(weight)
    if wholes is not None:  # noqa: SIM102 (one is known when it is compiled)
        if tl.program_id(1) == 0:
            tl.store(wholes + head, shared, mask=live)
    for _ in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        cost = tl.sum(tl.exp(s - whole[:, None]) * deviation[:, None], axis=0) * tl.sqrt(its_variance)
        found = bin_of(cost, NUM_BINS)
        pack = tl.where(rows > 0, (found << _HELD_BITS) | holds, 0)
        tl.store(packs + unit * L + entry, pack, mask=entry < count)
        counted = (rows > 0) & (found >= least_bin)
        tl.atomic_add(count_at(histogram, b, found, WHICH, NUM_BINS), rows, mask=counted, sem="relaxed")
        entry += tl.num_programs(1) * BLOCK
        rows, holds, its_variance, s = _ranked(logits, variance, size, held, names, unit, head, live, L, entry, count)


@triton.jit
def _fold_summaries(peak, mass, acc, tilt, logits, packs, names, size, variance, value, value_scale,
                    unit, head, live, L, count, lowest, part, parts,
                    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, SUMMARIES: tl.constexpr,
                    DOT: tl.constexpr):  # fmt: skip
    """Fold one part of the entries that were not opened into a state; ``tilt`` sums their variances by weight."""
    e, lane = tl.arange(0, BLOCK_DV), tl.arange(0, SUMMARIES)
    for first in range(part * SUMMARIES, count, parts * SUMMARIES):
        entry = first + lane
        inside = entry < count
        packed = tl.load(packs + unit * L + entry, mask=inside, other=0)
        unread = ((packed & _HELD) > 0) & ((packed >> _HELD_BITS) < lowest)
        name = entry
        if names is not None:
            name = tl.load(names + unit * L + entry, mask=inside, other=0)
        at = unit * L + name
        rows = packed & _HELD
        if size is not None:
            rows = tl.load(size + at, mask=inside, other=0)
        # Nothing waits for which lists are unread: the others weigh nothing.
        s = tl.load(logits + head[:, None] * L + entry[None, :], mask=live[:, None] & inside[None, :], other=_NEG)
        v = tl.load(
            value + at[:, None] * VALUE_DIM + e[None, :], mask=inside[:, None] & (e < VALUE_DIM)[None, :], other=0
        )
        unit_of_value = tl.load(value_scale + at, mask=inside, other=0.0)
        varies = tl.load(variance + at, mask=inside, other=0.0)
        s = tl.where(unread[None, :], s + tl.log(tl.maximum(rows, 1).to(tl.float32))[None, :], _NEG)
        peak, decay, w = weigh(peak, s)
        acc = acc * decay[:, None] + times(w * unit_of_value[None, :], v, DOT)
        mass = mass * decay + tl.sum(w, axis=1)
        tilt = tilt * decay + tl.sum(w * varies[None, :], axis=1)
    return peak, mass, acc, tilt


@triton.jit(do_not_specialize=["rows_stored", "capacity", "splits", "tails"])
def attend_kernel(
    query, keys, values, kb, kh, kt, vb, vh, vt,
    ids, ends, variance, value, value_scale, logits, packs, cut, names, counts,
    super_size, super_variance, super_value, super_value_scale, super_logits, super_packs, super_cut,
    lean, outs, lses, scale, softcap, H, G, S, L, HQ, rows_stored, capacity, splits, tails,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, SUMMARIES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, split): the rows of opened lists; from ``splits`` on the other lists by summary, then super-lists.

    One state each.
    """
    unit = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = unit // H
    g, e = tl.arange(0, M), tl.arange(0, BLOCK_DV)
    live = g < G
    head = unit * G + g
    peak = tl.full([M], _NEG, tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    if split < splits:
        total = tl.load(ends + unit)
        d = tl.arange(0, BLOCK_D)
        x_at = query + head[:, None] * DIM + d[None, :]
        x = tl.load(x_at, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
        keys = rows_of(keys, b, unit % H, kb, kh, DIM)
        values = rows_of(values, b, unit % H, vb, vh, VALUE_DIM)
        for first in range(split * BLOCK, total, splits * BLOCK):
            place = first + tl.arange(0, BLOCK)
            row = tl.load(ids + unit * capacity + place, mask=place < total, other=0)
            used = (place < total) & (row < rows_stored)
            peak, mass, acc = fold_rows(
                peak, mass, acc, x, row.to(tl.int64), used, keys, values, kt, vt, scale, softcap,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, DOT,
            )  # fmt: skip
    else:
        tilt = tl.zeros([M], tl.float32)
        part = split - splits
        if part < tails:
            count = L
            if counts is not None:
                count = tl.load(counts + unit)
            peak, mass, acc, tilt = _fold_summaries(
                peak, mass, acc, tilt, logits, packs, names, None, variance, value, value_scale,
                unit, head, live, L, count, tl.load(cut + b), part, tails, VALUE_DIM, BLOCK_DV, SUMMARIES, DOT,
            )  # fmt: skip
        elif super_packs is not None:
            peak, mass, acc, tilt = _fold_summaries(
                peak, mass, acc, tilt, super_logits, super_packs, None, super_size, super_variance, super_value,
                super_value_scale, unit, head, live, S, S, tl.load(super_cut + b), part - tails,
                tl.num_programs(1) - splits - tails, VALUE_DIM, BLOCK_DV, SUMMARIES, DOT,
            )  # fmt: skip
        toward = tl.load(
            lean + head[:, None] * VALUE_DIM + e[None, :], mask=live[:, None] & (e < VALUE_DIM)[None, :], other=0.0
        )
        acc += tilt[:, None] * toward
    store_state(outs, lses, split, head, live, peak, mass, acc, HQ, VALUE_DIM, BLOCK_DV)


@triton.jit(do_not_specialize=["codes", "summaries", "hot", "states"])
def merge_kernel(
    outs, lses, out, lse, by_source, histogram, codes, summaries, hot, states, heads, HQ,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, STATES: tl.constexpr, NUM_BINS: tl.constexpr,
):  # fmt: skip
    """Per (query head, part of the value): all states as one, and the log-sum-exp of each source.

    States are of rows of lists, from ``codes`` on of codes, from ``summaries`` on of summaries, from ``hot`` on of
    sinks and hot rows. ``histogram`` is zero again: nobody reads it any more. ``heads``: of a batch row.
    """
    head = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    state = tl.arange(0, STATES)
    there = state < states
    at = state.to(tl.int64) * HQ + head
    found = tl.load(lses + at, mask=there, other=_NEG)
    held = (found > _NEG)[:, None] & (e < VALUE_DIM)[None, :]
    v = tl.load(outs + at[:, None] * VALUE_DIM + e[None, :], mask=held, other=0.0)
    peak = tl.max(found, axis=0)
    peak = tl.where(peak == _NEG, 0.0, peak)
    weight = tl.exp(found - peak)
    mass = tl.sum(weight, axis=0)
    total = tl.sum(weight[:, None] * v, axis=0)
    tl.store(out + head * VALUE_DIM + e, total / tl.where(mass == 0, 1.0, mass), mask=e < VALUE_DIM)
    if tl.program_id(1) == 0:
        of_rows = tl.sum(tl.where(state < codes, weight, 0.0), axis=0)
        of_codes = tl.sum(tl.where((state >= codes) & (state < summaries), weight, 0.0), axis=0)
        of_hot = tl.sum(tl.where(state >= hot, weight, 0.0), axis=0)
        of_summaries = tl.sum(tl.where((state >= summaries) & (state < hot), weight, 0.0), axis=0)
        tl.store(lse + head, peak + tl.log(mass))
        tl.store(by_source + head, peak + tl.log(of_hot))
        tl.store(by_source + HQ + head, peak + tl.log(of_rows))
        tl.store(by_source + 2 * HQ + head, peak + tl.log(of_codes))
        tl.store(by_source + 3 * HQ + head, peak + tl.log(of_summaries))
        if head % heads == 0:
            counts = histogram + head // heads * _HISTOGRAMS * NUM_BINS + tl.arange(0, NUM_BINS)
            for which in tl.static_range(_HISTOGRAMS):
                tl.store(counts + which * NUM_BINS, tl.zeros([NUM_BINS], tl.int32))
