"""unread_deviation: how far the summaries of unread lists may be from the rows they stand for."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np
from numba import njit

from ._cpu_common import FAST, F, to_f32


@njit(fastmath=FAST)
def _squares(weight, size, var, b, h, g, count):
    """Sum of the weights (size * exp(logit), 0 where read) and of their squares times variance over size."""
    total = F(0.0)
    squares = F(0.0)
    for i in range(count):
        w = weight[b, h, g, i]
        total += w
        if size[b, h, i] > 0:
            squares += w * w * var[b, h, i] / F(size[b, h, i])
    return total, squares


@njit(fastmath=FAST, cache=True, nogil=True)
def unread_deviation(
    query, shape, scale, c_logit, c_size, c_var, c_total, s_logit, s_size, s_var, s_total, stats, lse_tail, lse, out
):
    """out [B, Hq]: standard deviation of the softmax weight of the unread rows, as a share of all weight.

    Reads what attend_lists has left in its workspace (tail=True). A list's rows scatter around its mean independently,
    so that its weight w deviates by w * sqrt(q' S q * variance / size).
    """
    B, Hq, D = query.shape
    H = shape.shape[1]
    G = Hq // H
    for b in range(B):
        for h in range(H):
            for g in range(G):
                i = h * G + g
                spread = F(0.0)
                for d in range(D):
                    x = F(0.0)
                    for e in range(D):
                        x += to_f32(shape[b, h, d, e]) * query[b, i, e]
                    spread += x * query[b, i, d]
                total, squares = _squares(c_logit, c_size, c_var, b, h, g, c_total[b, h])
                if stats[b, 3] > 0:
                    more, more_squares = _squares(s_logit, s_size, s_var, b, h, g, s_total[b, h])
                    total += more
                    squares += more_squares
                share = np.exp(lse_tail[b, i] - lse[b, i]) / total if total > F(0.0) else F(0.0)
                out[b, i] = share * scale * np.sqrt(max(spread, F(0.0)) * squares)
