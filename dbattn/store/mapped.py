"""Rows that are mapped from files, and the buffers that rows are kept in."""

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .host import host_buffer

# Larger pages are asked for where a buffer has so many bytes that the rest of its last page does not matter.
LARGE_PAGE, LEAST_ON_LARGE = 1 << 21, 1 << 25


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Part:
    """Rows that lie together: keys ``[B, Hkv, n, D]``, values ``[B, Hkv, n, Dv]``.

    ``check`` is called before their numbers are read, every time; it raises where they are not what was saved.
    """

    keys: Tensor
    values: Tensor
    check: Callable[[], None] = _nothing

    def __len__(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class MappedRows:
    """Rows that lie in parts, one after the other, and are wanted on ``device``.

    The parts are mapped from files, or were in memory before; they are never written, and copies of a store share them.
    """

    parts: tuple[Part, ...]
    device: torch.device

    def together(self, *, host: bool = False) -> tuple[Tensor, Tensor]:
        """Buffers of their own, keys and values, with all rows and room for more; ``host``: see ``new_buffer``."""
        return self._copied(0, len(self), with_spare(len(self)), host=host)

    def between(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows ``first .. stop``: a view where one part has them, else a copy."""
        at = 0
        for part in self.parts:
            if at <= first and stop <= at + len(part):
                part.check()
                keys, values = (rows[:, :, first - at : stop - at] for rows in (part.keys, part.values))
                return keys.to(self.device), values.to(self.device)
            at += len(part)
        return self._copied(first, stop, stop - first)

    def checked(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each part, all of which may be read."""
        for part in self.parts:
            part.check()
        return [(part.keys, part.values) for part in self.parts]

    def and_more(self, keys: Tensor, values: Tensor, *, host: bool = False) -> "MappedRows":
        """These rows and, after them, others, which are copied; ``host``: see ``new_buffer``."""
        part = Part(new_buffer(keys, keys.shape[2], host=host), new_buffer(values, values.shape[2], host=host))
        part.keys.copy_(keys)
        part.values.copy_(values)
        return MappedRows((*self.parts, part), self.device)

    def select(self, batch: Tensor) -> "MappedRows":
        """The batch rows ``batch [B']``: where there is one, or all are the same one, that takes no memory."""
        parts = (Part(_selected(part.keys, batch), _selected(part.values, batch), part.check) for part in self.parts)
        return MappedRows(tuple(parts), self.device)

    def first(self, rows: int) -> "MappedRows":
        """The first rows alone."""
        kept, at = [], 0
        for part in self.parts:
            if at < rows:
                some = slice(0, min(len(part), rows - at))
                kept.append(Part(part.keys[:, :, some], part.values[:, :, some], part.check))
            at += len(part)
        return MappedRows(tuple(kept), self.device)

    def _copied(self, first: int, stop: int, room: int, *, host: bool = False) -> tuple[Tensor, Tensor]:
        first_part = self.parts[0]
        keys, values = (new_buffer(rows, room, self.device, host=host) for rows in (first_part.keys, first_part.values))
        at = 0
        for part in self.parts:
            low, high = max(first, at), min(stop, at + len(part))
            if low < high:
                part.check()
                for buffer, rows in ((keys, part.keys), (values, part.values)):
                    buffer[:, :, low - first : high - first] = rows[:, :, low - at : high - at]
            at += len(part)
        return keys, values

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MappedRows":
        return self


def _selected(rows: Tensor, batch: Tensor) -> Tensor:
    if len(rows) == 1 or rows.stride(0) == 0:
        return rows[:1].expand(len(batch), *rows.shape[1:])
    return rows.index_select(0, batch.to(rows.device))


def with_spare(rows: int) -> int:
    """Room for an eighth more rows, 64 at least."""
    return rows + max(rows // 8, 64)


def new_buffer(like: Tensor, capacity: int, device: torch.device | None = None, *, host: bool = False) -> Tensor:
    """Room for ``capacity`` rows ``[B, H, capacity, D]`` of the kind ``like [B, H, n, D]`` has.

    On its device, or the one given; ``host``: in memory of the host that this device reads.
    """
    shape, device = (*like.shape[:2], capacity, like.shape[3]), device or like.device
    # An ordinary tensor even under inference_mode, whose tensors could not be written to outside it.
    with torch.inference_mode(False):
        if host:
            return host_buffer(shape, like.dtype, device)
        buffer = torch.empty(shape, dtype=like.dtype, device=device)
    if device.type == "cpu" and buffer.nbytes >= LEAST_ON_LARGE:
        _ask_for_large_pages(buffer)
    return buffer


def _ask_for_large_pages(buffer: Tensor) -> None:
    """Where Linux leaves it to programs, have it back a buffer by pages of 2 MiB: advice, which it need not follow.

    Rows that are chosen stand anywhere. On a page of 4 KiB each costs the processor a walk through tables first.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-buffer.data_ptr() // LARGE_PAGE) * LARGE_PAGE
        last = (buffer.data_ptr() + buffer.nbytes) // LARGE_PAGE * LARGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
