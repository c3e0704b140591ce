"""How far a retrieved answer is from the dense one. All functions keep the leading dimensions."""

import torch
from torch import Tensor


def recall_at_k(scores: Tensor, exact_scores: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Share of the true top-k that was found; a hit counts by score, so equal scores count whichever id was taken.

    Args:
        scores: ``[..., n]``, true scores of the rows that were found, -inf for none.
        exact_scores: ``[..., k]``, the true top-k scores, -inf where there are fewer than k rows.
        epsilon: slack below the k-th best score, in units of the score.

    Returns:
        ``[...]`` float32 in 0..1; 1 where there was nothing to find. Source: ann-benchmarks.
    """
    real = exact_scores > float("-inf")
    wanted = real.sum(dim=-1)
    threshold = exact_scores.masked_fill(~real, float("inf")).amin(dim=-1, keepdim=True) - epsilon
    hits = (scores >= threshold).sum(dim=-1).clamp(max=wanted)
    return torch.where(wanted > 0, hits / wanted.clamp(min=1), torch.ones((), device=scores.device))


def attention_mass(lse: Tensor, dense_lse: Tensor) -> Tensor:
    """Share of the softmax weight that lies on the rows read: ``exp(lse - dense_lse)``, ``[...]`` in 0..1."""
    return torch.exp(lse - dense_lse).clamp(max=1.0)


def relative_error(out: Tensor, reference: Tensor) -> Tensor:
    """``|out - reference| / |reference|`` over the last dimension (L2): ``[..., Dv]`` twice -> ``[...]`` float32."""
    reference = reference.float()
    tiny = torch.finfo(torch.float32).tiny
    distance = torch.linalg.vector_norm(out.float() - reference, dim=-1)
    ratio: Tensor = distance / torch.linalg.vector_norm(reference, dim=-1).clamp(min=tiny)
    return ratio
