"""attend_block: a block of a prompt's positions over a store of lists, which all positions of the block share.

A summary enters as a row of one more virtual table: its key is the mean key with the list's variance and the log of its
size behind it, where a query has what multiplies them; its value the mean value with the variance behind it, whose mean
is the tilt. So rows and summaries are read by the same matrix products. On the CPU torch's own flash attention makes
them and tells the log-sum-exp; elsewhere, and under a softcap, the logits are made as they stand here.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lists import choose, row_places
from .ops import check_rows
from .packed import floats
from .reference import empty_state, softcapped
from .summaries import ListTable, Summaries

# Lists are chosen by what every so many-th position of a block would lose: to ask all of them changes nothing.
ASKING = 8
# Weights of lists are taken beside that of the rows read anyway, and no larger than e to this.
MOST_LOGIT = 60.0
NEVER = -1e30
# So many of a block's own rows are scanned in causal order at once.
OWN = 256
_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class BlockReading(NamedTuple):
    """How a block of a prompt reads a segmented store.

    Attributes:
        sealed: rows below stand in lists; all later ones up to a position's own are read exactly.
        n_sink: first rows of each batch row that are read exactly, and stand in no list.
        rows_read: rows of lists to read, for all KV heads of a batch row together; they share them by need.
        scale, softcap: of the logits.
        alpha, beta: see ListReading.
        tail: whether lists that are not read answer by their summary.
    """

    sealed: int
    n_sink: int
    rows_read: int
    scale: float
    softcap: float | None
    alpha: float
    beta: float
    tail: bool


class BlockAnswer(NamedTuple):
    """What attend_block returns.

    Attributes:
        out: ``[B, Hq, m, Dv]`` float32.
        lse: ``[B, Hq, m]``.
        lse_by_source: ``[3, B, Hq, m]``: sinks and newest rows, rows of lists, summaries; -inf for none.
        rows_read, lists_opened, summaries_read: all batch rows and KV heads together.
        seconds: time of each source; that of choosing lists is part of their rows'.
    """

    out: Tensor
    lse: Tensor
    lse_by_source: Tensor
    rows_read: int
    lists_opened: int
    summaries_read: int
    seconds: tuple[float, float, float]


class _Asking(NamedTuple):
    """Queries of a block by KV head: ``q [B, Hkv, G * m, D]``, scaled, and ``spread [B, Hkv, G * m]``."""

    q: Tensor
    spread: Tensor


class _Rows(NamedTuple):
    """A virtual table ``[B, Hkv, N, ...]``: keys, values, variances (0 for a row) and log-weights (NEVER: no row)."""

    key: Tensor
    value: Tensor
    variance: Tensor
    log_size: Tensor


def attend_block(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: ListTable,
    how: BlockReading,
    *,
    start: Tensor,
) -> BlockAnswer:
    """Causal attention of a block: sinks and newest rows exactly, rows of the lists that cost it most, summaries.

    Args:
        query: ``[B, Hq, m, D]``, at the positions of the m newest rows, none of which stands in a list.
        keys, values: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, or packed; the rows before and of the block.
        table: the lists of rows ``0 .. how.sealed``.
        how: see BlockReading.
        start: int64 ``[B]``, first valid row of each batch row; all before the block.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or rows of the block in lists; states what was received.
    """
    check_rows(query, keys, values)
    batch, heads, m, dim = query.shape
    kv_heads, first = keys.shape[1], keys.shape[2] - m
    if not 0 <= how.sealed <= first or bool((start > first).any()):
        raise ValueError(
            f"a block at rows {first} to {first + m} with {how.sealed} rows in lists, valid from {start.tolist()} on: "
            "expected all of them before the block"
        )
    began = time.perf_counter()
    lists = table.levels(query.device).lists
    q = lists.grouped(query, how.scale).reshape(batch, kv_heads, -1, dim)
    asking = _Asking(q, lists.spread(q))
    grouped = batch, kv_heads, -1
    own = _own_rows(query, keys[:, :, first:], values[:, :, first:], how)
    exact = _merged(
        (own[0].reshape(*grouped, own[0].shape[3]), own[1].reshape(grouped)),
        _state(asking, _exact_rows(keys, values, how, start, first), how),
    )
    scanned = time.perf_counter()
    chosen = _chosen(asking, exact[1], lists, how, m)
    out, lse = exact[0], exact[1].clone()
    lses = torch.stack([exact[1], *torch.full((2, *lse.shape), float("-inf"), device=lse.device)])
    of_summaries = 0.0
    for b in range(batch):
        for h in range(kv_heads):
            # Heads one by one: each reads as many rows as it needs.
            one, opened = (slice(b, b + 1), slice(h, h + 1)), chosen[b, h]
            ours = _Asking(*(part[one] for part in asking))
            rows = _opened_rows(keys[one], values[one], lists.begin[b, h][opened], lists.size[b, h][opened])
            states = [_state(ours, rows, how)]
            if how.tail:
                began_tail = time.perf_counter()
                rest = _summary_rows(lists, b, h, ~opened & (lists.size[b, h] > 0))
                states.append(_state(ours, rest, how, lists.cross[one]))
                of_summaries += time.perf_counter() - began_tail
            for i, state in enumerate(states, 1):
                lses[i][one] = state[1]
                out[one], lse[one] = _merged((out[one], lse[one]), state)
    done = time.perf_counter()
    used = lists.size > 0
    return BlockAnswer(
        out.reshape(batch, heads, m, -1),
        lse.reshape(batch, heads, m),
        lses.view(3, batch, heads, m),
        int((lists.size * chosen).sum()),
        int(chosen.sum()),
        int(used.sum()),
        (scanned - began, done - scanned - of_summaries, of_summaries),
    )


def _own_rows(query: Tensor, keys: Tensor, values: Tensor, how: BlockReading) -> tuple[Tensor, Tensor]:
    """The state ``(out [B, Hq, m, Dv], lse [B, Hq, m])`` of the block's own rows, causal."""
    batch, heads, m, dim = query.shape
    group = heads // keys.shape[1]
    if m > OWN and m % 2 == 0:
        # The later half sees the earlier one whole: a causal scan of both would make a third more products.
        early, late = slice(0, m // 2), slice(m // 2, m)
        halves = [_own_rows(query[:, :, i], keys[:, :, i], values[:, :, i], how) for i in (early, late)]
        none = torch.zeros((batch, keys.shape[1], m // 2), device=query.device)
        key, value = (floats(rows[:, :, early]).float() for rows in (keys, values))
        before = _Rows(key, value, none, none)
        q = (query[:, :, late].float() * how.scale).reshape(batch, keys.shape[1], -1, dim)
        asking = _Asking(q, torch.zeros_like(q[..., 0]))
        out, lse = (part.view(batch, heads, m // 2, *part.shape[3:]) for part in _state(asking, before, how))
        halves[1] = _merged(halves[1], (out, lse))
        return torch.cat([out for out, _ in halves], dim=2), torch.cat([lse for _, lse in halves], dim=2)
    key, value = (floats(rows).float().repeat_interleave(group, dim=1) for rows in (keys, values))
    if _is_flash(query, how) and value.shape[3] == dim:
        out, lse = _FLASH(query.float(), key, value, 0.0, True, scale=how.scale)
        return out, lse
    logits = softcapped(query.float() @ key.transpose(2, 3) * how.scale, how.softcap)
    logits = logits.masked_fill(torch.ones(m, m, dtype=torch.bool, device=query.device).triu(1), float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits - lse[..., None]) @ value, lse


def _exact_rows(keys: Tensor, values: Tensor, how: BlockReading, start: Tensor, first: int) -> _Rows:
    """Sinks, and the rows from ``sealed`` up to the block."""
    device = keys.device
    sinks = start[:, None] + torch.arange(how.n_sink, device=device)
    newest = torch.arange(how.sealed, first, device=device).expand(len(start), -1)
    places = torch.cat([sinks, newest], dim=1)
    hidden = torch.cat([sinks >= first, newest < (start + how.n_sink)[:, None]], dim=1)
    places = places.clamp(max=max(first - 1, 0))[:, None].expand(-1, keys.shape[1], -1)
    return _rows_at(keys, values, places, hidden[:, None].expand_as(places))


def _rows_at(keys: Tensor, values: Tensor, places: Tensor, hidden: Tensor) -> _Rows:
    """The rows at ``places [B, Hkv, n]``, those ``hidden`` (bool) without weight."""

    def taken(rows: Tensor) -> Tensor:
        found = [
            torch.stack([rows[b, h].index_select(0, places[b, h]) for h in range(rows.shape[1])])
            for b in range(len(rows))
        ]
        return floats(torch.stack(found)).float()

    none = torch.zeros(places.shape, device=keys.device)
    return _Rows(taken(keys), taken(values), none, none.masked_fill(hidden, NEVER))


def _chosen(asking: _Asking, known: Tensor, lists: Summaries, how: BlockReading, m: int) -> Tensor:
    """The lists to open, bool ``[B, Hkv, L]``: those whose rows, left unread, would cost the block most in all."""
    if how.rows_read >= int(lists.size.sum(dim=(1, 2)).max()):
        return lists.size > 0

    def some(of_all: Tensor) -> Tensor:
        by_position = of_all.view(*of_all.shape[:2], -1, m, *of_all.shape[3:])
        return by_position[:, :, :, min(ASKING // 2, m - 1) :: ASKING].flatten(2, 3)

    few = _Asking(some(asking.q), some(asking.spread))
    summaries = _Rows(lists.key, lists.value[..., :0], lists.variance, _log(lists.size))
    weights: Tensor = _logits(few, summaries, how).sub_(some(known)[..., None]).clamp_(max=MOST_LOGIT).exp_()
    total = 1 + weights.sum(dim=-1)
    costs: Tensor = ((few.spread.sqrt() / total)[:, :, None] @ weights)[:, :, 0]
    costs = costs * lists.variance.sqrt() / lists.size.clamp(min=1)
    return choose(costs.flatten(1), lists.size.flatten(1), how.rows_read).view_as(lists.size)


def _log(size: Tensor) -> Tensor:
    return size.float().log().clamp(min=NEVER)


def _opened_rows(keys: Tensor, values: Tensor, begin: Tensor, size: Tensor) -> _Rows:
    """The rows of lists ``begin .. begin + size`` (``[L]`` each) of one head; keys, values ``[1, 1, T, ...]``."""
    places = row_places(begin, size)[None, None]
    return _rows_at(keys, values, places, torch.zeros_like(places, dtype=torch.bool))


def _summary_rows(lists: Summaries, b: int, h: int, left: Tensor) -> _Rows:
    """The summaries of the lists that are ``left`` (bool ``[L]``) in one head."""
    key, value, variance, size = (
        part[b, h][left][None, None] for part in (lists.key, lists.value, lists.variance, lists.size)
    )
    return _Rows(key, value, variance, _log(size))


def _state(asking: _Asking, rows: _Rows, how: BlockReading, cross: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The state ``(out [B, Hkv, G * m, Dv], lse [B, Hkv, G * m])``; with ``cross`` values are tilted."""
    q, dim, value_dim = asking.q, rows.key.shape[3], rows.value.shape[3]
    if not rows.key.shape[2]:
        out, lse = empty_state(q, value_dim)
        return out, lse
    if _is_flash(q, how):
        plain = cross is None and value_dim == dim and not bool((rows.log_size != 0).any())
        width = dim if plain else -(-max(dim + 2, value_dim + 1) // 8) * 8
        key, value = (_widened(part, width) for part in (rows.key, rows.value))
        wide = _widened(q, width)
        if not plain:
            wide[..., dim], wide[..., dim + 1] = how.alpha * asking.spread, 1.0
            key[..., dim], key[..., dim + 1] = rows.variance, rows.log_size
            value[..., value_dim] = rows.variance
        found, lse = _FLASH(wide, key, value, 0.0, False, scale=1.0)
        out = found[..., :value_dim]
        tilt = found[..., value_dim : value_dim + 1] if not plain else None
    else:
        logits = _logits(asking, rows, how)
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse[..., None])
        out = weights @ rows.value
        tilt = weights @ rows.variance[..., None]
    if cross is not None and tilt is not None:
        out = out + how.beta * tilt * (q @ cross)
    # Where nothing has weight, the state is empty.
    return out, lse.masked_fill(lse < NEVER / 2, float("-inf"))


def _logits(asking: _Asking, rows: _Rows, how: BlockReading) -> Tensor:
    """Log of the weights of a virtual table's rows for each query, ``[B, Hkv, G * m, N]``; see summary_logits."""
    if how.softcap is None:
        wide = torch.cat([asking.q, how.alpha * asking.spread[..., None], torch.ones_like(asking.q[..., :1])], dim=-1)
        return wide @ torch.cat([rows.key, rows.variance[..., None], rows.log_size[..., None]], dim=-1).transpose(2, 3)
    logits = softcapped(asking.q @ rows.key.transpose(2, 3), how.softcap)
    slope = 1 - (logits / how.softcap) ** 2
    more = how.alpha * asking.spread[..., None] * rows.variance[:, :, None]
    return logits + more * slope**2 + rows.log_size[:, :, None]


def _widened(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[3])) if width > rows.shape[3] else rows


def _is_flash(query: Tensor, how: BlockReading) -> bool:
    return _FLASH is not None and query.device.type == "cpu" and how.softcap is None


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two states as one; the first is never empty."""
    lse = torch.logaddexp(one[1], other[1])
    out = one[0] * torch.exp(one[1] - lse)[..., None]
    return out.addcmul_(other[0], torch.exp(other[1] - lse)[..., None]), lse
