"""The ladder: answers within an error bound, by reading more where an estimate says that too little was read.

A query is first answered on the rung that most of the latest queries needed. An estimate of its error, corrected by
what audits have found, says which KV heads break the bound: they get a higher rung (more lists or rows, then a sampled
tail where the index can draw one), or, where that would read more, a dense scan. Rungs are left again as the need for
them passes.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from ..config import RetrievalConfig
from ..store.drift import AUDITS_TO_LEARN, REMEMBERED
from .call import Call
from .execute import Answer, merged
from .plan import Source
from .steps import DenseHeads, steps_of_call
from .usage import Needs, Usage

# Error over estimate until enough audits have been heard, per tail. "centroid": in the worst of eight layers of three
# models, one query in ten exceeds it; the others from SmolLM2's rows.
PRIOR = {"centroid": 1.0, "none": 1.0, "sample": 2.0}
# The share of the audits remembered that the estimate must cover.
COVERED = 0.55
# Twice the budget lowers the error by two to the power of this.
DECAY = 0.8
# The rung of a first try is what this share of the latest queries needed, of so many.
RECENT, ENOUGH = 32, 0.75


@dataclass(frozen=True)
class Rung:
    """One way to read: ``times`` the config's budget, with a tail."""

    times: float
    tail: str

    def __str__(self) -> str:
        return f"budget x {self.times:.2g}{', sampled tail' if self.tail == 'sample' else ''}"


def rungs_of(config: RetrievalConfig) -> tuple[Rung, ...]:
    """The rungs below a dense scan, least reading first."""
    if "sample" not in config.traits.tails:
        return tuple(Rung(2.0 ** (i / 2), config.tail_name) for i in range(9))
    if config.tail_name == "sample":
        return tuple(Rung(times, "sample") for times in (1, 2, 4, 8, 16))
    return (*(Rung(times, "none") for times in (1, 2, 4)), *(Rung(times, "sample") for times in (4, 8, 16)))


@dataclass(frozen=True)
class Climb:
    """How a query got its answer: the last try, tries given up, and KV heads to be answered densely."""

    answer: Answer
    rung: Rung
    given_up: tuple[tuple[Rung, Answer], ...]
    dense_heads: tuple[int, ...]

    @property
    def name(self) -> str:
        """The rung in words, for counting."""
        count = len(self.dense_heads)
        dense = f", {count} KV head{'s'[: count > 1]} dense" if count else ""
        return f"{self.rung}{dense}"


class Ladder:
    """What one store has learnt about its errors. Copies of a store go on learning in the same place."""

    def __init__(self, config: RetrievalConfig) -> None:
        self.rungs = rungs_of(config)
        self._decay = DECAY * math.log2(self.rungs[1].times / self.rungs[0].times)
        self._first = next(i for i, rung in enumerate(self.rungs) if rung.times == 1)
        self._needs: deque[float] = deque(maxlen=RECENT)
        self._ratios: dict[str, deque[Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def climb(
        self,
        answer_of: Callable[[RetrievalConfig], Answer],
        *,
        config: RetrievalConfig,
        kv_heads: int,
        needs: Needs | None,
        base: int,
        eligible: int,
        learn: bool,
    ) -> Climb:
        """Answer within ``max_error`` as far as estimates tell.

        ``answer_of``: the answer under a config. ``needs``: what a sample of the queries told. ``base``: rows that the
        config's own budget reads per KV head; ``eligible``: rows in the index.
        """
        assert config.max_error is not None
        usable = [i for i, rung in enumerate(self.rungs) if rung.times * base < eligible / 2] or [0]
        level = min(self.level, usable[-1])
        given_up: list[tuple[Rung, Answer]] = []
        while True:
            rung = self.rungs[level]
            answer = answer_of(config_at(config, max(1, round(rung.times * base)), rung.tail))
            batch, heads, m = answer.state[1].shape
            errors = self.estimate(answer, needs).nan_to_num().view(batch, kv_heads, heads // kv_heads, m)
            excess = errors.amax(dim=(0, 2, 3)) / config.max_error
            failing = (excess > 1).nonzero()[:, 0].tolist()
            if not failing:
                self._note(level + math.log2(max(float(excess.max()), 1e-3)) / self._decay, learn)
                return Climb(answer, rung, tuple(given_up), ())
            wanted = level + max(1, math.ceil(math.log2(float(excess.max())) / self._decay))
            higher = next((i for i in usable if i >= wanted), None)
            if higher is None or len(failing) * eligible <= kv_heads * self.rungs[higher].times * base:
                others = [float(excess[h]) for h in range(kv_heads) if h not in failing]
                if others:
                    self._note(level + math.log2(max(1e-3, *others)) / self._decay, learn)
                return Climb(answer, rung, tuple(given_up), tuple(failing))
            given_up.append((rung, answer))
            level = higher

    @property
    def level(self) -> int:
        """Index of the rung that a query tries first."""
        if not self._needs:
            return self._first
        need = sorted(self._needs)[int(ENOUGH * (len(self._needs) - 1))]
        return min(max(math.ceil(need), 0), len(self.rungs) - 1)

    def estimate(self, answer: Answer, needs: Needs | None = None) -> Tensor:
        """Relative error ``[B, Hq, m]`` that an answer is not expected to exceed; ``needs``: what a sample told."""
        assert answer.deviation is not None
        estimate: Tensor = self._factor(answer, needs) * answer.deviation / answer.out.norm(dim=-1)
        return estimate

    def learn(self, answer: Answer, error: Tensor) -> None:
        """Take in an audit: the relative error ``[B, Hq, m]`` that ``answer`` really had."""
        assert answer.deviation is not None
        ratio = error * answer.out.norm(dim=-1) / answer.deviation.clamp(min=1e-12)
        kept = self._ratios.setdefault(answer.tail, deque(maxlen=REMEMBERED))
        kept.append(ratio.nan_to_num().amax(dim=(0, 2)))

    def _factor(self, answer: Answer, needs: Needs | None) -> Tensor:
        """``[Hq, 1]``: error over estimate that audits of this tail seldom exceeded, per head."""
        heads = answer.out.shape[1]
        kept = [ratio for ratio in self._ratios.get(answer.tail, ()) if ratio.shape[0] == heads]
        told = needs.factors if needs is not None and len(needs.factors) == heads else ()
        prior = torch.tensor(told) if told else torch.full((heads,), PRIOR[answer.tail])
        factor = torch.stack(kept).quantile(COVERED, dim=0, interpolation="higher") if kept else prior
        if len(kept) < AUDITS_TO_LEARN:
            # A few audits do not yet speak against the prior.
            factor = factor.maximum(prior.to(factor.device))
        # Errors far beyond come of rows that were overlooked: reading more finds them, a larger estimate does not.
        factor = factor.clamp(max=2 * PRIOR[answer.tail])
        return factor[:, None].to(answer.out.device)

    def _note(self, need: float, learn: bool) -> None:
        if learn:
            self._needs.append(need)


def finish_climb(climb: Climb, call: Call) -> Answer:
    """The answer with its dense KV heads put in, and all that was read on the way."""
    answer = climb.answer
    plan = replace(answer.plan, reason=f"{answer.plan.reason}; max_error: {climb.name}")
    seconds = plan.seconds or 0.0
    if call.measure:
        given_up = tuple(_given_up(rung, tried) for rung, tried in climb.given_up)
        seconds += sum(tried.plan.seconds or 0.0 for _, tried in climb.given_up)
        plan = replace(plan, given_up=given_up)
    rows_read = answer.rows_read + sum(tried.rows_read for _, tried in climb.given_up)
    bytes_read = answer.bytes_read + sum(tried.bytes_read for _, tried in climb.given_up)
    out, lse, exact_lse = answer.out, answer.lse, answer.exact_lse
    if climb.dense_heads:
        assert lse is not None
        assert exact_lse is not None
        step = DenseHeads.of(climb.dense_heads, call)
        found = step.run(call)
        # What these heads had read before is left out; what the call brought along is theirs as well.
        brought = [one.run(call) for one in steps_of_call(call)]
        dense = merged([(one.out, one.lse) for one in (found, *brought)])
        asking = step.asking(call)[None, :, None]
        out = torch.where(asking[..., None], dense[0], out)
        lse, exact_lse = torch.where(asking, dense[1], lse), torch.where(asking, dense[1], exact_lse)
        usage = found.usages[0]
        rows_read += usage.rows
        bytes_read += usage.bytes
        seconds += usage.seconds or 0.0
        step = replace(step, sources=(replace(step.sources[0], actual=usage),))
        plan = replace(plan, steps=(*plan.steps, step))
    plan = replace(plan, seconds=seconds if call.measure else None)
    return answer._replace(
        out=out,
        lse=lse,
        exact_lse=exact_lse,
        rows_read=rows_read,
        plan=plan,
        tried=answer,
        bytes_read=bytes_read,
        dense_heads=climb.dense_heads,
    )


def _given_up(rung: Rung, tried: Answer) -> Source:
    """A try that was not enough, as a source of the plan."""
    usages = [source.actual for source in tried.plan.sources if source.actual is not None]
    spent = Usage(
        tried.rows_read,
        sum(usage.bytes for usage in usages),
        sum(usage.lists for usage in usages if usage.rows),
        tried.plan.seconds,
    )
    return Source("given up", f"{rung}: its estimated error was too large", spent, spent, 0.0)


@lru_cache(maxsize=256)
def config_at(config: RetrievalConfig, k: int, tail: str) -> RetrievalConfig:
    """The config with another budget, where it has been decided to retrieve."""
    # Dense or not has been decided for the config's own budget.
    return replace(config, k=k, tail=tail, dense_below=0)
