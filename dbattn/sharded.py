"""ShardedDB: one rank's part of a database whose rows are dealt over a process group."""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from index_kernels import attend_rows, top_k
from index_kernels.inference import inference_only
from index_kernels.integer import is_integer

from .attention import AttentionDB, Hits
from .config import RetrievalConfig, check_integer
from .dense import masked_attention
from .index import make_index
from .index.search import search_rows
from .metrics import attention_mass, recall_at_k, relative_error
from .query.audit import AuditReport
from .query.call import Call
from .query.execute import Answer, merged, run_plan
from .query.ladder import Climb, Ladder, config_at
from .query.plan import QueryPlan, Source, Step, StepAnswer
from .query.steps import DenseHeads, DenseScan, steps_of_call
from .query.usage import Usage, Workload, scan_usage
from .query.weights import Weights
from .shards import ShardError, Shards
from .snapshot import SaveReport, ShardWriter, SnapshotWriter, open_parts
from .store import RowSource, StateSource, check_range, on_device, stored

# Of how much a shard's part of the budget is worth, the newest call tells this share.
NEWEST = 0.2
# No shard's part is below this share of an equal one: what nobody looks at is never found.
LEAST_PART = 0.2
# Where this share of what is left unread moves between ranks from call to call (and until it is known not to), each is
# asked before, by the summaries of its lists and so many of its rows.
MOVES, GLANCED = 0.05, 16
# Budgets are of so many sizes, so that plans are the same from call to call.
SIZES = 64


class Told(NamedTuple):
    """What ranks tell each other of an answer, beside its state, as numbers.

    Attributes:
        about: what was asked; see ``Shards.about``. rows: of the context.
        retrieves: 1 where the rank did not read all its rows.
        retrieved, read, bytes, seconds: rows and bytes as in ``Answer``; seconds only where the call is measured.
        expected_rows, expected_bytes, expected_seconds: what its plan had expected of them.
        more: rows that audits of its sampled queries ask for, over those of a budget by size.
    """

    about: float
    rows: float
    retrieves: float
    retrieved: float
    read: float
    bytes: float
    seconds: float
    expected_rows: float
    expected_bytes: float
    expected_seconds: float
    more: float


class Budget:
    """How the rows to be read are shared among ranks, by what each was found to leave unread.

    A shard that reads k rows leaves the weight c / k unread, about, so that errors are least in all where k grows with
    the root of c. It is the same on all ranks: a function of what all of them told. Forks share it.
    """

    def __init__(self, ranks: int) -> None:
        # Of each rank: c, None until it retrieved.
        self._unread: list[float | None] = [None] * ranks
        # How far a call's c are from these, as shares of their sum; and rows asked for over those of a budget by size.
        self.moves = 1.0
        self.more = 1.0

    def parts(self, total: int, indexed: Sequence[int], unread: Sequence[float] | None = None) -> list[int]:
        """Rows that each rank reads of ``total``, where so many are in its index; at least 1.

        ``unread``: what the ranks leave unread of this call, each with as many rows, where it is known.
        """
        known = [each for each in self._unread if each is not None]
        usual = sum(known) / len(known) if known else 1.0
        needs = unread or [usual if each is None else each for each in self._unread]
        roots = [need**0.5 * (rows > 0) for need, rows in zip(needs, indexed, strict=True)]
        mean = sum(roots) / max(1, sum(rows > 0 for rows in indexed)) or 1.0
        wanted = [max(root, LEAST_PART * mean) * (rows > 0) for root, rows in zip(roots, indexed, strict=True)]
        size = max(1, total // SIZES)
        return [max(1, round(total * each / (sum(wanted) or 1.0) / size) * size) for each in wanted]

    def note(self, parts: Sequence[int], unread: Sequence[float], told: Sequence[Told]) -> None:
        """Take in what shares of the whole weight the ranks left unread of their rows."""
        found = [max(share, 1e-9) * part for part, share in zip(parts, unread, strict=True)]
        before = [now if was is None else was for was, now in zip(self._unread, found, strict=True)]
        moved = max(abs(now / sum(found) - was / sum(before)) for was, now in zip(before, found, strict=True))
        self.moves += NEWEST * (moved - self.moves)
        for rank, (was, now, one) in enumerate(zip(before, found, told, strict=True)):
            if one.retrieves:
                self._unread[rank] = was ** (1 - NEWEST) * now**NEWEST
        asked = [one.more for one in told if one.retrieves]
        if asked:
            self.more = sum(asked) / len(asked)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Budget":
        return self


@dataclass(frozen=True)
class OwnRows(Step):
    """All of a rank's rows that each query sees: the first ``stops[i]``."""

    stops: tuple[int, ...] = ()

    @classmethod
    def of(cls, work: Workload, stops: tuple[int, ...]) -> "OwnRows":
        """The step for queries that see so many rows each."""
        return cls((Source("dense scan", f"all {work.rows} rows", scan_usage(work, work.rows, None)),), stops)

    def run(self, call: Call) -> StepAnswer:
        """See Step."""
        (keys, values), store, query, began = call.store.rows, call.store, call.query, time.perf_counter()
        stop = torch.tensor(self.stops, device=query.device)
        if call.index.moves_rows and len(call.index) > self.stops[0]:
            # Rows that some queries do not see stand among older ones: causal order is by position, not place.
            places = torch.arange(len(store), device=query.device).expand(*query.shape[:2], 1, -1)
            at = call.index.positions(places)
            mask = (at < stop[:, None]) & (at >= store.start[:, None, None, None])
            out, lse = masked_attention(query, keys, values, mask, scale=call.scale, softcap=call.softcap)
        else:
            first = store.start[:, None].minimum(stop)
            ranges = torch.stack([first, stop.expand_as(first)], dim=-1)[:, None, :, None]
            ranges = ranges.expand(-1, query.shape[1], -1, -1, -1)
            out, lse = attend_rows(query, keys, values, ranges=ranges, scale=call.scale, softcap=call.softcap)
        rows = sum(self.stops) / len(self.stops)
        size = query.shape[0] * store.num_kv_heads * self.stops[-1] * store.row_bytes
        usage = Usage(rows, size, 0.0, time.perf_counter() - began)
        return StepAnswer(out, lse, (usage,), rows_read=rows, bytes_read=size)


@dataclass(frozen=True)
class ShardSources(Step):
    """What the ranks read, each a source; for reading alone."""

    def run(self, call: Call) -> StepAnswer:
        """Not one rank's to run."""
        raise TypeError("these sources are read by several ranks: the plan is for reading, not for running")


class Whole(NamedTuple):
    """An answer over all ranks' rows, the same on each of them, and this rank's own."""

    answer: Answer
    own: Answer
    retrieves: bool
    parts: list[int]


class ShardedDB(AttentionDB):
    """An AttentionDB whose rows are dealt over the ranks of a process group; ``AttentionDB(..., group=...)`` makes it.

    Every rank inserts the same rows and keeps its own (``Shards``), in a store and index like any other, and asks the
    same queries, of which it answers its part as a state ``(out, lse)``. One all-gather brings the states together;
    each rank merges them in the order of ranks, so that answers are equal to the bit on machines of one kind. The
    budget (k, or what ``target_error`` and ``max_error`` ask for) is of all ranks together, and shared by ``Budget``.

    All ranks must make the same calls in the same order, from one thread: what each rank tells of a call is compared,
    and another call, or another number of rows, raises ShardError. So does a rank that does not answer.

    ``len`` and ``start`` are of all rows; ``store``, ``index`` and ``nbytes`` are this rank's; ``stats`` count all
    ranks' reading. ``keys``, ``values``, ``weights`` would need all rows in one place: they raise.

    Raises:
        ValueError: options that do not go with shards, or a group this process is not in.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        config: RetrievalConfig | None = None,
        group: ProcessGroup | Shards | None = None,
    ) -> None:
        config = check_config(RetrievalConfig.checked(config))
        super().__init__(num_kv_heads, head_dim, value_dim=value_dim, config=config)
        assert group is not None
        self.shards = Shards.of(group)
        self.budget = Budget(self.shards.ranks)
        # Of all ranks: rows, their padding, and how many it is settled for; see KVStore.
        self._rows = self._settled = 0
        self._start = self.store.start

    def __len__(self) -> int:
        """Rows of all ranks together, per batch row, padding included."""
        return self._rows

    def append(self, keys: Tensor, values: Tensor) -> None:
        """See AttentionDB; rows of other ranks are looked at, so that all ranks refuse the same."""
        ours = [self.shards.ours(rows, self._rows) if rows.ndim == 4 else rows for rows in (keys, values)]
        if keys.shape[:-1] != values.shape[:-1]:
            ours = [keys, values]  # say what is wrong
        for name, rows in (("keys", keys), ("values", values)):
            if rows.is_floating_point() and not (on_device(rows) and rows.shape[-2] == 1):
                check_range(name, rows)
                if self.config.storage == "float16":
                    stored(name, rows, "float16")
        empty = not self._rows
        self.store.append(*ours)
        self._rows += keys.shape[2]
        if empty:
            self._start = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)

    def note_queries(self, queries: Tensor, first: int) -> None:
        """See AttentionDB; each rank samples those of its own rows."""
        self.store.note_queries(self.shards.ours(queries, first), self.shards.before(first))

    @property
    def start(self) -> Tensor:
        """The first valid row ``[B]`` of each batch row, among all rows."""
        return self._start

    @property
    def has_padding(self) -> bool:
        """See AttentionDB."""
        return bool(self._start.any())

    def can_start_at(self, start: Tensor) -> bool:
        """See AttentionDB; the same on all ranks, whichever of them has the rows in between."""
        if start is self._start or torch.equal(start, self._start):
            return True
        unsettled = (self._start >= self._settled) & (start >= self._settled)
        return bool(((start == self._start) | unsettled).all())

    def set_start(self, start: Tensor) -> None:
        """See AttentionDB."""
        if start is self._start:
            self.store.set_start(self.store.start)  # settles the rows that came since
        elif start.shape != self._start.shape or start.dtype != torch.int64 or bool((start < 0).any()):
            self.store.set_start(start)  # says what is wrong
        elif not self.can_start_at(start):
            raise ValueError(f"start {start.tolist()} differs from {self._start.tolist()} for rows that are stored")
        else:
            self.store.set_start(self.shards.before_each(start))
            self._start = start.clone()
        self._settled = self._rows

    def analyze(self, queries: Tensor) -> None:
        """See AttentionDB; each rank learns from all of the queries, which all asked its rows."""
        call = self._asked(queries, None)
        self.store.check_queries(queries, len(call.store.start), queries.shape[2], queries.device)
        m = min(queries.shape[2], len(self.store))
        self.release()
        self.index, self._prepared = make_index(self.config), None
        if m:
            self.store.learn(queries[:, :, -m:], len(self.store) - m)
        self.sync()

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
        """See AttentionDB.

        Raises:
            ShardError: another rank does not answer, or was asked something else.
        """
        call, stats = self._asked(query, scale, softcap, extra, sink_logits), self.stats
        prompt, reason = call.is_prompt, "dense was asked for"
        if prompt and retrieve:
            reason = f"more queries in one call than max_queries={self.config.max_queries}"
        retrieve = retrieve and not prompt
        call.measure = retrieve and (stats.audit_is_due(self.config) if audit is None else audit)
        whole = self._answered(call, retrieve=retrieve, learn=True)
        answer, stats.rows_stored = whole.answer, self._rows
        if not whole.retrieves:
            reason = "no rank retrieves: its own rows are few, or a dense scan is faster" if retrieve else reason
            stats.add_dense(reason, answer.rows_read, 0 if prompt else answer.bytes_read, prompt=prompt)
        else:
            stats.add_answer(answer.rows_retrieved, answer.rows_read, answer.bytes_read, self._bytes_dense(call))
            stats.index = self.index.describe() | {"rows of this shard": len(self.store)}
            if call.measure:
                report = self._compared(call, whole)
                stats.add_audit(report, self.config.max_error)
                stats.plan = answer.plan
        out = self.store.turn(answer.out).to(query.dtype)
        return (out, answer.state[1]) if return_lse else out

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
        """See AttentionDB: a source for each shard, with the time it took there; the same on all ranks."""
        call = self._asked(query, scale, softcap, extra, sink_logits)
        retrieve = not call.is_prompt
        call.measure = True
        self._answered(call, retrieve=retrieve)  # twice: the first call of a process may load and compile kernels
        return self._answered(call, retrieve=retrieve).answer.plan

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
        """See AttentionDB: the dense answer is over all ranks' rows, too."""
        call = self._asked(query, scale, softcap, extra, sink_logits)
        call.measure = True
        return self._compared(call, self._answered(call, retrieve=not call.is_prompt), learn=False)

    @inference_only
    def search(self, query: Tensor, k: int, *, scale: float | None = None) -> Hits:
        """See AttentionDB, for one position; ids are row positions in the whole."""
        call = self._asked(query, scale)
        check_integer("k", k, 1)
        if query.shape[2] != 1:
            raise ValueError(f"query has {query.shape[2]} positions, expected 1 where rows are dealt over ranks")
        ids = torch.full((*query.shape[:3], k), -1, device=query.device)
        scores, exact = ids.float().fill_(float("-inf")), True
        if len(self.store):
            ids, scores, exact = search_rows(call, self.index, k)
        told = torch.cat([self.shards.position_of(ids).double().flatten(), scores.double().flatten()])
        found = self.shards.gather(torch.cat([told, told.new_tensor([exact])]))
        both = found[:, :-1].view(self.shards.ranks, 2, *ids.shape).movedim(0, -2).flatten(-2)
        ids, scores = both[0].long(), both[1].float()
        by_id = ids.argsort(dim=-1)
        ids, scores = ids.gather(-1, by_id), scores.gather(-1, by_id)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
        return Hits(ids.gather(-1, best), scores.gather(-1, best), bool(found[:, -1].all()))

    def row_weights(
        self, query: Tensor, *, scale: float | None = None, softcap: float | None = None, retrieve: bool = True
    ) -> Weights:
        """Not where rows are dealt over ranks; nor are ``weights``."""
        raise ValueError(f"weights of single rows are not told where rows are dealt over {self.shards.ranks} ranks")

    @property
    def keys(self) -> Tensor:
        """Not where rows are dealt over ranks."""
        raise ValueError(f"rows are dealt over {self.shards.ranks} ranks: none has all of them")

    @property
    def values(self) -> Tensor:
        """Not where rows are dealt over ranks."""
        return self.keys

    def truncate(self, length: int) -> None:
        """See AttentionDB."""
        if not is_integer(length, 0, self._rows):
            raise ValueError(f"length is {length!r}, expected an integer from 0 to {self._rows}")
        kept = self._kept
        super().truncate(self.shards.before(length))
        self._be(length, kept)

    def save(self, target: "str | os.PathLike[str] | SnapshotWriter | ShardWriter") -> SaveReport:
        """See AttentionDB; each rank writes its own part, and the save counts when all have. A path, or a ShardWriter.

        Raises:
            SnapshotError (a ValueError): another writer holds the folder, or it holds something else.
            OSError: the folder cannot be written. Either is raised by all ranks.
            ShardError: another rank does not answer; what was saved before is whole.
        """
        if isinstance(target, SnapshotWriter):
            raise ValueError("a SnapshotWriter writes what one process has: pass a path, or a ShardWriter")
        with nullcontext(target) if isinstance(target, ShardWriter) else ShardWriter(target, self.shards) as writer:
            return writer.save([(self.store, self.index)], self.config, rows=self._rows, start=self._start)

    def begin_with(self, rows: int, start: Tensor) -> None:
        """Be ``rows`` long, where the store was given this rank's part of them."""
        self._rows, self._settled, self._start = rows, rows, start.to(self.store.device)

    def select(self, batch: Tensor) -> None:
        """See AttentionDB."""
        super().select(batch)
        self._start = self._start[batch.to(self._start.device)]

    def _cut(self, length: int) -> None:
        kept = self._kept
        self.store.truncate(self.shards.before(length))
        self._be(length, kept)

    @property
    def _kept(self) -> tuple[torch.dtype, torch.device] | None:
        """The type of rows that there are, and where."""
        return (self.store.kept_dtype, self.store.device) if self._rows else None

    def _be(self, length: int, kept: tuple[torch.dtype, torch.device] | None) -> None:
        """Be ``length`` rows long. A shard that has lost all of its own stays one of rows as those it ``kept``."""
        self._rows, self._settled, store = length, min(self._settled, length), self.store
        if not length:
            self._start = store.start
        elif store.is_empty and kept is not None:
            dtype = kept[0] if kept[0].is_floating_point else torch.float32
            shape = len(self._start), store.num_kv_heads, 0
            store.append(
                *(torch.empty(*shape, dim, dtype=dtype, device=kept[1]) for dim in (store.head_dim, store.value_dim))
            )
            store.set_start(self.shards.before_each(self._start))

    def _asked(
        self,
        query: Tensor,
        scale: float | None,
        softcap: float | None = None,
        extra: RowSource | StateSource | None = None,
        sink_logits: Tensor | None = None,
    ) -> Call:
        call = Call.checked(
            query, self.store, self.index, self.config, scale=scale, softcap=softcap, extra=extra,
            sink_logits=sink_logits, rows=self._rows,
        )  # fmt: skip
        call.tells_unread = True
        return call

    def _bytes_dense(self, call: Call) -> int:
        return call.query.shape[0] * self.store.num_kv_heads * self._rows * self.store.row_bytes

    def _stops(self, m: int) -> tuple[int, ...]:
        """Of how many of our rows each of the m newest positions is no older."""
        if m == 1:
            return (len(self.store),)
        return tuple(self.shards.before_each(torch.arange(self._rows - m + 1, self._rows + 1)).tolist())

    def _answered(self, call: Call, *, retrieve: bool, learn: bool = False) -> Whole:
        """The answer of all ranks; with ``max_error``, as far up the ladder as their merged answer asks for."""
        config, stats = self.config, self.stats
        if not retrieve:
            return self._together(call, self._scan(call), None)
        held = self.shards.held_by_each(self._rows)
        indexed = [type(self.index).rows_indexed(config, rows) for rows in held]
        # What one store would read of as many rows.
        work = call.workload._replace(rows=self._rows, indexed=max(1, sum(indexed)), needs=None)
        total = round(type(self.index).rows_asked(config, work) * self.budget.more)

        unread, looked_at = self._glance(call)

        def at(config: RetrievalConfig | None = None) -> Whole:
            parts = self.budget.parts(total if config is None else config.rows_retrieved, indexed, unread)
            own = self._own(call, parts[self.shards.rank], config or self.config)
            own = own._replace(bytes_read=own.bytes_read + looked_at)
            return self._together(call, own, parts, learn=learn)

        if config.max_error is None:
            return at()
        ladder = stats.ladder or Ladder(config)
        tries: list[Whole] = []

        def tried(at_rung: RetrievalConfig) -> Answer:
            tries.append(at(at_rung))
            return tries[-1].answer

        climb = ladder.climb(
            tried,
            config=config,
            kv_heads=self.store.num_kv_heads,
            needs=None,  # ranks are told different ones
            base=total,
            eligible=max(1, sum(indexed)),
            learn=learn,
        )
        if learn:
            stats.ladder = ladder
            stats.rungs[climb.name] += 1
        return self._finished(call, climb, tries)

    def _glance(self, call: Call) -> tuple[list[float] | None, int]:
        """What share of the weight each rank leaves unread after a look at few rows, and bytes read for it.

        None where the ranks' shares are about the same from call to call, or where no summaries tell.
        """
        if self.budget.moves < MOVES or not self.index.moves_rows or call.query.shape[2] > 1:
            return None, 0
        own = self._own(replace(call, measure=False), GLANCED, self.config)
        lse = own.state[1]
        told = torch.stack([lse, torch.zeros_like(lse) if own.deviation is None else own.deviation])
        lses, shares = self.shards.gather(told.flatten()).view(self.shards.ranks, *told.shape).unbind(1)
        unread = shares * torch.softmax(lses, dim=0).nan_to_num()
        return [max(each, 1e-9) for each in _mean(unread)], own.bytes_read

    def _finished(self, call: Call, climb: Climb, tries: Sequence[Whole]) -> Whole:
        """The last try, with KV heads answered densely where it was not enough."""
        answer, given_up = climb.answer, [tried.answer for tried in tries[:-1]]
        if climb.dense_heads:
            step, bare = DenseHeads.of(climb.dense_heads, call), self._bare(call)
            alone = call.query.shape[2] == 1 and len(self.store) > 0
            own = run_plan(QueryPlan((step,), "max_error"), bare) if alone else self._scan(call)
            dense = self._together(call, own, None).answer
            given_up.append(dense)
            asking = step.asking(call)[None, :, None]
            (out, lse), (dense_out, dense_lse) = answer.state, dense.state
            exact_lse = None if answer.exact_lse is None else torch.where(asking, dense_lse, answer.exact_lse)
            out, lse = torch.where(asking[..., None], dense_out, out), torch.where(asking, dense_lse, lse)
            answer = answer._replace(out=out, lse=lse, exact_lse=exact_lse, dense_heads=climb.dense_heads)
        answer = answer._replace(
            rows_read=answer.rows_read + sum(tried.rows_read for tried in given_up),
            bytes_read=answer.bytes_read + sum(tried.bytes_read for tried in given_up),
            plan=replace(answer.plan, reason=f"{answer.plan.reason}; max_error: {climb.name}"),
            tried=climb.answer,
        )
        return tries[-1]._replace(answer=answer)

    def _bare(self, call: Call) -> Call:
        """The call without what it brings along, which no rank's rows are."""
        return call if call.extra is None and call.sink_logits is None else replace(call, extra=None, sink_logits=None)

    def _own(self, call: Call, read: int, config: RetrievalConfig) -> Answer:
        """This rank's answer from its own rows, of which it reads about ``read`` per KV head."""
        stops, call = self._stops(call.query.shape[2]), self._bare(call)
        m = len(stops)
        if not stops[0] or (m > 1 and stops[0] < len(self.index)):
            return self._scan(call)
        newest = call if m == 1 else replace(call, query=call.query[:, :, -1:])
        plan = self._plan(newest, exact=call.measure)
        if not plan.is_dense:
            plan = self._plan(newest, config=config_at(config, read, config.tail_name), exact=call.measure)
        if m == 1:
            return run_plan(plan, call)
        if plan.is_dense:
            return self._scan(call, plan.reason)
        parts = [
            run_plan(plan, replace(call, query=call.query[:, :, i : i + 1], store=call.store.at_length(stop)))
            for i, stop in enumerate(stops)
        ]
        return _in_order(parts)

    def _scan(self, call: Call, reason: str = "dense was asked for") -> Answer:
        """This rank's exact answer."""
        stops, call = self._stops(call.query.shape[2]), self._bare(call)
        alone = len(stops) == 1 and stops[0] > 0
        step = DenseScan.of(call.workload, None) if alone else OwnRows.of(call.workload, stops)
        return run_plan(QueryPlan((step,), reason, len(self.store)), call)

    def _together(self, call: Call, own: Answer, parts: list[int] | None, *, learn: bool = False) -> Whole:
        """Every rank's answer merged, in the order of ranks; with what the call brings along."""
        shards, plan = self.shards, own.plan
        (out, lse), measure = own.state, call.measure
        retrieves = not plan.is_dense
        expected = [source.estimated for source in plan.sources]
        needs = self.index.needs if self.config.finds_budget else None
        told = Told(
            shards.about, self._rows, retrieves, own.rows_retrieved, own.rows_read, own.bytes_read, plan.seconds or 0.0,
            sum(each.rows for each in expected), sum(each.bytes for each in expected),
            sum(each.seconds or 0.0 for each in expected),
            1.0 if needs is None else needs.read / _by_size(type(self.index), self.config, call.workload, needs.rows),
        )  # fmt: skip
        unread = torch.zeros_like(lse) if own.deviation is None else own.deviation
        exact = () if not measure or own.exact_lse is None else (own.exact_lse,)
        states = [out.float(), lse, unread, *exact]
        numbers = torch.tensor(told, dtype=torch.float64).view(torch.float32).to(out.device)
        found = shards.gather(torch.cat([each.reshape(-1) for each in (*states, numbers)]))
        sizes = [each.numel() for each in (*states, numbers)]
        *by_rank, told_by_each = found.split(sizes, dim=1)
        outs, lses, shares, *exacts = (
            each.reshape(shards.ranks, *state.shape) for each, state in zip(by_rank, states, strict=True)
        )
        each = [Told(*row) for row in told_by_each.contiguous().cpu().view(torch.float64).tolist()]
        self._check_same(each)
        # As merge_states, with weights that sum to 1 however large the logits are.
        weights, lse = torch.softmax(lses, dim=0).nan_to_num(), torch.logsumexp(lses, dim=0)
        out = (weights[..., None] * outs).sum(dim=0)
        exact_lse = torch.logsumexp(exacts[0], dim=0) if exacts else None
        shares = shares * weights  # of all
        if learn and parts is not None:
            # An index that does not tell what it left unread: what weighs most may have most of it.
            left = _mean(shares)
            self.budget.note(parts, left if any(left) else _mean(weights), each)
        brought = [step.run(call) for step in steps_of_call(call)]
        if brought:
            out, lse_with = merged([(out, lse), *((one.out, one.lse) for one in brought)])
            shares = shares * torch.exp(lse - lse_with).nan_to_num()
            if exact_lse is not None:
                exact_lse = _with_brought(exact_lse, brought)
            lse = lse_with
        if measure:
            reasons = shards.gather_objects(plan.reason)
            masses = torch.exp(lses - lse).nanmean(dim=tuple(range(1, lses.ndim))).tolist()
            plan = self._measured(plan, each, reasons, masses, parts)
        answer = Answer(
            out,
            lse,
            exact_lse,
            sum(one.retrieved for one in each),
            sum(one.read for one in each),
            int(sum(one.bytes for one in each)),
            plan,
            deviation=shares.sum(dim=0),
            tail=self.config.tail_name,
        )
        return Whole(answer, own, any(one.retrieves for one in each), parts or [])

    def _check_same(self, told: Sequence[Told]) -> None:
        own = told[self.shards.rank]
        for rank, one in enumerate(told):
            if (one.about, one.rows) != (own.about, own.rows):
                raise ShardError(
                    f"rank {rank} was asked about {one.rows:.0f} rows, rank {self.shards.rank} about {own.rows:.0f}: "
                    "all ranks must make the same calls, with the same tokens"
                    if one.rows != own.rows
                    else f"rank {rank} was given other tokens than rank {self.shards.rank}: all must be given the same"
                )

    def _measured(
        self,
        own: QueryPlan,
        told: Sequence[Told],
        reasons: Sequence[str],
        masses: Sequence[float],
        parts: Sequence[int] | None,
    ) -> QueryPlan:
        """The plan of all ranks."""
        held = self.shards.held_by_each(self._rows)
        sources = tuple(
            Source(
                f"shard {rank}",
                f"{held[rank]} rows; {reason}",
                Usage(one.expected_rows, int(one.expected_bytes), 0.0, one.expected_seconds or None),
                Usage(one.read, int(one.bytes), 0.0, one.seconds),
                mass,
            )
            for rank, (one, reason, mass) in enumerate(zip(told, reasons, masses, strict=True))
        )
        shared = "" if parts is None else f", budget shared by need as {' + '.join(map(str, parts))}"
        reason = f"{self._rows} rows dealt over {self.shards.ranks} ranks{shared}"
        seconds = max(one.seconds for one in told)
        return replace(
            own, steps=(ShardSources(sources),), reason=reason, seconds=seconds, seconds_estimated=None,
            seconds_dense=None, kept=self.store.kept,
        )  # fmt: skip

    def _compared(self, call: Call, whole: Whole, *, learn: bool = True) -> AuditReport:
        """How far an answer is from the dense one of all ranks; a ladder learns from it."""
        plainly, answer, began = replace(call, measure=False), whole.answer, time.perf_counter()
        dense = self._together(plainly, self._scan(plainly), None).answer
        seconds = time.perf_counter() - began if call.is_synchronous else None
        if learn and answer.tried is not None and self.stats.ladder is not None:
            self.stats.ladder.learn(answer.tried, relative_error(answer.tried.out, dense.out))
        k, hot = self.config.rows_retrieved, min(len(self.index), *self._stops(call.query.shape[2]))
        scores = torch.full((*call.query.shape[:3], k), float("-inf"), device=call.query.device)
        best, got = scores, scores
        if hot:
            keys = self.store.rows[0][:, :, :hot]
            best = top_k(call.query, keys, k, scale=call.scale, start=call.first_index_row)[1]
            got = best
            if whole.own.slots is not None:
                got = self.store.scores(call.query, whole.own.slots, call.scale)
                got = pad(
                    got.topk(min(k, got.shape[-1]), dim=-1).values, (0, k - min(k, got.shape[-1])), value=-torch.inf
                )
        found = self.shards.gather(torch.stack([best, got]).flatten())
        both = found.view(self.shards.ranks, 2, *best.shape).movedim(0, -2).flatten(-2)
        assert answer.exact_lse is not None
        seen = dense.state[1] > float("-inf")
        parts = (
            recall_at_k(both[1], both[0].topk(k, dim=-1).values),
            attention_mass(answer.exact_lse, dense.state[1]),
            relative_error(answer.out, dense.out),
        )
        recall, mass, error = (torch.where(seen, part, torch.nan) for part in parts)
        counts = answer.rows_retrieved, answer.rows_read, self._rows, answer.bytes_read, self._bytes_dense(call)
        return AuditReport(recall, mass, error, *counts, answer.plan.seconds if call.is_synchronous else None, seconds)


def open_shard(
    path: str | os.PathLike[str], config: RetrievalConfig | None, device: torch.device, group: ProcessGroup | Shards
) -> ShardedDB:
    """``AttentionDB.open`` of this rank's part of a folder."""
    shards = Shards.of(group)
    parts, own = open_parts(path, shards)

    def opened() -> ShardedDB:
        db = AttentionDB.open(own, config=config, device=device)
        made = ShardedDB(
            db.store.num_kv_heads, db.store.head_dim, value_dim=db.store.value_dim, config=db.config, group=shards
        )
        made.store, made.index = db.store, db.index
        made.begin_with(parts.rows, torch.tensor(parts.start))
        return made

    made: list[ShardedDB] = []
    shards.agreed(lambda: made.append(opened()))
    return made[0]


def check_config(config: RetrievalConfig) -> RetrievalConfig:
    """The config, if it goes with shards.

    Raises:
        ValueError: it does not; names the option.
    """
    if config.rows == "host":
        raise ValueError("rows='host' does not go with group: shards keep rows where they are read")
    if config.prefill != "dense":
        raise ValueError(f"prefill={config.prefill!r} does not go with group, which reads prompts densely: 'dense'")
    return config


def _mean(by_rank: Tensor) -> list[float]:
    """The mean of each rank's numbers ``[ranks, ...]``."""
    means: list[float] = by_rank.flatten(1).mean(dim=1).tolist()
    return means


def _in_order(parts: Sequence[Answer]) -> Answer:
    """The answers for several positions as one."""
    last = parts[-1]
    slots = [one.slots for one in parts if one.slots is not None]
    widest = max((each.shape[-1] for each in slots), default=0)
    joined: dict[str, Any] = {
        name: torch.cat([getattr(one, name) for one in parts], dim=2)
        for name in ("out", "lse", "exact_lse", "deviation")
        if getattr(last, name) is not None
    }
    if slots:
        joined["slots"] = torch.cat([pad(each, (0, widest - each.shape[-1]), value=-1) for each in slots], dim=2)
    seconds = [one.plan.seconds for one in parts]
    return last._replace(
        **joined,
        rows_retrieved=sum(one.rows_retrieved for one in parts) / len(parts),
        rows_read=sum(one.rows_read for one in parts) / len(parts),
        bytes_read=sum(one.bytes_read for one in parts),
        plan=replace(last.plan, seconds=sum(each or 0.0 for each in seconds)),
        unread=None,
    )


def _with_brought(exact_lse: Tensor, brought: Sequence[StepAnswer]) -> Tensor:
    for one in brought:
        assert one.lse is not None
        exact_lse = torch.logaddexp(exact_lse, one.lse)
    return exact_lse


def _by_size(index: Any, config: RetrievalConfig, work: Workload, rows: int) -> int:
    """Rows that a budget by size reads of so many."""
    return max(1, int(index.rows_asked(config, work._replace(rows=rows, indexed=rows, needs=None))))
