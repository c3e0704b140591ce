"""rotate: into the basis in which packed rows round with little error, and back."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor

from . import packed
from .ops import resolve_backend


def rotate(rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Float rows ``[..., D]`` times Hadamard's matrix, block by block, as float32; see ``packed.rotated``.

    Its own inverse up to rounding. What becomes of a row does not depend on the rows beside it.
    """
    return _loaded("rotated", resolve_backend(rows, backend))(rows)


def pack_rotated(rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Float rows ``[..., D]`` rotated and packed: int8 ``[..., D + 4]``, see ``pack_rows``."""
    return _loaded("packed_rotated", resolve_backend(rows, backend))(rows)


@cache
def _loaded(op: str, backend: str) -> Callable[[Tensor], Tensor]:
    if backend == "triton":
        run: Callable[[Tensor], Tensor] = getattr(import_module("index_kernels._triton_rotate"), op)
        return run
    if op == "packed_rotated":
        return lambda rows: packed.pack_rows(rotate(rows, backend=backend))
    if backend == "numba":
        from ._cpu_rotate import rotated

        return rotated
    return lambda rows: packed.rotated(rows.detach())
