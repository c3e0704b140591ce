"""AttentionDB: the rows of one attention layer as a database that answers attention queries."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from index_kernels.inference import inference_only

from .config import RetrievalConfig, check_integer
from .index.search import search_rows
from .indexed import IndexedRows
from .query.audit import AuditReport, audit_dense, audit_prompt
from .query.audit import audit as compare
from .query.call import Call
from .query.execute import Answer, run_plan
from .query.expected import Expected
from .query.ladder import Climb, Ladder, finish_climb
from .query.plan import QueryPlan
from .query.prompt import BlockPlan, block_plans, newest_part, read_prompt, whole
from .query.stats import RunningStats, Told
from .query.weights import Weights, dense_weights, weights_of
from .store import RowSource, StateSource

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from index_kernels import ListTable

    from .shards import Shards
    from .snapshot import SaveReport, ShardWriter, Snapshot, SnapshotWriter


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


class AttentionDB(IndexedRows):
    """Rows (key, value) go in, attention comes out, read from an index instead of from every row.

    Args:
        num_kv_heads: KV heads; queries may have any multiple of it (grouped-query attention).
        head_dim: dimension of queries and keys.
        value_dim: dimension of values, default head_dim.
        config: what a query reads, default ``RetrievalConfig()``.
        group: a process group of ``torch.distributed`` over which rows are dealt: what is made then is a ``ShardedDB``,
            and every rank makes the same calls.

    Example:
        >>> db = AttentionDB(num_kv_heads=2, head_dim=64)
        >>> db.insert(torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64))
        >>> db.attend(torch.randn(1, 8, 1, 64)).shape
        torch.Size([1, 8, 1, 64])
    """

    def __new__(cls, *args: Any, group: "ProcessGroup | Shards | None" = None, **options: Any) -> Self:
        """A database of one process, or with ``group`` a rank's part of one of several."""
        kind = cls if group is None or issubclass(cls, _sharded().ShardedDB) else _sharded().ShardedDB
        made: Self = super().__new__(kind)
        return made

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        config: RetrievalConfig | None = None,
        group: "ProcessGroup | Shards | None" = None,
    ) -> None:
        super().__init__(num_kv_heads, head_dim, value_dim, config)
        self.stats = RunningStats()

    @inference_only
    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        extra: RowSource | StateSource | None = None,
        return_lse: bool = False,
        retrieve: bool = True,
        audit: bool | None = None,
        until: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the m newest positions, causal, over the rows that the plan reads.

        Args:
            query: ``[B, Hq, m, D]``; query i is at position ``len(db) - m + i`` and sees rows up to its own.
            scale: factor of the logits, default ``1 / sqrt(D)``.
            softcap: logits become ``softcap * tanh(logits / softcap)``.
            sink_logits: ``[Hq]``, logit of one more row with value zero per head (a model's attention sink).
            extra: rows of other origin that every query reads as well, or the state of a query over such rows.
            return_lse: also return the log-sum-exp over the rows read, ``[B, Hq, m]`` float32.
            retrieve: False scans all rows.
            audit: whether to compare a retrieving call with dense, whatever ``audit_rate`` says; see ``stats.audits``.
                Default: as it says.
            until: rows that the store will have when the prompt has been read of which this call is a chunk. The end of
                a prompt is read with more rows. Default: a call of 4,096 positions or more has an end of its own.

        Returns:
            ``[B, Hq, m, Dv]`` in the query's dtype. Inference only: where a gradient is wanted, backward raises.

        Raises:
            ValueError: an empty store, or a query that does not fit it; states what was received.
        """
        call, stats = self._call(query, scale, softcap, extra, sink_logits), self.stats
        prompt, call.until = call.is_prompt, until
        if prompt and retrieve and (plans := self._block_plans(call)):
            return self._read(call, plans, query, return_lse=return_lse)
        call.needs_lse = return_lse
        answer, dense = self._answered(call, retrieve=retrieve, audit=audit)
        stats.rows_stored = len(self)
        if dense:
            stats.add_dense(dense, answer.rows_read, 0 if prompt else answer.bytes_read, prompt=prompt)
        else:
            stats.add_answer(
                answer.rows_retrieved, answer.rows_read, answer.bytes_read, self._bytes_dense(call), answer.counted
            )
            self._note_index()
            if call.measure:
                report = self._compared(call, answer, learn=True)
                stats.add_audit(report, self.config.max_error)
                stats.plan = answer.plan
        out = self.store.turn(answer.out)
        out = out if out.dtype == query.dtype else out.to(query.dtype)
        return (out, answer.state[1]) if return_lse else out

    @property
    def audit_is_due(self) -> bool:
        """Whether the next retrieving call will be audited, if nobody says otherwise."""
        expected = self._expected if self.config.max_error is None else None
        return self.stats.audit_is_due(self.config, learning=expected is not None and not expected.is_known)

    @property
    def lists(self) -> "ListTable | None":
        """The lists of "segmented", made anew when one changes; None where there are none."""
        return getattr(self.index, "table", None) if len(self.index) else None

    @property
    def stands_on(self) -> tuple[Any, ...]:
        """What a CUDA graph of a decode call has in it: it serves while all of this is the same, or the same object."""
        expected = self._expected
        needs = None if expected is None else expected.needs
        return *self.store.buffers, self.store.start, self.lists, needs, self.config

    def count_replayed(self, told: Told) -> None:
        """Count a call that a CUDA graph repeated, and the row that it wrote; ``told``: of the captured call."""
        self.store.note_written()
        self.stats.repeat(told, len(self), len(self.start) * self.store.num_kv_heads * self.store.row_bytes)

    def note_replayed(self, query: Tensor) -> None:
        """Do what follows on a decode call, whose query was ``[B, Hq, 1, D]``."""
        self._note_index()
        self.note_queries(query, len(self) - 1)
        self.sync()

    def by_size(self) -> "AttentionDB":
        """The same rows, index and counters, for answers that are checked later: a view to be asked, not changed.

        It reads as many rows as their number says, or ``k``, and keeps no ``target_error`` or ``max_error``.
        """
        view = copy.copy(self)
        view.config = _by_size(self.config)
        return view

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
        call = self._call(query, scale)
        check_integer("k", k, 1)
        return self._best(call, k)

    @inference_only
    def explain(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        extra: RowSource | StateSource | None = None,
    ) -> QueryPlan:
        """Run the query and return its plan with what each source read; prints as a tree, like EXPLAIN ANALYZE.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        call = self._call(query, scale, softcap, extra, sink_logits)
        if plans := self._block_plans(call):
            call.measure = True
            return newest_part(self._read_blocks(call, plans, query)).plan
        return self._explained(call)

    @inference_only
    def plan_of(self, query: Tensor, *, scale: float | None = None) -> QueryPlan:
        """How ``attend`` would answer a query, with what that is estimated to take; nothing runs."""
        return self._plan(self._call(query, scale), estimate=True)

    @inference_only
    def audit(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        extra: RowSource | StateSource | None = None,
    ) -> AuditReport:
        """Answer the query as ``attend`` would and densely, and compare. Changes nothing.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        call = self._call(query, scale, softcap, extra, sink_logits)
        if plans := self._block_plans(call):
            call.measure = True
            return audit_prompt(call, self._read_blocks(call, plans, query))
        answer = self._measured(call)
        return audit_dense(call) if answer is None else self._compared(call, answer)

    @inference_only
    def weights(
        self, query: Tensor, *, scale: float | None = None, softcap: float | None = None, retrieve: bool = True
    ) -> Tensor:
        """Softmax weights ``[B, Hq, T]`` of the answer to the newest query, by row position. Changes nothing.

        They sum to 1: rows that were not read have what the summary of their list weighs, shared evenly, and rows of a
        sample their weight in it. ``row_weights`` tells the two kinds apart.

        Raises:
            ValueError: an empty store, or a query that does not fit it.
        """
        return self.row_weights(query, scale=scale, softcap=softcap, retrieve=retrieve).total

    @inference_only
    def row_weights(
        self, query: Tensor, *, scale: float | None = None, softcap: float | None = None, retrieve: bool = True
    ) -> Weights:
        """``weights``, and how much of them comes from rows that were read."""
        return self._weights(self._call(query, scale, softcap), retrieve=retrieve)

    def save(self, target: "str | os.PathLike[str] | SnapshotWriter | ShardWriter") -> "SaveReport":
        """Write rows and index to a snapshot folder; of a folder saved to before, only what is new since then.

        Args:
            target: the folder, made if need be; or a SnapshotWriter, which keeps it locked between saves. Of several
                ranks each writes its own part, and the save counts when all have; they take a ShardWriter.

        Raises:
            SnapshotError (a ValueError): another writer holds the folder, or it holds something else.
            OSError: the folder cannot be written. Either is raised by all ranks.
            ShardError: another rank does not answer; what was saved before is whole.
        """
        if self.is_reading:
            self.sync()
        return self._save(target)

    @classmethod
    def open(
        cls,
        path: "str | os.PathLike[str]",
        *,
        config: RetrievalConfig | None = None,
        device: torch.device | str = "cpu",
        group: "ProcessGroup | Shards | None" = None,
    ) -> "AttentionDB":
        """A database that answers bit for bit like the one saved; changing it does not change the snapshot.

        Every file is checked before this returns; rows are mapped, and copied to ``device`` on first use.

        Args:
            path: a snapshot folder of one layer; may come from anyone.
            config: default: the one saved. Another may differ in how a query reads, not in what was built.
            device: where the rows will be.
            group: of as many ranks as saved it, each of which opens its own part.

        Raises:
            FileNotFoundError: there is no such folder.
            SnapshotError (a ValueError): not a snapshot, of another format version, damaged, of a whole model, or built
                with another config; names the file or the option.
        """
        from .snapshot import Snapshot, SnapshotError

        if group is not None:
            shard: AttentionDB = _sharded().open_shard(path, config, torch.device(device), group)
            return shard
        snapshot = Snapshot.open(path)
        if len(snapshot.info.layers) != 1:
            raise SnapshotError(
                f"{path} holds {len(snapshot.info.layers)} layers of a model, expected one: wrap(model, context=path)"
            )
        snapshot.check()
        db = cls.of_snapshot(snapshot, 0, snapshot.config(config), torch.device(device))
        db.store.check_mapped()
        return db

    @classmethod
    def of_snapshot(
        cls,
        snapshot: "Snapshot",
        number: int,
        config: RetrievalConfig,
        device: torch.device,
        group: "Shards | None" = None,
    ) -> "AttentionDB":
        """The database that was layer ``number`` of an opened snapshot; see ``open``.

        Raises:
            SnapshotError (a ValueError): a file holds something else than what the manifest says; names the file.
        """
        layer = snapshot.info.layers[number]
        db = cls(layer.num_kv_heads, layer.head_dim, value_dim=layer.value_dim, config=config, group=group)
        snapshot.restore(number, db.store, db.index, device)
        return db

    def _save(self, target: Any) -> "SaveReport":
        from .snapshot import save

        return save(target, [(self.store, self.index)], self.config)

    # What follows, up to ``_best``, answers a checked call from the rows here; a ``ShardedDB`` asks all ranks.

    def _answered(self, call: Call, *, retrieve: bool, audit: bool | None) -> tuple[Answer, str]:
        """What ``attend`` answers, measured where it is to be audited; and why all rows were read, "" if not all."""
        if audit is None:
            audit = self.audit_is_due
        plan = self._plan(call, retrieve=retrieve, exact=audit)
        if plan.is_dense:
            call.needs_lse = call.needs_lse or len(plan.steps) > 1
            return run_plan(plan, call), plan.reason
        call.measure = audit
        call.needs_lse = call.needs_lse or audit or self.config.max_error is not None or len(plan.steps) > 1
        return self._run(plan, call, learn=True), ""

    def _compared(self, call: Call, answer: Answer, *, learn: bool = False) -> AuditReport:
        """How far a measured answer is from the dense one; with ``learn``, what is expected of later ones learns it."""
        if not learn:
            return compare(call, answer)
        self.store.look_at_rows()
        report, expected = compare(call, answer, self.stats.ladder), self._expected
        if expected is not None and self.config.max_error is None:
            expected.learn(report.relative_error)
        return report

    def _note_index(self) -> None:
        """Say in ``stats`` what the index is, and what its answers are expected to err."""
        stats = self.stats
        if (expected := self._expected) is not None:
            stats.expected_error = expected.needs.error
        if stats.index.get("rows") != len(self.index):
            stats.index = self.index.describe() | ({"rows kept as": kept} if (kept := self.store.kept) else {})

    def _explained(self, call: Call) -> QueryPlan:
        plan = self._plan(call, estimate=True)
        if plan.is_dense:
            call.measure, call.needs_lse = True, len(plan.steps) > 1
            return run_plan(plan, call).plan
        # Twice: the first call of a process may load and compile kernels.
        call.measure = True
        self._run(plan, call)
        return self._run(plan, call).plan

    def _measured(self, call: Call, *, retrieve: bool = True) -> Answer | None:
        """A measured answer; None where all rows are read."""
        plan = self._plan(call, retrieve=retrieve)
        if plan.is_dense:
            return None
        call.measure = True
        return self._run(plan, call)

    def _weights(self, call: Call, *, retrieve: bool) -> Weights:
        call.weighs = True
        answer = self._measured(call, retrieve=retrieve)
        return dense_weights(call) if answer is None else weights_of(call, answer)

    def _best(self, call: Call, k: int) -> tuple[Tensor, Tensor, bool]:
        """The fields of ``Hits``."""
        if not call.is_sealed_ahead:
            return search_rows(call, self.index, k)
        # Some queries may not see all sealed rows: search the rows in order, and seal them again.
        self.release()
        found = search_rows(call, self.index, k)
        self.sync()
        return found

    def _plan(self, call: Call, **how: Any) -> QueryPlan:
        """How a call will be answered; see ``Planner``."""
        return self._planner.plan(call, unindexed=self.unindexed, **how)

    def _run(self, plan: QueryPlan, call: Call, *, learn: bool = False) -> Answer:
        """Run a plan that is not dense; with ``max_error``, climb the ladder, which ``learn`` lets remember it."""
        config = self.config
        if config.max_error is None:
            return run_plan(plan, call)
        climb = self._climb(
            lambda at_rung: run_plan(self._plan(call, config=at_rung, exact=call.measure), call),
            needs=self.index.needs,
            base=self.index.rows_asked(config, call.workload),
            eligible=plan.hot - config.n_sink,
            learn=learn,
        )
        return finish_climb(climb, call)

    def _climb(self, answer_of: Callable[[RetrievalConfig], Answer], *, learn: bool, **about: Any) -> Climb:
        """See ``Ladder.climb``."""
        config, stats = self.config, self.stats
        ladder, heads = stats.ladder or Ladder(config), self.store.num_kv_heads
        climb = ladder.climb(answer_of, config=config, kv_heads=heads, learn=learn, **about)
        if learn:
            stats.ladder = ladder
            stats.rungs[climb.name] += 1
        return climb

    def _block_plans(self, call: Call) -> list[BlockPlan]:
        """How a prompt is read block by block; empty where all of it is read densely."""
        return [] if self.unindexed else block_plans(call)

    def _read(
        self, call: Call, plans: list[BlockPlan], query: Tensor, *, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``attend`` for a prompt, parts of which are read through lists."""
        stats, log = self.stats, self._prompt_log
        stats.rows_stored = len(self)
        self.store.note_queries(query, len(self) - query.shape[2])
        answers = read_prompt(call, plans, call.first_index_row, log, audit=self.config.audit_rate > 0)
        for answer in answers:
            stats.add_prompt(answer.plan, answer.state[1].shape[2], answer.rows_read)
        stats.prompt.errors += log.take_errors()
        out, lse = whole(answers)
        out = self.store.turn(out).to(query.dtype)
        return (out, lse) if return_lse else out

    def _read_blocks(self, call: Call, plans: list[BlockPlan], query: Tensor) -> list[Answer]:
        """The same for ``explain`` and ``audit``: nothing is learnt, and the index is as it was."""
        learnt, log = copy.deepcopy(self.store.sample), copy.deepcopy(self._prompt_log)
        self.store.note_queries(query, len(self) - query.shape[2])
        answers = read_prompt(call, plans, call.first_index_row, log, audit=self.config.audit_rate > 0)
        self.store.take_sample(learnt)
        self.index.unseal_after(self.store, call.first_index_row, plans[0].first)
        if not self.is_reading:
            self.sync()
        return answers

    @property
    def _expected(self) -> Expected | None:
        return Expected.of(self.index, self.store, self.config)

    def _bytes_dense(self, call: Call) -> int:
        """Bytes that a dense scan of all rows reads."""
        return len(call.query) * self.store.num_kv_heads * len(self) * self.store.row_bytes


@lru_cache
def _by_size(config: RetrievalConfig) -> RetrievalConfig:
    return replace(config, target_error=None, max_error=None)


def _sharded() -> Any:
    """Databases over several ranks: they derive from AttentionDB, which makes them, so this waits for a ``group``."""
    from . import sharded

    return sharded
