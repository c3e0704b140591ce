"""attend_segmented in Triton: a few launches, no wait for the device.

Lists are opened whole: on a GPU rows are cheap and choosing is not, so the codes of rows are not read. What is opened
are the lists of highest cost within a budget. A histogram of costs makes the cut: lists of the bin at the threshold
stay unread. Where rows are dear, which lie in the host's memory, the rows of opened lists are chosen by their codes
likewise.
"""

import os
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_coded_kernels import attend_coded_kernel, choose_kernel
from ._triton_common import device_of
from ._triton_segmented_kernels import (
    BINS,
    COPIES,
    MOST_HOT_PARTS,
    MOST_PARTS,
    MOST_SPLITS,
    MOST_TAILS,
    STATES,
    attend_kernel,
    merge_kernel,
    rank_kernel,
    score_kernel,
)
from .lists import weights_by_place
from .packed import SCALE_BYTES, scales, turned_for_codes
from .summaries import Array, ListReading, ListTable, SegmentedAnswer

MANY_LISTS = 8192
# Splits of opened lists whose rows are chosen by code: each has two states.
MOST_CODED_SPLITS, CODED_PROGRAMS = 196, 16
# Programs per multiprocessor: what was fastest on an H100.
PROGRAMS = 8
# Lists of a table are in room for a multiple of this; lists of a run; lists that a program ranks; numbers that one
# merges.
BLOCK_LISTS, RUN, BLOCK_RANKED, MERGED = 64, 1, 512, 32
DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Planes:
    """The lists of a table on a device: int8 means with their scales apart, in room for a multiple of 64 lists.

    ``used``: lists in all.
    """

    used: int
    begin: Tensor
    size: Tensor
    variance: Tensor
    key: Tensor
    key_scale: Tensor
    value: Tensor
    value_scale: Tensor
    shape: Tensor
    cross: Tensor

    @classmethod
    def of(cls, table: ListTable, device: torch.device) -> "Planes":
        """Copied once for each table."""
        lists, most = table.lists, int(table.lists.used.max())
        room = max(BLOCK_LISTS, most + -most % BLOCK_LISTS)
        used = torch.arange(room) < torch.from_numpy(lists.used)[..., None]

        def plane(array: Array) -> Tensor:
            rows = torch.from_numpy(array[:, :, :room])
            padded = rows.new_zeros((*rows.shape[:2], room, *rows.shape[3:]))
            padded[:, :, : rows.shape[2]] = rows
            return padded

        key, value = plane(lists.key), plane(lists.value)
        parts: tuple[Tensor, ...] = (
            plane(lists.begin), plane(lists.size) * used, plane(lists.variance),
            key[..., :-SCALE_BYTES], scales(key), value[..., :-SCALE_BYTES], scales(value),
            torch.from_numpy(table.shape).view(torch.float16), torch.from_numpy(table.cross).view(torch.float16),
        )  # fmt: skip
        return cls(int(lists.used.sum()), *(part.contiguous().to(device) for part in parts))


@dataclass(frozen=True)
class CodePlanes:
    """The codes of rows on a device: two numbers a byte ``[B, Hkv, T, (D + 1) // 2]``, and the scales apart."""

    numbers: Tensor
    steps: Tensor

    @classmethod
    def of(cls, table: ListTable, device: torch.device) -> "CodePlanes":
        """Copied once for each table."""
        codes = torch.from_numpy(table.codes).to(device)
        return cls(codes[..., :-SCALE_BYTES].contiguous(), scales(codes))


@cache
def _turning(dim: int, scale: float, device: torch.device) -> Tensor:
    """``[D, D]``: queries times it are scaled, and turned as codes are."""
    return turned_for_codes(torch.eye(dim)).mul_(scale).to(device)


class Workspace:
    """What the kernels hand to each other, for one shape of call; ``totals [B]`` counts rows read, over all calls."""

    def __init__(self, query: Tensor, planes: Planes, value_dim: int, by_code: bool) -> None:
        batch, kv_heads, room = planes.size.shape
        heads, device = query.shape[0] * query.shape[1], query.device
        units = batch * kv_heads

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        processors = torch.cuda.get_device_properties(device).multi_processor_count if query.is_cuda else 2
        programs = -(-(CODED_PROGRAMS if by_code else PROGRAMS) * processors // units) // (1 + (room > MANY_LISTS))
        self.parts = max(1, min(MOST_PARTS, programs, room // BLOCK_LISTS))
        self.splits = max(1, min(MOST_CODED_SPLITS if by_code else MOST_SPLITS, programs, room // RUN))
        self.tails = max(1, min(MOST_TAILS, programs, room // BLOCK_LISTS))
        states = self.splits * (1 + by_code) + self.tails + MOST_HOT_PARTS
        self.logits = new(heads, room)
        self.bins = new(units, room, dtype=torch.int32)
        self.spread, self.lean = new(heads), new(heads, value_dim)
        self.part_lse = new(MOST_PARTS + MOST_HOT_PARTS, heads)
        self.outs, self.lses = new(states, heads, value_dim), new(states, heads)
        # Programs that add to a bin wait for each other: many do among many lists.
        self.copies = COPIES if room > MANY_LISTS else 1
        self.histogram = new(batch, self.copies, BINS, dtype=torch.int32).zero_()
        self.ticket, self.cut = new(batch, dtype=torch.int32).zero_(), new(batch, dtype=torch.int32)
        self.means = new(heads, room) if by_code else None
        self.wholes = new(heads) if by_code else None
        self.row_cut = new(batch, dtype=torch.int32)
        # Measured calls are counted apart: their answers say what they read. So are rows of lists that are opened only.
        self.totals, self.spare = new(2, batch, dtype=torch.int64).zero_()
        self.opened = new(batch, dtype=torch.int64).zero_()


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
) -> SegmentedAnswer:
    """See segmented.attend_segmented; ``budget``: rows under opened lists, KV heads of a batch row together.

    ``by_code``: of these, ``how.rows_read`` are read, and codes answer for the others.

    Without ``details`` the rows read are counted on the device alone.
    """
    if keys.dtype == torch.int8 or values.dtype == torch.int8:
        raise ValueError("packed int8 rows are read on the CPU only: use float16 rows on a GPU")
    batch, heads, _, dim = query.shape
    kv_heads, stored, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    planes = table.on(query.device, "planes", Planes.of)
    space: Workspace = table.on(
        query.device, ("workspace", query.shape, by_code), lambda *_: Workspace(query, planes, value_dim, by_code)
    )
    everything = budget >= kv_heads * how.sealed
    hot = how.n_sink + how.length - how.sealed
    group, room, units = heads // kv_heads, planes.size.shape[2], batch * kv_heads
    dot = _dot_type(query, keys, values)
    shapes, scoring, attending = _shapes(dim, value_dim, group, wide=dot == tl.float32)
    hot_parts = max(1, min(MOST_HOT_PARTS, triton.cdiv(hot, scoring["BLOCK"])))
    # States of rows, then of codes, of summaries, of sinks and hot rows.
    first_tail = space.splits * (1 + (by_code and how.tail))
    first_hot = first_tail + (space.tails if how.tail else 0)
    out = torch.empty((batch, heads, 1, value_dim), dtype=torch.float32, device=query.device)
    lses = torch.empty((5, batch, heads, 1), dtype=torch.float32, device=query.device)
    weights = None if how.head_weights is None else _weights(how.head_weights, query.device)
    asked, cap = query.contiguous(), None if how.softcap is None else float(how.softcap)
    limit, counted = min(stored, how.length), space.spare if details else space.totals
    row_logits: Tensor | None = None
    row_taken: Tensor | None = None
    rows = keys, values, *keys.stride()[:3], *values.stride()[:3]
    with device_of(query):
        began = _now(details and query.is_cuda)
        score_kernel[(units, space.parts + hot_parts + 1)](
            asked, *rows, start, planes.key, planes.key_scale, planes.variance, planes.size, planes.shape, planes.cross,
            space.logits, space.spread, space.part_lse, space.lean, space.outs, space.lses, space.means,
            float(how.scale), cap, float(how.alpha), float(how.beta), kv_heads, group, room, batch * heads, space.parts,
            first_hot, how.sealed, how.length, how.n_sink, DOT=dot, **shapes, **scoring,
        )  # fmt: skip
        rank_kernel[(units, triton.cdiv(room, BLOCK_RANKED))](
            space.logits, planes.variance, planes.size, space.spread, weights, space.part_lse, space.bins,
            space.histogram, space.ticket, space.cut, space.opened if by_code else counted, space.wholes, budget,
            0 if everything else 1, kv_heads, group, room, batch * heads,
            space.parts + hot_parts, GROUP=triton.next_power_of_2(group), PARTS=128, BLOCK=BLOCK_RANKED,
            NUM_BINS=BINS, COPIES=space.copies, num_warps=4,
        )  # fmt: skip
        if by_code:
            codes: CodePlanes = table.on(query.device, "code planes", CodePlanes.of)
            turned = asked.view(-1, dim).float() @ _turning(dim, float(how.scale), query.device)
            if details:
                row_logits = torch.full((batch * heads, limit), float("-inf"), device=query.device)
                row_taken = torch.zeros((units, limit), dtype=torch.int8, device=query.device)
            half = codes.numbers.shape[3]
            sizes = {
                "HALF": half, "BLOCK_H": max(16, triton.next_power_of_2(half)), "NUM_BINS": BINS,
                # Codes are whole numbers, exact in either.
                "CODE": tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16,
            }  # fmt: skip
            choosing, reading = _coded_shapes(shapes, wide=dot == tl.float32)
            coded = turned, space.means, codes.numbers, codes.steps, planes.begin, planes.size
            shape = kv_heads, group, room, batch * heads, codes.steps.shape[2], limit
            choose_kernel[(units, space.splits)](
                *coded, space.bins, space.cut, space.wholes, space.histogram, space.ticket, space.row_cut, counted,
                row_logits, cap, how.rows_read, 0 if how.rows_read >= budget else 1, *shape, DIM=dim, M=shapes["M"],
                COPIES=space.copies, **sizes, **choosing,
            )  # fmt: skip
            attend_coded_kernel[(units, space.splits)](
                asked, *rows, *coded, planes.value, planes.value_scale, space.bins, space.cut, space.wholes,
                space.row_cut, space.spread, space.lean, space.outs, space.lses, row_taken, float(how.scale), cap,
                *shape, TAIL=how.tail, DOT=dot, **shapes, **sizes, **reading,
            )  # fmt: skip
        # Where rows were chosen by code, the lists that were not opened are all that is left.
        done = first_tail if by_code else 0
        if done < first_hot:
            attend_kernel[(units, first_hot - done)](
                asked, *rows, planes.begin, planes.size, planes.variance, planes.value, planes.value_scale,
                space.logits, space.bins, space.cut, space.lean, space.outs[done:], space.lses[done:],
                float(how.scale), cap,
                kv_heads, group, room, batch * heads, limit, first_tail - done, RUN=RUN, DOT=dot,
                **shapes, **attending,
            )  # fmt: skip
        merge_kernel[(batch * heads, triton.cdiv(value_dim, MERGED))](
            space.outs, space.lses, out, lses[0], lses[1:], space.splits, first_tail, first_hot,
            first_hot + hot_parts, batch * heads,
            VALUE_DIM=value_dim, BLOCK_DV=MERGED,
            STATES=STATES if first_hot + hot_parts <= STATES else 2 * STATES, num_warps=4,
        )  # fmt: skip
        ended = _now(details and query.is_cuda)
    opened, read = (min(n, kv_heads * how.sealed) * batch for n in (budget, how.rows_read if by_code else budget))
    answer = SegmentedAnswer(
        out, lses[0], lses[1:], read, opened * by_code, 0, planes.used, planes.used * how.tail,
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
    size, begin = planes.size.long(), planes.begin.long()
    opened = (space.bins.view_as(size) >= space.cut[:, None, None]) & (size > 0)
    ones = torch.ones_like(size, dtype=torch.float32)
    under = taken = weights_by_place(begin, size * opened, ones, how.sealed) > 0
    weights = torch.exp(space.logits.view(*answer.lse.shape[:2], -1) - answer.lse).nan_to_num()
    unread = weights_by_place(begin, size * ~opened * how.tail, weights, how.sealed)
    if row_logits is not None and row_taken is not None:
        taken = row_taken.view(*size.shape[:2], -1)[..., : how.sealed] > 0
        coded = torch.exp(row_logits.view(*answer.lse.shape[:2], -1)[..., : how.sealed] - answer.lse).nan_to_num()
        unread += coded * ~taken.repeat_interleave(coded.shape[1] // taken.shape[1], dim=1) * how.tail
    seconds = 0.0
    if ended is not None:
        ended.synchronize()
        seconds = began.elapsed_time(ended) / 1e3
    lists, scored, coded_rows = int(opened.sum()), int((size > 0).sum()), int(under.sum()) * (row_taken is not None)
    return answer._replace(
        rows_read=int(taken.sum()), rows_coded=coded_rows, lists_opened=lists, summaries_read=scored,
        values_read=(scored - lists * (coded_rows == 0)) * how.tail, seconds=(0.0, seconds, 0.0, 0.0), taken=taken,
        unread=unread,
    )  # fmt: skip


def _now(wanted: bool) -> Any:
    if not wanted:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _shapes(dim: int, value_dim: int, group: int, *, wide: bool) -> tuple[dict[str, int], ...]:
    """Block sizes for rows of these widths: of both kernels that read them, of score_kernel, of attend_kernel.

    What keeps the kernels from spilling registers; ``wide``: rows are multiplied as float32.
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
        "BLOCK": 16 if wide and not narrow else 32,
        "LISTS": 32,
        "SUMMARIES": 32,
        "num_warps": 4,
        "num_stages": 1 if wide or large else 2 if (dim, value_dim) != (block_d, block_dv) else 3,
    }
    if wide and not narrow:
        attending |= {"num_warps": 8}
    if wide and large:
        scoring |= {"BLOCK": 16, "num_warps": 8}
    return shapes, scoring, attending


def _coded_shapes(shapes: dict[str, int], *, wide: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes of choose_kernel and of attend_coded_kernel."""
    width = max(shapes["BLOCK_D"], shapes["BLOCK_DV"])
    usual = {"BLOCK": 32, "LISTS": 32, "num_warps": 4, "num_stages": 1}
    choosing = usual if width > 128 else usual | {"BLOCK": 64}
    return choosing, usual if width <= (64 if wide else 128) else usual | {"BLOCK": 16, "num_warps": 8}


def _dot_type(*tensors: Tensor) -> Any:
    """In which type rows are multiplied: their own where it is one, on a device; Triton's interpreter knows float32."""
    kinds = {tensor.dtype for tensor in tensors}
    narrow = len(kinds) == 1 and os.environ.get("TRITON_INTERPRET") != "1"
    return DOT_TYPES[kinds.pop()] if narrow else tl.float32
