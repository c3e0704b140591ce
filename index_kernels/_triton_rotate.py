"""Rows times Hadamard's matrix in Triton, as floats or packed: what a store of packed rows does to what comes and goes.

The matrix is made where it is needed, of ones, which tensor cores multiply exactly: numbers of float32 as three of
bfloat16. A row is the same whatever rows are beside it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_common import device_of, whole_type
from .packed import SCALE_BYTES, SMALLEST, STEP

_STEP, _SMALLEST = tl.constexpr(STEP), tl.constexpr(SMALLEST)
# Added to a float32 and taken away again it rounds to whole numbers, halves to even ones.
_ROUNDING = tl.constexpr(1.5 * 2**23)
ROWS = 16


@triton.jit
def _matrix(first, DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns from ``first`` on of the matrix of +1 and -1, in blocks: by the parity of what bits numbers share."""
    i, j = tl.arange(0, BLOCK_D)[:, None], first + tl.arange(0, COLUMNS)[None, :]
    both = i & j & (UNIT - 1)
    both ^= both >> 8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return tl.where((i // UNIT == j // UNIT) & (i < DIM), 1.0 - 2.0 * (both & 1).to(tl.float32), 0.0)


@triton.jit
def _turned(x, first, root, DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
            PARTS: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Columns from ``first`` on of rows times the matrix."""
    matrix, rest = _matrix(first, DIM, UNIT, BLOCK_D, COLUMNS).to(DOT), x.to(tl.float32)
    turned = tl.zeros([x.shape[0], COLUMNS], tl.float32)
    for _ in tl.static_range(PARTS):
        part = rest.to(tl.bfloat16)
        rest -= part.to(tl.float32)
        turned += tl.dot(part.to(DOT), matrix)
    return turned * root


@triton.jit
def rotate_kernel(
    rows, out, count, root,
    DIM: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per block of rows ``[count, DIM]``: rotated, as float32 or, with PACK, as packed rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, COLUMNS)
    x = tl.load(rows + n[:, None] * DIM + d[None, :], mask=(n < count)[:, None] & (d < DIM)[None, :], other=0.0)
    largest = tl.zeros([BLOCK_N], tl.float32)
    none = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, DIM, COLUMNS):
        turned = _turned(x, first, root, DIM, UNIT, BLOCK_D, COLUMNS, PARTS, DOT)
        if PACK:
            largest = tl.maximum(largest, tl.max(tl.abs(turned), axis=1))
            none = tl.maximum(none, tl.max((turned != turned).to(tl.int32), axis=1))
        else:
            inside = (n < count)[:, None] & (first + c < DIM)[None, :]
            tl.store(out + n[:, None] * DIM + first + c[None, :], turned, mask=inside)
    if PACK:
        # A row that is none has a scale that is none, by which it is found.
        scale = tl.where(none > 0, float("nan"), tl.maximum(largest * _STEP, _SMALLEST))
        to = out + n[:, None] * (DIM + 4)
        for first in range(0, DIM, COLUMNS):
            turned = _turned(x, first, root, DIM, UNIT, BLOCK_D, COLUMNS, PARTS, DOT)
            number = tl.div_rn(turned, tl.broadcast_to(scale[:, None], turned.shape))
            number = (number + _ROUNDING) - _ROUNDING
            tl.store(
                to + first + c[None, :], number.to(tl.int8), mask=(n < count)[:, None] & (first + c < DIM)[None, :]
            )
        byte = tl.arange(0, 4)
        bits = scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)[None, :]
        tl.store(to + DIM + byte[None, :], bits.to(tl.int8), mask=(n < count)[:, None])


def rotated(rows: Tensor) -> Tensor:
    """See packed.rotated."""
    return _run(rows, torch.float32, 0)


def packed_rotated(rows: Tensor) -> Tensor:
    """``pack_rows`` of rotated rows."""
    return _run(rows, torch.int8, SCALE_BYTES)


def _run(rows: Tensor, dtype: torch.dtype, more: int) -> Tensor:
    rows = rows.detach().contiguous()
    dim = rows.shape[-1]
    out = torch.empty((*rows.shape[:-1], dim + more), dtype=dtype, device=rows.device)
    count, unit = out.numel() // (dim + more), dim & -dim
    if not count:
        return out
    block_d = max(16, triton.next_power_of_2(dim))
    with device_of(rows):
        rotate_kernel[(triton.cdiv(count, ROWS),)](
            rows, out, count, float(unit**-0.5), DIM=dim, UNIT=unit, PACK=dtype == torch.int8, BLOCK_N=ROWS,
            BLOCK_D=block_d, COLUMNS=32 if 16 < block_d <= 128 else 16, PARTS=1 if rows.dtype == torch.bfloat16 else 3,
            DOT=whole_type(), num_warps=4,
        )  # fmt: skip
    return out
