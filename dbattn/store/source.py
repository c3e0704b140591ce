"""Rows of other origin, which a query takes in beside its store's: themselves, or a state that was made of them."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from index_kernels.ops import check_rows
from index_kernels.packed import row_dim

from ..dense import masked_attention
from .storage import check_finite, check_range


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

    def state(self, query: Tensor, *, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """The state ``(out [B, Hq, m, Dv], lse [B, Hq, m])`` of a query over these rows."""
        weights = None if self.log_weights is None else self.log_weights.expand(*query.shape[:3], self.keys.shape[2])
        return masked_attention(query, self.keys, self.values, weights, scale=scale, softcap=softcap)

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows."""
        return self.keys.shape[2] == 0


@dataclass(frozen=True)
class StateSource:
    """A query's state over rows that were read elsewhere: by a shard, on another device.

    Attributes:
        out: ``[B, Hq, m, Dv]``, the attention over those rows.
        lse: ``[B, Hq, m]``, the log-sum-exp of their logits; -inf where there was no row.
        detail: what they are, in words, for EXPLAIN.
        rows, bytes, seconds: what was read elsewhere, where it is known.
    """

    out: Tensor
    lse: Tensor
    detail: str = "read elsewhere"
    rows: float = 0.0
    bytes: int = 0
    seconds: float | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted for the state."""
        return self.out.requires_grad or self.lse.requires_grad

    def check(self, query: Tensor, value_dim: int) -> None:
        """Raise ValueError where the state does not fit ``query [B, Hq, m, D]`` or the store's values."""
        wanted = (*query.shape[:3], value_dim)
        if self.out.shape != wanted or self.lse.shape != wanted[:3]:
            raise ValueError(
                f"out {list(self.out.shape)} and lse {list(self.lse.shape)} do not fit: "
                f"expected {list(wanted)} and {list(wanted[:3])}"
            )
        if self.out.device != query.device or self.lse.device != query.device:
            raise ValueError(f"the state is on {self.out.device} and {self.lse.device}, the query on {query.device}")
        check_finite("out", self.out)
        if bool((self.lse.isnan() | (self.lse == float("inf"))).any()):
            raise ValueError("lse holds NaN or +inf, expected finite numbers or -inf")

    def state(self, query: Tensor, *, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """The state as it came, in float32."""
        return self.out.float(), self.lse.float()

    @property
    def is_empty(self) -> bool:
        """Whether it was made of nothing."""
        return False
