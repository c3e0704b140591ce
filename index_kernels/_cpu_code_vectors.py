# mypy: ignore-errors
# (These functions build LLVM instructions; Numba types them itself.)
"""Explicit vector loops for codes (see packed.py), as _cpu_vectors.py has them for rows."""

from functools import partial, reduce
from math import gcd

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._cpu_vectors import (
    F32,
    I64,
    compiled_for,
    fma,
    four_scales,
    load_scale,
    loop,
    pointer,
    splat,
    sum_lanes,
    sums_of_four,
)
from .packed import NOISE_LET_BE

I32 = ir.IntType(32)
# Vectors that are coded side by side.
EIGHT = 8
REAL8, WHOLE8 = ir.VectorType(F32, 8), ir.VectorType(I32, 8)


def code_lanes(D: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Type-level sizes of codes of D numbers: (bytes / width, log2(width) + 1) as tuples of those lengths."""
    half = (D + 1) // 2
    width = gcd(32, half)
    return (0,) * (half // width), (0,) * width.bit_length()


def _call(builder, name, result, *args):
    fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(fn, args)


# x86's products of bytes, and of 16-bit numbers, each added in pairs; by the width of the vector in bytes.
_PRODUCTS = {16: ("ssse3.pmadd.ub.sw.128", "sse2.pmadd.wd"), 32: ("avx2.pmadd.ub.sw", "avx2.pmadd.wd")}


def _dot(builder, counts, numbers):
    """The sum of the products of counts (0 to 15) and numbers (-127 to 127), lists of i8 [W], as i32 [W / 4] or [W]:
    its lanes are sums of some of them. By the processor's own instructions for bytes where it has them."""
    width = counts[0].type.count
    quads = ir.VectorType(ir.IntType(32), width // 4)
    if width in _PRODUCTS and compiled_for("avx2"):
        bytes_, words = _PRODUCTS[width]
        short = ir.VectorType(ir.IntType(16), width // 2)
        total = ir.Constant(quads, None)
        # Eight sums of two products, at most 15 * 127 each, fit into 16 bits.
        for at in range(0, len(counts), 8):
            pairs = zip(counts[at : at + 8], numbers[at : at + 8], strict=True)
            products = [_call(builder, f"llvm.x86.{bytes_}", short, count, number) for count, number in pairs]
            summed = reduce(builder.add, products)
            one = ir.Constant(short, [1] * short.count)
            total = builder.add(total, _call(builder, f"llvm.x86.{words}", quads, summed, one))
        return total
    short, whole = (ir.VectorType(ir.IntType(bits), width) for bits in (16, 32))
    products = [
        builder.mul(builder.zext(count, short), builder.sext(number, short))
        for count, number in zip(counts, numbers, strict=True)
    ]
    return reduce(builder.add, [builder.sext(product, whole) for product in products])


@intrinsic
def score_codes(
    typingctx, q, scales, codes, codes_at, stride, n, mean, mean_at, mean_stride, out, out_at, out_stride,
    heads, chunks, width,
):  # fmt: skip
    """out[g, out_at + i] = mean[g, mean_at] + scales[g, 0] * (q[g] . codes[codes_at + i * stride :]), i < n, g < G.

    The half bytes of codes count from 0 to 15, so scales[g, 1] is 8 times the sum of q[g]; that holds int8 numbers,
    rotated as codes are, one for every half byte. scales[g, 2] is noise_of_unit, see codes.score_codes. Integers until
    the scales; chunks and width are those of code_lanes.
    """

    def gen(context, builder, sig, args):
        G, C, W = len(sig.args[12]), len(sig.args[13]), 1 << (len(sig.args[14]) - 1)
        qp, sp = (pointer(context, builder, sig.args[k], args[k], I64(0)) for k in (0, 1))
        rp, mp, op = (pointer(context, builder, sig.args[k], args[k], args[k + 1]) for k in (2, 6, 9))
        byte, real4 = ir.VectorType(ir.IntType(8), W), ir.VectorType(F32, 4)

        def bytes_at(row, chunk):
            p = builder.gep(row, [I64(chunk * W)])
            return builder.load(builder.bitcast(p, byte.as_pointer()), align=1)

        qs = [[bytes_at(builder.gep(qp, [I64(g * 2 * C * W)]), c) for c in range(2 * C)] for g in range(G)]
        unit, shift, noise = ([builder.load(builder.gep(sp, [I64(3 * g + k)])) for g in range(G)] for k in range(3))
        means = [builder.load(builder.gep(mp, [builder.mul(args[8], I64(g))])) for g in range(G)]
        low, four = (ir.Constant(byte, [number] * W) for number in (15, 4))

        def row_at(i):
            return builder.gep(rp, [builder.mul(i, args[4])])

        def scale_at(i):
            return load_scale(builder, builder.gep(row_at(i), [I64(C * W)]))

        def less_noise(v, scale, noise):
            """v less half the variance of its noise, as far as that is over 1; numbers or vectors of them."""
            constant = partial(ir.Constant, scale.type)
            let_be, none = (
                [x] * scale.type.count if isinstance(scale.type, ir.VectorType) else x for x in (NOISE_LET_BE, 0.0)
            )
            over = builder.fsub(builder.fmul(noise, builder.fmul(scale, scale)), constant(let_be))
            return builder.fsub(
                v, builder.select(builder.fcmp_ordered(">", over, constant(none)), over, constant(none))
            )

        def dots(i):
            both = [bytes_at(row_at(i), c) for c in range(C)]
            halves = [builder.and_(v, low) for v in both] + [builder.lshr(v, four) for v in both]
            return [_dot(builder, halves, qs[g]) for g in range(G)]

        n4 = builder.and_(args[5], I64(~3)) if W >= 4 else I64(0)
        if W >= 4:
            with loop(builder, I64(0), n4, 4) as (i, _):
                products = [dots(builder.add(i, I64(k))) for k in range(4)]
                scales = four_scales(builder, scale_at, i)
                for g, (v, p) in enumerate(sums_of_four(builder, products, i, op, args[11])):
                    v = builder.fsub(builder.sitofp(v, real4), splat(builder, shift[g], 4))
                    v = builder.fmul(v, builder.fmul(scales, splat(builder, unit[g], 4)))
                    v = builder.fadd(v, splat(builder, means[g], 4))
                    builder.store(less_noise(v, scales, splat(builder, noise[g], 4)), p, align=4)
        with loop(builder, n4, args[5], 1) as (i, _):
            for g, total in enumerate(dots(i)):
                dot = builder.fsub(builder.sitofp(sum_lanes(builder, total), F32), shift[g])
                scale = scale_at(i)
                dot = builder.fadd(builder.fmul(dot, builder.fmul(scale, unit[g])), means[g])
                p = builder.gep(op, [builder.add(builder.mul(args[11], I64(g)), i)])
                builder.store(less_noise(dot, scale, noise[g]), p)
        return context.get_dummy_value()

    i = types.int64
    return types.void(q, scales, codes, i, i, i, mean, i, i, out, i, i, heads, chunks, width), gen


def _real8(number):
    return ir.Constant(REAL8, [number] * 8)


def _exp8(builder, x):
    """_cpu_common.exp32 of eight numbers."""
    minimum, maximum, floor = (
        cgutils.get_or_insert_function(builder.module, ir.FunctionType(REAL8, [REAL8] * n), f"llvm.{name}.v8f32")
        for name, n in (("minnum", 2), ("maxnum", 2), ("floor", 1))
    )
    y = builder.call(minimum, [builder.call(maximum, [x, _real8(-87.0)]), _real8(88.0)])
    y = builder.fmul(y, _real8(1.4426950408889634))
    n = builder.call(floor, [builder.fadd(y, _real8(0.5))])
    f = builder.fsub(y, n)
    p = _real8(1.5403530e-4)
    for factor in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        p = fma(builder, p, f, _real8(factor))
    bits = builder.shl(
        builder.add(builder.fptosi(n, WHOLE8), ir.Constant(WHOLE8, [127] * 8)), ir.Constant(WHOLE8, [23] * 8)
    )
    return builder.fmul(builder.bitcast(bits, REAL8), p)


@intrinsic
def weigh_codes(
    typingctx, logit, at, stride, n, mean, mean_at, mean_stride, peak, share, rank, sums, leans, sum_stride, heads
):
    """Weights exp(logit - peak) of rows at .. at + n of one list, of which logit [G, .] has the logits.

    rank[at + i] = their sum over the group, each times share[g]; sums[g, mean_at] = their sum over the rows, leans
    likewise of weight times (logit - mean[g, mean_at]). Reads up to 7 numbers past the last.
    """

    def gen(context, builder, sig, args):
        G = len(sig.args[13])
        lp, rp = (pointer(context, builder, sig.args[k], args[k], args[1]) for k in (0, 9))
        mp, sp, tp = (pointer(context, builder, sig.args[k], args[k], args[5]) for k in (4, 10, 11))
        pp, hp = (pointer(context, builder, sig.args[k], args[k], I64(0)) for k in (7, 8))
        count, strides = args[3], (args[2], args[6], args[12])

        def every(p, step):
            return [builder.gep(p, [builder.mul(step, I64(g))]) for g in range(G)]

        rows, means, sums, leans = (
            every(lp, strides[0]),
            every(mp, strides[1]),
            every(sp, strides[2]),
            every(tp, strides[2]),
        )
        peaks, shares, middles = (
            [splat(builder, builder.load(p), 8) for p in ps] for ps in (every(pp, I64(1)), every(hp, I64(1)), means)
        )
        cells = [cgutils.alloca_once_value(builder, _real8(0.0)) for _ in range(2 * G)]
        lanes = ir.Constant(WHOLE8, list(range(8)))

        def block(i, there):
            """Rows i .. i + 8; ``there``: which of them count, None for all. Returns their ranks."""
            ranks = _real8(0.0)
            for g in range(G):
                p = builder.bitcast(builder.gep(rows[g], [i]), REAL8.as_pointer())
                x = builder.load(p, align=4)
                w = _exp8(builder, builder.fsub(x, peaks[g]))
                ranks = fma(builder, w, shares[g], ranks)
                w = w if there is None else builder.select(there, w, _real8(0.0))
                lean = builder.fmul(w, builder.fsub(x, middles[g]))
                for cell, add in zip(cells[2 * g : 2 * g + 2], (w, lean), strict=True):
                    builder.store(builder.fadd(builder.load(cell), add), cell)
            return ranks

        def rank_at(i):
            return builder.bitcast(builder.gep(rp, [i]), REAL8.as_pointer())

        n8 = builder.and_(count, I64(~7))
        with loop(builder, I64(0), n8, 8) as (i, _):
            builder.store(block(i, None), rank_at(i), align=4)
        rest = builder.sub(count, n8)
        with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
            few = builder.trunc(rest, I32)
            there = builder.icmp_signed("<", lanes, splat(builder, few, 8))
            ranks = cgutils.alloca_once(builder, REAL8)
            builder.store(block(n8, there), ranks)
            one = builder.bitcast(ranks, F32.as_pointer())
            with loop(builder, I64(0), rest, 1) as (k, _):
                builder.store(builder.load(builder.gep(one, [k])), builder.gep(rp, [builder.add(n8, k)]))
        for g in range(G):
            builder.store(sum_lanes(builder, builder.load(cells[2 * g])), sums[g])
            builder.store(sum_lanes(builder, builder.load(cells[2 * g + 1])), leans[g])
        return context.get_dummy_value()

    i = types.int64
    return types.void(logit, i, i, i, mean, i, i, peak, share, rank, sums, leans, i, heads), gen


@intrinsic
def add_pairs(typingctx, x, x_at, y, y_at, half):
    """Sums of neighbours of x[x_at:] in y[y_at:], ``half`` of them, and their differences; each is of EIGHT numbers."""

    def gen(context, builder, sig, args):
        xp, yp = (
            builder.bitcast(pointer(context, builder, sig.args[i], args[i], args[i + 1]), REAL8.as_pointer())
            for i in (0, 2)
        )
        with loop(builder, I64(0), args[4], 1) as (d, _):
            low = builder.gep(xp, [builder.mul(d, I64(2))])
            low, high = (builder.load(builder.gep(low, [I64(k)]), align=4) for k in range(2))
            builder.store(builder.fadd(low, high), builder.gep(yp, [d]), align=4)
            builder.store(builder.fsub(low, high), builder.gep(yp, [builder.add(d, args[4])]), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(x, i, y, i, i), gen


@intrinsic
def pack_eight(typingctx, x, half, step, least, codes, scales):
    """The codes of EIGHT vectors of 2 half numbers that stand side by side in x [2 half, EIGHT], see packed.py.

    codes [half, EIGHT] int8, scales [EIGHT]: ``step`` times the largest number, and no less than ``least``.
    """

    def gen(context, builder, sig, args):
        xp, sp = (
            builder.bitcast(pointer(context, builder, sig.args[i], args[i], I64(0)), REAL8.as_pointer()) for i in (0, 5)
        )
        bytes8 = ir.VectorType(ir.IntType(8), EIGHT)
        cp = builder.bitcast(pointer(context, builder, sig.args[4], args[4], I64(0)), bytes8.as_pointer())

        def numbers(d):
            return builder.load(builder.gep(xp, [d]), align=4)

        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        cell = cgutils.alloca_once(builder, REAL8)
        builder.store(ir.Constant(REAL8, [0.0] * EIGHT), cell)
        with loop(builder, I64(0), builder.mul(args[1], I64(2)), 1) as (d, _):
            size = _call(builder, "llvm.fabs.v8f32", REAL8, numbers(d))
            builder.store(larger(size, builder.load(cell)), cell)
        scale = builder.fmul(builder.load(cell), splat(builder, args[2], EIGHT))
        scale = larger(scale, splat(builder, args[3], EIGHT))
        builder.store(scale, sp, align=4)

        def counts(d):
            near = _call(builder, "llvm.nearbyint.v8f32", REAL8, builder.fdiv(numbers(d), scale))
            return builder.add(builder.fptosi(near, WHOLE8), ir.Constant(WHOLE8, [8] * EIGHT))

        with loop(builder, I64(0), args[1], 1) as (d, _):
            high = builder.shl(counts(builder.add(d, args[1])), ir.Constant(WHOLE8, [4] * EIGHT))
            code = builder.or_(counts(d), high)
            builder.store(builder.trunc(code, bytes8), builder.gep(cp, [d]), align=1)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.float32, types.float32, codes, scales), gen
