# mypy: ignore-errors
# (These functions build LLVM instructions; Numba types them itself.)
"""Products of a tile of rows with many query heads, for Numba: their scores, and weighted sums of the rows.

A tile stays in the first cache while it is multiplied with one block of heads after the other; what a block
accumulates fits the registers (four rows by ``BLOCK`` heads of scores, ``BLOCK`` heads by four vectors of sums: 12 of
16). ``_cpu_vectors`` holds all heads of a group in registers instead, which is right for the few heads of one position.
Very many heads stand in columns, see ``_cpu_columns``.
"""

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
    load_numbers,
    load_scale,
    loop,
    pointer,
    splat,
    sum_lanes,
    sums_of_four,
)

# Heads of a block: a number of heads is made a multiple of it.
BLOCK = 3
# Vectors of a row that are summed in one go.
SPAN = 4
# Numbers that a register holds.
WIDTH = 16 if compiled_for("avx512f") else 8


def tile_lanes(D: int, Dv: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Type-level sizes for these kernels: (D / width, Dv / width, log2(width) + 1) as tuples of those lengths."""
    width = gcd(gcd(WIDTH, D), Dv)
    return (0,) * (D // width), (0,) * (Dv // width), (0,) * width.bit_length()


@intrinsic
def score_tile(typingctx, q, rows, rows_at, row_stride, n, heads, out, out_stride, chunks, width):
    """out[g, i] = q[g] . rows[rows_at + i * row_stride :] for i < n, g < heads; heads is a multiple of BLOCK.

    q [>= heads, D] and out [>= heads, out_stride] are contiguous. Packed rows: times the row's scale.
    """

    def gen(context, builder, sig, args):
        C, W = len(sig.args[8]), 1 << (len(sig.args[9]) - 1)
        element = sig.args[1].dtype
        packed = element == types.int8
        qp = pointer(context, builder, sig.args[0], args[0], I64(0))
        rp = pointer(context, builder, sig.args[1], args[1], args[2])
        op = pointer(context, builder, sig.args[6], args[6], I64(0))
        stride = args[7]

        def row_at(i):
            return builder.gep(rp, [builder.mul(i, args[3])])

        def scale_at(i):
            return load_scale(builder, builder.gep(row_at(i), [I64(C * W)]))

        def dots(rows, qg):
            sums = [[None] * BLOCK for _ in rows]
            for c in range(C):
                qs = [
                    load_numbers(builder, builder.gep(qg, [I64(g * C * W)]), types.float32, c, W) for g in range(BLOCK)
                ]
                for k, row in enumerate(rows):
                    v = load_numbers(builder, row, element, c, W)
                    for g in range(BLOCK):
                        sums[k][g] = fma(builder, qs[g], v, sums[k][g]) if c else builder.fmul(qs[g], v)
            return sums

        def blocks():
            return loop(builder, I64(0), args[5], BLOCK)

        n4 = builder.and_(args[4], I64(~3)) if W >= 4 else I64(0)
        if W >= 4:
            with loop(builder, I64(0), n4, 4) as (i, _):
                rows = [row_at(builder.add(i, I64(k))) for k in range(4)]
                scales = four_scales(builder, scale_at, i) if packed else None
                with blocks() as (g0, _):
                    sums = dots(rows, builder.gep(qp, [builder.mul(g0, I64(C * W))]))
                    to = builder.gep(op, [builder.mul(g0, stride)])
                    for v, p in sums_of_four(builder, sums, i, to, stride):
                        builder.store(builder.fmul(v, scales) if packed else v, p, align=4)
        with loop(builder, n4, args[4], 1) as (i, _):
            scale = scale_at(i) if packed else None
            with blocks() as (g0, _):
                (sums,) = dots([row_at(i)], builder.gep(qp, [builder.mul(g0, I64(C * W))]))
                to = builder.gep(op, [builder.mul(g0, stride)])
                for g, v in enumerate(sums):
                    dot = sum_lanes(builder, v)
                    p = builder.gep(to, [builder.add(builder.mul(stride, I64(g)), i)])
                    builder.store(builder.fmul(dot, scale) if packed else dot, p)
        return context.get_dummy_value()

    i = types.int64
    return types.void(q, rows, i, i, i, i, out, i, chunks, width), gen


def add_weighted(context, builder, rows_type, rows, heads, weight_at, acc_type, acc, chunks, width, add=fma):
    """What add_tile, _cpu_columns.add_columns and _cpu_halves.add_pairs are.

    rows: (rows, rows_at, row_stride, n); weight_at(g, i) points to a weight; add(builder, weights, row, sums) gives
    the new sums.
    """
    C, W = len(chunks), 1 << (len(width) - 1)
    element = rows_type.dtype
    packed = element == types.int8
    rows, rows_at, row_stride, n = rows
    rp = pointer(context, builder, rows_type, rows, rows_at)
    ap = pointer(context, builder, acc_type, acc, I64(0))
    vec = ir.VectorType(F32, W)
    with loop(builder, I64(0), heads, BLOCK) as (g0, _):
        for c0 in range(0, C, SPAN):
            cs = range(c0, min(C, c0 + SPAN))
            cells = []
            for g in range(BLOCK):
                for c in cs:
                    at = builder.add(builder.mul(g0, I64(C * W)), I64((g * C + c) * W))
                    p = builder.bitcast(builder.gep(ap, [at]), vec.as_pointer())
                    cell = cgutils.alloca_once(builder, vec)
                    builder.store(builder.load(p, align=4), cell)
                    cells.append((p, cell))
            with loop(builder, I64(0), n, 1) as (i, _):
                row = builder.gep(rp, [builder.mul(i, row_stride)])
                scale = load_scale(builder, builder.gep(row, [I64(C * W)])) if packed else None
                ws = []
                for g in range(BLOCK):
                    w = builder.load(weight_at(builder.add(g0, I64(g)), i))
                    ws.append(splat(builder, builder.fmul(w, scale) if packed else w, W))
                for j, c in enumerate(cs):
                    # One vector of the row at a time: with all of them the registers would not do.
                    v = load_numbers(builder, row, element, c, W)
                    for g in range(BLOCK):
                        cell = cells[g * len(cs) + j][1]
                        builder.store(add(builder, ws[g], v, builder.load(cell)), cell)
            for p, cell in cells:
                builder.store(builder.load(cell), p, align=4)


@intrinsic
def add_tile(typingctx, weight, weight_stride, rows, rows_at, row_stride, n, heads, acc, chunks, width):
    """acc[g] += weight[g, i] * rows[rows_at + i * row_stride :] over i < n, for g < heads, a multiple of BLOCK.

    weight [>= heads, weight_stride] and acc [>= heads, Dv] are contiguous. Packed rows: times the row's scale.
    """

    def gen(context, builder, sig, args):
        wp = pointer(context, builder, sig.args[0], args[0], I64(0))

        def weight_at(g, i):
            return builder.gep(wp, [builder.add(builder.mul(g, args[1]), i)])

        add_weighted(context, builder, sig.args[2], args[2:6], args[6], weight_at, sig.args[7], args[7], *sig.args[8:])
        return context.get_dummy_value()

    i = types.int64
    return types.void(weight, i, rows, i, i, i, i, acc, chunks, width), gen
