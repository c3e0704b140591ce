"""Running a plan: each row source becomes a state (out, lse), and the states are merged."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from index_kernels import attend_rows, merge_states

from .config import RetrievalConfig
from .dense import exact_ranges
from .index import KeyIndex, SegmentedIndex
from .index._lists import vector_bytes
from .index.segmented import Reading
from .plan import QueryPlan
from .store import KVStore, exponential_noise
from .usage import Usage


@dataclass(frozen=True)
class Call:
    """A query to be answered by a plan that is not dense.

    ``query [B, Hq, m, D]``: the m newest positions of ``store``. ``measure``: tell what each source did, too.
    """

    query: Tensor
    store: KVStore
    index: KeyIndex
    scale: float
    softcap: float | None
    measure: bool


@dataclass(frozen=True)
class Answer:
    """A plan that has run.

    Attributes:
        out: ``[B, Hq, m, Dv]`` float32.
        lse: ``[B, Hq, m]`` over all sources.
        exact_lse: ``[B, Hq, m]`` over the rows that were read.
        rows_retrieved: rows the index retrieved, per query head and position, mean.
        rows_read: rows read, sinks and hot rows included, likewise.
        bytes_read: bytes read by the whole call, what is scored to choose rows included.
        plan: the plan; with what each source read where the answer was measured.
        tail: what answered for the rows not read.
        slots: places of the rows that the index retrieved, ``[B, Hq, m, n]``, -1 = none; None if not measured.
        log_weights: those of a sample's rows, ``[B, Hq, m, n]``; None for no sample.
        unread: share of the newest query's weight that rows have through summaries, ``[B, Hq, n]`` by place; None if
            not measured, or where nothing answers by summary.
        dense_heads: KV heads answered densely after all.
        deviation: ``[B, Hq, m]``, what the error over the output's norm is estimated from; None without max_error.
        tried: the answer before some KV heads were answered densely after all; None without max_error.
        seconds: what the whole call took; None if not measured, or on a device that works asynchronously.
    """

    out: Tensor
    lse: Tensor
    exact_lse: Tensor
    rows_retrieved: float
    rows_read: float
    bytes_read: int
    plan: QueryPlan
    tail: str
    slots: Tensor | None = None
    log_weights: Tensor | None = None
    unread: Tensor | None = None
    dense_heads: tuple[int, ...] = ()
    deviation: Tensor | None = None
    tried: "Answer | None" = None
    seconds: float | None = None


def run_plan(plan: QueryPlan, config: RetrievalConfig, call: Call) -> Answer:
    """Answer a call by a plan that is not dense."""
    if isinstance(call.index, SegmentedIndex):
        return _run_lists(plan, config, call, call.index)
    return _run_search(plan, config, call)


def _run_search(plan: QueryPlan, config: RetrievalConfig, call: Call) -> Answer:
    """Sinks and hot rows by range, then the rows an index finds by id, weighted where they are a sample."""
    query, store, scale, softcap = call.query, call.store, call.scale, call.softcap
    (keys, values), k = store.rows, config.rows_retrieved
    began = time.perf_counter()
    ranges = exact_ranges(query, len(store) - query.shape[2], store.start, plan.hot, config.n_sink)
    exact = attend_rows(query, keys, values, ranges=ranges, scale=scale, softcap=softcap)
    scanned = time.perf_counter()
    lo = store.start + config.n_sink
    log_weights = None
    if config.tail_name == "sample":
        found = call.index.search(query, store, k + 1, lo, plan.hot, lift=1.0 / scale)
        slots, log_weights = _priority_sample(query, store, found.ids, k, scale)
    else:
        found = call.index.search(query, store, k, lo, plan.hot)
        slots = found.ids
    scan = attend_rows(query, keys, values, ids=slots, log_weights=log_weights, scale=scale, softcap=softcap)
    outs, lses = torch.stack([exact[0], scan[0]]), torch.stack([exact[1], scan[1]])
    out, lse = merge_states(outs, lses)
    ended = time.perf_counter()
    exact_rows = (ranges[..., 1] - ranges[..., 0]).clamp(min=0).sum(dim=-1).float()
    scan_rows = (slots >= 0).sum(dim=-1).float()
    # Heads of a group and queries of a call share the rows of their ranges; each reads its own retrieved rows.
    shared = int(query.shape[0] * keys.shape[1] * float(exact_rows.max())) * store.row_bytes
    retrieved = int(scan_rows.sum()) * store.row_bytes + found.bytes_read
    answer = Answer(
        out,
        lse,
        exact_lse=lse,
        rows_retrieved=float(scan_rows.mean()),
        rows_read=float(scan_rows.mean() + exact_rows.mean()),
        bytes_read=shared + retrieved,
        plan=plan,
        tail=config.tail_name,
    )
    if config.max_error is not None:
        eligible = plan.hot - config.n_sink
        answer = replace(answer, deviation=_unread_weight(call, slots, log_weights, lse, eligible))
    if not call.measure:
        return answer
    exact_lse = lse
    if log_weights is not None:
        read = attend_rows(query, keys, values, ids=slots, scale=scale, softcap=softcap)
        exact_lse = torch.logaddexp(exact[1], read[1])
    usages = (
        Usage(float(exact_rows.mean()), shared, 0.0, scanned - began),
        Usage(float(scan_rows.mean()), retrieved, 0.0, ended - scanned),
    )
    mass = torch.exp(lses - lse).nanmean(dim=(1, 2, 3)).tolist()
    plan = _measured(plan, usages, mass, ended - began)
    return replace(answer, exact_lse=exact_lse, plan=plan, slots=slots, log_weights=log_weights)


def _unread_weight(call: Call, slots: Tensor, log_weights: Tensor | None, lse: Tensor, eligible: int) -> Tensor:
    """``[B, Hq, m]``: a bound on the weight of the rows not retrieved, as a share of all; of a sample, its deviation.

    No row left out weighs more than the least that was found; a priority sample of k rows estimates the weight of the
    rows it stands for with a relative variance of at most ``1 / (k - 1)`` (Duffield, Lund and Thorup, 2007).
    """
    logits = call.store.scores(call.query, slots, call.scale, call.softcap)
    if log_weights is None:
        least = logits.masked_fill(slots < 0, float("inf")).amin(dim=-1)
        unread = (eligible - (slots >= 0).sum(dim=-1)).clamp(min=0)
        bound: Tensor = torch.exp((least - lse).clamp(max=0.0)) * unread
        return bound
    drawn = logits.masked_fill(log_weights <= 0, float("-inf")) + log_weights
    return torch.exp(torch.logsumexp(drawn, dim=-1) - lse) / math.sqrt(max(1, slots.shape[-1] - 1))


def _priority_sample(query: Tensor, store: KVStore, ids: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """The k rows of highest priority and their log-weights, from the k + 1 found (SoftmaxLift).

    A row's priority is ``exp(logit) / u``; with t the (k+1)-th priority, a row enters with weight
    ``max(1, t / exp(logit))``, which makes the sums over the sample unbiased for the sums over all rows.
    """
    logits = store.scores(query, ids, scale)
    kv_heads = store.num_kv_heads
    noise = exponential_noise(kv_heads, 0, len(store), query.device)
    noise = noise.repeat_interleave(query.shape[1] // kv_heads, dim=0)[None, :, None, :]
    lifts = noise.expand(*ids.shape[:1], -1, ids.shape[2], -1).gather(-1, ids.clamp(min=0))
    # A Gumbel-like priority: ln(exp(logit) / u) = logit - ln u.
    order = (logits + lifts).sort(dim=-1, descending=True)
    slots = ids.gather(-1, order.indices)[..., :k]
    if ids.shape[-1] <= k:
        return slots, torch.zeros_like(logits[..., :k])
    threshold = order.values[..., k : k + 1]
    return slots, (threshold - logits.gather(-1, order.indices)[..., :k]).clamp(min=0).nan_to_num(posinf=0.0)


def _run_lists(plan: QueryPlan, config: RetrievalConfig, call: Call, index: SegmentedIndex) -> Answer:
    """Everything in one kernel call per position."""
    query, store = call.query, call.store
    found = index.attend(
        query,
        store,
        Reading(
            config.k,
            call.scale,
            call.softcap,
            config.n_sink,
            tail=config.tail_name == "centroid",
            want_deviation=config.max_error is not None,
            want_slots=call.measure,
        ),
    )
    batch, _, m, _ = query.shape
    hot = config.n_sink + len(store) - (m - 1) / 2 - plan.hot
    units, per_row, value_bytes = batch * store.num_kv_heads * m, store.row_bytes, vector_bytes(store.value_dim)
    # Keys of summaries are read to choose lists, their values by the tail.
    scanned = int(units * hot) * per_row
    listed = int(units * found.rows_read) * per_row + found.summaries_read * (index.summary_bytes - value_bytes)
    summarised = found.values_read * value_bytes
    answer = Answer(
        found.out,
        found.lse,
        exact_lse=found.lse,
        rows_retrieved=found.rows_read,
        rows_read=found.rows_read + hot,
        bytes_read=scanned + listed + summarised,
        plan=plan,
        tail=config.tail_name,
        slots=found.slots,
        unread=found.unread,
        deviation=found.deviation,
    )
    if not call.measure:
        return answer
    unread = found.summaries_read - found.lists_read
    usages = [
        Usage(hot, scanned, 0.0, found.seconds[0]),
        Usage(found.rows_read, listed, found.lists_read / units, found.seconds[1]),
        Usage(0.0, summarised, unread / units, found.seconds[2]),
    ]
    mass = torch.exp(found.lse_by_source - found.lse).nanmean(dim=(1, 2, 3)).tolist()
    exact_lse = torch.logaddexp(found.lse_by_source[0], found.lse_by_source[1])
    return replace(answer, exact_lse=exact_lse, plan=_measured(plan, usages, mass, sum(found.seconds)))


def _measured(plan: QueryPlan, usages: Sequence[Usage], mass: Sequence[float], seconds: float) -> QueryPlan:
    """The plan with what each source read and the time it took."""
    sources = zip(plan.sources, usages, mass, strict=False)  # without a tail there is no third source
    measured = tuple(replace(source, actual=usage, mass=share) for source, usage, share in sources)
    return replace(plan, sources=measured, seconds=seconds)
