"""attend_segmented as a GPU serves it, lists opened whole: against the specification's parts for the same lists.

Under Triton's interpreter, and on a GPU where there is one.
"""

import io

import pytest
import torch
from test_kernels import interpreter  # noqa: F401 (a fixture)
from test_kernels_segmented import CASES, LENGTH, SEALED, assert_near, sealed_store

from index_kernels import attend_rows, attend_segmented, lists, merge_states
from index_kernels.lists import list_costs, summary_logits
from index_kernels.segmented import _exact_ranges

pytest.importorskip("triton")

from index_kernels.segmented import rows_opened

DEVICES = [
    "interpreter",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
# Relative error of products in the rows' own type, on tensor cores; the interpreter multiplies in float32.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 5e-3}
# dtype, KV heads, group, D, Dv, softcap, rows read and opened per KV head, first valid rows; beside those of CASES
MORE = {
    f"{dtype}, D {dim}": (dtype, 2, 3, dim, dim, None, 40, SEALED, (0, 150))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for dim in (64, 80, 128, 256)
}
FLOATS = {name: case for name, case in CASES.items() if case[0] != torch.int8}


def _interpret(payload):
    args, kwargs = torch.load(io.BytesIO(payload), weights_only=False)
    return attend_segmented(*args, **kwargs)


@pytest.fixture
def run(request):
    def run(device, query, keys, values, table, how, start, **kwargs):
        kwargs |= {"backend": "triton", "details": True}
        if device == "interpreter":
            buffer = io.BytesIO()
            torch.save(((query, keys, values, table, how), {**kwargs, "start": start}), buffer)
            return request.getfixturevalue("interpreter").submit(_interpret, buffer.getvalue()).result()
        found = attend_segmented(query.cuda(), keys.cuda(), values.cuda(), table, how, start=start.cuda(), **kwargs)
        return type(found)(*(part.cpu() if isinstance(part, torch.Tensor) else part for part in found))

    return run


def specified(query, keys, values, levels, how, start, opened):
    """``(out, lse, lse_by_source)`` in float64 where it can be, for the lists ``opened [B, Hkv, L]``."""
    options = {"scale": how.scale, "softcap": how.softcap, "backend": "reference"}
    exact = attend_rows(query, keys, values, ranges=_exact_ranges(query, how, start), **options)
    logits, _ = summary_logits(query, levels, scale=how.scale, softcap=how.softcap, alpha=how.alpha)
    outs, lses = lists.attend_lists(
        query, keys, values, levels, opened, logits, beta=how.beta, tail=how.tail, **options
    )
    outs, lses = torch.cat([exact[0][None], outs]), torch.cat([exact[1][None], lses])
    return (*merge_states(outs, lses, backend="reference"), lses)


def check(run, device, name, case, tail):
    CASES[name] = case
    query, keys, values, arrays, how, start, _ = sealed_store(name, "reference")
    query, how = query.to(keys.dtype), how._replace(tail=tail)
    got = run(device, query, keys, values, arrays.table, how, start)
    levels = arrays.table.levels(torch.device("cpu")).lists
    opened = torch.zeros_like(levels.size, dtype=torch.bool)
    for at in levels.size.nonzero().tolist():
        b, h, i = at
        rows = got.taken[b, h, levels.begin[b, h, i] : levels.begin[b, h, i] + levels.size[b, h, i]]
        assert rows.all() or not rows.any(), "a list is opened whole"
        opened[b, h, i] = rows.all()
    out, lse, by_source = specified(query, keys, values, levels, how, start, opened)
    tolerance = TOLERANCE[torch.float32 if device == "interpreter" else query.dtype]
    assert_near(got.out, out, tolerance)
    assert ((got.lse - lse).abs() <= 4 * tolerance * lse.abs().clamp(min=1)).all()
    assert_near((got.lse_by_source[[0, 1, 3]] - got.lse).exp(), (by_source - lse).exp(), 8 * tolerance)
    assert (got.lse_by_source[2] == float("-inf")).all()

    budget = rows_opened(how.rows_read, how.rows_coded, keys.shape[1])
    read = (levels.size * opened).sum(dim=(1, 2))
    assert got.rows_read == read.sum()
    assert (read <= budget).all()
    # No list that was left costs clearly more than one that was opened, and what was left would not have fitted.
    logits, spread = summary_logits(query, levels, scale=how.scale, softcap=how.softcap, alpha=how.alpha)
    weights = None if how.head_weights is None else torch.tensor(how.head_weights)
    costs = list_costs(logits, spread, levels, by_source[0][..., 0], weights).masked_fill(levels.size == 0, 0)
    if budget >= keys.shape[1] * SEALED:
        assert torch.equal(opened, levels.size > 0)
        return
    for b in range(len(query)):
        if opened[b].any():
            assert costs[b][~opened[b]].max() <= 1.05 * costs[b][opened[b]].min()
        elif budget:
            assert levels.size[b].max() == 0 or (costs[b] > 0.9 * costs[b].max()).float().mean() > 0


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_opened_lists_are_read_exactly_and_the_others_answer_by_summary(run, device, name, tail):
    check(run, device, name, FLOATS[name], tail)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("device", DEVICES)
def test_every_width_and_type_is_served(run, device, name):
    dtype, _, _, dim, *_ = MORE[name]
    if device == "interpreter" and (dtype != torch.bfloat16 or dim in (64, 128)):
        pytest.skip("the interpreter multiplies in float32 whatever the type, and other tests have powers of two")
    check(run, device, name, MORE[name], True)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_call_gives_the_same_bits(run, device):
    query, keys, values, arrays, how, start, _ = sealed_store("two levels", "reference")
    first, second = (run(device, query, keys, values, arrays.table, how, start) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
    assert LENGTH > SEALED
