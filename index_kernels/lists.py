"""Lists and their summaries: the torch code is the specification; on CUDA the summaries are read by Triton kernels.

A store's older rows stand in lists (contiguous runs of similar keys). A list's summary is its mean key, its mean value,
its size and the summed variance of its keys; ``shape`` is the covariance of keys around their list's mean, per KV head
and scaled to trace 1, ``cross`` the covariance of keys and values on the same scale.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .ops import attend_rows, resolve_backend
from .packed import row_dim
from .reference import empty_state


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

    def grouped(self, query: Tensor, scale: float) -> Tensor:
        """The scaled query ``[B, Hq, 1, D]`` by KV head: ``[B, Hkv, Hq // Hkv, D]`` float32."""
        return (query.float() * scale).reshape(query.shape[0], self.key.shape[1], -1, query.shape[3])

    def spread(self, query: Tensor) -> Tensor:
        """Variance of a grouped query's logits per unit of a list's variance, ``[B, Hkv, Hq // Hkv]``."""
        return ((query @ self.shape) * query).sum(dim=-1).clamp(min=1e-12)


def summary_logits(
    query: Tensor, lists: Summaries, *, scale: float, softcap: float | None, alpha: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log of the mean weight of each list's rows, ``[B, Hq, L]``, and ``spread [B, Hq]`` (variance of logits per unit).

    The rows' logits scatter around their mean's, so that by Jensen their mean weight is larger than the mean key's
    weight; ``alpha`` times their variance is added. query ``[B, Hq, 1, D]``.
    """
    if resolve_backend(query, backend) == "triton":
        logits, spread = _kernels().summary_logits(query, lists, scale=scale, softcap=softcap, alpha=alpha)
        return logits, spread
    q = lists.grouped(query, scale)
    spread = lists.spread(q)
    logits = q @ lists.key.transpose(2, 3)
    slope = torch.ones_like(logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    logits = logits + alpha * spread[..., None] * lists.variance[:, :, None] * slope**2
    logits = logits.masked_fill(lists.size[:, :, None] == 0, float("-inf"))
    return logits.flatten(1, 2), spread.flatten(1)


def probe_lists(
    logits: Tensor, spread: Tensor, lists: Summaries, known_lse: Tensor, budget: int, *, backend: str = "auto"
) -> Tensor:
    """Choose the lists whose rows, left unread, would cost most: bool ``[B, Hkv, L]``.

    The KV heads of a batch row share ``budget`` rows, so that a head whose mass is known needs few.

    logits ``[B, Hq, L]`` and spread ``[B, Hq]`` from summary_logits; ``known_lse [B, Hq]`` of the rows read anyway.
    """
    order = (
        list_costs(logits, spread, lists, known_lse, backend).flatten(1).argsort(dim=1, descending=True, stable=True)
    )
    rows = lists.size.flatten(1).gather(1, order)
    taken = (rows.cumsum(dim=1) <= budget) & (rows > 0)
    return torch.zeros_like(taken).scatter(1, order, taken).view_as(lists.size)


def list_costs(logits: Tensor, spread: Tensor, lists: Summaries, known_lse: Tensor, backend: str = "auto") -> Tensor:
    """What leaving each list unread may cost, ``[B, Hkv, L]``; see probe_lists for the arguments.

    The softmax share of a list's rows times the deviation of their logits, summed over the query heads of a group.
    """
    if resolve_backend(logits, backend) == "triton":
        costs: Tensor = _kernels().list_costs(logits, spread, lists, known_lse)
        return costs
    batch, kv_heads, count = lists.size.shape
    group = logits.shape[1] // kv_heads
    weights = logits + lists.size.log().repeat_interleave(group, dim=1)
    total = torch.logaddexp(known_lse, torch.logsumexp(weights, dim=-1))
    total = total.masked_fill(total == float("-inf"), 0.0)
    share = torch.exp(logits - total[..., None]) * spread.sqrt()[..., None]
    return share.view(batch, kv_heads, group, count).sum(dim=2) * lists.variance.sqrt()


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

    query ``[B, Hq, 1, D]``, ``chosen [B, Hkv, L]`` from probe_lists, ``logits [B, Hq, L]`` from summary_logits; see
    attend_summaries for ``beta``. Returns outs ``[2, B, Hq, 1, Dv]`` and lses ``[2, B, Hq, 1]``; without ``tail`` the
    second is empty.
    """
    ranges = torch.stack([lists.begin, torch.where(chosen, lists.begin + lists.size, lists.begin)], dim=-1)
    if resolve_backend(query, backend) != "triton":
        # Chosen lists first, so that the ranges handed over are as few as the fullest head needs. The Triton kernel
        # finds its rows among empty ranges as well, and counting the chosen lists would wait for the device.
        widest = max(1, int(chosen.sum(dim=-1).max()))
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., :widest]
        ranges = ranges.gather(2, order[..., None].expand(-1, -1, -1, 2))
    ranges = ranges.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)[:, :, None]
    read = attend_rows(query, keys, values, ranges=ranges, scale=scale, softcap=softcap, backend=backend)
    if tail:
        rest = attend_summaries(query, lists, chosen, logits, scale=scale, beta=beta, backend=backend)
    else:
        rest = empty_state(query, row_dim(values))
    return torch.stack([read[0], rest[0]]), torch.stack([read[1], rest[1]])


def attend_summaries(
    query: Tensor, lists: Summaries, chosen: Tensor, logits: Tensor, *, scale: float, beta: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The state ``(out [B, Hq, 1, Dv], lse [B, Hq, 1])`` of the lists not chosen; see attend_lists for the arguments.

    A summary enters as ``size`` rows of its logit, its value moved along ``cross`` by ``beta`` for the heavier rows of
    the list.
    """
    if resolve_backend(query, backend) == "triton":
        out, lse = _kernels().attend_summaries(query, lists, chosen, logits, scale=scale, beta=beta)
        return out, lse
    q = lists.grouped(query, scale)
    weights = logits.view(*q.shape[:3], logits.shape[2]) + lists.size.log()[:, :, None]
    weights = weights.masked_fill(chosen[:, :, None], float("-inf"))
    lse = torch.logsumexp(weights, dim=-1, keepdim=True)
    shares = torch.exp(weights - lse.masked_fill(lse == float("-inf"), 0.0))
    tilt = (shares * lists.variance[:, :, None]).sum(dim=-1, keepdim=True)
    out = shares @ lists.value + beta * tilt * (q @ lists.cross)
    return out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)


def unread_deviation(logits: Tensor, spread: Tensor, lists: Summaries, chosen: Tensor, lse: Tensor) -> Tensor:
    """``[B, Hq]``: standard deviation of the softmax weight of the rows not read, as a share of all weight.

    A list's rows scatter around its mean independently: its weight w deviates by ``w sqrt(q' S q variance / n)``.
    logits and spread from summary_logits, ``chosen [B, Hkv, L]`` from probe_lists, ``lse [B, Hq]`` of all sources.
    """
    group = logits.shape[1] // lists.size.shape[1]
    unread = (lists.size * ~chosen).repeat_interleave(group, dim=1)
    share = torch.exp(logits - lse[..., None]) * unread
    variance = lists.variance.repeat_interleave(group, dim=1) / unread.clamp(min=1)
    return (spread * (share**2 * variance).sum(dim=-1)).sqrt()


def _kernels() -> Any:
    """The Triton kernels, imported when first needed."""
    return import_module("index_kernels._triton_lists")
