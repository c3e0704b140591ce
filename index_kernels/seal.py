"""seal_rows: turn rows into lists in place, and back, where they lie."""

from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from . import _torch_seal
from .ops import resolve_backend
from .packed import floats, row_dim
from .summaries import (
    LARGEST_HALF,
    SMALLEST_TRACE,
    Array,
    Clustering,
    LearntMetric,
    ListArrays,
    SegmentArrays,
    SuperListArrays,
)

# Rows whose mean keys are shifted by.
NEWEST = 8


def seal_rows(
    keys: Tensor,
    values: Tensor,
    positions: Array,
    codes: Array,
    bounds: list[int],
    first_segment: int,
    how: Clustering,
    learnt: LearntMetric,
    lists: ListArrays,
    supers: SuperListArrays,
    segments: SegmentArrays,
    *,
    start: Tensor,
    coded: bool = True,
    backend: str = "auto",
) -> None:
    """Make segment ``first_segment + s`` of rows ``bounds[s] .. bounds[s + 1]``, for every batch row and KV head.

    Two-level k-means of the keys, in the metric learnt; each list's rows become contiguous. Changes keys, values
    ``[B, Hkv, T, D]`` (any stored type), positions ``[B, Hkv, T]`` int32 and codes ``[B, Hkv, T, code_bytes(D)]`` int8
    in place, and appends to the lists, segment by segment, so that dropping the newest segments is lowering a count.

    Args:
        keys, values: the store's buffers; the rows in position order, packed ones with their scales.
        start: int64 ``[B]``, the first row of each batch row that may stand in a list.
        coded: whether codes are written; who reads the lists for a prompt alone does without.
        backend: "auto", "reference" or "numba"; devices are served by the reference.
    """
    count, moments = len(bounds) - 1, (segments.shape, segments.cross)
    shape, cross = (np.zeros((*each.shape[:2], count, *each.shape[3:]), np.float32) for each in moments)
    sums = segments._replace(shape=shape, cross=cross)
    _seal(
        keys, values, positions, codes, bounds, first_segment, how, learnt, lists, supers, sums, start, coded, backend
    )
    made = slice(first_segment, first_segment + count)
    trace = torch.from_numpy(np.maximum(segments.trace[:, :, made], SMALLEST_TRACE))[..., None, None]
    for to, of in zip(moments, (shape, cross), strict=True):
        # Of rows that are alike, rounding may leave sums that are many times the trace. By torch: it turns numbers into
        # half ones many times as fast as NumPy.
        torch.from_numpy(to)[:, :, made] = torch.from_numpy(of).div_(trace).clamp_(-LARGEST_HALF, LARGEST_HALF)


def _seal(
    keys: Tensor, values: Tensor, positions: Array, codes: Array, bounds: list[int], first_segment: int,
    how: Clustering, learnt: LearntMetric, lists: ListArrays, supers: SuperListArrays, sums: SegmentArrays,
    start: Tensor, coded: bool, backend: str,
) -> None:  # fmt: skip
    """See seal_rows; ``sums`` hold sums of moments of the segments made, float32, the first one's first."""
    if resolve_backend(keys, backend) != "numba":
        _torch_seal.seal(
            keys, values, positions, codes, bounds, first_segment, how, learnt, lists, supers, sums, start=start,
            coded=coded,
        )  # fmt: skip
        return
    kernels, threads = import_module("index_kernels._cpu_seal"), import_module("index_kernels._cpu_start")
    # In float32 they are read where they are kept; a slice would be of another type to Numba.
    kept = keys.dtype == values.dtype == torch.float32
    as_floats = [rows if kept else floats(rows[:, :, bounds[0] : bounds[-1]]) for rows in (keys, values)]
    rows = kernels.Rows(
        _words(keys), _words(values), *(rows.contiguous().numpy() for rows in as_floats), 0 if kept else bounds[0],
        _in_metric(keys, bounds, learnt),
    )  # fmt: skip
    kernels.seal(
        rows, positions, codes, start.numpy(), np.asarray(bounds, np.int64), first_segment, how, coded,
        threads.use_torchs_threads(), lists, supers, sums,
    )  # fmt: skip


def unseal_rows(
    keys: Tensor, values: Tensor, positions: Array, bounds: list[int], *, start: Tensor, backend: str = "auto"
) -> None:
    """Put the rows of each ``bounds[s] .. bounds[s + 1]`` back in the order of their positions, in place."""
    if resolve_backend(keys, backend) != "numba":
        _torch_seal.unseal(keys, values, positions, bounds[0], bounds[-1])
        return
    kernels = import_module("index_kernels._cpu_unseal")
    kernels.unseal(_words(keys), _words(values), positions, start.numpy(), np.asarray(bounds, np.int64))


def _words(rows: Tensor) -> Array:
    """The rows where they are, in words of four bytes: kernels that only move them are compiled once for all types.

    In bytes, which takes longer, where a row is no whole number of words.
    """
    whole = rows.shape[3] * rows.element_size() % 4 == 0 == rows.storage_offset() * rows.element_size() % 4
    return rows.view(torch.int32 if whole else torch.uint8).numpy()


def _in_metric(keys: Tensor, bounds: list[int], learnt: LearntMetric) -> Array:
    """Rows ``bounds[0] .. bounds[-1]`` of the keys in their segment's metric, shifted near 0: ``[B, Hkv, n, D]``.

    Clusters do not change by a shift of all keys, but near 0 fewer bits are lost. The mean of all rows is no better
    than that of the newest, which takes less time and is seldom of padding.
    """
    found = torch.empty(*keys.shape[:2], bounds[-1] - bounds[0], row_dim(keys))
    for first, stop, metric, holds in zip(bounds, bounds[1:], *learnt, strict=False):
        rows, part = floats(keys[:, :, first:stop]).float(), found[:, :, first - bounds[0] : stop - bounds[0]]
        shifted = rows - rows[:, :, -NEWEST:].mean(dim=2, keepdim=True)
        if holds.all():
            torch.matmul(shifted, torch.from_numpy(metric), out=part)
            continue
        part.copy_(shifted)
        if holds.any():
            known = torch.from_numpy(holds)
            part[known] = shifted[known] @ torch.from_numpy(metric)[known]
    in_metric: Array = found.numpy()
    return in_metric
