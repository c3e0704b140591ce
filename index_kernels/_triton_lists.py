"""The list operators in Triton: scores of summaries, costs of leaving lists unread, attention over summaries.

Signatures are those of lists.py. All tensors but the query are float32 there, so the kernels convert nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_attend_rows import split_count
from ._triton_common import TILE_ELEMENTS, add_rows, device_of, finish, softcapped
from ._triton_merge_states import merge_states
from .reference import empty_state
from .summaries import Summaries

# Lists per program where a list is a few numbers.
BLOCK_SCALARS = 1024


@triton.jit
def _log_sum_exp(x):
    peak = tl.max(x, axis=0)
    # Nothing but -inf has the sum -inf, and -inf - -inf would be NaN.
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    _, lse = finish(peak, tl.sum(tl.exp(x - shift), axis=0), 0.0)
    return lse


@triton.jit
def _summary_logits_kernel(
    query, spread, key, variance, size, logits, softcap, alpha, lists, group,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (block of lists, KV head): a mean key is read once for all query heads of its group."""
    kv = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < lists
    at = kv * lists + entry
    used = tl.load(size + at, mask=inside, other=0) > 0
    dim = tl.arange(0, BLOCK_D)
    k = tl.load(key + at[:, None] * DIM + dim[None, :], mask=used[:, None] & (dim < DIM)[None, :], other=0.0)
    scatter = alpha * tl.load(variance + at, mask=used, other=0.0)
    for head in range(kv * group, (kv + 1) * group):
        q = tl.load(query + head * DIM + dim, mask=dim < DIM, other=0.0)
        scores = tl.sum(k * q[None, :], axis=1)
        lift = scatter * tl.load(spread + head)
        if softcap is not None:
            scores = softcapped(scores, softcap)
            slope = 1 - (scores / softcap) * (scores / softcap)
            lift *= slope * slope
        tl.store(logits + head * lists + entry, tl.where(used, scores + lift, float("-inf")), mask=inside)


@triton.jit
def _block_lse_kernel(logits, size, lses, lists, group, BLOCK_N: tl.constexpr):
    """One program per (block of lists, query head): the log of the summed weights of the block's rows."""
    head = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(size + head // group * lists + entry, mask=entry < lists, other=0)
    weights = tl.load(logits + head * lists + entry, mask=rows > 0, other=float("-inf"))
    lse = _log_sum_exp(weights + tl.log(tl.maximum(rows, 1).to(tl.float32)))
    tl.store(lses + tl.program_id(0) * tl.num_programs(1) + head, lse)


@triton.jit
def _cost_kernel(
    logits, spread, variance, lses, costs, lists, group, parts, heads, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    """One program per (block of lists, KV head); the lses ``[parts, heads]`` of a query head add up to its total."""
    kv = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.arange(0, BLOCK_P)
    cost = tl.zeros([BLOCK_N], tl.float32)
    for head in range(kv * group, (kv + 1) * group):
        total = _log_sum_exp(tl.load(lses + part * heads + head, mask=part < parts, other=float("-inf")))
        total = tl.where(total == float("-inf"), 0.0, total)
        weights = tl.load(logits + head * lists + entry, mask=entry < lists, other=float("-inf"))
        cost += tl.exp(weights - total) * tl.sqrt(tl.load(spread + head))
    deviation = tl.sqrt(tl.load(variance + kv * lists + entry, mask=cost > 0, other=0.0))
    tl.store(costs + kv * lists + entry, cost * deviation, mask=entry < lists)


@triton.jit
def _attend_summaries_kernel(
    logits, size, chosen, value, variance, lean, outs, lses, lists, group,
    VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (query head, split); heads vary fastest, so those of a group find the values in the cache."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    span = tl.cdiv(tl.cdiv(lists, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    last = tl.minimum((split + 1) * span, lists)
    dim = tl.arange(0, BLOCK_D)
    toward = tl.load(lean + head * VALUE_DIM + dim, mask=dim < VALUE_DIM, other=0.0)
    peak = float("-inf")
    mass = 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(split * span, last, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        at = head // group * lists + entry
        rows = tl.load(size + at, mask=entry < last, other=0)
        used = (rows > 0) & (tl.load(chosen + at, mask=entry < last, other=1) == 0)
        weights = tl.load(logits + head * lists + entry, mask=used, other=float("-inf"))
        weights += tl.log(tl.maximum(rows, 1).to(tl.float32))
        v_at = value + at[:, None] * VALUE_DIM + dim[None, :]
        v = tl.load(v_at, mask=used[:, None] & (dim < VALUE_DIM)[None, :], other=0.0)
        v += tl.load(variance + at, mask=used, other=0.0)[:, None] * toward[None, :]
        peak, mass, total = add_rows(peak, mass, total, weights, v)
    out, lse = finish(peak, mass, total)
    state = split * tl.num_programs(0) + head
    tl.store(outs + state * VALUE_DIM + dim, out, mask=dim < VALUE_DIM)
    tl.store(lses + state, lse)


def summary_logits(
    query: Tensor, lists: Summaries, *, scale: float, softcap: float | None, alpha: float
) -> tuple[Tensor, Tensor]:
    """Log of the mean weight of each list's rows, ``[B, Hq, L]``, and ``spread [B, Hq]``."""
    batch, heads, _, dim = query.shape
    kv_heads, count = lists.size.shape[1:]
    q = lists.grouped(query, scale)
    spread = lists.spread(q)
    logits = torch.empty((batch, heads, count), dtype=torch.float32, device=query.device)
    if logits.numel():
        blocks = _tile(dim)
        cap = None if softcap is None else float(softcap)
        with device_of(query):
            _summary_logits_kernel[(triton.cdiv(count, blocks["BLOCK_N"]), batch * kv_heads)](
                q.contiguous(), spread.contiguous(), lists.key.contiguous(), lists.variance.contiguous(),
                lists.size.contiguous(), logits, cap, float(alpha), count, heads // kv_heads, DIM=dim, **blocks,
            )  # fmt: skip
    return logits, spread.view(batch, heads)


def list_costs(logits: Tensor, spread: Tensor, lists: Summaries, known_lse: Tensor) -> Tensor:
    """What leaving each list unread may cost, ``[B, Hkv, L]``."""
    batch, heads, count = logits.shape
    kv_heads = lists.size.shape[1]
    group = heads // kv_heads
    costs = torch.empty((batch, kv_heads, count), dtype=torch.float32, device=logits.device)
    if costs.numel() == 0:
        return costs
    blocks = triton.cdiv(count, BLOCK_SCALARS)
    lses = torch.empty((blocks + 1, batch, heads), dtype=torch.float32, device=logits.device)
    lses[blocks] = known_lse
    logits = logits.contiguous()
    with device_of(logits):
        _block_lse_kernel[(blocks, batch * heads)](
            logits, lists.size.contiguous(), lses, count, group, BLOCK_N=BLOCK_SCALARS, num_warps=4
        )
        _cost_kernel[(blocks, batch * kv_heads)](
            logits, spread.contiguous(), lists.variance.contiguous(), lses, costs, count, group, blocks + 1,
            batch * heads, BLOCK_N=BLOCK_SCALARS, BLOCK_P=triton.next_power_of_2(blocks + 1), num_warps=4,
        )  # fmt: skip
    return costs


def attend_summaries(
    query: Tensor, lists: Summaries, chosen: Tensor, logits: Tensor, *, scale: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The state ``(out [B, Hq, 1, Dv], lse [B, Hq, 1])`` of the lists not chosen."""
    batch, heads, count = logits.shape
    value_dim = lists.value.shape[3]
    if logits.numel() == 0:
        return empty_state(query, value_dim)
    # A value moves in proportion to its list's variance, so each can move before the sum, whatever the split.
    lean = beta * (lists.grouped(query, scale) @ lists.cross)
    blocks = _tile(value_dim)
    splits = split_count(batch * heads, triton.cdiv(count, blocks["BLOCK_N"]), query.device)
    outs = torch.empty((splits, batch, heads, 1, value_dim), dtype=torch.float32, device=query.device)
    lses = torch.empty((splits, batch, heads, 1), dtype=torch.float32, device=query.device)
    with device_of(query):
        _attend_summaries_kernel[(batch * heads, splits)](
            logits.contiguous(), lists.size.contiguous(), chosen.contiguous(), lists.value.contiguous(),
            lists.variance.contiguous(), lean.contiguous(), outs, lses, count, heads // lists.size.shape[1],
            VALUE_DIM=value_dim, **blocks,
        )  # fmt: skip
    return (outs[0], lses[0]) if splits == 1 else merge_states(outs, lses)


def _tile(width: int) -> dict[str, int]:
    """Block sizes for summaries of this width: as many as keep one tile of them in registers."""
    block_d = triton.next_power_of_2(width)
    return {"BLOCK_N": max(1, min(128, TILE_ELEMENTS // block_d)), "BLOCK_D": block_d, "num_warps": 4}
