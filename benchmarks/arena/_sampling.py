"""Priority sampling: k rows out of many, so that weighted sums over them are unbiased."""

import torch
from torch import Tensor


def priority_sample(log_sizes: Tensor, noise: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of highest priority ``size / u`` and the log of the inverse of their chances.

    With t the (k+1)-th priority a row enters with chance ``min(1, size / t)``, and sums over the sample divided by it
    are unbiased for the sums over all rows (Duffield, Lund and Thorup, Priority Sampling for Estimation of Arbitrary
    Subset Sums, 2007).

    Args:
        log_sizes: ``[..., n]``, -inf for a row that is not there.
        noise: ``[..., n]``, ``-ln u`` with u uniform in (0, 1].
        k: rows wanted; all of them where there are no more.

    Returns:
        places ``[..., min(k, n)]`` (-1 = none) and log-weights of the same shape, 0 or more.
    """
    n = log_sizes.shape[-1]
    best = (log_sizes + noise).topk(min(k + 1, n), dim=-1)
    places = best.indices[..., :k]
    weights = torch.zeros(places.shape)
    if n > k:
        weights = (best.values[..., k:] - log_sizes.gather(-1, places)).clamp(min=0.0)
    missing = best.values[..., :k] == float("-inf")
    return places.masked_fill(missing, -1), weights.masked_fill(missing, 0.0)
