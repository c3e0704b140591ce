"""What is known of the lists of a store without reading their rows: as kept (packed arrays), and as float tensors.

A store's older rows stand in lists: contiguous runs of similar keys, about 32 rows each, under super-lists of about
512. A summary is a mean key, a mean value, a size and the variance of the keys; ``shape`` is the covariance of keys
around their list's mean, per KV head and on the scale where that variance is 1, ``cross`` the covariance of keys and
values on that scale.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .packed import floats

Array = np.ndarray[Any, Any]
# What a trace of residuals is taken for where all rows are alike.
SMALLEST_TRACE = 1e-20
LARGEST_HALF = float(np.finfo(np.float16).max)
# What kernels of a GPU keep of lists there, by name, and bring up to date when some change.
PLANES, CODE_PLANES, ROW_CACHE = "planes", "code planes", "row cache"
# Rows from which on a GPU ranks super-lists first, where not all are to be opened.
MANY_ROWS = 1 << 18


class ListArrays(NamedTuple):
    """Lists ``[B, Hkv, capacity, ...]``: rows ``begin .. begin + size``, packed means. ``used [B, Hkv]`` counts."""

    begin: Array
    size: Array
    variance: Array
    key: Array
    value: Array
    used: Array

    def row_after(self, count: Array) -> Array:
        """The row after the first ``count [B, Hkv]`` lists; 0 where there are none."""
        last = np.maximum(count - 1, 0)[..., None]
        begin, size = (np.take_along_axis(part, last, axis=2)[..., 0] for part in (self.begin, self.size))
        after: Array = np.where(count > 0, begin + size, 0)
        return after


class SuperListArrays(NamedTuple):
    """Super-lists likewise: lists ``first[i] .. first[i + 1]``; ``size`` counts rows."""

    first: Array
    size: Array
    variance: Array
    key: Array
    value: Array
    used: Array


class SegmentArrays(NamedTuple):
    """Segments ``[B, Hkv, capacity, ...]``: where their lists and super-lists begin and end, and sums over their rows.

    trace is the sum of the squares of their residuals (key - mean of its list), in the metric they were clustered in;
    shape ``[.., D, D]`` and cross ``[.., D, Dv]``, float16, the sums of products of residuals over that.
    """

    lists: Array
    supers: Array
    shape: Array
    cross: Array
    trace: Array


@dataclass(frozen=True)
class Summaries:
    """Summaries of one level as tensors; L per KV head, of which unused ones have size 0.

    Attributes:
        begin, size: ``[B, Hkv, L]`` int64, the rows ``begin .. begin + size`` of the store.
        key, value: ``[B, Hkv, L, D]`` and ``[B, Hkv, L, Dv]`` float32, means.
        variance: ``[B, Hkv, L]`` float32, mean squared distance of the keys from their mean, in the metric they were
            clustered in.
        shape: ``[B, Hkv, D, D]``, cross: ``[B, Hkv, D, Dv]``, float32.
    """

    begin: Tensor
    size: Tensor
    key: Tensor
    value: Tensor
    variance: Tensor
    shape: Tensor
    cross: Tensor

    def those(self, kept: Tensor, *, means: bool = True) -> "Summaries":
        """The lists ``kept`` (bool ``[B, Hkv, L]``) side by side, in their order; heads with fewer end in unused ones.

        Without ``means`` keys and values are none of theirs.
        """
        count = kept.cumsum(dim=2)
        most = int(count[:, :, -1].max()) if kept.numel() else 0
        place = torch.arange(kept.shape[2], device=kept.device).expand_as(count)
        order = torch.zeros(*kept.shape[:2], most + 1, dtype=torch.int64, device=kept.device)
        order = order.scatter_(2, (count - 1).where(kept, most), place)[:, :, :most]
        used = place[:, :, :most] < count[:, :, -1:]

        def vectors(rows: Tensor) -> Tensor:
            return rows.gather(2, order[..., None].expand(-1, -1, -1, rows.shape[3]))

        begin, size, variance = (part.gather(2, order) for part in (self.begin, self.size, self.variance))
        found = replace(self, begin=begin, size=size * used, variance=variance)
        return replace(found, key=vectors(self.key), value=vectors(self.value)) if means else found

    def only(self, kept: Tensor) -> "Summaries":
        """The same lists, those not ``kept`` (bool ``[B, Hkv, L]``) unused."""
        return replace(self, size=self.size * kept)

    def grouped(self, query: Tensor, scale: float) -> Tensor:
        """The scaled query ``[B, Hq, 1, D]`` by KV head: ``[B, Hkv, Hq // Hkv, D]`` float32."""
        return (query.float() * scale).reshape(query.shape[0], self.key.shape[1], -1, query.shape[3])

    def spread(self, query: Tensor) -> Tensor:
        """Variance of a grouped query's logits per unit of a list's variance, ``[B, Hkv, Hq // Hkv]``."""
        return ((query @ self.shape) * query).sum(dim=-1).clamp(min=1e-12)


@dataclass(frozen=True)
class Levels:
    """All lists and super-lists as tensors; ``parent [B, Hkv, L]`` is the super-list of each list."""

    lists: Summaries
    supers: Summaries
    parent: Tensor

    @cached_property
    def both(self) -> Summaries:
        """The lists, and behind them the super-lists."""
        names = ("begin", "size", "key", "value", "variance")
        parts = {n: torch.cat([getattr(self.lists, n), getattr(self.supers, n)], dim=2) for n in names}
        return replace(self.lists, **parts)


class Before(NamedTuple):
    """What a device was given of lists before some of them changed, and how many ``[B, Hkv]`` are what they were."""

    made: dict[Any, Any]
    lists: Array
    supers: Array


@dataclass(frozen=True)
class ListTable:
    """The lists of all segments of a store: arrays as the CPU kernels read them. Made anew when a list changes.

    shape ``[B, Hkv, D, D]`` and cross ``[B, Hkv, D, Dv]`` are float16, as uint16 bits. codes ``[B, Hkv, T, ...]`` int8
    are of each row's key less the mean key of its list, see packed.py; T at least the rows that stand in lists.
    ``before``: what is left of the table before this one, to be brought up to date.
    """

    lists: ListArrays
    supers: SuperListArrays
    shape: Array
    cross: Array
    codes: Array
    before: Before | None = field(default=None, compare=False, repr=False)
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def levels(self, device: torch.device) -> Levels:
        """Both levels as tensors on a device, means as floats; converted once."""
        place = "levels", device
        if place not in self._cache:
            self._cache[place] = self._to(device)
        found: Levels = self._cache[place]
        return found

    def on(self, device: torch.device, what: Hashable, made: Callable[["ListTable", torch.device], Any]) -> Any:
        """What ``made`` makes of the lists for a device; made once."""
        place = what, device
        if place not in self._cache:
            # Written in place by kernels and by a later table, in inference mode or not.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[place] = made(self, device)
        return self._cache[place]

    def taken_over(self, device: torch.device, what: Hashable) -> tuple[Any, Before] | None:
        """What the table before this one had made, for this one to change, and what of it stands; None: nothing."""
        if self.before is None or (kept := self.before.made.pop((what, device), None)) is None:
            return None
        return kept, self.before

    def left(self) -> dict[Any, Any]:
        """What the next table may take over, by name and device."""
        return {place: part for place, part in self._cache.items() if place[0] in (PLANES, CODE_PLANES, ROW_CACHE)}

    def codes_on(self, device: torch.device) -> Tensor:
        """The codes on a device; copied once."""
        place = "codes", device
        if place not in self._cache:
            self._cache[place] = _tensor(self.codes, device)
        found: Tensor = self._cache[place]
        return found

    def beside(
        self, keys: Tensor, values: Tensor, start: Tensor, made: "Callable[[ListTable, Tensor, Tensor, Tensor], Any]"
    ) -> Any:
        """What ``made`` makes of the lists and a store's rows; made anew only for others than last time."""
        kept = self._cache.get("beside")
        if kept is None or kept[0] is not keys or kept[1] is not start:
            kept = self._cache["beside"] = keys, start, made(self, keys, values, start)
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        # A copy must look at its own arrays.
        return {**self.__dict__, "before": None, "_cache": {}}

    def _to(self, device: torch.device) -> Levels:
        most, most_supers = int(self.lists.used.max()), int(self.supers.used.max())
        shape, cross = (_tensor(bits.view(np.float16), device).float() for bits in (self.shape, self.cross))
        begin = _tensor(self.lists.begin[:, :, :most], device).long()
        size = _used(self.lists.size, self.lists.used, most, device)
        first = _tensor(self.supers.first[:, :, : most_supers + 1], device).long()
        # Where the rows of a super-list's first list begin; unused super-lists have size 0 and begin anywhere.
        super_begin = begin.gather(2, first[:, :, :most_supers].clamp(max=max(0, most - 1))) if most else first[..., :0]
        super_size = _used(self.supers.size, self.supers.used, most_supers, device)
        ends = first[:, :, 1:].masked_fill(super_size == 0, np.iinfo(np.int64).max)
        parent = torch.searchsorted(ends, torch.arange(most, device=device).expand_as(size).contiguous(), right=True)
        # Unused lists are of the last one.
        parent = parent.clamp(max=max(0, most_supers - 1))

        def level(arrays: ListArrays | SuperListArrays, begin: Tensor, size: Tensor) -> Summaries:
            used = size.shape[2]
            key, value = (floats(_tensor(rows[:, :, :used], device)) for rows in (arrays.key, arrays.value))
            return Summaries(begin, size, key, value, _tensor(arrays.variance[:, :, :used], device), shape, cross)

        return Levels(level(self.lists, begin, size), level(self.supers, super_begin, super_size), parent)


def _tensor(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _used(size: Array, count: Array, most: int, device: torch.device) -> Tensor:
    """Sizes ``[B, Hkv, most]`` int64, 0 from ``count`` on: what lies there is left from lists dropped since."""
    used = np.arange(most) < count[..., None]
    return _tensor(size[:, :, :most] * used, device).long()


class ListReading(NamedTuple):
    """How a call reads a segmented store.

    Attributes:
        sealed, length: rows below ``sealed`` stand in lists, those up to ``length`` are hot; later ones not seen.
        n_sink: first rows of each batch row that are read exactly, and stand in no list.
        rows_read: rows of lists to read, for all KV heads of a batch row together; they share them by need.
        rows_coded: rows under the lists to open, likewise: their codes are scored, and the best of them read.
        rows_opened: rows under the super-lists to open, likewise; where that is all of them, every list is scored.
        scale, softcap: of the logits.
        alpha: share of the variance of a list's logits that is added to its summary's.
        beta: how far its value is moved along ``cross``.
        tail: whether rows that are not read answer, by their codes or by the summary of their list.
        head_weights: what a share of the softmax counts for in each query head ``[Hq]``, where rows are chosen for all
            of a batch row; None: the same.
    """

    sealed: int
    length: int
    n_sink: int
    rows_read: int
    rows_coded: int
    rows_opened: int
    scale: float
    softcap: float | None
    alpha: float
    beta: float
    tail: bool
    head_weights: tuple[float, ...] | None = None


class SegmentedAnswer(NamedTuple):
    """What attend_segmented returns.

    Attributes:
        out: ``[B, Hq, 1, Dv]`` float32.
        lse: ``[B, Hq, 1]``; like ``lse_by_source`` empty where it was not wanted.
        lse_by_source: ``[4, B, Hq, 1]``: sinks and hot rows, rows of lists, codes, summaries; -inf for none.
        rows_read, rows_coded, lists_opened: all batch rows and KV heads together.
        summaries_read: summaries scored, likewise.
        values_read: mean values read by the tail, likewise; those of negligible weight need not be.
        seconds: time of sinks and hot rows, of choosing rows and reading them, of answering by codes, by summaries.
        taken: bool ``[B, Hkv, sealed]``, which rows of lists were read, by place; None unless asked for.
        unread: ``[B, Hq, sealed]``, share of the weight that each row has, by place, through its code, or through the
            summary that answers for it, shared evenly by the rows of a list; None unless asked for.
        totals: int64 ``[B]`` on the device, rows of lists read by all calls that share it: where no ``details`` were
            asked for, ``rows_read`` is no more than the budget then. None: all counts are exact.
        copies_read: of ``rows_read``, those of which a GPU had a copy, where rows are in the host's memory; 0 without
            ``details``.
    """

    out: Tensor
    lse: Tensor
    lse_by_source: Tensor
    rows_read: int
    rows_coded: int
    lists_opened: int
    summaries_read: int
    values_read: int
    seconds: tuple[float, float, float, float]
    taken: Tensor | None
    unread: Tensor | None
    totals: Tensor | None = None
    copies_read: int = 0


class LearntMetric(NamedTuple):
    """In which metric keys are clustered: as ``key @ metric``, ``[S, B, Hkv, D, D]`` float32 for each segment.

    ``holds [S, B]`` bool: where there is one; elsewhere keys stand as they are.
    """

    metric: Array
    holds: Array


class Clustering(NamedTuple):
    """How rows are clustered: sizes aimed at, Lloyd iterations, and the stride of the rows upper levels learn from."""

    rows_per_super_list: int
    rows_per_list: int
    iterations: int
    training_stride: int
