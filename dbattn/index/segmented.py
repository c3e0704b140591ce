"""SegmentedIndex: rows sealed into segments of small lists, kept in the store itself.

The newest rows are hot and scanned exactly. Older rows form segments: k-means lists of about 16 rows under
super-lists of about 256, permuted in place so that each list is contiguous (attention does not mind the order of
rows; ``positions`` remembers it). Each list keeps a summary: mean key, mean value, size and variance. A query reads
the lists whose unread rows would cost it most and lets the others answer by their summary. Follows RetroInfer's wave
index (segments, small lists, an estimation zone); the second-moment correction of the summaries is our own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from index_kernels import (
    Summaries,
    attend_lists,
    attend_rows,
    merge_states,
    probe_lists,
    summary_logits,
    top_k,
    unread_deviation,
)
from index_kernels.ops import check_fork

from ..dense import exact_ranges
from ..store import KVStore
from ._lists import ROWS_PER_LIST, ROWS_PER_SUPER_LIST, Lists, list_slots, summary_weights
from .base import Arrays, Candidates, KeyIndex

ITERATIONS = 6
# Upper levels of the clustering are trained on every fourth row.
TRAINING_STRIDE = 4
# Rows of a segment, large to small; two of one size merge into one of the next, as in an LSM tree.
SEGMENT_ROWS = tuple(128 << i for i in range(10, -1, -1))
# How much of the variance of a list's logits its summary's weight and value are corrected by. A Gaussian would ask
# for 0.5 and 1; real residuals have lighter tails, and the unread lists are those whose spread matters least.
ALPHA, BETA = 0.38, 0.7
# (sealed rows, rows read per KV head), from a sweep on SmolLM2's rows for a mean error of 0.035 (32K to 524K). Below
# that a call's fixed cost rules: at 8K twice the rows cost a fifth of the time more, and halve the error to 0.013.
BUDGETS = np.array([(2048, 1024), (7680, 960), (32256, 520), (130560, 900), (523272, 2000)])
# Rows under opened super-lists for each row read: opening costs a sixteenth of reading.
OPENED_PER_READ = 16


def segment_bounds(rows: int) -> list[int]:
    """Where segments end among the first ``rows`` rows: as many large ones as fit, then smaller ones.

    A function of the number of rows alone, so that the structure does not depend on how they arrived.
    """
    bounds = [0]
    for size in SEGMENT_ROWS:
        while bounds[-1] + size <= rows:
            bounds.append(bounds[-1] + size)
    return bounds


@lru_cache
def default_rows_read(sealed: int) -> int:
    """Rows read per KV head for ``sealed`` rows: BUDGETS interpolated on log-log scales."""
    x, y = np.log(BUDGETS).T
    at = np.log(max(sealed, SEGMENT_ROWS[-1]))
    i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
    return int(np.exp(y[i - 1] + (at - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])))


def budget(sealed: int, k: int | None) -> tuple[int, int]:
    """(rows read, rows opened) per KV head where ``k`` rows are asked for, or the default for ``sealed`` rows."""
    read = default_rows_read(sealed) if k is None else k
    opened = OPENED_PER_READ * read
    # Scoring every list, in the order they stand, costs no more than opening half of the super-lists.
    return read, sealed if 2 * opened > sealed else opened


@dataclass(frozen=True)
class ListAnswer:
    """What one query got from a segmented store.

    Attributes:
        out: ``[B, Hq, m, Dv]`` float32.
        lse: ``[B, Hq, m]``.
        lse_by_source: ``[3, B, Hq, m]``: sinks and hot rows, lists read, tail; -inf for none.
        rows_read: rows of lists read, per KV head and position, mean.
        lists_read: lists read, all KV heads and positions together.
        summaries_read: summaries scored, likewise.
        values_read: mean values read by the tail, likewise; those of negligible weight are not.
        seconds: time of sinks and hot rows, of choosing and reading lists, of the tail.
        deviation: ``[B, Hq, m]``, standard deviation of the unread rows' weight as a share of all (where asked for).
        slots: rows read from lists, ``[B, Hq, m, n]`` places in the store, -1 = none (where asked for).
        unread: ``[B, Hq, sealed]``, share of the newest query's weight that each sealed row, by place, has through a
            summary: a list's or super-list's, shared evenly by its rows (where slots were asked for).
    """

    out: Tensor
    lse: Tensor
    lse_by_source: Tensor
    rows_read: float
    lists_read: int
    summaries_read: int
    values_read: int
    seconds: tuple[float, float, float]
    deviation: Tensor | None
    slots: Tensor | None
    unread: Tensor | None


@dataclass(frozen=True)
class Reading:
    """How a query reads a segmented store: ``k`` rows per KV head (None: by size), and what is wanted beside it."""

    k: int | None
    scale: float
    softcap: float | None
    n_sink: int
    tail: bool
    want_deviation: bool = False
    want_slots: bool = False


class SegmentedIndex(KeyIndex):
    """Lists of every batch row and KV head, in arrays ``[B, Hkv, ...]`` that grow with the store."""

    name = "segmented"
    moves_rows = True
    searches_all = True

    def __init__(self, window: int) -> None:
        _require_numba()
        self._window = window
        self._bounds = [0]
        self._lists: Lists | None = None
        self._flat: tuple[Tensor, tuple[Any, ...]] | None = None
        # The lists on the rows' device, for the portable path; copied over only when they have changed.
        self._summaries: Summaries | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy must look at its own store's memory.
        return {**self.__dict__, "_flat": None}

    def __len__(self) -> int:
        return self._bounds[-1]

    def extend(self, store: KVStore, lo: Tensor) -> None:
        """See KeyIndex; seals what is due, merging smaller segments into larger ones."""
        from index_kernels._cpu_seal import seal_rows

        target = segment_bounds(max(len(store) - self._window, 0))
        keep = self._shared_segments(target)
        if keep + 1 < len(self._bounds):
            self._unseal(store, lo, keep)
        if keep + 1 == len(target):
            return
        check_fork()
        rows = store.buffers[0]
        if self._lists is None:
            self._lists = Lists(rows.shape[0], store.num_kv_heads, store.head_dim, store.value_dim)
        lists = self._lists
        lists.reserve(target, rows.shape[2])
        store.touch(target[keep])
        with _on_host(store, target[keep], target[-1]) as (host_keys, host_values):
            seal_rows(
                host_keys, host_values, lists.positions, lo.cpu().numpy(), 0, np.asarray(target[keep:], np.int64),
                ROWS_PER_SUPER_LIST, ROWS_PER_LIST, ITERATIONS, TRAINING_STRIDE,
                lists.begin, lists.size, lists.variance, lists.key, lists.value, lists.count,
                lists.super_first, lists.super_size, lists.super_variance, lists.super_key, lists.super_value,
                lists.super_count, lists.segment_lists, lists.segment_supers, lists.segment_shape,
                lists.segment_cross, lists.segment_trace, keep,
            )  # fmt: skip
        self._bounds, self._summaries = target, None
        lists.sum_shapes(len(target) - 1)

    def attend(self, query: Tensor, store: KVStore, how: Reading) -> ListAnswer:
        """Answer the m newest positions: sinks and hot rows exactly, lists under a budget, the rest by summary.

        query ``[B, Hq, m, D]``; ``how.k`` rows are read per KV head on average over the heads (default by size), and
        heads share them by need. ``len(self)`` must not exceed the first query's position.
        """
        m = query.shape[2]
        # One fused call on the CPU; elsewhere the same in torch, with the device's own kernels for the rows.
        attend_one = self._attend_fused if query.device.type == "cpu" else self._attend_portable
        answers = [attend_one(query[:, :, i], store, len(store) - m + i + 1, how) for i in range(m)]
        if m == 1:
            return answers[0]
        hot, lists, tail = (sum(times) for times in zip(*(a.seconds for a in answers), strict=True))
        slots = None
        if how.want_slots:
            parts = [a.slots for a in answers if a.slots is not None]
            widest = max(part.shape[-1] for part in parts)
            slots = torch.cat([pad(part, (0, widest - part.shape[-1]), value=-1) for part in parts], dim=2)
        return ListAnswer(
            torch.cat([a.out for a in answers], dim=2),
            torch.cat([a.lse for a in answers], dim=2),
            torch.cat([a.lse_by_source for a in answers], dim=3),
            sum(a.rows_read for a in answers) / m,
            sum(a.lists_read for a in answers),
            sum(a.summaries_read for a in answers),
            sum(a.values_read for a in answers),
            (hot, lists, tail),
            torch.cat([a.deviation for a in answers if a.deviation is not None], dim=2) if how.want_deviation else None,
            slots,
            answers[-1].unread,
        )

    def search(
        self, query: Tensor, store: KVStore, k: int, lo: Tensor, stop: int, lift: float | None = None
    ) -> Candidates:
        """See KeyIndex; exact: lists answer by summary as well, so those left unread may hold the best row. No lift."""
        assert self._lists is not None
        keys = store.rows[0][:, :, : len(self)]
        places = torch.from_numpy(self._lists.positions[:, :, : len(self)]).to(keys.device).long().argsort(dim=-1)
        keys = keys.gather(2, places[..., None].expand_as(keys))[:, :, :stop]
        rows, _ = top_k(query, keys, k, scale=1.0, start=lo)
        group = query.shape[1] // store.num_kv_heads
        found = places.repeat_interleave(group, dim=1)[:, :, None].expand(-1, -1, query.shape[2], -1)
        ids = torch.where(rows >= 0, found.gather(-1, rows.clamp(min=0)), rows)
        return Candidates(ids, keys.numel() * keys.element_size())

    def positions(self, slots: Tensor) -> Tensor:
        """Row positions of places in the store, ``[B, Hq, m, n]``; -1 stays -1."""
        if self._lists is None:
            return slots
        table = torch.from_numpy(self._lists.positions).to(slots.device)
        group = slots.shape[1] // table.shape[1]
        b = torch.arange(slots.shape[0], device=slots.device)[:, None, None, None]
        h = (torch.arange(slots.shape[1], device=slots.device) // group)[:, None, None]
        # The table may be shorter than the store: hot rows stand at their positions and are not looked up.
        found = table[b, h, slots.clamp(0, table.shape[2] - 1)].long()
        return torch.where((slots < 0) | (slots >= len(self)), slots, found)

    def release(self, store: KVStore, lo: Tensor) -> None:
        """Put all rows back in the order of their positions; the next extend seals them again."""
        self._unseal(store, lo, 0)

    def truncate(self, store: KVStore, length: int, lo: Tensor) -> None:
        """See KeyIndex; segments that the shorter store would not have become hot again."""
        self._unseal(store, lo, self._shared_segments(segment_bounds(max(length - self._window, 0))))
        if not length:
            self._lists = None  # the next rows may come in another batch size

    def select(self, batch: Tensor) -> None:
        """See KeyIndex."""
        if self._lists is not None:
            self._lists, self._summaries = self._lists.select(batch.cpu().numpy()), None

    @property
    def bounds(self) -> list[int]:
        """See KeyIndex; where segments end."""
        return list(self._bounds)

    def state(self, first: int, stop: int) -> Arrays:
        """See KeyIndex; a segment's lists."""
        assert self._lists is not None
        return self._lists.segment_state(self._bounds.index(first), first, stop)

    def load_state(self, store: KVStore, lo: Tensor, first: int, stop: int, state: Arrays) -> None:
        """See KeyIndex."""
        target = segment_bounds(stop)
        if target != [*self._bounds, stop] or stop > len(store) - self._window:
            raise ValueError(f"rows {first} to {stop} are not a segment after {self._bounds} within {len(store)} rows")
        if self._lists is None:
            self._lists = Lists(len(lo), store.num_kv_heads, store.head_dim, store.value_dim)
        self._lists.load_segment(target, len(store), lo.cpu().numpy(), state)
        self._bounds = target

    @property
    def nbytes(self) -> int:
        """See KeyIndex; the part in use."""
        return 0 if self._lists is None else self._lists.nbytes(len(self), len(self._bounds) - 1)

    def describe(self) -> dict[str, Any]:
        """See KeyIndex."""
        lists = 0 if self._lists is None else int(self._lists.count[0, 0])
        return {"index": self.name, "rows": len(self), "segments": len(self._bounds) - 1, "lists": lists}

    def _attend_fused(self, query: Tensor, store: KVStore, length: int, how: Reading) -> ListAnswer:
        lists, kernels = self._lists, _fused_kernels()
        assert lists is not None
        batch, heads, dim = query.shape
        value_dim = store.value_dim
        read, opened = budget(len(self), how.k)
        kv_heads = store.num_kv_heads
        workspace, stats = lists.workspace(heads)
        out, lses = torch.empty(batch, heads, value_dim), torch.empty(4, batch, heads)
        lse, by_source = lses[0], lses[1:]
        lses_out, asked = lses.numpy(), query.detach().float().contiguous().numpy()
        began = time.perf_counter()
        kernels.attend_lists(
            asked, *self._flat_buffers(store), store.start.numpy(), how.n_sink, len(self), length,
            lists.begin, lists.size, lists.variance, lists.key, lists.value, lists.count,
            lists.super_first, lists.super_size, lists.super_variance, lists.super_key, lists.super_value,
            lists.super_count, lists.shape, lists.cross, np.float32(how.scale),
            np.float32(how.softcap or 0.0), np.float32(ALPHA), np.float32(BETA), opened * kv_heads, read * kv_heads,
            how.tail, kernels.use_torchs_threads(),
            *kernels.lanes(heads // kv_heads, dim, value_dim), *workspace,
            out.numpy(), lses_out[0], lses_out[1:], stats,
        )  # fmt: skip
        took = time.perf_counter() - began
        counts = stats[0] if batch == 1 else stats.sum(axis=0)
        rows, lists_read, scored_lists, scored_supers, *cycles, values_read = counts.tolist()
        share = took / max(1, sum(cycles))
        deviation = None
        if how.want_deviation:
            deviation = torch.empty(batch, heads)
            kernels.unread_deviation(
                asked, lists.shape, np.float32(how.scale), *lists.unread(workspace), stats, lses_out[3], lses_out[0],
                deviation.numpy(),
            )  # fmt: skip
            deviation = deviation[..., None]
        slots = unread = None
        if how.want_slots:
            slots, unread = lists.chosen_slots(heads)[:, :, None], torch.zeros(batch, heads, len(self))
            if how.tail:
                unread = lists.unread_weights(heads, len(self))
                unread *= torch.exp(by_source[2] - lse).nan_to_num()[..., None] / unread.sum(-1, True).clamp(min=1e-30)
        return ListAnswer(
            out[:, :, None],
            lse[:, :, None],
            by_source[..., None],
            rows / (batch * kv_heads),
            lists_read,
            scored_lists + scored_supers,
            values_read,
            (cycles[0] * share, cycles[1] * share, cycles[2] * share) if sum(cycles) else (0.0, took, 0.0),
            deviation,
            slots,
            unread,
        )

    def _flat_buffers(self, store: KVStore) -> tuple[Any, ...]:
        """The store's buffers as the kernels take them; made anew only when the store has grown."""
        buffers = store.buffers
        if self._flat is None or self._flat[0] is not buffers[0]:
            flat_rows = _fused_kernels().flat_rows
            self._flat = buffers[0], (*flat_rows(buffers[0]), *flat_rows(buffers[1]))
        return self._flat[1]

    def _attend_portable(self, query: Tensor, store: KVStore, length: int, how: Reading) -> ListAnswer:
        """The same on any device: every list is scored, and the pieces are index_kernels' own."""
        assert self._lists is not None
        query = query[:, :, None]
        keys, values = (rows[:, :, :length] for rows in store.rows)
        if self._summaries is None:
            self._summaries = self._lists.summaries(query.device)
        lists = self._summaries
        began, scale, softcap = time.perf_counter(), how.scale, how.softcap
        ranges = exact_ranges(query, length - 1, store.start, len(self), how.n_sink)
        exact = attend_rows(query, keys, values, ranges=ranges, scale=scale, softcap=softcap)
        scanned = time.perf_counter()
        logits, spread = summary_logits(query, lists, scale=scale, softcap=softcap, alpha=ALPHA)
        read = budget(len(self), how.k)[0] * store.num_kv_heads
        chosen = probe_lists(logits, spread, lists, exact[1][..., 0], read)
        outs, lses = attend_lists(
            query, keys, values, lists, chosen, logits, scale=scale, softcap=softcap, beta=BETA, tail=how.tail
        )
        outs, lses = torch.cat([exact[0][None], outs]), torch.cat([exact[1][None], lses])
        rows = float((lists.size * chosen).sum()) / chosen.shape[0] / chosen.shape[1]
        seconds = scanned - began, time.perf_counter() - scanned, 0.0
        out, lse = merge_states(outs, lses)
        deviation = None
        if how.want_deviation:
            deviation = unread_deviation(logits, spread, lists, chosen, lse[..., 0])[..., None]
        slots = unread = None
        if how.want_slots:
            slots = list_slots(lists.begin, lists.size, chosen, query.shape[1])[:, :, None]
            unread = torch.zeros(*lse.shape[:2], len(self), device=query.device)
            if how.tail:
                weights = torch.exp(logits - lse).nan_to_num()
                unread = summary_weights(lists.begin, lists.size, chosen, weights, len(self))
        scored, taken = chosen.numel(), int(chosen.sum())
        summaries = scored - taken if how.tail else 0
        return ListAnswer(out, lse, lses, rows, taken, scored, summaries, seconds, deviation, slots, unread)

    def _shared_segments(self, target: list[int]) -> int:
        """How many leading segments the present and the target bounds share."""
        shared = 0
        for ours, theirs in zip(self._bounds[1:], target[1:], strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared

    def _unseal(self, store: KVStore, lo: Tensor, keep: int) -> None:
        """Return the segments after the first ``keep`` to hot rows in the order of their positions."""
        if keep + 1 >= len(self._bounds):
            return
        check_fork()
        from index_kernels._cpu_seal import unseal_rows

        assert self._lists is not None
        store.touch(self._bounds[keep])
        bounds = np.asarray(self._bounds[keep:], np.int64)
        with _on_host(store, self._bounds[keep], self._bounds[-1]) as (keys, values):
            unseal_rows(keys, values, self._lists.positions, lo.cpu().numpy(), 0, bounds)
        self._bounds, self._summaries = self._bounds[: keep + 1], None
        self._lists.keep_segments(keep)

    @property
    def summary_bytes(self) -> int:
        """Bytes of one list's summary, its mean value included."""
        assert self._lists is not None
        return self._lists.summary_bytes


@contextmanager
def _on_host(store: KVStore, first: int, stop: int) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The store's buffers as numpy arrays, whose rows ``first .. stop`` may be changed inside the block."""
    from index_kernels._cpu_common import numpy_bits

    buffers = store.buffers
    if buffers[0].device.type == "cpu":
        yield numpy_bits(buffers[0]), numpy_bits(buffers[1])
        return
    host = [torch.empty(buffer.shape, dtype=buffer.dtype) for buffer in buffers]
    for copy, buffer in zip(host, buffers, strict=True):
        copy[:, :, first:stop] = buffer[:, :, first:stop].cpu()
    yield numpy_bits(host[0]), numpy_bits(host[1])
    for copy, buffer in zip(host, buffers, strict=True):
        buffer[:, :, first:stop] = copy[:, :, first:stop].to(buffer.device)


@cache
def _fused_kernels() -> SimpleNamespace:
    """The Numba kernels, imported when first needed."""
    from index_kernels._cpu_attend_lists import attend_lists
    from index_kernels._cpu_common import flat_rows, use_torchs_threads
    from index_kernels._cpu_unread import unread_deviation
    from index_kernels._cpu_vectors import lanes

    return SimpleNamespace(
        attend_lists=attend_lists,
        unread_deviation=unread_deviation,
        flat_rows=flat_rows,
        use_torchs_threads=use_torchs_threads,
        lanes=lru_cache(lanes),
    )


def _require_numba() -> None:
    if find_spec("numba") is None:
        raise ImportError('index="segmented" needs Numba: pip install "dbattn[cpu]"; index="flat" works without it')
