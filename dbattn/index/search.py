"""The best rows of a store: those an index finds, and those it does not answer for."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from index_kernels import top_k

from ..query.call import Call
from .base import KeyIndex


def search_rows(call: Call, index: KeyIndex, k: int) -> tuple[Tensor, Tensor, bool]:
    """The k rows with the largest logits: ids ``[B, Hq, m, k]``, scores likewise, and whether none was overlooked.

    The index's candidates, the sinks and the hot rows are scored exactly; ties go to the smaller id. No row that a
    query does not see may be sealed.
    """
    store, query, wanted = call.store, call.query, k
    keys, m, k = store.rows[0], query.shape[2], min(k, len(store))
    hot = min(len(store) - m + 1, len(index))
    positions = torch.arange(len(store) - m + 1, len(store) + 1, device=query.device)
    start = (store.start - hot).clamp(min=0)
    newest, _ = top_k(query, keys[:, :, hot:], k, scale=call.scale, start=start, stop=positions - hot)
    slots = torch.where(newest >= 0, newest + hot, newest)
    if hot > 0:
        found = index.search(query, store, k, call.first_index_row, hot).ids
        slots = torch.cat([slots, call.sink_slots(hot), found], dim=-1)
    # All of them by one piece of code: equal keys must get equal scores for the rule of ties to hold.
    ids, scores = index.positions(slots), store.scores(query, slots, call.scale)
    ids, scores = (
        pad(part, (0, wanted - part.shape[-1]), value=none)
        for part, none in zip(best_of(ids, scores, k), (-1, float("-inf")), strict=True)
    )
    return ids, scores, hot <= 0 or index.searches_all


def best_of(ids: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k with the largest scores; equal ones by rising id."""
    by_id = ids.argsort(dim=-1)
    ids, scores = ids.gather(-1, by_id), scores.gather(-1, by_id)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return ids.gather(-1, best), scores.gather(-1, best)
