"""Packed rows: int8 numbers with the scale of the row behind them.

A row of D numbers takes D + 4 bytes: D int8 numbers, then the four bytes of a float32 scale, in the machine's order.
Number d of the row is ``int8[d] * scale``. A row is whole in itself: whatever moves rows moves their scales along.

Rows are best rotated before they are packed (Hadamard's matrix, over blocks of the largest power of two that divides
D): it spreads what is large over all numbers, and products of rows rotated alike are what they were.

A code is the same in 4 bits: byte j holds number j in its low half and number j + ceil(D / 2) in its high half, -7 to
7, plus 8. Some numbers change their sign before the rotation (those of Rudin and Shapiro's sequence): without, rows
that are kept rotated would be turned back.
"""

from functools import cache

import torch
from torch import Tensor

SCALE_BYTES = 4
# A hair under 1 / 127, so that 127 scales of the largest float32 do not overflow.
STEP = 0.999999 / 127
# The same for the 7 of a code.
CODE_STEP = 0.999999 / 7
# Rounding to whole numbers has variance 1 / 12: half that of a product with q is |q|^2 over this.
NOISE_DIVISOR = 24.0
# Half the variance of a coded logit's noise up to which it is let be.
NOISE_LET_BE = 0.5
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


def code_bytes(dim: int) -> int:
    """Bytes of the code of a row of ``dim`` numbers."""
    return (dim + 1) // 2 + SCALE_BYTES


def rotated(rows: Tensor) -> Tensor:
    """Float rows ``[..., D]`` times Hadamard's matrix, block by block; it is its own inverse."""
    dim = rows.shape[-1]
    block = dim & -dim
    found, half = rows.float().reshape(*rows.shape[:-1], dim // block, block), 1
    while half < block:
        pairs = found.unflatten(-1, (-1, 2, half))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        found = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        half *= 2
    turned: Tensor = found.flatten(-2) * block**-0.5
    return turned


def turned_for_codes(rows: Tensor) -> Tensor:
    """Float rows ``[..., D]`` as codes keep them: signs changed, then rotated."""
    return rotated(rows.float() * _signs(rows.shape[-1]).to(rows.device))


@cache
def _signs(dim: int) -> Tensor:
    """Rudin and Shapiro's sequence ``[dim]``: -1 where an odd number of neighbouring pairs of bits are both 1."""
    return torch.tensor([(-1.0) ** (d & d >> 1).bit_count() for d in range(dim)])


def code_rows(rows: Tensor) -> Tensor:
    """Codes int8 ``[..., code_bytes(D)]`` of float rows ``[..., D]``."""
    turned = turned_for_codes(rows)
    scale = turned.abs().amax(dim=-1, keepdim=True).mul_(CODE_STEP).clamp_(min=SMALLEST)
    numbers = torch.nn.functional.pad((turned / scale).round_(), (0, turned.shape[-1] % 2)).to(torch.int8)
    low, high = numbers.chunk(2, dim=-1)
    return torch.cat([(low + 8) | ((high + 8) << 4), scale.view(torch.int8)], dim=-1)


def decoded(codes: Tensor, dim: int) -> Tensor:
    """The rows ``[..., dim]`` float32 that ``code_rows`` kept, turned for codes."""
    numbers = codes[..., :-SCALE_BYTES]
    both = torch.cat([numbers & 15, (numbers >> 4) & 15], dim=-1)[..., :dim] - 8
    return both * scales(codes)[..., None]
