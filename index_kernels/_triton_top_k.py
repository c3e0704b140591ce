"""top_k in Triton: each program scores a block of rows and keeps its best; torch.topk merges the blocks.

A candidate is one int64: the score's bits, made to sort like the score, above the inverted row id. Candidates are
distinct, so one integer order gives both the ranking and the tie rule (equal scores by rising id).

Ties are ties of float32 scores. Backends sum the products in different orders, so scores closer than float32
rounding may rank differently; where the sums are exact (small integers, say) the ids are identical.

Candidates take 8 * min(k, 512) bytes per 512 rows and query, so at most 8 bytes per row and query.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_common import device_of, scaled

# Rows per program. Half the size would sort faster and leave twice the candidates to merge.
BLOCK_T = 512
# Dimensions read per step: a memory sector of a half-precision row. Twice as many spill registers.
BLOCK_D = 16


@triton.jit
def _pack(scores, rows):
    # -0.0 equals 0.0 as a score but not as bits.
    bits = tl.where(scores == 0, 0, scores.to(tl.int32, bitcast=True))
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (rank.to(tl.int64) << 32) | (0x7FFFFFFF - rows).to(tl.int64)


@triton.jit
def _unpack(packed):
    rank = (packed >> 32).to(tl.int32)
    bits = tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def _score_kernel(
    query, keys, start, stop, candidates,
    scale, length, dims, keep, queries, blocks, heads, m, group, key_b, key_h, key_t, key_d,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    """One program per (block of rows, query); queries vary fastest, so heads of a group find the rows in the cache."""
    program = tl.program_id(0)
    at = (program % queries).to(tl.int64)
    block = program // queries
    b = at // (heads * m)
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    visible = (row >= tl.load(start + b)) & (row < tl.load(stop + at % m)) & (row < length)
    keys += b * key_b + at // m % heads // group * key_h
    scores = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, dims, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        q = tl.load(query + at * dims + dim, mask=dim < dims, other=0.0).to(tl.float32)
        k_at = keys + row.to(tl.int64)[:, None] * key_t + dim[None, :] * key_d
        k = tl.load(k_at, mask=visible[:, None] & (dim < dims)[None, :], other=0.0).to(tl.float32)
        scores += tl.sum(k * q[None, :], axis=1)
    scores = scaled(scores * scale, keys, row.to(tl.int64), visible, key_t, dims)
    packed = _pack(tl.where(visible, scores, float("-inf")), row)
    if SORT:
        packed = tl.sort(packed, descending=True)
    column = tl.arange(0, BLOCK_T)
    tl.store(candidates + (at * blocks + block) * keep + column, packed, mask=column < keep)


@triton.jit
def _unpack_kernel(packed, ids, scores, found, k, BLOCK: tl.constexpr):
    """One program per (query, block of columns): ids and scores, padded from the found to the k columns."""
    at = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score, row = _unpack(tl.load(packed + at * found + column, mask=column < found, other=0))
    score = tl.where(column < found, score, float("-inf"))
    tl.store(ids + at * k + column, tl.where(score == float("-inf"), -1, row), mask=column < k)
    tl.store(scores + at * k + column, score, mask=column < k)


def top_k(query: Tensor, keys: Tensor, k: int, *, scale: float, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Exact top-k of ``scale * q.k`` over rows ``start[b] <= id < stop[i]``: ids ``[B, Hq, m, k]`` and scores."""
    batch, heads, m, dim = query.shape
    queries, length = batch * heads * m, keys.shape[2]
    blocks = triton.cdiv(length, BLOCK_T)
    keep = min(k, BLOCK_T)
    ids = torch.full((batch, heads, m, k), -1, dtype=torch.int64, device=query.device)
    scores = torch.full((batch, heads, m, k), float("-inf"), dtype=torch.float32, device=query.device)
    if queries == 0 or length == 0:
        return ids, scores
    candidates = torch.empty((queries, blocks * keep), dtype=torch.int64, device=query.device)
    with device_of(query):
        _score_kernel[(queries * blocks,)](
            query.contiguous(), keys, start.contiguous(), stop.contiguous(), candidates,
            scale, length, dim, keep, queries, blocks, heads, m, heads // keys.shape[1], *keys.stride(),
            BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, SORT=keep < BLOCK_T, num_warps=8,
        )  # fmt: skip
        found = min(k, blocks * keep)
        best = candidates.topk(found, dim=-1).values
        _unpack_kernel[(queries, triton.cdiv(k, 512))](best, ids, scores, found, k, BLOCK=512, num_warps=4)
    return ids, scores
