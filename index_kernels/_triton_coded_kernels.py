"""Kernels of attend_segmented in Triton that choose rows by their codes: for rows that are dear to read.

They stand between the ranking of lists and the merge: ``choose_kernel`` finds from which share of the softmax on rows
of opened lists are read, ``attend_coded_kernel`` reads these, and lets codes answer for the others. Both go through the
same rows, which ``lay_kernel`` has laid out, and make the logits of their codes; what they would hand over takes more
bytes than codes do.

What is read is also copied to the device, see ``_triton_row_cache.py``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import triton
import triton.language as tl

from ._triton_common import rows_of, softcapped
from ._triton_row_cache import advance, copy_rows, give_way, load_either, scales_either, take_places
from ._triton_segmented_kernels import (
    OF_ROWS,
    add_taken,
    bin_of,
    count_at,
    cut_of,
    share_of,
    store_state,
    times,
    weigh,
)
from .packed import NOISE_DIVISOR, NOISE_LET_BE

# What is said of a row that was read: from where it is, or as a copy.
FETCHED, COPIED = 1, 2
_FETCHED, _COPIED = tl.constexpr(FETCHED), tl.constexpr(COPIED)
_NEG = tl.constexpr(float("-inf"))
_OF_ROWS = tl.constexpr(OF_ROWS)
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
def _rows(low, high, noise, means, numbers, steps, ids, owners, unit, first, stop, head, live, softcap, L, T, capacity,
          stored, BLOCK: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, CODE: tl.constexpr):  # fmt: skip
    """Of the rows laid out from ``first`` on: ids, entries, which there are, logits by code, and above their mean's.

    Logits ``[M, N]`` are -inf where there is no row.
    """
    c = tl.arange(0, BLOCK_H)
    place = first + tl.arange(0, BLOCK)
    row = tl.load(ids + unit * capacity + place, mask=place < stop, other=0).to(tl.int64)
    entry = tl.load(owners + unit * capacity + place, mask=place < stop, other=0)
    used = (place < stop) & (row < stored)
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
    return row, entry, used, tl.where(used[None, :], s, _NEG), s - mean


@triton.jit
def _share(s, whole, live):
    """Shares of the softmax ``[N]``, summed over a group."""
    return tl.sum(tl.where(live[:, None], tl.exp(s - whole[:, None]), 0.0), axis=0)


@triton.jit(do_not_specialize=["least_bin", "stored", "capacity"])
def choose_kernel(
    turned, means, numbers, steps, wholes, histogram, ids, owners, ends, row_logits, slots, kept_rows, hands, ring,
    softcap, least_bin, H, G, L, HQ, T, stored, capacity,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    NUM_BINS: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Per (unit, split): rows of opened lists by the bins of their shares.

    ``row_logits [HQ, stored]``: where their logits are wanted, too. The oldest copies of rows make room for others.
    """
    unit = tl.program_id(0).to(tl.int64)
    if slots is not None:
        give_way(slots, kept_rows, hands, ring, unit, T)
    b = unit // H
    g = tl.arange(0, M)
    live = g < G
    head = unit * G + g
    lo, hi = share_of(tl.load(ends + unit), tl.program_id(1), tl.num_programs(1))
    whole = tl.load(wholes + head, mask=live, other=0.0)
    low, high, noise = _turned(turned, head, live, DIM, HALF, BLOCK_H, CODE)
    for first in range(lo, hi, BLOCK):
        row, _entry, used, s, _above = _rows(
            low, high, noise, means, numbers, steps, ids, owners, unit, first, hi, head, live, softcap, L, T, capacity,
            stored, BLOCK, HALF, BLOCK_H, CODE,
        )  # fmt: skip
        found = bin_of(_share(s, whole, live), NUM_BINS)
        to = count_at(histogram, b, found, _OF_ROWS, NUM_BINS)
        tl.atomic_add(to, used.to(tl.int32), mask=used & (found >= least_bin), sem="relaxed")
        if row_logits is not None:
            tl.store(row_logits + head[:, None] * stored + row[None, :], s, mask=live[:, None] & used[None, :])


@triton.jit(do_not_specialize=["budget", "least_bin", "stored", "capacity"])
def attend_coded_kernel(
    query, keys, values, kb, kh, kt, vb, vh, vt,
    turned, means, numbers, steps, names, value, value_scale, wholes, histogram, totals, ids, owners, ends, spread,
    lean, outs, lses, row_taken, kept_keys, kept_values, slots, kept_rows, hands, ring, scale, softcap, budget,
    least_bin, H, G, L, HQ, T, stored, capacity,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, NUM_BINS: tl.constexpr,
    TAIL: tl.constexpr, CODE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, split) the state of the opened lists' rows that are read; with TAIL, behind all, that of the others.

    A row that is not read weighs what its code says, and has the mean value of its list, moved along ``lean``.
    ``row_taken [units, stored]``: where it is wanted which rows were FETCHED, and which read as COPIED.
    """
    unit = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    b = unit // H
    g, d, e = tl.arange(0, M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    live = g < G
    head = unit * G + g
    least, above_cut = cut_of(histogram, b, budget, least_bin, _OF_ROWS, NUM_BINS)
    if (split == 0) & (unit % H == 0):
        add_taken(totals, b, above_cut, budget)
    lo, hi = share_of(tl.load(ends + unit), split, splits)
    whole = tl.load(wholes + head, mask=live, other=0.0)
    low, high, noise = _turned(turned, head, live, DIM, HALF, BLOCK_H, CODE)
    x = tl.load(query + head[:, None] * DIM + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
    keys = rows_of(keys, b, unit % H, kb, kh, DIM)
    values = rows_of(values, b, unit % H, vb, vh, VALUE_DIM)
    peak = tl.full([M], _NEG, tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    peak_coded = tl.full([M], _NEG, tl.float32)
    mass_coded = tl.zeros([M], tl.float32)
    coded = tl.zeros([M, BLOCK_DV], tl.float32)
    tilt = tl.zeros([M], tl.float32)
    fetched = tl.zeros([], tl.int32)
    hand = tl.zeros([], tl.int32)
    if slots is not None:
        hand = tl.load(hands + unit * splits + split)
    for first in range(lo, hi, BLOCK):
        row, entry, used, s, above = _rows(
            low, high, noise, means, numbers, steps, ids, owners, unit, first, hi, head, live, softcap, L, T, capacity,
            stored, BLOCK, HALF, BLOCK_H, CODE,
        )  # fmt: skip
        read = used & (bin_of(_share(s, whole, live), NUM_BINS) >= least)
        slot = tl.full([BLOCK], -1, tl.int32)
        if slots is not None:
            slot = tl.load(slots + unit * T + row, mask=read, other=-1)
        if row_taken is not None:
            tl.store(row_taken + unit * stored + row, tl.where(slot < 0, _FETCHED, _COPIED), mask=read)
        if tl.sum(read.to(tl.int32)) > 0:
            far, near, place = read & (slot < 0), slot >= 0, unit * splits * ring + slot
            kept, to = far, place
            if slots is not None:
                kept, to, fetched = take_places(row, far, slots, kept_rows, hand, ring, fetched, unit, T)
            k = load_either(keys, row, kt, kept_keys, place, far, near, DIM, BLOCK_D)
            of_k = scales_either(keys, row, kt, kept_keys, place, far, near, DIM)
            if slots is not None:
                copy_rows(k, of_k, kept_keys, to, kept, DIM, BLOCK_D)
            told = times(x, tl.trans(k), DOT) * scale * of_k[None, :]
            if softcap is not None:
                told = softcapped(told, softcap)
            peak, decay, w = weigh(peak, tl.where(read[None, :], told, _NEG))
            mass = mass * decay + tl.sum(w, axis=1)
            v = load_either(values, row, vt, kept_values, place, far, near, VALUE_DIM, BLOCK_DV)
            of_v = scales_either(values, row, vt, kept_values, place, far, near, VALUE_DIM)
            if slots is not None:
                copy_rows(v, of_v, kept_values, to, kept, VALUE_DIM, BLOCK_DV)
            acc = acc * decay[:, None] + times(w * of_v[None, :], v, DOT)
        if TAIL:
            name = entry
            if names is not None:
                name = tl.load(names + unit * L + entry, mask=used, other=0)
            its = unit * L + name
            v = tl.load(
                value + its[:, None] * VALUE_DIM + e[None, :], mask=used[:, None] & (e < VALUE_DIM)[None, :], other=0
            )
            peak_coded, decay, w = weigh(peak_coded, tl.where(read[None, :], _NEG, s))
            mass_coded = mass_coded * decay + tl.sum(w, axis=1)
            tilt = tilt * decay + tl.sum(w * tl.where(used[None, :], above, 0.0), axis=1)
            scaled = w * tl.load(value_scale + its, mask=used, other=0.0)[None, :]
            coded = coded * decay[:, None] + times(scaled, v, DOT)
    if slots is not None:
        advance(hands, hand, ring, fetched, unit)
    store_state(outs, lses, split, head, live, peak, mass, acc, HQ, VALUE_DIM, BLOCK_DV)
    if TAIL:
        toward = tl.load(
            lean + head[:, None] * VALUE_DIM + e[None, :], mask=live[:, None] & (e < VALUE_DIM)[None, :], other=0.0
        )
        coded += (tilt / tl.load(spread + head, mask=live, other=1.0))[:, None] * toward
        store_state(outs, lses, splits + split, head, live, peak_coded, mass_coded, coded, HQ, VALUE_DIM, BLOCK_DV)
