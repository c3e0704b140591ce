"""AttentionDB: the rows of one attention layer as a database that answers attention queries."""

import copy
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from index_kernels import resolve_backend
from index_kernels.fork import check_fork
from index_kernels.inference import inference_only
from index_kernels.integer import is_integer

from .config import RetrievalConfig, check_integer
from .index import make_index
from .index.search import search_rows
from .query.audit import AuditReport, audit_dense, audit_prompt
from .query.audit import audit as compare
from .query.call import Call
from .query.choose import ROWS_PER_PLAN, choose_plan, recurring
from .query.execute import Answer, run_plan
from .query.expected import Expected
from .query.ladder import Ladder, finish_climb
from .query.plan import QueryPlan
from .query.prompt import BlockPlan, PromptLog, block_plans, newest_part, read_prompt, whole
from .query.rates import gpu_of
from .query.stats import RunningStats
from .query.steps import with_brought
from .query.usage import Needs, Workload
from .query.weights import Weights, dense_weights, weights_of
from .store import KVStore, RowSource, StateSource, on_device, rows_at

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .shards import Shards
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


class _Prepared(NamedTuple):
    """A plan that many calls in a row have, if they are the same in all it is chosen by, for ``rows`` rows or more."""

    about: tuple[Any, ...]
    rows: int
    plan: QueryPlan


class AttentionDB:
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
        if group is None:
            return super().__new__(cls)
        from .sharded import ShardedDB

        made = super().__new__(cls if issubclass(cls, ShardedDB) else ShardedDB)
        return made  # type: ignore[return-value]  # a subclass of AttentionDB, though not of cls

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        config: RetrievalConfig | None = None,
        group: "ProcessGroup | Shards | None" = None,
    ) -> None:
        self.config = RetrievalConfig.checked(config)
        value_dim = head_dim if value_dim is None else value_dim
        self.store = KVStore(num_kv_heads, head_dim, value_dim, self.config.storage, host=self.config.rows == "host")
        self.index = make_index(self.config)
        self.stats = RunningStats()
        self._prompt_log = PromptLog()
        # Whether a prompt is being read, so that the index is behind; see ``sync``.
        self.is_reading = False
        # Why rows are not put into the index, and so scanned; "" where they are.
        self.unindexed = ""
        self._prepared: _Prepared | None = None

    def insert(
        self, keys: Tensor, values: Tensor, queries: Tensor | None = None, *, start: Tensor | None = None
    ) -> None:
        """Append rows and index them.

        Args:
            keys, values: ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]``, float32, float16 or bfloat16; any n, 0 included.
            queries: ``[B, Hq, n, D]`` of the same positions, from which an index learns which keys it must tell apart;
                every 32nd is kept.
            start: int64 ``[B]``, first valid row of each batch row (left padding); with the first rows only.

        Raises:
            ValueError: shapes, dtype or device that do not fit the rows stored, or elements that are not finite or
                larger than ``storage.LARGEST``. The store is unchanged then.
        """
        check_fork()  # before anything changes: the index may need kernels
        before = len(self)
        if queries is not None and keys.ndim == 4:
            self.store.check_queries(queries, keys.shape[0], keys.shape[2], keys.device)
        self.append(keys, values)
        try:
            self.set_start(self.start if start is None else start)
        except ValueError:
            self._cut(before)
            raise
        if queries is not None:
            self.note_queries(queries, before)
        try:
            self.sync()
        except Exception:
            # Whatever the index made of the new rows goes with them; it is built again from the rows that stay.
            self.release()
            self.index, self._prepared = make_index(self.config), None
            self._cut(before)
            raise

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows after the newest, for callers that say later which queries came, and ``sync``; see ``KVStore``."""
        self.store.append(keys, values)

    def note_queries(self, queries: Tensor, first: int) -> None:
        """Sample queries ``[B, Hq, n, D]`` of the rows from ``first`` on, likewise."""
        self.store.note_queries(queries, first)

    @property
    def start(self) -> Tensor:
        """The first valid row ``[B]`` of each batch row."""
        return self.store.start

    @property
    def has_padding(self) -> bool:
        """Whether any of them is not 0."""
        return self.store.has_padding

    def can_start_at(self, start: Tensor) -> bool:
        """Whether ``set_start`` would accept ``start [B]``."""
        return self.store.can_start_at(start)

    def set_start(self, start: Tensor) -> None:
        """Declare left padding; see ``KVStore``."""
        self.store.set_start(start)

    def analyze(self, queries: Tensor) -> None:
        """Learn from queries in place of what was learnt before, and index all rows anew by it.

        Keys are clustered ("segmented", "ivf") and linked ("hnsw") so that rows which such queries tell apart are far
        from each other; "flat" learns nothing. ``insert(..., queries)`` and wrapped models learn as rows come: this is
        for rows that came without. What is learnt stays when rows are cut.

        Args:
            queries: ``[B, Hq, m, D]`` of the m newest positions; those of the latest 2,048 rows tell most.

        Raises:
            ValueError: an empty store, or queries that do not fit it.
        """
        call = self._call(queries, None)
        self.store.check_queries(queries, len(call.store.start), queries.shape[2], queries.device)
        first = len(self) - queries.shape[2]
        self.release()
        self.index, self._prepared = make_index(self.config), None
        self.store.learn(queries, first)
        self.sync()

    @inference_only
    def sync(self, *, reading: bool = False) -> None:
        """Bring the index up to the store's rows; for callers that append to ``store`` themselves, as a cache does.

        ``reading``: more of a prompt may come. Where rows were sealed as it was read, they stay as they are until the
        next decode call, save or ``sync``.
        """
        self.store.set_start(self.store.start)
        self.is_reading = reading and self.index.in_pieces
        if self.is_reading or self.unindexed or self.store.is_empty:
            return
        if on_device(self.store.start) and not self._may_retrieve():
            return
        if self.index.is_due(len(self.store)):
            self.store.look_at_rows()  # while they stand where they came
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
        extra: RowSource | StateSource | None = None,
        return_lse: bool = False,
        retrieve: bool = True,
        audit: bool | None = None,
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

        Returns:
            ``[B, Hq, m, Dv]`` in the query's dtype. Inference only: where a gradient is wanted, backward raises.

        Raises:
            ValueError: an empty store, or a query that does not fit it; states what was received.
        """
        call = self._call(query, scale, softcap, extra, sink_logits)
        stats = self.stats
        if retrieve and (plans := self._block_plans(call)):
            return self._read(call, plans, query, return_lse=return_lse)
        expected = self._expected if self.config.max_error is None else None
        if audit is None:
            audit = stats.audit_is_due(self.config, learning=expected is not None and not expected.is_known)
        plan = self._plan(call, retrieve=retrieve, exact=audit)
        stats.rows_stored = len(self)
        if plan.is_dense:
            call.needs_lse = return_lse or len(plan.steps) > 1
            answer = run_plan(plan, call)
            prompt = call.is_prompt
            stats.add_dense(plan.reason, answer.rows_read, 0 if prompt else answer.bytes_read, prompt=prompt)
        else:
            call.measure = audit
            call.needs_lse = audit or return_lse or self.config.max_error is not None or len(plan.steps) > 1
            answer = self._answer(call, plan, learn=True)
            stats.add_answer(
                answer.rows_retrieved, answer.rows_read, answer.bytes_read, call.bytes_dense, answer.counted
            )
            if (expected := self._expected) is not None:
                stats.expected_error = expected.needs.error
            if stats.index.get("rows") != len(self.index):
                stats.index = self.index.describe() | ({"rows kept as": kept} if (kept := self.store.kept) else {})
            if audit:
                self.store.look_at_rows()
                report = compare(call, answer, stats.ladder)
                stats.add_audit(report, self.config.max_error)
                stats.plan = answer.plan
                if expected is not None and self.config.max_error is None:
                    expected.learn(report.relative_error)
        out = self.store.turn(answer.out)
        out = out if out.dtype == query.dtype else out.to(query.dtype)
        return (out, answer.state[1]) if return_lse else out

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
        ids, scores, exact = self._search(query, k, scale)
        return Hits(ids, scores, exact)

    @inference_only
    def _search(self, query: Tensor, k: int, scale: float | None) -> tuple[Tensor, Tensor, bool]:
        call = self._call(query, scale)
        check_integer("k", k, 1)
        if call.is_sealed_ahead:
            # Some queries may not see all sealed rows: search the rows in order, and seal them again.
            self.release()
            found = self._search(query, k, scale)
            self.sync()
            return found
        return search_rows(call, self.index, k)

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
        plan = self._plan(call, estimate=True)
        if plan.is_dense:
            call.measure, call.needs_lse = True, len(plan.steps) > 1
            return run_plan(plan, call).plan
        # Twice: the first call of a process may load and compile kernels.
        call.measure = True
        self._answer(call, plan)
        return self._answer(call, plan).plan

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
        plan = self._plan(call)
        if plan.is_dense:
            return audit_dense(call)
        call.measure = True
        return compare(call, self._answer(call, plan))

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

    @inference_only
    def row_weights(
        self, query: Tensor, *, scale: float | None = None, softcap: float | None = None, retrieve: bool = True
    ) -> Weights:
        """``weights``, and how much of them comes from rows that were read."""
        call = self._call(query, scale, softcap)
        plan = self._plan(call, retrieve=retrieve)
        if plan.is_dense:
            return dense_weights(call)
        call.measure = True
        return weights_of(call, self._answer(call, plan))

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows, as if the others had never come.

        Raises:
            ValueError: a length below 0 or above ``len(db)``.
        """
        indexed = len(self.index)
        if len(self.store) and is_integer(length, 0, len(self.store)):
            self.index.truncate(self.store, length, self._first_index_row())
        self.store.truncate(length)
        self._prompt_log = PromptLog()
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

        if self.is_reading:
            self.sync()
        return save(target, [(self.store, self.index)], self.config)

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
            from .sharded import open_shard

            return open_shard(path, config, torch.device(device), group)
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

    def select(self, batch: Tensor) -> None:
        """Keep the batch rows ``batch [B']`` int64; an index may repeat (beam search)."""
        self._prepared = None
        self.store.select(batch)
        self.index.select(batch)

    def fork(self) -> "AttentionDB":
        """A database with the same rows; neither ever sees what comes to the other later, or what is cut there.

        Time and memory do not depend on the number of rows, but for the first fork, which moves them (and lists of
        "segmented", and sampled queries) into pages that all forks share: one copy. A page is copied by the system when
        one of them writes to it, so a fork costs what is done to it: its new rows, and rows that it seals anew. What
        was added or sealed since those pages were made is copied at each fork, up to a 32nd of the rows; then all is
        moved again. Indexes of FAISS are shared as by ``copy.deepcopy``. On a GPU, and where there are no such pages
        (Windows), a fork is a copy.

        What calls did is counted (``stats``), and what audits taught is learnt, in one place for all.
        """
        twin = copy.copy(self)
        twin.store = self.store.fork()
        twin.index = self.index.fork(twin.store.capacity)
        twin._prompt_log = copy.deepcopy(self._prompt_log)
        return twin

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
        """Bytes held: the rows' buffers (spare capacity included), the index, and sampled queries.

        What forks share is counted in each of them.
        """
        sample = self.store.sample
        return self.store.nbytes + self.index.nbytes + (0 if sample is None else sample.nbytes)

    @property
    def own_nbytes(self) -> int:
        """The part of ``nbytes`` that no fork shares: what would be free if this database went."""
        return self.store.own_nbytes + self.index.own_nbytes

    def _call(
        self,
        query: Tensor,
        scale: float | None,
        softcap: float | None = None,
        extra: RowSource | StateSource | None = None,
        sink_logits: Tensor | None = None,
    ) -> Call:
        call = Call.checked(
            query, self.store, self.index, self.config, scale=scale, softcap=softcap, extra=extra,
            sink_logits=sink_logits,
        )  # fmt: skip
        if self.is_reading and not call.is_prompt:
            self.sync()  # the prompt has been read
        return call

    def _plan(
        self,
        call: Call,
        *,
        retrieve: bool = True,
        estimate: bool = False,
        exact: bool = True,
        config: RetrievalConfig | None = None,
    ) -> QueryPlan:
        """How a call will be answered under ``config`` (default: our own); ``exact`` in words and estimates, too."""
        index, config, backend = type(self.index), config or self.config, resolve_backend(call.query)
        processor, rows, exact = self._processor(backend), len(self), exact or estimate
        about: tuple[Any, ...] | None = None
        if not exact:
            store, given = self.store, None if self.store.sample is None else self.store.sample.given_rows
            about = (
                config, call.query.shape, store.starts, len(self.index), rows + -rows % ROWS_PER_PLAN, backend,
                processor, retrieve, self.unindexed, given, self._needs, call.scale, call.softcap,
            )  # fmt: skip
            kept = self._prepared
            if kept is not None and kept.about == about and kept.rows <= rows:
                return with_brought(kept.plan, call)

        def chosen() -> tuple[QueryPlan, bool]:
            work = call.workload._replace(needs=self._needs)
            near = work if exact else recurring(index.hot, config, work)
            plan = choose_plan(
                index, config, near, backend=backend, processor=processor, retrieve=retrieve, estimate=estimate
            )
            return plan, near is not work

        plan, recurs = chosen()
        if not plan.is_dense and self.index.calibrate(call):
            plan, _ = chosen()
            recurs = False  # it is another call's by now
        if self.unindexed and retrieve:
            plan = replace(plan, reason=self.unindexed)
        if recurs and about is not None:
            self._prepared = _Prepared(about, rows, plan)
        return with_brought(plan, call)

    def _block_plans(self, call: Call) -> list[BlockPlan]:
        """How a prompt is read block by block; empty where all of it is read densely."""
        if self.unindexed or not call.is_prompt:
            return []
        backend = resolve_backend(call.query)
        return block_plans(call, backend=backend, threads=torch.get_num_threads() if backend == "numba" else None)

    def _read(
        self, call: Call, plans: list[BlockPlan], query: Tensor, *, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``attend`` for a prompt, parts of which are read through lists."""
        stats, log = self.stats, self._prompt_log
        stats.rows_stored = len(self)
        self.store.note_queries(query, len(self) - query.shape[2])
        answers = read_prompt(call, plans, self._first_index_row(), log, audit=self.config.audit_rate > 0)
        for answer in answers:
            stats.add_prompt(answer.plan, answer.state[1].shape[2], answer.rows_read)
        stats.prompt.errors += log.take_errors()
        out, lse = whole(answers)
        out = self.store.turn(out).to(query.dtype)
        return (out, lse) if return_lse else out

    def _read_blocks(self, call: Call, plans: list[BlockPlan], query: Tensor) -> list[Answer]:
        """The same for ``explain`` and ``audit``: nothing is learnt, and the index is as it was."""
        learnt = copy.deepcopy(self.store.sample)
        self.store.note_queries(query, len(self) - query.shape[2])
        answers = read_prompt(call, plans, self._first_index_row(), PromptLog(), audit=False)
        self.store.take_sample(learnt)
        self.index.unseal_after(self.store, self._first_index_row(), plans[0].first)
        if not self.is_reading:
            self.sync()
        return answers

    def _answer(self, call: Call, plan: QueryPlan, *, learn: bool = False) -> Answer:
        """Run a plan that is not dense; with ``max_error``, climb the ladder, which ``learn`` lets remember it."""
        config, stats = self.config, self.stats
        if config.max_error is None:
            return run_plan(plan, call)
        ladder = stats.ladder or Ladder(config)
        climb = ladder.climb(
            lambda at_rung: run_plan(self._plan(call, config=at_rung, exact=call.measure), call),
            config=config,
            kv_heads=self.store.num_kv_heads,
            needs=self.index.needs,
            base=self.index.rows_asked(config, call.workload),
            eligible=plan.hot - config.n_sink,
            learn=learn,
        )
        if learn:
            stats.ladder = ladder
            stats.rungs[climb.name] += 1
        return finish_climb(climb, call)

    @property
    def _needs(self) -> Needs | None:
        """The budget that is needed, as far as anything tells."""
        expected = self._expected
        return None if expected is None else expected.needs

    @property
    def _expected(self) -> Expected | None:
        return Expected.of(self.index.needs, self.store) if self.config.finds_budget else None

    def _may_retrieve(self) -> bool:
        """Whether rows on a device are to be in the index: where a decode call might retrieve."""
        config, index, store, rows = self.config, type(self.index), self.store, len(self.store)
        if len(self.index) or config.dense_below_rows is not None or config.wishes_retrieval:
            return True
        rows -= rows % ROWS_PER_PLAN  # asked at every step: the same as the last time
        work = Workload(
            rows, 1, index.rows_indexed(config, rows), config.n_sink, len(store.starts), store.num_kv_heads,
            store.num_kv_heads, store.head_dim, store.value_dim, store.row_bytes, whole_lists=True,
        )  # fmt: skip
        backend = resolve_backend(store.start)
        plan = choose_plan(
            index, config, work, backend=backend, processor=self._processor(backend), retrieve=True, estimate=False
        )
        return not plan.is_dense

    def _processor(self, backend: str) -> int | str | None:
        """Which rates are those of a call: of so many threads, of the GPU of that name, or none."""
        return torch.get_num_threads() if backend == "numba" else gpu_of(self.store) if backend == "triton" else None

    def _cut(self, length: int) -> None:
        """Take rows out again that came to no index."""
        self.store.truncate(length)

    def _by_position(self, rows: Tensor) -> Tensor:
        if not self.index.moves_rows:
            return rows.clone()
        slots = torch.arange(rows.shape[2], device=rows.device).expand(*rows.shape[:2], 1, -1)
        return rows_at(rows, self.index.positions(slots)[:, :, 0].argsort(dim=-1))

    def _first_index_row(self) -> Tensor:
        return self.store.start + self.config.n_sink
