"""rotate: into the basis in which packed rows round with little error, and back."""

from collections.abc import Callable
from functools import cache

from torch import Tensor

from . import packed
from .ops import resolve_backend


def rotate(rows: Tensor) -> Tensor:
    """Float rows ``[..., D]`` times Hadamard's matrix, block by block, as float32; see ``packed.rotated``.

    Its own inverse up to rounding. What becomes of a row does not depend on the rows beside it.
    """
    return _loaded(resolve_backend(rows))(rows)


@cache
def _loaded(backend: str) -> Callable[[Tensor], Tensor]:
    if backend != "numba":
        return lambda rows: packed.rotated(rows.detach())
    from ._cpu_rotate import rotated

    return rotated
