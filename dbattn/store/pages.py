"""Pages: rows that lie in memory once, however many stores hold them.

The operating system does the work. Bytes are put into a file in memory, which is never written again; every view of it
is mapped privately, so that a page is copied when, and only when, whoever holds the view writes to it. A view costs the
same time and memory for ten rows and for ten million, and kernels that move rows in place need not know of it.
"""

import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Less than this is copied: a view has a price of its own, some 30 microseconds and an entry in the system's tables.
LEAST_BYTES = 1 << 16
PAGE = 1 << 14


@dataclass(frozen=True)
class Spread:
    """A tensor ``[B, H, n, ...]`` on the CPU that lies in parts along its third dimension, and room for how many.

    What is behind the parts reads as 0 and takes no memory.
    """

    parts: Sequence[Tensor]
    capacity: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with all its room."""
        first = self.parts[0].shape
        return (*first[:2], self.capacity, *first[3:])

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts)


class Pages:
    """Tensors in a file in memory; each ``view`` of them can be written to, and nobody else sees it."""

    def __init__(self, tensors: Sequence[Spread]) -> None:
        """Copy the tensors' parts.

        Raises:
            OSError, RuntimeError: this system has no such files, or no room for one.
        """
        self._kinds = [(spread.shape, spread.parts[0].dtype) for spread in tensors]
        self._fd = _memory_file()
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, sum(map(_room, self._kinds)))
        for target, spread in zip(self._mapped(shared=True), tensors, strict=True):
            at = 0
            for part in spread.parts:
                target[:, :, at : at + part.shape[2]] = part
                at += part.shape[2]

    @classmethod
    def of(cls, tensors: Sequence[Spread]) -> "Pages | None":
        """Pages with these tensors; None where they are too few to be worth it, on a device, or cannot be shared."""
        if sum(spread.nbytes for spread in tensors) < LEAST_BYTES:
            return None
        if any(part.device.type != "cpu" for spread in tensors for part in spread.parts):
            return None
        try:
            return cls(tensors)
        except (OSError, RuntimeError):
            return None  # as on Windows: who asked makes copies

    def view(self) -> list[Tensor]:
        """The tensors, each with all its room; they stay when the Pages go."""
        return self._mapped(shared=False)

    def _mapped(self, *, shared: bool) -> list[Tensor]:
        size = sum(map(_room, self._kinds))
        found, at = [], 0
        # Ordinary tensors even under inference_mode, whose tensors could not be written to outside it.
        with torch.inference_mode(False):
            whole = torch.from_file(f"/dev/fd/{self._fd}", shared=shared, size=size, dtype=torch.uint8)
            for kind in self._kinds:
                shape, dtype = kind
                found.append(whole[at : at + _bytes(kind)].view(dtype).view(shape))
                at += _room(kind)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pages":
        return self  # nobody writes to them

    def __reduce__(self) -> tuple[Any, ...]:
        return _none, ()  # another process has no such file


@dataclass(frozen=True)
class Shared:
    """What a store shares with its forks: the first ``rows`` rows of its tensors are as they are in ``pages``."""

    pages: Pages
    rows: int

    @classmethod
    def of(cls, tensors: Sequence[Spread], rows: int) -> "Shared | None":
        """The first ``rows`` rows of these tensors, shared; None where they cannot be, see ``Pages.of``."""
        pages = Pages.of(tensors)
        return None if pages is None else cls(pages, rows)

    def before(self, first: int) -> "Shared | None":
        """What stays shared when rows from ``first`` on are moved or replaced."""
        if first <= 0:
            return None
        return self if first >= self.rows else replace(self, rows=first)

    def view(self, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
        """Tensors with the first ``rows`` rows of these, which ours are a part of; only the others are copied."""
        made = self.pages.view()
        for new, old in zip(made, tensors, strict=True):
            new[:, :, self.rows : rows] = old[:, :, self.rows : rows]
        return made


def _memory_file() -> int:
    """A file without a name: in memory on Linux, where the system keeps temporary files elsewhere."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("dbattn")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _bytes(kind: tuple[tuple[int, ...], torch.dtype]) -> int:
    shape, dtype = kind
    return torch.Size(shape).numel() * dtype.itemsize


def _room(kind: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes from one tensor's begin to the next one's, which has a page to itself."""
    return -(-max(1, _bytes(kind)) // PAGE) * PAGE


def _none() -> None:
    return None
