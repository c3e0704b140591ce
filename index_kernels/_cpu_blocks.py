"""What a block of a prompt reads, on the CPU: its own and the newest rows, the rows of opened lists, summaries.

Each kernel adds one source to a state ``(out, lse)`` that it finds and leaves normalised, a piece of the block and a
tile of rows in the caches at a time; rows are read where they stand, whatever they are kept as.
"""

# mypy: ignore-errors
# (Numba compiles the kernels and infers their types itself.)

import numpy as np
import torch
from numba import njit, prange

from ._cpu_common import FAST, NEG, PRANGE, F, exp32, flat_rows, inner, softcapped, soften
from ._cpu_start import use_torchs_threads
from ._cpu_tiles import BLOCK, add_tile, score_tile, tile_lanes
from .lists import FREEZES, LOG_ROWS
from .packed import row_dim
from .reference import by_head, by_position

# The log-sum-exp of no row, as a number that hidden rows cannot reach.
EMPTY = F(0.5) * NEG
# Rows of a tile, and queries of a piece: both tiles of rows and what a piece accumulates have to fit the caches.
TILE, PIECE = 128, 96


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
    """A piece from query ``lo`` on: its queries, room for logits, and the state to which rows are added."""
    n = min(how[1], q.shape[2] - lo)
    # Tiles are of whole blocks of queries, and begin anywhere.
    qs, state = np.zeros((n + BLOCK, q.shape[3]), F), np.zeros((n + BLOCK, out.shape[3]), F)
    logits = np.zeros((n + BLOCK, TILE), F)
    top, total = np.empty(n, F), np.zeros(n, F)
    for g in range(n):
        qs[g] = q[b, h, lo + g]
        state[g] = out[b, h, lo + g]
        top[g] = max(lse[b, h, lo + g], EMPTY)
    return qs, logits, state, top, total


@inner
def _score(piece, rows, lanes, b, h, at, n, filled):
    """Logits of the rows ``at .. at + n``, behind those of ``filled`` other rows."""
    qs, logits, _, top, _ = piece
    keys, kb, kh, kt = rows[:4]
    ck, _, width = lanes
    blocks = (len(top) + BLOCK - 1) // BLOCK * BLOCK
    score_tile(qs, keys, b * kb + h * kh + at * kt, kt, n, blocks, logits.ravel()[filled:], TILE, ck, width)


@inner
def _add(piece, rows, lanes, b, h, at, n, filled):
    """The values of the same rows, by the weights that logits have become."""
    _, logits, state, top, _ = piece
    values, vb, vh, vt = rows[4:]
    _, cv, width = lanes
    blocks = (len(top) + BLOCK - 1) // BLOCK * BLOCK
    add_tile(logits.ravel()[filled:], TILE, values, b * vb + h * vh + at * vt, vt, n, blocks, state, cv, width)


@inner
def _end(piece, out, lse, own, b, h, lo):
    """Write the piece's state with what was added to it; ``total`` becomes what weights are multiplied by."""
    _, _, state, top, total = piece
    for g in range(len(top)):
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
    piece = _begin(q, out, lse, how, b, h, lo)
    _, logits, _, top, _ = piece
    early, late = first + lo // group, first + (lo + len(top)) // group
    run, done = 0, 0  # the run that comes next, and how many of its rows were taken
    while run < begin.shape[2]:
        # A tile is of several runs: from the one at `since`, of which `skipped` rows were taken before.
        since, skipped, filled = run, done, 0
        while run < begin.shape[2] and filled < TILE:
            at = begin[b, h, run] + done
            n = min(min(size[b, h, run] - done, late - at), TILE - filled)
            if n > 0:
                _score(piece, rows, lanes, b, h, at, n, filled)
                for g in range(len(top)):
                    if softcap > F(0.0):
                        for i in range(filled, filled + n):
                            logits[g, i] = softcapped(logits[g, i], softcap)
                    if at + n > early + 1:
                        for i in range(filled + max(first + (lo + g) // group + 1 - at, 0), filled + n):
                            logits[g, i] = NEG
                filled, done = filled + n, done + n
            if done >= min(size[b, h, run], late - begin[b, h, run]):
                run, done = run + 1, 0
        soften(logits, filled, F(0.0), piece[2][: len(top)], top, piece[4])
        taken = 0
        while taken < filled:
            at = begin[b, h, since] + skipped
            n = min(min(size[b, h, since] - skipped, late - at), filled - taken)
            if n > 0:
                _add(piece, rows, lanes, b, h, at, n, taken)
                taken += n
            since, skipped = since + 1, 0
    _end(piece, out, lse, own, b, h, lo)


@inner
def _summaries_piece(w, q, rows, lanes, how, source, out, lse, own):
    spread, variance, log_size, alpha, tilts = source
    units = q.shape[0] * q.shape[1]
    b, h, lo = w % units // q.shape[1], w % q.shape[1], w // units * how[1]
    piece = _begin(q, out, lse, how, b, h, lo)
    _, logits, state, top, total = piece
    tilt, at = np.zeros(len(top), F), 0
    while at < variance.shape[2]:
        n = min(TILE, variance.shape[2] - at)
        _score(piece, rows, lanes, b, h, at, n, 0)
        _soften_summaries(
            logits, n, how[2], alpha, spread[b, h, lo:], variance[b, h, at:], log_size[b, h, at:], state[: len(top)],
            top, total, tilt,
        )  # fmt: skip
        _add(piece, rows, lanes, b, h, at, n, 0)
        at += n
    _end(piece, out, lse, own, b, h, lo)
    for g in range(len(top)):
        tilts[b, h, lo + g] = tilt[g] * total[g]


@inner
def _soften_summaries(logits, n, softcap, alpha, spread, variance, log_size, a, top, total, tilt):
    """As ``soften``; a summary's logit is raised by the scatter of its rows', and by the log of how many they are."""
    root = np.sqrt(F(FREEZES) * variance[:n])
    for g in range(len(top)):
        new, by = top[g], np.sqrt(spread[g])
        for i in range(n):
            x, slope = logits[g, i], F(1.0)
            if softcap > F(0.0):
                x = softcapped(x, softcap)
                slope = F(1.0) - (x / softcap) * (x / softcap)
            v = spread[g] * variance[i] * slope * slope
            frozen = F(2.0) * (root[i] * by * slope - F(LOG_ROWS))
            x += alpha * (v if v < F(FREEZES) else frozen) + log_size[i]
            logits[g, i] = x
            new = max(new, x)
        if new > top[g]:
            shrink = exp32(top[g] - new)
            total[g] *= shrink
            tilt[g] *= shrink
            for d in range(a.shape[1]):
                a[g, d] *= shrink
            top[g] = new
        s, t = F(0.0), F(0.0)
        for i in range(n):
            p = exp32(logits[g, i] - new)
            logits[g, i] = p
            s += p
            t += p * variance[i]
        total[g] += s
        tilt[g] += t


@njit(fastmath=FAST, parallel=PRANGE, cache=True, nogil=True)
def _rows(q, rows, ck, cv, width, how, source, out, lse, own):
    for w in prange(_pieces(q, how)):
        _rows_piece(w, q, rows, (ck, cv, width), how, source, out, lse, own)


@njit(fastmath=FAST, parallel=PRANGE, cache=True, nogil=True)
def _summaries(q, rows, ck, cv, width, how, source, out, lse, own):
    for w in prange(_pieces(q, how)):
        _summaries_piece(w, q, rows, (ck, cv, width), how, source, out, lse, own)
