"""rotated: rows times Hadamard's matrix; bit for bit what packed.rotated, its specification, makes."""

# mypy: ignore-errors
# (Numba compiles the kernel and infers its types itself.)

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ._cpu_code_vectors import EIGHT, add_pairs
from ._cpu_common import FAST, F, inner


def rotated(rows: Tensor) -> Tensor:
    """See packed.rotated."""
    given = rows.detach().float().contiguous().numpy()
    turned = np.empty_like(given)
    _rotated(given.reshape(-1, given.shape[-1]), turned.reshape(-1, given.shape[-1]))
    return torch.from_numpy(turned)


@inner
def rotate_row(row, out, one, two):
    """out = row [D] times Hadamard's matrix; they may be the same. one, two [D] are scratch."""
    D = row.size
    block = D & -D
    half = block // 2
    unit = F(1.0) / np.sqrt(F(block))
    for base in range(0, D, block):
        for d in range(block):
            one[d] = row[base + d]
        x, y = one, two
        stage = 1
        # Neighbours are paired and the results go half a block apart: vectors at every stage, in order at the end.
        while stage < block:
            for d in range(half):
                low, high = x[2 * d], x[2 * d + 1]
                y[d] = low + high
                y[half + d] = low - high
            x, y = y, x
            stage *= 2
        for d in range(block):
            out[base + d] = x[d] * unit


@inner
def rotate_eight(one, two, D):
    """Rows in the columns of one [D, EIGHT] times Hadamard's matrix, as rotate_row turns them; two is scratch."""
    block = D & -D
    unit = F(1.0) / np.sqrt(F(block))
    for base in range(0, D, block):
        x, y = one, two
        stage = 1
        while stage < block:
            add_pairs(x, base * EIGHT, y, base * EIGHT, block // 2)
            x, y = y, x
            stage *= 2
        for d in range(base, base + block):
            for j in range(EIGHT):
                one[d, j] = x[d, j] * unit


@njit(fastmath=FAST, cache=True, nogil=True)
def _rotated(rows, turned):
    D = rows.shape[1]
    one, two = np.empty(D, F), np.empty(D, F)
    for i in range(rows.shape[0]):
        rotate_row(rows[i], turned[i], one, two)
