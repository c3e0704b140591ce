"""What the phases of attend_segmented do to one KV head's summaries: correct, rank, choose, settle, add."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import platform

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ._cpu_common import I32, NEG, F, exp32, inner, softcapped
from ._cpu_vectors import add_rows
from .lists import FREEZES, LOG_ROWS

_FREEZES, _LOG_ROWS = F(FREEZES), F(LOG_ROWS)


@intrinsic
def f32_bits(typingctx, x):
    """A float32's bit pattern as int32."""

    def gen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), gen


@intrinsic
def cycles(typingctx):
    """The processor's cycle counter, for shares of time; 0 where user code may not read one."""

    def gen(context, builder, sig, args):
        if platform.machine() not in ("x86_64", "AMD64"):
            return ir.Constant(ir.IntType(64), 0)
        counter = builder.module.declare_intrinsic("llvm.readcyclecounter", fnty=ir.FunctionType(ir.IntType(64), []))
        return builder.call(counter, [])

    return types.int64(), gen


# Ranks fall into so many buckets, by the leading 11 bits after the sign of the (non-negative) float.
BUCKETS = 2048


@njit(inline="always")
def bucket_of(cost):
    """Which of the BUCKETS a rank falls into."""
    return f32_bits(cost) >> I32(20)


@inner
def threshold(histogram, budget):
    """The least bucket of those taken whole, of rows counted by bucket, and what they leave of a budget."""
    cut = histogram.size
    left = budget
    while cut > 0 and histogram[cut - 1] <= left:
        cut -= 1
        left -= histogram[cut]
    return cut, left


@inner
def choose(rank, size, b, count, budget, taken, chosen, nchosen):
    """Highest ranks first until `budget` rows are taken, over all KV heads of batch row b together.

    A histogram finds the threshold without a sort; inside the threshold's bucket the smaller index goes first.
    count [B, H] is the number of entries.
    Writes taken[b, h, i] (0/1), chosen[b, h, :] ascending and nchosen[b, h].
    """
    H = rank.shape[1]
    histogram = np.zeros(BUCKETS, np.int64)
    for h in range(H):
        for i in range(count[b, h]):
            histogram[bucket_of(rank[b, h, i])] += size[b, h, i]
    cut, left = threshold(histogram, budget)
    rows = np.int64(0)
    for h in range(H):
        n = 0
        for i in range(count[b, h]):
            bucket = bucket_of(rank[b, h, i])
            take = bucket >= cut
            if bucket == cut - 1 and size[b, h, i] <= left:
                left -= size[b, h, i]
                take = True
            taken[b, h, i] = take
            if take:
                chosen[b, h, n] = i
                n += 1
                rows += size[b, h, i]
        nchosen[b, h] = n
    return rows


@inner
def rescale(logit, size, count, peak, mass):
    """Turn logits [G, .] into exp(logit - peak) in place; mass[g] = sum of size * weight. First raises peak [G] to the
    maximum."""
    for g in range(logit.shape[0]):
        top = peak[g]
        for i in range(count):
            top = max(top, logit[g, i])
        total = F(0.0)
        for i in range(count):
            e = exp32(logit[g, i] - top)
            logit[g, i] = e
            total += e * F(size[i])
        peak[g] = top
        mass[g] = total


@inner
def rank_entries(weight, var, pull, mass, count, rank):
    """What leaving an entry unread may cost: sum over the group of its rows' share of the softmax times the
    deviation of their logits and the head's weight. weight [G, .] is relative to mass [G]."""
    for i in range(count):
        rank[i] = F(0.0)
    for g in range(weight.shape[0]):
        f = pull[g] / mass[g]
        for i in range(count):
            rank[i] += f * weight[g, i]
    for i in range(count):
        rank[i] *= np.sqrt(var[i])


@njit(inline="always")
def _held(variance):
    """See lists.held."""
    return variance if variance < _FREEZES else F(2.0) * (np.sqrt(_FREEZES * variance) - _LOG_ROWS)


@inner
def correct(logit, var, spread, lo, hi, alpha, softcap):
    """Add alpha * variance of the row logits, as far as it is held, to the centroid logits [G, lo..hi] (after the
    softcap, with its slope).

    The logits of a list's rows scatter around their centroid's; by Jensen their mean weight is larger than the
    centroid's. spread [G] is q' S q (S: shape of the residuals, trace 1), var [.] the list's summed variance.
    """
    for g in range(logit.shape[0]):
        f = spread[g]
        if softcap > F(0.0):
            for i in range(lo, hi):
                t = softcapped(logit[g, i], softcap)
                slope = F(1.0) - (t / softcap) * (t / softcap)
                logit[g, i] = t + alpha * _held(f * var[i] * slope * slope)
        else:
            for i in range(lo, hi):
                logit[g, i] += alpha * _held(f * var[i])


@inner
def settle_tail(weight, size, var, taken, lo, hi, tilt, total):
    """Turn the weights [G, lo..hi] into size * weight, 0 where taken; adds them to total [G], times var to tilt [G]."""
    for g in range(weight.shape[0]):
        s = F(0.0)
        t = F(0.0)
        for i in range(lo, hi):
            w = F(0.0) if taken[i] else weight[g, i] * F(size[i])
            weight[g, i] = w
            s += w
            t += w * var[i]
        total[g] += s
        tilt[g] += t


@inner
def add_tail(weight, lo, hi, values, value_lo, floor, acc, lanes):
    """Add the settled summary rows weight [G, lo:hi] with values [value_lo..], 8 at a time, skipping negligible eights.

    A skipped row still counts in the sum of weights; its value is not worth a cache miss. Returns the values read.
    """
    heads, _, cv, width = lanes
    G, step = weight.shape
    row = values.shape[1]
    read = 0
    i = lo
    while i < hi:
        n = min(8, hi - i)
        most = F(0.0)
        for g in range(G):
            s = F(0.0)
            for j in range(i, i + n):
                s += weight[g, j]
            most = max(most, s * floor[g])
        if most >= F(1.0):
            read += n
            add_rows(weight, i, step, values, (value_lo + i - lo) * row, row, n, acc, heads, cv, width)
        i += n
    return read


@inner
def log_sum_exp(top, total, first, last, b, i):
    """Log-sum-exp of the states first..last of one query head."""
    peak = NEG
    for p in range(first, last):
        peak = max(peak, top[p, b, i])
    mass = F(0.0)
    for p in range(first, last):
        mass += total[p, b, i] * exp32(top[p, b, i] - peak)
    return peak + np.log(mass) if mass > F(0.0) else F(-np.inf)
