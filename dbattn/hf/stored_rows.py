"""StoredRows: rows in another type than the model's, which become the model's only where something reads them."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from index_kernels import floats, rotate
from index_kernels.packed import row_dim


class StoredRows(Tensor):
    """A stand-in for ``[B, Hkv, n, D]`` floats over the rows of a store, which costs no memory until it is read.

    ``rotated``: whether the store keeps them so; see ``KVStore.turn``.

    Attention that a database answers never reads it. Any other operation does: then all rows become floats of ``dtype``
    for as long as the operation takes. A write to it changes nothing.
    """

    rows: Tensor
    rotated: bool

    @staticmethod
    def __new__(cls, rows: Tensor, dtype: torch.dtype, rotated: bool) -> Self:
        """Stand for the stored ``rows``, packed or of another float type."""
        shape = (*rows.shape[:3], row_dim(rows))
        made: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows.device)
        made.rows, made.rotated = rows, rotated
        return made

    def plain(self) -> Tensor:
        """The floats, an ordinary tensor."""
        rows = floats(self.rows)
        return (rotate(rows) if self.rotated else rows).to(self.dtype)

    # Shape, dtype and device are the wrapper's own; whatever touches numbers arrives at __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way to say so

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares an attribute, and documents a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].rows, args[0].dtype, args[0].rotated)
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


class RowsElsewhere(StoredRows):
    """A stand-in for rows that are dealt over ranks, which nobody but a database can read."""

    def plain(self) -> Tensor:
        """Not to be had."""
        raise ValueError(
            "the rows of this cache are dealt over several ranks, none of which has all of them: only attention that a "
            "database answers (causal, with left padding alone) can be served"
        )


def rows_elsewhere(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A stand-in for ``rows`` rows of the shape of ``like [B, Hkv, n, D]``."""
    nothing = like.new_empty(1, dtype=dtype).expand(*like.shape[:2], rows, like.shape[3])
    return RowsElsewhere(nothing, dtype, False)


def rows_as(rows: Tensor, dtype: torch.dtype, *, rotated: bool) -> Tensor:
    """Rows of a store as floats of ``dtype``: themselves, or a stand-in."""
    return rows if rows.dtype == dtype else StoredRows(rows, dtype, rotated)


def plain(rows: Tensor) -> Tensor:
    """What a stand-in stands for; other tensors as they are."""
    return rows.plain() if isinstance(rows, StoredRows) else rows
