"""The operators in plain torch: the specification that every other backend is compared with.

Shapes (all files): query ``[B, Hq, m, D]``, keys ``[B, Hkv, T, D]``, values ``[B, Hkv, T, Dv]``; the
``Hq // Hkv`` query heads of a group share one KV head. Logits and states are float32. Rows are float32, float16,
bfloat16, or int8 packed with their scales (see ``packed``), which are unpacked as they are read.
"""

import torch
from torch import Tensor

from .packed import floats, row_dim

# Rows of a narrower type become float32 so many at a time.
BLOCK = 8192
NEG_INF = float("-inf")


def top_k(query: Tensor, keys: Tensor, k: int, *, scale: float, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Exact top-k of ``scale * q.k`` over rows ``start[b] <= id < stop[i]``; ties go to the smaller id.

    ``start`` is ``[B]``, ``stop`` is ``[m]``. Returns ids ``[B, Hq, m, k]`` (-1 = missing) and scores (-inf there).
    """
    batch, heads, m, _ = query.shape
    rows = torch.arange(keys.shape[2], device=keys.device)
    visible = (rows >= start[:, None, None, None]) & (rows < stop[:, None])
    scores = (_grouped_logits(query, keys) * scale).masked_fill(~visible, NEG_INF)
    found = min(k, keys.shape[2])
    ids = torch.full((batch, heads, m, k), -1, dtype=torch.int64, device=keys.device)
    best = scores.new_full((batch, heads, m, k), NEG_INF)
    best[..., :found], order = _best(scores, found)
    ids[..., :found] = order.masked_fill(best[..., :found] == NEG_INF, -1)
    return ids, best


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``scores [..., T]`` by falling score, and their ids; ties go to the smaller id, but for -inf."""
    best, ids = scores.topk(k, dim=-1)
    if k == 0:
        return best, ids
    # Which of equal scores it takes, and in what order they come, torch.topk does not say.
    least = best[..., -1:]
    left_out = (scores == least).sum(dim=-1) > (best == least).sum(dim=-1)
    if bool((left_out & (least[..., 0] > NEG_INF)).any()):
        order = scores.sort(dim=-1, descending=True, stable=True)
        return order.values[..., :k], order.indices[..., :k]
    ids = ids.sort(dim=-1).values
    order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return order.values, ids.gather(-1, order.indices)


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    ids: Tensor | None,
    ranges: Tensor | None,
    log_weights: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the given rows only: ``(out [B, Hq, m, Dv], lse [B, Hq, m])``, both float32.

    Rows come as ``ids [B, Hq, m, n]`` (-1 = none) or as half-open ``ranges [B, Hq, m, r, 2]``; each row, or each
    range, may carry a log-weight that is added to its logits. No rows at all gives ``out = 0, lse = -inf``.
    """
    if ids is not None:
        return _attend_ids(query, keys, values, scale, ids, log_weights, softcap)
    assert ranges is not None
    states = [
        _attend_range(
            query, keys, values, scale, ranges[..., r, :], None if log_weights is None else log_weights[..., r], softcap
        )
        for r in range(ranges.shape[3])
    ]
    if not states:
        return empty_state(query, row_dim(values))
    return merge_states(torch.stack([s[0] for s in states]), torch.stack([s[1] for s in states]))


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
    """Exact attention over rows from ``start [B]`` on, one range of attend_rows; causal: of the newest positions."""
    return attend_rows(
        query,
        keys,
        values,
        scale=scale,
        ids=None,
        ranges=rows_seen(query, keys, start, causal=causal),
        log_weights=None,
        softcap=softcap,
    )


def rows_seen(query: Tensor, keys: Tensor, start: Tensor, *, causal: bool) -> Tensor:
    """The ranges ``[B, Hq, m, 1, 2]`` from row ``start [B]`` on; causal: up to each query's own, the newest rows."""
    (batch, heads, m, _), rows = query.shape, keys.shape[2]
    stop = torch.arange(rows - m + 1, rows + 1, device=start.device) if causal else start.new_full((m,), rows)
    stop = stop.expand(batch, m)
    ranges = torch.stack([start[:, None].minimum(stop), stop], dim=-1)
    return ranges[:, None, :, None, :].expand(batch, heads, m, 1, 2)


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results over disjoint row sets (log-sum-exp merge, as in FlashDecoding).

    ``outs [S, ..., Dv]``, ``lses [S, ...]`` -> ``(out [..., Dv], lse [...])``. A source without rows has lse = -inf.
    """
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == NEG_INF, 0.0))
    # What an empty state holds does not matter, not even NaN.
    return torch.where(weights[..., None] > 0, weights[..., None] * outs, 0.0).sum(dim=0), lse


def empty_state(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """The state of no rows: the neutral element of merge_states."""
    out = query.new_zeros((*query.shape[:3], value_dim), dtype=torch.float32)
    return out, out.new_full(query.shape[:3], NEG_INF)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(logits / softcap)``; None: the logits as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def by_position(query: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Scaled queries ``[B, Hq, m, D]`` as ``[B, Hkv, m * group, D]`` float32: the heads of a group side by side."""
    batch, heads, m, dim = query.shape
    asking = (query.float() * scale).view(batch, kv_heads, heads // kv_heads, m, dim)
    return asking.transpose(2, 3).reshape(batch, kv_heads, -1, dim)


def by_head(found: Tensor, m: int) -> Tensor:
    """What ``m`` positions laid out so were answered, ``[B, Hkv, m * group, ...]``, as ``[B, Hq, m, ...]``."""
    answered: Tensor = found.unflatten(2, (m, -1)).transpose(2, 3).flatten(1, 2)
    return answered


def _grouped_logits(query: Tensor, keys: Tensor) -> Tensor:
    """``q.k`` as ``[B, Hq, m, T]`` without repeating keys per query head."""
    batch, heads, m, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * m, dim)
    if keys.dtype == torch.float32:
        return (grouped @ keys.transpose(2, 3)).view(batch, heads, m, keys.shape[2])
    blocks = [keys[:, :, lo : lo + BLOCK] for lo in range(0, max(1, keys.shape[2]), BLOCK)]
    logits = torch.cat([grouped @ floats(block).transpose(2, 3) for block in blocks], dim=-1)
    return logits.view(batch, heads, m, keys.shape[2])


def _finish(logits: Tensor, softcap: float | None, log_weights: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn raw logits into normalised weights and lse; rows outside the mask weigh nothing."""
    logits = softcapped(logits, softcap)
    if log_weights is not None:
        logits = logits + log_weights.float()
    logits = logits.masked_fill(~mask, NEG_INF)
    lse = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits - lse.masked_fill(lse == NEG_INF, 0.0)[..., None]), lse


def _attend_ids(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    ids: Tensor,
    log_weights: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    batch, heads = ids.shape[:2]
    group = heads // keys.shape[1]
    b = torch.arange(batch, device=ids.device)[:, None, None, None]
    h = (torch.arange(heads, device=ids.device) // group)[None, :, None, None]
    at = ids.clamp(min=0)
    logits = (floats(keys[b, h, at]) @ query.float()[..., None]).squeeze(-1) * scale
    weights, lse = _finish(logits, softcap, log_weights, ids >= 0)
    return (weights[..., None, :] @ floats(values[b, h, at])).squeeze(-2), lse


def _attend_range(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    bounds: Tensor,
    log_weight: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One range per query; only the slice that covers all of them is read."""
    used = bounds[..., 1] > bounds[..., 0]
    if not bool(used.any()):
        return empty_state(query, row_dim(values))
    lo, hi = int(bounds[..., 0][used].min()), int(bounds[..., 1][used].max())
    rows = torch.arange(lo, hi, device=keys.device)
    mask = (rows >= bounds[..., :1]) & (rows < bounds[..., 1:])
    logits = _grouped_logits(query, keys[:, :, lo:hi]) * scale
    weights, lse = _finish(logits, softcap, None if log_weight is None else log_weight[..., None], mask)
    batch, heads, m, span = weights.shape
    grouped = weights.view(batch, keys.shape[1], -1, span) @ floats(values[:, :, lo:hi])
    return grouped.view(batch, heads, m, -1), lse
