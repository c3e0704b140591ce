"""The rows that a block of a prompt reads, in Triton: all queries of a KV head over the rows at given places.

Places are those of whole lists, or of sinks and newest rows, one behind the other: a tile of them is read once for a
tile of queries, as by flash attention, and multiplied by the tensor cores.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_common import device_of, dot_type, load_rows, rows_of, scaled, softcapped
from ._triton_segmented_kernels import log_sum, times, weigh
from .packed import row_dim

_NEG = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["first", "count"])
def attend_places_kernel(
    query, keys, values, qb, qh, qt, kb, kh, kt, vb, vh, vt, places, out, lse, scale, softcap, H, G, M, first, count,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per (unit, tile of its ``M`` queries): their state over the rows at ``places [units, count]``, -1 for none.

    Query r of a unit is of position ``first + r // G`` and sees no later row.
    """
    unit = tl.program_id(0).to(tl.int64)
    b, h = unit // H, unit % H
    r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    live, position = r < M, (r // G).to(tl.int64)
    x_at = query + b * qb + (h * G + r % G)[:, None] * qh + position[:, None] * qt + d[None, :]
    x = tl.load(x_at, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
    keys = rows_of(keys, b, h, kb, kh, DIM)
    values = rows_of(values, b, h, vb, vh, VALUE_DIM)
    peak = tl.full([BLOCK_M], _NEG, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for begin in range(0, count, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        row = tl.load(places + unit * count + n, mask=n < count, other=-1).to(tl.int64)
        there = row >= 0
        k = load_rows(keys, row, there, kt, DIM, BLOCK_D)
        v = load_rows(values, row, there, vt, VALUE_DIM, BLOCK_DV)
        s = scaled(times(x, tl.trans(k), DOT) * scale, keys, row, there, kt, DIM)
        if softcap is not None:
            s = softcapped(s, softcap)
        s = tl.where(there[None, :] & (row[None, :] <= (first + position)[:, None]), s, _NEG)
        peak, decay, w = weigh(peak, s)
        mass = mass * decay + tl.sum(w, axis=1)
        acc = acc * decay[:, None] + times(scaled(w, values, row, there, vt, VALUE_DIM), v, DOT)
    to = unit * M + r
    answer = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(out + to[:, None] * VALUE_DIM + e[None, :], answer, mask=live[:, None] & (e < VALUE_DIM)[None, :])
    tl.store(lse + to, log_sum(peak, mass), mask=live)


def attend_places(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Queries ``[B, Hq, m, D]`` of the newest positions over the rows at ``places [B, Hkv, n]``, -1 for none; causal.

    The numbers of a row stand side by side; rows may be packed.

    Returns ``(out [B, Hkv, m * group, Dv], lse [B, Hkv, m * group])``, float32, position after position.
    """
    query = query.contiguous()
    batch, heads, m, dim = query.shape
    kv_heads, length, value_dim = keys.shape[1], keys.shape[2], row_dim(values)
    group, dot = heads // kv_heads, dot_type(query, keys, values)
    out = torch.empty((batch, kv_heads, m * group, value_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty((batch, kv_heads, m * group), dtype=torch.float32, device=query.device)
    packed = torch.int8 in (keys.dtype, values.dtype)
    shapes = _shapes(dim, value_dim, wide=dot == tl.float32, packed=packed)
    with device_of(query):
        attend_places_kernel[(batch * kv_heads, triton.cdiv(m * group, shapes["BLOCK_M"]))](
            query, keys, values, *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], places.contiguous(),
            out, lse, float(scale), None if softcap is None else float(softcap), kv_heads, group, m * group, length - m,
            places.shape[2], DIM=dim, VALUE_DIM=value_dim, DOT=dot, **shapes,
        )  # fmt: skip
    return out, lse


def _shapes(dim: int, value_dim: int, *, wide: bool, packed: bool) -> dict[str, Any]:
    """Block sizes for rows of these widths that spill no registers.

    ``wide``: they are multiplied as float32, ``packed``: once unpacked.
    """
    block_d, block_dv = (max(16, triton.next_power_of_2(width)) for width in (dim, value_dim))
    width = max(block_d, block_dv)
    large = wide or width > 128
    tiles = (16, 16) if wide and width > 128 else (32 if wide else 64, 64 if width <= 64 and not packed else 32)
    return {
        "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_M": tiles[0], "BLOCK_N": tiles[1],
        "num_warps": 8 if large else 4, "num_stages": 1 if large else 2,
    }  # fmt: skip
