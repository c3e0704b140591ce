# mypy: ignore-errors
# (These functions build LLVM instructions; Numba types them itself.)
"""Explicit vector loops for Numba: scores of contiguous rows, and weighted sums of contiguous rows.

LLVM's own vectoriser re-checks aliasing and trip counts for every row and keeps accumulators in memory; these two
loops hold the query (or the accumulators) of a whole KV group in registers. G, D and the vector width come from the
*types* of small tuples (see `lanes`), so one source serves every shape and Numba's disk cache still works (closures
over jitted functions would miss it in every new process). Packed int8 rows have their scale behind their last number.
"""

from math import gcd

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32 = ir.FloatType()
I64 = ir.IntType(64)


def lanes(G: int, D: int, Dv: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Type-level sizes for the kernels: (G, D / width, Dv / width, log2(width) + 1) as tuples of those lengths."""
    width = gcd(gcd(16, D), Dv)
    return (0,) * G, (0,) * (D // width), (0,) * (Dv // width), (0,) * width.bit_length()


def _pointer(context, builder, typ, value, offset):
    data = context.make_array(typ)(context, builder, value).data
    return builder.gep(data, [offset])


def _load(builder, pointer, element, chunk, width):
    """`width` stored numbers at pointer[chunk * width] as float32: uint16 is float16 bits, int16 bfloat16 bits.

    int8 numbers come without their row's scale.
    """
    p = builder.gep(pointer, [I64(chunk * width)])
    if element == types.float32:
        return builder.load(builder.bitcast(p, ir.VectorType(F32, width).as_pointer()), align=4)
    if element == types.int8:
        raw = builder.load(builder.bitcast(p, ir.VectorType(ir.IntType(8), width).as_pointer()), align=1)
        return builder.sitofp(raw, ir.VectorType(F32, width))
    raw = builder.load(builder.bitcast(p, ir.VectorType(ir.IntType(16), width).as_pointer()), align=2)
    if element == types.uint16:
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), width)), ir.VectorType(F32, width))
    i32 = ir.VectorType(ir.IntType(32), width)
    shift = ir.Constant(i32, [16] * width)
    return builder.bitcast(builder.shl(builder.zext(raw, i32), shift), ir.VectorType(F32, width))


def load_scale(builder, pointer):
    """The float32 at a byte pointer, however it is aligned."""
    return builder.load(builder.bitcast(pointer, F32.as_pointer()), align=1)


def _fma(builder, a, b, c):
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f32"
    )
    return builder.call(fn, [a, b, c])


def _sum(builder, v):
    """Horizontal sum of a float32 vector, by halves."""
    while v.type.count > 1:
        n = v.type.count // 2
        undef = ir.Constant(v.type, ir.Undefined)
        lo = builder.shuffle_vector(v, undef, ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(n))))
        hi = builder.shuffle_vector(v, undef, ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(n, 2 * n))))
        v = builder.fadd(lo, hi)
    return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))


def _pair_sums(builder, vectors):
    """Horizontal sums of a power-of-two list of vectors at once: each step halves the list and keeps the width.

    Lane i of the result holds, in every block of len(vectors) lanes, a partial sum of vector i.
    """
    width = vectors[0].type.count
    mask = ir.VectorType(ir.IntType(32), width)
    span = 1
    while len(vectors) > 1 and span < width:
        blocks = range(0, width, 2 * span)
        low = [side + i + s for i in blocks for side in (0, width) for s in range(span)]
        high = [lane + span for lane in low]
        vectors = [
            builder.fadd(
                builder.shuffle_vector(a, b, ir.Constant(mask, low)),
                builder.shuffle_vector(a, b, ir.Constant(mask, high)),
            )
            for a, b in zip(vectors[0::2], vectors[1::2], strict=True)
        ]
        span *= 2
    return vectors


def _loop(builder, start, stop, step):
    """A counted loop as a context manager yielding the index."""
    return cgutils.for_range_slice(builder, start, stop, I64(step))


@intrinsic
def score_rows(typingctx, q, q_at, rows, rows_at, row_stride, n, out, out_at, out_stride, heads, chunks, width):
    """out[out_at + g * out_stride + i] = q[q_at + g * D :] . rows[rows_at + i * row_stride :] for i < n, g < G.

    Packed rows: the products of the int8 numbers are multiplied by the row's scale at the end.
    """

    def gen(context, builder, sig, args):
        G, C, W = len(sig.args[9]), len(sig.args[10]), 1 << (len(sig.args[11]) - 1)
        element = sig.args[2].dtype
        qp = _pointer(context, builder, sig.args[0], args[0], args[1])
        rp = _pointer(context, builder, sig.args[2], args[2], args[3])
        op = _pointer(context, builder, sig.args[6], args[6], args[7])
        qs = [
            [_load(builder, builder.gep(qp, [I64(g * C * W)]), types.float32, c, W) for c in range(C)] for g in range(G)
        ]

        packed = element == types.int8

        def row_at(i):
            return builder.gep(rp, [builder.mul(i, args[4])])

        def scale_at(i):
            return load_scale(builder, builder.gep(row_at(i), [I64(C * W)]))

        def dots(i):
            row = row_at(i)
            vs = [_load(builder, row, element, c, W) for c in range(C)]
            sums = []
            for g in range(G):
                a = builder.fmul(qs[g][0], vs[0])
                for c in range(1, C):
                    a = _fma(builder, qs[g][c], vs[c], a)
                sums.append(a)
            return sums

        n4 = builder.and_(args[5], I64(~3))
        if W >= 4:
            # four rows at a time: their horizontal sums share the shuffles
            with _loop(builder, I64(0), n4, 4) as (i, _):
                four = [dots(builder.add(i, I64(k))) for k in range(4)]
                if packed:
                    scales = ir.Constant(ir.VectorType(F32, 4), ir.Undefined)
                    for k in range(4):
                        one = scale_at(builder.add(i, I64(k)))
                        scales = builder.insert_element(scales, one, ir.Constant(ir.IntType(32), k))
                for g in range(G):
                    (v,) = _pair_sums(builder, [four[k][g] for k in range(4)])
                    # v holds, in every block of 4 lanes, one partial sum per row
                    while v.type.count > 4:
                        m = v.type.count // 2
                        t = ir.VectorType(ir.IntType(32), m)
                        u = ir.Constant(v.type, ir.Undefined)
                        v = builder.fadd(
                            builder.shuffle_vector(v, u, ir.Constant(t, list(range(m)))),
                            builder.shuffle_vector(v, u, ir.Constant(t, list(range(m, 2 * m)))),
                        )
                    if packed:
                        v = builder.fmul(v, scales)
                    p = builder.gep(op, [builder.add(builder.mul(args[8], I64(g)), i)])
                    builder.store(v, builder.bitcast(p, v.type.as_pointer()), align=4)
        else:
            n4 = I64(0)
        with _loop(builder, n4, args[5], 1) as (i, _):
            for g, a in enumerate(dots(i)):
                dot = builder.fmul(_sum(builder, a), scale_at(i)) if packed else _sum(builder, a)
                builder.store(dot, builder.gep(op, [builder.add(builder.mul(args[8], I64(g)), i)]))
        return context.get_dummy_value()

    i = types.int64
    return types.void(q, i, rows, i, i, i, out, i, i, heads, chunks, width), gen


@intrinsic
def add_rows(typingctx, weight, weight_at, weight_stride, rows, rows_at, row_stride, n, acc, heads, chunks, width):
    """acc[g, :] += weight[weight_at + g * weight_stride + i] * rows[rows_at + i * row_stride :] over i < n.

    Packed rows: each weight is multiplied by the row's scale first.
    """

    def gen(context, builder, sig, args):
        G, C, W = len(sig.args[8]), len(sig.args[9]), 1 << (len(sig.args[10]) - 1)
        element = sig.args[3].dtype
        wp = _pointer(context, builder, sig.args[0], args[0], args[1])
        rp = _pointer(context, builder, sig.args[3], args[3], args[4])
        ap = _pointer(context, builder, sig.args[7], args[7], I64(0))
        vec = ir.VectorType(F32, W)
        # at most 24 accumulators, so that they stay in the 32 vector registers
        group = max(1, 24 // G)
        for c0 in range(0, C, group):
            cs = range(c0, min(C, c0 + group))
            cells = []
            for g in range(G):
                for c in cs:
                    p = builder.bitcast(builder.gep(ap, [I64((g * C + c) * W)]), vec.as_pointer())
                    cell = cgutils.alloca_once(builder, vec)
                    builder.store(builder.load(p, align=4), cell)
                    cells.append((p, cell))
            with _loop(builder, I64(0), args[6], 1) as (i, _):
                row = builder.gep(rp, [builder.mul(i, args[5])])
                vs = [_load(builder, row, element, c, W) for c in cs]
                k = 0
                packed = element == types.int8
                scale = load_scale(builder, builder.gep(row, [I64(C * W)])) if packed else None
                for g in range(G):
                    w = builder.load(builder.gep(wp, [builder.add(builder.mul(args[2], I64(g)), i)]))
                    w = builder.fmul(w, scale) if packed else w
                    one = builder.insert_element(ir.Constant(vec, ir.Undefined), w, ir.Constant(ir.IntType(32), 0))
                    ws = builder.shuffle_vector(
                        one, ir.Constant(vec, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), W), [0] * W)
                    )
                    for v in vs:
                        builder.store(_fma(builder, ws, v, builder.load(cells[k][1])), cells[k][1])
                        k += 1
            for p, cell in cells:
                builder.store(builder.load(cell), p, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(weight, i, i, rows, i, i, i, acc, heads, chunks, width), gen
