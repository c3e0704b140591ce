"""Query: one call to one store, checked, planned, answered, and compared with dense."""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from index_kernels import resolve_backend, top_k
from index_kernels.ops import FLOATS

from .audit import AuditReport, RunningStats, compare_with_dense
from .config import RetrievalConfig
from .dense import dense_attention, masked_attention
from .execute import Answer, Call, run_plan
from .index import KeyIndex, SegmentedIndex
from .index.segmented import budget
from .ladder import Ladder, finish_climb
from .metrics import relative_error
from .plan import QueryPlan, choose_plan
from .storage import check_range
from .store import KVStore
from .trace import Weights
from .usage import Workload


@dataclass(frozen=True)
class Query:
    """``query [B, Hq, m, D]``: the m newest positions of a store ask; ``scale`` and ``softcap`` shape their logits."""

    query: Tensor
    store: KVStore
    index: KeyIndex
    config: RetrievalConfig
    stats: RunningStats
    scale: float
    softcap: float | None

    @classmethod
    def checked(
        cls,
        query: Tensor,
        store: KVStore,
        index: KeyIndex,
        config: RetrievalConfig,
        stats: RunningStats,
        scale: float | None,
        softcap: float | None,
    ) -> "Query":
        """The query with its default scale; ValueError states what was received where it does not fit the store."""
        keys, dim, kv_heads = store.rows[0], store.head_dim, store.num_kv_heads
        if query.ndim != 4 or query.shape[0] != keys.shape[0] or query.shape[3] != dim:
            raise ValueError(f"query has shape {list(query.shape)}, expected [{keys.shape[0]}, Hq, m, {dim}]")
        if query.shape[1] == 0 or query.shape[1] % kv_heads:
            raise ValueError(f"{query.shape[1]} query heads do not divide into groups over {kv_heads} KV heads")
        if not 1 <= query.shape[2] <= len(store):
            raise ValueError(
                f"query has {query.shape[2]} positions, expected 1 to {len(store)}: they are the newest rows"
            )
        if query.dtype not in FLOATS or query.device != keys.device:
            raise ValueError(
                f"query is {query.dtype} on {query.device}, expected float32, float16 or bfloat16 on {keys.device}"
            )
        check_range("query", query)
        if scale is None:
            scale = float(query.shape[-1] ** -0.5)
        elif not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}, expected a positive number: an index finds the largest products")
        return cls(query, store, index, config, stats, float(scale), softcap)

    @property
    def workload(self) -> Workload:
        """What the planner knows of the call."""
        store = self.store
        return Workload(
            rows=len(store),
            queries=self.query.shape[2],
            indexed=len(self.index),
            first_index_row=self.config.n_sink + (int(store.start.min()) if store.has_padding else 0),
            batch=self.query.shape[0],
            heads=self.query.shape[1],
            kv_heads=store.num_kv_heads,
            dim=store.head_dim,
            value_dim=store.value_dim,
            row_bytes=store.row_bytes,
        )

    def plan(
        self, *, retrieve: bool = True, estimate: bool = False, config: RetrievalConfig | None = None
    ) -> QueryPlan:
        """How it will be answered under ``config`` (default: the store's own)."""
        backend = resolve_backend(self.query)
        return choose_plan(
            config or self.config,
            self.workload,
            backend=backend,
            threads=torch.get_num_threads() if backend == "numba" else None,
            retrieve=retrieve,
            estimate=estimate,
        )

    def answer(self, plan: QueryPlan, *, measure: bool, learn: bool = False) -> Answer:
        """Run a plan that is not dense; with ``max_error``, climb the ladder, which ``learn`` lets remember it."""
        if not measure:
            return self._answer(plan, measure=False, learn=learn)
        began = time.perf_counter()
        answer = self._answer(plan, measure=True, learn=learn)
        return replace(answer, seconds=self._seconds_since(began))

    def _answer(self, plan: QueryPlan, *, measure: bool, learn: bool) -> Answer:
        config = self.config
        call = Call(self.query, self.store, self.index, self.scale, self.softcap, measure)
        if config.max_error is None:
            return run_plan(plan, config, call)
        ladder = self.stats.ladder or Ladder(config)
        climb = ladder.climb(
            config,
            call,
            lambda at_rung: self.plan(config=at_rung),
            base=budget(len(self.index), config.k)[0] if plan.is_segmented else config.rows_retrieved,
            eligible=plan.hot - config.n_sink,
            learn=learn,
        )
        if learn:
            self.stats.ladder = ladder
            self.stats.rungs[climb.name] += 1
        return finish_climb(climb, call)

    def dense(self) -> Tensor:
        """The exact answer ``[B, Hq, m, Dv]`` in the query's dtype."""
        if self.is_sealed_ahead:
            return self.dense_state()[0].to(self.query.dtype)
        start = self.store.start if self.store.has_padding else None
        out = dense_attention(self.query, *self.store.rows, start=start, scale=self.scale, softcap=self.softcap)
        assert isinstance(out, Tensor)
        return out

    def dense_state(self) -> tuple[Tensor, Tensor]:
        """The exact ``(out [B, Hq, m, Dv], lse [B, Hq, m])``, float32."""
        (keys, values), start = self.store.rows, self.store.start
        if self.is_sealed_ahead:
            # Rows after a query's position were moved among the older ones: causal order is by position, not place.
            return masked_attention(
                self.query, keys, values, self._causal_mask(), scale=self.scale, softcap=self.softcap
            )
        state = dense_attention(
            self.query, keys, values, start=start, scale=self.scale, softcap=self.softcap, return_lse=True
        )
        assert isinstance(state, tuple)
        return state

    @torch.no_grad()
    def audit(self, answer: Answer, *, learn: bool = False) -> AuditReport:
        """Compare a measured answer with dense."""
        plan, store, k = answer.plan, self.store, self.config.rows_retrieved
        # Before anything else reads the rows: a scan of rows that are still in the processor's cache takes less time.
        began = time.perf_counter()
        dense = self.dense_state()
        seconds_dense = self._seconds_since(began)
        lo = store.start + self.config.n_sink
        _, exact_scores = top_k(self.query, store.rows[0][:, :, : plan.hot], k, scale=self.scale, start=lo)
        assert answer.slots is not None
        if learn and self.stats.ladder is not None and answer.tried is not None:
            self.stats.ladder.learn(answer.tried, relative_error(answer.tried.out, dense[0]))
        scores = store.scores(self.query, answer.slots, self.scale)
        recall, mass, error = compare_with_dense((answer.out, answer.exact_lse), dense, scores, exact_scores)
        counts = answer.rows_retrieved, answer.rows_read, len(store), answer.bytes_read, self.bytes_dense
        return AuditReport(recall, mass, error, *counts, answer.seconds, seconds_dense)

    def audit_dense(self) -> AuditReport:
        """The report of a query that is answered densely anyway."""
        seen = self.dense_state()[1] > float("-inf")
        ones = torch.where(seen, 1.0, torch.nan)
        rows, read = self.rows_visible, self.bytes_dense
        return AuditReport(ones, ones, ones - 1.0, 0.0, rows, len(self.store), read, read)

    def weights(self, plan: QueryPlan) -> Weights:
        """Softmax weights of the newest query's answer, by row position."""
        if plan.is_dense:
            dense = self._dense_weights()
            return Weights(dense, torch.zeros_like(dense))
        answer, newest = self.answer(plan, measure=True), self.query[:, :, -1:]
        assert answer.slots is not None
        slots, lse = answer.slots[:, :, -1:], answer.lse[:, :, -1:, None]
        hot = self._places[..., plan.hot :]
        hot = hot.masked_fill(hot < self.store.start[:, None, None, None], -1)
        exact = torch.cat([self.sink_slots(plan.hot)[:, :, -1:], hot], dim=-1)
        own = [
            torch.exp(self.store.scores(newest, at, self.scale, self.softcap) - lse).nan_to_num()[:, :, 0]
            for at in (exact, slots)
        ]
        read = self._by_position(torch.cat(own, dim=-1), torch.cat([exact, slots], dim=-1)[:, :, 0])
        for_unread = torch.zeros_like(read)
        if answer.unread is not None:
            for_unread = self._by_position(answer.unread, self._places[:, :, 0, : answer.unread.shape[-1]])
        elif answer.log_weights is not None:
            more = own[1] * (torch.exp(answer.log_weights[:, :, -1]) - 1)
            for_unread = self._by_position(more.nan_to_num(), slots[:, :, 0])
        if answer.dense_heads:
            group = newest.shape[1] // self.store.num_kv_heads
            heads = [head * group + i for head in answer.dense_heads for i in range(group)]
            read[:, heads], for_unread[:, heads] = self._dense_weights()[:, heads], 0.0
        return Weights(read, for_unread)

    def _dense_weights(self) -> Tensor:
        """``[B, Hq, T]``: softmax weights of the newest query over all rows that it sees, by position."""
        hidden = self.index.positions(self._places) < self.store.start[:, None, None, None]
        logits = self.store.scores(self.query[:, :, -1:], self._places, self.scale, self.softcap)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1).nan_to_num()
        return self._by_position(weights[:, :, 0], self._places[:, :, 0])

    @property
    def _places(self) -> Tensor:
        """``[B, Hq, 1, T]``: all places of the store."""
        places = torch.arange(len(self.store), device=self.query.device)
        return places.expand(*self.query.shape[:2], 1, -1)

    def _by_position(self, weights: Tensor, places: Tensor) -> Tensor:
        """``weights [B, Hq, n]`` of ``places [B, Hq, n]`` (each once, -1 = none) as ``[B, Hq, T]`` by position."""
        at = self.index.positions(places[:, :, None])[:, :, 0].clamp(min=0)
        weights = weights.masked_fill(places < 0, 0.0)
        return weights.new_zeros(*weights.shape[:2], len(self.store)).scatter_add_(-1, at, weights)

    @property
    def is_sealed_ahead(self) -> bool:
        """Whether rows after the first query's position have been moved among older ones."""
        indexed = len(self.index)
        return isinstance(self.index, SegmentedIndex) and indexed > len(self.store) - self.query.shape[2] + 1

    def sink_slots(self, hot: int) -> Tensor:
        """``[B, Hq, m, n_sink]``: the first rows of each batch row, -1 from ``hot`` on."""
        slots = self.store.start[:, None] + torch.arange(min(self.config.n_sink, hot), device=self.query.device)
        slots = slots.masked_fill(slots >= hot, -1)
        return slots[:, None, None, :].expand(*self.query.shape[:3], -1)

    @property
    def rows_visible(self) -> float:
        """Rows that a query may see, mean over batch rows and positions."""
        last = len(self.store)
        if not self.store.has_padding:
            return last - (self.query.shape[2] - 1) / 2
        stop = torch.arange(last - self.query.shape[2] + 1, last + 1, device=self.query.device)
        return float((stop - self.store.start[:, None]).clamp(min=0).float().mean())

    @property
    def bytes_dense(self) -> int:
        """Bytes that a dense scan reads."""
        return self.query.shape[0] * self.store.num_kv_heads * len(self.store) * self.store.row_bytes

    @property
    def is_prompt(self) -> bool:
        """Whether more positions ask than retrieval is for: a prompt is being read."""
        return self.query.shape[2] > self.config.max_queries

    def _seconds_since(self, began: float) -> float | None:
        return time.perf_counter() - began if self.query.device.type == "cpu" else None

    def _causal_mask(self) -> Tensor:
        """``[B, Hq, m, T]`` bool by the positions of rows."""
        batch, heads, m, _ = self.query.shape
        rows = len(self.store)
        slots = torch.arange(rows, device=self.query.device).expand(batch, heads, 1, -1)
        positions = self.index.positions(slots)
        newest = torch.arange(rows - m, rows, device=self.query.device)[:, None]
        return (positions <= newest) & (positions >= self.store.start[:, None, None, None])
