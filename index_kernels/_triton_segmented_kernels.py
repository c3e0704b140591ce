"""Kernels of attend_segmented in Triton: score, rank, attend, merge. No count is read by the host.

The query heads of a group are the rows of one matrix, padded to 16, so that summaries and rows are read once for all of
them by the tensor cores. Units are KV heads of all batch rows; ``HQ`` counts query heads of all batch rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import triton
import triton.language as tl

from ._triton_common import softcapped
from .lists import FREEZES, LOG_ROWS

# Costs are ranked by the exponent and 7 more bits of their float32: 128 bins an octave, from 2**-26 to 2**6.
BINS = 4096
LEAST_EXPONENT = -26
COPIES = 4
# States of parts whose log-sum-exps the ranking adds up: of summaries, and of sinks and hot rows.
MOST_PARTS = 64
MOST_HOT_PARTS = 16
# Splits of the opened lists, and of the others: with the parts of hot rows, no more than STATES to merge.
MOST_SPLITS = 128
MOST_TAILS = 32
STATES = 256
_FIRST_BIN = tl.constexpr((127 + LEAST_EXPONENT) << 7)
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
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k = tl.load(keys + row[:, None] * kt + d[None, :], mask=used[:, None] & (d < DIM)[None, :], other=0.0)
    v = tl.load(values + row[:, None] * vt + e[None, :], mask=used[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
    s = times(x, tl.trans(k), DOT) * scale
    if softcap is not None:
        s = softcapped(s, softcap)
    peak, decay, w = weigh(peak, tl.where(used[None, :], s, _NEG))
    return peak, mass * decay + tl.sum(w, axis=1), acc * decay[:, None] + times(w, v, DOT)


@triton.jit
def bin_of(cost, NUM_BINS: tl.constexpr):
    """The bin of a cost, by its leading bits; 0 is of what hardly matters."""
    found = (cost.to(tl.int32, bitcast=True) >> 16) - _FIRST_BIN
    return tl.minimum(tl.maximum(found, 0), NUM_BINS - 1)


@triton.jit
def find_cut(histogram, ticket, cut, totals, b, programs, budget, least_bin,
             NUM_BINS: tl.constexpr, COPIES: tl.constexpr):  # fmt: skip
    """In the last of a batch row's programs: from which bin on no more than the budget is in all, and is counted.

    The histogram, in COPIES so that programs seldom meet, and the ticket are zero before and after.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket + b, 1, sem="acq_rel")
    if arrived == programs - 1:
        counts = histogram + b * COPIES * NUM_BINS + tl.arange(0, NUM_BINS)
        above = tl.load(counts, volatile=True)
        for copy in tl.static_range(1, COPIES):
            above += tl.load(counts + copy * NUM_BINS, volatile=True)
        above = tl.cumsum(above, reverse=True)
        taken = tl.max(tl.where(above <= budget, above, 0))
        lowest = tl.sum((above > budget).to(tl.int32))
        tl.store(cut + b, tl.maximum(lowest, least_bin))
        tl.atomic_add(totals + b, taken.to(tl.int64), sem="relaxed")
        tl.debug_barrier()
        for copy in tl.static_range(COPIES):
            tl.store(counts + copy * NUM_BINS, tl.zeros([NUM_BINS], tl.int32))
        tl.store(ticket + b, 0)


@triton.jit
def _held(variance):
    """See lists.held."""
    return tl.where(variance < _FREEZES, variance, (tl.sqrt(variance * _FREEZES) - _LOG_ROWS) * 2)


@triton.jit(do_not_specialize=["parts", "hot_state", "sealed", "length", "n_sink"])
def score_kernel(
    query, keys, values, kb, kh, kt, vb, vh, vt, start,
    key, key_scale, variance, size, shape, cross,
    logits, spread, part_lse, lean, outs, lses,
    means, scale, softcap, alpha, beta, H, G, L, HQ, parts, hot_state, sealed, length, n_sink,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, part): logits of summaries and their log-sum-exp; from ``parts`` on sinks and hot rows; last, lean."""
    unit = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    g, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
    live = g < G
    head = unit * G + g
    x = tl.load(query + head[:, None] * DIM + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
    peak = tl.full([M], _NEG, tl.float32)
    mass = tl.zeros([M], tl.float32)
    c = tl.arange(0, COLUMNS)
    if part < parts:
        varies = tl.zeros([M], tl.float32)
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
        for first in range(part * BLOCK, L, parts * BLOCK):
            at = unit * L + first + tl.arange(0, BLOCK)
            rows = tl.load(size + at)
            k = tl.load(key + at[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0)
            s = times(x, tl.trans(k), DOT) * scale * tl.load(key_scale + at)[None, :]
            column = first + tl.arange(0, BLOCK)
            if means is not None:
                tl.store(means + head[:, None] * L + column[None, :], s, mask=live[:, None])
            scatter = varies[:, None] * tl.load(variance + at)[None, :]
            if softcap is not None:
                s = softcapped(s, softcap)
                slope = 1 - (s / softcap) * (s / softcap)
                scatter *= slope * slope
            s = tl.where((rows > 0)[None, :], s + alpha * _held(scatter), _NEG)
            tl.store(logits + head[:, None] * L + column[None, :], s, mask=live[:, None])
            peak, decay, w = weigh(peak, s)
            mass = mass * decay + tl.sum(w * rows[None, :].to(tl.float32), axis=1)
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
        keys += unit // H * kb + unit % H * kh
        values += unit // H * vb + unit % H * vh
        acc = tl.zeros([M, BLOCK_DV], tl.float32)
        for first in range(mine * BLOCK, count, (tl.num_programs(1) - 1 - parts) * BLOCK):
            place = first + tl.arange(0, BLOCK)
            row = tl.where(place < sinks, begin + place, hot + place - sinks)
            peak, mass, acc = fold_rows(
                peak, mass, acc, x, row, place < count, keys, values, kt, vt, scale, softcap,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, DOT,
            )  # fmt: skip
        e = tl.arange(0, BLOCK_DV)
        out = acc / tl.where(mass == 0, 1.0, mass)[:, None]
        state = (hot_state + mine).to(tl.int64) * HQ + head
        tl.store(outs + state[:, None] * VALUE_DIM + e[None, :], out, mask=live[:, None] & (e < VALUE_DIM)[None, :])
        lse = log_sum(peak, mass)
        tl.store(lses + state, lse, mask=live)
        tl.store(part_lse + part * HQ + head, lse, mask=live)


@triton.jit(do_not_specialize=["parts", "budget", "least_bin"])
def rank_kernel(
    logits, variance, size, spread, weights, part_lse, bins, histogram, ticket, cut, totals, wholes, budget,
    least_bin,
    H, G, L, HQ, parts,
    GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, NUM_BINS: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    """Per (unit, block of lists): bins of costs, and rows by bin; the last program of a batch row finds the cut.

    Bin 0 is of lists that hardly matter: they are opened only where all are, and ``least_bin`` is 0. ``wholes``: the
    log of all weight of each head, as far as summaries, sinks and hot rows tell, less that of the head's own weight.
    """
    unit = tl.program_id(0).to(tl.int64)
    b = unit // H
    g, p = tl.arange(0, GROUP), tl.arange(0, PARTS)
    live = g < G
    head = unit * G + g
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
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < L
    at = unit * L + entry
    rows = tl.load(size + at, mask=inside, other=0)
    s = tl.load(logits + head[:, None] * L + entry[None, :], mask=live[:, None] & (rows > 0)[None, :], other=_NEG)
    cost = tl.sum(tl.exp(s - whole[:, None]) * deviation[:, None], axis=0)
    cost *= tl.sqrt(tl.load(variance + at, mask=inside, other=0.0))
    found = bin_of(cost, NUM_BINS)
    tl.store(bins + at, tl.where(rows > 0, found, -1), mask=inside)
    counted = (rows > 0) & (found >= least_bin)
    mine = (unit + tl.program_id(1)) % COPIES
    tl.atomic_add(histogram + (b * COPIES + mine) * NUM_BINS + found, rows, mask=counted, sem="relaxed")
    find_cut(histogram, ticket, cut, totals, b, H * tl.num_programs(1), budget, least_bin, NUM_BINS, COPIES)


@triton.jit(do_not_specialize=["rows_stored", "splits"])
def attend_kernel(
    query, keys, values, kb, kh, kt, vb, vh, vt,
    begin, size, variance, value, value_scale, logits, bins, cut, lean, outs, lses,
    scale, softcap, H, G, L, HQ, rows_stored, splits,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    LISTS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, SUMMARIES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, split): the rows of opened lists; from ``splits`` on: the other lists by summary. One state each.

    Runs of RUN lists go to the splits in turn: neighbours are often opened together.
    """
    unit = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g, e = tl.arange(0, M), tl.arange(0, BLOCK_DV)
    live = g < G
    head = unit * G + g
    lowest = tl.load(cut + unit // H)
    peak = tl.full([M], _NEG, tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    stored = live[:, None] & (e < VALUE_DIM)[None, :]
    if split < splits:
        d = tl.arange(0, BLOCK_D)
        x_at = query + head[:, None] * DIM + d[None, :]
        x = tl.load(x_at, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
        keys += unit // H * kb + unit % H * kh
        values += unit // H * vb + unit % H * vh
        lane = tl.arange(0, LISTS)
        for i in range(0, tl.cdiv(L, splits * LISTS)):
            local = i * LISTS + lane
            entry = (local // RUN * splits + split) * RUN + local % RUN
            inside = entry < L
            at = unit * L + entry
            rows = tl.load(size + at, mask=inside, other=0)
            opened = (rows > 0) & (tl.load(bins + at, mask=inside, other=-1) >= lowest)
            mine = tl.where(opened, rows, 0)
            ends = tl.cumsum(mine)
            begins = ends - mine
            offset = tl.load(begin + at, mask=inside, other=0) - begins
            total = tl.sum(mine)
            for first in range(0, total, BLOCK):
                place = first + tl.arange(0, BLOCK)
                owner = (place[:, None] >= begins[None, :]) & (place[:, None] < ends[None, :])
                row = place + tl.sum(tl.where(owner, offset[None, :], 0), axis=1)
                used = (place < total) & (row < rows_stored)
                peak, mass, acc = fold_rows(
                    peak, mass, acc, x, row.to(tl.int64), used, keys, values, kt, vt, scale, softcap,
                    DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, DOT,
                )  # fmt: skip
    else:
        tilt = tl.zeros([M], tl.float32)
        lane = tl.arange(0, SUMMARIES)
        for first in range((split - splits) * SUMMARIES, L, (tl.num_programs(1) - splits) * SUMMARIES):
            entry = first + lane
            at = unit * L + entry
            rows = tl.load(size + at, mask=entry < L, other=0)
            unread = (rows > 0) & (tl.load(bins + at, mask=entry < L, other=-1) < lowest)
            # Nothing waits for which lists are unread: the others weigh nothing.
            s_at = logits + head[:, None] * L + entry[None, :]
            s = tl.load(s_at, mask=live[:, None] & (entry < L)[None, :], other=_NEG)
            v_at = value + at[:, None] * VALUE_DIM + e[None, :]
            v = tl.load(v_at, mask=(entry < L)[:, None] & (e < VALUE_DIM)[None, :], other=0)
            unit_of_value = tl.load(value_scale + at, mask=entry < L, other=0.0)
            varies = tl.load(variance + at, mask=entry < L, other=0.0)
            s = tl.where(unread[None, :], s + tl.log(tl.maximum(rows, 1).to(tl.float32))[None, :], _NEG)
            peak, decay, w = weigh(peak, s)
            acc = acc * decay[:, None] + times(w * unit_of_value[None, :], v, DOT)
            mass = mass * decay + tl.sum(w, axis=1)
            tilt = tilt * decay + tl.sum(w * varies[None, :], axis=1)
        acc += tilt[:, None] * tl.load(lean + head[:, None] * VALUE_DIM + e[None, :], mask=stored, other=0.0)
    state = split.to(tl.int64) * HQ + head
    out = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    # What has no weight is not read either.
    tl.store(outs + state[:, None] * VALUE_DIM + e[None, :], out, mask=stored & (mass > 0)[:, None])
    tl.store(lses + state, log_sum(peak, mass), mask=live)


@triton.jit(do_not_specialize=["codes", "summaries", "hot", "states"])
def merge_kernel(
    outs, lses, out, lse, by_source, codes, summaries, hot, states, HQ,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Per (query head, part of the value): all states as one, and the log-sum-exp of each source.

    States are of rows of lists, from ``codes`` on of codes, from ``summaries`` on of summaries, from ``hot`` on of
    sinks and hot rows.
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
