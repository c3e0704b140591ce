"""What a block of a prompt reads, on the CPU: its own and the newest rows, the rows of opened lists, summaries.

Each kernel adds one source to a state ``(out, lse)`` that it finds and leaves normalised, a piece of the block and a
tile of rows in the caches at a time; rows are read where they stand, whatever they are kept as.
"""

# mypy: ignore-errors
# (Numba compiles the kernels and infers their types itself.)

import numpy as np
import torch
from numba import njit, prange

from ._cpu_common import FAST, NEG, PRANGE, F, exp32, flat_rows, inner, softcapped
from ._cpu_start import use_torchs_threads
from ._cpu_tiles import COLUMNS, add_columns, score_columns, tile_lanes, weigh_columns
from .lists import FREEZES, LOG_ROWS
from .packed import row_dim
from .reference import by_head, by_position

# The log-sum-exp of no row, as a number that hidden rows cannot reach.
EMPTY = F(0.5) * NEG
# Rows of a tile, and queries of a piece: both tiles of rows and what a piece accumulates have to fit the caches.
TILE, PIECE = 128, 96
# Lists that are weighed in one go, to choose some.
LISTS = 128


def add_rows(q, keys, values, out, lse, *, begin, size, first, group, softcap):
    """Runs of rows ``begin .. begin + size``, ``[B, Hkv, n]`` int64 each; the block's own, from ``first`` on, causal.

    q ``[B, Hkv, m * group, D]`` scaled, position after position; out ``[.., Dv]`` and lse are written to.
    Returns the log-sum-exp of this source.
    """
    return _added(
        _rows, q, keys, values, out, lse, group, softcap, begin.contiguous().numpy(), size.contiguous().numpy(), first
    )


def dense_many(query, keys, values, *, scale, start, softcap):
    """See reference.dense_decode; causal."""
    m, group = query.shape[2], query.shape[1] // keys.shape[1]
    first, q = keys.shape[2] - m, by_position(query, keys.shape[1], scale)
    out = q.new_zeros((*q.shape[:3], row_dim(values)))
    lse = torch.full(q.shape[:3], float("-inf"))
    begin = start[:, None, None].expand(-1, keys.shape[1], 1)
    add_rows(
        q, keys, values, out, lse, begin=begin, size=keys.shape[2] - begin, first=first, group=group, softcap=softcap
    )
    return by_head(out, m).contiguous(), by_head(lse, m).contiguous()


def add_summaries(q, keys, values, out, lse, *, spread, variance, log_size, group, softcap, alpha):
    """Summaries with mean ``keys [B, Hkv, L, D]`` and ``values``; ``log_size [B, Hkv, L]`` is NEG where one is none.

    Returns the log-sum-exp of this source, and the mean variance ``[B, Hkv, m * group]`` of what each query reads here.
    """
    tilt = torch.zeros_like(lse)
    own = _added(
        _summaries, q, keys, values, out, lse, group, softcap, spread.contiguous().numpy(),
        variance.contiguous().numpy(), log_size.contiguous().numpy(), F(alpha), tilt.numpy(),
    )  # fmt: skip
    return own, tilt


def summary_weights(q, keys, known, *, spread, variance, log_size, alpha, most, softcap):
    """exp of the logits of summaries less what is ``known [B, Hkv, n]``, no larger than e to ``most``.

    q ``[B, Hkv, n, D]`` and what else there is: see add_summaries. Returns ``[B, Hkv, n, L]``.
    """
    use_torchs_threads()
    n = q.shape[2]
    columns = (n + COLUMNS - 1) // COLUMNS * COLUMNS
    weights = torch.empty(*variance.shape, columns)
    by_query = (part.contiguous().numpy() for part in (q, spread, known))
    by_list = (part.contiguous().numpy() for part in (variance, log_size))
    ck, _, width = tile_lanes(q.shape[3], q.shape[3])
    _weights(*by_query, *by_list, flat_rows(keys), ck, width, F(softcap or 0.0), F(alpha), F(most), weights.numpy())
    return weights[..., :n].transpose(2, 3)


def _added(kernel, q, keys, values, out, lse, group, softcap, *source):
    own = torch.empty_like(lse)
    use_torchs_threads()
    rows, lanes = (*flat_rows(keys), *flat_rows(values)), tile_lanes(q.shape[3], out.shape[3])
    how = group, max(1, PIECE // group) * group, F(softcap or 0.0)
    kernel(q.numpy(), rows, *lanes, how, source, out.numpy(), lse.numpy(), own.numpy())
    return own


@inner
def _pieces(q, how):
    """How many pieces a block has, of all batch rows and KV heads."""
    return q.shape[0] * q.shape[1] * ((q.shape[2] + how[1] - 1) // how[1])


@inner
def _begin(q, out, lse, how, b, h, lo):
    """A piece from query ``lo`` on: its queries and room for logits, side by side, and the state that rows add to."""
    n, D = min(how[1], q.shape[2] - lo), q.shape[3]
    columns = (n + COLUMNS - 1) // COLUMNS * COLUMNS
    qs, state = np.zeros((D, columns), F), np.zeros((columns, out.shape[3]), F)
    logits = np.empty((TILE, columns), F)
    top, total, shrink = np.zeros(columns, F), np.zeros(columns, F), np.empty(columns, F)
    for g in range(n):
        for d in range(D):
            qs[d, g] = q[b, h, lo + g, d]
        for d in range(state.shape[1]):
            state[g, d] = out[b, h, lo + g, d]
        top[g] = max(lse[b, h, lo + g], EMPTY)
    return qs, logits, state, top, total, shrink


@inner
def _score(piece, rows, lanes, b, h, at, n, filled):
    """Logits of the rows ``at .. at + n``, behind those of ``filled`` other rows."""
    qs, logits, _, top, _, _ = piece
    keys, kb, kh, kt = rows[:4]
    ck, _, width = lanes
    score_columns(
        qs.ravel(), top.size, keys, b * kb + h * kh + at * kt, kt, n, logits.ravel()[filled * top.size :], ck, width
    )


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
def _add(piece, rows, lanes, b, h, at, n, filled):
    """The values of the same rows, by the weights that logits have become."""
    _, logits, state, top, _, _ = piece
    values, vb, vh, vt = rows[4:]
    _, cv, width = lanes
    add_columns(
        logits.ravel()[filled * top.size :],
        top.size,
        values,
        b * vb + h * vh + at * vt,
        vt,
        n,
        state.ravel(),
        cv,
        width,
    )


@inner
def _end(piece, n, out, lse, own, b, h, lo):
    """Write the piece's state with what was added to it; ``total`` becomes what weights are multiplied by."""
    _, _, state, top, total, _ = piece
    for g in range(n):
        before, some = lse[b, h, lo + g], top[g] > EMPTY
        s = total[g] + (exp32(before - top[g]) if before > EMPTY else F(0.0))
        own[b, h, lo + g] = top[g] + np.log(total[g]) if some and total[g] > F(0.0) else -np.inf
        lse[b, h, lo + g] = top[g] + np.log(s) if some else -np.inf
        total[g] = F(1.0) / s if some else F(0.0)
        for d in range(state.shape[1]):
            out[b, h, lo + g, d] = state[g, d] * total[g]


@inner
def _rows_piece(w, q, rows, lanes, how, source, out, lse, own):
    begin, size, first = source
    group, most, softcap = how
    units, last = q.shape[0] * q.shape[1], (q.shape[2] - 1) // most
    # Early and late positions in turn: late ones see more.
    c = w // units
    lo = (c // 2 if c % 2 == 0 else last - c // 2) * most
    b, h = w % units // q.shape[1], w % q.shape[1]
    piece, count = _begin(q, out, lse, how, b, h, lo), min(most, q.shape[2] - lo)
    logits = piece[1]
    early, late = first + lo // group, first + (lo + count) // group
    run, done = 0, 0  # the run that comes next, and how many of its rows were taken
    while run < begin.shape[2]:
        # A tile is of several runs: from the one at `since`, of which `skipped` rows were taken before.
        since, skipped, filled = run, done, 0
        while run < begin.shape[2] and filled < TILE:
            at = begin[b, h, run] + done
            n = min(min(size[b, h, run] - done, late - at), TILE - filled)
            if n > 0:
                _score(piece, rows, lanes, b, h, at, n, filled)
                if softcap > F(0.0):
                    for i in range(filled, filled + n):
                        for g in range(count):
                            logits[i, g] = softcapped(logits[i, g], softcap)
                for i in range(max(early + 1 - at, 0), n):
                    for g in range(min((at + i - first) * group - lo, count)):
                        logits[filled + i, g] = NEG
                filled, done = filled + n, done + n
            if done >= min(size[b, h, run], late - begin[b, h, run]):
                run, done = run + 1, 0
        _weigh(piece, filled)
        taken = 0
        while taken < filled:
            at = begin[b, h, since] + skipped
            n = min(min(size[b, h, since] - skipped, late - at), filled - taken)
            if n > 0:
                _add(piece, rows, lanes, b, h, at, n, taken)
                taken += n
            since, skipped = since + 1, 0
    _end(piece, count, out, lse, own, b, h, lo)


@inner
def _summaries_piece(w, q, rows, lanes, how, source, out, lse, own):
    spread, variance, log_size, alpha, tilts = source
    units = q.shape[0] * q.shape[1]
    b, h, lo = w % units // q.shape[1], w % q.shape[1], w // units * how[1]
    piece, count = _begin(q, out, lse, how, b, h, lo), min(how[1], q.shape[2] - lo)
    _, logits, _, top, total, shrink = piece
    by, root, tilt, at = np.zeros(top.size, F), np.zeros(top.size, F), np.zeros(top.size, F), 0
    for g in range(count):
        by[g] = spread[b, h, lo + g]
        root[g] = np.sqrt(by[g])
    used = variance.shape[2]
    while used > 0 and log_size[b, h, used - 1] <= NEG:
        used -= 1
    while at < used:
        n = min(TILE, used - at)
        _score(piece, rows, lanes, b, h, at, n, 0)
        for i in range(n):
            _raise(logits[i], how[2], alpha, by, root, variance[b, h, at + i], log_size[b, h, at + i])
        _weigh(piece, n)
        for g in range(top.size):
            tilt[g] *= shrink[g]
        for i in range(n):
            v = variance[b, h, at + i]
            for g in range(top.size):
                tilt[g] += logits[i, g] * v
        _add(piece, rows, lanes, b, h, at, n, 0)
        at += n
    _end(piece, count, out, lse, own, b, h, lo)
    for g in range(count):
        tilts[b, h, lo + g] = tilt[g] * total[g]


@inner
def _raise(logits, softcap, alpha, spread, root, variance, log_size):
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


@njit(fastmath=FAST, parallel=PRANGE, cache=True, nogil=True)
def _rows(q, rows, ck, cv, width, how, source, out, lse, own):
    for w in prange(_pieces(q, how)):
        _rows_piece(w, q, rows, (ck, cv, width), how, source, out, lse, own)


@njit(fastmath=FAST, parallel=PRANGE, cache=True, nogil=True)
def _summaries(q, rows, ck, cv, width, how, source, out, lse, own):
    for w in prange(_pieces(q, how)):
        _summaries_piece(w, q, rows, (ck, cv, width), how, source, out, lse, own)


@inner
def _weigh_lists(w, q, spread, known, variance, log_size, keys, ck, width, softcap, alpha, most, weights):
    """The weights of some lists of one KV head."""
    rows, kb, kh, kt = keys
    units, (D, columns) = q.shape[0] * q.shape[1], (q.shape[3], weights.shape[3])
    b, h, lo = w % units // q.shape[1], w % q.shape[1], w // units * LISTS
    n = min(LISTS, variance.shape[2] - lo)
    qs, by, root, least = np.zeros((D, columns), F), np.zeros(columns, F), np.zeros(columns, F), np.zeros(columns, F)
    for g in range(q.shape[2]):
        for d in range(D):
            qs[d, g] = q[b, h, g, d]
        by[g], root[g], least[g] = spread[b, h, g], np.sqrt(spread[b, h, g]), known[b, h, g]
    score_columns(
        qs.ravel(), columns, rows, b * kb + h * kh + lo * kt, kt, n, weights[b, h, lo : lo + n].ravel(), ck, width
    )
    for i in range(lo, lo + n):
        _raise(weights[b, h, i], softcap, alpha, by, root, variance[b, h, i], log_size[b, h, i])
        for g in range(columns):
            weights[b, h, i, g] = exp32(min(weights[b, h, i, g] - least[g], most))


@njit(fastmath=FAST, parallel=PRANGE, cache=True, nogil=True)
def _weights(q, spread, known, variance, log_size, keys, ck, width, softcap, alpha, most, weights):
    for w in prange(q.shape[0] * q.shape[1] * ((variance.shape[2] + LISTS - 1) // LISTS)):
        _weigh_lists(w, q, spread, known, variance, log_size, keys, ck, width, softcap, alpha, most, weights)
