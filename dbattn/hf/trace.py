"""Trace: which row positions a model's answers put their attention on."""

import torch
from torch import Tensor


class Trace:
    """Softmax weight per row position, summed over calls: layers, decode steps and query heads.

    Attributes:
        mass: float64 ``[B, T]``, weight of each position of the longest store seen.
        for_unread: float64 ``[B]``, how much of it lies on positions through summaries or samples; see Weights.
        total: softmaxes summed, each of weight 1.
    """

    def __init__(self) -> None:
        self.mass = torch.zeros(1, 0, dtype=torch.float64)
        self.for_unread = torch.zeros(1, dtype=torch.float64)
        self.total = 0

    def add(self, weights: Tensor, for_unread: Tensor | None = None) -> None:
        """Add the weights ``[B, Hq, T]`` of one call, and which of it rows have for others that were not read."""
        batch, heads, rows = weights.shape
        mass = torch.zeros(batch, max(rows, self.mass.shape[1]), dtype=torch.float64)
        mass[:, : self.mass.shape[1]] = self.mass
        mass[:, :rows] += weights.double().sum(dim=1).cpu()
        self.mass = mass
        if for_unread is not None:
            self.for_unread = self.for_unread + for_unread.double().sum(dim=(1, 2)).cpu()
        self.total += heads
