"""Lists: the arrays behind SegmentedIndex, one row of summaries per list and super-list."""

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from index_kernels import ListArrays, ListTable, SegmentArrays, SuperListArrays
from index_kernels.packed import SCALE_BYTES, code_bytes
from index_kernels.summaries import SMALLEST_TRACE, Array, Before

from ..store import Pages, Spread

ROWS_PER_LIST = 32
ROWS_PER_SUPER_LIST = 512
# Room for more segments in arrays that forks share.
SPARE_SEGMENTS = 8
# Size, first row and variance of a list.
NUMBERS_BYTES = 12


def vector_bytes(dim: int) -> int:
    """Bytes of a summary's mean key or mean value: a packed row."""
    return dim + SCALE_BYTES


class _Sums(NamedTuple):
    """Sums over the leading segments of a store, float32: of their traces ``[B, Hkv, 1, 1]``, and of their moments
    times these."""

    segments: int
    trace: Tensor
    shape: Tensor
    cross: Tensor

    @classmethod
    def none(cls, batch: int, heads: int, dim: int, value_dim: int) -> "_Sums":
        """Of no segments."""
        sizes = (1, 1), (dim, dim), (dim, value_dim)
        return cls(0, *(torch.zeros(batch, heads, *size) for size in sizes))

    def plus(self, trace: Tensor, shape: Tensor, cross: Tensor) -> "_Sums":
        """With those of one more."""
        shape, cross = (torch.addcmul(sums, trace, part) for sums, part in ((self.shape, shape), (self.cross, cross)))
        return _Sums(self.segments + 1, self.trace + trace, shape, cross)

    def moments(self) -> tuple[Array, Array]:
        """Residual covariance (trace 1) and key-value cross-covariance of each head, as ListTable has them."""
        over = self.trace.clamp(min=SMALLEST_TRACE)
        shape, cross = ((part / over).half().numpy().view(np.uint16) for part in (self.shape, self.cross))
        return shape, cross


class Lists:
    """The arrays of all lists, super-lists and segments, ``[B, Hkv, capacity, ...]``; their vectors are packed rows.

    ``positions [B, Hkv, capacity]``: the row that stands at each place of the store; ``codes`` likewise, of its key.
    """

    def __init__(self, batch: int, heads: int, dim: int, value_dim: int) -> None:
        grid = batch, heads
        small, real = np.int32, np.float32

        def zeros(dtype: type, *shape: int) -> Array:
            return np.zeros((*grid, *shape), dtype)

        def means(dim: int) -> Array:
            return zeros(np.int8, 0, vector_bytes(dim))

        self.summary_bytes = vector_bytes(dim) + vector_bytes(value_dim) + NUMBERS_BYTES
        self.positions = zeros(small, 0)
        self.codes = zeros(np.int8, 0, code_bytes(dim))
        self.lists = ListArrays(
            zeros(small, 0), zeros(small, 0), zeros(real, 0), means(dim), means(value_dim), zeros(np.int64)
        )
        # Where the last one ends is kept behind the begins of all: one place more.
        self.supers = SuperListArrays(
            zeros(small, 1), zeros(small, 0), zeros(real, 0), means(dim), means(value_dim), zeros(np.int64)
        )
        self.segments = SegmentArrays(
            zeros(np.int64, 1), zeros(np.int64, 1),
            zeros(np.float16, 0, dim, dim), zeros(np.float16, 0, dim, value_dim), zeros(real, 0),
        )  # fmt: skip
        self.shape = zeros(np.uint16, dim, dim)
        self.cross = zeros(np.uint16, dim, value_dim)
        self._sums: _Sums | None = None
        self._table: ListTable | None = None
        # Segments that the table covers. What devices hold of an earlier one, and how many of its leading segments
        # still stand.
        self._settled = 0
        self._before: tuple[dict[Any, Any], int] | None = None
        # What all forks share until one of them writes; None where nothing is, or where ours are others by now.
        self._pages: Pages | None = None

    @property
    def table(self) -> ListTable:
        """The lists as attend_segmented takes them."""
        if self._table is None:
            before = None
            if self._before is not None:
                made, kept = self._before
                before = Before(made, *(ends[:, :, kept].copy() for ends in self.segments[:2]))
            self._table = ListTable(self.lists, self.supers, self.shape, self.cross, self.codes, before)
        return self._table

    def _forget_table(self) -> None:
        """The lists are about to change; what devices were given of them is brought up to date by the next table."""
        if self._table is not None and (made := self._table.left()):
            self._before = made, self._settled
        self._table = None

    def table_of(self, segments: int) -> ListTable:
        """The lists of the first ``segments`` segments, as if there were no others."""
        lists = self.lists._replace(used=self.segments.lists[:, :, segments].copy())
        supers = self.supers._replace(used=self.segments.supers[:, :, segments].copy())
        return ListTable(lists, supers, *self._summed(segments).moments(), self.codes)

    @property
    def is_shared(self) -> bool:
        """Whether forks share these lists, none of which has changed since."""
        return self._pages is not None

    def reserve(
        self, bounds: list[int], rows: int, *, per_super: int = ROWS_PER_SUPER_LIST, per_list: int = ROWS_PER_LIST
    ) -> None:
        """Make room for segments at these bounds, in lists of about ``per_list`` rows and super-lists of ``per_super``.

        And for those of all ``rows`` that the store has room for: arrays grow as seldom as it does.
        """
        segments = len(bounds) - 1
        lists, supers = most_lists(max(bounds[-1], rows), segments, per_super, per_list)
        if rows > (before := self.positions.shape[2]):
            self.positions, self.codes = _grown(self.positions, rows), _grown(self.codes, rows)
            self.positions[:, :, before:] = np.arange(before, rows, dtype=np.int32)
        self.lists = self.lists._replace(**_room(self.lists, lists))
        self.supers = self.supers._replace(**_room(self.supers, supers))
        self.segments = self.segments._replace(**_room(self.segments, segments))
        self._forget_table()
        self._pages = None

    def settle(self, segments: int) -> None:
        """Take in that the first ``segments`` segments have been written: their moments count from now on."""
        self._sums = self._summed(segments)
        self.shape, self.cross = self._sums.moments()
        self._forget_table()
        self._settled = segments

    def _summed(self, segments: int) -> "_Sums":
        """Sums over the first segments, one after the other: new ones are added to what is known of those before."""
        sums = self._sums
        if sums is None or sums.segments > segments:
            sums = _Sums.none(*self.segments.trace.shape[:2], *self.segments.cross.shape[3:])
        for i in range(sums.segments, segments):
            shape, cross, trace = (torch.from_numpy(part[:, :, i]) for part in self.segments[2:])
            sums = sums.plus(trace[..., None, None], shape.float(), cross.float())
        return sums

    def keep_segments(self, segments: int) -> None:
        """Forget the lists after the first ``segments`` segments."""
        self.lists.used[:] = self.segments.lists[:, :, segments]
        self.supers.used[:] = self.segments.supers[:, :, segments]
        self._pages = self._sums = None
        self._forget_table()
        if self._before is not None:
            made, kept = self._before
            self._before = made, min(kept, segments)
        self.settle(segments)

    def fork(self, segments: int, sealed: int, rows: int) -> "Lists":
        """The same lists, of ``segments`` segments and ``sealed`` rows, in a store with room for ``rows`` rows.

        Neither sees what is done to the other. They share memory as the rows do, see ``KVStore.fork``.
        """
        if self._pages is None:
            pages = Pages.of(self._spread(segments, sealed, rows))
            if pages is None:
                return copy.deepcopy(self)
            self._take(pages)
        pages = self._pages
        assert pages is not None
        twin = copy.copy(self)
        twin._take(pages)
        return twin

    def _spread(self, segments: int, sealed: int, rows: int) -> list[Spread]:
        """The arrays that may be large, and room for as many lists as ``rows`` rows may make."""
        rows, more = max(rows, self.positions.shape[2]), segments + SPARE_SEGMENTS
        most, most_supers = most_lists(rows, more)
        used, used_supers = int(self.lists.used.max()), int(self.supers.used.max())

        def spread(array: Array, used: int, room: int) -> Spread:
            return Spread([torch.from_numpy(array[:, :, :used])], max(room, array.shape[2]))

        positions = np.broadcast_to(np.arange(sealed, rows, dtype=np.int32), (*self.positions.shape[:2], rows - sealed))
        found = [
            Spread([torch.from_numpy(part) for part in (self.positions[:, :, :sealed], positions.copy())], rows),
            spread(self.codes, sealed, rows),
        ]
        found += [spread(array, used, most) for array in self.lists[:-1]]
        # Where the last one ends is kept behind the begins of all: one place more.
        found += [spread(self.supers.first, used_supers + 1, most_supers + 1)]
        found += [spread(array, used_supers, most_supers) for array in self.supers[1:-1]]
        found += [spread(array, segments + 1, more + 1) for array in self.segments[:2]]
        found += [spread(array, segments, more) for array in self.segments[2:]]
        return found

    def _take(self, pages: Pages) -> None:
        """Use a view of the pages that were made of ``_spread`` in place of our arrays."""
        self.positions, self.codes, *arrays = pages.arrays()
        lists, supers = len(self.lists) - 1, len(self.supers) - 1
        self.lists = ListArrays._make([*arrays[:lists], self.lists.used.copy()])
        self.supers = SuperListArrays._make([*arrays[lists : lists + supers], self.supers.used.copy()])
        self.segments = SegmentArrays(*arrays[lists + supers :])
        self._table = self._before = None
        self._pages = pages

    def select(self, batch: Array) -> "Lists":
        """The lists of the given batch rows."""
        chosen: Lists = object.__new__(Lists)
        chosen.summary_bytes = self.summary_bytes
        chosen._table = chosen._before = chosen._pages = chosen._sums = None
        chosen._settled = self._settled
        for name in ("positions", "codes", "shape", "cross"):
            setattr(chosen, name, getattr(self, name)[batch])
        chosen.lists = ListArrays(*(array[batch] for array in self.lists))
        chosen.supers = SuperListArrays(*(array[batch] for array in self.supers))
        chosen.segments = SegmentArrays(*(array[batch] for array in self.segments))
        return chosen

    def nbytes(self, rows: int, segments: int) -> int:
        """Bytes in use for ``rows`` sealed rows in ``segments`` segments."""
        batch, heads = self.lists.used.shape
        summaries: int = int(self.lists.used.sum() + self.supers.used.sum()) * self.summary_bytes
        matrices = int(self.shape[0, 0].size + self.cross[0, 0].size)
        each_row = 4 + int(self.codes.shape[3])
        return summaries + int(batch * heads) * (each_row * rows + matrices * (2 + 2 * segments))

    def __getstate__(self) -> dict[str, object]:
        # A copy must look at its own arrays.
        return {**self.__dict__, "_table": None, "_before": None}


def most_lists(
    rows: int, segments: int, per_super: int = ROWS_PER_SUPER_LIST, per_list: int = ROWS_PER_LIST
) -> tuple[int, int]:
    """How many lists and super-lists ``rows`` rows in ``segments`` segments can make."""
    # Rounding may leave one list or super-list more per level than the plain quotient.
    supers = rows // per_super + rows // (32 * per_super) + 2 * segments
    return rows // per_list + supers, supers


def _room(arrays: ListArrays | SuperListArrays | SegmentArrays, needed: int) -> dict[str, Array]:
    """The arrays that are too short for ``needed`` entries, grown."""
    capacity = arrays[-1].shape[2] if isinstance(arrays, SegmentArrays) else arrays[1].shape[2]
    if needed <= capacity:
        return {}
    return {
        name: _grown(array, needed + needed // 8 + 8 + array.shape[2] - capacity)
        for name, array in arrays._asdict().items()
        if name != "used"
    }


def _grown(array: Array, capacity: int) -> Array:
    grown = np.zeros((*array.shape[:2], capacity, *array.shape[3:]), array.dtype)
    grown[:, :, : array.shape[2]] = array
    return grown


def slots_of(taken: Tensor, heads: int) -> Tensor:
    """The places that are taken (bool ``[B, Hkv, n]``), for every query head: ``[B, Hq, m]``, -1 = none."""
    batch, kv_heads, _ = taken.shape
    runs = [taken[b, h].nonzero()[:, 0] for b in range(batch) for h in range(kv_heads)]
    padded = torch.nn.utils.rnn.pad_sequence(runs, batch_first=True, padding_value=-1)
    return padded.view(batch, kv_heads, -1).repeat_interleave(heads // kv_heads, dim=1)
