"""Copies on a GPU of rows in the host's memory: those that the latest tokens read.

Tokens that follow each other read much the same rows. Each program that reads rows, of a fixed number for a KV head,
copies what it fetched over PCIe into a ring of its own, whose oldest copies give way; ``slots`` says of each row
whether and where there is a copy. A copy is made by the program that reads the row, and gives way in the kernel before,
when no program reads: so none waits for another, nothing is decided by which comes first, and an answer has the same
bits with copies and without. Rows that are moved, as lists change, lose theirs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_common import load_rows, scaled
from .packed import SCALE_BYTES
from .summaries import ROW_CACHE, ListTable

# Copies that a program makes in a step at most; so many of its ring are empty in each.
FREE = 16
_FREE, _SCALE_BYTES = tl.constexpr(FREE), tl.constexpr(SCALE_BYTES)


@dataclass(frozen=True)
class RowCache:
    """Copies of rows: ``keys`` and ``values [units, rings, ring, ...]`` as they are stored, units being KV heads.

    ``slots [units, T]``: the place of a row's copy among those of its unit; ``rows [units, rings, ring]``: the row of
    which a copy is; -1 where there is none. ``hands [units, rings]``: the oldest place of each ring.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    rows: Tensor
    hands: Tensor

    @classmethod
    def of(
        cls, table: ListTable, device: torch.device, keys: Tensor, values: Tensor, rings: int, ring: int
    ) -> "RowCache":
        """An empty one for rows like these; or that of the table before, less copies of rows that were moved since.

        ``ring``: copies that each ring is to have room for; half as many will do.
        """
        units, rows = keys.shape[0] * keys.shape[1], table.codes.shape[2]
        found = table.taken_over(device, ROW_CACHE)
        if found is not None and found[0].rows.shape[:2] == (units, rings) and found[0].rows.shape[2] >= ring // 2:
            kept: RowCache = found[0]
            stands = found[1]
            return kept.without(torch.from_numpy(table.lists.row_after(stands.lists)).to(device).view(units), rows)

        def none(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        def copies(of: Tensor) -> Tensor:
            return torch.zeros(units, rings, ring, of.shape[3], dtype=of.dtype, device=device)

        hands = torch.zeros(units, rings, dtype=torch.int32, device=device)
        return cls(copies(keys), copies(values), none(units, rows), none(units, rings, ring), hands)

    @property
    def arguments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, int]]:
        """Keys and values, and what else kernels take."""
        return (self.keys, self.values), (self.slots, self.rows, self.hands, self.rows.shape[2])

    def without(self, first: Tensor, rows: int) -> "RowCache":
        """Less the copies of rows from ``first [units]`` on, and with place for ``rows`` rows."""
        place = torch.arange(self.slots.shape[1], device=first.device)
        self.slots.masked_fill_(place >= first[:, None], -1)
        self.rows.masked_fill_(self.rows >= first[:, None, None], -1)
        if rows == (before := self.slots.shape[1]):
            return self
        slots = self.slots.new_full((len(self.slots), rows), -1)
        slots[:, : min(before, rows)] = self.slots[:, :rows]
        return replace(self, slots=slots)


@triton.jit
def give_way(slots, rows, hands, ring, unit, T):
    """The oldest copies of this program's ring are none any more."""
    mine = unit * tl.num_programs(1) + tl.program_id(1)
    at = rows + mine * ring + (tl.load(hands + mine) + tl.arange(0, _FREE)) % ring
    row = tl.load(at)
    tl.debug_barrier()  # all warps have read what some are about to write
    tl.store(slots + unit * T + row, -1, mask=row >= 0)
    tl.store(at, -1)


@triton.jit
def _width(rows, DIM: tl.constexpr):
    """Numbers, or bytes, of a stored row."""
    width: tl.constexpr = DIM + _SCALE_BYTES if rows.dtype.element_ty == tl.int8 else DIM
    return width


@triton.jit
def load_either(rows, row, row_t, copies, place, far, near, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The numbers ``[N, BLOCK_D]`` of rows that are read from ``far``, and of copies.

    By two loads, of which one moves nothing: one of addresses that are chosen would not move 16 bytes at once.
    """
    found = load_rows(rows, row, far, row_t, DIM, BLOCK_D)
    if copies is not None:
        found = tl.where(near[:, None], load_rows(copies, place, near, _width(copies, DIM), DIM, BLOCK_D), found)
    return found


@triton.jit
def scales_either(rows, row, row_t, copies, place, far, near, DIM: tl.constexpr):
    """The scales ``[N]`` of these rows, if they are packed."""
    ones = tl.full(row.shape, 1.0, tl.float32)
    found = scaled(ones, rows, row, far, row_t, DIM)
    if copies is not None:
        found = tl.where(near, scaled(ones, copies, place, near, _width(copies, DIM), DIM), found)
    return found


@triton.jit
def copy_rows(found, scale, copies, to, kept, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy rows ``found [N, BLOCK_D]``, with their scales if they are packed, to the places ``to [N]``."""
    d, byte = tl.arange(0, BLOCK_D), tl.arange(0, 4)
    place = to[:, None] * _width(copies, DIM)
    if copies.dtype.element_ty == tl.int8 and DIM % 4 == 0:
        place = tl.multiple_of(place, (4, 4))
    tl.store(copies + place + d[None, :], found, mask=kept[:, None] & (d < DIM)[None, :])
    if copies.dtype.element_ty == tl.int8:
        bits = scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)[None, :]
        tl.store(copies + place + DIM + byte[None, :], bits.to(tl.int8), mask=kept[:, None])


@triton.jit
def take_places(row, far, slots, rows, hand, ring, fetched, unit, T):
    """Places for copies of the rows that come from ``far``, as many as were given way to, from ``hand`` on.

    Which rows have one, and where among all copies; and how many came from far with those before.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    first = (unit * splits + split) * ring
    number = fetched + tl.cumsum(far.to(tl.int32), axis=0) - 1
    kept = far & (number < _FREE)
    to = (hand + number) % ring
    tl.debug_barrier()  # all warps have read in ``slots`` which rows are far
    tl.store(slots + unit * T + row, split * ring + to, mask=kept)
    tl.store(rows + first + to, row.to(tl.int32), mask=kept)
    return kept, first + to, fetched + tl.sum(far.to(tl.int32), axis=0)


@triton.jit
def advance(hands, hand, ring, fetched, unit):
    """The next copies that give way are those after the ones made now."""
    tl.store(hands + unit * tl.num_programs(1) + tl.program_id(1), (hand + tl.minimum(fetched, _FREE)) % ring)
