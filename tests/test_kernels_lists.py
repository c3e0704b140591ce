"""The list operators against attention over rows: they are what attend_segmented is specified by."""

from dataclasses import replace

import pytest
import torch
from test_kernels import assert_close, assert_same_state, rng, rows_of

from index_kernels import Summaries, attend_rows, lists
from index_kernels.codes import score_codes
from index_kernels.packed import code_rows

NEG_INF = float("-inf")


def stored(batch, kv_heads, group, count, dim, value_dim, dtype, unused=0.2):
    """A query, rows in lists of 1 to 4, and their summaries: means at random, strided, zeros in unused lists."""
    size = torch.randint(1, 5, (batch, kv_heads, count), generator=rng(1))
    size[torch.rand(size.shape, generator=rng(2)) < unused] = 0
    used = size > 0
    length = int(size.sum(dim=-1).max())
    root = torch.randn(batch, kv_heads, dim, dim, generator=rng(3))
    shape = root @ root.mT
    summaries = Summaries(
        begin=size.cumsum(dim=-1) - size,
        size=size,
        key=rows_of(kv_heads, count, dim, batch=batch, seed=4).mul_(used[..., None]),
        value=rows_of(kv_heads, count, value_dim, batch=batch, seed=5).mul_(used[..., None]),
        variance=rows_of(kv_heads, count, 1, batch=batch, seed=6)[..., 0].abs_().mul_(used),
        shape=shape / shape.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None],
        cross=torch.randn(batch, kv_heads, dim, value_dim, generator=rng(7)),
    )
    query = torch.randn(batch, kv_heads * group, 1, dim, generator=rng(8)).to(dtype)
    keys, values = (rows_of(kv_heads, length, d, dtype, batch, seed=d) for d in (dim, value_dim))
    return query, keys, values, summaries


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lists_of_one_row_answer_like_their_rows(softcap):
    query, _, _, summaries = stored(2, 2, 3, 40, 16, 24, torch.float32, unused=0.0)
    summaries = replace(summaries, size=torch.ones_like(summaries.size), variance=torch.zeros(2, 2, 40))
    logits, _ = lists.summary_logits(query, summaries, scale=0.3, softcap=softcap, alpha=0.4)
    nothing = torch.zeros(2, 2, 40, dtype=torch.bool)
    got = lists.attend_summaries(query, summaries, nothing, logits, scale=0.3, beta=0.7)
    every = torch.tensor([0, 40]).expand(2, 6, 1, 1, 2)
    rows = summaries.key, summaries.value
    assert_same_state(got, attend_rows(query, *rows, ranges=every, scale=0.3, softcap=softcap, backend="reference"))


def test_a_summary_knows_the_moments_of_its_rows():
    """One list of 30 rows: the lift is the variance of their logits, the tilt their covariance with the values."""
    keys, values = rows_of(1, 30, 16, batch=1), rows_of(1, 30, 8, batch=1, seed=1)
    query = torch.randn(1, 3, 1, 16, generator=rng(2))
    means = [rows.mean(dim=2, keepdim=True) for rows in (keys, values)]
    around = keys - means[0]
    variance = (around**2).sum(dim=3).mean(dim=2, keepdim=True)
    shape, cross = (around.mT @ other / 30 / variance[..., None] for other in (around, values - means[1]))
    begin, size = torch.zeros(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 30)
    summaries = Summaries(begin, size, *means, variance, shape, cross)
    row_logits = 0.3 * query @ keys.mT
    logits, spread = lists.summary_logits(query, summaries, scale=0.3, softcap=None, alpha=0.5)
    spreads = row_logits.var(dim=3, correction=0)
    assert_close(spread * variance[0, 0], spreads[..., 0])
    assert_close(logits, row_logits.mean(dim=3) + 0.5 * spreads)
    nothing = torch.zeros(1, 1, 1, dtype=torch.bool)
    out, lse = lists.attend_summaries(query, summaries, nothing, logits, scale=0.3, beta=1.0)
    covariance = (row_logits - row_logits.mean(dim=3, keepdim=True)) @ (values - means[1]) / 30
    assert_same_state((out, lse), (means[1] + covariance, logits + torch.tensor(30.0).log()))


def test_a_summary_weighs_no_more_than_the_largest_of_its_rows_may():
    """Of 32 Gaussian logits, however far they scatter, the mean weight is about that of the largest over 32."""
    draws = torch.randn(2000, 32, generator=rng(3), dtype=torch.float64)
    for deviation in (0.5, 1.0, 8.0, 30.0):
        typical = (torch.logsumexp(deviation * draws, dim=1) - torch.tensor(32.0).log()).mean()
        lift = 0.5 * lists.held(torch.tensor(deviation**2))
        assert abs(float(lift - typical)) < 0.1 + 0.35 * float(typical)
    around = torch.tensor([lists.FREEZES - 1e-4, lists.FREEZES + 1e-4])
    assert abs(float(lists.held(around).diff())) < 1e-3


def test_large_queries_do_not_make_the_rounding_of_codes_into_weight():
    """One list around 0 of rows that matter little: their coded weight is theirs, not that of what was rounded."""
    keys = 0.1 * rows_of(1, 500, 16, batch=1)
    keys[..., 0] = torch.where(rows_of(1, 500, 1, batch=1, seed=1)[..., 0] > 0, 7.0, -7.0)
    query = 9 * torch.randn(1, 4, 1, 16, generator=rng(2))
    query[..., 0] = 0
    one = torch.ones(1, 1, 1, dtype=torch.int64)
    zeros = torch.zeros(1, 1, 1, 16)
    summaries = Summaries(0 * one, 500 * one, zeros, zeros, zeros[..., 0], zeros.mT * zeros, zeros.mT * zeros)
    found = score_codes(query, summaries, one > 0, code_rows(keys), scale=1.0, softcap=None)
    wanted = torch.logsumexp(query @ keys.mT, dim=-1)
    assert float((torch.logsumexp(found.logits, dim=-1).view_as(wanted) - wanted).abs().max()) < 1.5


@pytest.mark.parametrize(("count", "unused"), [(0, 0.0), (5, 1.1)], ids=["no lists", "all unused"])
def test_no_lists_give_the_neutral_states(count, unused):
    query, _, _, summaries = stored(1, 2, 2, max(count, 1), 16, 8, torch.float32, unused)
    if count == 0:
        per_list = ("begin", "size", "key", "value", "variance")
        summaries = replace(summaries, **{name: getattr(summaries, name)[:, :, :0] for name in per_list})
    keys, values = rows_of(2, 9, 16, batch=1), rows_of(2, 9, 8, batch=1)
    logits, spread = lists.summary_logits(query, summaries, scale=0.3, softcap=None, alpha=0.4)
    assert torch.equal(logits, torch.full((1, 4, count), NEG_INF))
    known = torch.full((1, 4), NEG_INF)
    assert torch.equal(lists.list_costs(logits, spread, summaries, known), torch.zeros(1, 2, count))
    chosen = lists.probe_lists(logits, spread, summaries, known, 100)
    assert not chosen.any()
    options = {"scale": 0.3, "softcap": None, "beta": 0.7, "tail": True}
    outs, lses = lists.attend_lists(query, keys, values, summaries, chosen, logits, **options)
    assert torch.equal(outs, torch.zeros(2, 1, 4, 1, 8))
    assert torch.equal(lses, torch.full((2, 1, 4, 1), NEG_INF))
