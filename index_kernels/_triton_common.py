"""What the Triton kernels share: the running state of a log-sum-exp aggregate, softcap, the device to launch on."""

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


def dot_type(*tensors: Tensor) -> Any:
    """In which type rows are multiplied: their own where it is one, on a device; Triton's interpreter knows float32."""
    kinds = {tensor.dtype for tensor in tensors}
    narrow = len(kinds) == 1 and os.environ.get("TRITON_INTERPRET") != "1"
    return DOT_TYPES[kinds.pop()] if narrow else tl.float32


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """The context to launch in: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
