"""The Numba kernel that puts sealed rows back in the order of their positions."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np
from numba import njit, prange

from ._cpu_common import PRANGE
from ._cpu_kmeans import copy_row


@njit
def _unseal_head(keys, values, positions, lo, n):
    """Put rows lo..lo + n of one KV head back in position order."""
    key_rows = np.empty((n, keys.shape[1]), keys.dtype)
    value_rows = np.empty((n, values.shape[1]), values.dtype)
    at = np.empty(n, np.int64)
    for i in range(n):
        copy_row(keys[lo + i], key_rows[i])
        copy_row(values[lo + i], value_rows[i])
        at[i] = positions[lo + i]
    for i in range(n):
        copy_row(key_rows[i], keys[at[i]])
        copy_row(value_rows[i], values[at[i]])
        positions[at[i]] = at[i]


@njit(parallel=PRANGE, cache=True, nogil=True)
def unseal(keys, values, positions, start, bounds):
    """Put the rows of each bounds[s]..bounds[s + 1] back in position order, in place."""
    B, H = keys.shape[:2]
    for w in prange((bounds.size - 1) * B * H):
        s = w // (B * H)
        b = (w % (B * H)) // H
        h = w % H
        lo = max(bounds[s], start[b])
        _unseal_head(keys[b, h], values[b, h], positions[b, h], lo, max(0, bounds[s + 1] - lo))
