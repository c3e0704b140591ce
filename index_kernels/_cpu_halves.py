# mypy: ignore-errors
# (These functions build LLVM instructions; Numba types them itself.)
"""Products of a tile of rows with very many queries as `_cpu_columns` has them, of bfloat16 numbers: twice as fast.

Two numbers that are multiplied and summed together stand side by side in 32 bits; sums are float32, as a GPU's are.
Processors without such an instruction do what it does in several.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._cpu_columns import by_four, row_vectors, score_rows, vector_at
from ._cpu_tiles import WIDTH, add_weighted
from ._cpu_vectors import I64, compiled_for, fma, loop, pointer, splat

# Whether the processor has instructions for it.
FASTER = compiled_for("avx512bf16")
I16, I32 = ir.IntType(16), ir.IntType(32)


def in_pairs(lanes) -> bool:
    """Whether rows whose sizes are these, see tile_lanes, are of pairs."""
    return len(lanes[2]) > 1


def _call(builder, name, to, *given):
    # LLVM turns these signatures, of its versions before 16, into its own.
    kind = ir.FunctionType(to, [x.type for x in given])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512bf16.{name}"), given)


def _all(like, number):
    return ir.Constant(like, [number] * like.count)


def _halves(builder, v):
    """A vector of float32 as bits of bfloat16, rounded to the nearest."""
    narrow, whole = (ir.VectorType(bits, v.type.count) for bits in (I16, I32))
    if FASTER and v.type.count == 16:
        return _call(builder, "cvtneps2bf16.512", narrow, v)
    bits = builder.bitcast(v, whole)
    odd = builder.and_(builder.lshr(bits, _all(whole, 16)), _all(whole, 1))
    bits = builder.add(bits, builder.add(odd, _all(whole, 0x7FFF)))
    return builder.trunc(builder.lshr(bits, _all(whole, 16)), narrow)


def _add(builder, x, y, sums):
    """sums + the products of both numbers of each lane, for vectors of pairs."""
    if FASTER and x.type.count == 16:
        return _call(builder, "dpbf16ps.512", sums.type, sums, x, y)
    for part in (
        lambda v: builder.shl(v, _all(v.type, 16)),
        lambda v: builder.and_(v, _all(v.type, 0xFFFF0000)),
    ):
        sums = fma(builder, *(builder.bitcast(part(v), sums.type) for v in (x, y)), sums)
    return sums


@intrinsic
def pair_columns(typingctx, rows, columns, n, out):
    """out[i, g] = (rows[2 * i, g], rows[2 * i + 1, g]) for 2 * i < n, g < columns, a multiple of COLUMNS.

    rows [>= n, columns] float32 and out [>= n / 2, columns] int32 are flat; what an odd n lacks is 0.
    """

    def gen(context, builder, sig, args):
        rp, op = (pointer(context, builder, sig.args[i], args[i], I64(0)) for i in (0, 3))
        columns, n = args[1:3]

        def some(i, both):
            def halves(g, k):
                at = builder.add(builder.mul(columns, builder.add(i, I64(k))), g)
                bits = _halves(builder, builder.load(vector_at(builder, rp, at), align=4))
                return builder.zext(bits, ir.VectorType(I32, WIDTH))

            to = builder.mul(columns, builder.lshr(i, I64(1)))
            with loop(builder, I64(0), columns, WIDTH) as (g, _):
                pairs = halves(g, 0)
                if both:
                    high = halves(g, 1)
                    pairs = builder.or_(pairs, builder.shl(high, _all(high.type, 16)))
                builder.store(pairs, vector_at(builder, op, builder.add(to, g), I32), align=4)

        even = builder.and_(n, I64(~1))
        with loop(builder, I64(0), even, 2) as (i, _):
            some(i, True)
        with loop(builder, even, n, 1) as (i, _):
            some(i, False)
        return context.get_dummy_value()

    i = types.int64
    return types.void(rows, i, i, out), gen


@intrinsic
def take_keys(typingctx, rows, rows_at, row_stride, n, tile, tile_at, chunks, width):
    """tile[tile_at + i] = rows[rows_at + i * row_stride :] for i < n.

    tile [.., D / 2] int32 is flat: neighbours of a row are pairs.
    """

    def gen(context, builder, sig, args):
        C, W = len(sig.args[6]), 1 << (len(sig.args[7]) - 1)
        rp = pointer(context, builder, sig.args[0], args[0], args[1])
        tp = pointer(context, builder, sig.args[4], args[4], builder.mul(args[5], I64(C * W // 2)))
        tp = builder.bitcast(tp, I16.as_pointer())
        with loop(builder, I64(0), args[3], 1) as (i, _):
            row = builder.gep(rp, [builder.mul(i, args[2])])
            for c, v in enumerate(row_vectors(builder, row, sig.args[0].dtype, C, W)):
                v = _halves(builder, v)
                to = builder.gep(tp, [builder.add(builder.mul(i, I64(C * W)), I64(c * W))])
                builder.store(v, builder.bitcast(to, v.type.as_pointer()), align=2)
        return context.get_dummy_value()

    i = types.int64
    return types.void(rows, i, i, i, tile, i, chunks, width), gen


@intrinsic
def take_values(typingctx, rows, rows_at, row_stride, n, tile, tile_at, chunks, width):
    """tile[tile_at + i] = rows[rows_at + i * row_stride :] for i < n, where tiles are taken from their first row on.

    tile [.., Dv] int32 is flat: rows 2 * i and 2 * i + 1 are row i of pairs. After an odd number of rows the last one's
    partner is 0.
    """

    def gen(context, builder, sig, args):
        C, W = len(sig.args[6]), 1 << (len(sig.args[7]) - 1)
        vec = ir.VectorType(I32, W)
        rp = pointer(context, builder, sig.args[0], args[0], args[1])
        tp = pointer(context, builder, sig.args[4], args[4], I64(0))
        with loop(builder, I64(0), args[3], 1) as (i, _):
            row, at = builder.gep(rp, [builder.mul(i, args[2])]), builder.add(args[5], i)
            first = builder.mul(builder.lshr(at, I64(1)), I64(C * W))
            places = [
                builder.bitcast(builder.gep(tp, [builder.add(first, I64(c * W))]), vec.as_pointer()) for c in range(C)
            ]
            odd = builder.trunc(at, ir.IntType(1))
            kept = splat(builder, builder.sext(odd, I32), W)
            shift = splat(builder, builder.select(odd, I32(16), I32(0)), W)
            for v, place in zip(row_vectors(builder, row, sig.args[0].dtype, C, W), places, strict=True):
                number = builder.shl(builder.zext(_halves(builder, v), vec), shift)
                builder.store(builder.or_(builder.and_(builder.load(place, align=4), kept), number), place, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(rows, i, i, i, tile, i, chunks, width), gen


@intrinsic
def score_pairs(typingctx, q, columns, tile, n, out, chunks, width):
    """out[i, g] = q[:, g] . tile[i] for i < n, g < columns, a multiple of COLUMNS.

    q [D / 2, columns], of pair_columns, tile [>= n, D / 2], of take_keys, and out [>= n, columns] are flat.
    """

    def gen(context, builder, sig, args):
        half = I64(len(sig.args[5]) * (1 << (len(sig.args[6]) - 1)) // 2)
        qp, tp, op = (pointer(context, builder, sig.args[i], args[i], I64(0)) for i in (0, 2, 4))

        def some(i, count):
            rows = [builder.gep(tp, [builder.mul(half, builder.add(i, I64(k)))]) for k in range(count)]
            score_rows(builder, qp, args[1], rows, half, op, i, _add)

        by_four(builder, args[3], some)
        return context.get_dummy_value()

    i = types.int64
    return types.void(q, i, tile, i, out, chunks, width), gen


@intrinsic
def add_pairs(typingctx, weight, columns, tile, n, acc, chunks, width):
    """acc[g] += weight[i, g] * tile[i] over i < n, for g < columns, a multiple of COLUMNS.

    weight [>= n / 2, columns], of pair_columns, tile [>= n / 2, Dv], of take_values, and acc [columns, Dv] are flat.
    """

    def gen(context, builder, sig, args):
        C, W = len(sig.args[5]), 1 << (len(sig.args[6]) - 1)
        wp, columns = pointer(context, builder, sig.args[0], args[0], I64(0)), args[1]
        pairs = builder.lshr(builder.add(args[3], I64(1)), I64(1))

        def weight_at(g, i):
            return builder.gep(wp, [builder.add(builder.mul(columns, i), g)])

        rows = args[2], I64(0), I64(C * W), pairs
        add_weighted(
            context, builder, sig.args[2], rows, columns, weight_at, sig.args[4], args[4], *sig.args[5:], add=_add
        )
        return context.get_dummy_value()

    i = types.int64
    return types.void(weight, i, tile, i, acc, chunks, width), gen
