"""dense_attention: the full table scan, exact. The fallback and the yardstick."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from index_kernels import attend_rows, dense_decode, floats, merge_states, resolve_backend
from index_kernels.ops import FEW_QUERIES, check_rows
from index_kernels.packed import row_dim
from index_kernels.reference import softcapped

# Bytes of float32 logits held at once where the logits are needed explicitly (softcap, lse).
_LOGITS_BYTES = 64 << 20
# Of few queries, as a check of drafted tokens has, our own kernel is faster than torch's from so many rows on.
MANY_ROWS = 1024


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    start: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of the m newest positions over all rows.

    Args:
        query: ``[B, Hq, m, D]``, the last m positions.
        keys, values: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, or packed int8 rows; Hkv divides Hq, m <= T.
        start: int64 ``[B]``, first valid row of each batch row (left padding).
        scale: factor of the logits, default ``1 / sqrt(D)``.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        return_lse: also return the log-sum-exp of the logits, ``[B, Hq, m]`` float32.

    Returns:
        ``[B, Hq, m, Dv]`` in the query's dtype (float32 beside an lse); zeros where a query sees no row.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; states what was received.
    """
    check_rows(query, keys, values)
    if query.shape[2] > keys.shape[2]:
        raise ValueError(f"query {list(query.shape)} needs its own rows: keys are {list(keys.shape)}, expected m <= T")
    if start is not None and (start.shape != query.shape[:1] or start.dtype != torch.int64):
        raise ValueError(f"start is {start.dtype} {list(start.shape)}, expected torch.int64 [{query.shape[0]}]")
    sdpa = softcap is None and not return_lse
    if softcap is None and start is None and _takes_flash(query, keys, values):
        out, lse = _flash(query, keys, values, scale)
        return (out.float(), lse) if return_lse else out
    one = query.shape[2] == 1
    if one and sdpa and _prefers_sdpa(query.device) and keys.dtype == values.dtype == query.dtype:
        return _scan_many(query, keys, values, start, scale)
    plain = sdpa and start is None and query.shape[2] == keys.shape[2] and keys.dtype == values.dtype == query.dtype
    if one or _is_ours(query, keys, values, plain=plain):
        out, lse = dense_decode(query, keys, values, start=start, scale=scale, softcap=softcap)
        return (out, lse) if return_lse else out.to(query.dtype)
    if sdpa:
        return _scan_many(query, keys, values, start, scale)
    out, lse = _scan_with_lse(query, keys, values, start, scale, softcap)
    return (out, lse) if return_lse else out.to(query.dtype)


def masked_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Exact attention under any mask: bool (True = read) or additive, broadcastable to ``[B, Hq, m, T]``.

    Returns ``(out [B, Hq, m, Dv], lse [B, Hq, m])``, float32. For layers that dbattn does not serve.
    """
    batch, heads, m, _ = query.shape
    step = max(1, _LOGITS_BYTES // (4 * batch * heads * keys.shape[2]))
    group = heads // keys.shape[1]
    keys, values = floats(keys), floats(values)
    outs, lses = [], []
    for lo in range(0, m, step):
        part = query[:, :, lo : lo + step].float()
        grouped = part.reshape(batch, keys.shape[1], -1, part.shape[-1])
        logits = (grouped @ keys.transpose(2, 3)).view(batch, heads, -1, keys.shape[2]) * scale
        logits = softcapped(logits, softcap)
        if mask is not None:
            rows = mask[..., lo : lo + step, :] if mask.shape[-2] > 1 else mask
            logits = logits.masked_fill(~rows, float("-inf")) if rows.dtype == torch.bool else logits + rows
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        out = weights.view(batch, keys.shape[1], group * weights.shape[2], -1) @ values
        outs.append(out.view(batch, heads, -1, values.shape[-1]))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def merge_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The state ``(out, lse)`` with one more row of value zero per head, whose logits are ``sink_logits [Hq]``."""
    sink = sink_logits.to(lse)[None, :, None].expand_as(lse)
    return merge_states(torch.stack([out, torch.zeros_like(out)]), torch.stack([lse, sink]))


def _prefers_sdpa(device: torch.device) -> bool:
    """Whether torch's own kernel scans the rows for one position faster than ours there."""
    return device.type == "cuda"


def _is_ours(query: Tensor, keys: Tensor, values: Tensor, *, plain: bool) -> bool:
    """Whether our own kernels, which have no gradients, serve several positions faster than torch's.

    ``plain``: torch's need no mask, no other type of rows, and tell no log-sum-exp: then they are as fast.
    """
    if torch.is_grad_enabled() and any(rows.requires_grad for rows in (query, keys, values)):
        return False
    few = query.shape[1] * query.shape[2] <= FEW_QUERIES * keys.shape[1]
    return (keys.shape[2] >= MANY_ROWS if few else not plain) and resolve_backend(query) == "numba"


def _takes_flash(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether torch's flash kernel serves these rows."""
    dim = query.shape[3]
    return (
        _is_flash_type(query)
        and keys.dtype == values.dtype == query.dtype
        and values.shape[3] == dim <= 256
        and dim % 8 == 0
        and _has_flash(query.device)
    )


def _is_flash_type(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Causal attention of the newest positions by torch's flash kernel: ``(out, lse)``.

    Called by its own name: scaled_dot_product_attention takes cuDNN's kernels on an H100, which plan anew for each
    number of rows (milliseconds a step), and none of these with a mask, which a chunk of positions would need.
    """
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, is_causal=query.shape[2] > 1, scale=scale
    )
    return found[0], found[1]


def _scan_many(query: Tensor, keys: Tensor, values: Tensor, start: Tensor | None, scale: float | None) -> Tensor:
    if not keys.dtype == values.dtype == query.dtype:
        # Rows of another type become float32, packed ones what a GPU's flash kernel takes, for one KV head at a time.
        group, packed = query.shape[1] // keys.shape[1], keys.dtype == values.dtype == torch.int8
        kind = query.dtype if packed and _is_flash_type(query) else torch.float32
        heads = []
        for h, asking in enumerate(torch.split(query, group, dim=1)):
            head, its_values = (floats(rows[:, h : h + 1]).to(kind) for rows in (keys, values))
            heads.append(_scan_many(asking.to(kind), head, its_values, start, scale))
        return torch.cat(heads, dim=1).to(query.dtype)
    if start is None and _takes_flash(query, keys, values):
        return _flash(query, keys, values, scale)[0]
    m, rows = query.shape[2], keys.shape[2]
    if start is None and m in (1, rows):  # without a mask torch may take its fast kernels
        return F.scaled_dot_product_attention(query, keys, values, is_causal=m > 1, scale=scale, enable_gqa=True)
    mask = torch.ones(m, rows, dtype=torch.bool, device=query.device).tril(rows - m)
    if start is not None:
        mask = mask & (torch.arange(rows, device=query.device) >= start[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    # A padded query sees no row at all; its output is defined as zero, where SDPA may give NaN.
    return out if start is None else out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)


def _scan_with_lse(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor | None, scale: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    batch, heads, m, _ = query.shape
    step = max(1, _LOGITS_BYTES // (4 * batch * heads * max(1, keys.shape[2])))
    states = []
    for lo in range(0, m, step):
        part = query[:, :, lo : lo + step]
        ranges = causal_ranges(part, keys.shape[2] - m + lo, start)
        states.append(attend_rows(part, keys, values, ranges=ranges, scale=scale, softcap=softcap))
    if not states:
        empty = query.new_zeros((batch, heads, 0, row_dim(values)), dtype=torch.float32)
        return empty, empty.sum(-1)
    return torch.cat([out for out, _ in states], dim=2), torch.cat([lse for _, lse in states], dim=2)


def causal_ranges(query: Tensor, first_position: int, start: Tensor | None, lo: int = 0) -> Tensor:
    """Ranges ``[B, Hq, m, 1, 2]``: rows from ``max(lo, start[b])`` up to each query's own position."""
    batch, heads, m, _ = query.shape
    stop = torch.arange(first_position + 1, first_position + 1 + m, device=query.device)
    ranges = torch.stack([torch.full_like(stop, lo), stop], dim=-1).expand(batch, m, 2)
    if start is not None:
        ranges = torch.stack([ranges[..., 0].clamp(min=0).maximum(start[:, None]), ranges[..., 1]], dim=-1)
    return ranges[:, None, :, None, :].expand(batch, heads, m, 1, 2)


def exact_ranges(query: Tensor, first_position: int, start: Tensor, hot: int, n_sink: int) -> Tensor:
    """``[B, Hq, m, 2, 2]``: the sinks below ``hot``, and the rows from ``hot`` up to each query's own."""
    newest = causal_ranges(query, first_position, start, hot)
    sinks = torch.stack([start.clamp(max=hot), (start + n_sink).clamp(max=hot)], dim=-1)
    return torch.cat([sinks[:, None, None, None, :].expand_as(newest), newest], dim=3)
