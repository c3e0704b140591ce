"""attend_block on the CPU: a block's own and the newest rows, the rows of the lists it opens, summaries.

Each kernel adds one source to a state ``(out, lse)`` that it finds and leaves normalised, a piece of the block and a
tile of rows in the caches at a time. Queries, rows and summaries are read where they stand, whatever they are kept as;
``_cpu_block_lists`` says which lists are opened, and what answers for the others.
"""

# mypy: ignore-errors
# (Numba compiles the kernels and infers their types itself.)

import time

import numpy as np
import torch
from numba import njit

from ._cpu_block_lists import choose_lists, raise_logits, spread_of
from ._cpu_columns import COLUMNS, add_columns, score_columns, weigh_columns
from ._cpu_common import FAST, NEG, F, exp32, flat_rows, inner, softcapped
from ._cpu_halves import FASTER, add_pairs, in_pairs, pair_columns, score_pairs, take_keys, take_values
from ._cpu_parts import each
from ._cpu_start import use_torchs_threads
from ._cpu_tiles import tile_lanes
from .packed import row_dim

# The log-sum-exp of no row, as a number that hidden rows cannot reach.
EMPTY = F(0.5) * NEG
# Rows of a tile, and queries of a piece: both tiles of rows and what a piece accumulates have to fit the caches.
TILE, PIECE = 64, 96


class _Block:
    """A block's queries ``[B, Hq, m, D]`` over rows ``[B, Hkv, T, ...]``, and the state that sources add to.

    ``out [B, Hq, m, Dv]``, ``lse [B, Hq, m]``.
    """

    def __init__(self, query, keys, values, scale, softcap) -> None:
        query = query.detach().float()
        batch, heads, m, dim = query.shape
        group = heads // keys.shape[1]
        self.out = torch.empty(batch, heads, m, row_dim(values))
        self.lse = torch.full((batch, heads, m), float("-inf"))
        self.lanes = tile_lanes(dim, self.out.shape[3])
        self.query = *flat_rows(query), F(scale)
        # What all kernels take: the softcap is 0 for none.
        self.how = dim, keys.shape[1], group, max(1, PIECE // group) * group, F(softcap or 0.0)
        self._rows = *flat_rows(keys), *flat_rows(values)
        use_torchs_threads()

    def add_rows(self, begin, size, count, first, halves):
        """Rows of ``count [B, Hkv]`` runs ``begin .. begin + size``, ``[B, Hkv, n]``; those from ``first`` on causal.

        They are multiplied as bfloat16 where ``halves [B]``. Returns the log-sum-exp of this source.
        """
        return self._added(_rows, (self._rows, (begin, size, count, first), halves))

    def add_summaries(self, answering, moments, halves):
        """What answers for lists that are not opened, see Chosen, and shape, cross, alpha and beta.

        Returns the log-sum-exp of this source.
        """
        return self._added(_summaries, (answering, moments, halves))

    def _added(self, kernel, source):
        own = torch.empty_like(self.lse)
        kernel(self.query, *self.lanes, self.how, *source, self.out.numpy(), self.lse.numpy(), own.numpy())
        return own


def attend(query, keys, values, table, how, start):
    """What ``blocks.BlockAnswer`` has, in its order; see ``blocks.attend_block``."""
    began, first = time.perf_counter(), keys.shape[2] - query.shape[2]
    block = _Block(query, keys, values, how.scale, how.softcap)
    sinks = np.minimum(start.numpy() + how.n_sink, first)
    begin = np.stack([start.numpy(), np.maximum(sinks, how.sealed)], axis=1)
    size = np.stack([sinks, np.full_like(sinks, keys.shape[2])], axis=1) - begin
    begin, size = (_for_heads(part, keys.shape[1]) for part in (begin, size))
    as_they_are = np.zeros(len(begin), np.bool_)
    lses = [block.add_rows(begin, size, np.full(begin.shape[:2], 2), first, as_they_are)]
    scanned = time.perf_counter()
    chosen = choose_lists(block.query, block.how, block.lse.numpy(), block.lanes, table, how)
    # Where all is read, the answer is a dense scan's.
    left = how.rows_read < keys.shape[1] * (how.sealed - sinks)
    halves = left & (how.halves and FASTER and in_pairs(block.lanes))
    lses.append(block.add_rows(chosen.begin, chosen.size, chosen.runs, how.sealed, halves))
    opened, answering = time.perf_counter(), 0
    if how.tail:
        moments = table.shape, table.cross, F(how.alpha), F(how.beta)
        lses.append(block.add_summaries(chosen.answering, moments, halves))
        answering = int(chosen.answering[-1].sum())
    else:
        lses.append(torch.full_like(block.lse, float("-inf")))
    done = time.perf_counter()
    return (
        block.out, block.lse, torch.stack(lses), chosen.rows_read, chosen.lists_opened, int(table.lists.used.sum()),
        answering, (scanned - began, opened - scanned, done - opened),
    )  # fmt: skip


def dense_many(query, keys, values, *, scale, start, softcap):
    """See reference.dense_decode; causal."""
    block = _Block(query, keys, values, scale, softcap)
    begin = _for_heads(start.numpy()[:, None], keys.shape[1])
    count, as_they_are = np.ones(begin.shape[:2], np.int64), np.zeros(len(begin), np.bool_)
    block.add_rows(begin, keys.shape[2] - begin, count, keys.shape[2] - query.shape[2], as_they_are)
    return block.out, block.lse


def _for_heads(runs, heads):
    """What holds of each batch row, ``[B, n]``, for its KV heads: ``[B, Hkv, n]``."""
    return np.repeat(runs[:, None], heads, axis=1)


@inner
def _pieces(how, out):
    """How many pieces a block has, of all batch rows and KV heads."""
    _, H, group, most, _ = how
    return out.shape[0] * H * ((out.shape[2] * group + most - 1) // most)


@inner
def _begin(query, how, out, lse, b, h, lo, n):
    """A piece of n queries from ``lo`` on: they and room for logits, side by side, and the state that rows add to."""
    memory, qb, qh, qm, scale = query
    D, _, group, _, _ = how
    columns = (n + COLUMNS - 1) // COLUMNS * COLUMNS
    qs, state = np.zeros((D, columns), F), np.zeros((columns, out.shape[3]), F)
    logits = np.empty((TILE, columns), F)
    top, total, shrink = np.zeros(columns, F), np.zeros(columns, F), np.empty(columns, F)
    for g in range(n):
        head, at = h * group + (lo + g) % group, (lo + g) // group
        place = b * qb + head * qh + at * qm
        for d in range(D):
            qs[d, g] = memory[place + d] * scale
        top[g] = max(lse[b, head, at], EMPTY)
        if top[g] > EMPTY:
            for d in range(state.shape[1]):
                state[g, d] = out[b, head, at, d]
    return qs, logits, state, top, total, shrink


@inner
def _weigh(piece, n):
    """Turn the logits of ``n`` rows into weights, and the state into one by the new tops."""
    _, logits, state, top, total, shrink = piece
    weigh_columns(logits.ravel(), top.size, n, top, total, shrink)
    for g in range(top.size):
        if shrink[g] < F(1.0):
            for d in range(state.shape[1]):
                state[g, d] *= shrink[g]


@inner
def _end(piece, how, n, out, lse, own, b, h, lo):
    """Write the piece's state with what was added to it."""
    _, _, state, top, total, _ = piece
    group = how[2]
    for g in range(n):
        head, at = h * group + (lo + g) % group, (lo + g) // group
        before, some = lse[b, head, at], top[g] > EMPTY
        s = total[g] + (exp32(before - top[g]) if before > EMPTY else F(0.0))
        own[b, head, at] = top[g] + np.log(total[g]) if some and total[g] > F(0.0) else -np.inf
        lse[b, head, at] = top[g] + np.log(s) if some else -np.inf
        by = F(1.0) / s if some else F(0.0)
        for d in range(state.shape[1]):
            out[b, head, at, d] = state[g, d] * by


@inner
def _in_pairs(piece, halve):
    """The piece's queries as pairs of bfloat16 if ``halve``, and room for a tile's keys, values and weights so."""
    qs, _, state, top, _, _ = piece
    pairs = np.empty(qs.shape[0] // 2 * top.size, np.int32)
    if halve:
        pair_columns(qs.ravel(), top.size, qs.shape[0], pairs)
    keys, values = np.empty(TILE * (qs.shape[0] // 2), np.int32), np.empty(TILE // 2 * state.shape[1], np.int32)
    return pairs, keys, values, np.empty(TILE // 2 * top.size, np.int32)


@inner
def _add_pairs(piece, pairs, n, cv, width):
    """Add the values of a tile of n rows by their weights."""
    _, logits, state, top, _, _ = piece
    _, _, values, weights = pairs
    pair_columns(logits.ravel(), top.size, n, weights)
    add_pairs(weights, top.size, values, n, state.ravel(), cv, width)


@inner
def _rows_piece(w, query, lanes, how, rows, source, halves, out, lse, own):
    keys, kb, kh, kt, values, vb, vh, vt = rows
    begin, size, runs, first = source
    ck, cv, width = lanes
    _, H, group, most, softcap = how
    units, of_all = out.shape[0] * H, out.shape[2] * group
    # Early and late positions in turn: late ones see more.
    c, last = w // units, (of_all - 1) // most
    lo = (c // 2 if c % 2 == 0 else last - c // 2) * most
    b, h, count = w % units // H, w % H, min(most, of_all - lo)
    piece, halve = _begin(query, how, out, lse, b, h, lo, count), halves[b]
    qs, logits, state, top, _, _ = piece
    pairs = _in_pairs(piece, halve)
    columns, key_at, value_at = top.size, b * kb + h * kh, b * vb + h * vh
    late, places = first + (lo + count) // group, np.empty(TILE, np.int64)
    run, done = 0, 0  # the run that comes next, and how many of its rows were taken
    while run < runs[b, h]:
        filled = 0  # rows of a tile, of several runs
        while run < runs[b, h] and filled < TILE:
            at = begin[b, h, run] + done
            n = min(min(size[b, h, run] - done, late - at), TILE - filled)
            if n > 0:
                if halve:
                    take_keys(keys, key_at + at * kt, kt, n, pairs[1], filled, ck, width)
                    take_values(values, value_at + at * vt, vt, n, pairs[2], filled, cv, width)
                else:
                    score_columns(
                        qs.ravel(), columns, keys, key_at + at * kt, kt, n, logits.ravel()[filled * columns :], ck,
                        width,
                    )  # fmt: skip
                for i in range(n):
                    places[filled + i] = at + i
                filled, done = filled + n, done + n
            if done >= min(size[b, h, run], late - begin[b, h, run]):
                run, done = run + 1, 0
        if halve:
            score_pairs(pairs[0], columns, pairs[1], filled, logits.ravel(), ck, width)
        if softcap > F(0.0):
            for i in range(filled):
                for g in range(count):
                    logits[i, g] = softcapped(logits[i, g], softcap)
        for i in range(filled):
            for g in range(min((places[i] - first) * group - lo, count)):
                logits[i, g] = NEG
        _weigh(piece, filled)
        if halve:
            _add_pairs(piece, pairs, filled, cv, width)
            continue
        taken = 0
        while taken < filled:
            n = 1
            while taken + n < filled and places[taken + n] == places[taken] + n:
                n += 1
            add_columns(
                logits.ravel()[taken * columns :], columns, values, value_at + places[taken] * vt, vt, n, state.ravel(),
                cv, width,
            )  # fmt: skip
            taken += n
    _end(piece, how, count, out, lse, own, b, h, lo)


@njit(fastmath=FAST, cache=True, nogil=True)
def _rows(query, ck, cv, width, how, rows, source, halves, out, lse, own):
    each(_pieces(how, out), _rows_piece, (query, (ck, cv, width), how, rows, source, halves, out, lse, own))


@inner
def _summaries_piece(w, query, lanes, how, source, moments, halves, out, lse, own):
    keys, values, variance, log_size, counts = source
    shape, cross, alpha, beta = moments
    ck, cv, width = lanes
    D, H, group, most, softcap = how
    units = out.shape[0] * H
    b, h, lo = w % units // H, w % H, w // units * most
    count = min(most, out.shape[2] * group - lo)
    piece = _begin(query, how, out, lse, b, h, lo, count)
    qs, logits, state, top, _, shrink = piece
    columns = top.size
    products, spread, root = np.empty((D, columns), F), np.empty(columns, F), np.empty(columns, F)
    spread_of(qs, shape[b, h], products, spread, root, ck, width)
    key, value, variance, log_size = keys[b, h], values[b, h], variance[b, h], log_size[b, h]
    tilt, at, pairs = np.zeros(columns, F), 0, _in_pairs(piece, halves[b])
    while at < counts[b, h]:
        n, kt, vt = min(TILE, counts[b, h] - at), key.shape[1], value.shape[1]
        if halves[b]:
            take_keys(key.ravel(), at * kt, kt, n, pairs[1], 0, ck, width)
            score_pairs(pairs[0], columns, pairs[1], n, logits.ravel(), ck, width)
        else:
            score_columns(qs.ravel(), columns, key.ravel(), at * kt, kt, n, logits.ravel(), ck, width)
        for i in range(n):
            raise_logits(logits[i], softcap, alpha, spread, root, variance[at + i], log_size[at + i])
        _weigh(piece, n)
        for g in range(columns):
            tilt[g] *= shrink[g]
        for i in range(n):
            for g in range(columns):
                tilt[g] += logits[i, g] * variance[at + i]
        if halves[b]:
            take_values(value.ravel(), at * vt, vt, n, pairs[2], 0, cv, width)
            _add_pairs(piece, pairs, n, cv, width)
        else:
            add_columns(logits.ravel(), columns, value.ravel(), at * vt, vt, n, state.ravel(), cv, width)
        at += n
    # Their values lean with the query: the rows of `cross`, by the query's numbers.
    for d in range(D):
        for g in range(columns):
            products[d, g] = beta * tilt[g] * qs[d, g]
    add_columns(products.ravel(), columns, cross[b, h].ravel(), 0, state.shape[1], D, state.ravel(), cv, width)
    _end(piece, how, count, out, lse, own, b, h, lo)


@njit(fastmath=FAST, cache=True, nogil=True)
def _summaries(query, ck, cv, width, how, source, moments, halves, out, lse, own):
    each(_pieces(how, out), _summaries_piece, (query, (ck, cv, width), how, source, moments, halves, out, lse, own))
