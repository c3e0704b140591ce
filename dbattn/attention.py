"""AttentionDB: the rows of one attention layer as a database that answers attention queries."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from index_kernels import attend_rows, merge_states, resolve_backend, top_k
from index_kernels.ops import FLOATS

from .audit import AuditReport, RunningStats, compare_with_dense
from .config import RetrievalConfig
from .dense import causal_ranges, dense_attention
from .index import make_index
from .plan import QueryPlan, choose_plan
from .store import KVStore, check_finite


@dataclass(frozen=True)
class Hits:
    """The k best rows: ids ``[B, Hq, m, k]`` int64 (-1 = none), scores (scaled logits, float32, -inf = none)."""

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class _Answer:
    """A plan that has run: the merged state, what each source read, and the ids the index retrieved."""

    out: Tensor
    lse: Tensor
    plan: QueryPlan
    ids: Tensor | None


class AttentionDB:
    """Rows (key, value) go in, attention comes out, read from an index instead of from every row.

    Args:
        num_kv_heads: KV heads; queries may have any multiple of it (grouped-query attention).
        head_dim: dimension of queries and keys.
        value_dim: dimension of values, default head_dim.
        config: what a query reads, default ``RetrievalConfig()``.

    Example:
        >>> db = AttentionDB(num_kv_heads=2, head_dim=64)
        >>> db.insert(torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64))
        >>> db.attend(torch.randn(1, 8, 1, 64)).shape
        torch.Size([1, 8, 1, 64])
    """

    def __init__(
        self, num_kv_heads: int, head_dim: int, *, value_dim: int | None = None, config: RetrievalConfig | None = None
    ) -> None:
        self.config = config or RetrievalConfig()
        self.store = KVStore(num_kv_heads, head_dim, head_dim if value_dim is None else value_dim)
        self.index = make_index(self.config)
        self.stats = RunningStats()

    def insert(self, keys: Tensor, values: Tensor, *, start: Tensor | None = None) -> None:
        """Append rows and index them.

        Args:
            keys, values: ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]``, float32, float16 or bfloat16; any n, 0 included.
            start: int64 ``[B]``, first valid row of each batch row (left padding); with the first rows only.

        Raises:
            ValueError: shapes, dtype or device that do not fit the rows stored, or elements that are not finite. The
                store is unchanged then.
        """
        before = len(self.store)
        self.store.append(keys, values)
        try:
            self.sync(start)
        except ValueError:
            self.store.truncate(before)
            raise

    def sync(self, start: Tensor | None = None) -> None:
        """Bring the index up to the store's rows; for callers that append to ``store`` themselves, as a cache does."""
        self.store.set_start(self.store.start if start is None else start)
        if not self.store.is_empty:
            self.index.extend(self.store.keys, self._first_index_row())

    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        return_lse: bool = False,
        retrieve: bool = True,
        audit: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the m newest positions, causal, over the rows that the plan reads.

        Args:
            query: ``[B, Hq, m, D]``; query i is at position ``len(db) - m + i`` and sees rows up to its own.
            scale: factor of the logits, default ``1 / sqrt(D)``.
            softcap: logits become ``softcap * tanh(logits / softcap)``.
            sink_logits: ``[Hq]``, logit of one more row with value zero per head (a model's attention sink).
            return_lse: also return the log-sum-exp over the rows read, ``[B, Hq, m]`` float32.
            retrieve: False scans all rows.
            audit: compare with dense whatever ``audit_rate`` says; the report joins ``stats.audits``.

        Returns:
            ``[B, Hq, m, Dv]`` in the query's dtype.

        Raises:
            ValueError: an empty store, or a query that does not fit it; states what was received.
        """
        self._check_query(query)
        if sink_logits is not None and sink_logits.shape != (query.shape[1],):
            raise ValueError(f"sink_logits have shape {list(sink_logits.shape)}, expected [{query.shape[1]}]")
        plan = self._plan(query, retrieve)
        stats = self.stats
        stats.calls += 1
        stats.rows_stored = len(self)
        if plan.is_dense:
            stats.dense_reasons[plan.reason] += 1
            if sink_logits is None and not return_lse:
                return self._dense(query, scale, softcap)
            out, lse = self._dense_state(query, scale, softcap)
        else:
            answer = self._run(plan, query, scale, softcap)
            out, lse = answer.out, answer.lse
            self._record(answer, query, scale, softcap, audit)
        if sink_logits is not None:
            sink = sink_logits.to(lse)[None, :, None].expand_as(lse)
            out, lse = merge_states(torch.stack([out, torch.zeros_like(out)]), torch.stack([lse, sink]))
        return (out.to(query.dtype), lse) if return_lse else out.to(query.dtype)

    def search(self, query: Tensor, k: int, *, scale: float | None = None) -> Hits:
        """The k rows with the largest logits: the index's candidates and the hot rows, scored exactly.

        Args:
            query: ``[B, Hq, m, D]``; query i sees rows up to position ``len(db) - m + i``.
            k: rows per query, at least 1.
            scale: factor of the logits, default ``1 / sqrt(D)``.

        Raises:
            ValueError: an empty store, a query that does not fit it, or k < 1.
        """
        self._check_query(query)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}, expected an integer of at least 1")
        keys, m = self.store.keys, query.shape[2]
        hot = min(len(self) - m + 1, len(self.index))
        positions = torch.arange(len(self) - m + 1, len(self) + 1, device=query.device)
        ids, scores = top_k(
            query, keys[:, :, hot:], k, scale=scale, start=(self.store.start - hot).clamp(min=0), stop=positions - hot
        )
        ids = torch.where(ids >= 0, ids + hot, ids)
        if hot > 0:
            older = [self._sink_ids(query, hot), self.index.search(query, keys, k, self._first_index_row(), hot).ids]
            older_ids = torch.cat(older, dim=-1)
            ids = torch.cat([ids, older_ids], dim=-1)
            scores = torch.cat([scores, self._scores(query, older_ids, scale)], dim=-1)
        # Rising ids first, then a stable sort by score: equal scores stay in the order of their ids.
        by_id = ids.argsort(dim=-1)
        ids, scores = ids.gather(-1, by_id), scores.gather(-1, by_id)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
        return Hits(ids.gather(-1, best), scores.gather(-1, best))

    def explain(self, query: Tensor, *, scale: float | None = None, softcap: float | None = None) -> QueryPlan:
        """Run the query and return its plan with what each source read; prints as a tree, like EXPLAIN ANALYZE.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        self._check_query(query)
        plan = self._plan(query, retrieve=True)
        if not plan.is_dense:
            return self._run(plan, query, scale, softcap).plan
        dense = replace(plan.sources[0], rows=self._rows_visible(query), bytes=self._bytes_dense(), mass=1.0)
        return plan.with_actuals([dense])

    def audit(self, query: Tensor, *, scale: float | None = None, softcap: float | None = None) -> AuditReport:
        """Answer the query as ``attend`` would and densely, and compare. Changes nothing.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        self._check_query(query)
        plan = self._plan(query, retrieve=True)
        if not plan.is_dense:
            return self._audit(self._run(plan, query, scale, softcap), query, scale, softcap)
        ones = torch.ones(query.shape[:3], device=query.device)
        rows, read = self._rows_visible(query), self._bytes_dense()
        return AuditReport(ones, ones, torch.zeros_like(ones), 0.0, rows, len(self), read, read)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows, as if the others had never come.

        Raises:
            ValueError: a length below 0 or above ``len(db)``.
        """
        self.store.truncate(length)
        self.index.truncate(length)
        self.sync()

    def select(self, batch: Tensor) -> None:
        """Keep the batch rows ``batch [B']`` int64; an index may repeat (beam search)."""
        self.store.select(batch)
        self.index.select(batch)

    def __len__(self) -> int:
        """Rows stored per batch row, padding included."""
        return len(self.store)

    @property
    def nbytes(self) -> int:
        """Bytes held: the rows' buffers (spare capacity included) and the index."""
        return self.store.nbytes + self.index.nbytes

    def _plan(self, query: Tensor, retrieve: bool) -> QueryPlan:
        return choose_plan(
            self.config,
            rows=len(self),
            queries=query.shape[2],
            indexed=len(self.index),
            first_index_row=self.config.n_sink + (int(self.store.start.min()) if self.store.has_padding else 0),
            backend=resolve_backend(query),
            retrieve=retrieve,
        )

    def _run(self, plan: QueryPlan, query: Tensor, scale: float | None, softcap: float | None) -> _Answer:
        keys, values = self.store.keys, self.store.values
        row_bytes = keys.element_size() * keys.shape[3] + values.element_size() * values.shape[3]
        ranges = self._exact_ranges(query, plan.hot)
        exact = attend_rows(query, keys, values, ranges=ranges, scale=scale, softcap=softcap)
        found = self.index.search(query, keys, self.config.k, self._first_index_row(), plan.hot)
        scan = attend_rows(query, keys, values, ids=found.ids, scale=scale, softcap=softcap)
        outs, lses = torch.stack([exact[0], scan[0]]), torch.stack([exact[1], scan[1]])
        out, lse = merge_states(outs, lses)

        mass = torch.exp(lses - lse).nanmean(dim=(1, 2, 3)).tolist()
        exact_rows = (ranges[..., 1] - ranges[..., 0]).clamp(min=0).sum(dim=-1).float()
        scan_rows = (found.ids >= 0).sum(dim=-1).float()
        # Heads of a group and queries of a call share the rows of their ranges; each reads its own retrieved rows.
        shared = query.shape[0] * keys.shape[1] * float(exact_rows.max())
        actuals = [
            replace(plan.sources[0], rows=float(exact_rows.mean()), bytes=int(shared) * row_bytes, mass=mass[0]),
            replace(
                plan.sources[1],
                rows=float(scan_rows.mean()),
                bytes=int(scan_rows.sum()) * row_bytes + found.bytes_read,
                mass=mass[1],
            ),
        ]
        return _Answer(out, lse, plan.with_actuals(actuals), found.ids)

    def _record(self, answer: _Answer, query: Tensor, scale: float | None, softcap: float | None, audit: bool) -> None:
        stats, rate = self.stats, self.config.audit_rate
        # The first retrieving call, then evenly spread ones.
        due = rate > 0 and math.ceil((stats.retrieving + 1) * rate) > math.ceil(stats.retrieving * rate)
        stats.retrieving += 1
        stats.rows_read += sum(source.rows or 0.0 for source in answer.plan.sources)
        stats.rows_retrieved += answer.plan.sources[-1].rows or 0.0
        stats.index = self.index.describe()
        if audit or due:
            stats.audits.append(self._audit(answer, query, scale, softcap))

    @torch.no_grad()
    def _audit(self, answer: _Answer, query: Tensor, scale: float | None, softcap: float | None) -> AuditReport:
        keys, plan = self.store.keys, answer.plan
        _, exact_scores = top_k(
            query, keys[:, :, : plan.hot], self.config.k, scale=scale, start=self._first_index_row()
        )
        recall, mass, error = compare_with_dense(
            (answer.out, answer.lse),
            self._dense_state(query, scale, softcap),
            self._scores(query, answer.ids, scale),
            exact_scores,
        )
        rows = sum(source.rows or 0.0 for source in plan.sources)
        read = sum(source.bytes or 0 for source in plan.sources)
        retrieved = plan.sources[-1].rows or 0.0
        return AuditReport(recall, mass, error, retrieved, rows, len(self), read, self._bytes_dense())

    def _dense(self, query: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        start = self.store.start if self.store.has_padding else None
        out = dense_attention(query, self.store.keys, self.store.values, start=start, scale=scale, softcap=softcap)
        assert isinstance(out, Tensor)
        return out

    def _dense_state(self, query: Tensor, scale: float | None, softcap: float | None) -> tuple[Tensor, Tensor]:
        keys, values, start = self.store.keys, self.store.values, self.store.start
        state = dense_attention(query, keys, values, start=start, scale=scale, softcap=softcap, return_lse=True)
        assert isinstance(state, tuple)
        return state

    def _first_index_row(self) -> Tensor:
        return self.store.start + self.config.n_sink

    def _exact_ranges(self, query: Tensor, hot: int) -> Tensor:
        """``[B, Hq, m, 2, 2]``: the sinks below ``hot``, and the rows from ``hot`` up to each query's own."""
        start = self.store.start
        newest = causal_ranges(query, len(self) - query.shape[2], start, hot)
        sinks = torch.stack([start.clamp(max=hot), (start + self.config.n_sink).clamp(max=hot)], dim=-1)
        return torch.cat([sinks[:, None, None, None, :].expand_as(newest), newest], dim=3)

    def _sink_ids(self, query: Tensor, hot: int) -> Tensor:
        """``[B, Hq, m, n_sink]``: the first rows of each batch row, -1 from ``hot`` on."""
        ids = self.store.start[:, None] + torch.arange(self.config.n_sink, device=query.device)
        ids = ids.masked_fill(ids >= hot, -1)
        return ids[:, None, None, :].expand(*query.shape[:3], -1)

    def _scores(self, query: Tensor, ids: Tensor | None, scale: float | None) -> Tensor:
        """Scaled logits of the given rows, -inf where the id is -1: ``[B, Hq, m, n]``."""
        assert ids is not None
        keys = self.store.keys
        b = torch.arange(ids.shape[0], device=ids.device)[:, None, None, None]
        h = (torch.arange(ids.shape[1], device=ids.device) // (ids.shape[1] // keys.shape[1]))[:, None, None]
        logits = (keys[b, h, ids.clamp(min=0)].float() @ query.float()[..., None]).squeeze(-1)
        return (logits * (query.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(ids < 0, float("-inf"))

    def _rows_visible(self, query: Tensor) -> float:
        m = query.shape[2]
        return len(self) - (m - 1) / 2 - float(self.store.start.float().mean())

    def _bytes_dense(self) -> int:
        keys, values = self.store.keys, self.store.values
        return keys.numel() * keys.element_size() + values.numel() * values.element_size()

    def _check_query(self, query: Tensor) -> None:
        keys = self.store.keys
        if query.ndim != 4 or query.shape[0] != keys.shape[0] or query.shape[3] != keys.shape[3]:
            raise ValueError(f"query has shape {list(query.shape)}, expected [{keys.shape[0]}, Hq, m, {keys.shape[3]}]")
        if query.shape[1] == 0 or query.shape[1] % keys.shape[1]:
            raise ValueError(f"{query.shape[1]} query heads do not divide into groups over {keys.shape[1]} KV heads")
        if not 1 <= query.shape[2] <= len(self):
            raise ValueError(
                f"query has {query.shape[2]} positions, expected 1 to {len(self)}: they are the newest rows"
            )
        if query.dtype not in FLOATS or query.device != keys.device:
            raise ValueError(
                f"query is {query.dtype} on {query.device}, expected float32, float16 or bfloat16 on {keys.device}"
            )
        check_finite("query", query)
