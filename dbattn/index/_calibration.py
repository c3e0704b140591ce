"""Calibration: how many rows a store's queries need for an error, found by audits of a sample of them.

The leading segments are read as if they were all there is, by queries of the sample that asked shortly before they end;
their answers are compared with a dense scan of the same rows. So what is found is a function of these rows and queries
alone. The newest rows, which a call reads besides, compete for the budget here. (With a budget larger by a window,
errors of answers were up to 1.9 times what was expected, in twelve layers of three models; 1.6 times without.)

Audits may raise the budget by size and not lower it: what is asked next is not always like what was asked before.
(Where they could halve it, layers of Qwen2.5-Coder were four times as far off as was expected.)
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from index_kernels import ListTable, attend_segmented

from ..dense import masked_attention
from ..metrics import relative_error
from ..query.call import Call
from ..query.ladder import COVERED
from ..query.usage import Needs
from ._list_scan import budget, default_rows_read, unread_share

# Queries audited, and the least that are worth it.
QUERIES, LEAST_QUERIES = 24, 8
# Least rows in the leading segments.
LEAST_ROWS = 1024
# A segment leads while it has this share of all rows.
LEADS = 1 / 4
# Budgets tried; those whose error is within a factor of NEAR of the target end the search.
TRIES, NEAR = 4, 1.1
# Error falls with rows to about this power, until two budgets tell it better.
POWER = 1.0
# Answers come after the queries that were sampled, and are further off by so much: 1.21 in the geometric mean of twelve
# layers of three models (0.87 to 1.61), 1.26 in those of Qwen2.5-Coder alone and 1.11 in the others.
LATER = 1.2
# Shares not read are taken to be no less.
LEAST_SHARE = 1e-6
# Budgets are of so many sizes an octave: what differs by rounding alone gives the same.
SIZES = 8


class Question(NamedTuple):
    """What is audited: a change of any asks for new audits."""

    rows: int
    target: float
    scale: float
    softcap: float | None
    n_sink: int
    tail: bool
    bounded: bool


def question_of(call: Call, bounds: list[int]) -> Question | None:
    """What there is to audit for calls like this one, over segments that end at ``bounds``; None: nothing."""
    config = call.config
    if not config.finds_budget or call.store.sample is None:
        return None
    assert config.target_error is not None
    given = call.store.sample.given_rows
    # Queries given to analyze asked all rows that were there.
    rows = max(
        (stop for first, stop in pairwise(bounds) if stop <= given or stop - first >= LEADS * bounds[-1]), default=0
    )
    if rows < LEAST_ROWS:
        return None
    tail = config.tail_name == "centroid"
    bounded = config.max_error is not None
    return Question(rows, config.target_error, call.scale, call.softcap, config.n_sink, tail, bounded)


def calibrate(call: Call, asked: Question, table: ListTable) -> Needs | None:
    """Rows per KV head that ``asked.rows`` rows in lists (all of ``table``) need; None where queries are missing."""
    store = call.store
    assert store.sample is not None
    queries, known = store.sample.latest(asked.rows, store.start, QUERIES)
    if int(known.sum(dim=1).min()) < LEAST_QUERIES:
        return None
    device = store.start.device
    queries = store.turn(queries.to(device))
    visible = torch.arange(asked.rows, device=device) >= store.start[:, None]
    keys, values = (rows[:, :, : asked.rows] for rows in store.rows)
    mask = visible[:, None, None] if store.has_padding else None
    dense, _ = masked_attention(queries, keys, values, mask, scale=asked.scale, softcap=asked.softcap)
    known = known.to(device)

    def audit(read: int, head_weights: tuple[float, ...] = ()) -> Audited:
        how = budget(asked.rows, read).reading(call, asked.rows, asked.rows, tail=asked.tail, head_weights=head_weights)
        found = [
            attend_segmented(
                queries[:, :, i : i + 1], *store.buffers, table, how, start=store.start, by_code=store.host
            )
            for i in range(queries.shape[2])
        ]
        out, lse = (torch.cat([getattr(one, name) for one in found], dim=2) for name in ("out", "lse"))
        unread = unread_share(torch.cat([one.lse_by_source for one in found], dim=3), lse)
        return Audited(*(part.movedim(1, 2)[known] for part in (relative_error(out, dense), unread, out.norm(dim=-1))))

    most = asked.rows // 2
    by_size = min(default_rows_read(asked.rows), most)
    weights = audit(by_size).head_weights(of_worst=asked.bounded)
    tried: dict[int, Audited] = {}

    def error(read: int) -> float:
        tried[read] = audit(read, weights)
        return LATER * float(tried[read].error.mean())

    read, expected = solve(error, by_size, asked.target, most)
    return Needs(read, expected, asked.target, asked.rows, weights, tried.get(read, tried[by_size]).factors)


class Audited(NamedTuple):
    """What sampled queries got, ``[queries, Hq]`` each: relative error, share not read, and norm of their answers."""

    error: Tensor
    unread: Tensor
    norm: Tensor

    def head_weights(self, *, of_worst: bool) -> tuple[float, ...]:
        """Of each head, the root of its error over its share not read, mean 1; ``of_worst``: times its error.

        Where heads share rows, the error of one that errs twice as much for a share falls twice as fast with each row
        read for it. The root, since a few queries tell little of a head: in eight layers of three models it lowers
        errors by up to an eighth (of the 95th percentile by up to a quarter) and raises none by more than a 50th; the
        ratio itself raised the 95th percentile of one by a sixth. Under ``max_error`` the worst head counts, not the
        mean: there ``of_worst`` saves up to a sixth of the bytes, where otherwise it raises the mean error.
        """
        error = self.error.mean(dim=0)
        ratio = error / self.unread.mean(dim=0).clamp(min=LEAST_SHARE)
        pull = (ratio * error if of_worst else ratio).sqrt().nan_to_num(1.0)
        weights: list[float] = (pull / pull.mean().clamp(min=LEAST_SHARE)).tolist()
        return tuple(weights)

    @property
    def factors(self) -> tuple[float, ...]:
        """Of each head, the error over what it is estimated from that most of its queries do not exceed."""
        ratio = self.error * self.norm / self.unread.clamp(min=LEAST_SHARE)
        factors: list[float] = ratio.quantile(COVERED, dim=0, interpolation="higher").tolist()
        return tuple(factors)


def solve(error: Callable[[int], float], least: int, target: float, most: int) -> tuple[int, float]:
    """The budget from ``least`` to ``most`` at which ``error`` is about ``target``, and the error there.

    Budgets are tried from ``least`` on; in between, error is taken for a power of the budget.
    """
    tried: dict[int, float] = {}
    read = least
    while read not in tried and len(tried) < TRIES:
        tried[read] = max(error(read), 1e-9)
        if abs(math.log(tried[read] / target)) < math.log(NEAR) or tried[least] < target:
            break
        x, y, power = _law(tried, target)
        # No more than two octaves from what is known.
        step = (y - math.log(target)) / power
        read = _rounded(math.exp(x + min(max(step, -math.log(4)), math.log(4))), least, most)
    x, y, power = _law(tried, target)
    return read, tried.get(read, math.exp(y - power * (math.log(read) - x)))


def _law(tried: dict[int, float], target: float) -> tuple[float, float, float]:
    """Log budget and log error of the try nearest to the target, and the power by which error falls from there."""
    goal = math.log(target)
    points = sorted(
        ((math.log(read), math.log(error)) for read, error in tried.items()), key=lambda p: abs(p[1] - goal)
    )
    (x, y), *others = points
    if not others:
        return x, y, POWER
    # What is on the other side of the target tells more than what is near.
    other = next((p for p in others if (p[1] - goal) * (y - goal) < 0), others[0])
    return x, y, min(max((y - other[1]) / (other[0] - x), POWER / 3), 3 * POWER)


def _rounded(read: float, least: int, most: int) -> int:
    size = round(2 ** (round(SIZES * math.log2(max(read, 1.0))) / SIZES))
    return max(least, min(size, most))
