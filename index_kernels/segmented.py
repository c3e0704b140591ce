"""attend_segmented: one query position over a store of lists, every row source of it in one operator.

The torch code is the specification, and with the device's own kernels for its parts the CUDA path; on the CPU one
fused Numba kernel serves it.
"""

import time
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .codes import attend_codes, choose_rows, rows_by_place, score_codes
from .lists import (
    attend_summaries,
    choose,
    list_costs,
    summary_logits,
    weights_by_place,
    whole_mass,
)
from .ops import attend_rows, check_rows, merge_states, resolve_backend
from .packed import row_dim
from .reference import empty_state
from .summaries import ListReading, ListTable, SegmentedAnswer

# On layers of two models at 16K and 32K, whole lists are nearer than codes with so many rows.
WHOLE, WHOLE_PER_READ = 4608, 7


def attend_segmented(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: ListTable,
    how: ListReading,
    *,
    start: Tensor,
    by_code: bool = False,
    with_lse: bool = True,
    details: bool = False,
    unread: bool = False,
    newest: Tensor | None = None,
    backend: str = "auto",
) -> SegmentedAnswer:
    """Sinks and hot rows exactly, the best rows of opened lists, their others by code, everything else by summary.

    Args:
        query: ``[B, Hq, 1, D]``, at position ``how.length - 1``.
        keys, values: the store's buffers, ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]`` with T >= how.length, or packed.
        table: the lists of rows ``0 .. how.sealed``.
        how: see ListReading.
        start: int64 ``[B]``, first valid row of each batch row.
        by_code: rows are dear to read, as in the host's memory: a GPU reads those of opened lists that their codes
            choose, not all. Others always do.
        with_lse: give ``lse`` and ``lse_by_source``, too. GPUs and the reference always do.
        details: give ``taken``, too.
        unread: and ``unread``, which takes longer. GPUs and the reference always do.
        newest: int64 ``[1]`` on the device, where the query is, in place of ``how.length - 1``: so a CUDA graph of the
            call serves while rows come, until lists change. On a GPU only.
        backend: "auto", "reference", "numba" or "triton".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; states what was received.
    """
    if query.shape[2] != 1:
        raise ValueError(f"query {list(query.shape)} has {query.shape[2]} positions, expected one")
    if how.head_weights is not None and len(how.head_weights) != query.shape[1]:
        raise ValueError(f"head_weights are {len(how.head_weights)}, expected one for each of {query.shape[1]} heads")
    chosen = resolve_backend(query, backend)
    if newest is not None and chosen != "triton":
        raise ValueError(f"newest is for CUDA graphs, and backend {chosen!r} makes none: expected None")
    if chosen == "numba":
        answer: SegmentedAnswer = _fused().attend_segmented(
            query, keys, values, table, how, start=start, with_lse=with_lse or details, details=details, unread=unread
        )
        return answer
    check_rows(query, keys, values)
    if chosen == "triton":
        opened = how.rows_coded if by_code else rows_opened(how.rows_read, how.rows_coded, keys.shape[1])
        found: SegmentedAnswer = _on_device().attend_segmented(
            query, keys, values, table, how, start=start, budget=opened, by_code=by_code, details=details, newest=newest
        )
        return found
    return _attend(query, keys, values, table, how, start, details, chosen)


def rows_opened(read: int, coded: int, kv_heads: int = 1) -> int:
    """Rows under the lists that a GPU opens, whole, where the CPU reads ``read`` of ``coded``, of so many KV heads.

    As many as the CPU scores by code; where that is more than WHOLE per head, WHOLE_PER_READ for each that it reads.
    """
    return max(read, min(coded, max(WHOLE_PER_READ * read, WHOLE * kv_heads)))


@cache
def _fused() -> Any:
    """The CPU kernel, imported when first needed."""
    return import_module("index_kernels._cpu_segmented")


@cache
def _on_device() -> Any:
    """The Triton kernels, imported when first needed."""
    return import_module("index_kernels._triton_segmented")


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: ListTable,
    how: ListReading,
    start: Tensor,
    details: bool,
    backend: str,
) -> SegmentedAnswer:
    levels = table.levels(query.device)
    lists, supers = levels.lists, levels.supers
    options: dict[str, Any] = {"scale": how.scale, "softcap": how.softcap, "backend": backend}
    began = time.perf_counter()
    ranges = _exact_ranges(query, how, start)
    exact = attend_rows(query, keys, values, ranges=ranges, **options)
    scanned = time.perf_counter()
    known, states, scored = exact[1][..., 0], [], 0
    heads = None if how.head_weights is None else torch.tensor(how.head_weights, device=query.device)
    # Where the budget opens less than all rows under super-lists, only lists of the opened ones are candidates.
    two_level = how.rows_opened < keys.shape[1] * (how.sealed - start - how.n_sink)
    if bool(two_level.any()):
        logits, spread = summary_logits(query, supers, scale=how.scale, softcap=how.softcap, alpha=how.alpha)
        costs = list_costs(logits, spread, supers, known, heads)
        opened = choose(costs.flatten(1), supers.size.flatten(1), how.rows_opened).view_as(supers.size)
        opened |= ~two_level[:, None, None]
        rest = attend_summaries(query, supers, opened, logits, scale=how.scale, beta=how.beta)
        states.append((rest, logits, spread, supers, opened))
        known = torch.logaddexp(known, rest[1][..., 0])
        scored = int((supers.size[two_level] > 0).sum())
        under = opened.gather(2, levels.parent)
        lists = lists.only(under)
    logits, spread = summary_logits(query, lists, scale=how.scale, softcap=how.softcap, alpha=how.alpha)
    costs = list_costs(logits, spread, lists, known, heads)
    chosen = choose(costs.flatten(1), lists.size.flatten(1), how.rows_coded).view_as(lists.size)
    coded = score_codes(query, lists, chosen, table.codes_on(query.device), scale=how.scale, softcap=how.softcap)
    taken = choose_rows(coded, whole_mass(logits, lists, known), how.rows_read, heads)
    group = query.shape[1] // keys.shape[1]
    ids = torch.where(taken, coded.place, -1).sort(dim=-1, descending=True).values
    ids = ids[..., : max(1, int(taken.sum(dim=-1).max()))].repeat_interleave(group, dim=1)[:, :, None]
    read = attend_rows(query, keys, values, ids=ids, **options)
    empty = empty_state(query, row_dim(values))
    codes = attend_codes(query, lists, coded, taken, scale=how.scale, beta=how.beta) if how.tail else empty
    rest = attend_summaries(query, lists, chosen, logits, scale=how.scale, beta=how.beta)
    states.append((rest, logits, spread, lists, chosen))
    tails = [state[0] for state in states] if how.tail else [empty]
    tail = merge_states(torch.stack([out for out, _ in tails]), torch.stack([lse for _, lse in tails]))
    sources = (exact, read, codes, tail)
    outs, lses = (torch.stack([source[i] for source in sources]) for i in range(2))
    out, lse = merge_states(outs, lses)
    scored += int((lists.size > 0).sum())
    unread = sum(int(((level.size > 0) & ~opened).sum()) for _, _, _, level, opened in states) if how.tail else 0
    unread += int(chosen.sum()) if how.tail else 0
    counts = int(taken.sum()), int((lists.size * chosen).sum()), int(chosen.sum()), scored, unread
    seconds = scanned - began, time.perf_counter() - scanned, 0.0, 0.0
    answer = SegmentedAnswer(out, lse, lses, *counts, seconds, None, None)
    if not details:
        return answer
    read_places, by_place = rows_by_place(coded, taken, lse, how.sealed)
    by_place = by_place * how.tail
    for _, logits, _, level, opened in states if how.tail else ():
        weights = torch.exp(logits - lse).nan_to_num()
        by_place += weights_by_place(level.begin, level.size * ~opened, weights, how.sealed)
    return answer._replace(taken=read_places, unread=by_place)


def _exact_ranges(query: Tensor, how: ListReading, start: Tensor) -> Tensor:
    """``[B, Hq, 1, 2, 2]``: the sinks, and the rows from ``sealed`` on that are not among them."""
    sinks = torch.stack([start, start + how.n_sink], dim=-1).clamp(max=how.length)
    first = (start + how.n_sink).clamp(min=how.sealed, max=how.length)
    hot = torch.stack([first, torch.full_like(first, how.length)], dim=-1)
    return torch.stack([sinks, hot], dim=1)[:, None, None].expand(-1, query.shape[1], -1, -1, -1)
