"""Trace: which row positions a model's answers put their attention on."""

import torch
from torch import Tensor

from .index import KeyIndex
from .store import KVStore


class Trace:
    """Softmax weight per row position, summed over calls: layers, decode steps and query heads.

    Attributes:
        mass: float64 ``[B, T]``, weight of each position of the longest store seen; rows not read have none.
        total: softmaxes summed, each of weight 1. ``total - mass.sum(1)`` went to rows that were not read: to the
            summaries or samples that answered for them.
    """

    def __init__(self) -> None:
        self.mass = torch.zeros(1, 0, dtype=torch.float64)
        self.total = 0

    def add(self, weights: Tensor) -> None:
        """Add the weights ``[B, Hq, T]`` of one call, as ``AttentionDB.weights`` gives them."""
        batch, heads, rows = weights.shape
        mass = torch.zeros(batch, max(rows, self.mass.shape[1]), dtype=torch.float64)
        mass[:, : self.mass.shape[1]] = self.mass
        mass[:, :rows] += weights.double().sum(dim=1).cpu()
        self.mass = mass
        self.total += heads


def weights_by_position(
    query: Tensor,
    store: KVStore,
    index: KeyIndex,
    slots: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Softmax weights ``[B, Hq, T]`` of ``query [B, Hq, 1, D]`` by row position.

    ``slots [B, Hq, 1, n]`` are the places of the rows read, each once, -1 = none; ``lse [B, Hq, 1]`` that of the whole
    answer, None where these rows are the whole answer.
    """
    logits = store.scores(query, slots, scale, softcap)
    whole = torch.logsumexp(logits, dim=-1) if lse is None else lse
    weights = torch.exp(logits - whole[..., None]).nan_to_num()[:, :, 0]
    positions = index.positions(slots)[:, :, 0].clamp(min=0)
    return weights.new_zeros(*weights.shape[:2], len(store)).scatter_add_(-1, positions, weights)
