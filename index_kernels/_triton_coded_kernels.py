"""Kernels of attend_segmented in Triton that choose rows by their codes: for rows that are dear to read.

They stand between the ranking of lists and the merge: ``choose_kernel`` finds from which share of the softmax on rows
of opened lists are read, ``attend_coded_kernel`` reads these, and lets codes answer for the others. Both make the
logits of codes; what they would hand over takes more bytes than codes do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import triton
import triton.language as tl

from ._triton_common import softcapped
from ._triton_segmented_kernels import bin_of, find_cut, fold_rows, log_sum, times, weigh
from .packed import NOISE_DIVISOR, NOISE_LET_BE

_NEG = tl.constexpr(float("-inf"))
_NOISE_DIVISOR, _NOISE_LET_BE = tl.constexpr(NOISE_DIVISOR), tl.constexpr(NOISE_LET_BE)


@triton.jit
def _turned(turned, head, live, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, CODE: tl.constexpr):
    """The scaled query as codes are turned, in halves ``[M, BLOCK_H]``; and the noise of a code of scale 1 ``[M]``."""
    c = tl.arange(0, BLOCK_H)
    at = turned + head[:, None] * DIM + c[None, :]
    low = tl.load(at, mask=live[:, None] & (c < HALF)[None, :], other=0.0)
    high = tl.load(at + HALF, mask=live[:, None] & (HALF + c < DIM)[None, :] & (c < HALF)[None, :], other=0.0)
    noise = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / _NOISE_DIVISOR
    return low.to(CODE), high.to(CODE), noise


@triton.jit
def _logits(low, high, noise, means, numbers, steps, unit, row, entry, used, head, live, softcap, L, T,
            HALF: tl.constexpr, BLOCK_H: tl.constexpr, CODE: tl.constexpr):  # fmt: skip
    """Logits ``[M, N]`` of rows by their codes, -inf where not ``used``; and what they are above their list's mean."""
    c = tl.arange(0, BLOCK_H)
    at = unit * T + row
    both = tl.load(numbers + at[:, None] * HALF + c[None, :], mask=used[:, None] & (c < HALF)[None, :], other=0)
    both = both.to(tl.int32)
    step = tl.load(steps + at, mask=used, other=0.0)
    told = times(low, tl.trans(((both & 15) - 8).to(CODE)), CODE)
    told += times(high, tl.trans((((both >> 4) & 15) - 8).to(CODE)), CODE)
    told = told * step[None, :] - tl.maximum(noise[:, None] * (step * step)[None, :] - _NOISE_LET_BE, 0.0)
    mean = tl.load(means + head[:, None] * L + entry[None, :], mask=live[:, None] & used[None, :], other=0.0)
    s = mean + told
    if softcap is not None:
        s = softcapped(s, softcap)
        mean = softcapped(mean, softcap)
    return tl.where(used[None, :], s, _NEG), s - mean


@triton.jit
def _share(s, whole, live):
    """Shares of the softmax ``[N]``, summed over a group."""
    return tl.sum(tl.where(live[:, None], tl.exp(s - whole[:, None]), 0.0), axis=0)


@triton.jit(do_not_specialize=["budget", "least_bin", "stored"])
def choose_kernel(
    turned, means, numbers, steps, begin, size, bins, cut, wholes, histogram, ticket, row_cut, totals, row_logits,
    softcap, budget, least_bin, H, G, L, HQ, T, stored,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, M: tl.constexpr, LISTS: tl.constexpr,
    BLOCK: tl.constexpr, NUM_BINS: tl.constexpr, COPIES: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Per (unit, split): bins of the shares of opened lists' rows; the last program of a batch row finds the cut.

    ``row_logits [HQ, stored]``: where their logits are wanted, too.
    """
    unit = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    b = unit // H
    g, lane = tl.arange(0, M), tl.arange(0, LISTS)
    live = g < G
    head = unit * G + g
    lowest = tl.load(cut + b)
    whole = tl.load(wholes + head, mask=live, other=0.0)
    low, high, noise = _turned(turned, head, live, DIM, HALF, BLOCK_H, CODE)
    counts = histogram + (b * COPIES + (unit + split) % COPIES) * NUM_BINS
    for i in range(0, tl.cdiv(L, splits * LISTS)):
        entry = (i * LISTS + lane) * splits + split
        at = unit * L + entry
        rows = tl.load(size + at, mask=entry < L, other=0)
        opened = (rows > 0) & (tl.load(bins + at, mask=entry < L, other=-1) >= lowest)
        mine = tl.where(opened, rows, 0)
        ends = tl.cumsum(mine)
        begins = ends - mine
        offset = tl.load(begin + at, mask=entry < L, other=0) - begins
        total = tl.sum(mine)
        for first in range(0, total, BLOCK):
            place = first + tl.arange(0, BLOCK)
            owner = (place[:, None] >= begins[None, :]) & (place[:, None] < ends[None, :])
            row = place + tl.sum(tl.where(owner, offset[None, :], 0), axis=1)
            of = tl.sum(tl.where(owner, entry[None, :], 0), axis=1)
            used = (place < total) & (row < stored)
            s, _ = _logits(
                low, high, noise, means, numbers, steps, unit, row.to(tl.int64), of, used, head, live, softcap, L, T,
                HALF, BLOCK_H, CODE,
            )  # fmt: skip
            found = bin_of(_share(s, whole, live), NUM_BINS)
            tl.atomic_add(counts + found, used.to(tl.int32), mask=used & (found >= least_bin), sem="relaxed")
            if row_logits is not None:
                to = row_logits + head[:, None] * stored + row[None, :]
                tl.store(to, s, mask=live[:, None] & used[None, :])
    find_cut(histogram, ticket, row_cut, totals, b, H * splits, budget, least_bin, NUM_BINS, COPIES)


@triton.jit(do_not_specialize=["stored"])
def attend_coded_kernel(
    query, keys, values, kb, kh, kt, vb, vh, vt,
    turned, means, numbers, steps, begin, size, value, value_scale, bins, cut, wholes, row_cut, spread, lean,
    outs, lses, row_taken, scale, softcap, H, G, L, HQ, T, stored,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr,
    NUM_BINS: tl.constexpr, TAIL: tl.constexpr, CODE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, split) the state of the opened lists' rows that are read; with TAIL, behind all, that of the others.

    A row that is not read weighs what its code says, and has the mean value of its list, moved along ``lean``.
    ``row_taken [units, stored]``: where it is wanted which rows were read.
    """
    unit = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    b = unit // H
    g, d, e, lane = tl.arange(0, M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, LISTS)
    live = g < G
    head = unit * G + g
    lowest, least = tl.load(cut + b), tl.load(row_cut + b)
    whole = tl.load(wholes + head, mask=live, other=0.0)
    low, high, noise = _turned(turned, head, live, DIM, HALF, BLOCK_H, CODE)
    x = tl.load(query + head[:, None] * DIM + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
    keys += b * kb + unit % H * kh
    values += b * vb + unit % H * vh
    peak = tl.full([M], _NEG, tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    peak_coded = tl.full([M], _NEG, tl.float32)
    mass_coded = tl.zeros([M], tl.float32)
    coded = tl.zeros([M, BLOCK_DV], tl.float32)
    tilt = tl.zeros([M], tl.float32)
    for i in range(0, tl.cdiv(L, splits * LISTS)):
        entry = (i * LISTS + lane) * splits + split
        at = unit * L + entry
        rows = tl.load(size + at, mask=entry < L, other=0)
        opened = (rows > 0) & (tl.load(bins + at, mask=entry < L, other=-1) >= lowest)
        mine = tl.where(opened, rows, 0)
        ends = tl.cumsum(mine)
        begins = ends - mine
        offset = tl.load(begin + at, mask=entry < L, other=0) - begins
        total = tl.sum(mine)
        for first in range(0, total, BLOCK):
            place = first + tl.arange(0, BLOCK)
            owner = (place[:, None] >= begins[None, :]) & (place[:, None] < ends[None, :])
            row = (place + tl.sum(tl.where(owner, offset[None, :], 0), axis=1)).to(tl.int64)
            of = tl.sum(tl.where(owner, entry[None, :], 0), axis=1)
            used = (place < total) & (row < stored)
            s, above = _logits(
                low, high, noise, means, numbers, steps, unit, row, of, used, head, live, softcap, L, T,
                HALF, BLOCK_H, CODE,
            )  # fmt: skip
            read = used & (bin_of(_share(s, whole, live), NUM_BINS) >= least)
            if row_taken is not None:
                tl.store(row_taken + unit * stored + row, read.to(tl.int8), mask=used)
            if tl.sum(read.to(tl.int32)) > 0:
                peak, mass, acc = fold_rows(
                    peak, mass, acc, x, row, read, keys, values, kt, vt, scale, softcap,
                    DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, DOT,
                )  # fmt: skip
            if TAIL:
                its = unit * L + of
                v = tl.load(
                    value + its[:, None] * VALUE_DIM + e[None, :],
                    mask=used[:, None] & (e < VALUE_DIM)[None, :], other=0,
                )  # fmt: skip
                peak_coded, decay, w = weigh(peak_coded, tl.where(read[None, :], _NEG, s))
                mass_coded = mass_coded * decay + tl.sum(w, axis=1)
                tilt = tilt * decay + tl.sum(w * tl.where(used[None, :], above, 0.0), axis=1)
                scaled = w * tl.load(value_scale + its, mask=used, other=0.0)[None, :]
                coded = coded * decay[:, None] + times(scaled, v, DOT)
    stored_to = live[:, None] & (e < VALUE_DIM)[None, :]
    state = split.to(tl.int64) * HQ + head
    out = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    # What has no weight is not read either.
    tl.store(outs + state[:, None] * VALUE_DIM + e[None, :], out, mask=stored_to & (mass > 0)[:, None])
    tl.store(lses + state, log_sum(peak, mass), mask=live)
    if TAIL:
        state += splits * HQ
        toward = tl.load(lean + head[:, None] * VALUE_DIM + e[None, :], mask=stored_to, other=0.0)
        coded += (tilt / tl.load(spread + head, mask=live, other=1.0))[:, None] * toward
        out = coded / tl.where(mass_coded == 0, 1.0, mass_coded)[:, None]
        tl.store(outs + state[:, None] * VALUE_DIM + e[None, :], out, mask=stored_to & (mass_coded > 0)[:, None])
        tl.store(lses + state, log_sum(peak_coded, mass_coded), mask=live)
