"""SearchIndex: an index that finds rows by id, which a step then reads; weighted where they are a sample."""

import math
import time
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from index_kernels import attend_rows

from ..config import RetrievalConfig
from ..query.call import Call
from ..query.plan import Source, Step, StepAnswer
from ..query.steps import ExactRows
from ..query.usage import Rates, Usage, Work, Workload
from ..store import KVStore, exponential_noise
from .base import KeyIndex


class SearchIndex(KeyIndex):
    """Its plan: sinks and hot rows by range, then the rows that ``search`` finds."""

    @classmethod
    @abstractmethod
    def rows_scored(cls, config: RetrievalConfig, work: Workload) -> float:
        """Keys it is expected to score for a call, in units of 64 numbers."""

    @classmethod
    def work(cls, config: RetrievalConfig, work: Workload) -> Work:
        """See KeyIndex."""
        rows = config.rows_retrieved
        size = int(work.asked * rows) * work.row_bytes
        return Work(cls.rows_scored(config, work), size, work.operations(rows))

    @classmethod
    def operations_to_choose(cls, config: RetrievalConfig, work: Workload) -> float:
        """See KeyIndex."""
        return 64 * cls.rows_scored(config, work)

    @classmethod
    def steps(cls, config: RetrievalConfig, work: Workload, own: Rates | None, scan: Rates | None) -> tuple[Step, ...]:
        """See KeyIndex."""
        hot, k, does = cls.hot(config, work), config.rows_retrieved, cls.work(config, work)
        drawn = " sampled" if config.tail_name == "sample" else ""
        usage = Usage(k, int(does.bytes) + int(does.items) * 4 * 64, 0.0, None if own is None else own.seconds(does))
        eligible = hot - work.first_index_row
        source = Source("index scan", f"{cls.name}, {cls.asked(config, work)}{drawn} of {eligible} rows", usage)
        exact = ExactRows((ExactRows.source(work, hot, config.n_sink, scan),), hot)
        bounded = config.max_error is not None
        return exact, IndexScan((source,), hot, k, config.tail_name == "sample", bounded)


@dataclass(frozen=True)
class IndexScan(Step):
    """The k rows that an index finds, or k rows sampled by their weight.

    Attributes:
        hot: rows below it are searched.
        bounded: say what the error is estimated from.
    """

    hot: int = 0
    k: int = 0
    sampled: bool = False
    bounded: bool = False

    def run(self, call: Call) -> StepAnswer:
        """See Step."""
        query, store, scale, softcap = call.query, call.store, call.scale, call.softcap
        (keys, values), lo, index = store.rows, call.first_index_row, call.index
        assert isinstance(index, KeyIndex)
        began = time.perf_counter()
        log_weights = None
        if self.sampled:
            found = index.search(query, store, self.k + 1, lo, self.hot, lift=1.0 / scale)
            slots, log_weights = _priority_sample(query, store, found.ids, self.k, scale)
        else:
            found = index.search(query, store, self.k, lo, self.hot)
            slots = found.ids
        out, lse = attend_rows(query, keys, values, ids=slots, log_weights=log_weights, scale=scale, softcap=softcap)
        took = time.perf_counter() - began
        rows = (slots >= 0).sum(dim=-1).float()
        # Each query head reads its own rows.
        usage = Usage(float(rows.mean()), int(rows.sum()) * store.row_bytes + found.bytes_read, 0.0, took)
        answer = StepAnswer(
            out,
            lse,
            (usage,),
            rows_read=usage.rows,
            rows_retrieved=usage.rows,
            bytes_read=usage.bytes,
            tail="sample" if self.sampled else "none",
        )
        if self.bounded:
            eligible = self.hot - call.config.n_sink
            answer = answer._replace(deviation=partial(_unread_weight, call, slots, log_weights, eligible))
        if not call.measure:
            return answer
        if log_weights is not None:
            exact = attend_rows(query, keys, values, ids=slots, scale=scale, softcap=softcap)
            answer = answer._replace(exact_lse=exact[1])
        return answer._replace(slots=slots, log_weights=log_weights)


def _unread_weight(call: Call, slots: Tensor, log_weights: Tensor | None, eligible: int, lse: Tensor) -> Tensor:
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
    # A Gumbel-like priority: ln(exp(logit) / u) = logit - ln u.
    order = (logits + noise_of(store, ids)).sort(dim=-1, descending=True)
    slots = ids.gather(-1, order.indices)[..., :k]
    if ids.shape[-1] <= k:
        return slots, torch.zeros_like(logits[..., :k])
    threshold = order.values[..., k : k + 1]
    return slots, (threshold - logits.gather(-1, order.indices)[..., :k]).clamp(min=0).nan_to_num(posinf=0.0)


def noise_of(store: KVStore, ids: Tensor) -> Tensor:
    """The noise of rows ``ids [B, Hq, m, n]``, see exponential_noise; where an id is -1, row 0's."""
    kv_heads = store.num_kv_heads
    noise = exponential_noise(kv_heads, 0, len(store), ids.device)
    noise = noise.repeat_interleave(ids.shape[1] // kv_heads, dim=0)[None, :, None, :]
    return noise.expand(len(ids), -1, ids.shape[2], -1).gather(-1, ids.clamp(min=0))
