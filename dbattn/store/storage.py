"""How a store keeps the numbers of its rows: as they come, in another float type, or as packed int8 rows."""

import math

import torch
from torch import Tensor

from index_kernels import floats, pack_rotated, pack_rows
from index_kernels.ops import FLOATS
from index_kernels.packed import row_dim, scales

# Elements of rows and queries may be this large: what is computed from them, in the end squares of products summed over
# all rows, then stays within float32.
LARGEST = 1e8
# Rows that came one by one to a device are looked at so many at a time, or before they are sealed.
LOOKED_AT = 512


def stored(name: str, rows: Tensor, storage: str | None, *, rotated: bool = False) -> Tensor:
    """Float rows ``[B, H, n, D]`` as they are kept under ``storage``, see RetrievalConfig; packed ones may be rotated.

    Raises:
        ValueError: a number that the type cannot hold; names it.
    """
    if storage is None:
        return rows
    if storage == "int8":
        return pack_rotated(rows) if rotated else pack_rows(rows)
    kept = rows.to(getattr(torch, storage))
    limit = torch.finfo(kept.dtype).max
    if limit < torch.finfo(rows.dtype).max and bool(kept.isinf().any()):
        at = kept.isinf().nonzero()[0].tolist()
        raise ValueError(f"{name} hold {rows[tuple(at)].item()} at {at}: storage={storage!r} ends at {limit:g}")
    return kept


def check_finite(name: str, rows: Tensor) -> None:
    """Raise ValueError naming the first NaN or infinite element of ``rows``, or a scale of packed rows that is none."""
    if rows.dtype == torch.int8:
        found = scales(rows)
        if not found.numel():
            return
        low, high = (each.item() for each in found.aminmax())
        if 0 <= low <= high <= torch.finfo(torch.float32).max / 127:  # neither holds of NaN
            return
        bad = ~((127 * found).isfinite() & (found >= 0))
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name} hold the scale {found[tuple(at)].item()} at {at}, expected finite, not negative")
        return
    # A finite sum proves every element finite in one cheap pass; only an overflow of the sum needs the second look.
    if math.isfinite(rows.sum(dtype=torch.float32).item()):
        return
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise ValueError(f"{name} hold {rows[tuple(at)].item()} at {at} ({len(bad)} elements are not finite)")


def check_range(name: str, rows: Tensor) -> None:
    """Raise ValueError naming the first element that is NaN, infinite or larger than ``LARGEST`` in size."""
    if not rows.numel():
        return
    if rows.dtype == torch.int8:
        check_finite(name, rows)
        if (127 * scales(rows)).max().item() <= LARGEST:
            return
        # Rotated, a row may have its whole length in one number: the length is what counts, but for what rounding adds.
        root = math.sqrt(row_dim(rows))
        rows = floats(rows).norm(dim=-1, keepdim=True) / (root * (1 + root / 254))
    low, high = rows.amin(), rows.amax()  # several times as fast as aminmax
    if low.item() >= -LARGEST and high.item() <= LARGEST:  # neither holds of NaN
        return
    check_finite(name, rows)
    at = (rows.abs() > LARGEST).nonzero()[0].tolist()
    raise ValueError(
        f"{name} hold {rows[tuple(at)].item():g} at {at}, expected at most {LARGEST:g} in size: "
        "products and distances of larger rows leave float32"
    )


def on_device(tensor: Tensor) -> bool:
    """Whether the host would have to wait to look at it."""
    return not tensor.is_cpu


def check_queries(what: str, queries: Tensor, kv_heads: int, device: torch.device) -> None:
    """Raise ValueError unless queries ``[B, Hq, n, D]`` fit a store's heads, device and range.

    ``what`` begins the error: "query is", "queries are".
    A single one on a device is not looked at: the answer to NaN is NaN.
    """
    heads = queries.shape[1]
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide into groups over {kv_heads} KV heads")
    if queries.dtype not in FLOATS or queries.device != device:
        raise ValueError(
            f"{what} {queries.dtype} on {queries.device}, expected float32, float16 or bfloat16 on {device}"
        )
    if queries.shape[2] > 1 or not on_device(queries):
        check_range(what.split()[0], queries)
