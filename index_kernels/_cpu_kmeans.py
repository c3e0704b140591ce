"""k-means for sealing: Lloyd's algorithm over groups of super-lists, super-lists and lists."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np
from numba import njit

from ._cpu_columns import SIXTEEN, compare_four
from ._cpu_common import F, inner

# Up to so many super-lists are split off flat; more, by way of groups of 32.
FLAT_SUPERS = 128
# Rows that are compared with all centroids while they are in the first cache.
TILE = 64


@njit
def copy_row(row, to):
    """to[:] = row. Numba's own assignment takes seconds more to compile, for the words of an error."""
    for d in range(row.size):
        to[d] = row[d]


@inner
def _fill(x, rows, first, tile):
    """Put the rows x[rows[first]], x[rows[first + 1]], ... into the columns of tile [D, TILE]; returns how many."""
    n = min(TILE, rows.size - first)
    for i in range(n):
        r = rows[first + i]
        for d in range(x.shape[1]):
            tile[d, i] = x[r, d]
    return n


@inner
def _nearest(tile, n, cent, half, best, near, out, first):
    """Nearest centroid (argmax x.c - |c|^2 / 2) of the n rows in tile; returns how many of out[first:] changed.

    best, near [TILE] are scratch.
    """
    D = tile.shape[0]
    for i in range(TILE):
        best[i], near[i] = F(-np.inf), np.int32(0)
    for c in range(0, half.size, 4):
        for i in range(0, n, SIXTEEN):
            compare_four(tile, i, TILE, cent, c * D, D, half, c, best, near)
    changed = 0
    for i in range(n):
        if out[first + i] != near[i]:
            changed += 1
        out[first + i] = near[i]
    return changed


@inner
def _halves(cent, C, half):
    """half = |c|^2 / 2 of the first C centroids, infinite for those that make them up to a multiple of four."""
    for c in range(half.size):
        a = F(0.0) if c < C else F(np.inf)
        for d in range(cent.shape[1]):
            a += cent[c, d] * cent[c, d]
        half[c] = F(0.5) * a


@inner
def _room(C, D):
    """Centroids made up to a multiple of four, what they are compared by, and the scratch of _nearest."""
    made_up = (C + 3) // 4 * 4
    return np.zeros((made_up, D), F), np.empty(made_up, F), np.empty(TILE, F), np.empty(TILE, np.int32)


@inner
def _lloyd(x, rows, C, iterations, out, cent, half, best, near):
    """Lloyd's k-means of the rows x[rows] into C lists; uniform-stride start; an emptied list keeps its centroid."""
    n, D = rows.size, x.shape[1]
    count = np.zeros(C, np.int64)
    total = np.zeros((C, D), F)
    tiles = np.zeros(((n + TILE - 1) // TILE, D, TILE), F)
    for t in range(tiles.shape[0]):
        _fill(x, rows, t * TILE, tiles[t])
    for c in range(C):
        copy_row(x[rows[(2 * c + 1) * n // (2 * C)]], cent[c])
    for i in range(out.size):
        out[i] = -1
    for it in range(iterations + 1):
        _halves(cent, C, half)
        changed = 0
        for t in range(tiles.shape[0]):
            changed += _nearest(tiles[t], min(TILE, n - t * TILE), cent, half, best, near, out, t * TILE)
        if it == iterations or changed == 0:
            break
        for c in range(C):
            count[c] = 0
            for d in range(D):
                total[c, d] = F(0.0)
        for i in range(n):
            c, r = out[i], rows[i]
            count[c] += 1
            for d in range(D):
                total[c, d] += x[r, d]
        for c in range(C):
            if count[c] > 0:
                inv = F(1.0) / F(count[c])
                for d in range(D):
                    cent[c, d] = total[c, d] * inv


@inner
def _split(x, rows, parts, iterations, stride):
    """Split rows into at most `parts` clusters (k-means on every stride-th row): rows grouped, offsets [parts + 1]."""
    n = rows.size
    owner = np.zeros(n, np.int64)
    if parts > 1:
        cent, half, best, near = _room(parts, x.shape[1])
        train = rows[::stride].copy()
        found = owner if stride == 1 else np.empty(train.size, np.int64)
        _lloyd(x, train, parts, iterations, found, cent, half, best, near)
        if stride > 1:
            tile = np.zeros((x.shape[1], TILE), F)
            for first in range(0, n, TILE):
                _nearest(tile, _fill(x, rows, first, tile), cent, half, best, near, owner, first)
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
