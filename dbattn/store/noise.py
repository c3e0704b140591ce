"""Noise that belongs to rows: what priority sampling ranks them by."""

import torch
from torch import Tensor


def exponential_noise(heads: int, first: int, stop: int, device: torch.device) -> Tensor:
    """``-ln u`` with u uniform in (0, 1], fixed for each KV head and row position: ``[heads, stop - first]`` float32.

    A hash of the position (splitmix64), so that a row keeps its noise however it arrived.
    """
    x = torch.arange(first, stop, device=device) * heads + torch.arange(heads, device=device)[:, None]
    x = (x + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    uniform = (((x >> 11) & 0x1FFFFFFFFFFFFF).double() + 1) * 2.0**-53
    return -torch.log(uniform).float()
