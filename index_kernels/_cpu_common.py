"""What the CPU kernels share: exponentials, the running softmax state of a KV head, and the merge of parts.

Shapes: query [B, Hq, D] float32; keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] are views of a store (float32;
float16 as uint16 bits; bfloat16 as int16 bits; int8 packed with scales, see packed.py); G = Hq // Hkv query heads share
a KV head. State and logits are float32. Numba's disk cache looks at a kernel's own file only: run ``make clean`` after
editing this one.
"""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from . import _cpu_start  # noqa: F401  # before anything is compiled
from ._cpu_vectors import add_rows, load_scale, score_rows

F = np.float32
I32 = np.int32
TILE = 128
NEG = F(-1e30)
# Without nnan and ninf: masked logits and empty states stay well defined.
FAST = {"reassoc", "contract", "nsz", "arcp"}
# Only prange runs in parallel: turning array expressions into loops of threads costs compile time, and here run time.
PRANGE = dict.fromkeys(("comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil"), False)
# What compiled code alone calls: no door from Python is compiled for it, which is half of what compiling it takes.
inner = njit(fastmath=FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
inner_parallel = njit(fastmath=FAST, parallel=PRANGE, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def numpy_bits(rows: Tensor) -> np.ndarray:
    """The tensor's memory as numpy: bfloat16 as int16 bits, float16 as uint16 bits, float32 and int8 as they are."""
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy()
    if rows.dtype == torch.float16:
        return rows.view(torch.uint16).numpy()
    return rows.numpy()


def flat_rows(rows: Tensor) -> tuple[np.ndarray, int, int, int]:
    """The memory of ``[B, H, T, D]`` rows as one flat array, with the strides of its first three axes in elements.

    A flat array has one type whatever view of a buffer it came from, so that a kernel compiles once per dtype.
    """
    if rows.stride(3) != 1:
        rows = rows.contiguous()
    span = (
        1 + sum((size - 1) * step for size, step in zip(rows.shape, rows.stride(), strict=True)) if rows.numel() else 0
    )
    return numpy_bits(torch.as_strided(rows, (span,), (1,))), *rows.stride()[:3]


def numpy_queries(query: Tensor) -> np.ndarray:
    """The queries ``[B, Hq, 1, D]`` of one position as contiguous float32 ``[B, Hq, D]``."""
    query = query.detach() if query.requires_grad else query
    return query.float().contiguous().numpy()[:, :, 0]


@intrinsic
def to_f32(typingctx, x):
    """A stored number as float32: float32 itself, uint16 = float16 bits, int16 = bfloat16 bits, int8 without scale."""

    def gen(context, builder, sig, args):
        v = args[0]
        if sig.args[0] == types.uint16:
            return builder.fpext(builder.bitcast(v, ir.HalfType()), ir.FloatType())
        if sig.args[0] == types.int16:
            wide = builder.zext(v, ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
        if sig.args[0] == types.int8:
            return builder.sitofp(v, ir.FloatType())
        return v

    return types.float32(x), gen


@intrinsic
def row_scale(typingctx, row, D):
    """What the D numbers of a stored row, a contiguous array, are to be multiplied by: 1 unless it is packed."""

    def gen(context, builder, sig, args):
        if sig.args[0].dtype != types.int8:
            return ir.Constant(ir.FloatType(), 1.0)
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return load_scale(builder, builder.gep(data, [args[1]]))

    return types.float32(row, types.int64), gen


@intrinsic
def set_row_scale(typingctx, row, D, scale):
    """Write the float32 scale behind the D numbers of a packed row, a contiguous int8 array."""

    def gen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), ir.FloatType().as_pointer())
        builder.store(args[2], place, align=1)
        return context.get_dummy_value()

    return types.void(row, types.int64, types.float32), gen


@intrinsic
def bits_f32(typingctx, x):
    """An int32 bit pattern as float32."""

    def gen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), gen


@njit(inline="always")
def exp32(x):
    """exp(x) to 2 ulp-ish relative 2e-7 for x <= 88; below -87 it returns about 1e-38."""
    y = min(max(x, F(-87.0)), F(88.0)) * F(1.4426950408889634)
    n = np.floor(y + F(0.5))
    f = y - n
    p = F(1.5403530e-4)
    p = p * f + F(1.3333558e-3)
    p = p * f + F(9.6181291e-3)
    p = p * f + F(5.5504109e-2)
    p = p * f + F(2.4022651e-1)
    p = p * f + F(6.9314718e-1)
    p = p * f + F(1.0)
    return bits_f32((I32(n) + I32(127)) << I32(23)) * p


@njit(fastmath=FAST, inline="always")
def softcapped(x, cap):
    """cap * tanh(x / cap)."""
    e = exp32(min(max(F(-2.0) * x / cap, F(-80.0)), F(80.0)))
    return cap * (F(1.0) - e) / (F(1.0) + e)


@inner
def soften(logits, n, softcap, acc, top, total):
    """Turn n logits of each head into weights exp(logit - top), raising top and shrinking the state if needed."""
    G, Dv = acc.shape
    for g in range(G):
        if softcap > F(0.0):
            for i in range(n):
                logits[g, i] = softcapped(logits[g, i], softcap)
        new = top[g]
        for i in range(n):
            new = max(new, logits[g, i])
        if new > top[g]:
            shrink = exp32(top[g] - new)
            total[g] *= shrink
            for d in range(Dv):
                acc[g, d] *= shrink
            top[g] = new
        s = F(0.0)
        for i in range(n):
            p = exp32(logits[g, i] - new)
            logits[g, i] = p
            s += p
        total[g] += s


@inner
def scan_range(q, keys, values, key_at, value_at, key_step, value_step, n, softcap, logits, acc, top, total, lanes):
    """Add n contiguous rows, from element offsets key_at and value_at, to a KV head's running state.

    q [G, D] is scaled; logits [G, TILE] is scratch; acc [G, Dv], top [G], total [G] are the state (online softmax).
    """
    heads, ck, cv, width = lanes
    t = 0
    while t < n:
        m = min(TILE, n - t)
        score_rows(q, 0, keys, key_at + t * key_step, key_step, m, logits, 0, TILE, heads, ck, width)
        soften(logits, m, softcap, acc, top, total)
        add_rows(logits, 0, TILE, values, value_at + t * value_step, value_step, m, acc, heads, cv, width)
        t += m


@inner
def part_of_rows(w, H, start, stop, parts):
    """Part w of a scan of the rows ``start[b] .. stop`` of all KV heads: which it is, of which b and h, and its rows.

    Part by part, not head by head: threads get as many rows each where heads are no multiple of them.
    """
    units = start.size * H
    part, b, h = w // units, w % units // H, w % H
    n = max(stop - start[b], 0)
    return part, b, h, start[b] + n * part // parts, start[b] + n * (part + 1) // parts


@inner
def segment_part(w, H, bounds, start):
    """Part w of a call over segments that end at ``bounds``: segment, b and h, its first row and how many it has."""
    units = start.size * H
    s, b, h = w // units, w % units // H, w % H
    lo = max(bounds[s], start[b])
    return s, b, h, lo, max(bounds[s + 1] - lo, 0)


@inner
def load_query(query, b, h, scale, q):
    G, D = q.shape
    for g in range(G):
        for d in range(D):
            q[g, d] = query[b, h * G + g, d] * scale


@inner
def store_state(slot, b, h, a, m, s, top, total, acc):
    G, Dv = a.shape
    for g in range(G):
        top[slot, b, h * G + g] = m[g]
        total[slot, b, h * G + g] = s[g]
        for d in range(Dv):
            acc[slot, b, h * G + g, d] = a[g, d]


@inner
def merge_parts(top, total, acc, parts, out, lse):
    """Merge the per-part states of every query head: top/total [parts, B, Hq], acc [parts, B, Hq, Dv]."""
    B, Hq, Dv = out.shape
    for b in range(B):
        for h in range(Hq):
            m = NEG
            for p in range(parts):
                m = max(m, top[p, b, h])
            s = F(0.0)
            for d in range(Dv):
                out[b, h, d] = F(0.0)
            for p in range(parts):
                if total[p, b, h] > F(0.0):
                    w = exp32(top[p, b, h] - m)
                    s += w * total[p, b, h]
                    for d in range(Dv):
                        out[b, h, d] += w * acc[p, b, h, d]
            if s > F(0.0):
                inv = F(1.0) / s
                for d in range(Dv):
                    out[b, h, d] *= inv
                lse[b, h] = m + np.log(s)
            else:
                lse[b, h] = -np.inf


@inner
def flush(values, base, step, tile_row, tile_n, ranges, filled, softcap, logits, acc, top, total, lanes):
    """Finish a tile whose logits come from several ranges: weights, then each range's values."""
    heads, _, cv, width = lanes
    if filled == 0:
        return
    soften(logits, filled, softcap, acc, top, total)
    at = np.int64(0)
    for r in range(ranges):
        add_rows(logits, at, TILE, values, base + tile_row[r] * step, step, tile_n[r], acc, heads, cv, width)
        at += tile_n[r]


@njit(parallel=True, fastmath=True, cache=True)
def _read_sum(x, out):
    n = x.shape[1]
    for c in prange(x.shape[0]):
        a = F(0.0)
        for i in range(n):
            a += x[c, i]
        out[c] = a


def read_bandwidth(megabytes: int = 400, repeat: int = 7) -> float:
    """Bytes per second that two cores read from memory: a float32 sum over a buffer beyond the caches, median."""
    import time

    x = np.ones((2, megabytes * 131072), F)
    out = np.zeros(2, F)
    times = []
    for _ in range(repeat):
        t = time.perf_counter()
        _read_sum(x, out)
        times.append(time.perf_counter() - t)
    return x.nbytes / float(np.median(times[1:]))
