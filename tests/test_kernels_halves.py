"""Products of bfloat16 on CPUs, by the processor's instruction and without."""

import numpy as np
import pytest
import torch
from numba import config, njit

from index_kernels import _cpu_halves, pack_rows
from index_kernels._cpu_columns import COLUMNS
from index_kernels._cpu_common import flat_rows
from index_kernels._cpu_tiles import tile_lanes
from index_kernels._cpu_vectors import compiled_for

F, ROWS, TILE = np.float32, 21, 64


def halved(x):
    return torch.as_tensor(x).bfloat16().float().numpy()


def compiled():
    """Both products of a tile that is filled in two goes, compiled anew."""
    pair_columns, take_keys, take_values = _cpu_halves.pair_columns, _cpu_halves.take_keys, _cpu_halves.take_values
    score_pairs, add_pairs = _cpu_halves.score_pairs, _cpu_halves.add_pairs

    @njit
    def multiply(q, keys, values, weights, scores, sums, ck, cv, width):
        D, columns = q.shape
        qs, tile = np.empty(D // 2 * columns, np.int32), np.full(TILE * D, 0x7FC07FC0, np.int32)
        pair_columns(q.ravel(), columns, D, qs)
        memory, _, _, step = keys
        take_keys(memory, 0, step, 8, tile, 0, ck, width)
        take_keys(memory, 8 * step, step, ROWS - 8, tile, 8, ck, width)
        score_pairs(qs, columns, tile, ROWS, scores.ravel(), ck, width)
        pairs, tile = np.empty(TILE * columns, np.int32), np.full(TILE * sums.shape[1], 0x7FC07FC0, np.int32)
        pair_columns(weights.ravel(), columns, ROWS, pairs)
        memory, _, _, step = values
        take_values(memory, 0, step, 7, tile, 0, cv, width)
        take_values(memory, 7 * step, step, ROWS - 7, tile, 7, cv, width)
        add_pairs(pairs, columns, tile, ROWS, sums.ravel(), cv, width)

    return multiply


@pytest.mark.parametrize("faster", [_cpu_halves.FASTER, False])
@pytest.mark.parametrize(
    ("dim", "value_dim", "dtype"),
    [(32, 80, torch.float32), (24, 8, torch.float32), (16, 16, torch.bfloat16), (16, 32, torch.int8)],
)
def test_products_are_those_of_numbers_rounded_to_bfloat16(monkeypatch, faster, dim, value_dim, dtype):
    monkeypatch.setattr(_cpu_halves, "FASTER", faster)
    keys, values = torch.randn(1, 1, ROWS, dim), torch.randn(1, 1, ROWS, value_dim)
    q, weights = torch.randn(dim, COLUMNS).numpy(), torch.rand(ROWS, COLUMNS).numpy()
    kept = [pack_rows(rows) if dtype == torch.int8 else rows.to(dtype) for rows in (keys, values)]
    scores, sums = np.zeros((ROWS, COLUMNS), F), np.ones((COLUMNS, value_dim), F)
    compiled()(q, *map(flat_rows, kept), weights, scores, sums, *tile_lanes(dim, value_dim))
    # int8 numbers are rounded once more, with their scale.
    tolerance = 0.02 if dtype == torch.int8 else 1e-5
    np.testing.assert_allclose(scores, halved(keys[0, 0]) @ halved(q), atol=8 * tolerance, rtol=tolerance)
    np.testing.assert_allclose(sums - 1, halved(weights).T @ halved(values[0, 0]), atol=8 * tolerance, rtol=tolerance)


def test_code_that_other_processors_are_to_run_too_has_no_instruction_of_this_one(monkeypatch):
    monkeypatch.setattr(config, "CPU_FEATURES", "")  # as NUMBA_CPU_NAME=generic has it
    assert not compiled_for("avx512bf16")
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx2,-avx512f")
    assert compiled_for("avx2")
    assert not compiled_for("avx512f")
