"""Reading a prompt: block by block, each planned for itself, the rows before it sealed as reading goes on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from index_kernels import resolve_backend

from ..config import RetrievalConfig
from ..metrics import relative_error
from ..store import KVStore
from .audit import dense_state
from .call import Call
from .choose import PlannedIndex, seconds_of
from .execute import Answer, run_plan
from .plan import QueryPlan, Step
from .rates import rates
from .stats import GAVE_UP
from .steps import DenseScan, steps_of_call
from .usage import FAR, Rates, Workload

# The middle position of every block is answered densely as well; beyond so many rows of fewer blocks, so that audits
# take no larger share of the time.
ROWS_PER_AUDIT = 4096
# Audits looked back at, and the least of them by which reading is given up.
RECENT, LEAST_AUDITS = 8, 2
# The share of ``target_error`` that blocks aim at: what goes wrong as a prompt is read enters its rows.
AIM = 0.5
# Rows of lists are read so many times those by size, as audits find errors below or above that.
LEAST_EFFORT, MOST_EFFORT = 1 / 3, 16.0
# By which power of the rows errors fall: 0.1 to 0.8 on eight layers of three models, the more the more are read.
FALLS = 0.5
# What follows a prompt asks its end most: the blocks of so many newest positions of one, or of a call of at least four
# times as many, read so many times the rows.
END, END_EFFORT = 1024, 4.0
# A call with fewer positions is not worth choosing lists for: "auto" reads it densely.
LEAST_POSITIONS = 64
# "auto" reads prompts that end within so many rows densely: all of a model's other work is most of their time.
LEAST_ROWS = 8192


class BlockIndex(PlannedIndex, Protocol):
    """What reading by blocks asks of an index; see ``index.KeyIndex``."""

    block: int

    @classmethod
    def sealed_before(cls, position: int, sealed: int) -> int:
        """Rows in lists when a block at ``position`` is read, ``sealed`` of which are so already."""

    @classmethod
    def block_steps(cls, config: RetrievalConfig, work: Workload, scan: Rates | None) -> tuple[Step, ...]:
        """What the index offers for a block."""

    def kept_before(self, position: int) -> int:
        """Rows that stay in lists when a block at ``position`` is read."""

    def seal_before(self, store: KVStore, lo: Tensor, position: int) -> None:
        """Seal what a block at ``position`` is to find in lists."""

    def unseal_after(self, store: KVStore, lo: Tensor, position: int) -> None:
        """Put back the rows that a block at ``position`` must read exactly."""


class BlockPlan(NamedTuple):
    """How the positions ``first .. stop`` are read; plan None: by a dense scan."""

    first: int
    stop: int
    plan: QueryPlan | None


@dataclass
class PromptLog:
    """What reading a prompt into one store has told so far.

    Attributes:
        errors: mean relative error of each audited position.
        by_size: what each would have been with the rows by size.
        effort: rows of lists to read for what comes next, in those by size.
        gave_up: whether they were too large, so that what follows is read densely.
        taken: how many of the errors have been told.
    """

    errors: list[float] = field(default_factory=list)
    by_size: list[float] = field(default_factory=list)
    effort: float = 1.0
    gave_up: bool = False
    taken: int = 0

    def take_errors(self) -> list[float]:
        """Those that came since they were last taken."""
        self.taken, before = len(self.errors), self.taken
        return self.errors[before:]

    def add(self, error: float, config: RetrievalConfig) -> None:
        """Take in an audit."""
        self.errors.append(error)
        self.by_size.append(error * self.effort**FALLS)
        recent, target, limit = self.errors[-RECENT:], config.target_error, error_allowed(config)
        mean = sum(recent) / len(recent)
        if target:
            # In proportion to the error by size: of all ways to share rows among layers, the one with the least sum of
            # squared errors, if FALLS holds. As if one more had found what is aimed at: the first few tell little.
            off = (sum(self.by_size[-RECENT:]) / (AIM * target) + 1) / (len(recent) + 1)
            self.effort = min(MOST_EFFORT, max(LEAST_EFFORT, off))
        if limit is not None and len(recent) >= LEAST_AUDITS and mean > limit:
            self.gave_up = True


def error_allowed(config: RetrievalConfig) -> float | None:
    """The mean error of audited positions above which "auto" goes on densely; None: no limit."""
    if config.prefill != "auto" or config.target_error is None:
        return None
    return FAR * config.target_error


def block_plans(call: Call) -> list[BlockPlan]:
    """The blocks of a prompt; none at all where the call is no prompt, or no block is read through lists."""
    index: BlockIndex = call.index  # type: ignore[assignment]
    engine, config, length, m = type(index), call.config, len(call.store), call.query.shape[2]
    if not call.is_prompt or not engine.block or config.prefill == "dense" or call.extra is not None:
        return []
    if config.prefill == "auto" and (m < LEAST_POSITIONS or (call.until or length) <= LEAST_ROWS):
        return []
    backend = resolve_backend(call.query)
    threads = torch.get_num_threads() if backend == "numba" else None
    first = length - m
    work, sealed, last = call.workload, index.kept_before(first), int(call.store.start.max())
    plans: list[BlockPlan] = []
    for at, stop in _blocks(first, length, engine.block):
        sealed = engine.sealed_before(at, sealed)
        asks = work._replace(rows=stop, queries=stop - at, indexed=sealed, needs=None)
        # Lists are of use where every batch row has some: before, padding is hidden by a mask.
        plan = _block_plan(engine, config, asks, backend, threads) if last < sealed else None
        plans.append(BlockPlan(at, stop, plan))
    return plans if any(plan is not None for *_, plan in plans) else []


def read_prompt(call: Call, plans: list[BlockPlan], lo: Tensor, log: PromptLog, *, audit: bool) -> list[Answer]:
    """The answers for each part of a prompt, in order; rows are sealed on the way, as ``lo`` says from where on.

    Each part sees the rows before it and its own, causal. Parts before the first plan are answered as one. With
    ``audit`` some positions are answered densely as well, and ``log`` takes in how far off they were.
    """
    index: BlockIndex = call.index  # type: ignore[assignment]
    first, m = plans[0][0], call.query.shape[2]
    index.unseal_after(call.store, lo, first)
    begins = next(at for at, _, plan in plans if plan is not None)
    until = len(call.store) if call.until is None and m >= 4 * END else call.until
    ends_from = math.inf if until is None else until - END
    answers = []
    if begins > first:
        answers.append(_dense(part_of(call, first, begins)))
    for at, stop, plan in plans:
        if at < begins:
            continue
        part = part_of(call, at, stop)
        if plan is None or log.gave_up:
            answers.append(_dense(part, GAVE_UP) if log.gave_up else _dense(part))
            continue
        index.seal_before(call.store, lo, at)
        ends = at >= ends_from
        part.measure, part.effort = call.measure, log.effort * (END_EFFORT if ends else 1)
        effort = f" times {log.effort:.2g} for the errors of audits" if log.effort != 1 else ""
        effort += f" times {END_EFFORT:g} for the end of a prompt" if ends else ""
        answer = run_plan(replace(plan, steps=(*plan.steps, *steps_of_call(call)), reason=plan.reason + effort), part)
        answers.append(answer)
        if audit and not ends and at // type(index).block % (1 + at // ROWS_PER_AUDIT) == 0:
            middle = at + (stop - at) // 2
            dense, _ = dense_state(part_of(call, middle, middle + 1))
            error = relative_error(answer.out[:, :, middle - at : middle - at + 1], dense)
            log.add(float(error.nanmean()), call.config)
    return answers


def part_of(call: Call, first: int, stop: int) -> Call:
    """The call of positions ``first .. stop`` alone, with the rows that were there then."""
    begins = len(call.store) - call.query.shape[2]
    query = call.query[:, :, first - begins : stop - begins]
    return replace(call, query=query, store=call.store.at_length(stop), measure=False, needs_lse=True)


def whole(answers: list[Answer]) -> tuple[Tensor, Tensor]:
    """The state of all parts, float32."""
    outs, lses = zip(*(answer.state for answer in answers), strict=True)
    return torch.cat([out.float() for out in outs], dim=2), torch.cat(lses, dim=2)


def _dense(part: Call, reason: str = "a dense scan is estimated to be faster") -> Answer:
    plan = QueryPlan((DenseScan.of(part.workload, None), *steps_of_call(part)), reason)
    return run_plan(plan, part)


def newest_part(answers: list[Answer]) -> Answer:
    """The answer for the newest positions; its plan says that it is of these alone."""
    answer, count = answers[-1], len(answers)
    reason = f"{answer.plan.reason}; the newest of {count} parts of the call"
    return answer._replace(plan=replace(answer.plan, reason=reason)) if count > 1 else answer


def _blocks(first: int, stop: int, block: int) -> Iterator[tuple[int, int]]:
    """Runs that end at multiples of ``block``, so that a prompt's blocks are the same in whatever chunks it comes."""
    while first < stop:
        end = min(stop, first - first % block + block)
        yield first, end
        first = end


@lru_cache(maxsize=4096)  # the layers of a model ask alike
def _block_plan(
    engine: type[BlockIndex], config: RetrievalConfig, work: Workload, backend: str, threads: int | None
) -> QueryPlan | None:
    """How a block is read through lists; None where a dense scan is faster, or lists have nothing."""
    least = max(config.traits.dense_below, config.dense_below_rows or 0) if config.prefill == "auto" else 0
    if work.indexed <= work.first_index_row or work.rows <= least:
        return None
    scan = rates(None, threads) if threads is not None else None
    steps = engine.block_steps(config, work, scan)
    if not steps:
        return None
    seconds = seconds_dense = None
    if scan is not None:
        seconds = seconds_of(steps)
        seconds_dense = DenseScan.of(work, scan).sources[0].estimated.seconds
    if config.prefill == "auto" and (seconds is None or seconds_dense is None or seconds_dense <= seconds):
        return None
    reason = f"a prompt's positions {work.rows - work.queries} to {work.rows - 1}, budget by size"
    return QueryPlan(steps, reason, work.indexed, backend, seconds, seconds_dense)
