"""The lists of one segment as a snapshot keeps them: written, checked and read back."""

import numpy as np
import torch

from index_kernels import ListArrays, SuperListArrays, floats
from index_kernels.lists import row_places
from index_kernels.packed import code_rows
from index_kernels.summaries import LARGEST_HALF, SMALLEST_TRACE, Array

from ..store import KVStore, check_finite
from ._lists import Lists, most_lists
from .base import Arrays, expect, expect_no_more

_SUMMARY = ("variance", "key", "value")
_MOMENTS = ("shape", "cross", "trace")


def segment_state(lists: Lists, number: int, first: int, stop: int) -> Arrays:
    """The lists of segment ``number``, rows ``first .. stop``, ``[B, Hkv, n, ...]`` each, 0 where unused."""
    runs = [ends[:, :, number : number + 2] for ends in (lists.segments.lists, lists.segments.supers)]

    def used(array: Array, bounds: Array) -> Array:
        most = int((bounds[:, :, 1] - bounds[:, :, 0]).max())
        taken = np.zeros((*array.shape[:2], most, *array.shape[3:]), array.dtype)
        for at in np.ndindex(*bounds.shape[:2]):
            begin, end = bounds[at]
            taken[at][: end - begin] = array[at][begin:end]
        return taken

    # Where lists begin and how many rows a super-list has follow from these.
    return {
        "positions": lists.positions[:, :, first:stop],
        "codes": lists.codes[:, :, first:stop],
        "list_rows": used(lists.lists.size, runs[0]),
        **{f"list_{name}": used(getattr(lists.lists, name), runs[0]) for name in _SUMMARY},
        "super_lists": used(np.diff(lists.supers.first), runs[1]),
        **{f"super_{name}": used(getattr(lists.supers, name), runs[1]) for name in _SUMMARY},
        **{f"segment_{name}": getattr(lists.segments, name)[:, :, number] for name in _MOMENTS},
    }


def load_segment(lists: Lists, bounds: list[int], capacity: int, lo: Array, state: Arrays) -> bool:
    """Append the lists of the last segment of ``bounds``, as ``segment_state`` gave them; ``lo [B]`` see KeyIndex.

    Returns whether codes came along; snapshots of before they were kept have none.

    Raises:
        ValueError: arrays that cannot be its lists; names the array.
    """
    number, first, stop = len(bounds) - 2, bounds[-2], bounds[-1]
    batch, heads = grid = lists.lists.used.shape
    state = dict(state)
    positions = expect(state, "positions", np.int32, *grid, stop - first)
    coded = "codes" in state
    codes = expect(state, "codes", np.int8, *grid, stop - first, lists.codes.shape[3]) if coded else None
    if codes is not None:
        check_finite("codes", torch.from_numpy(codes))
    list_rows, super_lists = (expect(state, name, np.int32, *grid, None) for name in ("list_rows", "super_lists"))
    summaries = [_expect_summaries(state, "list", lists.lists, list_rows.shape[2])]
    summaries.append(_expect_summaries(state, "super", lists.supers, super_lists.shape[2]))
    moments = _expect_moments(state, lists)
    expect_no_more(state)
    listed = np.clip(stop - np.maximum(lo, first), 0, stop - first)
    most, most_supers = most_lists(stop - first, 1)
    counts = _check_counts("list_rows", list_rows, np.repeat(listed[:, None], heads, axis=1), most)
    supers = _check_counts("super_lists", super_lists, counts, most_supers)
    _check_positions(positions, first, stop, listed)
    lists.reserve(bounds, capacity)
    lists.positions[:, :, first:stop] = positions
    if codes is not None:
        lists.codes[:, :, first:stop] = codes
    for name, array in moments.items():
        getattr(lists.segments, name)[:, :, number] = array
    for b, h in np.ndindex(batch, heads):
        at, super_at = int(lists.segments.lists[b, h, number]), int(lists.segments.supers[b, h, number])
        own_rows = list_rows[b, h, : counts[b, h]]
        ends = np.cumsum(own_rows)
        lists.lists.size[b, h, at : at + len(ends)] = own_rows
        lists.lists.begin[b, h, at : at + len(ends)] = stop - listed[b] + ends - own_rows
        last = np.cumsum(super_lists[b, h, : supers[b, h]])
        lists.supers.first[b, h, super_at] = at
        lists.supers.first[b, h, super_at + 1 : super_at + len(last) + 1] = at + last
        lists.supers.size[b, h, super_at : super_at + len(last)] = np.diff(ends[last - 1], prepend=0)
        for name in _SUMMARY:
            getattr(lists.lists, name)[b, h, at : at + len(ends)] = summaries[0][name][b, h, : len(ends)]
            getattr(lists.supers, name)[b, h, super_at : super_at + len(last)] = summaries[1][name][b, h, : len(last)]
    lists.segments.lists[:, :, number + 1] = lists.segments.lists[:, :, number] + counts
    lists.segments.supers[:, :, number + 1] = lists.segments.supers[:, :, number] + supers
    lists.keep_segments(number + 1)
    return coded


def code_segment(lists: Lists, store: KVStore, first: int, stop: int) -> None:
    """Make the codes of the rows ``first .. stop``, a segment."""
    levels = lists.table.levels(torch.device("cpu")).lists
    for b, h in np.ndindex(lists.lists.used.shape):
        inside = (levels.begin[b, h] >= first) & (levels.begin[b, h] < stop) & (levels.size[b, h] > 0)
        begin, size = levels.begin[b, h, inside], levels.size[b, h, inside]
        mean = levels.key[b, h, inside].repeat_interleave(size, dim=0)
        place = row_places(begin, size)
        keys = floats(store.rows[0][b, h].cpu()[place])
        lists.codes[b, h, place.numpy()] = code_rows(keys - mean).numpy()


def _expect_summaries(state: Arrays, prefix: str, like: ListArrays | SuperListArrays, count: int) -> Arrays:
    """Take a level's summaries out of ``state``; ``count`` of them per KV head."""
    found = {}
    for name in _SUMMARY:
        array: Array = getattr(like, name)
        found[name] = expect(state, f"{prefix}_{name}", array.dtype, *array.shape[:2], count, *array.shape[3:])
    return found


def _expect_moments(state: Arrays, lists: Lists) -> Arrays:
    """Take a segment's moments out of ``state``; snapshots of before hold sums in float32, not yet over the trace."""
    grid, found = lists.lists.used.shape, {}
    found["trace"] = expect(state, "segment_trace", np.float32, *grid)
    over = np.maximum(found["trace"], SMALLEST_TRACE)[..., None, None]
    for name in ("shape", "cross"):
        kept, like = state.get(f"segment_{name}"), getattr(lists.segments, name)
        are_sums = kept is not None and kept.dtype == np.float32
        array = expect(state, f"segment_{name}", np.float32 if are_sums else like.dtype, *grid, *like.shape[3:])
        found[name] = (array / over).clip(-LARGEST_HALF, LARGEST_HALF) if are_sums else array
    return found


def _check_counts(name: str, counts: Array, total: Array, most: int) -> Array:
    """How many leading ``counts [B, Hkv, n]`` are not 0, ``[B, Hkv]``.

    Raises:
        ValueError: they do not make up ``total [B, Hkv]``, each at least 1, or are more than ``most``.
    """
    used = (counts > 0).sum(axis=2)
    leading = np.arange(counts.shape[2]) < used[..., None]
    fits = (counts >= 0) & ((counts > 0) == leading)
    if not fits.all() or used.max(initial=0) > most or (counts.sum(axis=2, dtype=np.int64) != total).any():
        raise ValueError(f"{name} are not 1 or more, at most {most} of them, that make up {int(total.max())}")
    return np.asarray(used)


def _check_positions(positions: Array, first: int, stop: int, listed: Array) -> None:
    """Sinks and padding stand where they stood; every other row stands somewhere in the segment, once."""
    rows = np.arange(first, stop, dtype=np.int32)
    for b, h in np.ndindex(*positions.shape[:2]):
        fixed = stop - first - int(listed[b])
        found = positions[b, h]
        if not np.array_equal(found[:fixed], rows[:fixed]) or not np.array_equal(np.sort(found[fixed:]), rows[fixed:]):
            raise ValueError(f"positions of head {b}, {h} are not the rows {first} to {stop}, each once")
