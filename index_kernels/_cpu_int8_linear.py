"""int8_linear for a few rows: packed weights are read once, at memory speed; inputs stay float32."""

# mypy: ignore-errors
# (Numba compiles the kernel and infers its types itself.)

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ._cpu_common import FAST, inner
from ._cpu_parts import each
from ._cpu_start import use_torchs_threads
from ._cpu_vectors import F32, I64, fma, load_numbers, load_scale, loop, pointer, splat, sum_lanes
from .packed import SCALE_BYTES, row_dim

WIDTH = 16
# Products below which a second thread costs more than it saves.
SERIAL = 400_000


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See int8_linear.int8_linear; x is float32 and contiguous."""
    out = torch.empty(x.shape[0], weight.shape[0])
    parts = use_torchs_threads() if x.numel() * len(weight) > SERIAL else 1
    door = _in_parts if parts > 1 else _at_once
    door(x.numpy(), weight.numpy().reshape(-1), (0,) * (row_dim(weight) // WIDTH), parts, out.numpy())
    return out


@intrinsic
def _dot(typingctx, x, x_at, weight, weight_at, groups, chunks):
    """x[x_at:] . a row of packed weights: groups of len(chunks) * WIDTH numbers, each with its scale behind it."""

    def gen(context, builder, sig, args):
        C = len(sig.args[5])
        size = C * WIDTH
        vector = ir.VectorType(F32, WIDTH)
        xp = pointer(context, builder, sig.args[0], args[0], args[1])
        wp = pointer(context, builder, sig.args[2], args[2], args[3])
        cell = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * WIDTH))
        with loop(builder, I64(0), args[4], 1) as (g, _):
            q = builder.gep(xp, [builder.mul(g, I64(size))])
            w = builder.gep(wp, [builder.mul(g, I64(size + SCALE_BYTES))])
            part = builder.fmul(
                load_numbers(builder, q, types.float32, 0, WIDTH), load_numbers(builder, w, types.int8, 0, WIDTH)
            )
            for c in range(1, C):
                weights = load_numbers(builder, w, types.int8, c, WIDTH)
                part = fma(builder, load_numbers(builder, q, types.float32, c, WIDTH), weights, part)
            scale = splat(builder, load_scale(builder, builder.gep(w, [I64(size)])), WIDTH)
            builder.store(fma(builder, scale, part, builder.load(cell)), cell)
        return sum_lanes(builder, builder.load(cell))

    i = types.int64
    return types.float32(x, i, weight, i, i, chunks), gen


@inner
def _part(part, x, weight, chunks, parts, out):
    group = len(chunks) * WIDTH
    groups = x.shape[1] // group
    stride = groups * (group + SCALE_BYTES)
    flat = x.reshape(-1)
    n = out.shape[1]
    for i in range(n * part // parts, n * (part + 1) // parts):
        for r in range(x.shape[0]):
            out[r, i] = _dot(flat, r * x.shape[1], weight, i * stride, groups, chunks)


@njit(fastmath=FAST, cache=True, nogil=True)
def _at_once(x, weight, chunks, parts, out):
    """As _in_parts, on the calling thread."""
    _part(0, x, weight, chunks, parts, out)


@njit(fastmath=FAST, cache=True, nogil=True)
def _in_parts(x, weight, chunks, parts, out):
    """out [n, N] = x [n, K] times the transpose of N rows of packed weights, in parts of these rows."""
    each(parts, _part, (x, weight, chunks, parts, out))
