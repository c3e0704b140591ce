"""attend_lists: one query position over a segmented store, every row source in one call."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import platform

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from ._cpu_common import (
    FAST,
    I32,
    NEG,
    TILE,
    F,
    exp32,
    flush,
    load_query,
    merge_parts,
    scan_range,
    softcapped,
    store_state,
)
from ._cpu_vectors import add_rows, score_rows

# Summary rows are read eight at a time; eights that hold under 1 / (TAIL_FLOOR * lists) of the mass are skipped.
TAIL_FLOOR = F(60.0)


@njit(fastmath=FAST)
def _choose(rank, size, b, count, budget, taken, chosen, nchosen):
    """Highest ranks first until `budget` rows are taken, over all KV heads of batch row b together.

    A histogram over the leading 11 bits after the sign of the (non-negative) float finds the threshold without a sort;
    inside the threshold's bucket the smaller index goes first. count [B, H] is the number of entries.
    Writes taken[b, h, i] (0/1), chosen[b, h, :] ascending and nchosen[b, h].
    """
    H = rank.shape[1]
    histogram = np.zeros(2048, np.int64)
    for h in range(H):
        for i in range(count[b, h]):
            histogram[_bucket(rank[b, h, i])] += size[b, h, i]
    cut = histogram.size
    left = budget
    while cut > 0 and histogram[cut - 1] <= left:
        cut -= 1
        left -= histogram[cut]
    rows = np.int64(0)
    for h in range(H):
        n = 0
        for i in range(count[b, h]):
            k = _bucket(rank[b, h, i])
            take = k >= cut
            if k == cut - 1 and size[b, h, i] <= left:
                left -= size[b, h, i]
                take = True
            taken[b, h, i] = take
            if take:
                chosen[b, h, n] = i
                n += 1
                rows += size[b, h, i]
        nchosen[b, h] = n
    return rows


@intrinsic
def f32_bits(typingctx, x):
    """A float32's bit pattern as int32."""

    def gen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), gen


@intrinsic
def cycles(typingctx):
    """The processor's cycle counter, for shares of time; 0 where user code may not read one."""

    def gen(context, builder, sig, args):
        if platform.machine() not in ("x86_64", "AMD64"):
            return ir.Constant(ir.IntType(64), 0)
        counter = builder.module.declare_intrinsic("llvm.readcyclecounter", fnty=ir.FunctionType(ir.IntType(64), []))
        return builder.call(counter, [])

    return types.int64(), gen


@njit(inline="always")
def element_strides(a):
    """Strides of a [B, H, T, D] array in elements."""
    return a.strides[0] // a.itemsize, a.strides[1] // a.itemsize, a.strides[2] // a.itemsize


@njit(inline="always")
def _bucket(r):
    return f32_bits(r) >> I32(20)


@njit(fastmath=FAST)
def _rescale(logit, size, b, h, count, peak, mass):
    """Turn logits into exp(logit - peak) in place; mass[g] = sum of size * weight. First raises peak to the maximum."""
    G = logit.shape[2]
    for g in range(G):
        top = peak[b, h * G + g]
        for i in range(count):
            top = max(top, logit[b, h, g, i])
        s = F(0.0)
        for i in range(count):
            e = exp32(logit[b, h, g, i] - top)
            logit[b, h, g, i] = e
            s += e * F(size[b, h, i])
        peak[b, h * G + g] = top
        mass[g] = s


@njit(fastmath=FAST)
def _rank(weight, var, spread, mass, b, h, count, rank):
    """What leaving an entry unread may cost: sum over the group of its rows' share of the softmax times the
    deviation of their logits. weight [B, H, G, .] is relative to mass [B, Hq]."""
    G = weight.shape[2]
    for i in range(count):
        rank[b, h, i] = F(0.0)
    for g in range(G):
        f = np.sqrt(spread[b, h * G + g]) / mass[b, h * G + g]
        for i in range(count):
            rank[b, h, i] += f * weight[b, h, g, i]
    for i in range(count):
        rank[b, h, i] *= np.sqrt(var[b, h, i])


@njit(fastmath=FAST)
def _correct(logit, var, spread, b, h, lo, hi, alpha, softcap):
    """Add alpha * variance of the row logits to the centroid logits lo..hi (after the softcap, with its slope).

    The logits of a list's rows scatter around their centroid's; by Jensen their mean weight is larger than the
    centroid's. spread [B, Hq] is q' S q (S: shape of the residuals, trace 1), var the list's summed variance.
    """
    G = logit.shape[2]
    for g in range(G):
        f = alpha * spread[b, h * G + g]
        if softcap > F(0.0):
            for i in range(lo, hi):
                t = softcapped(logit[b, h, g, i], softcap)
                slope = F(1.0) - (t / softcap) * (t / softcap)
                logit[b, h, g, i] = t + f * var[b, h, i] * slope * slope
        else:
            for i in range(lo, hi):
                logit[b, h, g, i] += f * var[b, h, i]


@njit(fastmath=FAST)
def _settle_tail(weight, size, var, taken, b, h, lo, hi, tilt, total):
    """Turn the weights lo..hi into size * weight, 0 where taken; adds them to total [G], times var to tilt [G]."""
    G = weight.shape[2]
    for g in range(G):
        s = F(0.0)
        t = F(0.0)
        for i in range(lo, hi):
            w = F(0.0) if taken[b, h, i] else weight[b, h, g, i] * F(size[b, h, i])
            weight[b, h, g, i] = w
            s += w
            t += w * var[b, h, i]
        total[g] += s
        tilt[g] += t


@njit(fastmath=FAST)
def _add_tail(weight, b, h, lo, hi, values, value_lo, floor, acc, lanes):
    """Add the settled summary rows weight[.., lo:hi] with values value_lo.., 8 at a time, skipping negligible eights.

    A skipped row still counts in the sum of weights; its value is not worth a cache miss. Returns the values read.
    """
    heads, _, cv, width = lanes
    G = weight.shape[2]
    vb, vh, vt = element_strides(values)
    wb, wh, wg = element_strides(weight)
    read = 0
    i = lo
    while i < hi:
        n = min(8, hi - i)
        most = F(0.0)
        for g in range(G):
            s = F(0.0)
            for j in range(i, i + n):
                s += weight[b, h, g, j]
            most = max(most, s * floor[g])
        if most >= F(1.0):
            read += n
            add_rows(
                weight, b * wb + h * wh + i, wg, values, b * vb + h * vh + (value_lo + i - lo) * vt, vt, n, acc,
                heads, cv, width,
            )  # fmt: skip
        i += n
    return read


@njit(fastmath=FAST)
def _lse(top, total, first, last, b, i):
    """Log-sum-exp of the states first..last of one query head."""
    m = NEG
    for p in range(first, last):
        m = max(m, top[p, b, i])
    s = F(0.0)
    for p in range(first, last):
        s += total[p, b, i] * exp32(top[p, b, i] - m)
    return m + np.log(s) if s > F(0.0) else F(-np.inf)


@njit(fastmath=FAST, parallel=True, cache=True, nogil=True)
def attend_lists(
    query, keys, kb, kh, kt, values, vb, vh, vt, start, n_sink, sealed, length, list_begin, list_size, list_var,
    list_key, list_value, n_lists, super_first, super_size, super_var, super_key, super_value, n_supers, shape,
    cross, scale, softcap, alpha, beta, open_rows, budget, tail, parts, heads, ck, cv, width, s_logit, s_rank,
    s_taken, s_chosen, s_count, s_offset, c_id, c_size, c_var, c_logit, c_rank, c_taken, c_chosen, c_count, c_total,
    out, lse, lse_by_source, stats,
):  # fmt: skip
    """One new query position over a segmented store, all sources in one call: out [B, Hq, Dv], lse [B, Hq].

    Sources: sinks start[b]..+n_sink and hot rows sealed..length exactly; super-lists, opened best first up to
    open_rows rows; their lists, read best first up to `budget` rows; lists not read and super-lists not opened
    by summary row (tail=True) with log-weight log(size) + alpha * variance of the row logits, and a value tilted by
    beta * cross-covariance. Both budgets are shared by the KV heads of a batch row: a head whose sinks and hot
    rows hold the mass takes little. lse_by_source [3, B, Hq]: sinks and hot rows, lists, tail. stats [B, 8] = rows
    read from lists, lists read, lists scored, super-lists scored; cycles of sinks and hot rows, lists, tail; mean
    values read by the tail.
    s_* and c_* are workspace: super-lists [B, Hkv, S], lists under opened super-lists ("candidates") [B, Hkv, L].
    """
    B, Hq, D = query.shape
    H = list_key.shape[1]
    G = Hq // H
    Dv = out.shape[2]
    BH = B * H
    lb, lh, lt = element_strides(list_key)
    ub, uh, ut = element_strides(super_key)
    cb, ch, cg = element_strides(c_logit)
    sb, sh, sg = element_strides(s_logit)
    mb, mh, mt = element_strides(shape)
    xb, xh, xt = element_strides(cross)
    top = np.empty((3 * parts, B, Hq), F)
    total = np.empty((3 * parts, B, Hq), F)
    acc = np.empty((3 * parts, B, Hq, Dv), F)
    spread = np.empty((B, Hq), F)
    q_all = np.empty((B, H, G, D), F)
    spent = np.zeros((parts * BH, 4), np.int64)
    two_level = np.empty(B, np.bool_)
    any_two = False
    for b in range(B):
        two_level[b] = open_rows < H * (sealed - start[b] - n_sink)
        any_two |= two_level[b]
        for h in range(H):
            load_query(query, b, h, scale, q_all[b, h])
            product = np.zeros((G, D), F)
            add_rows(q_all, (b * H + h) * G * D, D, shape, b * mb + h * mh, mt, D, product, heads, ck, width)
            for g in range(G):
                x = F(0.0)
                for d in range(D):
                    x += product[g, d] * q_all[b, h, g, d]
                spread[b, h * G + g] = max(x, F(1e-12))

    # 1. hot rows and sinks exactly; super-lists (or, in a small store, all lists) by centroid
    for w in prange(parts * BH):
        began = cycles()
        lanes = (heads, ck, cv, width)
        part = w // BH
        b = (w % BH) // H
        h = w % H
        q = q_all[b, h]
        logits = np.empty((G, TILE), F)
        a = np.zeros((G, Dv), F)
        m = np.full(G, NEG, F)
        s = np.zeros(G, F)
        if part == 0:
            n = min(n_sink, length - start[b])
            scan_range(
                q, keys, values, b * kb + h * kh + start[b] * kt, b * vb + h * vh + start[b] * vt, kt, vt, n,
                softcap, logits, a, m, s, lanes,
            )  # fmt: skip
        first = max(sealed, start[b] + n_sink)
        n = max(0, length - first)
        lo = first + n * part // parts
        hi = first + n * (part + 1) // parts
        scan_range(
            q, keys, values, b * kb + h * kh + lo * kt, b * vb + h * vh + lo * vt, kt, vt, hi - lo, softcap, logits,
            a, m, s, lanes,
        )  # fmt: skip
        store_state(part, b, h, a, m, s, top, total, acc)
        mark = cycles()
        spent[w, 0] += mark - began
        if two_level[b]:
            n = n_supers[b, h]
            lo = n * part // parts
            hi = n * (part + 1) // parts
            score_rows(
                q, 0, super_key, b * ub + h * uh + lo * ut, ut, hi - lo, s_logit, b * sb + h * sh + lo, sg, heads,
                ck, width,
            )  # fmt: skip
            _correct(s_logit, super_var, spread, b, h, lo, hi, alpha, softcap)
        else:
            n = n_lists[b, h]
            lo = n * part // parts
            hi = n * (part + 1) // parts
            score_rows(
                q, 0, list_key, b * lb + h * lh + lo * lt, lt, hi - lo, c_logit, b * cb + h * ch + lo, cg, heads,
                ck, width,
            )  # fmt: skip
            for i in range(lo, hi):
                c_id[b, h, i] = i
                c_size[b, h, i] = list_size[b, h, i]
                c_var[b, h, i] = list_var[b, h, i]
            _correct(c_logit, c_var, spread, b, h, lo, hi, alpha, softcap)
        spent[w, 1] += cycles() - mark

    # 2. open super-lists
    began = cycles()
    peak = np.empty((B, Hq), F)
    hot_mass = np.empty((B, Hq), F)
    mass = np.empty((B, Hq), F)
    s_mass = np.zeros((B, Hq), F)
    for b in range(B):
        for i in range(Hq):
            m0 = NEG
            for p in range(parts):
                m0 = max(m0, top[p, b, i])
            x = F(0.0)
            for p in range(parts):
                x += total[p, b, i] * exp32(top[p, b, i] - m0)
            peak[b, i] = m0
            hot_mass[b, i] = x
    if any_two:
        for b in range(B):
            if not two_level[b]:
                continue
            ms = np.empty(G, F)
            for h in range(H):
                old = peak[b, h * G : h * G + G].copy()
                _rescale(s_logit, super_size, b, h, n_supers[b, h], peak, ms)
                for g in range(G):
                    hot_mass[b, h * G + g] *= exp32(old[g] - peak[b, h * G + g])
                    s_mass[b, h * G + g] = ms[g]
                    mass[b, h * G + g] = hot_mass[b, h * G + g] + ms[g]
                _rank(s_logit, super_var, spread, mass, b, h, n_supers[b, h], s_rank)
            _choose(s_rank, super_size, b, n_supers, open_rows, s_taken, s_chosen, s_count)
            for h in range(H):
                n = 0
                for k in range(s_count[b, h]):
                    i = s_chosen[b, h, k]
                    s_offset[b, h, k] = n
                    n += super_first[b, h, i + 1] - super_first[b, h, i]
                    for g in range(G):
                        s_mass[b, h * G + g] -= s_logit[b, h, g, i] * F(super_size[b, h, i])
                c_total[b, h] = n
        for w in prange(parts * BH):
            part = w // BH
            b = (w % BH) // H
            h = w % H
            if two_level[b]:
                q = q_all[b, h]
                for k in range(s_count[b, h] * part // parts, s_count[b, h] * (part + 1) // parts):
                    i = s_chosen[b, h, k]
                    o = np.int64(s_offset[b, h, k])
                    lo = np.int64(super_first[b, h, i])
                    n = super_first[b, h, i + 1] - lo
                    score_rows(
                        q, 0, list_key, b * lb + h * lh + lo * lt, lt, n, c_logit, b * cb + h * ch + o, cg, heads,
                        ck, width,
                    )  # fmt: skip
                    for j in range(n):
                        c_id[b, h, o + j] = lo + j
                        c_size[b, h, o + j] = list_size[b, h, lo + j]
                        c_var[b, h, o + j] = list_var[b, h, lo + j]
                    _correct(c_logit, c_var, spread, b, h, o, o + n, alpha, softcap)

    # 3. choose lists
    for b in range(B):
        ms = np.empty(G, F)
        for h in range(H):
            if not two_level[b]:
                c_total[b, h] = n_lists[b, h]
            old = peak[b, h * G : h * G + G].copy()
            _rescale(c_logit, c_size, b, h, c_total[b, h], peak, ms)
            for g in range(G):
                i = h * G + g
                shrink = exp32(old[g] - peak[b, i])
                hot_mass[b, i] *= shrink
                s_mass[b, i] = max(s_mass[b, i] * shrink, F(0.0))
                mass[b, i] = hot_mass[b, i] + s_mass[b, i] + ms[g]
                if two_level[b] and shrink < F(1.0):
                    for j in range(n_supers[b, h]):
                        s_logit[b, h, g, j] *= shrink
            _rank(c_logit, c_var, spread, mass, b, h, c_total[b, h], c_rank)
        stats[b, 0] = _choose(c_rank, c_size, b, c_total, budget, c_taken, c_chosen, c_count)
        stats[b, 1] = 0
        stats[b, 2] = 0
        stats[b, 3] = 0
        for h in range(H):
            stats[b, 1] += c_count[b, h]
            stats[b, 2] += c_total[b, h]
            if two_level[b]:
                stats[b, 3] += n_supers[b, h]
    chose = cycles() - began

    # 4. read the chosen lists; everything else answers by its summary row
    for w in prange(parts * BH):
        mark = cycles()
        lanes = (heads, ck, cv, width)
        part = w // BH
        b = (w % BH) // H
        h = w % H
        q = q_all[b, h]
        logits = np.empty((G, TILE), F)
        tile_row = np.empty(TILE, np.int64)
        tile_n = np.empty(TILE, np.int64)
        a = np.zeros((G, Dv), F)
        m = np.full(G, NEG, F)
        s = np.zeros(G, F)
        ranges = 0
        filled = np.int64(0)
        for k in range(c_count[b, h] * part // parts, c_count[b, h] * (part + 1) // parts):
            j = c_id[b, h, c_chosen[b, h, k]]
            row = np.int64(list_begin[b, h, j])
            left = np.int64(list_size[b, h, j])
            while left > 0:
                take = min(left, TILE - filled)
                score_rows(q, 0, keys, b * kb + h * kh + row * kt, kt, take, logits, filled, TILE, heads, ck, width)
                tile_row[ranges] = row
                tile_n[ranges] = take
                ranges += 1
                filled += take
                row += take
                left -= take
                if filled == TILE:
                    flush(
                        values, b * vb + h * vh, vt, tile_row, tile_n, ranges, filled, softcap, logits, a, m, s, lanes
                    )
                    ranges = 0
                    filled = 0
        flush(values, b * vb + h * vh, vt, tile_row, tile_n, ranges, filled, softcap, logits, a, m, s, lanes)
        store_state(parts + part, b, h, a, m, s, top, total, acc)
        unread = cycles()
        spent[w, 1] += unread - mark
        a[:] = F(0.0)
        s[:] = F(0.0)
        if tail:
            tilt = np.zeros(G, F)
            floor = np.empty(G, F)
            for g in range(G):
                floor[g] = TAIL_FLOOR * F(n_lists[b, h]) / mass[b, h * G + g]
            if two_level[b]:
                # candidates are contiguous only inside one opened super-list
                for k in range(s_count[b, h] * part // parts, s_count[b, h] * (part + 1) // parts):
                    i = s_chosen[b, h, k]
                    o = np.int64(s_offset[b, h, k])
                    first = np.int64(super_first[b, h, i])
                    n = super_first[b, h, i + 1] - first
                    _settle_tail(c_logit, c_size, c_var, c_taken, b, h, o, o + n, tilt, s)
                    spent[w, 3] += _add_tail(c_logit, b, h, o, o + n, list_value, first, floor, a, lanes)
                n = n_supers[b, h]
                lo = n * part // parts
                hi = n * (part + 1) // parts
                _settle_tail(s_logit, super_size, super_var, s_taken, b, h, lo, hi, tilt, s)
                spent[w, 3] += _add_tail(s_logit, b, h, lo, hi, super_value, lo, floor, a, lanes)
            else:
                n = n_lists[b, h]
                lo = n * part // parts
                hi = n * (part + 1) // parts
                _settle_tail(c_logit, c_size, c_var, c_taken, b, h, lo, hi, tilt, s)
                spent[w, 3] += _add_tail(c_logit, b, h, lo, hi, list_value, lo, floor, a, lanes)
            lean = np.empty((G, D), F)
            for g in range(G):
                for d in range(D):
                    lean[g, d] = beta * tilt[g] * q[g, d]
            add_rows(lean, 0, D, cross, b * xb + h * xh, xt, D, a, heads, cv, width)
        for g in range(G):
            m[g] = peak[b, h * G + g]
        store_state(2 * parts + part, b, h, a, m, s, top, total, acc)
        spent[w, 2] += cycles() - unread
    for source in range(3):
        for b in range(B):
            stats[b, 4 + source] = 0
            stats[b, 7] = 0
            for i in range(Hq):
                lse_by_source[source, b, i] = _lse(top, total, source * parts, (source + 1) * parts, b, i)
    merge_parts(top, total, acc, 3 * parts, out, lse)
    # Choosing runs on one thread while the others wait, so it counts on all of them.
    stats[0, 5] += chose * parts
    for w in range(parts * BH):
        for i in range(4):
            stats[(w % BH) // H, 4 + i] += spent[w, i]
