"""attend_rows in Triton: split-K attention over listed rows, partial states, then merge_states (FlashDecoding)."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_common import TILE_ELEMENTS, add_rows, device_of, finish, scaled, softcapped
from ._triton_merge_states import merge_states
from .packed import row_dim
from .reference import empty_state

# Programs to have in flight per multiprocessor; a guess from the register count, not yet measured on a GPU.
PROGRAMS_PER_PROCESSOR = 4
# A split of fewer blocks costs more to merge than it saves.
BLOCKS_PER_SPLIT = 2


@triton.jit
def _find_range(ends, position, inside, ranges, search_steps):
    """Binary search for the first range whose running end lies beyond each position."""
    found = tl.zeros_like(position)
    for step in range(search_steps):
        probe = found + (1 << (search_steps - 1 - step))
        end = tl.load(ends + probe - 1, mask=inside & (probe < ranges), other=2147483647)
        found = tl.where(end <= position, probe, found)
    return found


@triton.jit
def _attend_kernel(
    query, keys, values, rows, ends, log_weights, outs, lses,
    scale, softcap, slots, search_steps, heads, m, group,
    key_b, key_h, key_t, key_d, value_b, value_h, value_t, value_d,
    row_b, row_h, row_m, row_n, weight_b, weight_h, weight_m, weight_n,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program per (query, split). ``rows`` are ids, or the starts of ranges if ``ends`` (running) are given.

    Ranges are read as one sequence of positions, cut into equal splits: neither one long range nor many short
    ones leave programs idle.
    """
    at = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = at // (heads * m)
    h = at // m % heads
    i = at % m
    rows += b * row_b + h * row_h + i * row_m
    keys += b * key_b + h // group * key_h
    values += b * value_b + h // group * value_h
    if log_weights is not None:
        log_weights += b * weight_b + h * weight_h + i * weight_m

    if ends is None:
        length = slots
    else:
        ends += at * slots
        length = tl.load(ends + slots - 1)
    span = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    last = tl.minimum((split + 1) * span, length)

    dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_DV)
    q = tl.load(query + at * DIM + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    peak = float("-inf")
    mass = 0.0
    total = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(split * span, last, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        used = position < last
        if ends is None:
            slot = position
            row = tl.load(rows + slot.to(tl.int64) * row_n, mask=used, other=-1)
            used &= row >= 0
        else:
            slot = _find_range(ends, position, used, slots, search_steps)
            before = tl.load(ends + slot - 1, mask=used & (slot > 0), other=0)
            row = tl.load(rows + slot.to(tl.int64) * row_n, mask=used, other=0) + (position - before)
        k_at = keys + row[:, None] * key_t + dim[None, :] * key_d
        k = tl.load(k_at, mask=used[:, None] & (dim < DIM)[None, :], other=0.0).to(tl.float32)
        logits = scaled(tl.sum(k * q[None, :], axis=1) * scale, keys, row, used, key_t, DIM)
        if softcap is not None:
            logits = softcapped(logits, softcap)
        if log_weights is not None:
            logits += tl.load(log_weights + slot.to(tl.int64) * weight_n, mask=used, other=0.0).to(tl.float32)
        logits = tl.where(used, logits, float("-inf"))
        v_at = values + row[:, None] * value_t + value_dim[None, :] * value_d
        v = tl.load(v_at, mask=used[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0).to(tl.float32)
        v = scaled(v, values, row, used, value_t, VALUE_DIM, 1)
        peak, mass, total = add_rows(peak, mass, total, logits, v)
    out, lse = finish(peak, mass, total)
    state = split * tl.num_programs(0) + at
    tl.store(outs + state * VALUE_DIM + value_dim, out, mask=value_dim < VALUE_DIM)
    tl.store(lses + state, lse)


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
    """Attention over ids (-1 = none) or ranges of rows: ``(out [B, Hq, m, Dv], lse [B, Hq, m])``, both float32."""
    batch, heads, m, dim = query.shape
    value_dim = row_dim(values)
    ends = None
    if ids is not None:
        rows, length = ids, ids.shape[-1]
    else:
        assert ranges is not None
        rows, length = ranges[..., 0], keys.shape[2]
        ends = (ranges[..., 1] - rows).clamp(min=0).cumsum(dim=-1, dtype=torch.int32).contiguous()
    slots = rows.shape[-1]
    queries = batch * heads * m
    if queries == 0 or slots == 0 or length == 0:
        return empty_state(query, value_dim)

    blocks = tile(dim, value_dim, packed=torch.int8 in (keys.dtype, values.dtype))
    splits = split_count(queries, triton.cdiv(length, blocks["BLOCK_N"]), query.device)
    outs = torch.empty((splits, batch, heads, m, value_dim), dtype=torch.float32, device=query.device)
    lses = torch.empty((splits, batch, heads, m), dtype=torch.float32, device=query.device)
    weight_strides = (0, 0, 0, 0) if log_weights is None else log_weights.stride()
    cap = None if softcap is None else float(softcap)
    with device_of(query):
        _attend_kernel[(queries, splits)](
            query.contiguous(), keys, values, rows, ends, log_weights, outs, lses,
            scale, cap, slots, (slots - 1).bit_length(), heads, m, heads // keys.shape[1],
            *keys.stride(), *values.stride(), *rows.stride(), *weight_strides,
            DIM=dim, VALUE_DIM=value_dim, **blocks,
        )  # fmt: skip
    return (outs[0], lses[0]) if splits == 1 else merge_states(outs, lses)


def tile(dim: int, value_dim: int, *, packed: bool) -> dict[str, int]:
    """Block sizes for rows of these widths: as many rows as keep a tile of keys, and one of values, in registers."""
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    block_n = max(1, min(128, TILE_ELEMENTS // (1 + packed) // max(block_d, block_dv)))
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "num_warps": 4}


def split_count(queries: int, blocks: int, device: torch.device) -> int:
    """Programs per query: enough to fill the device, each with blocks enough to be worth a merge."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(-(-PROGRAMS_PER_PROCESSOR * processors // queries), blocks // BLOCKS_PER_SPLIT))
