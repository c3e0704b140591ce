# mypy: ignore-errors
# (These functions build LLVM instructions; Numba types them itself.)
"""Explicit vector loops for Numba: scores of contiguous rows, and weighted sums of contiguous rows.

LLVM's own vectoriser re-checks aliasing and trip counts for every row and keeps accumulators in memory; these two
loops hold the query (or the accumulators) of a whole KV group in registers. G, D and the vector width come from the
*types* of small tuples (see `lanes`), so one source serves every shape and Numba's disk cache still works (closures
over jitted functions would miss it in every new process). Packed int8 rows have their scale behind their last number.
"""

from math import gcd

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

F32 = ir.FloatType()
I64 = ir.IntType(64)
# Bytes of a line of the cache.
LINE = 64


def compiled_for(feature: str) -> bool:
    """Whether kernels may use a feature of processors: this one's, or those that NUMBA_CPU_FEATURES names."""
    if config.CPU_FEATURES is not None:
        return f"+{feature}" in config.CPU_FEATURES.split(",")
    return bool(binding.get_host_cpu_features().get(feature))


def lanes(G: int, D: int, Dv: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Type-level sizes for the kernels: (G, D / width, Dv / width, log2(width) + 1) as tuples of those lengths."""
    width = gcd(gcd(16, D), Dv)
    return (0,) * G, (0,) * (D // width), (0,) * (Dv // width), (0,) * width.bit_length()


def pointer(context, builder, typ, value, offset):
    data = context.make_array(typ)(context, builder, value).data
    return builder.gep(data, [offset])


def load_numbers(builder, pointer, element, chunk, width):
    """`width` stored numbers at pointer[chunk * width] as float32: uint16 is float16 bits, int16 bfloat16 bits.

    int8 numbers come without their row's scale, and int32, which are pairs of numbers, as they are.
    """
    p = builder.gep(pointer, [I64(chunk * width)])
    if element in (types.float32, types.int32):
        number = F32 if element == types.float32 else ir.IntType(32)
        return builder.load(builder.bitcast(p, ir.VectorType(number, width).as_pointer()), align=4)
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


def fma(builder, a, b, c):
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f32"
    )
    return builder.call(fn, [a, b, c])


def _plus(builder, a, b):
    return builder.add(a, b) if isinstance(a.type.element, ir.IntType) else builder.fadd(a, b)


def sum_lanes(builder, v):
    """Horizontal sum of a vector, by halves."""
    while v.type.count > 1:
        n = v.type.count // 2
        undef = ir.Constant(v.type, ir.Undefined)
        lo = builder.shuffle_vector(v, undef, ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(n))))
        hi = builder.shuffle_vector(v, undef, ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(n, 2 * n))))
        v = _plus(builder, lo, hi)
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
            _plus(
                builder,
                builder.shuffle_vector(a, b, ir.Constant(mask, low)),
                builder.shuffle_vector(a, b, ir.Constant(mask, high)),
            )
            for a, b in zip(vectors[0::2], vectors[1::2], strict=True)
        ]
        span *= 2
    return vectors


def loop(builder, start, stop, step):
    """A counted loop as a context manager yielding the index."""
    return cgutils.for_range_slice(builder, start, stop, I64(step))


def sums_of_four(builder, dots, i, out, stride):
    """The horizontal sums of dots [4][G], of rows i .. i + 4, and where in out they belong: a pair for each g.

    Four rows at a time share the shuffles.
    """
    found = []
    for g in range(len(dots[0])):
        (v,) = _pair_sums(builder, [dots[k][g] for k in range(4)])
        # v holds, in every block of 4 lanes, one partial sum per row
        while v.type.count > 4:
            m = v.type.count // 2
            t = ir.VectorType(ir.IntType(32), m)
            u = ir.Constant(v.type, ir.Undefined)
            v = _plus(
                builder,
                builder.shuffle_vector(v, u, ir.Constant(t, list(range(m)))),
                builder.shuffle_vector(v, u, ir.Constant(t, list(range(m, 2 * m)))),
            )
        p = builder.gep(out, [builder.add(builder.mul(stride, I64(g)), i)])
        found.append((v, builder.bitcast(p, ir.VectorType(F32, 4).as_pointer())))
    return found


def splat(builder, x, width):
    """A vector of ``width`` times x."""
    vec = ir.VectorType(x.type, width)
    one = builder.insert_element(ir.Constant(vec, ir.Undefined), x, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    return builder.shuffle_vector(one, ir.Constant(vec, ir.Undefined), zeros)


def four_scales(builder, scale_at, i):
    """The scales of rows i .. i + 4 as a vector."""
    scales = ir.Constant(ir.VectorType(F32, 4), ir.Undefined)
    for k in range(4):
        one = scale_at(builder.add(i, I64(k)))
        scales = builder.insert_element(scales, one, ir.Constant(ir.IntType(32), k))
    return scales


@intrinsic
def prefetch(typingctx, rows, at, n):
    """Have the processor load n elements of rows from at on, a few lines of its cache, while it goes on."""

    def gen(context, builder, sig, args):
        size = context.get_abi_sizeof(context.get_data_type(sig.args[0].dtype))
        byte = ir.IntType(8).as_pointer()
        start = builder.bitcast(pointer(context, builder, sig.args[0], args[0], args[1]), byte)
        flags = [ir.IntType(32)] * 3
        load = builder.module.declare_intrinsic("llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *flags]))
        with loop(builder, I64(0), builder.mul(args[2], I64(size)), LINE) as (i, _):
            # To be read, to be kept in all caches, and data: see LLVM's manual.
            builder.call(load, [builder.gep(start, [i]), *(flag(n) for flag, n in zip(flags, (0, 3, 1), strict=True))])
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64), gen


@intrinsic
def score_rows(typingctx, q, q_at, rows, rows_at, row_stride, n, out, out_at, out_stride, heads, chunks, width):
    """out[out_at + g * out_stride + i] = q[q_at + g * D :] . rows[rows_at + i * row_stride :] for i < n, g < G.

    Packed rows: the products of the int8 numbers are multiplied by the row's scale at the end.
    """

    def gen(context, builder, sig, args):
        G, C, W = len(sig.args[9]), len(sig.args[10]), 1 << (len(sig.args[11]) - 1)
        element = sig.args[2].dtype
        qp = pointer(context, builder, sig.args[0], args[0], args[1])
        rp = pointer(context, builder, sig.args[2], args[2], args[3])
        op = pointer(context, builder, sig.args[6], args[6], args[7])
        qs = [
            [load_numbers(builder, builder.gep(qp, [I64(g * C * W)]), types.float32, c, W) for c in range(C)]
            for g in range(G)
        ]
        packed = element == types.int8

        def row_at(i):
            return builder.gep(rp, [builder.mul(i, args[4])])

        def scale_at(i):
            return load_scale(builder, builder.gep(row_at(i), [I64(C * W)]))

        def dots(i):
            row = row_at(i)
            vs = [load_numbers(builder, row, element, c, W) for c in range(C)]
            sums = []
            for g in range(G):
                a = builder.fmul(qs[g][0], vs[0])
                for c in range(1, C):
                    a = fma(builder, qs[g][c], vs[c], a)
                sums.append(a)
            return sums

        n4 = builder.and_(args[5], I64(~3))
        if W >= 4:
            with loop(builder, I64(0), n4, 4) as (i, _):
                four = [dots(builder.add(i, I64(k))) for k in range(4)]
                scales = four_scales(builder, scale_at, i) if packed else None
                for v, p in sums_of_four(builder, four, i, op, args[8]):
                    builder.store(builder.fmul(v, scales) if packed else v, p, align=4)
        else:
            n4 = I64(0)
        with loop(builder, n4, args[5], 1) as (i, _):
            for g, a in enumerate(dots(i)):
                dot = builder.fmul(sum_lanes(builder, a), scale_at(i)) if packed else sum_lanes(builder, a)
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
        wp = pointer(context, builder, sig.args[0], args[0], args[1])
        rp = pointer(context, builder, sig.args[3], args[3], args[4])
        ap = pointer(context, builder, sig.args[7], args[7], I64(0))
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
            with loop(builder, I64(0), args[6], 1) as (i, _):
                row = builder.gep(rp, [builder.mul(i, args[5])])
                vs = [load_numbers(builder, row, element, c, W) for c in cs]
                k = 0
                packed = element == types.int8
                scale = load_scale(builder, builder.gep(row, [I64(C * W)])) if packed else None
                for g in range(G):
                    w = builder.load(builder.gep(wp, [builder.add(builder.mul(args[2], I64(g)), i)]))
                    w = builder.fmul(w, scale) if packed else w
                    ws = splat(builder, w, W)
                    for v in vs:
                        builder.store(fma(builder, ws, v, builder.load(cells[k][1])), cells[k][1])
                        k += 1
            for p, cell in cells:
                builder.store(builder.load(cell), p, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(weight, i, i, rows, i, i, i, acc, heads, chunks, width), gen
