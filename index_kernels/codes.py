"""Operators on codes of rows, see packed.py: the torch code is the specification, and serves all but the CPU."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .lists import choose, row_places
from .packed import NOISE_DIVISOR, NOISE_LET_BE, decoded, floats, pack_rows, scales, turned_for_codes
from .reference import softcapped
from .summaries import Summaries


class CodedRows(NamedTuple):
    """The rows under opened lists, as their codes tell, n per KV head.

    Attributes:
        place: ``[B, Hkv, n]`` int64, where they stand; -1 fills up.
        owner: ``[B, Hkv, n]``, their lists.
        logits: ``[B, Hkv, G, n]``, -inf where place is -1.
        residual: likewise, the part of it that the code tells: the rest is the list's mean.
    """

    place: Tensor
    owner: Tensor
    logits: Tensor
    residual: Tensor


def score_codes(
    query: Tensor, lists: Summaries, opened: Tensor, codes: Tensor, *, scale: float, softcap: float | None
) -> CodedRows:
    """Logits of all rows of the opened lists (bool ``[B, Hkv, L]``) from their codes; query ``[B, Hq, 1, D]``.

    The query is rounded to int8 once it is turned, so that its products with codes are integers. Rounding of a code is
    noise in a logit, of variance |q|^2 scale^2 / 12, by which weights come out too large: half of what is over 1 is
    taken off. (Less is let be: on real rows it makes up for the weight that their summaries lack.)
    """
    sizes, numbers = lists.size * opened, torch.arange(opened.shape[2], device=opened.device)
    places = [
        [row_places(*of_head) for of_head in zip(*each, strict=True)] for each in zip(lists.begin, sizes, strict=True)
    ]
    owners = [[numbers.repeat_interleave(size) for size in each] for each in sizes]

    def padded(parts: list[list[Tensor]], filler: int) -> Tensor:
        # One place more than the fullest head needs, so that there is one.
        flat = pad_sequence([pad(part, (0, 1), value=filler) for each in parts for part in each], True, filler)
        return flat.view(*opened.shape[:2], -1)

    place, owner = padded(places, -1), padded(owners, 0)
    q = lists.grouped(query, scale)
    at = place.clamp(min=0)[..., None].expand(-1, -1, -1, codes.shape[3])
    coded = codes.gather(2, at)
    told = floats(pack_rows(turned_for_codes(q))) @ decoded(coded, query.shape[3]).transpose(2, 3)
    told = told - (noise_of_unit(q)[..., None] * scales(coded)[:, :, None] ** 2 - NOISE_LET_BE).clamp(min=0)
    mean = (q @ lists.key.transpose(2, 3)).gather(3, owner[:, :, None].expand(-1, -1, q.shape[2], -1))
    logits = softcapped(mean + told, softcap)
    residual = logits - softcapped(mean, softcap)
    return CodedRows(place, owner, logits.masked_fill(place[:, :, None] < 0, float("-inf")), residual)


def noise_of_unit(query: Tensor) -> Tensor:
    """Half the variance of a logit whose code was rounded to whole numbers, of queries ``[..., D]``."""
    return query.square().sum(dim=-1) / NOISE_DIVISOR


def choose_rows(rows: CodedRows, total: Tensor, budget: int, weights: Tensor | None = None) -> Tensor:
    """Those with the largest share of the softmax, summed over a group: bool ``[B, Hkv, n]``; see choose.

    ``total [B, Hq]`` is the log of all weight, as far as summaries tell; ``weights [Hq]`` of the heads, None: alike.
    """
    share = torch.exp(rows.logits - total.view(*rows.logits.shape[:3], 1))
    if weights is not None:
        share = share * weights.view(-1, share.shape[2], 1)
    share = share.sum(dim=2)
    there = (rows.place >= 0).long()
    return choose(share.flatten(1), there.flatten(1), budget).view_as(rows.place)


def attend_codes(
    query: Tensor, lists: Summaries, rows: CodedRows, taken: Tensor, *, scale: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The state ``(out [B, Hq, 1, Dv], lse [B, Hq, 1])`` of the coded rows that were not ``taken``.

    A row enters with the weight of its coded logit and the mean value of its list, moved along ``cross`` by ``beta`` as
    far as the row's logit is from its list's.
    """
    q = lists.grouped(query, scale)
    weights = rows.logits.masked_fill(taken[:, :, None], float("-inf"))
    lse = torch.logsumexp(weights, dim=-1, keepdim=True)
    shares = torch.exp(weights - lse.masked_fill(lse == float("-inf"), 0.0))
    value = lists.value.gather(2, rows.owner[..., None].expand(-1, -1, -1, lists.value.shape[3]))
    tilt = (shares * rows.residual).sum(dim=-1, keepdim=True) / lists.spread(q)[..., None]
    out = shares @ value + beta * tilt * (q @ lists.cross)
    return out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)


def rows_by_place(rows: CodedRows, taken: Tensor, lse: Tensor, sealed: int) -> tuple[Tensor, Tensor]:
    """By place: which of ``sealed`` rows are taken (bool ``[B, Hkv, sealed]``), and what the other coded rows weigh.

    The weights ``[B, Hq, sealed]`` are shares of all weight, whose log is ``lse [B, Hq, 1]``.
    """
    # Places that fill up go to one more, which is dropped.
    at = torch.where(rows.place < 0, sealed, rows.place)
    read = torch.zeros(*at.shape[:2], sealed + 1, dtype=torch.bool, device=at.device).scatter_(2, at, taken)
    shares = torch.exp(rows.logits - lse.view(*rows.logits.shape[:3], 1)).nan_to_num() * ~taken[:, :, None]
    found = shares.new_zeros(*shares.shape[:3], sealed + 1).scatter_(3, at[:, :, None].expand_as(shares), shares)
    return read[..., :sealed], found[..., :sealed].flatten(1, 2)
