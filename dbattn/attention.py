"""AttentionDB: the rows of one attention layer as a database that answers attention queries."""

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from index_kernels import top_k
from index_kernels.inference import inference_only
from index_kernels.ops import check_fork

from .audit import AuditReport, RunningStats
from .config import RetrievalConfig, check_integer
from .dense import merge_sink
from .index import make_index
from .plan import QueryPlan
from .query import Query
from .rows import RowSource
from .storage import check_finite
from .store import KVStore
from .trace import Weights
from .usage import Usage

if TYPE_CHECKING:
    from .snapshot import SaveReport, Snapshot, SnapshotWriter


@dataclass(frozen=True)
class Hits:
    """The k best rows found.

    Attributes:
        ids: ``[B, Hq, m, k]`` int64, by falling score, -1 = none.
        scores: scaled logits, ``[B, Hq, m, k]`` float32, -inf = none.
        exact: every row that a query sees was scored. False: of the indexed rows only the index's candidates were
            ("ivf", "hnsw"), and better rows may exist.
    """

    ids: Tensor
    scores: Tensor
    exact: bool


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
        self.config = RetrievalConfig.checked(config)
        value_dim = head_dim if value_dim is None else value_dim
        self.store = KVStore(num_kv_heads, head_dim, value_dim, self.config.storage)
        self.index = make_index(self.config)
        self.stats = RunningStats()

    def insert(self, keys: Tensor, values: Tensor, *, start: Tensor | None = None) -> None:
        """Append rows and index them.

        Args:
            keys, values: ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]``, float32, float16 or bfloat16; any n, 0 included.
            start: int64 ``[B]``, first valid row of each batch row (left padding); with the first rows only.

        Raises:
            ValueError: shapes, dtype or device that do not fit the rows stored, or elements that are not finite, or
                larger than ``storage.LARGEST`` in size. The store is unchanged then.
            RuntimeError: a process forked after the kernels' threads had started.
        """
        check_fork()  # before anything changes: the index may need kernels
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

    @inference_only
    def sync(self) -> None:
        """Bring the index up to the store's rows; for callers that append to ``store`` themselves, as a cache does."""
        self.store.set_start(self.store.start)
        if not self.store.is_empty:
            self.index.extend(self.store, self._first_index_row())

    def release(self) -> None:
        """Put rows that the index moved back in the order of their positions; the next ``sync`` moves them again."""
        if not self.store.is_empty:
            self.index.release(self.store, self._first_index_row())

    @inference_only
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
            ``[B, Hq, m, Dv]`` in the query's dtype. Inference only: where a gradient is wanted, backward raises.

        Raises:
            ValueError: an empty store, or a query that does not fit it; states what was received.
        """
        asked = self._query(query, scale, softcap)
        if sink_logits is not None:
            if sink_logits.shape != (query.shape[1],):
                raise ValueError(f"sink_logits have shape {list(sink_logits.shape)}, expected [{query.shape[1]}]")
            check_finite("sink_logits", sink_logits)
        if extra is not None:
            extra.check(query, self.store.value_dim)
        plan, stats = asked.plan(retrieve=retrieve), self.stats
        stats.rows_stored = len(self)
        if plan.is_dense:
            rows, size = (0.0, 0) if asked.is_prompt else (asked.rows_visible, asked.bytes_dense)
            stats.add_dense(plan.reason, rows, size, prompt=asked.is_prompt)
            if sink_logits is None and extra is None and not return_lse:
                return asked.dense()
            out, lse = asked.dense_state()
        else:
            audit = audit or stats.audit_is_due(self.config)
            answer = asked.answer(plan, measure=audit, learn=True)
            out, lse = answer.out, answer.lse
            stats.add_answer(answer.rows_retrieved, answer.rows_read, answer.bytes_read, asked.bytes_dense)
            if stats.index.get("rows") != len(self.index):
                stats.index = self.index.describe()
            if audit:
                stats.add_audit(asked.audit(answer, learn=True), self.config.max_error)
                stats.plan = answer.plan
        if extra is not None:
            out, lse = extra.merge_into(out, lse, query, scale=asked.scale, softcap=softcap)
        if sink_logits is not None:
            out, lse = merge_sink(out, lse, sink_logits)
        return (out.to(query.dtype), lse) if return_lse else out.to(query.dtype)

    def search(self, query: Tensor, k: int, *, scale: float | None = None) -> Hits:
        """The k rows with the largest logits, equal ones by rising id.

        "segmented" and "flat" look at every row, in time O(T), whatever ``attend`` would read. "ivf" and "hnsw" look at
        the sinks, the hot rows and the index's candidates; see ``Hits.exact``.

        Args:
            query: ``[B, Hq, m, D]``; query i sees rows up to position ``len(db) - m + i``.
            k: rows per query, at least 1.
            scale: factor of the logits, default ``1 / sqrt(D)``.

        Raises:
            ValueError: an empty store, a query that does not fit it, or k out of range.
        """
        return Hits(*self._search(query, k, scale))

    @inference_only
    def _search(self, query: Tensor, k: int, scale: float | None) -> tuple[Tensor, Tensor, bool]:
        asked = self._query(query, scale, None)
        check_integer("k", k, 1)
        if asked.is_sealed_ahead:
            # Some queries may not see all sealed rows: search the rows in order, and seal them again.
            self.release()
            found = self._search(query, k, scale)
            self.sync()
            return found
        keys, m, scale, wanted = self.store.rows[0], query.shape[2], asked.scale, k
        k = min(k, len(self))
        hot = min(len(self) - m + 1, len(self.index))
        positions = torch.arange(len(self) - m + 1, len(self) + 1, device=query.device)
        start = (self.store.start - hot).clamp(min=0)
        newest, _ = top_k(query, keys[:, :, hot:], k, scale=scale, start=start, stop=positions - hot)
        slots = torch.where(newest >= 0, newest + hot, newest)
        if hot > 0:
            indexed = self.index.search(query, self.store, k, self._first_index_row(), hot).ids
            slots = torch.cat([slots, asked.sink_slots(hot), indexed], dim=-1)
        # All of them by one piece of code: equal keys must get equal scores for the rule of ties to hold.
        ids, scores = self.index.positions(slots), self.store.scores(query, slots, scale)
        # Rising ids first, then a stable sort by score: equal scores stay in the order of their ids.
        by_id = ids.argsort(dim=-1)
        ids, scores = ids.gather(-1, by_id), scores.gather(-1, by_id)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
        ids, scores = (
            pad(found.gather(-1, best), (0, wanted - best.shape[-1]), value=none)
            for found, none in ((ids, -1), (scores, float("-inf")))
        )
        return ids, scores, hot <= 0 or self.index.searches_all

    @inference_only
    def explain(self, query: Tensor, *, scale: float | None = None, softcap: float | None = None) -> QueryPlan:
        """Run the query and return its plan with what each source read; prints as a tree, like EXPLAIN ANALYZE.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        asked = self._query(query, scale, softcap)
        plan = asked.plan(estimate=True)
        if not plan.is_dense:
            # Once unmeasured: the first call of a process may load and compile kernels.
            asked.answer(plan, measure=False)
            return asked.answer(plan, measure=True).plan
        began = time.perf_counter()
        asked.dense()
        took = time.perf_counter() - began
        actual = Usage(asked.rows_visible, asked.bytes_dense, 0.0, took)
        return replace(plan, sources=(replace(plan.sources[0], actual=actual, mass=1.0),), seconds=took)

    @inference_only
    def audit(self, query: Tensor, *, scale: float | None = None, softcap: float | None = None) -> AuditReport:
        """Answer the query as ``attend`` would and densely, and compare. Changes nothing.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        asked = self._query(query, scale, softcap)
        plan = asked.plan()
        return asked.audit_dense() if plan.is_dense else asked.audit(asked.answer(plan, measure=True))

    @inference_only
    def weights(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        retrieve: bool = True,
    ) -> Tensor:
        """Softmax weights ``[B, Hq, T]`` of the answer to the newest query, by row position. Changes nothing.

        They sum to 1: rows that were not read have what the summary of their list weighs, shared evenly, and rows of a
        sample their weight in it. ``row_weights`` tells the two kinds apart.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        return self.row_weights(query, scale=scale, softcap=softcap, retrieve=retrieve).total

    def row_weights(
        self, query: Tensor, *, scale: float | None = None, softcap: float | None = None, retrieve: bool = True
    ) -> Weights:
        """``weights``, and how much of them comes from rows that were read."""
        asked = self._query(query, scale, softcap)
        return asked.weights(asked.plan(retrieve=retrieve))

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
    def keys(self) -> Tensor:
        """Keys ``[B, Hkv, n, D]`` as floats, by row position: a copy, whatever order an index keeps them in.

        Raises:
            ValueError: an empty store.
        """
        return self._by_position(self.store.keys)

    @property
    def values(self) -> Tensor:
        """Values ``[B, Hkv, n, Dv]`` likewise."""
        return self._by_position(self.store.values)

    @property
    def requires_grad(self) -> bool:
        """Whether rows came out of a graph: backward through answers is refused then."""
        return self.store.requires_grad

    @property
    def nbytes(self) -> int:
        """Bytes held: the rows' buffers (spare capacity included) and the index."""
        return self.store.nbytes + self.index.nbytes

    def _query(self, query: Tensor, scale: float | None, softcap: float | None) -> Query:
        return Query.checked(query, self.store, self.index, self.config, self.stats, scale, softcap)

    def _by_position(self, rows: Tensor) -> Tensor:
        ordered, sealed = rows.clone(), len(self.index) if self.index.moves_rows else 0
        if sealed:
            slots = torch.arange(sealed, device=rows.device).expand(*rows.shape[:2], 1, -1)
            at = self.index.positions(slots)[:, :, 0, :, None].expand_as(rows[:, :, :sealed])
            ordered[:, :, :sealed].scatter_(2, at, rows[:, :, :sealed])
        return ordered

    def _first_index_row(self) -> Tensor:
        return self.store.start + self.config.n_sink
