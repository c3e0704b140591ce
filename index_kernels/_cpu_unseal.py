"""The Numba kernel that puts sealed rows back in the order of their positions."""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

import numpy as np
from numba import njit

from ._cpu_common import inner, segment_part
from ._cpu_kmeans import copy_row
from ._cpu_parts import each


@inner
def _unseal_head(w, all_keys, all_values, all_positions, start, bounds):
    """Put the rows of one segment and KV head back in position order."""
    _, b, h, lo, n = segment_part(w, all_keys.shape[1], bounds, start)
    keys, values, positions = all_keys[b, h], all_values[b, h], all_positions[b, h]
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


@njit(cache=True, nogil=True)
def unseal(keys, values, positions, start, bounds):
    """Put the rows of each bounds[s]..bounds[s + 1] back in position order, in place."""
    each((bounds.size - 1) * keys.shape[0] * keys.shape[1], _unseal_head, (keys, values, positions, start, bounds))
