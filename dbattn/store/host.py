"""Rows in the host's memory that a GPU reads and writes as if they lay on it, over PCIe.

The memory is pinned, and its address is valid on both sides (CUDA's unified addressing), so that a tensor of the GPU
can be made of it: whatever kernel reads or writes rows needs not know where they are.
"""

import math
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


class _Pinned:
    """Pages of memory, pinned until nobody holds a tensor made of them."""

    def __init__(self, size: int) -> None:
        # Pages of its own: none may be pinned twice. Pinned by torch, memory is of a power of two bytes.
        self._bytes = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        address = self._bytes.data_ptr()
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, size, 0)))
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip
        weakref.finalize(self, _release, address, self._bytes).atexit = False


def _release(address: int, held: Tensor) -> None:
    torch.cuda.synchronize()  # a kernel may still read it
    torch.cuda.cudart().cudaHostUnregister(address)


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the CUDA ``device`` that lies in pinned memory of the host."""
    with torch.cuda.device(device):
        memory = _Pinned(max(1, math.prod(shape) * dtype.itemsize))
        return torch.as_tensor(memory, device=device).view(dtype).view(shape)


def check_host_rows(device: torch.device | None = None) -> None:
    """Raise ValueError where rows in host memory have no GPU to be read by: there is none, or ``device`` is none."""
    if not torch.cuda.is_available():
        raise ValueError(
            "rows='host' keeps rows in host memory for a GPU, and there is no CUDA device: use rows='device'"
        )
    if device is not None and device.type != "cuda":
        raise ValueError(
            f"rows='host' keeps rows in host memory for a GPU, but they come on {device}: use rows='device'"
        )
