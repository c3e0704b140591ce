"""seal_rows: turn rows into lists in place, and back. Runs on the CPU, over a copy of rows that lie elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fork import check_fork
from .packed import floats
from .summaries import Array, Clustering, LearntMetric, ListArrays, SegmentArrays, SuperListArrays


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
) -> None:
    """Make segment ``first_segment + s`` of rows ``bounds[s] .. bounds[s + 1]``, for every batch row and KV head.

    Two-level k-means of the keys, in the metric learnt; each list's rows become contiguous. Changes keys, values
    ``[B, Hkv, T, D]`` (any stored type), positions ``[B, Hkv, T]`` int32 and codes ``[B, Hkv, T, code_bytes(D)]`` int8
    in place, and appends to the lists, segment by segment, so that dropping the newest segments is lowering a count.

    Args:
        keys, values: the store's buffers; the rows in position order, packed ones with their scales.
        start: int64 ``[B]``, the first row of each batch row that may stand in a list.
        coded: whether codes are written; who reads the lists for a prompt alone does without.
    """
    check_fork()
    kernels = import_module("index_kernels._cpu_seal")
    in_metric = _in_metric(keys, bounds, learnt, start)
    with _on_host(keys, values, bounds[0], bounds[-1]) as (host_keys, host_values):
        kernels.seal(
            host_keys, host_values, positions, codes, start.cpu().numpy(), np.asarray(bounds, np.int64), first_segment,
            *how, in_metric, coded, *lists, *supers, *segments,
        )  # fmt: skip


def unseal_rows(keys: Tensor, values: Tensor, positions: Array, bounds: list[int], *, start: Tensor) -> None:
    """Put the rows of each ``bounds[s] .. bounds[s + 1]`` back in the order of their positions, in place."""
    check_fork()
    kernels = import_module("index_kernels._cpu_unseal")
    with _on_host(keys, values, bounds[0], bounds[-1]) as (host_keys, host_values):
        kernels.unseal(host_keys, host_values, positions, start.cpu().numpy(), np.asarray(bounds, np.int64))


def _in_metric(keys: Tensor, bounds: list[int], learnt: LearntMetric, start: Tensor) -> Array:
    """Rows ``bounds[0] .. bounds[-1]`` of the keys around their segment's mean, in its metric: ``[B, Hkv, n, D]``.

    Softmax ignores a shift of all keys; around the mean fewer bits are lost.
    """
    found = []
    for first, stop, metric, holds in zip(bounds, bounds[1:], *learnt, strict=False):
        rows = floats(keys[:, :, first:stop]).float()
        counted = (torch.arange(first, stop, device=keys.device) >= start[:, None]).float()[:, None, :, None]
        rows = rows - (rows * counted).sum(dim=2, keepdim=True) / counted.sum(dim=2, keepdim=True).clamp(min=1)
        if holds.any():
            known = torch.from_numpy(holds).to(keys.device)[:, None, None, None]
            rows = torch.where(known, rows @ torch.from_numpy(metric).to(keys.device), rows)
        found.append(rows)
    in_metric: Array = torch.cat(found, dim=2).cpu().numpy()
    return in_metric


@contextmanager
def _on_host(keys: Tensor, values: Tensor, first: int, stop: int) -> Iterator[tuple[Any, Any]]:
    """Both as numpy arrays, whose rows ``first .. stop`` may be changed inside the block."""
    bits = import_module("index_kernels._cpu_common").numpy_bits
    if keys.device.type == "cpu":
        yield bits(keys), bits(values)
        return
    host = [torch.empty(buffer.shape, dtype=buffer.dtype) for buffer in (keys, values)]
    for copy, buffer in zip(host, (keys, values), strict=True):
        copy[:, :, first:stop] = buffer[:, :, first:stop].cpu()
    yield bits(host[0]), bits(host[1])
    for copy, buffer in zip(host, (keys, values), strict=True):
        buffer[:, :, first:stop] = copy[:, :, first:stop].to(buffer.device)
