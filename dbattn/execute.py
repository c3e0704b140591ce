"""Running a plan: each row source becomes a state (out, lse), and the states are merged."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from index_kernels import attend_rows, merge_states

from .config import RetrievalConfig
from .dense import exact_ranges
from .index import KeyIndex, SegmentedIndex
from .plan import QueryPlan
from .store import KVStore, exponential_noise


@dataclass(frozen=True)
class Answer:
    """A plan that has run.

    Attributes:
        out: ``[B, Hq, m, Dv]`` float32.
        lse: ``[B, Hq, m]`` over all sources.
        exact_lse: ``[B, Hq, m]`` over the rows that were read.
        rows_retrieved: rows the index retrieved, per query head and position, mean.
        rows_read: rows read, sinks and hot rows included, likewise.
        plan: the plan; with what each source read where the answer was measured.
        slots: places of the rows that the index retrieved, ``[B, Hq, m, n]``, -1 = none; None if not measured.
    """

    out: Tensor
    lse: Tensor
    exact_lse: Tensor
    rows_retrieved: float
    rows_read: float
    plan: QueryPlan
    slots: Tensor | None


def run_plan(
    plan: QueryPlan,
    query: Tensor,
    store: KVStore,
    index: KeyIndex,
    config: RetrievalConfig,
    *,
    scale: float,
    softcap: float | None,
    measure: bool,
) -> Answer:
    """Answer ``query [B, Hq, m, D]`` by a plan that is not dense; ``measure`` also tells what each source did."""
    if isinstance(index, SegmentedIndex):
        return _run_lists(plan, query, store, index, config, scale, softcap, measure)
    return _run_search(plan, query, store, index, config, scale, softcap, measure)


def row_bytes(store: KVStore) -> int:
    """Bytes of one row: a key and a value."""
    keys, values = store.keys, store.values
    return keys.element_size() * keys.shape[3] + values.element_size() * values.shape[3]


def _run_search(
    plan: QueryPlan,
    query: Tensor,
    store: KVStore,
    index: KeyIndex,
    config: RetrievalConfig,
    scale: float,
    softcap: float | None,
    measure: bool,
) -> Answer:
    """Sinks and hot rows by range, then the rows an index finds by id, weighted where they are a sample."""
    keys, values, k = store.keys, store.values, config.rows_retrieved
    ranges = exact_ranges(query, len(store) - query.shape[2], store.start, plan.hot, config.n_sink)
    exact = attend_rows(query, keys, values, ranges=ranges, scale=scale, softcap=softcap)
    lo = store.start + config.n_sink
    log_weights = None
    if config.tail_name == "sample":
        found = index.search(query, store, k + 1, lo, plan.hot, lift=1.0 / scale)
        slots, log_weights = _priority_sample(query, store, found.ids, k, scale)
    else:
        found = index.search(query, store, k, lo, plan.hot)
        slots = found.ids
    scan = attend_rows(query, keys, values, ids=slots, log_weights=log_weights, scale=scale, softcap=softcap)
    outs, lses = torch.stack([exact[0], scan[0]]), torch.stack([exact[1], scan[1]])
    out, lse = merge_states(outs, lses)
    exact_rows = (ranges[..., 1] - ranges[..., 0]).clamp(min=0).sum(dim=-1).float()
    scan_rows = (slots >= 0).sum(dim=-1).float()
    counts = float(scan_rows.mean()), float(scan_rows.mean() + exact_rows.mean())
    if not measure:
        return Answer(out, lse, lse, *counts, plan, None)
    exact_lse = lse
    if log_weights is not None:
        read = attend_rows(query, keys, values, ids=slots, scale=scale, softcap=softcap)
        exact_lse = torch.logaddexp(exact[1], read[1])

    mass = torch.exp(lses - lse).nanmean(dim=(1, 2, 3)).tolist()
    # Heads of a group and queries of a call share the rows of their ranges; each reads its own retrieved rows.
    shared = int(query.shape[0] * keys.shape[1] * float(exact_rows.max()))
    scanned = int(scan_rows.sum()) * row_bytes(store) + found.bytes_read
    actuals = [
        replace(plan.sources[0], rows=float(exact_rows.mean()), bytes=shared * row_bytes(store), mass=mass[0]),
        replace(plan.sources[1], rows=float(scan_rows.mean()), bytes=scanned, mass=mass[1]),
    ]
    return Answer(out, lse, exact_lse, *counts, plan.with_actuals(actuals), slots)


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


def _run_lists(
    plan: QueryPlan,
    query: Tensor,
    store: KVStore,
    index: SegmentedIndex,
    config: RetrievalConfig,
    scale: float,
    softcap: float | None,
    measure: bool,
) -> Answer:
    """Everything in one kernel call per position."""
    answer = index.attend(
        query,
        store,
        config.k,
        scale=scale,
        softcap=softcap,
        n_sink=config.n_sink,
        tail=config.tail_name == "centroid",
        want_slots=measure,
    )
    batch, _, m, _ = query.shape
    hot = config.n_sink + len(store) - (m - 1) / 2 - plan.hot
    counts = answer.rows_read, answer.rows_read + hot
    if not measure:
        return Answer(answer.out, answer.lse, answer.lse, *counts, plan, None)
    heads, per_row = store.num_kv_heads, row_bytes(store)
    summaries = answer.summaries_read * index.summary_bytes
    shares = torch.exp(answer.lse_by_source - answer.lse).nanmean(dim=(1, 2, 3)).tolist()
    actuals = [
        replace(plan.sources[0], rows=hot, bytes=int(batch * heads * m * hot) * per_row, mass=shares[0]),
        replace(
            plan.sources[1],
            rows=answer.rows_read,
            bytes=int(batch * heads * m * answer.rows_read) * per_row + summaries,
            mass=shares[1],
        ),
    ]
    if config.tail_name == "centroid":
        actuals.append(replace(plan.sources[2], rows=0.0, bytes=0, mass=shares[2]))
    exact_lse = torch.logaddexp(answer.lse_by_source[0], answer.lse_by_source[1])
    return Answer(answer.out, answer.lse, exact_lse, *counts, plan.with_actuals(actuals), answer.slots)
