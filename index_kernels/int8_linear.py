"""int8_linear: a linear map whose weights are int8, in groups that have scales of their own.

The N rows of a weight ``[N, K]`` are cut into groups of 32 numbers, and each group is a packed row (see packed.py):
int8 ``[N, ceil(K / 32), 36]``, 1.125 bytes a number. Inputs are not rounded.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from .ops import resolve_backend
from .packed import floats, pack_rows, row_dim

GROUP = 32
# Up to so many rows the weights are read as they are; for more, unpacking them once costs less.
FEW = 8


def pack_weight(weight: Tensor) -> Tensor:
    """A weight ``[N, K]`` as int8 ``[N, ceil(K / 32), 36]``; a number is off by 1/254 of its group's largest or less.

    Raises:
        ValueError: another number of dimensions.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight is {list(weight.shape)}, expected [N, K]")
    return pack_rows(pad(weight.detach(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP)))


def unpack_weight(weight: Tensor, columns: int) -> Tensor:
    """What a packed weight stands for, float32 ``[N, columns]``."""
    return floats(weight).flatten(1)[:, :columns]


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x [..., K]`` times the transpose of a packed weight: ``[..., N]`` in x's dtype.

    Up to 8 rows on a CPU with Numba are answered from the int8 numbers; otherwise (a prompt, a GPU, gradients that are
    wanted) the weight is unpacked for the call.

    Raises:
        ValueError: a weight that is not packed, or for another K.
    """
    if weight.dtype != torch.int8 or weight.ndim != 3 or row_dim(weight) != GROUP:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, expected int8 [N, K / {GROUP}, {GROUP + 4}]")
    columns = x.shape[-1]
    if not 0 <= weight.shape[1] * GROUP - columns < GROUP:
        raise ValueError(f"x is {list(x.shape)}, expected [..., K] with K of up to {weight.shape[1] * GROUP}")
    if (
        x.numel() > FEW * columns
        or resolve_backend(x, "auto") != "numba"
        or (x.requires_grad and torch.is_grad_enabled())
    ):
        return linear(x, unpack_weight(weight, columns).to(x.dtype))
    rows = x.detach().reshape(-1, columns).float()
    if columns % GROUP:
        rows = pad(rows, (0, -columns % GROUP))
    return _few_rows()(rows.contiguous(), weight).to(x.dtype).view(*x.shape[:-1], len(weight))


@cache
def _few_rows() -> Callable[[Tensor, Tensor], Tensor]:
    from ._cpu_int8_linear import int8_linear

    return int8_linear
