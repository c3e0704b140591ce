"""Numba kernels that seal hot rows into segments: clustering, in-place permutation, statistics of lists."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ._cpu_common import FAST, F, inner, segment_part
from ._cpu_kmeans import cluster, copy_row
from ._cpu_parts import each
from ._cpu_seal_lists import write_lists, write_supers


class Rows(NamedTuple):
    """The rows to seal, ``[B, Hkv, ...]``: as they are kept, in words, so that a kernel is compiled once for all types;
    as floats, the first of which is row ``floats_from``; the keys in the metric, of which that is ``bounds[0]``.
    """

    keys: Any
    values: Any
    key_floats: Any
    value_floats: Any
    floats_from: Any
    in_metric: Any


class Clusters(NamedTuple):
    """What clustering found, per segment and (batch row, KV head): the order of rows, and where lists end in it."""

    order: Any
    list_end: Any
    super_end: Any
    lists: Any
    supers: Any


@inner
def _room(bounds, heads, rows_per_super):
    """Room for the clusters of every segment and KV head."""
    N = bounds.size - 1
    longest = 0
    for s in range(N):
        longest = max(longest, bounds[s + 1] - bounds[s])
    most = longest // rows_per_super + longest // (32 * rows_per_super) + 2
    return Clusters(
        np.empty((N, heads, longest), np.int32),
        np.empty((N, heads, longest), np.int32),
        np.empty((N, heads, most), np.int32),
        np.zeros((N, heads), np.int64),
        np.zeros((N, heads), np.int64),
    )


@inner
def _cluster_head(t, dealt, rows, start, bounds, how, found):
    """Cluster the rows of the segment and KV head dealt to place t, in the metric."""
    if dealt[t] < 0:
        return
    s, b, h, lo, n = segment_part(dealt[t], rows.keys.shape[1], bounds, start)
    bh = b * rows.keys.shape[1] + h
    if n > 0:
        x = rows.in_metric[b, h, lo - bounds[0] : bounds[s + 1] - bounds[0]]
        found.lists[s, bh], found.supers[s, bh] = cluster(
            x, how.rows_per_super_list, how.rows_per_list, how.iterations, how.training_stride,
            found.order[s, bh], found.list_end[s, bh],
            found.super_end[s, bh],
        )  # fmt: skip


@inner
def _count(found, first_segment, lists, supers, segments):
    """Note where each segment's lists and super-lists begin and end, and how many there are in all."""
    B, H = lists.used.shape
    N = found.lists.shape[0]
    for b in range(B):
        for h in range(H):
            for s in range(N):
                at = first_segment + s
                segments.lists[b, h, at + 1] = segments.lists[b, h, at] + found.lists[s, b * H + h]
                segments.supers[b, h, at + 1] = segments.supers[b, h, at] + found.supers[s, b * H + h]
            lists.used[b, h] = segments.lists[b, h, first_segment + N]
            supers.used[b, h] = segments.supers[b, h, first_segment + N]
            supers.first[b, h, supers.used[b, h]] = lists.used[b, h]


@inner
def _permute(rows, lo, order):
    """Put the rows of one KV head from place lo on, as words, into an order."""
    n = order.size
    old = np.empty((n, rows.shape[1]), rows.dtype)
    for i in range(n):
        copy_row(rows[lo + i], old[i])
    for i in range(n):
        copy_row(old[order[i]], rows[lo + i])


@inner
def _ordered(rows, first, order):
    """The rows from place first on in an order."""
    found = np.empty((order.size, rows.shape[1]), F)
    for i in range(order.size):
        copy_row(rows[first + order[i]], found[i])
    return found


@inner
def _write_head(t, dealt, rows, positions, codes, start, bounds, first_segment, coded, found, lists, supers, segments):
    """Permute the rows of the segment and KV head dealt to place t, and write what is known of their lists."""
    if dealt[t] < 0:
        return
    s, b, h, lo, n = segment_part(dealt[t], rows.keys.shape[1], bounds, start)
    bh, segment = b * rows.keys.shape[1] + h, first_segment + s
    order, at = found.order[s, bh, :n], positions[b, h]
    came = np.empty(n, np.int32)
    for i in range(n):
        came[i] = at[lo + i]
    for i in range(n):
        at[lo + i] = came[order[i]]
    # Where rows are kept in float32 these are the very rows that are moved next.
    x = _ordered(rows.key_floats[b, h], lo - rows.floats_from, order)
    y = _ordered(rows.value_floats[b, h], lo - rows.floats_from, order)
    z = _ordered(rows.in_metric[b, h], lo - bounds[0], order)
    _permute(rows.keys[b, h], lo, order)
    _permute(rows.values[b, h], lo, order)
    base, trace = segments.lists[b, h, segment], segments.trace[b, h]
    trace[segment] = write_lists(
        x, y, z, lo, found.list_end[s, bh], found.lists[s, bh], lists.begin[b, h, base:],
        lists.size[b, h, base:], lists.variance[b, h, base:], lists.key[b, h, base:], lists.value[b, h, base:],
        codes[b, h], coded, segments.shape[b, h, s], segments.cross[b, h, s],
    )  # fmt: skip
    to = segments.supers[b, h, segment]
    write_supers(
        x, y, z, found.list_end[s, bh], found.super_end[s, bh], found.supers[s, bh], base,
        supers.first[b, h, to:], supers.size[b, h, to:], supers.variance[b, h, to:], supers.key[b, h, to:],
        supers.value[b, h, to:],
    )  # fmt: skip


@inner
def _dealt(bounds, heads, threads):
    """The segments of all KV heads dealt to threads: an equal share of places each, -1 for none. The next one, and
    earlier segments are the larger ones, goes to the thread with the fewest rows."""
    dealt = np.full((threads, (bounds.size - 1) * heads), np.int64(-1))
    count, rows = np.zeros(threads, np.int64), np.zeros(threads, np.int64)
    for w in range(dealt.shape[1]):
        least = np.int64(0)
        for t in range(threads):
            if rows[t] < rows[least]:
                least = np.int64(t)
        dealt[least, count[least]] = w
        count[least] += 1
        rows[least] += bounds[w // heads + 1] - bounds[w // heads]
    return dealt.ravel()


@njit(fastmath=FAST, cache=True, nogil=True)
def seal(rows, positions, codes, start, bounds, first_segment, how, coded, threads, lists, supers, segments):
    """See seal.seal_rows; how is a Clustering."""
    heads = positions.shape[0] * positions.shape[1]
    found, dealt = _room(bounds, heads, how.rows_per_super_list), _dealt(bounds, heads, threads)
    each(dealt.size, _cluster_head, (dealt, rows, start, bounds, how, found))
    _count(found, first_segment, lists, supers, segments)
    each(
        dealt.size, _write_head,
        (dealt, rows, positions, codes, start, bounds, first_segment, coded, found, lists, supers, segments),
    )  # fmt: skip
