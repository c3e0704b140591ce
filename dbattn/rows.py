"""RowSource: rows of other origin, which a query reads beside its store's."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from index_kernels import merge_states
from index_kernels.ops import check_rows
from index_kernels.packed import row_dim

from .dense import masked_attention
from .storage import check_range


@dataclass(frozen=True)
class RowSource:
    """Rows that are read exactly, whatever their origin: earlier layers at one's own position, a shard, a prefix.

    Attributes:
        keys, values: ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]``; Hkv divides the query heads.
        log_weights: added to the logits, broadcastable to ``[B, Hq, m, n]``; -inf hides a row from a query. None: 0.
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted for any of the tensors."""
        parts = (self.keys, self.values, self.log_weights)
        return any(part is not None and part.requires_grad for part in parts)

    def check(self, query: Tensor, value_dim: int) -> None:
        """Raise ValueError where the rows do not fit ``query [B, Hq, m, D]`` or the store's values."""
        check_rows(query, self.keys, self.values)
        if row_dim(self.values) != value_dim:
            raise ValueError(f"extra values have shape {list(self.values.shape)}, expected dimension {value_dim}")
        for name, rows in (("extra keys", self.keys), ("extra values", self.values)):
            check_range(name, rows)
        if self.log_weights is None:
            return
        expected = (*query.shape[:3], self.keys.shape[2])
        try:
            fits = np.broadcast_shapes(self.log_weights.shape, expected) == expected
        except ValueError:
            fits = False
        if not fits or not self.log_weights.is_floating_point():
            raise ValueError(
                f"log_weights are {self.log_weights.dtype} {list(self.log_weights.shape)}, "
                f"expected floats that broadcast to {list(expected)}"
            )
        if bool((self.log_weights.isnan() | (self.log_weights == float("inf"))).any()):
            raise ValueError("log_weights hold NaN or +inf, expected finite numbers or -inf")

    def merge_into(
        self, out: Tensor, lse: Tensor, query: Tensor, *, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """The state ``(out [B, Hq, m, Dv], lse [B, Hq, m])`` with these rows added: exact, as every merge of states."""
        if not self.keys.shape[2]:
            return out, lse
        weights = None if self.log_weights is None else self.log_weights.expand(*query.shape[:3], self.keys.shape[2])
        ours = masked_attention(query, self.keys, self.values, weights, scale=scale, softcap=softcap)
        return merge_states(torch.stack([out.float(), ours[0]]), torch.stack([lse, ours[1]]))
