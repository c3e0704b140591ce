"""What sealing writes of the lists of a segment: means, variances, codes of rows, sums of moments."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np

from ._cpu_code_vectors import EIGHT, pack_eight
from ._cpu_common import F, inner, row_scale, set_row_scale, to_f32
from ._cpu_rotate import rotate_eight, rotate_row
from .packed import CODE_STEP, SMALLEST, STEP

_STEP, _CODE_STEP, _SMALLEST = F(STEP), F(CODE_STEP), F(SMALLEST)


@inner
def _means(x, y, lo, hi, key, value):
    """Mean key, mean value of rows lo..hi of x, y."""
    D = x.shape[1]
    Dv = y.shape[1]
    for d in range(D):
        key[d] = F(0.0)
    for d in range(Dv):
        value[d] = F(0.0)
    for i in range(lo, hi):
        for d in range(D):
            key[d] += x[i, d]
        for d in range(Dv):
            value[d] += y[i, d]
    inv = F(1.0) / F(hi - lo)
    for d in range(D):
        key[d] *= inv
    for d in range(Dv):
        value[d] *= inv


@inner
def _scatter(x, lo, hi):
    """Sum of squared distances of rows lo..hi of x from their mean."""
    D = x.shape[1]
    mean = np.zeros(D, F)
    for i in range(lo, hi):
        for d in range(D):
            mean[d] += x[i, d]
    inv = F(1.0) / F(hi - lo)
    for d in range(D):
        mean[d] *= inv
    total = F(0.0)
    for i in range(lo, hi):
        for d in range(D):
            r = x[i, d] - mean[d]
            total += r * r
    return total


@inner
def round_to_int8(numbers, row):
    """Write numbers [D] as int8 numbers and return their scale, see packed.py."""
    D = numbers.size
    most = F(0.0)
    for d in range(D):
        most = max(most, abs(numbers[d]))
    scale = max(most * _STEP, _SMALLEST)
    for d in range(D):
        row[d] = np.int8(np.rint(numbers[d] / scale))
    return scale


@inner
def _pack(numbers, row):
    """Write numbers [D] as a packed row [D + 4], see packed.py."""
    set_row_scale(row, numbers.size, round_to_int8(numbers, row))


@inner
def _summarise(x, y, in_metric, lo, hi, key, value, j, variance, keys, values):
    """Write the summary j of rows lo..hi: variance and packed means, which key and value hold as floats then."""
    _means(x, y, lo, hi, key, value)
    variance[j] = _scatter(in_metric, lo, hi) / F(hi - lo)
    _pack(key, keys[j])
    _pack(value, values[j])


@inner
def code_signs(D):
    """The signs [D] that codes change, see packed.turned_for_codes."""
    signs = np.empty(D, F)
    for d in range(D):
        pairs = d & (d >> 1)
        signs[d] = F(1.0)
        while pairs:
            if pairs & 1:
                signs[d] = -signs[d]
            pairs >>= 1
    return signs


@inner
def turn_for_codes(x, signs, one, two):
    """Turn x [D] in place; see packed.turned_for_codes. signs are those of code_signs, one and two [D] scratch."""
    for d in range(x.size):
        x[d] *= signs[d]
    rotate_row(x, x, one, two)


@inner
def _code_eight(x, lo, n, mean, signs, scratch, codes, to):
    """Write the codes of the rows lo .. lo + n of x, at most EIGHT, less their list's packed mean; see packed.py.

    Side by side they are turned as ``turn_for_codes`` turns one.
    """
    one, two, packed, scales = scratch
    D, unit = signs.size, row_scale(mean, signs.size)
    half = (D + 1) // 2
    for d in range(D):
        middle = to_f32(mean[d]) * unit
        for j in range(n):
            one[d, j] = (x[lo + j, d] - middle) * signs[d]
    rotate_eight(one, two, D)
    pack_eight(one, half, _CODE_STEP, _SMALLEST, packed, scales)
    for j in range(n):
        for d in range(half):
            codes[to + j, d] = packed[d, j]
        set_row_scale(codes[to + j], half, scales[j])


@inner
def _add_moments(x, y, lo, hi, key, value, keys, values, shape, cross):
    """Add the products of the residuals of rows lo..hi to shape and cross; keys, values [rows, ..] are scratch."""
    D, Dv = key.size, value.size
    for i in range(lo, hi):
        for d in range(D):
            keys[i - lo, d] = x[i, d] - key[d]
        for e in range(Dv):
            values[i - lo, e] = y[i, e] - value[e]
    for d in range(D):
        of_keys, of_values = shape[d], cross[d]
        for i in range(hi - lo):
            r, row, other = keys[i, d], keys[i], values[i]
            for e in range(D):
                of_keys[e] += r * row[e]
            for e in range(Dv):
                of_values[e] += r * other[e]


@inner
def write_lists(x, y, in_metric, lo, list_end, count, begin, size, variance, keys, values, codes, coded, shape, cross):
    """Write the summaries of one segment's lists, sum residuals into shape and cross; returns the trace of shape."""
    D = x.shape[1]
    Dv = y.shape[1]
    key = np.empty(D, F)
    value = np.empty(Dv, F)
    signs, half = code_signs(D), (D + 1) // 2
    # Of an odd number of numbers the last one is coded beside a zero.
    eight = np.zeros((2 * half, EIGHT), F), np.zeros((2 * half, EIGHT), F)
    scratch = *eight, np.empty((half, EIGHT), np.int8), np.empty(EIGHT, F)
    longest = np.int64(0)
    for j in range(count):
        longest = max(longest, np.int64(list_end[j]) - (np.int64(list_end[j - 1]) if j > 0 else np.int64(0)))
    residual_keys, residual_values = np.empty((longest, D), F), np.empty((longest, Dv), F)
    for d in range(D):
        for e in range(D):
            shape[d, e] = F(0.0)
        for e in range(Dv):
            cross[d, e] = F(0.0)
    trace = F(0.0)
    at = np.int64(0)
    for j in range(count):
        end = list_end[j]
        begin[j] = lo + at
        size[j] = end - at
        _summarise(x, y, in_metric, at, end, key, value, j, variance, keys, values)
        # codes, where they are wanted, are of what the packed mean leaves
        for i in range(at, end if coded else at, EIGHT):
            _code_eight(x, i, min(end - i, EIGHT), keys[j], signs, scratch, codes, lo + i)
        # residual covariance from every eighth list: one matrix per head needs no more
        if j % 8 == 0:
            trace += _scatter(in_metric, at, end)
            _add_moments(x, y, at, end, key, value, residual_keys, residual_values, shape, cross)
        at = end
    return trace


@inner
def write_supers(x, y, in_metric, list_end, super_end, count, list_base, firsts, size, variance, keys, values):
    """Write the summaries of one segment's super-lists, whose lists are numbered from list_base on."""
    key = np.empty(x.shape[1], F)
    value = np.empty(y.shape[1], F)
    first = 0
    at = np.int64(0)
    for j in range(count):
        last = super_end[j]
        end = list_end[last - 1]
        firsts[j] = list_base + first
        size[j] = end - at
        _summarise(x, y, in_metric, at, end, key, value, j, variance, keys, values)
        at = end
        first = last
