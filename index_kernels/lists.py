"""Operators on summaries of lists, in torch: the specification; attend_segmented has kernels for them together."""

import math

import torch
from torch import Tensor

from .ops import attend_rows
from .packed import row_dim
from .reference import empty_state, softcapped
from .summaries import Summaries

# Log of the rows of a list, and the variance of their logits from which the largest of them is all of their weight.
LOG_ROWS = math.log(32)
FREEZES = 2 * LOG_ROWS
# A block of a prompt chooses lists by what every so many-th position would lose: to ask all of them changes nothing.
ASKING = 32
# Weights of lists are taken beside that of the rows read anyway, and no larger than e to this.
MOST_LOGIT = 60.0
# Lists answer for themselves where that saves so many times as much for each summary as opened lists do for each row.
APART = 4.0
# A super-list of more rows does not answer for its lists.
MOST_ROWS = 128


def held(variance: Tensor) -> Tensor:
    """Twice the log of the mean weight of a list's rows over that of their mean, for a variance of their logits.

    Of n Gaussian logits that is the variance itself, as long as many of them count; from 2 ln n on the largest stands
    for all, ``2 (sqrt(2 ln n variance) - ln n)``, and a summary must not weigh more (Derrida's random energy model).
    """
    return torch.where(variance < FREEZES, variance, 2 * ((FREEZES * variance).sqrt() - LOG_ROWS))


def summary_logits(
    query: Tensor, lists: Summaries, *, scale: float, softcap: float | None, alpha: float
) -> tuple[Tensor, Tensor]:
    """Log of the mean weight of each list's rows, ``[B, Hq, L]``, and ``spread [B, Hq]`` (variance of logits per unit).

    The rows' logits scatter around their mean's, so that by Jensen their mean weight is larger than the mean key's
    weight; ``alpha`` times their variance is added, as far as it is ``held``. query ``[B, Hq, 1, D]``.
    """
    q = lists.grouped(query, scale)
    spread = lists.spread(q)
    logits = softcapped(q @ lists.key.transpose(2, 3), softcap)
    slope = torch.ones_like(logits) if softcap is None else 1 - (logits / softcap) ** 2
    logits = logits + alpha * held(spread[..., None] * lists.variance[:, :, None] * slope**2)
    logits = logits.masked_fill(lists.size[:, :, None] == 0, float("-inf"))
    return logits.flatten(1, 2), spread.flatten(1)


def probe_lists(logits: Tensor, spread: Tensor, lists: Summaries, known_lse: Tensor, budget: int) -> Tensor:
    """Choose the lists whose rows, left unread, would cost most: bool ``[B, Hkv, L]``.

    The KV heads of a batch row share ``budget`` rows, so that a head whose mass is known needs few.

    logits ``[B, Hq, L]`` and spread ``[B, Hq]`` from summary_logits; ``known_lse [B, Hq]`` of the rows read anyway.
    """
    costs = list_costs(logits, spread, lists, known_lse).flatten(1)
    return choose(costs, lists.size.flatten(1), budget).view_as(lists.size)


def choose(costs: Tensor, rows: Tensor, budget: int) -> Tensor:
    """The entries of highest cost whose ``rows [B, n]`` fit the budget: bool ``[B, n]``.

    Costs (not negative) compare by the leading 11 bits after the sign of their float32: in the bucket at the threshold,
    entries are taken in their order, those too large for what is left passed over. No sort is needed then.
    """
    bucket = costs.float().contiguous().view(torch.int32).long() >> 20
    above = torch.zeros(len(costs), 2049, dtype=torch.int64, device=costs.device)
    above[:, :2048].scatter_add_(1, bucket, rows)
    above = above.flip(1).cumsum(dim=1).flip(1)
    cut = (above > budget).sum(dim=1, keepdim=True)
    left = budget - above.gather(1, cut)
    taken = (bucket >= cut) & (rows > 0)
    rest = (bucket == cut - 1) & (rows > 0) & (rows <= left)
    while bool(rest.any()):
        fits = rest & ((rows * rest).cumsum(dim=1) <= left)
        taken |= fits
        left -= (rows * fits).sum(dim=1, keepdim=True)
        rest &= ~fits & (rows <= left)
    return taken


def whole_mass(logits: Tensor, lists: Summaries, known_lse: Tensor) -> Tensor:
    """Log of the weight of all rows as far as summaries tell, ``[B, Hq]``; 0 where there is none."""
    group = logits.shape[1] // lists.size.shape[1]
    weights = logits + lists.size.log().repeat_interleave(group, dim=1)
    total = torch.logaddexp(known_lse, torch.logsumexp(weights, dim=-1))
    return total.masked_fill(total == float("-inf"), 0.0)


def list_costs(
    logits: Tensor, spread: Tensor, lists: Summaries, known_lse: Tensor, weights: Tensor | None = None
) -> Tensor:
    """What leaving each list unread may cost, ``[B, Hkv, L]``; see probe_lists for the arguments.

    The softmax share of a list's rows times the deviation of their logits, summed over the query heads of a group, by
    their ``weights [Hq]`` (None: alike).
    """
    batch, kv_heads, count = lists.size.shape
    group = logits.shape[1] // kv_heads
    total = whole_mass(logits, lists, known_lse)
    share = torch.exp(logits - total[..., None]) * spread.sqrt()[..., None]
    if weights is not None:
        share = share * weights[:, None]
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
    # Chosen lists first, so that the ranges handed over are as few as the fullest head needs.
    widest = max(1, int(chosen.sum(dim=-1).max()))
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., :widest]
    ranges = ranges.gather(2, order[..., None].expand(-1, -1, -1, 2))
    ranges = ranges.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)[:, :, None]
    read = attend_rows(query, keys, values, ranges=ranges, scale=scale, softcap=softcap, backend=backend)
    if tail:
        rest = attend_summaries(query, lists, chosen, logits, scale=scale, beta=beta)
    else:
        rest = empty_state(query, row_dim(values))
    return torch.stack([read[0], rest[0]]), torch.stack([read[1], rest[1]])


def attend_summaries(
    query: Tensor, lists: Summaries, chosen: Tensor, logits: Tensor, *, scale: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The state ``(out [B, Hq, 1, Dv], lse [B, Hq, 1])`` of the lists not chosen; see attend_lists for the arguments.

    A summary enters as ``size`` rows of its logit, its value moved along ``cross`` by ``beta`` for the heavier rows of
    the list.
    """
    q = lists.grouped(query, scale)
    weights = logits.view(*q.shape[:3], logits.shape[2]) + lists.size.log()[:, :, None]
    weights = weights.masked_fill(chosen[:, :, None], float("-inf"))
    lse = torch.logsumexp(weights, dim=-1, keepdim=True)
    shares = torch.exp(weights - lse.masked_fill(lse == float("-inf"), 0.0))
    tilt = (shares * lists.variance[:, :, None]).sum(dim=-1, keepdim=True)
    out = shares @ lists.value + beta * tilt * (q @ lists.cross)
    return out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)


def weights_by_place(begin: Tensor, size: Tensor, weights: Tensor, rows: int) -> Tensor:
    """``[B, Hq, rows]``: by place, the weight that each row of a list has; 0 for places of no list.

    begin, size ``[B, Hkv, L]``, size 0 for a list to leave out; weights ``[B, Hq, L]`` of one row of each.
    """
    batch, kv_heads, _ = begin.shape
    grouped = weights.view(batch, kv_heads, -1, weights.shape[2])
    found = weights.new_zeros(*grouped.shape[:3], rows)
    for b in range(batch):
        for h in range(kv_heads):
            found[b, h][:, row_places(begin[b, h], size[b, h])] = grouped[b, h].repeat_interleave(size[b, h], dim=1)
    return found.flatten(1, 2)


def row_places(begin: Tensor, size: Tensor) -> Tensor:
    """Places of the rows of lists ``begin .. begin + size`` (``[L]`` each), one list after the other."""
    offsets = torch.arange(int(size.sum()), device=begin.device) - (size.cumsum(dim=0) - size).repeat_interleave(size)
    return begin.repeat_interleave(size) + offsets
