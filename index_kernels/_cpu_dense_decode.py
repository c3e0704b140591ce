"""dense_decode: the exact scan of one query position at memory speed (split-K online softmax, as in FlashDecoding).

Several positions have kernels that share what is read among them: few ``_cpu_dense_few``, many ``_cpu_blocks``.
"""

# mypy: ignore-errors
# (Numba compiles the kernel and infers its types itself.)

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ._cpu_blocks import dense_many
from ._cpu_common import (
    FAST,
    NEG,
    TILE,
    F,
    flat_rows,
    inner,
    load_query,
    merge_parts,
    numpy_queries,
    part_of_rows,
    scan_range,
    store_state,
)
from ._cpu_dense_few import dense_few
from ._cpu_parts import each
from ._cpu_start import use_torchs_threads
from ._cpu_vectors import lanes
from .ops import FEW_QUERIES
from .packed import row_dim


def dense_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    start: Tensor,
    softcap: float | None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """See reference.dense_decode."""
    if causal and query.shape[1] * query.shape[2] > FEW_QUERIES * keys.shape[1]:
        return dense_many(query, keys, values, scale=scale, start=start, softcap=softcap)
    if query.shape[2] > 1:
        return dense_few(query, keys, values, scale=scale, start=start, softcap=softcap, causal=causal)
    out = torch.empty((*query.shape[:3], row_dim(values)))
    lse = torch.empty(query.shape[:3])
    group = query.shape[1] // keys.shape[1]
    _dense_decode(
        numpy_queries(query), *flat_rows(keys), *flat_rows(values), keys.shape[1], start.numpy(), keys.shape[2],
        F(scale), F(softcap or 0.0), use_torchs_threads(), *lanes(group, query.shape[3], out.shape[3]),
        out.numpy()[:, :, 0], lse.numpy()[:, :, 0],
    )  # fmt: skip
    return out, lse


@inner
def _attend_part(
    w, query, keys, kb, kh, kt, values, vb, vh, vt, H, start, length, scale, softcap, parts, lanes, top, total, acc
):
    """Add a part of the rows of one KV head to its own state."""
    _, Hq, D = query.shape
    G, Dv = Hq // H, acc.shape[3]
    part, b, h, lo, hi = part_of_rows(w, H, start, length, parts)
    q = np.empty((G, D), F)
    logits = np.empty((G, TILE), F)
    a = np.zeros((G, Dv), F)
    m = np.full(G, NEG, F)
    s = np.zeros(G, F)
    load_query(query, b, h, scale, q)
    scan_range(
        q, keys, values, b * kb + h * kh + lo * kt, b * vb + h * vh + lo * vt, kt, vt, hi - lo, softcap, logits,
        a, m, s, lanes,
    )  # fmt: skip
    store_state(part, b, h, a, m, s, top, total, acc)


@njit(fastmath=FAST, cache=True, nogil=True)
def _dense_decode(
    query, keys, kb, kh, kt, values, vb, vh, vt, H, start, length, scale, softcap, parts, heads, ck, cv, width, out, lse
):  # fmt: skip
    """Exact attention of one query position over rows start[b]..length: out [B, Hq, Dv], lse [B, Hq].

    keys, values: flat memory of the rows, with the strides of batch row, KV head and row in elements. The lanes are
    _cpu_vectors.lanes(Hq // Hkv, D, Dv).
    """
    B, Hq, _ = query.shape
    top = np.empty((parts, B, Hq), F)
    total = np.empty((parts, B, Hq), F)
    acc = np.empty((parts, B, Hq, out.shape[2]), F)
    lanes = (heads, ck, cv, width)
    each(
        parts * B * H, _attend_part,
        (query, keys, kb, kh, kt, values, vb, vh, vt, H, start, length, scale, softcap, parts, lanes, top, total, acc),
    )  # fmt: skip
    merge_parts(top, total, acc, parts, out, lse)
