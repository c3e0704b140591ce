"""k-means for sealing: Lloyd's algorithm over groups of super-lists, super-lists and lists."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np
from numba import njit

from ._cpu_common import F, inner

# Up to so many super-lists are split off flat; more, by way of groups of 32.
FLAT_SUPERS = 128


@njit
def copy_row(row, to):
    """to[:] = row. Numba's own assignment takes seconds more to compile, for the words of an error."""
    for d in range(row.size):
        to[d] = row[d]


@inner
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


@inner
def _lloyd(x, rows, C, iterations, out):
    """Lloyd's k-means of the rows x[rows] into C lists; uniform-stride start; an emptied list keeps its centroid."""
    n = rows.size
    D = x.shape[1]
    cent = np.empty((C, D), F)
    half = np.empty(C, F)
    count = np.zeros(C, np.int64)
    total = np.zeros((C, D), F)
    for c in range(C):
        copy_row(x[rows[(2 * c + 1) * n // (2 * C)]], cent[c])
    for i in range(out.size):
        out[i] = -1
    for it in range(iterations + 1):
        for c in range(C):
            a = F(0.0)
            for d in range(D):
                a += cent[c, d] * cent[c, d]
            half[c] = F(0.5) * a
        changed = _assign(x, rows, cent, half, out)
        if it == iterations or changed == 0:
            break
        for c in range(C):
            count[c] = 0
            for d in range(D):
                total[c, d] = F(0.0)
        for i in range(n):
            c = out[i]
            count[c] += 1
            for d in range(D):
                total[c, d] += x[rows[i], d]
        for c in range(C):
            if count[c] > 0:
                inv = F(1.0) / F(count[c])
                for d in range(D):
                    cent[c, d] = total[c, d] * inv
    return cent, half


@inner
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


@inner
def cluster(x, rows_per_super, rows_per_list, iterations, stride, perm, list_end, super_end):
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
            by_list, e = _split(
                x, rows_u, max(1, (rows_u.size + rows_per_list // 2) // rows_per_list), iterations, np.int64(1)
            )
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
