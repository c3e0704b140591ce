"""Shape checks and dispatch: Triton for CUDA tensors, Numba for CPU tensors; ``backend=`` overrides."""

import math
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from .fork import check_fork
from .inference import inference_only
from .integer import is_integer
from .packed import row_dim

BACKENDS = ("auto", "reference", "numba", "triton")
# The ops that a backend implements; the reference serves the others.
_SERVED = {"numba": {"attend_rows", "dense_decode"}, "triton": {"attend_rows", "dense_decode", "merge_states", "top_k"}}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Queries for each KV head of which the CPU deals rows to its threads; of more, queries.
FEW_QUERIES = 384
# What keys and values may be: int8 is packed rows, see packed.py.
STORED = (*FLOATS, torch.int8)


def top_k(
    query: Tensor,
    keys: Tensor,
    k: int,
    *,
    scale: float | None = None,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k rows with the largest ``scale * q.k``, exactly.

    Args:
        query: ``[B, Hq, m, D]``.
        keys: ``[B, Hkv, T, D]``, or packed rows int8 ``[B, Hkv, T, D + 4]`` (see ``pack_rows``); Hkv divides Hq.
        k: rows per query, at least 1; may exceed T.
        scale: factor of the logits, default ``1 / sqrt(D)``.
        start: int64 ``[B]``, the first row each batch row may see (default 0).
        stop: int64 ``[m]``, one past the last row each query may see (default T).
        backend: "auto", "reference", "numba" or "triton".

    Returns:
        ids ``[B, Hq, m, k]`` int64, by falling score, equal scores by rising id, -1 where there are fewer rows;
        scores ``[B, Hq, m, k]`` float32, -inf where the id is -1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or k < 1; states what was received.
    """
    check_rows(query, keys)
    if not is_integer(k, 1):
        raise ValueError(f"k is {k!r}, expected an integer of at least 1")
    start = _bounds(start, "start", query.shape[0], 0, query)
    stop = _bounds(stop, "stop", query.shape[2], keys.shape[2], query)
    run = _implementation("top_k", query, backend)
    return run(query, keys, k, scale=_scale(scale, query), start=start, stop=stop)


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
    log_weights: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over chosen rows, as a mergeable state ``(out, lse)``.

    Args:
        query: ``[B, Hq, m, D]``.
        keys, values: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, or packed rows (see ``pack_rows``); Hkv divides Hq.
        ids: int64 ``[B, Hq, m, n]``, rows to read, -1 for none. A row must not occur twice.
        ranges: int64 ``[B, Hq, m, r, 2]``, half-open row ranges that do not overlap. Give ids or ranges, not both.
        log_weights: ``[B, Hq, m, n]`` (or ``r``), added to the logits of each row (or of each range's rows).
        scale: factor of the logits, default ``1 / sqrt(D)``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before log-weights are added.
        backend: "auto", "reference", "numba" or "triton".

    Returns:
        out ``[B, Hq, m, Dv]`` and lse ``[B, Hq, m]``, float32; ``out = 0, lse = -inf`` where there was no row.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; states what was received.
    """
    check_rows(query, keys, values)
    if (ids is None) == (ranges is None):
        raise ValueError("give either ids or ranges: " + ("both are missing" if ids is None else "both were given"))
    rows = ids if ids is not None else ranges
    assert rows is not None
    what, shape = ("ids", "[B, Hq, m, n]") if ids is not None else ("ranges", "[B, Hq, m, r, 2]")
    wanted_dims = 4 if ids is not None else 5
    if rows.ndim != wanted_dims or rows.shape[:3] != query.shape[:3] or (ranges is not None and rows.shape[-1] != 2):
        raise ValueError(
            f"{what} have shape {list(rows.shape)}, expected {shape} with {list(query.shape[:3])} in front"
        )
    if rows.dtype != torch.int64:
        raise ValueError(f"{what} have dtype {rows.dtype}, expected torch.int64")
    if log_weights is not None and log_weights.shape != rows.shape[:4]:
        raise ValueError(f"log_weights have shape {list(log_weights.shape)}, expected {list(rows.shape[:4])}")
    if log_weights is not None:
        if not log_weights.is_floating_point():
            raise ValueError(f"log_weights have dtype {log_weights.dtype}, expected a floating-point dtype")
        _same_device(query, log_weights=log_weights)
    _same_device(query, **{what: rows})
    if (
        rows.numel()
        and not rows.is_cuda
        and (int(rows.max()) > keys.shape[2] - (ids is not None) or int(rows.min()) < -1)
    ):
        raise ValueError(f"{what} reach from {int(rows.min())} to {int(rows.max())}, there are {keys.shape[2]} rows")
    run = _implementation("attend_rows", query, backend)
    scale, softcap = _scale(scale, query), _softcap(softcap)
    return run(query, keys, values, scale=scale, ids=ids, ranges=ranges, log_weights=log_weights, softcap=softcap)


def dense_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    start: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact attention of the m newest positions over rows up to each one's own, or of m queries over all rows.

    Args:
        query: ``[B, Hq, m, D]``; where ``causal``, the last m positions.
        keys, values: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, or packed rows (see ``pack_rows``); Hkv divides Hq.
        start: int64 ``[B]``, the first row each batch row may see (default 0).
        scale: factor of the logits, default ``1 / sqrt(D)``.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        causal: whether a query sees the rows up to its own only; False: all of them.
        backend: "auto", "reference", "numba" or "triton".

    Returns:
        out ``[B, Hq, m, Dv]`` and lse ``[B, Hq, m]``, float32; ``out = 0, lse = -inf`` where there was no row.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; states what was received.
    """
    check_rows(query, keys, values)
    if query.shape[2] < 1 or (causal and query.shape[2] > max(1, keys.shape[2])):
        raise ValueError(
            f"query {list(query.shape)} has {query.shape[2]} positions, expected 1 to {keys.shape[2]}: the newest rows"
        )
    start = _bounds(start, "start", query.shape[0], 0, query)
    run = _implementation("dense_decode", query, backend)
    options = {"scale": _scale(scale, query), "softcap": _softcap(softcap)}
    return run(query, keys, values, start=start, causal=causal, **options)


def merge_states(outs: Tensor, lses: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Merge states over disjoint row sets: ``l = logsumexp(l_s)``, ``o = sum_s o_s * exp(l_s - l)``.

    Args:
        outs: ``[S, B, Hq, m, Dv]``.
        lses: ``[S, B, Hq, m]``, -inf for a source without rows.
        backend: "auto", "reference", "numba" or "triton".

    Returns:
        out ``[B, Hq, m, Dv]`` and lse ``[B, Hq, m]``, float32.

    Raises:
        ValueError: shapes that do not fit; states what was received.
    """
    if outs.ndim != 5 or outs.shape[:-1] != lses.shape or outs.shape[0] == 0:
        raise ValueError(
            f"outs {list(outs.shape)} and lses {list(lses.shape)} do not fit: "
            "expected [S, B, Hq, m, Dv] and [S, B, Hq, m] with S >= 1"
        )
    _same_device(outs, lses=lses)
    return _implementation("merge_states", outs, backend)(outs.float(), lses.float())


def read_bandwidth() -> float:
    """Bytes per second that the CPU reads from memory: the limit of every scan. Takes about half a second.

    Raises:
        ImportError: Numba is missing; names the extra to install.
    """
    resolve_backend(torch.empty(0), "numba")
    from ._cpu_common import read_bandwidth as measure

    return float(measure())


def resolve_backend(tensor: Tensor, backend: str = "auto") -> str:
    """The backend that will serve this tensor: the name that EXPLAIN shows.

    On the CPU "auto" is Numba where it is installed, else the reference.

    Raises:
        ValueError: an unknown backend, or one asked for on a tensor that it cannot read.
        ImportError: Numba asked for, or a CUDA tensor, without the package; names the extra to install.
        RuntimeError: Numba in a process where its threads are lost, see ``check_fork``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    on_cpu = tensor.is_cpu
    if backend == "reference" or (backend == "auto" and not tensor.is_cuda and not (on_cpu and _installed("numba"))):
        return "reference"
    if backend == "numba" or (backend == "auto" and on_cpu):
        if not on_cpu:
            raise ValueError(f"backend 'numba' needs CPU tensors, got {tensor.device}")
        if not _installed("numba"):
            raise ImportError('the CPU kernels need Numba: pip install "dbattn[cpu]" (or pass backend="reference")')
        check_fork()
        return "numba"
    if not _installed("triton"):
        raise ImportError('CUDA tensors need Triton: pip install "dbattn[gpu]" (or pass backend="reference")')
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, got {tensor.device} (TRITON_INTERPRET=1 runs it on the CPU)"
        )
    return "triton"


def _implementation(op: str, tensor: Tensor, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    chosen = resolve_backend(tensor, backend)
    served = op in _SERVED.get(chosen, ())
    if backend not in ("auto", "reference") and not served:
        having = [name for name, ops in _SERVED.items() if op in ops]
        raise ValueError(f"backend {backend!r} has no {op}, expected auto, {', '.join([*having, 'reference'])}")
    return _loaded(op, chosen if served else "reference")


@cache
def _loaded(op: str, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    module = {"reference": "reference", "numba": f"_cpu_{op}"}.get(backend, f"_{backend}_{op}")
    run: Callable[..., tuple[Tensor, Tensor]] = getattr(import_module(f"index_kernels.{module}"), op)
    # The reference is torch throughout: its gradients are right.
    return run if backend == "reference" else inference_only(run)


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, expected a finite number")
    return float(scale)


def check_rows(query: Tensor, keys: Tensor, values: Tensor | None = None) -> None:
    """Raise ValueError unless query, keys and values have shapes, dtypes and devices that fit."""
    if query.ndim != 4 or keys.ndim != 4:
        raise ValueError(
            f"query {list(query.shape)} and keys {list(keys.shape)} must be [B, Hq, m, D] and [B, Hkv, T, D]"
        )
    if query.shape[0] != keys.shape[0] or query.shape[3] != row_dim(keys):
        raise ValueError(f"query {list(query.shape)} and keys {list(keys.shape)} differ in batch or head dimension")
    if keys.shape[1] == 0 or query.shape[1] % keys.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads do not divide into groups over {keys.shape[1]} KV heads")
    if query.dtype not in FLOATS:
        raise ValueError(f"query has dtype {query.dtype}, expected one of float32, float16, bfloat16")
    if keys.dtype not in STORED:
        raise ValueError(f"keys has dtype {keys.dtype}, expected one of float32, float16, bfloat16, int8")
    _same_device(query, keys=keys)
    if values is None:
        return
    if values.shape[:3] != keys.shape[:3] or values.ndim != 4:
        expected = [*keys.shape[:3], "Dv"]
        raise ValueError(f"values have shape {list(values.shape)}, expected {expected} to match the keys")
    if values.dtype not in STORED:
        raise ValueError(f"values have dtype {values.dtype}, expected one of float32, float16, bfloat16, int8")
    if row_dim(values) < 0:
        raise ValueError(f"values have shape {list(values.shape)}, expected packed rows [B, Hkv, T, Dv + 4]")
    _same_device(query, values=values)


def _softcap(softcap: float | None) -> float | None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, expected a positive number or None")
    return softcap


def _bounds(bounds: Tensor | None, name: str, size: int, default: int, query: Tensor) -> Tensor:
    if bounds is None:
        return torch.full((size,), default, dtype=torch.int64, device=query.device)
    if bounds.shape != (size,) or bounds.dtype != torch.int64:
        raise ValueError(f"{name} is {bounds.dtype} {list(bounds.shape)}, expected torch.int64 [{size}]")
    _same_device(query, **{name: bounds})
    return bounds


def _same_device(reference: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != reference.device:
            raise ValueError(f"{name} are on {tensor.device}, expected {reference.device} like the query")
