"""Lists of similar keys: spherical k-means per segment of rows, as in RetroInfer's wave index."""

import math

import torch
from torch import Tensor

# Rows wait until there are this many to seal; until then they are hot.
SEAL = 128


class Lists:
    """Rows of a store in lists, per KV head; L lists, some of which may be empty.

    ``rows_per_list`` on average (None: the square root of a segment's rows), at most ``segment_rows`` clustered
    together. Keys are clustered without their segment's mean, which shifts every logit of a query alike.

    Attributes:
        stop: rows before this one are in lists.
        size: ``[Hkv, L]``, key ``[Hkv, L, D]`` and value ``[Hkv, L, Dv]``: rows, mean key, mean value (half precision).
        home: ``[Hkv, rows]``, the list of each row, counted from the first row taken in.
    """

    def __init__(self, rows_per_list: int | None = 16, segment_rows: int = 8192) -> None:
        self.rows_per_list, self.segment_rows = rows_per_list, segment_rows
        self.first = self.stop = -1

    def extend(self, keys: Tensor, values: Tensor, first: int, stop: int) -> int:
        """Seal rows ``[Hkv, T, D]`` from ``first`` (or where sealing ended) up to ``stop``; returns the rows sealed."""
        if self.stop < 0:
            heads = len(keys)
            self.first = self.stop = first
            self.size = self._begin = torch.zeros(heads, 0, dtype=torch.int64)
            self._order = self.home = torch.zeros(heads, 0, dtype=torch.int64)
            self.key, self.value = keys[:, :0], values[:, :0]
        before = self.stop
        while stop - self.stop >= SEAL:
            end = min(stop, self.stop + self.segment_rows)
            self._seal(keys[:, self.stop : end], values[:, self.stop : end])
        return self.stop - before

    def members(self, chosen: Tensor) -> Tensor:
        """The rows of the lists ``chosen [Hkv, p]``: ids ``[Hkv, n]``, -1 = none."""
        if chosen.shape[1] == 0:
            return chosen
        lengths = self.size.gather(1, chosen)
        ends = lengths.cumsum(dim=1)
        at = torch.arange(int(ends[:, -1].max())).expand(len(chosen), -1).contiguous()
        which = torch.searchsorted(ends, at, right=True)
        missing = which >= chosen.shape[1]
        which = which.masked_fill(missing, 0)
        place = (self._begin.gather(1, chosen) - ends + lengths).gather(1, which) + at
        return self._order.gather(1, place.masked_fill(missing, 0)).masked_fill(missing, -1)

    def _seal(self, keys: Tensor, values: Tensor) -> None:
        heads, rows, _ = keys.shape
        count = max(1, round(math.sqrt(rows) if self.rows_per_list is None else rows / self.rows_per_list))
        home = kmeans(keys - keys.mean(dim=1, keepdim=True), count)
        size = torch.zeros(heads, count, dtype=torch.int64).scatter_add_(1, home, torch.ones_like(home))
        self.key = torch.cat([self.key, half(means(keys, home, size))], dim=1)
        self.value = torch.cat([self.value, half(means(values, home, size))], dim=1)
        placed = self._order.shape[1]
        self._begin = torch.cat([self._begin, placed + size.cumsum(dim=1) - size], dim=1)
        self._order = torch.cat([self._order, self.stop + home.argsort(dim=1, stable=True)], dim=1)
        self.home = torch.cat([self.home, home + self.size.shape[1]], dim=1)
        self.size = torch.cat([self.size, size], dim=1)
        self.stop += rows


def kmeans(rows: Tensor, lists: int, iterations: int = 10) -> Tensor:
    """Spherical k-means of ``rows [H, n, D]``: the list of each, ``[H, n]``; uniformly strided initial centroids."""
    stride = torch.linspace(0, rows.shape[1] - 1, lists).long()
    centroids = torch.nn.functional.normalize(rows[:, stride], dim=-1)
    for _ in range(iterations):
        home = (rows @ centroids.transpose(1, 2)).argmax(dim=-1)
        sums = torch.zeros_like(centroids).scatter_add_(1, home[..., None].expand_as(rows), rows)
        # A list that lost all its rows keeps its centroid.
        moved = torch.nn.functional.normalize(sums, dim=-1)
        centroids = torch.where(sums.norm(dim=-1, keepdim=True) > 0, moved, centroids)
    return (rows @ centroids.transpose(1, 2)).argmax(dim=-1)


def means(rows: Tensor, home: Tensor, size: Tensor) -> Tensor:
    """Mean of the ``rows [H, n, D]`` of each list, ``[H, L, D]``; zero for an empty one."""
    sums = torch.zeros(*size.shape, rows.shape[2]).scatter_add_(1, home[..., None].expand_as(rows), rows)
    return sums / size.clamp(min=1)[..., None]


def half(x: Tensor) -> Tensor:
    """What is left of ``x`` in half precision."""
    return x.half().float()
