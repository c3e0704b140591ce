"""dense_decode in Triton: one range per query in attend_rows, which splits it over the processors."""

from torch import Tensor

from ._triton_attend_rows import attend_rows
from .reference import rows_seen


def dense_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    start: Tensor,
    softcap: float | None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """See reference.dense_decode."""
    ranges = rows_seen(query, keys, start, causal=causal)
    return attend_rows(query, keys, values, scale=scale, ids=None, ranges=ranges, log_weights=None, softcap=softcap)
