"""Numba kernels that seal hot rows into segments: two-level k-means, in-place permutation, list statistics."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np
from numba import njit, prange

from ._cpu_common import FAST, F, row_scale, set_row_scale, to_f32
from .packed import SMALLEST, STEP

FLAT_SUPERS = 128
_STEP, _SMALLEST = F(STEP), F(SMALLEST)


@njit
def _copy(row, to):
    """to[:] = row. Numba's own assignment takes seconds more to compile, for the words of an error."""
    for d in range(row.size):
        to[d] = row[d]


@njit(fastmath=FAST)
def _assign(x, rows, cent, half, out):
    """Nearest centroid (argmax x.c - |c|^2 / 2) of the rows x[rows]; returns how many changed."""
    C, D = cent.shape
    changed = 0
    for i in range(rows.size):
        r = rows[i]
        best = F(-3.4e38)
        arg = 0
        c = 0
        # four dot products at a time share the row's registers
        while c + 4 <= C:
            a0 = F(0.0)
            a1 = F(0.0)
            a2 = F(0.0)
            a3 = F(0.0)
            for d in range(D):
                v = x[r, d]
                a0 += v * cent[c, d]
                a1 += v * cent[c + 1, d]
                a2 += v * cent[c + 2, d]
                a3 += v * cent[c + 3, d]
            a0 -= half[c]
            a1 -= half[c + 1]
            a2 -= half[c + 2]
            a3 -= half[c + 3]
            if a0 > best:
                best = a0
                arg = c
            if a1 > best:
                best = a1
                arg = c + 1
            if a2 > best:
                best = a2
                arg = c + 2
            if a3 > best:
                best = a3
                arg = c + 3
            c += 4
        while c < C:
            a0 = F(0.0)
            for d in range(D):
                a0 += x[r, d] * cent[c, d]
            a0 -= half[c]
            if a0 > best:
                best = a0
                arg = c
            c += 1
        if out[i] != arg:
            changed += 1
        out[i] = arg
    return changed


@njit(fastmath=FAST)
def _lloyd(x, rows, C, iterations, out):
    """Lloyd's k-means of the rows x[rows] into C lists; uniform-stride start; an emptied list keeps its centroid."""
    n = rows.size
    D = x.shape[1]
    cent = np.empty((C, D), F)
    half = np.empty(C, F)
    count = np.zeros(C, np.int64)
    s = np.zeros((C, D), F)
    for c in range(C):
        _copy(x[rows[(2 * c + 1) * n // (2 * C)]], cent[c])
    out[:] = -1
    for it in range(iterations + 1):
        for c in range(C):
            a = F(0.0)
            for d in range(D):
                a += cent[c, d] * cent[c, d]
            half[c] = F(0.5) * a
        changed = _assign(x, rows, cent, half, out)
        if it == iterations or changed == 0:
            break
        count[:] = 0
        s[:] = F(0.0)
        for i in range(n):
            c = out[i]
            count[c] += 1
            for d in range(D):
                s[c, d] += x[rows[i], d]
        for c in range(C):
            if count[c] > 0:
                inv = F(1.0) / F(count[c])
                for d in range(D):
                    cent[c, d] = s[c, d] * inv
    return cent, half


@njit(fastmath=FAST)
def _split(x, rows, parts, iterations, stride):
    """Split rows into at most `parts` clusters (k-means on every stride-th row): rows grouped, offsets [parts + 1]."""
    n = rows.size
    owner = np.zeros(n, np.int64)
    if parts > 1:
        train = rows[::stride].copy()
        cent, half = _lloyd(x, train, parts, iterations, np.empty(train.size, np.int64))
        _assign(x, rows, cent, half, owner)
    end = np.zeros(parts + 1, np.int64)
    for i in range(n):
        end[owner[i] + 1] += 1
    for part in range(parts):
        end[part + 1] += end[part]
    fill = end.copy()
    grouped = np.empty(n, np.int64)
    for i in range(n):
        grouped[fill[owner[i]]] = rows[i]
        fill[owner[i]] += 1
    return grouped, end


@njit(fastmath=FAST)
def _cluster(x, rows_per_super, rows_per_list, iterations, stride, perm, list_end, super_end):
    """k-means of x [n, D] level by level: groups of 32 super-lists, super-lists, lists.

    The levels above the lists are trained on a sample. Writes perm [n] (row order that makes lists contiguous,
    ascending inside a list), list_end (row offsets), super_end (list offsets); returns (lists, supers).
    """
    n = x.shape[0]
    lists = 0
    supers = 0
    at = 0
    # a flat split into S super-lists costs S dot products per row; by way of groups about 32 + S / groups
    S = n / rows_per_super
    groups = 1 if S <= FLAT_SUPERS else round(S / 32)
    by_group, group_end = _split(x, np.arange(n), groups, iterations, stride * max(1, groups // 8))
    for p in range(groups):
        rows = by_group[group_end[p] : group_end[p + 1]]
        if rows.size == 0:
            continue
        count = max(1, (rows.size + rows_per_super // 2) // rows_per_super)
        by_super, end = _split(x, rows, count, iterations, stride)
        for u in range(count):
            rows_u = by_super[end[u] : end[u + 1]]
            if rows_u.size == 0:
                continue
            by_list, e = _split(x, rows_u, max(1, (rows_u.size + rows_per_list // 2) // rows_per_list), iterations, 1)
            for c in range(e.size - 1):
                if e[c + 1] > e[c]:
                    list_end[lists] = at + e[c + 1]
                    lists += 1
            for i in range(rows_u.size):
                perm[at + i] = by_list[i]
            at += rows_u.size
            super_end[supers] = lists
            supers += 1
    return lists, supers


@njit(fastmath=FAST)
def _summary(x, y, lo, hi, key, value):
    """Mean key, mean value of rows lo..hi of x, y; returns the keys' summed variance."""
    D = x.shape[1]
    Dv = y.shape[1]
    key[:] = F(0.0)
    value[:] = F(0.0)
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
    v = F(0.0)
    for i in range(lo, hi):
        for d in range(D):
            r = x[i, d] - key[d]
            v += r * r
    return v * inv


@njit(fastmath=FAST)
def _pack(numbers, row):
    """Write numbers [D] as a packed row [D + 4], see packed.py."""
    D = numbers.size
    most = F(0.0)
    for d in range(D):
        most = max(most, abs(numbers[d]))
    scale = max(most * _STEP, _SMALLEST)
    for d in range(D):
        row[d] = np.int8(np.rint(numbers[d] / scale))
    set_row_scale(row, D, scale)


@njit(fastmath=FAST, parallel=True, cache=True, nogil=True)
def seal_rows(
    keys, values, ids, start, n_sink, bounds, rows_per_super, rows_per_list, iterations, stride, list_begin,
    list_size, list_var, list_key, list_value, n_lists, super_first, super_size, super_var, super_key, super_value,
    n_supers, seg_lists, seg_supers, shape, cross, trace, first_segment,
):  # fmt: skip
    """Seal the rows bounds[s]..bounds[s + 1] into segment first_segment + s, for every batch row and KV head.

    Rows must be in position order; packed ones move with their scales. Permutes keys, values, ids [B, Hkv, cap] in
    place and appends to the list and super-list arrays, whose vectors are packed; seg_lists, seg_supers
    [B, Hkv, segments + 1] mark where each segment's begin and end; shape [B, Hkv, segments, D, D], cross [.., D, Dv],
    trace [..] are sums over residuals (key - centroid). The order of the list arrays: segment by segment, so dropping
    the newest segments is lowering a count.
    """
    B, H = keys.shape[:2]
    D, Dv = cross.shape[3:]
    N = bounds.size - 1
    BH = B * H
    longest = 0
    for s in range(N):
        longest = max(longest, bounds[s + 1] - bounds[s])
    max_supers = longest // rows_per_super + longest // (32 * rows_per_super) + 2
    perm = np.empty((N, BH, longest), np.int32)
    ends = np.empty((N, BH, longest), np.int32)
    super_ends = np.empty((N, BH, max_supers), np.int32)
    lists = np.zeros((N, BH), np.int64)
    supers = np.zeros((N, BH), np.int64)
    for w in prange(N * BH):
        s = w // BH
        b = (w % BH) // H
        h = w % H
        lo = max(bounds[s], start[b] + n_sink)
        n = bounds[s + 1] - lo
        if n > 0:
            x = np.empty((n, D), F)
            mean = np.zeros(D, F)
            for i in range(n):
                unit = row_scale(keys[b, h, lo + i], D)
                for d in range(D):
                    v = to_f32(keys[b, h, lo + i, d]) * unit
                    x[i, d] = v
                    mean[d] += v
            # softmax ignores a shift of all keys, so cluster around the segment's mean: fewer lost bits
            for d in range(D):
                mean[d] /= F(n)
            for i in range(n):
                for d in range(D):
                    x[i, d] -= mean[d]
            lists[s, w % BH], supers[s, w % BH] = _cluster(
                x, rows_per_super, rows_per_list, iterations, stride, perm[s, w % BH], ends[s, w % BH],
                super_ends[s, w % BH],
            )  # fmt: skip
    for b in range(B):
        for h in range(H):
            for s in range(N):
                k = first_segment + s
                seg_lists[b, h, k + 1] = seg_lists[b, h, k] + lists[s, b * H + h]
                seg_supers[b, h, k + 1] = seg_supers[b, h, k] + supers[s, b * H + h]
            n_lists[b, h] = seg_lists[b, h, first_segment + N]
            n_supers[b, h] = seg_supers[b, h, first_segment + N]
            super_first[b, h, n_supers[b, h]] = n_lists[b, h]
    for w in prange(N * BH):
        s = w // BH
        bh = w % BH
        b = bh // H
        h = bh % H
        k = first_segment + s
        lo = max(bounds[s], start[b] + n_sink)
        n = max(bounds[s + 1] - lo, 0)
        rk = keys[b, h, lo : lo + n].copy()
        rv = values[b, h, lo : lo + n].copy()
        ri = ids[b, h, lo : lo + n].copy()
        x = np.empty((n, D), F)
        y = np.empty((n, Dv), F)
        for i in range(n):
            p = perm[s, bh, i]
            ids[b, h, lo + i] = ri[p]
            _copy(rk[p], keys[b, h, lo + i])
            _copy(rv[p], values[b, h, lo + i])
            unit = row_scale(rk[p], D)
            for d in range(D):
                x[i, d] = to_f32(rk[p, d]) * unit
            unit = row_scale(rv[p], Dv)
            for d in range(Dv):
                y[i, d] = to_f32(rv[p, d]) * unit
        key = np.empty(D, F)
        value = np.empty(Dv, F)
        S = shape[b, h, k]
        C = cross[b, h, k]
        S[:] = F(0.0)
        C[:] = F(0.0)
        tr = F(0.0)
        at = 0
        base = seg_lists[b, h, k]
        for j in range(lists[s, bh]):
            end = ends[s, bh, j]
            o = base + j
            list_begin[b, h, o] = lo + at
            list_size[b, h, o] = end - at
            list_var[b, h, o] = _summary(x, y, at, end, key, value)
            _pack(key, list_key[b, h, o])
            _pack(value, list_value[b, h, o])
            # residual covariance from every eighth list: one matrix per head needs no more
            if j % 8 == 0:
                for i in range(at, end):
                    for d in range(D):
                        r = x[i, d] - key[d]
                        tr += r * r
                        for e in range(D):
                            S[d, e] += r * (x[i, e] - key[e])
                        for e in range(Dv):
                            C[d, e] += r * (y[i, e] - value[e])
            at = end
        trace[b, h, k] = tr
        first = 0
        at = 0
        for j in range(supers[s, bh]):
            last = super_ends[s, bh, j]
            end = ends[s, bh, last - 1]
            o = seg_supers[b, h, k] + j
            super_first[b, h, o] = base + first
            super_size[b, h, o] = end - at
            super_var[b, h, o] = _summary(x, y, at, end, key, value)
            _pack(key, super_key[b, h, o])
            _pack(value, super_value[b, h, o])
            at = end
            first = last


@njit(parallel=True, cache=True, nogil=True)
def unseal_rows(keys, values, ids, start, n_sink, bounds):
    """Put the rows of each bounds[s]..bounds[s + 1] back in position order, in place."""
    B, H = keys.shape[:2]
    N = bounds.size - 1
    for w in prange(N * B * H):
        s = w // (B * H)
        b = (w % (B * H)) // H
        h = w % H
        lo = max(bounds[s], start[b] + n_sink)
        n = bounds[s + 1] - lo
        if n > 0:
            rk = keys[b, h, lo : lo + n].copy()
            rv = values[b, h, lo : lo + n].copy()
            ri = ids[b, h, lo : lo + n].copy()
            for i in range(n):
                to = np.int64(ri[i])
                _copy(rk[i], keys[b, h, to])
                _copy(rv[i], values[b, h, to])
                ids[b, h, to] = to
