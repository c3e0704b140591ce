"""dense_decode of few positions: the rows are read once for all of them, a tile in the cache at a time."""

# mypy: ignore-errors
# (Numba compiles the kernel and infers its types itself.)

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ._cpu_common import FAST, NEG, F, flat_rows, inner, merge_parts, part_of_rows, soften, store_state
from ._cpu_parts import each
from ._cpu_start import use_torchs_threads
from ._cpu_tiles import BLOCK, add_tile, score_tile, tile_lanes
from .packed import row_dim
from .reference import by_head, by_position

# Rows of a tile: with as many keys as values, and the queries, it has to fit the first cache.
TILE = 64


def dense_few(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    start: Tensor,
    softcap: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """See reference.dense_decode; for two positions or more."""
    batch, heads, m, dim = query.shape
    value_dim = row_dim(values)
    asking = by_position(query, keys.shape[1], scale).flatten(1, 2)
    out, lse = torch.empty((batch, heads * m, value_dim)), torch.empty((batch, heads * m))
    _dense_few(
        asking.contiguous().numpy(), *flat_rows(keys), *flat_rows(values), keys.shape[1], m, start.numpy(),
        keys.shape[2], m - 1 if causal else 0, F(softcap or 0.0), use_torchs_threads(), *tile_lanes(dim, value_dim),
        out.numpy(), lse.numpy(),
    )  # fmt: skip
    found = (x.unflatten(1, (keys.shape[1], -1)) for x in (out, lse))
    return tuple(by_head(x, m).contiguous() for x in found)


@inner
def _attend_part(
    w, query, keys, kb, kh, kt, values, vb, vh, vt, H, m, start, length, newest, softcap, parts, ck, cv, width,
    top, total, acc,
):  # fmt: skip
    """Add a part of the rows of one KV head to its own state."""
    _, asking, D = query.shape
    Dv = acc.shape[3]
    Q = asking // H
    G = Q // m
    common = length - newest  # rows that all positions see
    part, b, h, lo, hi = part_of_rows(w, H, start, common, parts)
    ka, va = b * kb + h * kh, b * vb + h * vh
    # Blocks may reach beyond the last head, and begin anywhere.
    q = np.zeros((Q + BLOCK, D), F)
    logits = np.zeros((Q + BLOCK, TILE), F)
    a = np.zeros((Q + BLOCK, Dv), F)
    peak = np.full(Q, NEG, F)
    s = np.zeros(Q, F)
    for g in range(Q):
        for d in range(D):
            q[g, d] = query[b, h * Q + g, d]
    blocks = (Q + BLOCK - 1) // BLOCK * BLOCK
    while lo < hi:
        n = min(TILE, hi - lo)
        score_tile(q, keys, ka + lo * kt, kt, n, blocks, logits, TILE, ck, width)
        soften(logits, n, softcap, a[:Q], peak, s)
        add_tile(logits, TILE, values, va + lo * vt, vt, n, blocks, a, cv, width)
        lo += n
    if part == parts - 1:
        # Each of the newest rows is seen by the positions from its own on.
        for row in range(max(common, start[b]), length):
            g = (row - common + 1) * G
            blocks = (Q - g + BLOCK - 1) // BLOCK * BLOCK
            score_tile(q[g:], keys, ka + row * kt, kt, 1, blocks, logits[g:], TILE, ck, width)
            soften(logits[g:], 1, softcap, a[g:Q], peak[g:], s[g:])
            add_tile(logits[g:], TILE, values, va + row * vt, vt, 1, blocks, a[g:], cv, width)
    store_state(part, b, h, a[:Q], peak, s, top, total, acc)


@njit(fastmath=FAST, cache=True, nogil=True)
def _dense_few(
    query, keys, kb, kh, kt, values, vb, vh, vt, H, m, start, length, newest, softcap, parts, ck, cv, width, out, lse
):  # fmt: skip
    """Exact attention of m positions over rows start[b]..length, the newest ones seen by each position as it comes.

    query [B, H * m * G, D] is scaled; out [B, H * m * G, Dv], lse [B, H * m * G] likewise. keys, values: see
    _cpu_dense_decode.
    """
    B, asking, _ = query.shape
    top = np.empty((parts, B, asking), F)
    total = np.empty((parts, B, asking), F)
    acc = np.empty((parts, B, asking, out.shape[2]), F)
    each(
        parts * B * H, _attend_part,
        (
            query, keys, kb, kh, kt, values, vb, vh, vt, H, m, start, length, newest, softcap, parts, ck, cv, width,
            top, total, acc,
        ),
    )  # fmt: skip
    merge_parts(top, total, acc, parts, out, lse)
