"""ShardedDB: one rank's part of a database whose rows are dealt over a process group."""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from index_kernels import top_k

from ..attention import AttentionDB
from ..config import RetrievalConfig
from ..index.search import best_of, search_rows
from ..metrics import relative_error
from ..query.audit import AuditReport, compare_with_dense
from ..query.call import Call
from ..query.execute import Answer, merged, run_plan
from ..query.ladder import Climb, config_at
from ..query.plan import QueryPlan, Source
from ..query.steps import DenseHeads, DenseScan, steps_of_call
from ..query.usage import Usage
from ..query.weights import Weights
from ..shards import ShardError, Shards
from ..snapshot import SaveReport, ShardWriter, SnapshotWriter, open_parts
from ..store import check_range, on_device, stored
from .budget import Budget, Told
from .steps import OwnRows, ShardSources

# Rows that a rank reads of its own, beside the summaries of its lists, to tell how much of a call's weight it has.
GLANCED = 16


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
        self, *args: int, group: ProcessGroup | Shards, config: RetrievalConfig | None = None, **options: Any
    ) -> None:
        super().__init__(*args, config=check_config(RetrievalConfig.checked(config)), **options)
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

    def reserve(self, rows: int) -> None:
        """See AttentionDB; rows of all ranks together."""
        self.store.reserve(self.shards.before(rows))

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

    def begin_with(self, rows: int, start: Tensor) -> None:
        """Be ``rows`` long, where the store was given this rank's part of them."""
        self._rows, self._settled, self._start = rows, rows, start.to(self.store.device)

    def select(self, batch: Tensor) -> None:
        """See AttentionDB."""
        super().select(batch)
        self._start = self._start[batch.to(self._start.device)]

    def _by_position(self, rows: Tensor) -> Tensor:
        raise ValueError(f"rows are dealt over {self.shards.ranks} ranks: none has all of them")

    def _held(self, length: int) -> int:
        return self.shards.before(length)

    def _cut(self, length: int) -> None:
        store, batch = self.store, len(self._start)
        kept = (store.kept_dtype, store.device) if self._rows else None
        super()._cut(length)
        self._rows, self._settled = length, min(self._settled, length)
        if not length:
            self._start = store.start
        elif store.is_empty and kept is not None:
            # A shard that has lost all of its own rows stays one of rows as those were.
            dtype = kept[0] if kept[0].is_floating_point else torch.float32
            store.append(
                *(
                    torch.empty(batch, store.num_kv_heads, 0, dim, dtype=dtype, device=kept[1])
                    for dim in (store.head_dim, store.value_dim)
                )
            )
            store.set_start(self.shards.before_each(self._start))

    def _save(self, target: "str | os.PathLike[str] | SnapshotWriter | ShardWriter") -> SaveReport:
        if isinstance(target, SnapshotWriter):
            raise ValueError("a SnapshotWriter writes what one process has: pass a path, or a ShardWriter")
        with nullcontext(target) if isinstance(target, ShardWriter) else ShardWriter(target, self.shards) as writer:
            return writer.save([(self.store, self.index)], self.config, rows=self._rows, start=self._start)

    def _answered(self, call: Call, *, retrieve: bool, audit: bool | None) -> tuple[Answer, str]:
        reason = "dense was asked for"
        if call.is_prompt and retrieve:
            reason = f"more queries in one call than max_queries={self.config.max_queries}"
        retrieve = retrieve and not call.is_prompt
        call.measure = retrieve and (self.stats.audit_is_due(self.config) if audit is None else audit)
        answer, retrieves = self._whole(call, retrieve=retrieve, learn=True)
        if retrieve:
            reason = "no rank retrieves: its own rows are few, or a dense scan is faster"
        return answer, "" if retrieves else reason

    def _note_index(self) -> None:
        self.stats.index = self.index.describe() | {"rows of this shard": len(self.store)}

    def _explained(self, call: Call) -> QueryPlan:
        """A source for each shard, with the time it took there; the same on all ranks."""
        self._measured(call)  # twice: the first call of a process may load and compile kernels
        return self._measured(call).plan

    def _measured(self, call: Call, *, retrieve: bool = True) -> Answer:
        call.measure = True
        return self._whole(call, retrieve=retrieve and not call.is_prompt)[0]

    def _weights(self, call: Call, *, retrieve: bool) -> Weights:
        raise ValueError(f"weights of single rows are not told where rows are dealt over {self.shards.ranks} ranks")

    def _best(self, call: Call, k: int) -> tuple[Tensor, Tensor, bool]:
        query = call.query
        if query.shape[2] != 1:
            raise ValueError(f"query has {query.shape[2]} positions, expected 1 where rows are dealt over ranks")
        ids = torch.full((*query.shape[:3], k), -1, device=query.device)
        scores, exact = ids.float().fill_(float("-inf")), True
        if len(self.store):
            ids, scores, exact = search_rows(call, self.index, k)
        told = torch.cat([self.shards.position_of(ids).double().flatten(), scores.double().flatten()])
        found = self.shards.gather(torch.cat([told, told.new_tensor([exact])]))
        both = found[:, :-1].view(self.shards.ranks, 2, *ids.shape).movedim(0, -2).flatten(-2)
        return *best_of(both[0].long(), both[1].float(), k), bool(found[:, -1].all())

    def _stops(self, m: int) -> tuple[int, ...]:
        """Of how many of our rows each of the m newest positions is no older."""
        if m == 1:
            return (len(self.store),)
        return tuple(self.shards.before_each(torch.arange(self._rows - m + 1, self._rows + 1)).tolist())

    def _whole(self, call: Call, *, retrieve: bool, learn: bool = False) -> tuple[Answer, bool]:
        """The answer of all ranks, and whether any retrieves; by ``max_error``, as far up the ladder as it asks for."""
        config, call.needs_lse, call.tells_unread = self.config, True, True
        if not retrieve:
            return self._together(call, self._scan(call), None)
        held = self.shards.held_by_each(self._rows)
        indexed = [type(self.index).rows_indexed(config, rows) for rows in held]
        # What one store would read of as many rows.
        work = call.workload._replace(rows=self._rows, indexed=max(1, sum(indexed)), needs=None)
        total = round(type(self.index).rows_asked(config, work) * self.budget.more)
        unread, looked_at = self._glance(call)
        retrieves = False

        def at(total: int, config: RetrievalConfig) -> Answer:
            nonlocal retrieves
            parts = self.budget.parts(total, indexed, unread)
            own = self._own(call, parts[self.shards.rank], config)
            own = own._replace(bytes_read=own.bytes_read + looked_at)
            answer, retrieves = self._together(call, own, parts, learn=learn)
            return answer

        if config.max_error is None:
            return at(total, config), retrieves
        climb = self._climb(
            lambda at_rung: at(at_rung.rows_retrieved, at_rung),
            needs=None,  # ranks are told different ones
            base=total,
            eligible=max(1, sum(indexed)),
            learn=learn,
        )
        return self._finished(call, climb), retrieves

    def _glance(self, call: Call) -> tuple[list[float] | None, int]:
        """What share of the weight each rank leaves unread after a look at few rows, and bytes read for it.

        None where past calls tell as much, or where no summaries tell.
        """
        if self.budget.is_told or not self.index.moves_rows or call.query.shape[2] > 1:
            return None, 0
        own = self._own(replace(call, measure=False), GLANCED, self.config)
        told = torch.stack([own.state[1], _unread(own)])
        lses, shares = self.shards.gather(told.flatten()).view(self.shards.ranks, *told.shape).unbind(1)
        unread = shares * torch.softmax(lses, dim=0).nan_to_num()
        return [max(each, 1e-9) for each in _mean(unread)], own.bytes_read

    def _finished(self, call: Call, climb: Climb) -> Answer:
        """The last try, with KV heads answered densely where it was not enough."""
        answer, given_up = climb.answer, [tried for _, tried in climb.given_up]
        if climb.dense_heads:
            step, bare = DenseHeads.of(climb.dense_heads, call), self._bare(call)
            alone = call.query.shape[2] == 1 and len(self.store) > 0
            own = run_plan(QueryPlan((step,), "max_error"), bare) if alone else self._scan(call)
            dense, _ = self._together(call, own, None)
            given_up.append(dense)
            asking = step.asking(call)[None, :, None]
            (out, lse), (dense_out, dense_lse) = answer.state, dense.state
            exact_lse = None if answer.exact_lse is None else torch.where(asking, dense_lse, answer.exact_lse)
            out, lse = torch.where(asking[..., None], dense_out, out), torch.where(asking, dense_lse, lse)
            answer = answer._replace(out=out, lse=lse, exact_lse=exact_lse, dense_heads=climb.dense_heads)
        return answer._replace(
            rows_read=answer.rows_read + sum(tried.rows_read for tried in given_up),
            bytes_read=answer.bytes_read + sum(tried.bytes_read for tried in given_up),
            plan=replace(answer.plan, reason=f"{answer.plan.reason}; max_error: {climb.name}"),
            tried=climb.answer,
        )

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

    def _together(
        self, call: Call, own: Answer, parts: list[int] | None, *, learn: bool = False
    ) -> tuple[Answer, bool]:
        """Every rank's answer as one, in the order of ranks, with what the call brings; whether any rank retrieves."""
        told = self._told(call, own)
        exact = () if not call.measure or own.exact_lse is None else (own.exact_lse,)
        states = [own.out.float(), own.state[1], _unread(own), *exact]
        numbers = torch.tensor(told, dtype=torch.float64).view(torch.float32).to(own.out.device)
        found = self.shards.gather(torch.cat([each.reshape(-1) for each in (*states, numbers)]))
        *by_rank, told_by_each = found.split([each.numel() for each in (*states, numbers)], dim=1)
        outs, lses, shares, *exacts = (
            each.reshape(self.shards.ranks, *state.shape) for each, state in zip(by_rank, states, strict=True)
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
            lse = lse_with
        for one in brought:
            if exact_lse is not None and one.lse is not None:
                exact_lse = torch.logaddexp(exact_lse, one.lse)
        answer = Answer(
            out,
            lse,
            exact_lse,
            sum(one.retrieved for one in each),
            sum(one.read for one in each),
            int(sum(one.bytes for one in each)),
            self._plan_of_all(own.plan, each, lses - lse, parts) if call.measure else own.plan,
            own.slots,
            shares.sum(dim=0),
            self.config.tail_name,
        )
        return answer, any(one.retrieves for one in each)

    def _told(self, call: Call, own: Answer) -> Told:
        plan, needs, more = own.plan, self.index.needs, 1.0
        if self.config.finds_budget and needs is not None:
            by_size = call.workload._replace(rows=needs.rows, indexed=needs.rows, needs=None)
            more = needs.read / max(1, int(type(self.index).rows_asked(self.config, by_size)))
        expected = [source.estimated for source in plan.sources]
        return Told(
            self.shards.about, self._rows, not plan.is_dense, own.rows_retrieved, own.rows_read, own.bytes_read,
            plan.seconds or 0.0, sum(each.rows for each in expected), sum(each.bytes for each in expected),
            sum(each.seconds or 0.0 for each in expected), more,
        )  # fmt: skip

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

    def _plan_of_all(
        self, own: QueryPlan, told: Sequence[Told], log_masses: Tensor, parts: Sequence[int] | None
    ) -> QueryPlan:
        """What all ranks read; ``log_masses [ranks, B, Hq, m]``: their shares of the whole weight."""
        held, reasons = self.shards.held_by_each(self._rows), self.shards.gather_objects(own.reason)
        masses = torch.exp(log_masses).nanmean(dim=tuple(range(1, log_masses.ndim))).tolist()
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
        return replace(
            own, steps=(ShardSources(sources),), reason=f"{self._rows} rows dealt over {len(told)} ranks{shared}",
            seconds=max(one.seconds for one in told), seconds_estimated=None, seconds_dense=None, kept=self.store.kept,
        )  # fmt: skip

    def _compared(self, call: Call, answer: Answer, *, learn: bool = False) -> AuditReport:
        """How far an answer is from the dense one of all ranks; a ladder learns from it."""
        plainly, began = replace(call, measure=False), time.perf_counter()
        dense, _ = self._together(plainly, self._scan(plainly), None)
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
            if answer.slots is not None:
                got = self.store.scores(call.query, answer.slots, call.scale)
                got = pad(
                    got.topk(min(k, got.shape[-1]), dim=-1).values, (0, k - min(k, got.shape[-1])), value=-torch.inf
                )
        found = self.shards.gather(torch.stack([best, got]).flatten())
        both = found.view(self.shards.ranks, 2, *best.shape).movedim(0, -2).flatten(-2)
        assert answer.exact_lse is not None
        state = answer.out, answer.exact_lse
        recall, mass, error = compare_with_dense(state, dense.state, both[1], both[0].topk(k, dim=-1).values)
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


def _unread(own: Answer) -> Tensor:
    """``[B, Hq, m]``, the share of its own rows' weight that a rank left unread, as far as its index tells."""
    return torch.zeros_like(own.state[1]) if own.deviation is None else own.deviation


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
