"""attend_segmented: every backend against the specification, and the specification against attention over rows."""

import copy

import numpy as np
import pytest
import torch
from test_kernels import assert_close, rng

from dbattn.index._lists import Lists, slots_of
from dbattn.index.segmented import CLUSTERING
from index_kernels import (
    LearntMetric,
    ListReading,
    attend_rows,
    attend_segmented,
    floats,
    pack_rows,
    seal_rows,
    unseal_rows,
)
from index_kernels.lists import row_places
from index_kernels.packed import SCALE_BYTES, code_bytes, code_rows, decoded, rotated, turned_for_codes

SEALED, LENGTH, N_SINK = 2300, 2391, 2
# dtype, KV heads, group, D, Dv, softcap, rows read and opened per KV head, first valid rows
CASES = {
    "float32": (torch.float32, 2, 2, 16, 16, None, 200, SEALED, (0, 700)),
    "float16, softcap": (torch.float16, 1, 2, 16, 16, 4.0, 150, SEALED, (0,)),
    "two levels": (torch.float32, 2, 2, 16, 16, None, 100, 700, (0, 300)),
    "bfloat16, two levels": (torch.bfloat16, 2, 2, 16, 16, None, 300, 600, (0, 0)),
    "int8, two levels": (torch.int8, 1, 2, 16, 16, 6.0, 64, 600, (0,)),
    "large queries": (torch.float32, 2, 2, 16, 16, None, 60, SEALED, (0, 700)),
    "nothing read": (torch.float32, 2, 2, 24, 8, None, 0, SEALED, (0, 900)),
    "all read": (torch.float32, 1, 2, 16, 16, None, SEALED, SEALED, (0,)),
    "a batch row of padding": (torch.float32, 1, 2, 16, 16, None, 100, SEALED, (0, LENGTH - 20)),
}


def metrics(case):
    """In which keys are clustered, ``[3, B, Hkv, D, D]``; those of the first segment stand as they are."""
    _, kv_heads, _, dim, *_, start = CASES[case]
    root = torch.randn(3, len(start), kv_heads, dim, dim, generator=rng(4)) / dim**0.5
    root[0] = torch.eye(dim)
    return root @ root.transpose(3, 4)


def sealed_store(case, backend="auto"):
    """Rows in clusters, sealed; the same rows as they came; how they are read; and a query."""
    dtype, kv_heads, group, dim, value_dim, softcap, read, opened, start = CASES[case]
    batch, start = len(start), torch.tensor(start)
    noise = rng(3)
    centres = 2 * torch.randn(batch, kv_heads, 40, dim, generator=noise)
    keys = centres[:, :, torch.arange(LENGTH + 9) % 40]
    keys = keys + 0.5 * torch.randn(keys.shape, generator=noise)
    values = torch.randn(batch, kv_heads, LENGTH + 9, value_dim, generator=noise)
    keys, values = ((pack_rows(rows) if dtype == torch.int8 else rows.to(dtype)) for rows in (keys, values))
    came = keys.clone(), values.clone()
    lists, bounds = Lists(batch, kv_heads, dim, value_dim), [0, 1024, 2048, SEALED]
    lists.reserve(bounds, keys.shape[2])
    arrays = lists.lists, lists.supers, lists.segments
    holds = np.repeat([[False], [True], [True]], batch, axis=1)
    learnt = LearntMetric(metrics(case).numpy(), holds)
    seal_rows(
        keys, values, lists.positions, lists.codes, bounds, 0, CLUSTERING, learnt, *arrays, start=start + N_SINK,
        backend=backend,
    )  # fmt: skip
    lists.settle(3)
    budgets = (rows * kv_heads for rows in (read, min(3 * read, SEALED), opened))
    weights = None if softcap == 4.0 else tuple(0.4 * 3.0**i for i in range(kv_heads * group))
    how = ListReading(SEALED, LENGTH, N_SINK, *budgets, 0.3, softcap, 0.38, 0.7, True, weights)
    query = torch.randn(batch, kv_heads * group, 1, dim, generator=noise) * (20 if case == "large queries" else 1)
    return query, keys, values, lists, how, start, came


def assert_near(got, wanted, tolerance):
    error = (got - wanted).norm()
    assert error <= tolerance * wanted.norm() + 1e-6, f"{error:.2e} of {wanted.norm():.2e}"


def run(backend, *args, **kwargs):
    return attend_segmented(*args, **kwargs, backend=backend, details=True, unread=True)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_cpu_kernel_equals_the_specification(case, tail):
    query, keys, values, lists, how, start, _ = sealed_store(case)
    how = how._replace(tail=tail)
    wanted = run("reference", query, keys, values, lists.table, how, start=start)
    got = run("numba", query, keys, values, lists.table, how, start=start)
    # Logits of a hundred have the seventh digit of a float32 behind the fifth of their weight.
    tolerance = 2e-4 if case == "large queries" else 1e-5
    # Of two rows with nearly the same share either may be read.
    assert (got.taken != wanted.taken).sum() <= 2 + 0.01 * wanted.taken.sum()
    same = torch.equal(got.taken, wanted.taken)
    whole = wanted.lse.where(wanted.lse.isfinite(), 0.0)
    assert_near((got.lse - whole).exp(), (wanted.lse - whole).exp(), tolerance if same else 2e-3)
    assert_near((got.lse_by_source - whole).exp(), (wanted.lse_by_source - whole).exp(), tolerance if same else 2e-2)
    # The fused kernel does not fetch mean values of negligible weight.
    assert_near(got.out, wanted.out, tolerance if same and not tail else 5e-3)
    counts = ("rows_read", "rows_coded", "lists_opened", "summaries_read")
    assert [getattr(got, name) for name in counts] == [getattr(wanted, name) for name in counts]
    assert got.values_read <= wanted.summaries_read + wanted.lists_opened
    if tail:
        assert_near(got.unread, wanted.unread, 1e-4 if same else 2e-2)


@pytest.mark.parametrize("case", CASES)
def test_the_specification_is_the_exact_rows_and_the_summaries(case):
    """Whatever rows it chose: they, sinks and hot rows exactly, and all weight accounted for."""
    query, keys, values, lists, how, start, _ = sealed_store(case)
    softcap = CASES[case][5]
    found = run("reference", query, keys, values, lists.table, how, start=start)
    slots = slots_of(found.taken, query.shape[1])[:, :, None]
    recent = torch.arange(SEALED, LENGTH).expand(*query.shape[:3], -1)
    sinks = (start[:, None] + torch.arange(N_SINK))[:, None, None].expand(*query.shape[:3], -1)
    recent = torch.where(recent >= start[:, None, None, None] + N_SINK, recent, -1)
    exact = attend_rows(
        query, keys, values, ids=torch.cat([slots, sinks, recent], dim=-1), scale=how.scale, softcap=softcap,
        backend="reference",
    )  # fmt: skip
    assert_close(torch.logaddexp(found.lse_by_source[0], found.lse_by_source[1]), exact[1])
    summarised = torch.exp(found.lse_by_source[2:] - found.lse).sum(dim=0)
    assert_near(found.unread.sum(dim=-1), summarised[..., 0].nan_to_num(), 1e-4)
    read = found.unread.gather(-1, slots[:, :, 0].clamp(min=0))[slots[:, :, 0] >= 0]
    assert (read == 0).all(), "a row that was read answers neither by its code nor through a summary"
    assert found.taken.sum() == found.rows_read <= how.rows_read * len(start)
    assert found.rows_coded <= how.rows_coded * len(start)
    if case == "all read":
        dense = attend_rows(
            query, keys, values, ranges=torch.tensor([0, LENGTH]).expand(*query.shape[:3], 1, 2), scale=how.scale,
            backend="reference",
        )  # fmt: skip
        assert_close(found.out, dense[0])


@pytest.mark.parametrize("case", CASES)
def test_sealing_groups_rows_under_true_summaries_and_unsealing_puts_them_back(case):
    _, keys, values, lists, _, start, came = sealed_store(case)
    levels = lists.table.levels(torch.device("cpu"))
    for b, h in np.ndindex(*levels.lists.size.shape[:2]):
        places = lists.positions[b, h, :SEALED]
        assert sorted(places) == list(range(SEALED))
        assert torch.equal(keys[b, h, :SEALED], came[0][b, h, places])
        assert torch.equal(values[b, h, :SEALED], came[1][b, h, places])
        used = levels.lists.size[b, h] > 0
        rows = floats(keys[b, h])
        for begin, size, key, variance in zip(
            *(part[b, h][used] for part in (levels.lists.begin, levels.lists.size, levels.lists.key)),
            levels.lists.variance[b, h][used], strict=True,
        ):  # fmt: skip
            members = rows[begin : begin + size]
            metric = metrics(case)[0 if begin < 1024 else 1 if begin < 2048 else 2, b, h]
            assert (members.mean(dim=0) - key).abs().max() <= key.abs().max() / 127
            residuals = (members - members.mean(dim=0)) @ metric
            assert_near(variance, residuals.square().sum(dim=1).mean(), 1e-3)
        place = row_places(levels.lists.begin[b, h][used], levels.lists.size[b, h][used])
        mean = levels.lists.key[b, h][used].repeat_interleave(levels.lists.size[b, h][used], dim=0)
        codes, wanted = torch.from_numpy(lists.codes[b, h])[place], code_rows(rows[place] - mean)
        # A number half way between two is rounded either way.
        assert (codes[:, :-SCALE_BYTES] != wanted[:, :-SCALE_BYTES]).sum() <= 0.01 * codes.numel()
        assert_near(decoded(codes, rows.shape[1]), turned_for_codes(rows[place] - mean), 0.15)
        listed = int(levels.lists.size[b, h].sum())
        assert listed == max(0, SEALED - int(start[b]) - N_SINK) == int(levels.supers.size[b, h].sum())
    unseal_rows(keys, values, lists.positions, [0, 1024, 2048, SEALED], start=start + N_SINK)
    assert torch.equal(keys, came[0])
    assert torch.equal(values, came[1])


@pytest.mark.parametrize("dim", [1, 7, 16, 48, 80, 256])
def test_codes_keep_rotated_rows_to_half_a_step_and_products_survive_the_rotation(dim):
    rows, other = torch.randn(2, 50, dim, generator=rng(5))
    rows[3] = 0
    assert_near(turned_for_codes(rows) @ turned_for_codes(other).T, rows @ other.T, 1e-5)
    spike = rotated(torch.eye(64)[:1])  # rows that are kept rotated are not turned back
    assert turned_for_codes(spike).abs().max() < 0.5
    codes = code_rows(rows)
    assert codes.shape == (50, code_bytes(dim))
    assert codes.dtype == torch.int8
    error = (decoded(codes, dim) - turned_for_codes(rows)).abs()
    assert (error <= 0.501 / 7 * turned_for_codes(rows).abs().amax(dim=1, keepdim=True)).all()


def test_queries_of_any_layout_and_lists_that_grew_are_read_where_they_stand():
    query, keys, values, lists, how, start, _ = sealed_store("float32")
    wanted = run("numba", query, keys, values, lists.table, how, start=start)
    turned = query.transpose(1, 3).contiguous().transpose(1, 3)
    inside = torch.stack([query, query + 1], dim=-1)[..., 0]
    for other in (turned, inside, query.double().float().requires_grad_()):
        assert torch.equal(run("numba", other, keys, values, lists.table, how, start=start).out, wanted.out)
    halved = query.half()
    got = run("numba", halved, keys, values, lists.table, how, start=start)
    assert torch.equal(got.out, run("numba", halved.float(), keys, values, lists.table, how, start=start).out)
    lists.reserve([0, 1024, 2048, SEALED, 4096], 8192)
    got = run("numba", query, keys.clone(), values.clone(), lists.table, how, start=start)
    assert torch.equal(got.out, wanted.out)
    assert torch.equal(got.lse, wanted.lse)


def test_a_copy_of_the_lists_is_read_where_it_stands():
    query, keys, values, lists, how, start, _ = sealed_store("float32")
    wanted = run("numba", query, keys, values, lists.table, how, start=start)
    store = copy.deepcopy((keys, values, lists.table, start))
    for array in (keys, values, lists.lists.key, lists.codes):
        array[:] = 0
    got = run("numba", query, *store[:3], how, start=store[3])
    assert torch.equal(got.out, wanted.out)


def test_a_place_on_the_device_is_refused_where_no_graph_is_made():
    query, keys, values, arrays, how, start, _ = sealed_store(next(iter(CASES)), "numba")
    with pytest.raises(ValueError, match="newest is for CUDA graphs, and backend 'numba' makes none: expected None"):
        attend_segmented(query, keys, values, arrays.table, how, start=start, newest=torch.zeros(1, dtype=torch.int64))


def test_arrays_that_a_kernel_would_misread_by_address_are_refused():
    query, keys, values, lists, how, start, _ = sealed_store("float32")
    lists.lists = lists.lists._replace(size=lists.lists.size.astype(np.int64))
    lists.settle(3)
    with pytest.raises(ValueError, match=r"int64 \[2, 2, .*expected array\(int32, 3d, C\)"):
        run("numba", query, keys, values, lists.table, how, start=start)
    lists.lists = lists.lists._replace(size=np.asfortranarray(lists.lists.size.astype(np.int32)))
    lists.settle(3)
    with pytest.raises(ValueError, match="strides"):
        run("numba", query, keys, values, lists.table, how, start=start)
