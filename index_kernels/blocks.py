"""attend_block: a block of a prompt's positions over a store of lists, which all positions of the block share.

The torch code is the specification, and with a kernel that reads the rows where they stand it serves GPUs; on the CPU
kernels do all of it.
"""

import time
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lists import APART, ASKING, MOST_LOGIT, MOST_ROWS, choose, held, row_places
from .ops import check_rows, resolve_backend
from .packed import floats
from .reference import by_head, by_position, softcapped
from .summaries import Levels, ListTable, Summaries

NEVER = -1e30


class BlockReading(NamedTuple):
    """How a block of a prompt reads a segmented store.

    Attributes:
        sealed: rows below stand in lists; all later ones up to a position's own are read exactly.
        n_sink: first rows of each batch row that are read exactly, and stand in no list.
        rows_read: rows of lists to read, for all KV heads of a batch row together; they share them by need.
        scale, softcap: of the logits.
        alpha, beta: see ListReading.
        tail: whether lists that are not read answer by their summary.
        halves: whether rows of lists and summaries may be multiplied as bfloat16 where a CPU does that faster. Sums are
            float32; a batch row all of whose rows are read is read as it stands.
    """

    sealed: int
    n_sink: int
    rows_read: int
    scale: float
    softcap: float | None
    alpha: float
    beta: float
    tail: bool
    halves: bool = False


class BlockAnswer(NamedTuple):
    """What attend_block returns.

    Attributes:
        out: ``[B, Hq, m, Dv]`` float32.
        lse: ``[B, Hq, m]``.
        lse_by_source: ``[3, B, Hq, m]``: sinks and newest rows, rows of lists, summaries; -inf for none.
        rows_read, lists_opened: all batch rows and KV heads together.
        summaries_read: summaries of lists, by which they are chosen, likewise.
        summaries_answering: summaries of lists and super-lists that stand for rows that are not read, likewise.
        seconds: time of each source; that of choosing lists is part of their rows'.
    """

    out: Tensor
    lse: Tensor
    lse_by_source: Tensor
    rows_read: int
    lists_opened: int
    summaries_read: int
    summaries_answering: int
    seconds: tuple[float, float, float]


class _Asking(NamedTuple):
    """Queries of a block by KV head, position after position.

    ``q [B, Hkv, m * G, D]``, scaled, and ``spread [B, Hkv, m * G]``, see Summaries.
    """

    q: Tensor
    spread: Tensor

    def some(self, group: int, *others: Tensor) -> list[Tensor]:
        """Of every ASKING-th position, what asks, and its part of ``others``."""
        m = self.q.shape[2] // group

        def of(rows: Tensor) -> Tensor:
            asked = rows.view(*rows.shape[:2], m, group, *rows.shape[3:])
            return asked[:, :, min(ASKING // 2, m - 1) :: ASKING].flatten(2, 3)

        return [of(rows) for rows in (*self, *others)]


# An answer so far: ``out [B, Hkv, m * G, Dv]`` and ``lse [B, Hkv, m * G]``, float32.
_State = tuple[Tensor, Tensor]


def attend_block(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: ListTable,
    how: BlockReading,
    *,
    start: Tensor,
    backend: str = "auto",
) -> BlockAnswer:
    """Causal attention of a block: sinks and newest rows exactly, rows of the lists that cost it most, summaries.

    Where it costs little, super-lists none of whose lists are opened answer for these.

    Args:
        query: ``[B, Hq, m, D]``, at the positions of the m newest rows, none of which stands in a list.
        keys, values: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, or packed; the rows before and of the block.
        table: the lists of rows ``0 .. how.sealed``.
        how: see BlockReading.
        start: int64 ``[B]``, first valid row of each batch row; all before the block.
        backend: "auto", "reference", "numba" or "triton".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or rows of the block in lists; states what was received.
    """
    check_rows(query, keys, values)
    heads, m = query.shape[1:3]
    kv_heads, first = keys.shape[1], keys.shape[2] - m
    if not 0 <= how.sealed <= first or bool((start > first).any()):
        raise ValueError(
            f"a block at rows {first} to {first + m} with {how.sealed} rows in lists, valid from {start.tolist()} on: "
            "expected all of them before the block"
        )
    chosen = resolve_backend(query, backend)
    if chosen == "numba":
        return BlockAnswer(*_fused().attend(query, keys, values, table, how, start))
    source = _RowsOnDevice if chosen == "triton" else _Rows
    return _attend(source(query, keys, values, heads // kv_heads, how), table, start)


def _attend(source: "_Rows", table: ListTable, start: Tensor) -> BlockAnswer:
    query, how, group = source.query, source.how, source.group
    m = query.shape[2]
    began, first = time.perf_counter(), source.keys.shape[2] - m
    levels = table.levels(query.device)
    lists = levels.lists
    q = by_position(query, source.keys.shape[1], how.scale)
    asking = _Asking(q, lists.spread(q))
    state = source.exact(asking, start, first)
    lses = [state[1], *torch.full((2, *state[1].shape), float("-inf"), device=query.device)]
    scanned = time.perf_counter()
    chosen, apart = _chosen(asking, state[1], levels, how, group)
    state, lses[1] = source.with_lists(asking, state, lists.those(chosen, means=False))
    opened, answering = time.perf_counter(), 0
    if how.tail:
        rest = _answering(levels, chosen, apart)
        answering = int((rest.size > 0).sum())
        state, lses[2] = source.with_summaries(asking, state, rest)
    done = time.perf_counter()
    return BlockAnswer(
        by_head(state[0], m),
        by_head(state[1], m),
        torch.stack([by_head(lse, m) for lse in lses]),
        int((lists.size * chosen).sum()),
        int(chosen.sum()),
        int((lists.size > 0).sum()),
        answering,
        (scanned - began, opened - scanned, done - opened),
    )


def _chosen(asking: _Asking, known: Tensor, levels: Levels, how: BlockReading, group: int) -> tuple[Tensor, Tensor]:
    """The lists to open, bool ``[B, Hkv, L]``: those whose rows, left unread, would cost the block most in all.

    And the super-lists ``[B, Hkv, S]`` whose lists answer for themselves: those with lists that are opened, and those
    where that saves much for each summary.
    """
    lists, supers, rows = levels.lists, levels.supers, how.rows_read
    if rows >= int(lists.size.sum(dim=(1, 2)).max()):
        return lists.size > 0, supers.size > 0
    q, spread, known = asking.some(group, known)
    some = _Asking(q, spread)
    weights = _weights(some, known, lists, how)
    share = (spread.sqrt() / (1 + weights.sum(dim=-1)))[:, :, None]
    costs = (share @ weights)[:, :, 0] * lists.variance.sqrt() * (lists.size > 0)
    per_row = costs / lists.size.clamp(min=1)
    chosen = choose(per_row.flatten(1), lists.size.flatten(1), rows).view_as(lists.size)

    def by_super(numbers: Tensor) -> Tensor:
        return torch.zeros_like(supers.variance).scatter_add_(2, levels.parent, numbers.float())

    whole = (share @ _weights(some, known, supers, how))[:, :, 0] * supers.variance.sqrt()
    saved, price = whole - by_super(costs), by_super(lists.size > 0) - 1
    least = per_row.masked_fill(~chosen, float("inf")).amin(dim=(1, 2), keepdim=True)
    apart = (by_super(chosen) > 0) | (supers.size > MOST_ROWS) | (saved > APART * least * price)
    return chosen, apart & (supers.size > 0)


def _answering(levels: Levels, chosen: Tensor, apart: Tensor) -> Summaries:
    """What stands for lists not ``chosen``: they themselves where their super-list is ``apart``, else that."""
    lists, supers = levels.lists, levels.supers
    left = ~chosen & (lists.size > 0) & apart.gather(2, levels.parent)
    return levels.both.those(torch.cat([left, ~apart & (supers.size > 0)], dim=2))


def _logits(asking: _Asking, lists: Summaries, how: BlockReading) -> Tensor:
    """Log of the weight of all rows of each list for each query, ``[B, Hkv, m * G, L]``; see summary_logits."""
    logits = softcapped(asking.q @ lists.key.transpose(2, 3), how.softcap)
    scatter = asking.spread[..., None] * lists.variance[:, :, None]
    if how.softcap is not None:
        scatter = scatter * (1 - (logits / how.softcap) ** 2) ** 2
    return logits + how.alpha * held(scatter) + _log(lists.size)[:, :, None]


def _weights(asking: _Asking, known: Tensor, lists: Summaries, how: BlockReading) -> Tensor:
    """Weights of lists beside what is ``known [B, Hkv, m * G]``, ``[B, Hkv, m * G, L]``."""
    return _logits(asking, lists, how).sub_(known[..., None]).clamp_(max=MOST_LOGIT).exp_()


def _log(size: Tensor) -> Tensor:
    return size.float().log().clamp(min=NEVER)


class _Rows:
    """The sources of a block in torch: all logits as they stand."""

    def __init__(self, query: Tensor, keys: Tensor, values: Tensor, group: int, how: BlockReading) -> None:
        self.query, self.keys, self.values, self.group, self.how = query, keys, values, group, how

    def exact(self, asking: _Asking, start: Tensor, first: int) -> _State:
        """Sinks and newest rows, causal."""
        length, device = self.keys.shape[2], start.device
        sinks = start[:, None] + torch.arange(self.how.n_sink, device=device)
        newest = torch.arange(self.how.sealed, length, device=device).expand(len(start), -1)
        kept = torch.cat([sinks < first, newest >= (start + self.how.n_sink).clamp(max=first)[:, None]], dim=1)
        places = torch.cat([sinks, newest], dim=1).masked_fill(~kept, -1)[:, None].expand(-1, self.keys.shape[1], -1)
        return self._rows(asking, places, torch.arange(first, length, device=device).repeat_interleave(self.group))

    def with_lists(self, asking: _Asking, state: _State, opened: Summaries) -> tuple[_State, Tensor]:
        """The state with the rows of the lists opened, and their log-sum-exp."""
        runs = [row_places(*run) for run in zip(opened.begin.flatten(0, 1), opened.size.flatten(0, 1), strict=True)]
        places = torch.nn.utils.rnn.pad_sequence(runs, batch_first=True, padding_value=-1)
        own = self._rows(asking, places.view(*opened.size.shape[:2], -1), None)
        return _merged(state, own), own[1]

    def with_summaries(self, asking: _Asking, state: _State, lists: Summaries) -> tuple[_State, Tensor]:
        """The state with the summaries of lists, and their log-sum-exp."""
        logits = _logits(asking, lists, self.how).masked_fill((lists.size == 0)[:, :, None], float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse[..., None]).nan_to_num()
        tilt = weights @ lists.variance[..., None]
        out = weights @ lists.value + self.how.beta * tilt * (asking.q @ lists.cross)
        return _merged(state, (out, lse)), lse

    def _rows(self, asking: _Asking, places: Tensor, at: Tensor | None) -> _State:
        """The rows at ``places [B, Hkv, n]``, -1 for none, up to the queries' positions ``at``; None: all before."""
        keys, values = (
            floats(rows.gather(2, places.clamp(min=0)[..., None].expand(-1, -1, -1, rows.shape[3]))).float()
            for rows in (self.keys, self.values)
        )
        seen = (places >= 0)[:, :, None]
        if at is not None:
            seen = seen & (places[:, :, None] <= at[:, None])
        logits = softcapped(asking.q @ keys.transpose(2, 3), self.how.softcap).masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        return torch.exp(logits - lse[..., None]).nan_to_num() @ values, lse


class _RowsOnDevice(_Rows):
    """Rows are read by a Triton kernel, where they stand and always causal; summaries are answered by in torch."""

    def _rows(self, asking: _Asking, places: Tensor, at: Tensor | None) -> _State:
        how, kernels = self.how, import_module("index_kernels._triton_blocks")
        found: _State = kernels.attend_places(
            self.query, self.keys, self.values, places, scale=how.scale, softcap=how.softcap
        )
        return found


@cache
def multiplies_halves() -> bool:
    """Whether this processor multiplies bfloat16 faster: see BlockReading."""
    return bool(import_module("index_kernels._cpu_halves").FASTER)


@cache
def _fused() -> Any:
    """The CPU kernels, imported when first needed."""
    return import_module("index_kernels._cpu_blocks")


def _merged(one: _State, other: _State) -> _State:
    """Two states as one; the first is never empty."""
    lse = torch.logaddexp(one[1], other[1])
    out = one[0] * torch.exp(one[1] - lse)[..., None]
    return out.addcmul_(other[0], torch.exp(other[1] - lse)[..., None]), lse
