"""Packed rows: int8 numbers with the scale of the row behind them.

A row of D numbers takes D + 4 bytes: D int8 numbers, then the four bytes of a float32 scale, in the machine's order.
Number d of the row is ``int8[d] * scale``. A row is whole in itself: whatever moves rows moves their scales along.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4
# A hair under 1 / 127, so that 127 scales of the largest float32 do not overflow.
STEP = 0.999999 / 127
SMALLEST = torch.finfo(torch.float32).tiny


def pack_rows(rows: Tensor) -> Tensor:
    """Float rows ``[..., D]`` as packed rows int8 ``[..., D + 4]``, off by at most half a scale each.

    The scale is the largest number of the row over 127. It is never subnormal, so that no number is lost to a division
    that overflows: rows under 1e-36 or so become zeros.
    """
    rows = rows.detach().float().contiguous()
    scale = rows.abs().amax(dim=-1, keepdim=True).mul_(STEP).clamp_(min=SMALLEST)
    # The largest number over its scale is 127.0001: it rounds to 127.
    return torch.cat([(rows / scale).round_().to(torch.int8), scale.view(torch.int8)], dim=-1)


def floats(rows: Tensor) -> Tensor:
    """Rows of any stored type as float32 ``[..., D]``; packed rows are unpacked."""
    return rows[..., :-SCALE_BYTES] * scales(rows)[..., None] if rows.dtype == torch.int8 else rows.float()


def scales(rows: Tensor) -> Tensor:
    """The scales of packed rows ``[..., D + 4]``, float32 ``[...]``."""
    # A copy in any case: in place, the bytes need not lie where a float32 may.
    return rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)[..., 0]


def row_dim(rows: Tensor) -> int:
    """How many numbers a row has: the last dimension, without the scale of packed rows."""
    return rows.shape[-1] - SCALE_BYTES * (rows.dtype == torch.int8)
