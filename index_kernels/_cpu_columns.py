# mypy: ignore-errors
# (These functions build LLVM instructions; Numba types them itself.)
"""Products of a tile of rows with very many queries, for Numba, and a softmax over its rows.

Queries stand side by side, in columns: no sum is across a register, nor is any step of the softmax.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._cpu_tiles import WIDTH, add_weighted
from ._cpu_vectors import F32, I64, fma, load_numbers, load_scale, loop, pointer, splat

I32 = ir.IntType(32)
# Columns that compare_four takes.
SIXTEEN = 16
# Vectors of columns that are multiplied in one go.
VECTORS = 3
# Rows that are added in one go: their weights, which every few columns read anew, stay in the nearest cache.
TOGETHER = 64
# 2 to f as a polynomial of f from -0.5 to 0.5 whose relative error is least where it is largest; 1 at 0.
TO_2 = (1.32647238e-3, 9.67151299e-3, 5.55073358e-2, 0.240222424, 0.693147004, 1.0)
# A number of columns is made a multiple of it.
COLUMNS = VECTORS * WIDTH


def row_vectors(builder, row, element, chunks, width):
    """The vectors of a row as float32, however it is kept."""
    scale = None
    if element == types.int8:
        scale = splat(builder, load_scale(builder, builder.gep(row, [I64(chunks * width)])), width)
    for c in range(chunks):
        v = load_numbers(builder, row, element, c, width)
        yield v if scale is None else builder.fmul(v, scale)


@intrinsic
def compare_four(typingctx, columns, columns_at, n, q, q_at, D, less, first, best, arg):
    """For SIXTEEN columns i: where q[q_at + k * D :] . column - less[first + k] is above best[i], for one of four k
    after the other, it becomes best[i], and first + k becomes arg[i].

    columns [D, n] float32 holds a row in each column, so that no sum is across a register, and D needs no type; best
    float32 and arg int32 begin with column columns_at.
    """

    def gen(context, builder, sig, args):
        vec, whole = ir.VectorType(F32, SIXTEEN), ir.VectorType(I32, SIXTEEN)
        n, D, first = args[2], args[5], args[7]
        cp = pointer(context, builder, sig.args[0], args[0], args[1])
        qp = pointer(context, builder, sig.args[3], args[3], args[4])
        lp = pointer(context, builder, sig.args[6], args[6], first)
        bp = builder.bitcast(pointer(context, builder, sig.args[8], args[8], args[1]), vec.as_pointer())
        ap = builder.bitcast(pointer(context, builder, sig.args[9], args[9], args[1]), whole.as_pointer())
        cells = [cgutils.alloca_once(builder, vec) for _ in range(4)]
        for k, cell in enumerate(cells):
            builder.store(builder.fneg(splat(builder, builder.load(builder.gep(lp, [I64(k)])), SIXTEEN)), cell)
        with loop(builder, I64(0), D, 1) as (d, _):
            at = builder.bitcast(builder.gep(cp, [builder.mul(d, n)]), vec.as_pointer())
            column = builder.load(at, align=4)
            for k, cell in enumerate(cells):
                x = builder.load(builder.gep(qp, [builder.add(builder.mul(D, I64(k)), d)]))
                builder.store(fma(builder, splat(builder, x, SIXTEEN), column, builder.load(cell)), cell)
        top, number = builder.load(bp, align=4), builder.load(ap, align=4)
        for k, cell in enumerate(cells):
            score = builder.load(cell)
            above = builder.fcmp_ordered(">", score, top)
            top = builder.select(above, score, top)
            which = builder.trunc(builder.add(first, I64(k)), I32)
            number = builder.select(above, splat(builder, which, SIXTEEN), number)
        builder.store(top, bp, align=4)
        builder.store(number, ap, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(columns, i, i, q, i, i, less, i, best, arg), gen


def vector_at(builder, pointer, at, number=F32):
    """A pointer to the vector of columns that begins ``at`` numbers behind."""
    return builder.bitcast(builder.gep(pointer, [at]), ir.VectorType(number, WIDTH).as_pointer())


def score_rows(builder, q, columns, rows, length, out, i, add=fma):
    """out[i + k, g] = q[:, g] . rows[k] for g < columns: pointers to numbers, of which each row has ``length``.

    add(builder, row, q, sums) gives the new sums.
    """
    vec, number = ir.VectorType(F32, WIDTH), q.type.pointee
    with loop(builder, I64(0), columns, COLUMNS) as (g0, _):
        cells = [[cgutils.alloca_once(builder, vec) for _ in range(VECTORS)] for _ in rows]
        for cell in (cell for each in cells for cell in each):
            builder.store(ir.Constant(vec, [0.0] * WIDTH), cell)
        with loop(builder, I64(0), length, 1) as (d, _):
            at = builder.add(builder.mul(d, columns), g0)
            places = [builder.add(at, I64(v * WIDTH)) for v in range(VECTORS)]
            qs = [builder.load(vector_at(builder, q, place, number), align=4) for place in places]
            for row, each in zip(rows, cells, strict=True):
                x = splat(builder, builder.load(builder.gep(row, [d])), WIDTH)
                for y, cell in zip(qs, each, strict=True):
                    builder.store(add(builder, x, y, builder.load(cell)), cell)
        for k, each in enumerate(cells):
            at = builder.add(builder.mul(builder.add(i, I64(k)), columns), g0)
            for v, cell in enumerate(each):
                builder.store(builder.load(cell), vector_at(builder, out, builder.add(at, I64(v * WIDTH))), align=4)


def by_four(builder, n, some):
    """some(i, 4) for i = 0, 4, .. while there are four more, then some(i, 1)."""
    n4 = builder.and_(n, I64(~3))
    with loop(builder, I64(0), n4, 4) as (i, _):
        some(i, 4)
    with loop(builder, n4, n, 1) as (i, _):
        some(i, 1)


@intrinsic
def score_columns(typingctx, q, columns, rows, rows_at, row_stride, n, out, chunks, width):
    """out[i, g] = q[:, g] . rows[rows_at + i * row_stride :] for i < n, g < columns, a multiple of COLUMNS.

    q [D, columns] and out [>= n, columns] are flat. Packed rows: times the row's scale.
    """

    def gen(context, builder, sig, args):
        C, W = len(sig.args[7]), 1 << (len(sig.args[8]) - 1)
        element = sig.args[2].dtype
        qp = pointer(context, builder, sig.args[0], args[0], I64(0))
        rp = pointer(context, builder, sig.args[2], args[2], args[3])
        op = pointer(context, builder, sig.args[6], args[6], I64(0))
        # Rows that are kept otherwise are turned into floats here.
        room = None if element == types.float32 else cgutils.alloca_once(builder, F32, size=I64(4 * C * W))

        def numbers(i, k):
            row = builder.gep(rp, [builder.mul(builder.add(i, I64(k)), args[4])])
            if room is None:
                return row
            for c, v in enumerate(row_vectors(builder, row, element, C, W)):
                to = builder.gep(room, [I64((k * C + c) * W)])
                builder.store(v, builder.bitcast(to, v.type.as_pointer()), align=4)
            return builder.gep(room, [I64(k * C * W)])

        def some(i, count):
            score_rows(builder, qp, args[1], [numbers(i, k) for k in range(count)], I64(C * W), op, i)

        by_four(builder, args[5], some)
        return context.get_dummy_value()

    i = types.int64
    return types.void(q, i, rows, i, i, i, out, chunks, width), gen


@intrinsic
def add_columns(typingctx, weight, columns, rows, rows_at, row_stride, n, acc, chunks, width):
    """acc[g] += weight[i, g] * rows[rows_at + i * row_stride :] over i < n, for g < columns, a multiple of COLUMNS.

    weight [>= n, columns] and acc [columns, Dv] are flat. Packed rows: times the row's scale.
    """

    def gen(context, builder, sig, args):
        wp = pointer(context, builder, sig.args[0], args[0], I64(0))
        columns, rows, rows_at, row_stride, n = args[1:6]
        with loop(builder, I64(0), n, TOGETHER) as (first, _):
            left = builder.sub(n, first)
            some = builder.select(builder.icmp_signed("<", left, I64(TOGETHER)), left, I64(TOGETHER))
            part = rows, builder.add(rows_at, builder.mul(first, row_stride)), row_stride, some

            def weight_at(g, i, first=first):
                return builder.gep(wp, [builder.add(builder.mul(columns, builder.add(first, i)), g)])

            add_weighted(context, builder, sig.args[2], part, columns, weight_at, sig.args[6], args[6], *sig.args[7:])
        return context.get_dummy_value()

    i = types.int64
    return types.void(weight, i, rows, i, i, i, acc, chunks, width), gen


def _exp(builder, x):
    """exp of a vector of numbers that are not positive; below -86 that of -86."""
    vec, whole = x.type, ir.VectorType(I32, x.type.count)

    def of(number):
        return ir.Constant(vec, [_float(number)] * vec.count)

    y = builder.fmul(x, of(1.4426950408889634))
    y = builder.select(builder.fcmp_ordered(">", y, of(-125.0)), y, of(-125.0))
    kind = ir.FunctionType(vec, [vec])
    n = builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{vec.count}f32"), [y])
    f, p = builder.fsub(y, n), of(TO_2[0])
    for term in TO_2[1:]:
        p = fma(builder, p, f, of(term))
    # n is added to the power of two that a float32 holds.
    power = builder.shl(builder.fptosi(n, whole), ir.Constant(whole, [23] * vec.count))
    return builder.bitcast(builder.add(builder.bitcast(p, whole), power), vec)


def _float(x):
    """A number that a float32 holds: others LLVM's text refuses."""
    return float(np.float32(x))


@intrinsic
def weigh_columns(typingctx, logits, columns, n, top, total, shrink):
    """Turn n rows of logits into weights exp(logit - top), where top is raised first and total grows by the weights.

    logits [>= n, columns] is flat; columns is a multiple of COLUMNS. What was summed by the tops before is to be
    multiplied by shrink, as total is; all three are [columns].
    """

    def gen(context, builder, sig, args):
        columns, vec = args[1], ir.VectorType(F32, WIDTH)
        xp, tp, sp, kp = (pointer(context, builder, sig.args[i], args[i], I64(0)) for i in (0, 3, 4, 5))
        with loop(builder, I64(0), columns, COLUMNS) as (g0, _):
            starts = [builder.add(g0, I64(v * WIDTH)) for v in range(VECTORS)]
            tops = [builder.load(vector_at(builder, tp, g), align=4) for g in starts]
            cells = [cgutils.alloca_once(builder, vec) for _ in starts]
            for top, cell in zip(tops, cells, strict=True):
                builder.store(top, cell)
            with loop(builder, I64(0), args[2], 1) as (i, _):
                at = builder.mul(i, columns)
                for g, cell in zip(starts, cells, strict=True):
                    x, most = builder.load(vector_at(builder, xp, builder.add(at, g)), align=4), builder.load(cell)
                    builder.store(builder.select(builder.fcmp_ordered(">", x, most), x, most), cell)
            news = [builder.load(cell) for cell in cells]
            for g, top, new, cell in zip(starts, tops, news, cells, strict=True):
                by = _exp(builder, builder.fsub(top, new))
                builder.store(by, vector_at(builder, kp, g), align=4)
                builder.store(new, vector_at(builder, tp, g), align=4)
                builder.store(builder.fmul(builder.load(vector_at(builder, sp, g), align=4), by), cell)
            with loop(builder, I64(0), args[2], 1) as (i, _):
                at = builder.mul(i, columns)
                for g, new, cell in zip(starts, news, cells, strict=True):
                    place = vector_at(builder, xp, builder.add(at, g))
                    weight = _exp(builder, builder.fsub(builder.load(place, align=4), new))
                    builder.store(weight, place, align=4)
                    builder.store(builder.fadd(builder.load(cell), weight), cell)
            for g, cell in zip(starts, cells, strict=True):
                builder.store(builder.load(cell), vector_at(builder, sp, g), align=4)
        return context.get_dummy_value()

    return types.void(logits, types.int64, types.int64, top, total, shrink), gen
