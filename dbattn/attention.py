"""AttentionDB: the rows of one attention layer as a database that answers attention queries."""

import math
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from index_kernels import resolve_backend, top_k
from index_kernels.ops import FLOATS

from .audit import AuditReport, RunningStats, compare_with_dense
from .config import RetrievalConfig
from .dense import dense_attention, masked_attention, merge_sink
from .execute import Answer, Call, run_plan
from .index import SegmentedIndex, make_index
from .index.segmented import budget
from .ladder import AUDITS_TO_LEARN, Ladder, finish_climb
from .metrics import relative_error
from .plan import QueryPlan, choose_plan
from .rows import RowSource
from .store import KVStore, check_finite
from .trace import weights_by_position
from .usage import Usage, Workload

if TYPE_CHECKING:
    from .snapshot import SaveReport, Snapshot, SnapshotWriter


@dataclass(frozen=True)
class Hits:
    """The k best rows: ids ``[B, Hq, m, k]`` int64 (-1 = none), scores (scaled logits, float32, -inf = none)."""

    ids: Tensor
    scores: Tensor


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
            self.store.set_start(self.store.start if start is None else start)
        except ValueError:
            self.store.truncate(before)
            raise
        try:
            self.sync()
        except Exception:
            # Whatever the index made of the new rows goes with them; it is built again from the rows that stay.
            self.release()
            self.index = make_index(self.config)
            self.store.truncate(before)
            raise

    def sync(self) -> None:
        """Bring the index up to the store's rows; for callers that append to ``store`` themselves, as a cache does."""
        self.store.set_start(self.store.start)
        if not self.store.is_empty:
            self.index.extend(self.store, self._first_index_row())

    def release(self) -> None:
        """Put rows that the index moved back in the order of their positions; the next ``sync`` moves them again."""
        if not self.store.is_empty:
            self.index.release(self.store, self._first_index_row())

    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        extra: RowSource | None = None,
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
            extra: rows of other origin that every query reads as well.
            return_lse: also return the log-sum-exp over the rows read, ``[B, Hq, m]`` float32.
            retrieve: False scans all rows.
            audit: compare a retrieving call with dense whatever ``audit_rate`` says; see ``stats.audits``.

        Returns:
            ``[B, Hq, m, Dv]`` in the query's dtype.

        Raises:
            ValueError: an empty store, or a query that does not fit it; states what was received.
        """
        self._check_query(query)
        scale = self._scale(query, scale)
        if sink_logits is not None:
            if sink_logits.shape != (query.shape[1],):
                raise ValueError(f"sink_logits have shape {list(sink_logits.shape)}, expected [{query.shape[1]}]")
            check_finite("sink_logits", sink_logits)
        if extra is not None:
            extra.check(query, self.store.value_dim)
        plan = self._plan(query, retrieve)
        stats = self.stats
        stats.rows_stored = len(self)
        if plan.is_dense:
            stats.dense_reasons[plan.reason] += 1
            if sink_logits is None and extra is None and not return_lse:
                return self._dense(query, scale, softcap)
            out, lse = self._dense_state(query, scale, softcap)
        else:
            audit = audit or self._audit_is_due()
            answer = self._answer(plan, query, scale, softcap, measure=audit, learn=True)
            out, lse = answer.out, answer.lse
            self._record(answer)
            if audit:
                stats.add_audit(self._audit(answer, query, scale, softcap, learn=True), self.config.max_error)
                stats.plan = answer.plan
        if extra is not None:
            out, lse = extra.merge_into(out, lse, query, scale=scale, softcap=softcap)
        if sink_logits is not None:
            out, lse = merge_sink(out, lse, sink_logits)
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
        if self._sealed_ahead(query):
            # Some queries may not see all sealed rows: search the rows in order, and seal them again.
            self.index.release(self.store, self._first_index_row())
            hits = self.search(query, k, scale=scale)
            self.sync()
            return hits
        keys, m = self.store.keys, query.shape[2]
        hot = min(len(self) - m + 1, len(self.index))
        positions = torch.arange(len(self) - m + 1, len(self) + 1, device=query.device)
        scale = self._scale(query, scale)
        start = (self.store.start - hot).clamp(min=0)
        newest, _ = top_k(query, keys[:, :, hot:], k, scale=scale, start=start, stop=positions - hot)
        slots = torch.where(newest >= 0, newest + hot, newest)
        if hot > 0:
            found = self.index.search(query, self.store, k, self._first_index_row(), hot).ids
            slots = torch.cat([slots, self._sink_ids(query, hot), found], dim=-1)
        # All of them by one piece of code: equal keys must get equal scores for the rule of ties to hold.
        ids, scores = self.index.positions(slots), self.store.scores(query, slots, scale)
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
        factor = self._scale(query, scale)
        plan = self._plan(query, retrieve=True, estimate=True)
        if not plan.is_dense:
            # Once unmeasured: the first call of a process may load and compile kernels.
            self._answer(plan, query, factor, softcap, measure=False)
            return self._answer(plan, query, factor, softcap, measure=True).plan
        began = time.perf_counter()
        self._dense(query, factor, softcap)
        took = time.perf_counter() - began
        actual = Usage(self._rows_visible(query), self._bytes_dense(), 0.0, took)
        return replace(plan, sources=(replace(plan.sources[0], actual=actual, mass=1.0),), seconds=took)

    def audit(self, query: Tensor, *, scale: float | None = None, softcap: float | None = None) -> AuditReport:
        """Answer the query as ``attend`` would and densely, and compare. Changes nothing.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        self._check_query(query)
        factor = self._scale(query, scale)
        plan = self._plan(query, retrieve=True)
        if not plan.is_dense:
            return self._audit(self._answer(plan, query, factor, softcap, measure=True), query, factor, softcap)
        seen = self._dense_state(query, factor, softcap)[1] > float("-inf")
        ones = torch.where(seen, 1.0, torch.nan)
        rows, read = self._rows_visible(query), self._bytes_dense()
        return AuditReport(ones, ones, ones - 1.0, 0.0, rows, len(self), read, read)

    def weights(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        retrieve: bool = True,
    ) -> Tensor:
        """Softmax weights ``[B, Hq, T]`` of the answer to the newest query, by row position. Changes nothing.

        Rows that ``attend`` would not read weigh 0; what is missing to 1 lies on the summaries or samples that answer
        for them. (With ``max_error``, a head answered densely in the end has the weights of its rows retrieved before.)

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        self._check_query(query)
        factor = self._scale(query, scale)
        plan, lse = self._plan(query, retrieve), None
        newest = query[:, :, -1:]
        every = torch.arange(len(self), device=query.device).expand(*newest.shape[:3], -1)
        if plan.is_dense:
            padding = self.index.positions(every) < self.store.start[:, None, None, None]
            slots = every.masked_fill(padding, -1)
        else:
            answer = self._answer(plan, query, factor, softcap, measure=True)
            assert answer.slots is not None
            slots = torch.cat(
                [self._sink_ids(newest, plan.hot), answer.slots[:, :, -1:], every[..., plan.hot :]], dim=-1
            )
            lse = answer.lse[:, :, -1:]
        return weights_by_position(newest, self.store, self.index, slots, lse, scale=factor, softcap=softcap)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows, as if the others had never come.

        Raises:
            ValueError: a length below 0 or above ``len(db)``.
        """
        indexed = len(self.index)
        if len(self) and isinstance(length, int) and 0 <= length <= len(self):
            self.index.truncate(self.store, length, self._first_index_row())
        self.store.truncate(length)
        # Rows that were never indexed stay so until their owner says that their padding is known.
        if indexed:
            self.sync()

    def save(self, target: "str | os.PathLike[str] | SnapshotWriter") -> "SaveReport":
        """Write rows and index to a snapshot folder; of a folder saved to before, only what is new since then.

        Args:
            target: the folder, made if need be; or a SnapshotWriter, which keeps it locked between saves.

        Raises:
            SnapshotError (a ValueError): another writer holds the folder, or it holds something else.
            OSError: the folder cannot be written.
        """
        from .snapshot import save

        return save(target, [(self.store, self.index)], self.config)

    @classmethod
    def open(
        cls,
        path: "str | os.PathLike[str]",
        *,
        config: RetrievalConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> "AttentionDB":
        """A database that answers bit for bit like the one saved; changing it does not change the snapshot.

        Every file is checked; rows are mapped, and copied to ``device`` on first use.

        Args:
            path: a snapshot folder of one layer; may come from anyone.
            config: default: the one saved. Another may differ in how a query reads, not in what was built.
            device: where the rows will be.

        Raises:
            FileNotFoundError: there is no such folder.
            SnapshotError (a ValueError): not a snapshot, of another format version, damaged, of a whole model, or built
                with another config; names the file or the option.
        """
        from .snapshot import Snapshot, SnapshotError

        snapshot = Snapshot.open(path)
        if len(snapshot.info.layers) != 1:
            raise SnapshotError(
                f"{path} holds {len(snapshot.info.layers)} layers of a model, expected one: wrap(model, context=path)"
            )
        return cls.of_snapshot(snapshot, 0, snapshot.config(config), torch.device(device))

    @classmethod
    def of_snapshot(
        cls, snapshot: "Snapshot", number: int, config: RetrievalConfig, device: torch.device
    ) -> "AttentionDB":
        """The database that was layer ``number`` of an opened snapshot; see ``open``.

        Raises:
            SnapshotError (a ValueError): a file holds something else than what the manifest says; names the file.
        """
        layer = snapshot.info.layers[number]
        db = cls(layer.num_kv_heads, layer.head_dim, value_dim=layer.value_dim, config=config)
        snapshot.restore(number, db.store, db.index, device)
        return db

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

    def workload(self, query: Tensor) -> Workload:
        """What the planner knows about a call with ``query [B, Hq, m, D]``."""
        keys, store = self.store.keys, self.store
        return Workload(
            rows=len(self),
            queries=query.shape[2],
            indexed=len(self.index),
            first_index_row=self.config.n_sink + (int(store.start.min()) if store.has_padding else 0),
            batch=query.shape[0],
            heads=query.shape[1],
            kv_heads=store.num_kv_heads,
            dim=store.head_dim,
            value_dim=store.value_dim,
            element_size=keys.element_size(),
        )

    def _plan(
        self, query: Tensor, retrieve: bool, estimate: bool = False, config: RetrievalConfig | None = None
    ) -> QueryPlan:
        backend = resolve_backend(query)
        return choose_plan(
            config or self.config,
            self.workload(query),
            backend=backend,
            threads=torch.get_num_threads() if backend == "numba" else None,
            retrieve=retrieve,
            estimate=estimate,
        )

    def _scale(self, query: Tensor, scale: float | None) -> float:
        if scale is None:
            return float(query.shape[-1] ** -0.5)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}, expected a positive number: an index finds the largest products")
        return float(scale)

    def _answer(
        self, plan: QueryPlan, query: Tensor, scale: float, softcap: float | None, measure: bool, learn: bool = False
    ) -> Answer:
        """Run a plan that is not dense; with ``max_error``, climb the ladder."""
        config, call = self.config, Call(query, self.store, self.index, scale, softcap, measure)
        if config.max_error is None:
            return run_plan(plan, config, call)
        ladder = self.stats.ladder or Ladder(config)
        base = budget(len(self.index), config.k)[0] if config.index_name == "segmented" else config.rows_retrieved
        climb = ladder.climb(
            config,
            call,
            lambda at_rung: self._plan(query, retrieve=True, config=at_rung),
            base=base,
            eligible=plan.hot - config.n_sink,
            learn=learn,
        )
        if learn:
            self.stats.ladder = ladder
            self.stats.rungs[climb.name] += 1
        return finish_climb(climb, call)

    def _audit_is_due(self) -> bool:
        """The first retrieving call, then evenly spread ones; a ladder has errors to learn first."""
        rate, calls = self.config.audit_rate, self.stats.retrieving
        learning = self.config.max_error is not None and calls < AUDITS_TO_LEARN
        return rate > 0 and (learning or math.ceil((calls + 1) * rate) > math.ceil(calls * rate))

    def _record(self, answer: Answer) -> None:
        stats = self.stats
        stats.retrieving += 1
        stats.rows_read += answer.rows_read
        stats.rows_retrieved += answer.rows_retrieved
        if stats.index.get("rows") != len(self.index):
            stats.index = self.index.describe()

    @torch.no_grad()
    def _audit(
        self, answer: Answer, query: Tensor, scale: float, softcap: float | None, learn: bool = False
    ) -> AuditReport:
        plan, store, k = answer.plan, self.store, self.config.rows_retrieved
        _, exact_scores = top_k(query, store.keys[:, :, : plan.hot], k, scale=scale, start=self._first_index_row())
        assert answer.slots is not None
        dense = self._dense_state(query, scale, softcap)
        if learn and self.stats.ladder is not None and answer.tried is not None:
            self.stats.ladder.learn(answer.tried, relative_error(answer.tried.out, dense[0]))
        recall, mass, error = compare_with_dense(
            (answer.out, answer.exact_lse),
            dense,
            store.scores(query, answer.slots, scale),
            exact_scores,
        )
        counts = answer.rows_retrieved, answer.rows_read, len(self), plan.bytes_read, self._bytes_dense()
        return AuditReport(recall, mass, error, *counts)

    def _dense(self, query: Tensor, scale: float, softcap: float | None) -> Tensor:
        if self._sealed_ahead(query):
            return self._dense_state(query, scale, softcap)[0].to(query.dtype)
        start = self.store.start if self.store.has_padding else None
        out = dense_attention(query, self.store.keys, self.store.values, start=start, scale=scale, softcap=softcap)
        assert isinstance(out, Tensor)
        return out

    def _dense_state(self, query: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        keys, values, start = self.store.keys, self.store.values, self.store.start
        if self._sealed_ahead(query):
            # Rows after a query's position were moved among the older ones: causal order is by position, not place.
            mask = self._causal_mask(query)
            return masked_attention(query, keys, values, mask, scale=scale, softcap=softcap)
        state = dense_attention(query, keys, values, start=start, scale=scale, softcap=softcap, return_lse=True)
        assert isinstance(state, tuple)
        return state

    def _sealed_ahead(self, query: Tensor) -> bool:
        return isinstance(self.index, SegmentedIndex) and len(self.index) > len(self) - query.shape[2] + 1

    def _causal_mask(self, query: Tensor) -> Tensor:
        """``[B, Hq, m, T]`` bool by the positions of rows."""
        batch, heads, m, _ = query.shape
        slots = torch.arange(len(self), device=query.device).expand(batch, heads, 1, -1)
        positions = self.index.positions(slots)
        newest = torch.arange(len(self) - m, len(self), device=query.device)[:, None]
        return (positions <= newest) & (positions >= self.store.start[:, None, None, None])

    def _first_index_row(self) -> Tensor:
        return self.store.start + self.config.n_sink

    def _sink_ids(self, query: Tensor, hot: int) -> Tensor:
        """``[B, Hq, m, n_sink]``: the first rows of each batch row, -1 from ``hot`` on."""
        ids = self.store.start[:, None] + torch.arange(self.config.n_sink, device=query.device)
        ids = ids.masked_fill(ids >= hot, -1)
        return ids[:, None, None, :].expand(*query.shape[:3], -1)

    def _rows_visible(self, query: Tensor) -> float:
        stop = torch.arange(len(self) - query.shape[2] + 1, len(self) + 1, device=query.device)
        return float((stop - self.store.start[:, None]).clamp(min=0).float().mean())

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
