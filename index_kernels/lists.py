"""Lists and their summaries in plain torch: the specification of the fused CPU kernel, and the path of other devices.

A store's older rows stand in lists (contiguous runs of similar keys). A list's summary is its mean key, its mean value,
its size and the summed variance of its keys; ``shape`` is the covariance of keys around their list's mean, per KV head
and scaled to trace 1, ``cross`` the covariance of keys and values on the same scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import attend_rows


@dataclass(frozen=True)
class Summaries:
    """What is known of each list without reading its rows; L lists per KV head, of which unused ones have size 0.

    Attributes:
        begin, size: ``[B, Hkv, L]`` int64, the rows ``begin .. begin + size`` of the store.
        key, value: ``[B, Hkv, L, D]`` and ``[B, Hkv, L, Dv]`` float32, means.
        variance: ``[B, Hkv, L]`` float32, mean squared distance of the keys from their mean.
        shape: ``[B, Hkv, D, D]``, cross: ``[B, Hkv, D, Dv]``, float32.
    """

    begin: Tensor
    size: Tensor
    key: Tensor
    value: Tensor
    variance: Tensor
    shape: Tensor
    cross: Tensor


def summary_logits(
    query: Tensor, lists: Summaries, *, scale: float, softcap: float | None, alpha: float
) -> tuple[Tensor, Tensor]:
    """Log of the mean weight of each list's rows, ``[B, Hq, L]``, and ``spread [B, Hq]`` (variance of logits per unit).

    The rows' logits scatter around their mean's, so that by Jensen their mean weight is larger than the mean key's
    weight; ``alpha`` times their variance is added. query ``[B, Hq, 1, D]``.
    """
    batch, heads, _, dim = query.shape
    kv_heads = lists.key.shape[1]
    q = (query.float() * scale).view(batch, kv_heads, -1, dim)
    logits = q @ lists.key.transpose(2, 3)
    spread = ((q @ lists.shape) * q).sum(dim=-1, keepdim=True).clamp(min=1e-12)
    slope = torch.ones_like(logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    logits = logits + alpha * spread * lists.variance[:, :, None] * slope**2
    logits = logits.masked_fill(lists.size[:, :, None] == 0, float("-inf"))
    return logits.reshape(batch, heads, -1), spread.reshape(batch, heads)


def probe_lists(logits: Tensor, spread: Tensor, lists: Summaries, known_lse: Tensor, budget: int) -> Tensor:
    """Choose the lists whose rows, left unread, would cost most: bool ``[B, Hkv, L]``.

    A list's cost is the softmax share of its rows times the deviation of their logits, summed over the query heads of
    a group. The KV heads of a batch row share ``budget`` rows, so that a head whose mass is known needs few.

    logits ``[B, Hq, L]`` and spread ``[B, Hq]`` from summary_logits; ``known_lse [B, Hq]`` of the rows read anyway.
    """
    batch, kv_heads, _ = lists.size.shape
    total = torch.logaddexp(
        known_lse,
        torch.logsumexp(logits + lists.size.log().repeat_interleave(logits.shape[1] // kv_heads, dim=1), dim=-1),
    )
    share = torch.exp(logits - total[..., None]) * spread.sqrt()[..., None]
    rank = share.view(batch, kv_heads, -1, logits.shape[-1]).sum(dim=2) * lists.variance.sqrt()
    order = rank.flatten(1).argsort(dim=1, descending=True, stable=True)
    rows = lists.size.flatten(1).gather(1, order)
    taken = (rows.cumsum(dim=1) <= budget) & (rows > 0)
    return torch.zeros_like(taken).scatter(1, order, taken).view_as(lists.size)


def attend_lists(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lists: Summaries,
    chosen: Tensor,
    logits: Tensor,
    *,
    scale: float,
    softcap: float | None,
    beta: float,
    tail: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Two states, stacked: the chosen lists' rows read exactly, and the others by summary.

    query ``[B, Hq, 1, D]``, ``chosen [B, Hkv, L]`` from probe_lists, ``logits [B, Hq, L]`` from summary_logits. A
    summary enters as ``size`` rows of its logit, its value moved along ``cross`` by ``beta`` for the heavier rows of
    the list. Returns outs ``[2, B, Hq, 1, Dv]`` and lses ``[2, B, Hq, 1]``; without ``tail`` the second is empty.
    """
    batch, heads, _, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    stop = torch.where(chosen, lists.begin + lists.size, lists.begin)
    widest = max(1, int(chosen.sum(dim=-1).max()))
    # Chosen lists first, so that the ranges handed over are as few as the fullest head needs.
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., :widest]
    ranges = torch.stack([lists.begin, stop], dim=-1).gather(2, order[..., None].expand(-1, -1, -1, 2))
    ranges = ranges.repeat_interleave(group, dim=1)[:, :, None]
    read = attend_rows(query, keys, values, ranges=ranges, scale=scale, softcap=softcap, backend=backend)
    weights = logits + lists.size.log().repeat_interleave(group, dim=1)
    weights = weights.masked_fill(chosen.repeat_interleave(group, dim=1), float("-inf"))
    if not tail:
        weights = torch.full_like(weights, float("-inf"))
    lse = torch.logsumexp(weights, dim=-1, keepdim=True)
    shares = torch.exp(weights - lse.masked_fill(lse == float("-inf"), 0.0)).view(batch, kv_heads, group, -1)
    q = (query.float() * scale).view(batch, kv_heads, group, dim)
    tilt = (shares * lists.variance[:, :, None]).sum(dim=-1, keepdim=True)
    out = shares @ lists.value + beta * tilt * (q @ lists.cross)
    return torch.stack([read[0], out.view(batch, heads, 1, -1)]), torch.stack([read[1], lse])
