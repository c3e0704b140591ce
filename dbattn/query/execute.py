"""Running a plan: each step becomes a state (out, lse), and the states are merged."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from index_kernels import merge_states

from .call import Call
from .plan import Counted, QueryPlan, StepAnswer


class Answer(NamedTuple):
    """A plan that has run. (A tuple, as StepAnswer: one is made at every call.)

    Attributes:
        out: ``[B, Hq, m, Dv]`` float32; in the query's dtype where no lse was needed.
        lse: ``[B, Hq, m]`` over all sources; None where the call does not need it.
        exact_lse: ``[B, Hq, m]`` over the rows that were read.
        rows_retrieved: rows an index retrieved, per query head and position, mean.
        rows_read: rows read, sinks and hot rows included, likewise.
        plan: the plan; with what each source read where the call was measured.
        slots: places of the rows retrieved, ``[B, Hq, m, n]``, -1 = none; None if not measured, or none.
        deviation: ``[B, Hq, m]``, what the error over the output's norm is estimated from; None without max_error.
        bytes_read: bytes read by the whole call, what is scored to choose rows included.
        tail: what answered for the rows not read.
        unread, log_weights, counted: see StepAnswer.
        dense_heads: KV heads answered densely after all.
        tried: the answer before some KV heads were answered densely after all; None without max_error.
    """

    out: Tensor
    lse: Tensor | None
    exact_lse: Tensor | None
    rows_retrieved: float
    rows_read: float
    bytes_read: int
    plan: QueryPlan
    slots: Tensor | None = None
    deviation: Tensor | None = None
    tail: str = "none"
    unread: Tensor | None = None
    log_weights: Tensor | None = None
    dense_heads: tuple[int, ...] = ()
    tried: "Answer | None" = None
    counted: Counted | None = None

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of an answer whose lse was needed."""
        assert self.lse is not None
        return self.out, self.lse


def run_plan(plan: QueryPlan, call: Call) -> Answer:
    """Answer a call by a plan."""
    found = [step.run(call) for step in plan.steps]
    whole = found[0] if len(found) == 1 else _together(found)
    answer = Answer(
        whole.out,
        whole.lse,
        whole.lse if whole.exact_lse is None else whole.exact_lse,
        whole.rows_retrieved,
        whole.rows_read,
        whole.bytes_read,
        plan,
        whole.slots,
        None if whole.deviation is None or whole.lse is None else whole.deviation(whole.lse),
        whole.tail,
        whole.unread,
        whole.log_weights,
        counted=whole.counted,
    )
    if not call.measure:
        return answer
    kept = replace(plan, kept=call.store.kept)
    return answer._replace(plan=_measured(kept, found, whole.lse))


def _together(found: Sequence[StepAnswer]) -> StepAnswer:
    """What several steps made of a call, as if one had."""
    out, lse = merged([(one.out, one.lse) for one in found])
    deviations = [one.deviation for one in found if one.deviation is not None]
    return StepAnswer(
        out,
        lse,
        exact_lse=_exact_lse(found),
        rows_read=sum(one.rows_read for one in found),
        rows_retrieved=sum(one.rows_retrieved for one in found),
        bytes_read=sum(one.bytes_read for one in found),
        slots=_first(one.slots for one in found),
        deviation=partial(_summed, deviations) if len(deviations) > 1 else next(iter(deviations), None),
        tail=next((one.tail for one in found if one.tail != "none"), "none"),
        unread=_first(one.unread for one in found),
        log_weights=_first(one.log_weights for one in found),
        counted=next((one.counted for one in found if one.counted is not None), None),
    )


def _first(found: Iterable[Tensor | None]) -> Tensor | None:
    return next((one for one in found if one is not None), None)


def _summed(deviations: Sequence[Callable[[Tensor], Tensor]], lse: Tensor) -> Tensor:
    """The deviation of several steps, each independent of the others."""
    return torch.stack([one(lse) for one in deviations]).square().sum(dim=0).sqrt()


def merged(states: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """States ``(out, lse)`` over disjoint rows as one, added one after the other."""
    out, lse = states[0][0].float(), states[0][1]
    assert lse is not None
    for more, more_lse in states[1:]:
        assert more_lse is not None
        out, lse = merge_states(torch.stack([out, more]), torch.stack([lse, more_lse]))
    return out, lse


def _exact_lse(found: Sequence[StepAnswer]) -> Tensor | None:
    if all(one.exact_lse is None for one in found):
        return None
    parts = [one.lse if one.exact_lse is None else one.exact_lse for one in found]
    exact = parts[0]
    for part in parts[1:]:
        assert exact is not None
        assert part is not None
        exact = torch.logaddexp(exact, part)
    return exact


def _measured(plan: QueryPlan, found: Sequence[StepAnswer], lse: Tensor | None) -> QueryPlan:
    """The plan with what each source read and the time it took."""
    steps = []
    for step, one in zip(plan.steps, found, strict=True):
        if lse is None:
            masses = [1.0]
        else:
            assert one.lse is not None
            lses = one.lse[None] if one.lses is None else one.lses
            masses = torch.exp(lses - lse).nanmean(dim=(1, 2, 3)).tolist()
        steps.append(step.measured(one.usages, masses))
    seconds = sum(usage.seconds or 0.0 for one in found for usage in one.usages)
    return replace(plan, steps=tuple(steps), seconds=seconds)
