"""The list operators: Triton against the torch specification, and both against attention over rows.

Triton runs under its interpreter in a process of its own, as in test_kernels.py.
"""

import io
from dataclasses import replace

import pytest
import torch
from test_kernels import assert_close, assert_same_state, interpreter, rng, rows_of  # noqa: F401 (a fixture)

from index_kernels import Summaries, attend_rows, lists

pytest.importorskip("triton")

NEG_INF = float("-inf")


def _interpret(payload):
    op, args, kwargs = torch.load(io.BytesIO(payload), weights_only=False)
    return getattr(lists, op)(*args, **kwargs)


@pytest.fixture
def run(request):
    """Runs a list operator on a backend, wherever that backend can run."""

    def run(backend, op, *args, **kwargs):
        kwargs["backend"] = backend
        if backend != "triton":
            return getattr(lists, op)(*args, **kwargs)
        buffer = io.BytesIO()
        torch.save((op, args, kwargs), buffer)
        return request.getfixturevalue("interpreter").submit(_interpret, buffer.getvalue()).result()

    return run


# batch, KV heads, group, lists, D, Dv, dtype of query and rows, softcap
SHAPES = [
    (1, 1, 1, 1, 64, 64, torch.float32, None),
    (2, 2, 3, 7, 64, 96, torch.float16, 5.0),
    (1, 2, 4, 300, 96, 64, torch.bfloat16, None),
    (2, 1, 3, 300, 64, 96, torch.float32, 5.0),
    (1, 1, 1, 2500, 13, 5, torch.float32, 2.0),  # several blocks of every kernel, and splits to merge
]


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


def poisoned(summaries):
    """The same with NaN wherever nothing should be read."""
    gone = summaries.size == 0
    means = {name: getattr(summaries, name).masked_fill(gone[..., None], float("nan")) for name in ("key", "value")}
    return replace(summaries, **means, variance=summaries.variance.masked_fill(gone, float("nan")))


@pytest.mark.parametrize("shape", SHAPES)
def test_summary_logits_equal_the_specification(run, shape):
    query, _, _, summaries = stored(*shape[:-1])
    options = {"scale": 0.3, "softcap": shape[-1], "alpha": 0.4}
    wanted = run("reference", "summary_logits", query, summaries, **options)
    got = run("triton", "summary_logits", query, poisoned(summaries), **options)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs)
    unused = (summaries.size == 0).repeat_interleave(shape[2], dim=1)
    assert torch.equal(got[0] == NEG_INF, unused)


@pytest.mark.parametrize("shape", SHAPES)
def test_probing_equals_the_specification(run, shape):
    query, _, _, summaries = stored(*shape[:-1])
    logits, spread = run("reference", "summary_logits", query, summaries, scale=0.3, softcap=shape[-1], alpha=0.4)
    known = torch.randn(query.shape[:2], generator=rng(9)) + 3
    known[:, 0] = NEG_INF
    costs = run("triton", "list_costs", logits, spread, poisoned(summaries), known)
    assert_close(costs, run("reference", "list_costs", logits, spread, summaries, known))
    rows = int(summaries.size.sum(dim=(1, 2)).min())
    for budget in (0, rows // 3, 2 * rows):
        chosen = run("triton", "probe_lists", logits, spread, summaries, known, budget)
        wanted = run("reference", "probe_lists", logits, spread, summaries, known, budget)
        assert torch.equal(chosen, wanted), "the costs of these seeds are further apart than rounding"
        assert ((summaries.size * chosen).sum(dim=(1, 2)) <= budget).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("share", "tail"), [(0.0, True), (0.3, True), (1.0, True), (0.3, False)])
def test_attend_lists_equals_the_specification(run, shape, share, tail):
    query, keys, values, summaries = stored(*shape[:-1])
    options = {"scale": 0.3, "softcap": shape[-1]}
    logits, _ = run("reference", "summary_logits", query, summaries, **options, alpha=0.4)
    chosen = (torch.rand(summaries.size.shape, generator=rng(10)) < share) & (summaries.size > 0)
    options |= {"beta": 0.7, "tail": tail}
    wanted = run("reference", "attend_lists", query, keys, values, summaries, chosen, logits, **options)
    got = run("triton", "attend_lists", query, keys, values, poisoned(summaries), chosen, logits, **options)
    for half in range(2):
        assert_same_state((got[0][half], got[1][half]), (wanted[0][half], wanted[1][half]))
    assert (wanted[1][0].isfinite().any(), wanted[1][1].isfinite().any()) == (chosen.any(), tail and share < 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lists_of_one_row_answer_like_their_rows(run, backend, softcap):
    query, _, _, summaries = stored(2, 2, 3, 40, 16, 24, torch.float32, unused=0.0)
    summaries = replace(summaries, size=torch.ones_like(summaries.size), variance=torch.zeros(2, 2, 40))
    logits, _ = run(backend, "summary_logits", query, summaries, scale=0.3, softcap=softcap, alpha=0.4)
    nothing = torch.zeros(2, 2, 40, dtype=torch.bool)
    got = run(backend, "attend_summaries", query, summaries, nothing, logits, scale=0.3, beta=0.7)
    every = torch.tensor([0, 40]).expand(2, 6, 1, 1, 2)
    rows = summaries.key, summaries.value
    assert_same_state(got, attend_rows(query, *rows, ranges=every, scale=0.3, softcap=softcap, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_summary_knows_the_moments_of_its_rows(run, backend):
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
    logits, spread = run(backend, "summary_logits", query, summaries, scale=0.3, softcap=None, alpha=0.5)
    spreads = row_logits.var(dim=3, correction=0)
    assert_close(spread * variance[0, 0], spreads[..., 0])
    assert_close(logits, row_logits.mean(dim=3) + 0.5 * spreads)
    nothing = torch.zeros(1, 1, 1, dtype=torch.bool)
    out, lse = run(backend, "attend_summaries", query, summaries, nothing, logits, scale=0.3, beta=1.0)
    covariance = (row_logits - row_logits.mean(dim=3, keepdim=True)) @ (values - means[1]) / 30
    assert_same_state((out, lse), (means[1] + covariance, logits + torch.tensor(30.0).log()))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("count", "unused"), [(0, 0.0), (5, 1.1)], ids=["no lists", "all unused"])
def test_no_lists_give_the_neutral_states(run, backend, count, unused):
    query, _, _, summaries = stored(1, 2, 2, max(count, 1), 16, 8, torch.float32, unused)
    if count == 0:
        per_list = ("begin", "size", "key", "value", "variance")
        summaries = replace(summaries, **{name: getattr(summaries, name)[:, :, :0] for name in per_list})
    keys, values = rows_of(2, 9, 16, batch=1), rows_of(2, 9, 8, batch=1)
    logits, spread = run(backend, "summary_logits", query, summaries, scale=0.3, softcap=None, alpha=0.4)
    assert torch.equal(logits, torch.full((1, 4, count), NEG_INF))
    known = torch.full((1, 4), NEG_INF)
    assert torch.equal(run(backend, "list_costs", logits, spread, summaries, known), torch.zeros(1, 2, count))
    chosen = run(backend, "probe_lists", logits, spread, summaries, known, 100)
    assert not chosen.any()
    options = {"scale": 0.3, "softcap": None, "beta": 0.7, "tail": True}
    outs, lses = run(backend, "attend_lists", query, keys, values, summaries, chosen, logits, **options)
    assert torch.equal(outs, torch.zeros(2, 1, 4, 1, 8))
    assert torch.equal(lses, torch.full((2, 1, 4, 1), NEG_INF))
