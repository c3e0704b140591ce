"""Lists: the arrays behind SegmentedIndex, one row of summaries per list and super-list."""

import copy
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from index_kernels import Summaries
from index_kernels.packed import SCALE_BYTES, floats

from .base import Arrays, expect, expect_no_more

ROWS_PER_LIST = 16
ROWS_PER_SUPER_LIST = 256
# Size, first row and variance of a list.
NUMBERS_BYTES = 12

_SUMMARY = ("variance", "key", "value")
_MOMENTS = ("shape", "cross", "trace")
Workspace = tuple[tuple[np.ndarray[Any, Any], ...], np.ndarray[Any, Any]]
# One workspace serves all layers of a model, so that it stays in the cache; each thread has its own.
_scratch = threading.local()


def _new_workspace(batch: int, kv_heads: int, group: int, supers: int, lists: int) -> Workspace:
    real, small, large, flag = np.float32, np.int32, np.int64, np.bool_
    shapes: list[tuple[Any, ...]] = [
        (real, group, supers), (real, supers), (flag, supers), (small, supers), (large,), (small, supers),
        (small, lists), (small, lists), (real, lists), (real, group, lists), (real, lists), (flag, lists),
        (small, lists), (large,), (large,),
    ]  # fmt: skip
    scratch = tuple(np.zeros((batch, kv_heads, *shape), dtype) for dtype, *shape in shapes)
    return scratch, np.zeros((batch, 8), np.int64)


def vector_bytes(dim: int) -> int:
    """Bytes of a summary's mean key or mean value: a packed row."""
    return dim + SCALE_BYTES


class Lists:
    """The arrays of all lists, super-lists and segments, ``[B, Hkv, capacity, ...]``; their vectors are packed rows."""

    def __init__(self, batch: int, heads: int, dim: int, value_dim: int) -> None:
        self.count = np.zeros((batch, heads), np.int64)
        self.super_count = np.zeros((batch, heads), np.int64)
        self.shape = np.zeros((batch, heads, dim, dim), np.uint16)
        self.cross = np.zeros((batch, heads, dim, value_dim), np.uint16)
        self.summary_bytes = vector_bytes(dim) + vector_bytes(value_dim) + NUMBERS_BYTES
        small, packed, real = np.int32, np.int8, np.float32
        # name: (dtype, what its third axis counts, spare places, trailing axes)
        self._layout: dict[str, tuple[Any, str, int, tuple[int, ...]]] = {
            "positions": (small, "rows", 0, ()),
            "begin": (small, "lists", 0, ()),
            "size": (small, "lists", 0, ()),
            "variance": (real, "lists", 0, ()),
            "key": (packed, "lists", 0, (vector_bytes(dim),)),
            "value": (packed, "lists", 0, (vector_bytes(value_dim),)),
            "super_first": (small, "supers", 1, ()),
            "super_size": (small, "supers", 0, ()),
            "super_variance": (real, "supers", 0, ()),
            "super_key": (packed, "supers", 0, (vector_bytes(dim),)),
            "super_value": (packed, "supers", 0, (vector_bytes(value_dim),)),
            "segment_lists": (np.int64, "segments", 1, ()),
            "segment_supers": (np.int64, "segments", 1, ()),
            "segment_shape": (real, "segments", 0, (dim, dim)),
            "segment_cross": (real, "segments", 0, (dim, value_dim)),
            "segment_trace": (real, "segments", 0, ()),
        }
        self._capacity = dict.fromkeys(("rows", "lists", "supers", "segments"), 0)
        for name, (dtype, _, spare, trailing) in self._layout.items():
            setattr(self, name, np.zeros((batch, heads, spare, *trailing), dtype))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def reserve(self, bounds: list[int], rows: int) -> None:
        """Make room for segments at these bounds in a store with room for ``rows`` rows."""
        segments = len(bounds) - 1
        lists, supers = _most(bounds[-1], segments)
        needed = {"rows": rows, "lists": lists, "supers": supers, "segments": segments}
        for axis, count in needed.items():
            if count > self._capacity[axis]:
                self._grow(axis, rows if axis == "rows" else count + count // 4 + 8)

    def _grow(self, axis: str, capacity: int) -> None:
        before = self._capacity[axis]
        self._capacity[axis] = capacity
        for name, (dtype, counts, spare, trailing) in self._layout.items():
            if counts == axis:
                old = getattr(self, name)
                new = np.zeros((*old.shape[:2], capacity + spare, *trailing), dtype)
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)
        if axis == "rows":
            self.positions[:, :, before:] = np.arange(before, capacity, dtype=np.int32)

    def sum_shapes(self, segments: int) -> None:
        """Residual covariance (trace 1) and key-value cross-covariance of each head, from its segments' sums."""
        trace = np.maximum(self.segment_trace[:, :, :segments].sum(axis=2), 1e-20)[..., None, None]
        self.shape = (self.segment_shape[:, :, :segments].sum(axis=2) / trace).astype(np.float16).view(np.uint16)
        self.cross = (self.segment_cross[:, :, :segments].sum(axis=2) / trace).astype(np.float16).view(np.uint16)

    def keep_segments(self, segments: int) -> None:
        """Forget the lists after the first ``segments`` segments."""
        self.count[:] = self.segment_lists[:, :, segments]
        self.super_count[:] = self.segment_supers[:, :, segments]
        self.sum_shapes(segments)

    def segment_state(self, number: int, first: int, stop: int) -> Arrays:
        """The lists of segment ``number``, rows ``first .. stop``, ``[B, Hkv, n, ...]`` each, 0 where unused."""
        lists, supers = self.segment_lists[:, :, number : number + 2], self.segment_supers[:, :, number : number + 2]

        def used(array: np.ndarray[Any, Any], bounds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            most = int((bounds[:, :, 1] - bounds[:, :, 0]).max())
            taken = np.zeros((*array.shape[:2], most, *array.shape[3:]), array.dtype)
            for at in np.ndindex(*bounds.shape[:2]):
                begin, end = bounds[at]
                taken[at][: end - begin] = array[at][begin:end]
            return taken

        # Where lists begin and how many rows a super-list has follow from these.
        return {
            "positions": self.positions[:, :, first:stop],
            "list_rows": used(self.size, lists),
            **{f"list_{name}": used(getattr(self, name), lists) for name in _SUMMARY},
            "super_lists": used(np.diff(self.super_first), supers),
            **{f"super_{name}": used(getattr(self, f"super_{name}"), supers) for name in _SUMMARY},
            **{f"segment_{name}": getattr(self, f"segment_{name}")[:, :, number] for name in _MOMENTS},
        }

    def load_segment(self, bounds: list[int], capacity: int, lo: np.ndarray[Any, Any], state: Arrays) -> None:
        """Append the lists of the last segment of ``bounds``, as ``segment_state`` gave them; ``lo [B]`` see KeyIndex.

        Raises:
            ValueError: arrays that cannot be its lists; names the array.
        """
        number, first, stop = len(bounds) - 2, bounds[-2], bounds[-1]
        batch, heads = self.count.shape
        grid = batch, heads
        state, small = dict(state), np.int32
        positions = expect(state, "positions", small, *grid, stop - first)
        list_rows, super_lists = (
            expect(state, "list_rows", small, *grid, None),
            expect(state, "super_lists", small, *grid, None),
        )
        summaries = {
            f"{owner}{name}": expect(
                state,
                f"{owner or 'list_'}{name}",
                self._layout[name][0],
                *grid, count, *self._layout[name][3],
            )
            for owner, count in (("", list_rows.shape[2]), ("super_", super_lists.shape[2]))
            for name in _SUMMARY
        }  # fmt: skip
        moments = {
            f"segment_{name}": expect(state, f"segment_{name}", np.float32, *grid, *self._layout[f"segment_{name}"][3])
            for name in _MOMENTS
        }
        expect_no_more(state)
        listed = np.clip(stop - np.maximum(lo, first), 0, stop - first)
        most_lists, most_supers = _most(stop - first, 1)
        lists = _check_counts("list_rows", list_rows, np.repeat(listed[:, None], heads, axis=1), most_lists)
        supers = _check_counts("super_lists", super_lists, lists, most_supers)
        # Sinks and padding stand where they stood; every other row stands somewhere in the segment, once.
        rows = np.arange(first, stop, dtype=small)
        for b, h in np.ndindex(*grid):
            fixed = stop - first - int(listed[b])
            found = positions[b, h]
            if not np.array_equal(found[:fixed], rows[:fixed]) or not np.array_equal(
                np.sort(found[fixed:]), rows[fixed:]
            ):
                raise ValueError(f"positions of head {b}, {h} are not the rows {first} to {stop}, each once")
        self.reserve(bounds, capacity)
        self.positions[:, :, first:stop] = positions
        for name, array in moments.items():
            getattr(self, name)[:, :, number] = array
        for b, h in np.ndindex(*grid):
            at, n = int(self.segment_lists[b, h, number]), int(lists[b, h])
            own_rows = list_rows[b, h, :n]
            ends = np.cumsum(own_rows)
            self.size[b, h, at : at + n] = own_rows
            self.begin[b, h, at : at + n] = stop - listed[b] + ends - own_rows
            for name in _SUMMARY:
                self._put(name, b, h, at, summaries[name][b, h, :n])
            super_at, supers_here = int(self.segment_supers[b, h, number]), int(supers[b, h])
            last = np.cumsum(super_lists[b, h, :supers_here])
            self.super_first[b, h, super_at] = at
            self.super_first[b, h, super_at + 1 : super_at + supers_here + 1] = at + last
            self.super_size[b, h, super_at : super_at + supers_here] = np.diff(ends[last - 1], prepend=0)
            for name in _SUMMARY:
                self._put(f"super_{name}", b, h, super_at, summaries[f"super_{name}"][b, h, :supers_here])
        self.segment_lists[:, :, number + 1] = self.segment_lists[:, :, number] + lists
        self.segment_supers[:, :, number + 1] = self.segment_supers[:, :, number] + supers
        self.keep_segments(number + 1)

    def _put(self, name: str, b: int, h: int, at: int, rows: np.ndarray[Any, Any]) -> None:
        getattr(self, name)[b, h, at : at + len(rows)] = rows

    def select(self, batch: np.ndarray[Any, Any]) -> "Lists":
        """The lists of the given batch rows."""
        chosen = copy.copy(self)
        for name in (*self._layout, "count", "super_count", "shape", "cross"):
            setattr(chosen, name, getattr(self, name)[batch])
        return chosen

    def workspace(self, heads: int) -> Workspace:
        """Scratch arrays of attend_lists for ``heads`` query heads, and its stats array."""
        batch, kv_heads = self.count.shape
        key = (batch, kv_heads, heads // kv_heads, self._capacity["supers"], self._capacity["lists"])
        kept: dict[tuple[int, ...], Workspace] = _scratch.__dict__.setdefault("arrays", {})
        if key not in kept:
            if len(kept) > 4:
                kept.clear()
            kept[key] = _new_workspace(*key)
        return kept[key]

    def chosen_slots(self, heads: int) -> Tensor:
        """Places of the rows that the latest fused call read from lists: ``[B, Hq, n]``, -1 = none."""
        scratch, _ = self.workspace(heads)
        ids, places, count = scratch[6], scratch[12], scratch[13]
        chosen = np.zeros(self.begin.shape, np.bool_)
        for b, h in np.ndindex(*count.shape):
            chosen[b, h, ids[b, h, places[b, h, : count[b, h]]]] = True
        begin, size = (torch.from_numpy(array).long() for array in (self.begin, self.size))
        return list_slots(begin, size, torch.from_numpy(chosen), heads)

    def unread_weights(self, heads: int, rows: int) -> Tensor:
        """Weights that the latest fused call (tail=True) gave to rows through the summaries of their lists and
        super-lists, shared evenly by each one's rows: ``[B, Hq, rows]`` by place, up to a factor for each head.
        """
        scratch, stats = self.workspace(heads)
        scored, weight, count, super_weight = scratch[6], scratch[9], scratch[14], scratch[0]
        found = torch.zeros(*self.count.shape, heads // self.count.shape[1], rows)
        for b, h in np.ndindex(*self.count.shape):
            lists, supers = scored[b, h, : count[b, h]], self.super_first[b, h, : self.super_count[b, h]]
            runs = [(self.begin[b, h, lists], self.size[b, h, lists], weight[b, h])]
            if stats[b, 3] > 0:
                runs += [(self.begin[b, h, supers], self.super_size[b, h, : len(supers)], super_weight[b, h])]
            for begin, size, weights in runs:
                places = row_places(torch.from_numpy(begin).long(), torch.from_numpy(size).long())
                found[b, h][:, places] += torch.from_numpy(np.repeat(weights[:, : len(size)] / size, size, axis=1))
        return found.flatten(1, 2)

    def unread(self, scratch: tuple[np.ndarray[Any, Any], ...]) -> tuple[np.ndarray[Any, Any], ...]:
        """What the latest fused call left in its scratch arrays about lists and super-lists, for unread_deviation."""
        return (*(scratch[i] for i in (9, 7, 8, 14, 0)), self.super_size, self.super_variance, self.super_count)

    def summaries(self, device: torch.device) -> Summaries:
        """The lists as float32 tensors on a device."""

        def tensor(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        most = int(self.count.max())
        used = torch.arange(most) < torch.from_numpy(self.count)[..., None]
        return Summaries(
            begin=tensor(self.begin[:, :, :most]).long(),
            size=tensor(self.size[:, :, :most]).long() * used.to(device),
            key=floats(tensor(self.key[:, :, :most])),
            value=floats(tensor(self.value[:, :, :most])),
            variance=tensor(self.variance[:, :, :most]),
            shape=tensor(self.shape.view(np.float16)).float(),
            cross=tensor(self.cross.view(np.float16)).float(),
        )

    def nbytes(self, rows: int, segments: int) -> int:
        """Bytes in use for ``rows`` sealed rows in ``segments`` segments."""
        batch, heads = self.count.shape
        summaries: int = int(self.count.sum() + self.super_count.sum()) * self.summary_bytes
        matrices = int(self.shape[0, 0].size + self.cross[0, 0].size)
        return summaries + int(batch * heads) * (4 * rows + matrices * (2 + 4 * segments))


def _most(rows: int, segments: int) -> tuple[int, int]:
    """How many lists and super-lists ``rows`` rows in ``segments`` segments can make."""
    # Rounding may leave one list or super-list more per level than the plain quotient.
    supers = rows // ROWS_PER_SUPER_LIST + rows // (32 * ROWS_PER_SUPER_LIST) + 2 * segments
    return rows // ROWS_PER_LIST + supers, supers


def _check_counts(
    name: str, counts: np.ndarray[Any, Any], total: np.ndarray[Any, Any], most: int
) -> np.ndarray[Any, Any]:
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


def row_places(begin: Tensor, size: Tensor) -> Tensor:
    """Places of the rows of runs ``begin .. begin + size`` (``[n]`` each), one run after the other."""
    offsets = torch.arange(int(size.sum()), device=begin.device) - (size.cumsum(dim=0) - size).repeat_interleave(size)
    return begin.repeat_interleave(size) + offsets


def summary_weights(begin: Tensor, size: Tensor, chosen: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Weights ``[B, Hq, rows]`` by place of the rows of lists not chosen (``[B, Hkv, L]``), where each row of a list
    has ``weights [B, Hq, L]``; 0 elsewhere."""
    batch, kv_heads, _ = begin.shape
    grouped = weights.view(batch, kv_heads, -1, weights.shape[2])
    found = weights.new_zeros(*grouped.shape[:3], rows)
    for b, h in np.ndindex(batch, kv_heads):
        which = (~chosen[b, h]).nonzero()[:, 0]
        counts = size[b, h, which]
        shares = grouped[b, h][:, which].repeat_interleave(counts, dim=1)
        found[b, h][:, row_places(begin[b, h, which], counts)] = shares
    return found.flatten(1, 2)


def list_slots(begin: Tensor, size: Tensor, chosen: Tensor, heads: int) -> Tensor:
    """Places of all rows of the chosen lists (``[B, Hkv, L]`` each): ``[B, Hq, n]``, -1 = none."""
    batch, kv_heads, _ = begin.shape
    runs = []
    for b in range(batch):
        for h in range(kv_heads):
            which = chosen[b, h].nonzero()[:, 0]
            runs.append(row_places(begin[b, h, which], size[b, h, which]))
    padded = torch.nn.utils.rnn.pad_sequence(runs, batch_first=True, padding_value=-1)
    return padded.view(batch, kv_heads, -1).repeat_interleave(heads // kv_heads, dim=1)
