"""Sealing where the rows lie, in torch: k-means as batched products, then what is known of the lists it made.

Serves devices, and is what _cpu_kmeans and _cpu_seal_lists mean. Clusters of one level are split together, those of
about one size in one batch. No sum depends on the order of threads: the same rows give the same lists.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kmeans import kmeans, nearest
from .packed import code_rows, floats, pack_rows
from .summaries import Array, Clustering, LearntMetric, ListArrays, SegmentArrays, SuperListArrays

# Up to so many super-lists are split off flat; more, by way of groups of 32.
FLAT_SUPERS, SUPERS_PER_GROUP = 128, 32
# Rows of short segments of a KV head that are sealed together: as many as the longest segment has.
ROWS_TOGETHER = 1 << 17
# Moments are summed over the rows of every so many lists: one matrix per head needs no more.
LISTS_PER_MOMENT = 8


class Runs(NamedTuple):
    """Runs of ``size [R]`` rows, one after the other; ``parent [R]``: the run of the level above that each is of."""

    size: Array
    parent: Array


def seal(
    keys: Tensor, values: Tensor, positions: Array, codes: Array, bounds: list[int], first_segment: int,
    how: Clustering, learnt: LearntMetric, lists: ListArrays, supers: SuperListArrays, segments: SegmentArrays, *,
    start: Tensor, coded: bool,
) -> None:  # fmt: skip
    """See seal.seal_rows; segments of one batch row, together where they are short. Of moments: their sums."""
    for s, stop in _together(bounds):
        for b, begin in enumerate(start.tolist()):
            learnt_here = zip(learnt.metric[s:stop, b], learnt.holds[s:stop, b], strict=True)
            metrics = [torch.from_numpy(metric).to(keys.device) if holds else None for metric, holds in learnt_here]
            arrays: Any = [type(part)._make(array[b] for array in part) for part in (lists, supers, segments)]
            _seal_row(
                keys[b], values[b], positions[b], codes[b] if coded else None,
                np.clip(bounds[s : stop + 1], begin, None), first_segment, s, how, metrics, *arrays,
            )  # fmt: skip
            ends = (end[:, first_segment + stop] for end in arrays[2][:2])
            lists.used[b], supers.used[b] = ends
            np.put_along_axis(supers.first[b], supers.used[b][:, None], lists.used[b][:, None], axis=1)


def _together(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """Which segments are sealed together: from the first number to before the second."""
    s = 0
    while s < len(bounds) - 1:
        stop = s + 1
        while stop < len(bounds) - 1 and bounds[stop + 1] - bounds[s] <= ROWS_TOGETHER:
            stop += 1
        yield s, stop
        s = stop


def unseal(keys: Tensor, values: Tensor, positions: Array, first: int, stop: int) -> None:
    """Put the rows ``first .. stop``, which are whole segments, back in the order of their positions."""
    order = torch.from_numpy(positions[:, :, first:stop]).to(keys.device).argsort(dim=-1)
    for buffer in (keys, values):
        rows = buffer[:, :, first:stop]
        rows.copy_(torch.take_along_dim(rows, order[..., None], dim=2))
    positions[:, :, first:stop] = np.arange(first, stop, dtype=positions.dtype)


def _seal_row(
    keys: Tensor, values: Tensor, positions: Array, codes: Array | None, bounds: Array, first_segment: int, s: int,
    how: Clustering, metrics: list[Tensor | None], lists: ListArrays, supers: SuperListArrays, segments: SegmentArrays,
) -> None:  # fmt: skip
    """Make the segments from ``first_segment + s`` on, which end at ``bounds``, of one batch row.

    Buffers and arrays are ``[Hkv, ...]`` each; sums of moments begin with those of ``first_segment``.
    """
    heads, lo, stop, count = len(keys), int(bounds[0]), int(bounds[-1]), len(metrics)
    n = stop - lo
    segment = first_segment + s
    ends = slice(segment + 1, segment + count + 1)
    if n <= 0:
        segments.lists[:, ends], segments.supers[:, ends] = (end[:, segment, None] for end in segments[:2])
        segments.trace[:, segment : segment + count] = 0.0
        return
    came = [rows[:, lo:stop].contiguous() for rows in (keys, values)]
    parts = [slice(first - lo, last - lo) for first, last in pairwise(bounds.tolist())]
    z = floats(came[0]).clone()
    for part, metric in zip(parts, metrics, strict=True):
        # Softmax ignores a shift of all keys; around the mean fewer bits are lost.
        z[:, part] -= z[:, part].mean(dim=1, keepdim=True)
        if metric is not None:
            z[:, part] = z[:, part] @ metric
    order, by_super, by_list = cluster(z.flatten(0, 1), np.tile(np.diff(bounds), heads), how)
    local = order.view(heads, n) % n
    for buffer, rows in zip((keys, values), came, strict=True):
        buffer[:, lo:stop] = torch.take_along_dim(rows, local[..., None], dim=1)
    positions[:, lo:stop] = np.take_along_axis(positions[:, lo:stop], local.cpu().numpy(), axis=1)
    x, y, z = (floats(rows).flatten(0, 1)[order] for rows in (*came, z))

    found = _summarised(x, y, z, by_list.size)
    if codes is not None:
        made = code_rows(x - floats(found.packed[0])[found.owner]).view(heads, n, -1)
        for to, of_head in zip(codes, made, strict=True):
            torch.from_numpy(to[lo:stop]).copy_(of_head)
    # Lists and super-lists of each segment of each head, head by head; all are in this order.
    unit, units = by_super.parent[by_list.parent], np.arange(heads * count + 1)
    first, first_super = (np.searchsorted(of, units) for of in (unit, by_super.parent))
    counted = (np.arange(len(unit)) - first[unit]) % LISTS_PER_MOMENT == 0
    keep = torch.from_numpy(counted).to(z.device)[found.owner, None]
    residual = ((x - found.key[found.owner]) * keep).view(heads, n, -1)
    for sums, rows, mean in ((segments.shape, x, found.key), (segments.cross, y, found.value)):
        other = (rows - mean[found.owner]).view(heads, n, -1)
        moments = torch.stack([residual[:, part].mT @ other[:, part] for part in parts], dim=1)
        sums[:, s : s + count] = moments.cpu().numpy()
    squares = np.bincount(unit, found.variance * by_list.size * counted, minlength=heads * count)
    segments.trace[:, segment : segment + count] = squares.reshape(heads, count)
    for end, before in ((segments.lists, first), (segments.supers, first_super)):
        of_units = before[1:].reshape(heads, count) - before[:-1:count, None]
        end[:, ends] = end[:, segment, None] + of_units

    under = np.bincount(by_list.parent, by_list.size, minlength=len(by_super.size)).astype(np.int64)
    above = _summarised(x, y, z, under)
    begin = lo + (np.cumsum(by_list.size) - by_list.size) % n
    lists_of = np.searchsorted(by_list.parent, np.arange(len(under)))
    for h in range(heads):
        at, to = int(segments.lists[h, segment]), int(segments.supers[h, segment])
        mine, own = (slice(of[h * count], of[(h + 1) * count]) for of in (first, first_super))
        where, where_super = slice(at, at + mine.stop - mine.start), slice(to, to + own.stop - own.start)
        lists.begin[h, where] = begin[mine]
        supers.first[h, where_super] = at + lists_of[own] - mine.start
        for arrays, level, place, part in ((lists, found, where, mine), (supers, above, where_super, own)):
            arrays.size[h, place], arrays.variance[h, place] = level.size[part], level.variance[part]
            arrays.key[h, place], arrays.value[h, place] = level.arrays[0][part], level.arrays[1][part]


class Level(NamedTuple):
    """Summaries of runs of rows: their sizes, mean squared distances and packed means; means and owners of rows."""

    size: Array
    variance: Array
    arrays: list[Array]
    packed: list[Tensor]
    key: Tensor
    value: Tensor
    owner: Tensor


def _summarised(x: Tensor, y: Tensor, z: Tensor, size: Array) -> Level:
    """What is known of the runs of ``size`` rows of keys ``x``, values ``y`` and keys in the metric ``z``."""
    sizes = torch.from_numpy(size).to(x.device)
    owner = torch.arange(len(size), device=x.device).repeat_interleave(sizes, output_size=len(x))

    def mean(rows: Tensor) -> Tensor:
        found: Tensor = torch.segment_reduce(rows, "mean", lengths=sizes, axis=0, unsafe=True)
        return found

    key, value = mean(x), mean(y)
    scatter = (z - mean(z)[owner]).square_().sum(dim=1, keepdim=True)
    packed = [pack_rows(key), pack_rows(value)]
    arrays = [rows.cpu().numpy() for rows in packed]
    return Level(size, mean(scatter)[:, 0].cpu().numpy(), arrays, packed, key, value, owner)


def cluster(x: Tensor, size: Array, how: Clustering) -> tuple[Tensor, Runs, Runs]:
    """k-means of runs of ``size [U]`` rows of x ``[R, D]`` by levels: groups of 32 super-lists, super-lists, lists.

    The levels above the lists are trained on a sample. Returns the order of the rows ``[R]``, run by run, that makes
    lists contiguous, ascending inside a list; the super-lists, whose parents are these runs; and the lists.
    """
    wanted = size / how.rows_per_super_list
    groups = np.where(wanted <= FLAT_SUPERS, 1, np.round(wanted / SUPERS_PER_GROUP)).astype(np.int64)
    order, iterations, stride = torch.arange(len(x), device=x.device), how.iterations, how.training_stride

    def parts(runs: Runs, least: int) -> Array:
        found: Array = np.maximum(1, (runs.size + least // 2) // least)
        return found

    order, by_group = _split(x, order, Runs(size, np.arange(len(size))), groups, iterations, stride)
    order, by_super = _split(x, order, by_group, parts(by_group, how.rows_per_super_list), iterations, stride)
    order, by_list = _split(x, order, by_super, parts(by_super, how.rows_per_list), iterations, 1)
    return order, Runs(by_super.size, by_group.parent[by_super.parent]), by_list


def _split(rows: Tensor, order: Tensor, runs: Runs, parts: Array, iterations: int, stride: int) -> tuple[Tensor, Runs]:
    """Split each run of ``order`` into at most ``parts`` clusters (k-means on every stride-th row of it)."""
    device, size = rows.device, runs.size
    begin, base = np.cumsum(size) - size, np.cumsum(parts) - parts
    owner = torch.from_numpy(base).to(device).repeat_interleave(
        torch.from_numpy(size).to(device), output_size=len(order)
    )  # fmt: skip
    kinds = np.where(parts > 1, np.frexp(size)[1], 0)
    for kind in np.unique(kinds[kinds > 0]):
        those = np.flatnonzero(kinds == kind)
        first, length, count, number = (
            torch.from_numpy(of[those]).to(device)[:, None] for of in (begin, size, parts, base)
        )
        # Shorter runs are filled up with their last row, which does not count, and goes where it went.
        place = first + torch.arange(int(size[those].max()), device=device).minimum(length - 1)
        x, most = rows[order[place]], int(parts[those].max())
        means = kmeans(x, length, count, most, iterations, stride)
        owner[place] = number + nearest(x, means, torch.arange(most, device=device) >= count)
    order = order[owner.argsort(stable=True)]
    sizes = torch.bincount(owner, minlength=int(parts.sum())).cpu().numpy()
    held = sizes > 0
    return order, Runs(sizes[held], np.repeat(np.arange(len(parts)), parts)[held])
