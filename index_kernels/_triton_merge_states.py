"""merge_states in Triton: the log-sum-exp merge, one program per query."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Triton compiles the kernels' source itself; their arguments have no Python types to declare.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_common import add_rows, device_of, finish


@triton.jit
def _merge_kernel(
    outs, lses, out, lse, states, queries, VALUE_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Merging is attention: the logits are the lses, the values are the outs."""
    query = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_DV)
    peak = float("-inf")
    mass = 0.0
    total = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, states, BLOCK_S):
        state = first + tl.arange(0, BLOCK_S)
        at = state.to(tl.int64) * queries + query
        logits = tl.load(lses + at, mask=state < states, other=float("-inf"))
        # A state of no rows weighs nothing, whatever its out holds.
        used = (logits > float("-inf"))[:, None] & (dim < VALUE_DIM)[None, :]
        rows = tl.load(outs + at[:, None] * VALUE_DIM + dim[None, :], mask=used, other=0.0)
        peak, mass, total = add_rows(peak, mass, total, logits, rows)
    merged, merged_lse = finish(peak, mass, total)
    tl.store(out + query * VALUE_DIM + dim, merged, mask=dim < VALUE_DIM)
    tl.store(lse + query, merged_lse)


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``outs [S, ..., Dv]`` and ``lses [S, ...]`` to ``(out [..., Dv], lse [...])``."""
    outs, lses = outs.contiguous(), lses.contiguous()
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    if out.numel() == 0:
        return out, torch.logsumexp(lses, dim=0)
    with device_of(outs):
        _merge_kernel[(lse.numel(),)](
            outs, lses, out, lse, lses.shape[0], lse.numel(), VALUE_DIM=outs.shape[-1], **tile(outs.shape[-1])
        )
    return out, lse


def tile(value_dim: int) -> dict[str, int]:
    """Block sizes for rows of this width: the merge is short, so small blocks and one launch shape for any S."""
    block_dv = triton.next_power_of_2(value_dim)
    return {"BLOCK_S": max(1, min(16, 2048 // block_dv)), "BLOCK_DV": block_dv, "num_warps": 4}
