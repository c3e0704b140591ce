"""Which row positions an answer puts its weight on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call
from .execute import Answer


@dataclass(frozen=True)
class Weights:
    """Softmax weights of one answer by row position, ``[B, Hq, T]`` each.

    Attributes:
        read: of rows by their own logits, because they were read.
        for_unread: of rows through what answers for rows that were not read: through the summary of a list, which its
            rows share evenly, or what rows of a sample weigh beyond their own logits.
    """

    read: Tensor
    for_unread: Tensor

    @property
    def total(self) -> Tensor:
        """All weight of each position; with extra rows and sink logits, which are at no position, sums to 1."""
        return self.read + self.for_unread


def dense_weights(call: Call) -> Weights:
    """Those of the newest query over all rows that it sees."""
    places = _places(call)
    hidden = call.index.positions(places) < call.store.start[:, None, None, None]
    logits = call.store.scores(call.query[:, :, -1:], places, call.scale, call.softcap)
    weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1).nan_to_num()
    read = _by_position(call, weights[:, :, 0], places[:, :, 0])
    return Weights(read, torch.zeros_like(read))


def weights_of(call: Call, answer: Answer) -> Weights:
    """Those of the newest query in a measured answer."""
    store, hot = call.store, answer.plan.hot
    assert answer.slots is not None
    assert answer.lse is not None
    newest, slots, lse = call.query[:, :, -1:], answer.slots[:, :, -1:], answer.lse[:, :, -1:, None]
    recent = _places(call)[..., hot:]
    recent = recent.masked_fill(recent < store.start[:, None, None, None], -1)
    exact = torch.cat([call.sink_slots(hot)[:, :, -1:], recent], dim=-1)
    own = [
        torch.exp(store.scores(newest, at, call.scale, call.softcap) - lse).nan_to_num()[:, :, 0]
        for at in (exact, slots)
    ]
    read = _by_position(call, torch.cat(own, dim=-1), torch.cat([exact, slots], dim=-1)[:, :, 0])
    for_unread = torch.zeros_like(read)
    if answer.unread is not None:
        for_unread = _by_position(call, answer.unread, _places(call)[:, :, 0, : answer.unread.shape[-1]])
    elif answer.log_weights is not None:
        more = own[1] * (torch.exp(answer.log_weights[:, :, -1]) - 1)
        for_unread = _by_position(call, more.nan_to_num(), slots[:, :, 0])
    if answer.dense_heads:
        group = newest.shape[1] // store.num_kv_heads
        heads = [head * group + i for head in answer.dense_heads for i in range(group)]
        read[:, heads], for_unread[:, heads] = dense_weights(call).read[:, heads], 0.0
    return Weights(read, for_unread)


def _places(call: Call) -> Tensor:
    """``[B, Hq, 1, T]``: all places of the store."""
    places = torch.arange(len(call.store), device=call.query.device)
    return places.expand(*call.query.shape[:2], 1, -1)


def _by_position(call: Call, weights: Tensor, places: Tensor) -> Tensor:
    """``weights [B, Hq, n]`` of ``places [B, Hq, n]`` (each once, -1 = none) as ``[B, Hq, T]`` by position."""
    at = call.index.positions(places[:, :, None])[:, :, 0].clamp(min=0)
    weights = weights.masked_fill(places < 0, 0.0)
    return weights.new_zeros(*weights.shape[:2], len(call.store)).scatter_add_(-1, at, weights)
