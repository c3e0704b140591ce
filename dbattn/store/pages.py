"""Pages: rows that lie in memory once, however many stores hold them.

The operating system does the work. Bytes are put into a file in memory, which is never written again; every view of it
is mapped privately, so that a page is copied when, and only when, whoever holds the view writes to it. A view costs the
same time and memory for ten rows and for ten million, and kernels that move rows in place need not know of it.
"""

import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Less than this is copied: a view has a price of its own, some 30 microseconds and an entry in the system's tables.
LEAST_BYTES = 1 << 15
PAGE = 1 << 14
# What one call of the system writes at most.
WRITTEN_AT_ONCE = 1 << 30


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

    def write(self, fd: int, at: int) -> None:
        """Put the parts into a file, the tensor beginning at byte ``at``."""
        batch, heads, *_ = self.shape
        row = self.parts[0].dtype.itemsize * math.prod(self.shape[3:])
        for number, (b, h) in enumerate(product(range(batch), range(heads))):
            place = at + number * self.capacity * row
            for part in self.parts:
                if part.shape[2]:
                    rows = part[b, h].detach().contiguous().flatten().view(torch.uint8).numpy()
                    for first in range(0, len(rows), WRITTEN_AT_ONCE):
                        _write(fd, rows[first : first + WRITTEN_AT_ONCE], place + first)
                place += part.shape[2] * row


class Pages:
    """Tensors in a file in memory; each ``view`` of them can be written to, and nobody else sees it."""

    def __init__(self, tensors: Sequence[Spread]) -> None:
        """Copy the tensors' parts.

        Raises:
            OSError, RuntimeError: this system has no such files, or no room for one.
        """
        # Where each begins (on a page of its own) and ends, and what it is.
        self._places: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        self._size = 0
        for spread in tensors:
            dtype = spread.parts[0].dtype
            stop = self._size + dtype.itemsize * math.prod(spread.shape)
            self._places.append((self._size, stop, dtype, spread.shape))
            self._size = max(-(-stop // PAGE), 1) * PAGE
        self._fd = _memory_file()
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, self._size)
        for spread, (at, *_) in zip(tensors, self._places, strict=True):
            spread.write(self._fd, at)
        self.view()  # raises where it cannot be mapped

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
        whole = self._mapped()
        # Ordinary tensors even under inference_mode, whose tensors could not be written to outside it.
        with torch.inference_mode(False):
            return [whole[at:stop].view(dtype).view(shape) for at, stop, dtype, shape in self._places]

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        """The same as ``view``, as arrays."""
        whole = self._mapped().numpy()
        return [
            np.ndarray(shape, torch.empty(0, dtype=dtype).numpy().dtype, whole, at)
            for at, _, dtype, shape in self._places
        ]

    def _mapped(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.from_file(f"/dev/fd/{self._fd}", shared=False, size=self._size, dtype=torch.uint8)

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


def _write(fd: int, content: np.ndarray[Any, Any], at: int) -> None:
    while len(content):
        done = os.pwrite(fd, content.data, at)
        content, at = content[done:], at + done


def _none() -> None:
    return None
