"""What the Triton kernels share: the running state of a log-sum-exp aggregate, softcap, packed rows, the device."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# What a tile of rows times dimensions may hold: 64 float32 registers per thread of four warps.
TILE_ELEMENTS = 8192


@triton.jit
def add_rows(peak, mass, total, logits, rows):
    """Fold a block of rows into a state: the peak logit, the sum of weights and the weighted sum of rows."""
    new_peak = tl.maximum(peak, tl.max(logits, axis=0))
    # While no row was seen the peak is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp(logits - shift)
    decay = tl.exp(peak - shift)
    return new_peak, mass * decay + tl.sum(weights, axis=0), total * decay + tl.sum(weights[:, None] * rows, axis=0)


@triton.jit
def finish(peak, mass, total):
    """The state ``(out, lse)`` of what add_rows summed up; ``(0, -inf)`` if that was nothing."""
    divisor = tl.where(mass == 0, 1.0, mass)
    return total / divisor, peak + tl.log(divisor)


@triton.jit
def softcapped(logits, softcap):
    """``softcap * tanh(logits / softcap)``; Triton's own tanh is a vendor library call."""
    return softcap * (2 * tl.sigmoid(2 * (logits / softcap)) - 1)


@triton.jit
def rows_of(rows, b, h, row_b, row_h, DIM: tl.constexpr):
    """Where the rows of a KV head begin, whose numbers stand side by side.

    Packed rows and their heads begin at multiples of four bytes if the numbers do: then four are loaded at once.
    """
    offset = b * row_b + h * row_h
    if rows.dtype.element_ty == tl.int8 and DIM % 4 == 0:
        offset = tl.multiple_of(offset, 4)
    return rows + offset


@triton.jit
def load_rows(rows, row, used, row_t, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The numbers ``[N, BLOCK_D]`` of rows ``row [N]``, of packed ones int8; 0 where not ``used``."""
    d = tl.arange(0, BLOCK_D)
    offset = row[:, None] * row_t
    if rows.dtype.element_ty == tl.int8 and DIM % 4 == 0:
        offset = tl.multiple_of(offset, (4, 4))
    return tl.load(rows + offset + d[None, :], mask=used[:, None] & (d < DIM)[None, :], other=0)


@triton.jit
def scaled(found, rows, row, used, row_t, dim, ACROSS: tl.constexpr = 0):
    """What is found of rows ``row [N]``, if they are packed times their scales: the four bytes behind the numbers.

    ``found`` is ``[N]`` or ``[M, N]``; with ACROSS 1 ``[N, M]``.
    """
    if rows.dtype.element_ty == tl.int8:
        byte = tl.arange(0, 4)
        there = tl.load(rows + row[:, None] * row_t + dim + byte[None, :], mask=used[:, None], other=0)
        bits = tl.sum((there.to(tl.int32) & 255) << (8 * byte)[None, :], axis=1)
        scale = bits.to(tl.float32, bitcast=True)
        if len(found.shape) == 2:
            scale = tl.expand_dims(scale, ACROSS)
        found *= scale
    return found


def whole_type() -> Any:
    """In which type numbers are multiplied that bfloat16 holds exactly; Triton's interpreter knows float32."""
    return tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16


def dot_type(*tensors: Tensor) -> Any:
    """In which type rows are multiplied: their own where it is one, on a device; Triton's interpreter knows float32.

    Packed rows are multiplied as bfloat16, in which int8 is exact: what it rounds of a query is less than they were.
    """
    kinds = {tensor.dtype for tensor in tensors}
    if torch.int8 in kinds or whole_type() == tl.float32:
        return whole_type()
    return DOT_TYPES[kinds.pop()] if len(kinds) == 1 else tl.float32


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """The context to launch in: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
