"""attend_segmented as a GPU serves it, lists opened whole: against the specification's parts for the same lists.

Under Triton's interpreter, and on a GPU where there is one.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import TRITON, database, random_rows
from test_kernels_segmented import CASES, LENGTH, SEALED, assert_near, sealed_store

from index_kernels import attend_rows, lists, merge_states
from index_kernels.lists import list_costs, summary_logits
from index_kernels.segmented import _exact_ranges

pytest.importorskip("triton")

from index_kernels import _triton_segmented as kernels
from index_kernels.segmented import rows_opened
from index_kernels.summaries import CODE_PLANES, PLANES

# Relative error of products in the rows' own type, on tensor cores; the interpreter multiplies in float32.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 5e-3, torch.int8: 5e-3}
# dtype, KV heads, group, D, Dv, softcap, rows read and opened per KV head, first valid rows; beside those of CASES
MORE = {
    f"{dtype}, D {dim}": (dtype, 2, 3, dim, dim, None, 40, SEALED, (0, 150))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8)
    for dim in (64, 80, 128, 256)
}
# So many rows that super-lists are ranked first.
MANY_ROWS = {"index_kernels._triton_segmented.MANY_ROWS": 0}
TWO_LEVELS = ("two levels", "bfloat16, two levels", "int8, two levels")


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


def super_lists_left(query, table, how, got):
    """The state of super-lists that were not opened, of which each row weighs alike, and the lists under the others."""
    levels = table.levels(torch.device("cpu"))
    logits, spread = summary_logits(query, levels.supers, scale=how.scale, softcap=how.softcap, alpha=how.alpha)
    opened = torch.zeros_like(levels.supers.size, dtype=torch.bool)
    group = query.shape[1] // opened.shape[1]
    for b, h, i in levels.supers.size.nonzero().tolist():
        heads, first = slice(h * group, (h + 1) * group), int(levels.supers.begin[b, h, i])
        weights = got.unread[b, heads, first : first + int(levels.supers.size[b, h, i])]
        alike = torch.exp(logits[b, heads, i] - got.lse[b, heads, 0])[:, None].expand_as(weights)
        opened[b, h, i] = not torch.allclose(weights, alike, rtol=0.05, atol=0)
    rows = (levels.supers.size * opened).sum(dim=(1, 2))
    assert (rows <= how.rows_opened).all()
    assert (rows > 0).all()
    assert (~opened & (levels.supers.size > 0)).any()
    weights = None if how.head_weights is None else torch.tensor(how.head_weights)
    rest = lists.attend_summaries(query, levels.supers, opened, logits, scale=how.scale, beta=how.beta)
    return (
        rest,
        levels.lists.only(opened.gather(2, levels.parent.clamp(max=opened.shape[2] - 1))),
        lambda known: dearest_are_opened(
            list_costs(logits, spread, levels.supers, known, weights), levels.supers, opened
        ),
    )


def dearest_are_opened(costs, levels, opened):
    """None that was left costs clearly more than one that was opened."""
    costs = costs.masked_fill(levels.size == 0, 0)
    for b in range(len(costs)):
        if opened[b].any():
            assert costs[b][~opened[b]].max() <= 1.05 * costs[b][opened[b]].min()


def as_asked(query, keys):
    """The query in the type of rows; packed ones are asked in float32."""
    return query if keys.dtype == torch.int8 else query.to(keys.dtype)


def check(run, backend, name, case, tail, two_levels=False):
    CASES[name] = case
    query, keys, values, arrays, how, start, _ = sealed_store(name, "reference")
    query, how = as_asked(query, keys), how._replace(tail=tail)
    settings = MANY_ROWS if two_levels else None
    got = run(
        backend,
        "attend_segmented",
        query,
        keys,
        values,
        arrays.table,
        how,
        start=start,
        details=True,
        settings=settings,
    )
    levels, rest = arrays.table.levels(torch.device("cpu")).lists, None
    if two_levels:
        rest, levels, supers_are_right = super_lists_left(query, arrays.table, how, got)
    opened = torch.zeros_like(levels.size, dtype=torch.bool)
    for at in levels.size.nonzero().tolist():
        b, h, i = at
        rows = got.taken[b, h, levels.begin[b, h, i] : levels.begin[b, h, i] + levels.size[b, h, i]]
        assert rows.all() or not rows.any(), "a list is opened whole"
        opened[b, h, i] = rows.all()
    out, lse, by_source = specified(query, keys, values, levels, how, start, opened)
    known = by_source[0]
    if rest is not None:
        supers_are_right(known[..., 0])
        out, lse = merge_states(torch.stack([out, rest[0]]), torch.stack([lse, rest[1]]), backend="reference")
        by_source[2], known = torch.logaddexp(by_source[2], rest[1]), torch.logaddexp(known, rest[1])
    tolerance = TOLERANCE[torch.float32 if backend == "triton-interpreter" else keys.dtype]
    assert_near(got.out, out, tolerance)
    assert ((got.lse - lse).abs() <= 4 * tolerance * lse.abs().clamp(min=1)).all()
    assert_near((got.lse_by_source[[0, 1, 3]] - got.lse).exp(), (by_source - lse).exp(), 8 * tolerance)
    assert (got.lse_by_source[2] == float("-inf")).all()

    budget = rows_opened(how.rows_read, how.rows_coded, keys.shape[1])
    read = (levels.size * opened).sum(dim=(1, 2))
    assert got.rows_read == read.sum()
    assert (read <= budget).all()
    logits, spread = summary_logits(query, levels, scale=how.scale, softcap=how.softcap, alpha=how.alpha)
    weights = None if how.head_weights is None else torch.tensor(how.head_weights)
    costs = list_costs(logits, spread, levels, known[..., 0], weights).masked_fill(levels.size == 0, 0)
    if budget >= keys.shape[1] * SEALED:
        assert torch.equal(opened, levels.size > 0)
        return
    dearest_are_opened(costs, levels, opened)
    for b in range(len(query)):
        if budget and not opened[b].any():  # what was left would not have fitted
            assert levels.size[b].max() == 0 or (costs[b] > 0.9 * costs[b].max()).float().mean() > 0


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("backend", TRITON)
def test_opened_lists_are_read_exactly_and_the_others_answer_by_summary(run, backend, name, tail):
    check(run, backend, name, CASES[name], tail)


@pytest.mark.parametrize("name", TWO_LEVELS)
@pytest.mark.parametrize("backend", TRITON)
def test_of_many_rows_only_lists_of_the_best_super_lists_are_candidates(run, backend, name):
    check(run, backend, name, CASES[name], True, two_levels=True)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("backend", TRITON)
def test_every_width_and_type_is_served(run, backend, name):
    dtype, _, _, dim, *_ = MORE[name]
    if backend == "triton-interpreter" and (dtype != torch.bfloat16 or dim in (64, 128)):
        pytest.skip("the interpreter multiplies in float32 whatever the type, and other tests have powers of two")
    check(run, backend, name, MORE[name], True)


@pytest.mark.parametrize("backend", TRITON)
def test_the_same_call_gives_the_same_bits(run, backend):
    query, keys, values, arrays, how, start, _ = sealed_store("two levels", "reference")
    call = "attend_segmented", query, keys, values, arrays.table, how
    first, second = (run(backend, *call, start=start) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
    assert LENGTH > SEALED


def holds(index, device):
    """What a device is given of an index's lists and codes, brought up to date where it was given some before."""
    table, where = index.table, torch.device(device)
    return table.on(where, PLANES, kernels.Planes.of), table.on(where, CODE_PLANES, kernels.CodePlanes.of)


def assert_up_to_date(index, device, found):
    """The same numbers as a copy of everything would have, as far as there are lists; no rows behind them."""
    table, where = copy.deepcopy(index.table), torch.device(device)
    planes, codes = kernels.Planes.of(table, where), kernels.CodePlanes.of(table, where)
    for got, want, used in (
        (found[0].lists, planes.lists, table.lists.used), (found[0].supers, planes.supers, table.supers.used),
    ):  # fmt: skip
        assert got.used == want.used
        for at in np.ndindex(*used.shape):
            count = int(used[at])
            for plane in ("begin", "held", "size", "variance", "key", "key_scale", "value", "value_scale"):
                assert torch.equal(getattr(got, plane)[at][:count], getattr(want, plane)[at][:count]), plane
            assert not got.size[at][count:].any()
    assert torch.equal(found[0].shape, planes.shape)
    assert torch.equal(found[0].cross, planes.cross)
    sealed, first = len(index), int(table.lists.begin[..., 0].max())
    assert torch.equal(found[1].numbers[:, :, first:sealed], codes.numbers[:, :, first:sealed])
    assert torch.equal(found[1].steps[:, :, first:sealed], codes.steps[:, :, first:sealed])


def test_only_lists_that_changed_are_sent_to_a_device_again(device):
    db = database(*random_rows(1400, batch=2))
    found, kept_rooms, kept_lists = holds(db.index, device), 0, 0
    assert_up_to_date(db.index, device, found)
    for change in (130, 128, 700, 128, 128, -200, 128, 1500, 128, 64, 128):
        before = found
        marked = before[0].lists.variance[:, :, 0].clone()
        before[0].lists.variance[:, :, 0] = -1.0
        if change > 0:
            db.insert(*random_rows(change, batch=2))
            if change == 64:
                db.insert(*random_rows(100, batch=2))  # two changes, of which the device hears at once
        else:
            db.truncate(len(db) + change)
        with torch.inference_mode(change == 128):
            found = holds(db.index, device)
        first = found[0].lists.variance[:, :, 0]
        if (first == -1.0).all():
            kept_lists += 1
            first.copy_(marked)
        kept_rooms += found[0].lists.key.data_ptr() == before[0].lists.key.data_ptr()
        assert_up_to_date(db.index, device, found)
    assert kept_lists >= 5
    assert kept_rooms >= 3
    twin = db.fork()
    twin.insert(*random_rows(300, batch=2))
    db.insert(*random_rows(300, batch=2))
    for each in (twin, db):
        assert_up_to_date(each.index, device, holds(each.index, device))
    db.select(torch.tensor([1, 1, 0]))
    assert_up_to_date(db.index, device, holds(db.index, device))
