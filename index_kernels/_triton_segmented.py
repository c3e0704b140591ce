"""attend_segmented in Triton: a few launches, no wait for the device.

Lists are opened whole: on a GPU rows are cheap and choosing is not, so the codes of rows are not read. What is opened
are the lists of highest cost within a budget. A histogram of costs makes the cut: lists of the bin at the threshold
stay unread. Where rows are dear, which lie in the host's memory, the rows of opened lists are chosen by their codes
likewise. Of many rows super-lists are ranked first, and only the lists of the best ones.
"""

from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_coded_kernels import COPIED, attend_coded_kernel, choose_kernel
from ._triton_common import device_of, dot_type, whole_type
from ._triton_row_cache import FREE, RowCache
from ._triton_segmented_kernels import (
    BINS,
    HELD_BITS,
    HISTOGRAMS,
    MOST_HOT_PARTS,
    MOST_PARTS,
    OF_LISTS,
    OF_SUPERS,
    attend_kernel,
    lay_kernel,
    merge_kernel,
    rank_kernel,
    score_kernel,
    score_named_kernel,
)
from .lists import weights_by_place
from .packed import SCALE_BYTES, row_dim, scales, turned_for_codes
from .summaries import (
    CODE_PLANES,
    MANY_ROWS,
    PLANES,
    ROW_CACHE,
    Array,
    ListArrays,
    ListReading,
    ListTable,
    SegmentedAnswer,
    SuperListArrays,
)

# Programs per multiprocessor: of those that score summaries; that read opened lists and summaries; that choose rows by
# code. What was fastest on an H100.
SCORING, READING, CHOOSING = 2, 6, 6
# What an entry that answers by its summary costs beside a row that is read.
SUMMARY_COST = 0.7
# The device has copies of so many times the rows in the host's memory that a step reads, or of this share of all rows.
COPIES, MOST_COPIED = 16, 0.25
# Lists of a table are in room for a multiple of this; lists that a program ranks, and lays out, of so many programs for
# a unit at most; numbers that a program merges.
BLOCK_LISTS, BLOCK_RANKED, BLOCK_LAID, MOST_PROGRAMS, MERGED = 64, 512, 256, 16, 32
LISTS_PER_SUPER_LIST, ROWS_PER_LIST = 16, 32
# Rows that come, about, while a CUDA graph that has been captured serves.
TO_COME = 128


@dataclass(frozen=True)
class Level:
    """Lists, or super-lists, ``[B, Hkv, room, ...]`` on a device: int8 means with their scales apart.

    ``begin`` and ``held``: the rows of a list, or the lists of a super-list; ``size`` counts rows. Room is a multiple
    of 64, unused entries hold nothing. ``used``: entries in all.
    """

    used: int
    begin: Tensor
    held: Tensor
    size: Tensor
    variance: Tensor
    key: Tensor
    key_scale: Tensor
    value: Tensor
    value_scale: Tensor

    @property
    def room(self) -> int:
        """Entries per KV head there is room for."""
        return self.size.shape[2]

    @classmethod
    def of(
        cls, arrays: ListArrays | SuperListArrays, device: torch.device, before: "Level | None" = None, first: int = 0
    ) -> "Level":
        """Entries from ``first`` on are copied to the device; those before are ``before``'s, which is used up."""
        most = int(arrays.used.max())
        room = max(BLOCK_LISTS, most + -most % BLOCK_LISTS)
        if before is not None:
            # More are to come where some came before.
            room = before.room if room <= before.room <= room + BLOCK_LISTS else room + BLOCK_LISTS
        used = torch.arange(first, room) < torch.from_numpy(arrays.used)[..., None]

        def plane(array: Array) -> Tensor:
            rows = torch.from_numpy(array[:, :, first:room])
            padded = rows.new_zeros((*rows.shape[:2], room - first, *rows.shape[3:]))
            padded[:, :, : rows.shape[2]] = rows
            return padded

        size = plane(arrays.size) * used
        if isinstance(arrays, ListArrays):
            begin, held = plane(arrays.begin), size
        else:
            begin, held = plane(arrays.first), plane(np.diff(arrays.first, axis=2)) * used
        key, value = plane(arrays.key), plane(arrays.value)
        parts: tuple[Tensor, ...] = (
            begin, held, size, plane(arrays.variance), key[..., :-SCALE_BYTES], scales(key),
            value[..., :-SCALE_BYTES], scales(value),
        )  # fmt: skip
        total = int(arrays.used.sum())
        if before is None:
            return cls(total, *(part.contiguous().to(device) for part in parts))
        kept = [getattr(before, field.name) for field in fields(cls)[1:]]
        return cls(total, *(_changed(*each, first, room) for each in zip(kept, parts, strict=True)))


@dataclass(frozen=True)
class Planes:
    """The lists of a table on a device, and its covariances, float16."""

    lists: Level
    supers: Level
    shape: Tensor
    cross: Tensor

    @classmethod
    def of(cls, table: ListTable, device: torch.device) -> "Planes":
        """Copied for each table, but for what the table before it had copied."""
        moments = [torch.from_numpy(bits).view(torch.float16).to(device) for bits in (table.shape, table.cross)]
        found = table.taken_over(device, PLANES)
        if found is None:
            return cls(Level.of(table.lists, device), Level.of(table.supers, device), *moments)
        kept, stands = found
        lists = Level.of(table.lists, device, kept.lists, int(stands.lists.min()))
        return cls(lists, Level.of(table.supers, device, kept.supers, int(stands.supers.min())), *moments)


@dataclass(frozen=True)
class CodePlanes:
    """The codes of rows on a device: two numbers a byte ``[B, Hkv, T, (D + 1) // 2]``, and the scales apart."""

    numbers: Tensor
    steps: Tensor

    @classmethod
    def of(cls, table: ListTable, device: torch.device) -> "CodePlanes":
        """Copied for each table, but for what the table before it had copied."""
        found = table.taken_over(device, CODE_PLANES)
        if found is None:
            codes = torch.from_numpy(table.codes).to(device)
            return cls(codes[..., :-SCALE_BYTES].contiguous(), scales(codes))
        kept, stands = found
        first = int(table.lists.row_after(stands.lists).min())
        stop = int(table.lists.row_after(table.lists.used).max())
        codes, room = torch.from_numpy(table.codes[:, :, first:stop]).to(device), table.codes.shape[2]
        numbers = _changed(kept.numbers, codes[..., :-SCALE_BYTES], first, room)
        return cls(numbers, _changed(kept.steps, scales(codes), first, room))


def _changed(kept: Tensor, part: Tensor, first: int, room: int) -> Tensor:
    """``kept [B, Hkv, n, ...]`` with ``part`` from ``first`` on: itself where it has the room, else a copy."""
    if kept.shape[2] != room:
        kept, before = kept.new_zeros(*kept.shape[:2], room, *kept.shape[3:]), kept
        kept[:, :, :first] = before[:, :, :first]
    kept[:, :, first : first + part.shape[2]] = part
    return kept


@cache
def _turning(dim: int, scale: float, device: torch.device) -> Tensor:
    """``[D, D]``: queries times it are scaled, and turned as codes are."""
    return turned_for_codes(torch.eye(dim)).mul_(scale).to(device)


@dataclass(frozen=True)
class Shape:
    """What a call's buffers depend on: queries ``[B, Hq, 1, D]`` and values of ``value_dim`` numbers.

    ``capacity``: rows under opened lists of a unit at most; ``opened``: expected of a unit.
    """

    query: torch.Size
    value_dim: int
    by_code: bool
    two_level: bool
    capacity: int
    opened: int


class Workspace:
    """What the kernels hand to each other, for one shape of call; ``totals [B]`` counts rows read, over all calls."""

    def __init__(self, call: Shape, planes: Planes, device: torch.device) -> None:
        batch, kv_heads, room = planes.lists.size.shape
        heads, units = call.query[0] * call.query[1], batch * kv_heads
        first = planes.supers if call.two_level else planes.lists

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def count(*shape: int) -> Tensor:
            return new(*shape, dtype=torch.int32)

        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8

        def programs(each: int, most: int) -> int:
            return max(1, min(most, each * processors // units))

        self.parts = programs(SCORING, min(MOST_PARTS, first.room // BLOCK_LISTS))
        self.opening = programs(READING, min(MOST_PARTS // 2, room // BLOCK_LISTS)) if call.two_level else 0
        of_lists = LISTS_PER_SUPER_LIST * planes.supers.room // 8 if call.two_level else room
        reading = programs(READING, room)
        share = of_lists * SUMMARY_COST / (of_lists * SUMMARY_COST + call.opened)
        self.tails = max(1, min(room // BLOCK_LISTS, round(reading * share)))
        self.super_tails = call.two_level * max(1, round(planes.supers.room / of_lists * self.tails))
        if call.by_code:
            self.splits = programs(CHOOSING, room)
        else:
            self.splits = max(1, reading - self.tails - self.super_tails)
        states = self.splits * (1 + call.by_code) + self.tails + self.super_tails + MOST_HOT_PARTS
        self.logits, self.packs = new(heads, room), count(units, room)
        self.super_logits, self.super_packs = self.logits, self.packs
        self.names = self.counts = None
        if call.two_level:
            self.super_logits, self.super_packs = new(heads, first.room), count(units, first.room)
            self.names, self.counts = count(units, room), count(units)
        self.ids, self.ends = count(units, max(1, call.capacity)), count(units)
        self.spread, self.lean = new(heads), new(heads, call.value_dim)
        self.part_lse = new(MOST_PARTS + MOST_HOT_PARTS + MOST_PARTS // 2, heads)
        self.outs, self.lses = new(states, heads, call.value_dim), new(states, heads)
        self.histogram = count(batch, HISTOGRAMS, BINS).zero_()
        self.cut, self.super_cut = count(batch), count(batch)
        self.means = self.wholes = self.owners = None
        if call.by_code:
            self.means, self.wholes, self.owners = new(heads, room), new(heads), torch.empty_like(self.ids)
        # Measured calls are counted apart: their answers say what they read.
        self.totals, self.spare = new(2, batch, dtype=torch.int64).zero_()


def attend_segmented(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: ListTable,
    how: ListReading,
    *,
    start: Tensor,
    budget: int,
    by_code: bool,
    details: bool,
    newest: Tensor | None = None,
) -> SegmentedAnswer:
    """See segmented.attend_segmented; ``budget``: rows under opened lists, KV heads of a batch row together.

    ``by_code``: of these, ``how.rows_read`` are read, and codes answer for the others.

    Without ``details`` the rows read are counted on the device alone.
    """
    batch, heads, _, dim = query.shape
    kv_heads, stored, value_dim = keys.shape[1], keys.shape[2], row_dim(values)
    planes = table.on(query.device, PLANES, Planes.of)
    lists, supers = planes.lists, planes.supers
    two_level = how.sealed >= MANY_ROWS and max(budget, how.rows_opened) < kv_heads * how.sealed
    call = Shape(
        query.shape, value_dim, by_code, two_level, min(budget, how.sealed), min(budget // kv_heads, how.sealed)
    )
    space: Workspace = table.on(query.device, call, lambda *_: Workspace(call, planes, query.device))
    least = 0 if budget >= kv_heads * how.sealed else 1
    hot = how.n_sink + how.length - how.sealed + (0 if newest is None else TO_COME)
    group, room, units = heads // kv_heads, lists.room, batch * kv_heads
    dot = dot_type(query, keys, values)
    packed = torch.int8 in (keys.dtype, values.dtype)
    shapes, scoring, attending = _shapes(dim, value_dim, group, wide=dot == tl.float32, packed=packed)
    hot_parts = max(1, min(MOST_HOT_PARTS, triton.cdiv(hot, scoring["BLOCK"])))
    # States of rows, then of codes, of summaries of lists and of super-lists, of sinks and hot rows.
    first_tail = space.splits * (1 + (by_code and how.tail))
    first_hot = first_tail + (space.tails + space.super_tails if how.tail else 0)
    out = torch.empty((batch, heads, 1, value_dim), dtype=torch.float32, device=query.device)
    lses = torch.empty((5, batch, heads, 1), dtype=torch.float32, device=query.device)
    weights = None if how.head_weights is None else _weights(how.head_weights, query.device)
    asked, cap = query.contiguous(), None if how.softcap is None else float(how.softcap)
    limit, counted = min(stored, how.length), space.spare if details else space.totals
    row_logits: Tensor | None = None
    row_taken: Tensor | None = None
    # In the type that they are multiplied in: to convert them takes each program longer than to read them.
    kind = torch.bfloat16 if dot == tl.bfloat16 else torch.float16
    moments = table.on(query.device, ("moments", kind), lambda *_: (planes.shape.to(kind), planes.cross.to(kind)))
    rows = keys, values, *keys.stride()[:3], *values.stride()[:3]
    first = supers if two_level else lists
    ranking: dict[str, Any] = {
        "GROUP": triton.next_power_of_2(group), "PARTS": 128, "BLOCK": BLOCK_RANKED, "NUM_BINS": BINS, "num_warps": 4,
    }  # fmt: skip
    laying: dict[str, Any] = {"BLOCK": BLOCK_LAID, "CHUNK": 4096, "RUN": 8, "NUM_BINS": BINS, "num_warps": 4}
    part_lse, parts = space.part_lse, space.parts + hot_parts
    with device_of(query):
        began = _now(details and query.is_cuda)
        score_kernel[(units, parts + 1)](
            asked, *rows, start, newest, first.key, first.key_scale, first.variance, first.size, *moments,
            space.super_logits, space.spread, part_lse, space.lean, space.outs, space.lses,
            None if two_level else space.means, float(how.scale), cap, float(how.alpha), float(how.beta), kv_heads,
            group, first.room, batch * heads, space.parts, first_hot, how.sealed, how.length, how.n_sink, DOT=dot,
            **shapes, **scoring,
        )  # fmt: skip
        if two_level:
            rank_kernel[(units, _programs(first.room, BLOCK_RANKED))](
                space.super_logits, first.variance, first.size, first.held, None, None, space.spread, weights, part_lse,
                space.super_packs, space.histogram, None, 0, kv_heads, group, first.room, batch * heads, parts,
                WHICH=OF_SUPERS, **ranking,
            )  # fmt: skip
            lay_kernel[(units, _programs(first.room, BLOCK_LAID))](
                space.super_packs, first.begin, None, None, space.names, None, space.counts, space.histogram,
                space.super_cut, None, how.rows_opened, 0, kv_heads, first.room, room, WHICH=OF_SUPERS, **laying,
            )  # fmt: skip
            part_lse, parts = part_lse[space.parts :], hot_parts + space.opening
            score_named_kernel[(units, space.opening)](
                asked, lists.key, lists.key_scale, lists.variance, lists.size, space.names, space.counts, first.size,
                space.super_packs, space.super_logits, space.super_cut, space.spread, space.logits, space.means,
                part_lse[hot_parts:], float(how.scale), cap, float(how.alpha), kv_heads, group, first.room, room,
                batch * heads, DIM=dim, BLOCK_D=shapes["BLOCK_D"], M=shapes["M"], BLOCK=scoring["BLOCK"], DOT=dot,
                num_warps=scoring["num_warps"], num_stages=1,
            )  # fmt: skip
        rank_kernel[(units, _programs(room, BLOCK_RANKED))](
            space.logits, lists.variance, lists.size, None, space.names, space.counts, space.spread, weights, part_lse,
            space.packs, space.histogram, space.wholes, least, kv_heads, group, room, batch * heads, parts,
            WHICH=OF_LISTS, **ranking,
        )  # fmt: skip
        lay_kernel[(units, _programs(room, BLOCK_LAID))](
            space.packs, lists.begin, space.names, space.counts, space.ids, space.owners, space.ends, space.histogram,
            space.cut, None if by_code else counted, budget, least, kv_heads, room, call.capacity, WHICH=OF_LISTS,
            **laying,
        )  # fmt: skip
        if by_code:
            codes: CodePlanes = table.on(query.device, CODE_PLANES, CodePlanes.of)
            turned = asked.view(-1, dim).float() @ _turning(dim, float(how.scale), query.device)
            if details:
                row_logits = torch.full((batch * heads, limit), float("-inf"), device=query.device)
                row_taken = torch.zeros((units, limit), dtype=torch.int8, device=query.device)
            half = codes.numbers.shape[3]
            sizes = {
                "HALF": half, "BLOCK_H": max(16, triton.next_power_of_2(half)), "NUM_BINS": BINS,
                # Codes are whole numbers, exact in either.
                "CODE": whole_type(),
            }  # fmt: skip
            choosing, reading = _coded_shapes(shapes, wide=dot == tl.float32)
            kept: RowCache | None = None
            if ring := _ring(how, kv_heads, space.splits):
                kept = table.on(
                    query.device, ROW_CACHE, lambda of, on: RowCache.of(of, on, keys, values, space.splits, ring)
                )
            copies, where = ((None, None), (None, None, None, 0)) if kept is None else kept.arguments
            coded = turned, space.means, codes.numbers, codes.steps
            shape = kv_heads, group, room, batch * heads, codes.steps.shape[2], limit, call.capacity
            least_row = 0 if how.rows_read >= budget else 1
            choose_kernel[(units, space.splits)](
                *coded, space.wholes, space.histogram, space.ids, space.owners, space.ends, row_logits, *where,
                cap, least_row, *shape, DIM=dim, M=shapes["M"], **sizes, **choosing,
            )  # fmt: skip
            attend_coded_kernel[(units, space.splits)](
                asked, *rows, *coded, space.names, lists.value, lists.value_scale, space.wholes, space.histogram,
                counted, space.ids, space.owners, space.ends, space.spread, space.lean, space.outs, space.lses,
                row_taken, *copies, *where, float(how.scale), cap, how.rows_read, least_row, *shape, TAIL=how.tail,
                DOT=dot, **shapes, **sizes, **reading,
            )  # fmt: skip
        # Where rows were chosen by code, the lists that were not opened are all that is left.
        done = first_tail if by_code else 0
        if done < first_hot:
            above = (supers.size, supers.variance, supers.value, supers.value_scale) if two_level else (None,) * 4
            ranked = (space.super_logits, space.super_packs, space.super_cut) if two_level else (None,) * 3
            attend_kernel[(units, first_hot - done)](
                asked, *rows, space.ids, space.ends, lists.variance, lists.value, lists.value_scale, space.logits,
                space.packs, space.cut, space.names, space.counts, *above, *ranked, space.lean, space.outs[done:],
                space.lses[done:], float(how.scale), cap, kv_heads, group, first.room, room, batch * heads, limit,
                call.capacity, first_tail - done, space.tails, DOT=dot, **shapes, **attending,
            )  # fmt: skip
        states = first_hot + hot_parts
        merge_kernel[(batch * heads, triton.cdiv(value_dim, MERGED))](
            space.outs, space.lses, out, lses[0], lses[1:], space.histogram, space.splits, first_tail, first_hot,
            states, heads, batch * heads, VALUE_DIM=value_dim, BLOCK_DV=MERGED,
            STATES=max(64, triton.next_power_of_2(states)), NUM_BINS=BINS, num_warps=4,
        )  # fmt: skip
        ended = _now(details and query.is_cuda)
    opened, read = (min(n, kv_heads * how.sealed) * batch for n in (budget, how.rows_read if by_code else budget))
    scored = supers.used + batch * how.rows_opened // ROWS_PER_LIST if two_level else lists.used
    answer = SegmentedAnswer(
        out, lses[0], lses[1:], read, opened * by_code, 0, scored, scored * how.tail,
        (0.0,) * 4, None, None, None if details else space.totals,
    )  # fmt: skip
    return _with_details(answer, planes, space, how, began, ended, row_logits, row_taken) if details else answer


@lru_cache
def _weights(head_weights: tuple[float, ...], device: torch.device) -> Tensor:
    """``[Hq]`` float32 on a device; copied once."""
    return torch.tensor(head_weights, device=device)


def _with_details(
    answer: SegmentedAnswer, planes: Planes, space: Workspace, how: ListReading, began: Any, ended: Any,
    row_logits: Tensor | None, row_taken: Tensor | None,
) -> SegmentedAnswer:  # fmt: skip
    """The answer with what was read, which is asked of the device now."""
    lists, supers = planes.lists, planes.supers
    size, begin = lists.size.long(), lists.begin.long()
    if space.names is not None and space.counts is not None:
        candidate = torch.arange(lists.room, device=size.device) < space.counts.view(*size.shape[:2], 1)
        names = space.names.view_as(size).long().where(candidate, 0)
        size, begin = size.gather(2, names) * candidate, begin.gather(2, names)

    def unread_by_place(logits: Tensor, begin: Tensor, size: Tensor, opened: Tensor) -> Tensor:
        weights = torch.exp(logits.view(*answer.lse.shape[:2], -1) - answer.lse).nan_to_num()
        return weights_by_place(begin, size * ~opened * how.tail, weights, how.sealed)

    opened = ((space.packs >> HELD_BITS).view_as(size) >= space.cut[:, None, None]) & (size > 0)
    ones = torch.ones_like(size, dtype=torch.float32)
    under = taken = weights_by_place(begin, size * opened, ones, how.sealed) > 0
    unread = unread_by_place(space.logits, begin, size, opened)
    scored, left = int((size > 0).sum()), 0
    if space.names is not None:
        held = (space.super_packs >> HELD_BITS).view_as(supers.size) >= space.super_cut[:, None, None]
        rows_begin = lists.begin.long().gather(2, supers.begin.long())
        unread += unread_by_place(space.super_logits, rows_begin, supers.size.long(), held)
        scored, left = scored + supers.used, int(((supers.size > 0) & held).sum())
    if row_logits is not None and row_taken is not None:
        taken = row_taken.view(*size.shape[:2], -1)[..., : how.sealed] > 0
        coded = torch.exp(row_logits.view(*answer.lse.shape[:2], -1)[..., : how.sealed] - answer.lse).nan_to_num()
        unread += coded * ~taken.repeat_interleave(coded.shape[1] // taken.shape[1], dim=1) * how.tail
    seconds = 0.0
    if ended is not None:
        ended.synchronize()
        seconds = began.elapsed_time(ended) / 1e3
    opened_lists, coded_rows = int(opened.sum()), int(under.sum()) * (row_taken is not None)
    return answer._replace(
        rows_read=int(taken.sum()), rows_coded=coded_rows, lists_opened=opened_lists, summaries_read=scored,
        values_read=(scored - left - opened_lists * (coded_rows == 0)) * how.tail, seconds=(0.0, seconds, 0.0, 0.0),
        taken=taken, unread=unread, copies_read=0 if row_taken is None else int((row_taken == COPIED).sum()),
    )  # fmt: skip


def _ring(how: ListReading, kv_heads: int, rings: int) -> int:
    """Copies that each of the ``rings`` of a KV head has room for, see _triton_row_cache.py; 0: none are made."""
    wanted = min(COPIES * how.rows_read // kv_heads, int(MOST_COPIED * how.sealed))
    return triton.cdiv(wanted // rings + FREE, 32) * 32 if COPIES else 0


def _programs(room: int, block: int) -> int:
    return min(MOST_PROGRAMS, -(-room // block))


def _now(wanted: bool) -> Any:
    if not wanted:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _shapes(dim: int, value_dim: int, group: int, *, wide: bool, packed: bool) -> tuple[dict[str, int], ...]:
    """Block sizes for rows of these widths: of both kernels that read them, of score_kernel, of attend_kernel.

    What keeps the kernels from spilling registers; ``wide``: rows are multiplied as float32, ``packed``: once unpacked.
    """
    block_d, block_dv = (max(16, triton.next_power_of_2(width)) for width in (dim, value_dim))
    heads = max(16, triton.next_power_of_2(group))
    shapes = {"DIM": dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "M": heads}
    narrow, large = max(block_d, block_dv) <= 64, max(block_d, block_dv) > 128
    columns = 16 if wide else min(block_dv, block_d, 16384 // block_d)
    scoring = {
        "COLUMNS": columns,
        "BLOCK": 32 if wide or large else 64,
        "num_warps": 4,
        "num_stages": 1,
    }
    attending = {
        "BLOCK": 16 if wide and not narrow else 32 if wide or large else 64,
        "SUMMARIES": 32 if wide or large else 64,
        "num_warps": 4,
        "num_stages": 1 if wide or large else 2 if (dim, value_dim) != (block_d, block_dv) else 3,
    }
    if wide and not narrow:
        attending |= {"num_warps": 8}
    elif block_d == block_dv == 128 and not wide and not packed:
        attending |= {"maxnreg": 128}  # so that four programs share a processor
    if wide and large:
        scoring |= {"BLOCK": 16, "num_warps": 8}
    return shapes, scoring, attending


def _coded_shapes(shapes: dict[str, int], *, wide: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes of choose_kernel and of attend_coded_kernel."""
    width = max(shapes["BLOCK_D"], shapes["BLOCK_DV"])
    usual = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}
    choosing = usual if width > 128 else usual | {"BLOCK": 64}
    return choosing, usual if width <= (64 if wide else 128) else usual | {"BLOCK": 16, "num_warps": 8}
