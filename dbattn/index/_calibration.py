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
from ..query.usage import Needs
from ._list_scan import budget, default_rows_read

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
    return Question(rows, config.target_error, call.scale, call.softcap, config.n_sink, tail)


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
    counted = known.to(device)[:, None].expand(-1, queries.shape[1], -1)

    def error(read: int) -> float:
        how = budget(asked.rows, read).reading(call, asked.rows, asked.rows, tail=asked.tail)
        outs = [
            attend_segmented(
                queries[:, :, i : i + 1], *store.buffers, table, how, start=store.start, by_code=store.host
            ).out
            for i in range(queries.shape[2])
        ]
        found: Tensor = relative_error(torch.cat(outs, dim=2), dense)
        return float(found[counted].mean())

    by_size, most = default_rows_read(asked.rows), asked.rows // 2
    read, expected = solve(error, min(by_size, most), asked.target, most)
    return Needs(read, expected, asked.target, asked.rows)


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
