"""attend_rows: attention over listed rows or row ranges, each query head with its own."""

# mypy: ignore-errors
# (Numba compiles the kernel and infers its types itself.)

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ._cpu_common import FAST, NEG, TILE, F, flat_rows, flush, inner, softcapped
from ._cpu_parts import each
from ._cpu_start import use_torchs_threads
from ._cpu_vectors import lanes, score_rows
from .packed import row_dim


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    ids: Tensor | None,
    ranges: Tensor | None,
    log_weights: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See reference.attend_rows."""
    if ids is not None:
        begin, size = ids.contiguous().numpy(), (ids >= 0).to(torch.int64).numpy()
    else:
        begin = ranges[..., 0].contiguous().numpy()
        size = (ranges[..., 1] - ranges[..., 0]).clamp(min=0).contiguous().numpy()
    weights = torch.zeros(0, 0, 0, 0) if log_weights is None else log_weights.float().contiguous()
    use_torchs_threads()
    out = torch.empty((*query.shape[:3], row_dim(values)))
    lse = torch.empty(query.shape[:3])
    _attend_rows(
        query.detach().float().contiguous().numpy(), *flat_rows(keys), *flat_rows(values), query.shape[1] //
        keys.shape[1], begin, size, weights.numpy(), F(scale), F(softcap or 0.0), *lanes(1, query.shape[3],
        out.shape[3]), out.numpy(), lse.numpy(),
    )  # fmt: skip
    return out, lse


@inner
def _attend_query(
    w, query, keys, kb, kh, kt, values, vb, vh, vt, group, begin, size, log_weight, scale, softcap,
    heads, ck, cv, width, out, lse,
):  # fmt: skip
    _, Hq, m, D = query.shape
    Dv = out.shape[3]
    R = begin.shape[3]
    weighted = log_weight.size > 0
    lanes_ = (heads, ck, cv, width)
    b = w // (Hq * m)
    h = w % (Hq * m) // m
    i = w % m
    q = np.empty((1, D), F)
    for d in range(D):
        q[0, d] = query[b, h, i, d] * scale
    logits = np.empty((1, TILE), F)
    tile_row = np.empty(TILE, np.int64)
    tile_n = np.empty(TILE, np.int64)
    a = np.zeros((1, Dv), F)
    top = np.full(1, NEG, F)
    total = np.zeros(1, F)
    key_at = b * kb + h // group * kh
    value_at = b * vb + h // group * vh
    ranges = 0
    filled = 0
    for r in range(R):
        row = begin[b, h, i, r]
        left = size[b, h, i, r]
        while left > 0:
            take = min(left, TILE - filled)
            score_rows(q, 0, keys, key_at + row * kt, kt, take, logits, filled, TILE, heads, ck, width)
            for t in range(filled, filled + take):
                if softcap > F(0.0):
                    logits[0, t] = softcapped(logits[0, t], softcap)
                if weighted:
                    logits[0, t] += log_weight[b, h, i, r]
            tile_row[ranges] = row
            tile_n[ranges] = take
            ranges += 1
            filled += take
            row += take
            left -= take
            if filled == TILE:
                flush(values, value_at, vt, tile_row, tile_n, ranges, filled, F(0.0), logits, a, top, total, lanes_)
                ranges = 0
                filled = 0
    flush(values, value_at, vt, tile_row, tile_n, ranges, filled, F(0.0), logits, a, top, total, lanes_)
    if total[0] > F(0.0):
        for d in range(Dv):
            out[b, h, i, d] = a[0, d] / total[0]
        lse[b, h, i] = top[0] + np.log(total[0])
    else:
        for d in range(Dv):
            out[b, h, i, d] = F(0.0)
        lse[b, h, i] = -np.inf


@njit(fastmath=FAST, cache=True, nogil=True)
def _attend_rows(
    query, keys, kb, kh, kt, values, vb, vh, vt, group, begin, size, log_weight, scale, softcap,
    heads, ck, cv, width, out, lse,
):  # fmt: skip
    """query [B, Hq, m, D]; begin, size [B, Hq, m, R] name each query's ranges; log_weight likewise, or empty."""
    each(
        query.shape[0] * query.shape[1] * query.shape[2], _attend_query,
        (
            query, keys, kb, kh, kt, values, vb, vh, vt, group, begin, size, log_weight, scale, softcap,
            heads, ck, cv, width, out, lse,
        ),
    )  # fmt: skip
