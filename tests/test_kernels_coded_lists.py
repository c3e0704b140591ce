"""attend_segmented as a GPU serves rows that are dear to read: those of opened lists are chosen by their codes.

Against the specification's parts, for the lists that were opened and the rows that were read. Under Triton's
interpreter, and on a GPU where there is one.
"""

import pytest
import torch
from conftest import TRITON
from test_kernels_segmented import CASES, SEALED, assert_near, sealed_store
from test_kernels_whole_lists import MANY_ROWS, TWO_LEVELS, as_asked, super_lists_left

from index_kernels import attend_rows, merge_states
from index_kernels.codes import attend_codes, score_codes
from index_kernels.lists import attend_summaries, list_costs, summary_logits, whole_mass
from index_kernels.segmented import _exact_ranges

# The specification also rounds the query that codes are multiplied with.
MORE = {
    f"{dtype}, D {dim}, by code": (dtype, 2, 3, dim, dim, None, 40, SEALED, (0, 150))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8)
    for dim in (64, 80, 128)
}
TOLERANCE = 1e-2


def lists_opened(query, lists, how, got, known):
    """Which lists were opened, bool ``[B, Hkv, L]``: their rows differ in weight, or were read."""
    logits, spread = summary_logits(query, lists, scale=how.scale, softcap=how.softcap, alpha=how.alpha)
    weights = None if how.head_weights is None else torch.tensor(how.head_weights)
    costs = list_costs(logits, spread, lists, known[..., 0], weights)
    opened = torch.zeros_like(lists.size, dtype=torch.bool)
    group = query.shape[1] // lists.size.shape[1]
    for b, h, i in lists.size.nonzero().tolist():
        rows = slice(int(lists.begin[b, h, i]), int(lists.begin[b, h, i] + lists.size[b, h, i]))
        weights = got.unread[b, h * group : (h + 1) * group, rows]
        varies = (weights.amax(dim=1) - weights.amin(dim=1) > 1e-6 * weights.amax(dim=1)).any()
        opened[b, h, i] = bool(got.taken[b, h, rows].any() | varies)
    for b in range(len(opened)):  # a list of one row that was not read
        if opened[b].any():
            opened[b] |= (lists.size[b] == 1) & (costs[b] >= costs[b][opened[b] & (lists.size[b] > 1)].min())
    return logits, opened


def check(run, backend, name, tail=True, everything=False, two_levels=False):
    CASES.setdefault(name, MORE.get(name))  # not before: other tests are made of these cases
    query, keys, values, arrays, how, start, _ = sealed_store(name, "reference")
    query, how = as_asked(query, keys), how._replace(tail=tail)
    if everything:
        how = how._replace(rows_coded=keys.shape[1] * SEALED)
    settings = MANY_ROWS if two_levels else None
    call = "attend_segmented", query, keys, values, arrays.table, how
    got = run(backend, *call, start=start, by_code=True, details=True, settings=settings)
    options = {"scale": how.scale, "softcap": how.softcap}
    exact = attend_rows(query, keys, values, ranges=_exact_ranges(query, how, start), backend="reference", **options)
    lists, known, rest = arrays.table.levels(torch.device("cpu")).lists, exact[1], []
    if two_levels:
        state, lists, supers_are_right = super_lists_left(query, arrays.table, how, got)
        supers_are_right(known[..., 0])
        known, rest = torch.logaddexp(known, state[1]), [state]
    logits, opened = lists_opened(query, lists, how, got, known)
    codes = arrays.table.codes_on(torch.device("cpu"))
    coded = score_codes(query, lists, opened, codes, **options)
    taken = got.taken.gather(2, coded.place.clamp(min=0)) & (coded.place >= 0)
    group = query.shape[1] // keys.shape[1]
    ids = torch.where(taken, coded.place, -1).repeat_interleave(group, dim=1)[:, :, None]
    states = [exact, attend_rows(query, keys, values, ids=ids, backend="reference", **options)]
    if tail:
        states.append(attend_codes(query, lists, coded, taken, scale=how.scale, beta=how.beta))
        rest.append(attend_summaries(query, lists, opened, logits, scale=how.scale, beta=how.beta))
        states.append(merge_states(*(torch.stack(parts) for parts in zip(*rest, strict=True)), backend="reference"))
    lses = torch.stack([lse for _, lse in states])
    out, lse = merge_states(torch.stack([out for out, _ in states]), lses, backend="reference")
    assert_near(got.out, out, TOLERANCE)
    assert_near((got.lse_by_source[: len(states)] - got.lse).exp(), (lses - lse).exp(), 3 * TOLERANCE)
    assert got.rows_read == got.taken.sum() == taken.sum()
    assert got.rows_read <= how.rows_read * len(query)
    assert got.rows_coded <= how.rows_coded * len(query)
    whole = whole_mass(logits, lists, known[..., 0])
    shares = torch.exp(coded.logits - whole.view(*coded.logits.shape[:3], 1))
    if how.head_weights is not None:
        shares = shares * torch.tensor(how.head_weights).view(-1, group, 1)
    shares = shares.sum(dim=2)
    for b in range(len(query)):
        left = shares[b][~taken[b] & (coded.place[b] >= 0)]
        if taken[b].any() and len(left):
            assert shares[b][taken[b]].min() >= 0.85 * left.max(), "the rows with the largest shares are read"


# Logits of large queries are known by code to a few units: what is read of them is anybody's choice.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"large queries"}))
@pytest.mark.parametrize("backend", TRITON)
def test_rows_chosen_by_code_are_read_and_codes_and_summaries_answer_for_the_others(run, backend, name):
    check(run, backend, name, tail=name != "float32")


@pytest.mark.parametrize("backend", TRITON)
def test_of_many_rows_only_lists_of_the_best_super_lists_are_candidates(run, backend):
    check(run, backend, TWO_LEVELS[0], two_levels=True)


@pytest.mark.parametrize("backend", TRITON)
def test_all_lists_may_be_opened(run, backend):
    check(run, backend, "two levels", everything=True)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("backend", TRITON)
def test_every_width_and_type_is_served(run, backend, name):
    dtype, _, _, dim, *_ = MORE[name]
    if backend == "triton-interpreter" and (dtype != torch.bfloat16 or dim != 80):
        pytest.skip("the interpreter multiplies in float32 whatever the type, and other tests have powers of two")
    check(run, backend, name)


@pytest.mark.parametrize("backend", TRITON)
def test_the_same_call_gives_the_same_bits(run, backend):
    query, keys, values, arrays, how, start, _ = sealed_store("two levels", "reference")
    call = "attend_segmented", query, keys, values, arrays.table, how
    first, second = (run(backend, *call, start=start, by_code=True) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
