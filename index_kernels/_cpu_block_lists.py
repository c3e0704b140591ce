"""Which lists a block of a prompt opens, and which summaries answer for the others, on the CPU.

The specification is ``blocks._chosen`` and ``blocks._answering``.
"""

# mypy: ignore-errors
# (Numba compiles the kernels and infers their types itself.)

import math
import threading
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from ._cpu_columns import COLUMNS, score_columns
from ._cpu_common import FAST, NEG, F, exp32, flat_rows, inner, row_scale, softcapped
from ._cpu_list_steps import choose
from ._cpu_parts import each
from .lists import APART, ASKING, FREEZES, LOG_ROWS, MOST_LOGIT, MOST_ROWS
from .packed import row_dim
from .summaries import Array

# Lists that are weighed in one go.
SOME = 128


class Chosen(NamedTuple):
    """What a block reads of lists.

    Attributes:
        begin, size: int64 ``[B, Hkv, n]``, runs of rows, of which the first ``runs [B, Hkv]`` count; lists that stand
            side by side are one run.
        answering: the summaries that answer for lists not opened: mean keys and values ``[B, Hkv, n, ...]``, float32,
            variances and logs of sizes ``[B, Hkv, n]``, and how many of them count, ``[B, Hkv]``.
        rows_read, lists_opened: in all.

    Arrays are this thread's room: the next block has them.
    """

    begin: Array
    size: Array
    runs: Array
    answering: tuple
    rows_read: int
    lists_opened: int


class _Room(threading.local):
    """Arrays that blocks use one after the other: to have new ones of the system takes as long as to fill them."""

    def __init__(self):
        self._held = {}

    def array(self, name, *shape, dtype=F):
        """An array with anything in it."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].size < size:
            self._held[name] = np.empty(size + size // 2, dtype)
        return self._held[name][:size].reshape(shape)


_room = _Room()


def choose_lists(query, shape, known, lanes, table, how):
    """What is opened for a block whose other rows have the log-sum-exp ``known [B, Hq, m]``: see Chosen.

    query and shape: see ``_cpu_blocks``.
    """
    used, super_used = table.lists.used, table.supers.used
    lists, supers = _level(table.lists), _level(table.supers)
    most, most_supers = lists[-1].shape[2], supers[-1].shape[2]
    first = np.ascontiguousarray(table.supers.first[:, :, : most_supers + 1])
    begins = np.ascontiguousarray(table.lists.begin[:, :, :most])
    begin, size = _room.array("runs", 2, *used.shape, most, dtype=np.int64)
    runs, count = np.zeros((2, *used.shape), np.int64)
    key, value = (
        _room.array(name, *used.shape, most + most_supers, row_dim(torch.from_numpy(rows)))
        for name, rows in (("key", table.lists.key), ("value", table.lists.value))
    )
    variance, log_size = _room.array("numbers", 2, *used.shape, most + most_supers)
    group, m = shape[2], known.shape[2]
    asking = group * (1 + (m - 1 - min(ASKING // 2, m - 1)) // ASKING)
    columns = (asking + COLUMNS - 1) // COLUMNS * COLUMNS
    weights = _room.array("weights", *used.shape, most, columns)
    super_weights = _room.array("super weights", *used.shape, most_supers, columns)
    answering, read = (key, value, variance, log_size, count), np.zeros(2, np.int64)
    _choose(
        query, shape, known, lanes[0], lanes[2], lists, supers, used, super_used, begins, first, table.shape,
        (F(how.alpha), how.rows_read), weights, super_weights, begin, size, runs, answering, read,
    )  # fmt: skip
    return Chosen(begin, size, runs, answering, int(read[0]), int(read[1]))


def _level(arrays):
    """Mean keys and values, flat with their steps, sizes and variances of the lists or super-lists in use."""
    most = int(arrays.used.max())
    vectors = [part for rows in (arrays.key, arrays.value) for part in flat_rows(torch.from_numpy(rows))]
    return *vectors, *(np.ascontiguousarray(part[:, :, :most]) for part in (arrays.size, arrays.variance))


@inner
def spread_of(qs, shape, products, spread, root, ck, width):
    """Variance of the logits of queries ``qs [D, columns]`` per unit of a list's variance, and its root.

    shape ``[D, D]``; products is room for as much as qs.
    """
    D, columns = qs.shape
    score_columns(qs.ravel(), columns, shape.ravel(), 0, D, D, products.ravel(), ck, width)
    for g in range(columns):
        spread[g] = F(0.0)
    for d in range(D):
        for g in range(columns):
            spread[g] += qs[d, g] * products[d, g]
    for g in range(columns):
        spread[g] = max(spread[g], F(1e-12))
        root[g] = np.sqrt(spread[g])


@inner
def raise_logits(logits, softcap, alpha, spread, root, variance, log_size):
    """Raise the logits of a summary by the scatter of its rows', and by the log of how many they are."""
    frozen = np.sqrt(F(FREEZES) * variance)
    for g in range(logits.size):
        x, slope = logits[g], F(1.0)
        if softcap > F(0.0):
            x = softcapped(x, softcap)
            slope = F(1.0) - (x / softcap) * (x / softcap)
        v = spread[g] * variance * slope * slope
        held = F(2.0) * (frozen * root[g] * slope - F(LOG_ROWS))
        logits[g] = x + alpha * (v if v < F(FREEZES) else held) + log_size


@inner
def _ask(u, query, shape, known, ck, width, moment, qs, spread, root, least):
    """Fill in what asks of one KV head: every ASKING-th position."""
    memory, qb, qh, qm, scale = query
    D, H, group, _, _ = shape
    b, h, m = u // H, u % H, known.shape[2]
    at = min(ASKING // 2, m - 1)
    g = 0
    while at < m:
        for i in range(group):
            place = b * qb + (h * group + i) * qh + at * qm
            for d in range(D):
                qs[b, h, d, g] = memory[place + d] * scale
            least[b, h, g] = known[b, h * group + i, at]
            g += 1
        at += ASKING
    spread_of(qs[b, h], moment[b, h], np.empty(qs.shape[2:], F), spread[b, h], root[b, h], ck, width)
    # What fills up the columns asks for nothing.
    for i in range(g, root.shape[2]):
        root[b, h, i] = F(0.0)


@inner
def _weigh_some(w, H, softcap, alpha, ck, width, level, used, asked, weights, sums):
    """Weights ``exp(logit - least)`` of SOME summaries of one KV head, no larger than e to MOST_LOGIT; their sums."""
    memory, kb, kh, kt, _, _, _, _, sizes, variances = level
    qs, spread, root, least = asked
    b, h, part = w % (used.size) // H, w % H, w // used.size
    columns, lo = qs.shape[3], part * SOME
    n = min(SOME, used[b, h] - lo)
    for g in range(columns):
        sums[b, h, part, g] = F(0.0)
    if n <= 0:
        return
    to = weights[b, h, lo : lo + n]
    score_columns(qs[b, h].ravel(), columns, memory, b * kb + h * kh + lo * kt, kt, n, to.ravel(), ck, width)
    for i in range(n):
        size = sizes[b, h, lo + i]
        raise_logits(
            to[i], softcap, alpha, spread[b, h], root[b, h], variances[b, h, lo + i],
            np.log(F(size)) if size > 0 else NEG,
        )  # fmt: skip
        for g in range(columns):
            x = exp32(min(to[i, g] - least[b, h, g], F(MOST_LOGIT)))
            to[i, g] = x
            sums[b, h, part, g] += x


@inner
def _cost_some(w, H, level, used, weights, share, costs):
    """What leaving SOME summaries of one KV head unread may cost all that ask."""
    b, h, lo = w % (used.size) // H, w % H, w // used.size * SOME
    sizes, variances = level[8], level[9]
    for i in range(lo, min(lo + SOME, used[b, h])):
        cost = F(0.0)
        for g in range(share.shape[2]):
            cost += share[b, h, g] * weights[b, h, i, g]
        costs[b, h, i] = cost * np.sqrt(variances[b, h, i]) if sizes[b, h, i] > 0 else F(0.0)


@inner
def _unpack(rows, at, to):
    """A packed row as floats."""
    scale = row_scale(rows[at:], to.size)
    for d in range(to.size):
        to[d] = scale * F(rows[at + d])


@inner
def _copy_summary(b, h, n, level, i, answering):
    """Let summary i of a level answer, behind n others."""
    keys, kb, kh, kt, values, vb, vh, vt, size, variance = level
    key, value, variances, log_size, _ = answering
    _unpack(keys, b * kb + h * kh + i * kt, key[b, h, n])
    _unpack(values, b * vb + h * vh + i * vt, value[b, h, n])
    variances[b, h, n], log_size[b, h, n] = variance[b, h, i], np.log(F(size[b, h, i]))


@inner
def _answer(b, h, costs, whole, taken, lists, supers, first, used, least, answering):
    """Lists that are not taken, or super-lists in their place; returns how many."""
    sizes, super_sizes, n = lists[8], supers[8], 0
    for s in range(used):
        if super_sizes[b, h, s] <= 0:
            continue
        saved, price, opened = whole[b, h, s], F(-1.0), False
        for i in range(first[b, h, s], first[b, h, s + 1]):
            if sizes[b, h, i] > 0:
                saved -= costs[b, h, i]
                price += F(1.0)
                opened |= taken[b, h, i]
        if not (opened or super_sizes[b, h, s] > MOST_ROWS or saved > F(APART) * least * price):
            _copy_summary(b, h, n, supers, s, answering)
            n += 1
            continue
        for i in range(first[b, h, s], first[b, h, s + 1]):
            if sizes[b, h, i] > 0 and not taken[b, h, i]:
                _copy_summary(b, h, n, lists, i, answering)
                n += 1
    return n


@inner
def _runs_of(b, h, begins, sizes, chosen, n, begin, size):
    """The rows of the n lists chosen as runs; returns how many."""
    runs, end = 0, np.int64(-1)
    for j in range(n):
        i = chosen[b, h, j]
        if begins[b, h, i] == end:
            size[b, h, runs - 1] += sizes[b, h, i]
        else:
            begin[b, h, runs], size[b, h, runs] = begins[b, h, i], sizes[b, h, i]
            runs += 1
        end = np.int64(begins[b, h, i]) + sizes[b, h, i]
    return runs


@inner
def _tell(
    u, H, begins, chosen, counts, lowest, costs, whole, taken, lists, supers, first, super_used, begin, size, runs,
    answering,
):  # fmt: skip
    """Write what is opened of one KV head, and what answers for the rest."""
    b, h = u // H, u % H
    runs[b, h] = _runs_of(b, h, begins, lists[8], chosen, counts[b, h], begin, size)
    answering[4][b, h] = _answer(
        b, h, costs, whole, taken, lists, supers, first, super_used[b, h], lowest[b], answering
    )


@njit(fastmath=FAST, cache=True, nogil=True)
def _choose(
    query, shape, known, ck, width, lists, supers, used, super_used, begins, first, moment, budget, weights,
    super_weights, begin, size, runs, answering, read,
):  # fmt: skip
    D, H, _, _, softcap = shape
    alpha, rows = budget
    sizes, super_sizes = lists[8], supers[8]
    B, columns = known.shape[0], weights.shape[3]
    qs, least = np.zeros((B, H, D, columns), F), np.zeros((B, H, columns), F)
    spread, root = np.zeros((B, H, columns), F), np.zeros((B, H, columns), F)
    each(B * H, _ask, (query, shape, known, ck, width, moment, qs, spread, root, least))
    n, s = sizes.shape[2], super_sizes.shape[2]
    parts, super_parts = (n + SOME - 1) // SOME, (s + SOME - 1) // SOME
    sums = np.empty((B, H, parts + super_parts, columns), F)
    asked = qs, spread, root, least
    some, some_supers = sums[:, :, :parts], sums[:, :, parts:]
    each(B * H * parts, _weigh_some, (H, softcap, alpha, ck, width, lists, used, asked, weights, some))
    each(
        B * H * super_parts, _weigh_some,
        (H, softcap, alpha, ck, width, supers, super_used, asked, super_weights, some_supers),
    )  # fmt: skip
    share = root
    for u in range(B * H):
        b, h = u // H, u % H
        for g in range(columns):
            total = F(1.0)
            for part in range(parts):
                total += sums[b, h, part, g]
            share[b, h, g] /= total
    costs, whole, per_row = np.zeros((B, H, n), F), np.zeros((B, H, s), F), np.zeros((B, H, n), F)
    each(B * H * parts, _cost_some, (H, lists, used, weights, share, costs))
    each(B * H * super_parts, _cost_some, (H, supers, super_used, super_weights, share, whole))
    taken, chosen, counts = np.empty((B, H, n), np.bool_), np.empty((B, H, n), np.int64), np.zeros((B, H), np.int64)
    lowest = np.empty(B, F)
    for b in range(B):
        for h in range(H):
            for i in range(used[b, h]):
                per_row[b, h, i] = costs[b, h, i] / F(max(sizes[b, h, i], 1))
        read[0] += choose(per_row, sizes, b, used, rows, taken, chosen, counts)
        lowest[b] = F(np.inf)
        for h in range(H):
            read[1] += counts[b, h]
            for j in range(counts[b, h]):
                lowest[b] = min(lowest[b], per_row[b, h, chosen[b, h, j]])
    each(
        B * H, _tell,
        (
            H, begins, chosen, counts, lowest, costs, whole, taken, lists, supers, first, super_used, begin, size, runs,
            answering,
        ),
    )  # fmt: skip
