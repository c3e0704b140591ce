"""Rows that are mapped from files, and the buffers that rows are kept in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .host import host_buffer


@dataclass(frozen=True)
class MappedRows:
    """Rows that lie in parts, one after the other, each (keys ``[B, Hkv, n, D]``, values ``[B, Hkv, n, Dv]``).

    The parts are mapped from files and never written; copies of a store share them. Rows are wanted on ``device``.
    """

    parts: list[tuple[Tensor, Tensor]]
    device: torch.device

    def together(self, *, host: bool = False) -> tuple[Tensor, Tensor]:
        """Buffers of their own, keys and values, with all rows in them; ``host``: see ``new_buffer``."""
        both = []
        for parts in zip(*self.parts, strict=True):
            buffer = new_buffer(parts[0], max(len(self), 64), self.device, host=host)
            at = 0
            for part in parts:
                buffer[:, :, at : at + part.shape[2]] = part
                at += part.shape[2]
            both.append(buffer)
        return both[0], both[1]

    def __len__(self) -> int:
        return sum(keys.shape[2] for keys, _ in self.parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MappedRows":
        return self


def new_buffer(like: Tensor, capacity: int, device: torch.device | None = None, *, host: bool = False) -> Tensor:
    """Room for ``capacity`` rows ``[B, H, capacity, D]`` of the kind ``like [B, H, n, D]`` has.

    On its device, or the one given; ``host``: in memory of the host that this device reads.
    """
    shape, device = (*like.shape[:2], capacity, like.shape[3]), device or like.device
    # An ordinary tensor even under inference_mode, whose tensors could not be written to outside it.
    with torch.inference_mode(False):
        return host_buffer(shape, like.dtype, device) if host else torch.empty(shape, dtype=like.dtype, device=device)
