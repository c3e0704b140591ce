"""k-means in torch where rows lie, several sets at once. No sum depends on the order of threads."""

import torch
from torch import Tensor

# Distances of rows to means that are held at once.
DISTANCES = 1 << 27


def kmeans(x: Tensor, length: Tensor, count: Tensor, most: int, iterations: int, stride: int) -> Tensor:
    """Means ``[R, most, D]`` of the first ``length [R, 1]`` rows of each x ``[R, n, D]`` in ``count [R, 1]`` clusters.

    Lloyd's, on every stride-th row: starts from rows at a uniform stride; an emptied cluster keeps its centroid.
    """
    train, clusters = x[:, ::stride], torch.arange(most, device=x.device)
    trained = (length + stride - 1) // stride
    at = ((2 * clusters + 1) * trained // (2 * count)).minimum(trained - 1)
    means = torch.take_along_dim(train, at[..., None], dim=1)
    ignored = torch.arange(train.shape[1], device=x.device) >= trained
    step = _rows_at_once(means)
    for _ in range(iterations):
        held, total = means.new_zeros((len(x), most, 1)), torch.zeros_like(means)
        for rows, skipped in zip(train.split(step, dim=1), ignored.split(step, dim=1), strict=True):
            owner = nearest(rows, means, clusters >= count).masked_fill_(skipped, most)
            members = (owner[:, None] == clusters[:, None]).to(x.dtype)
            held += members.sum(dim=2, keepdim=True)
            total += members @ rows
        means = torch.where(held > 0, total / held.clamp(min=1), means)
    return means


def nearest(x: Tensor, means: Tensor, unused: Tensor | None = None) -> Tensor:
    """Which of the means ``[R, C, D]`` each row of x ``[R, n, D]`` is nearest to: the largest x.c - |c|^2 / 2.

    ``[R, n]``; never one of the ``unused [R, C]``.
    """
    half = 0.5 * means.square().sum(dim=2)
    if unused is not None:
        half = half.masked_fill(unused, float("inf"))
    parts = x.split(_rows_at_once(means), dim=1)
    return torch.cat([torch.baddbmm(-half[:, None], rows, means.mT).argmax(dim=2) for rows in parts], dim=1)


def _rows_at_once(means: Tensor) -> int:
    return max(1, DISTANCES // max(1, means.shape[0] * means.shape[1]))
