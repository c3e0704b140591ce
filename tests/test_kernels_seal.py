"""seal_rows in torch, which serves GPUs: its lists are as good as the CPU kernel's, and so is what it says of them."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from dbattn.index._lists import Lists
from index_kernels import LearntMetric, floats, pack_rows, seal_rows, unseal_rows
from index_kernels.kmeans import kmeans, nearest
from index_kernels.packed import SCALE_BYTES, decoded, scales, turned_for_codes
from index_kernels.summaries import Clustering

USUAL, SMALL = Clustering(512, 32, 6, 4), Clustering(16, 4, 4, 2)
# dtype, batch row starts, bounds, how, learnt; so many super-lists of the last case are split by way of groups
CASES = {
    "float32": (torch.float32, (2,), [0, 1024, 1500], USUAL, False),
    "padding, learnt": (torch.float32, (3, 1100), [0, 1024, 1500], USUAL, True),
    "bfloat16, padding only": (torch.bfloat16, (2, 1500), [0, 1024, 1500], USUAL, False),
    "int8": (torch.int8, (2,), [0, 900], USUAL, False),
    "by groups": (torch.float32, (2,), [0, 2500], SMALL, True),
}
HEADS, DIM, VALUE_DIM, ROWS = 2, 16, 8, 2600


class Sealed(NamedTuple):
    keys: torch.Tensor
    values: torch.Tensor
    lists: Lists
    came: tuple
    metric: torch.Tensor


def sealed(case, backend, device="cpu", coded=True):
    dtype, start, bounds, how, learnt = CASES[case]
    noise = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=noise)

    batch = len(start)
    centres = 2 * normal(batch, HEADS, 60, DIM)
    keys = centres[:, :, torch.randint(0, 60, (ROWS,), generator=noise)] + 0.7 * normal(batch, HEADS, ROWS, DIM) + 1
    values = normal(batch, HEADS, ROWS, VALUE_DIM)
    keys, values = ((pack_rows(rows) if dtype == torch.int8 else rows.to(dtype)).to(device) for rows in (keys, values))
    came, segments = (keys.clone(), values.clone()), len(bounds) - 1
    metric = normal(segments, batch, HEADS, DIM, DIM) / DIM**0.5
    metric = metric @ metric.mT if learnt else torch.eye(DIM).expand_as(metric)
    # As many lists as these sizes make, which may be smaller than the library's.
    lists = Lists(batch, HEADS, DIM, VALUE_DIM)
    lists.reserve(bounds, ROWS, per_super=how.rows_per_super_list, per_list=how.rows_per_list)
    seal_rows(
        keys, values, lists.positions, lists.codes, bounds, 0, how,
        LearntMetric(metric.numpy(), np.full((segments, batch), learnt)), lists.lists, lists.supers, lists.segments,
        start=torch.tensor(start, device=device), coded=coded, backend=backend,
    )  # fmt: skip
    lists.settle(segments)
    return Sealed(keys.cpu(), values.cpu(), lists, tuple(rows.cpu() for rows in came), metric)


def scatter(lists):
    """Sums over all rows of the squared distance from the mean of their list, of their super-list: ``[2, B, Hkv]``."""
    levels = lists.lists, lists.supers
    used = (np.arange(level.size.shape[2]) < level.used[..., None] for level in levels)
    return np.array([(level.size * level.variance * of).sum(axis=2) for level, of in zip(levels, used, strict=True)])


@pytest.mark.parametrize("case", CASES)
def test_lists_made_on_a_device_are_as_tight_as_those_of_the_cpu(case, device):
    # On a GPU beside the same code on the CPU, which the other case compares with the CPU's kernels.
    ours, theirs = (
        sealed(case, *of).lists for of in (("reference", device), ("numba" if device == "cpu" else "reference",))
    )
    np.testing.assert_allclose(scatter(ours), scatter(theirs), rtol=0.01)
    for level, other in ((ours.lists, theirs.lists), (ours.supers, theirs.supers)):
        np.testing.assert_allclose(level.used, other.used, atol=2)
    np.testing.assert_allclose(ours.shape.view(np.float16), theirs.shape.view(np.float16), atol=0.02)
    np.testing.assert_allclose(ours.cross.view(np.float16), theirs.cross.view(np.float16), atol=0.02)


@pytest.mark.parametrize("case", CASES)
def test_every_row_stands_in_one_list_and_summaries_say_what_is_in_it(case, device):
    keys, values, lists, came, metric = sealed(case, "reference", device)
    _, start, bounds, *_ = CASES[case]
    for b, h in np.ndindex(len(start), HEADS):
        place = torch.from_numpy(lists.positions[b, h]).long()
        assert torch.equal(place.sort().values, torch.arange(ROWS))
        for rows, before in ((keys, came[0]), (values, came[1])):
            assert torch.equal(rows[b, h], before[b, h, place])
        own = slice(0, lists.lists.used[b, h])
        begin, size = lists.lists.begin[b, h, own], lists.lists.size[b, h, own]
        assert (size > 0).all()
        held = np.concatenate([np.arange(*run) for run in zip(begin, begin + size, strict=True)] or [[]])
        assert np.array_equal(held, np.arange(start[b], bounds[-1])), "lists stand one after the other"
        first = lists.supers.first[b, h, : lists.supers.used[b, h] + 1]
        assert first[0] == 0
        assert first[-1] == len(size)
        summed = np.add.reduceat(size, first[:-1]) if len(size) else size
        assert np.array_equal(summed, lists.supers.size[b, h, : len(summed)])
        for i, (at, rows) in enumerate(zip(begin, size, strict=True)):
            assert (np.diff(lists.positions[b, h, at : at + rows]) > 0).all(), "in the order they came"
            segment = np.searchsorted(bounds, at, side="right") - 1
            x, y = (floats(rows_of[b, h, at : at + rows]) for rows_of in (keys, values))
            for packed, numbers in ((lists.lists.key, x), (lists.lists.value, y)):
                kept = torch.from_numpy(packed[b, h, i])
                assert (floats(kept) - numbers.mean(dim=0)).abs().max() <= 0.51 * scales(kept)
            off = (x - x.mean(dim=0)) @ metric[segment, b, h]
            assert abs(off.square().sum(dim=1).mean() - lists.lists.variance[b, h, i]) < 1e-3
            residual = turned_for_codes(x - floats(torch.from_numpy(lists.lists.key[b, h, i])))
            codes = torch.from_numpy(lists.codes[b, h, at : at + rows])
            step = codes[:, -SCALE_BYTES:].clone().view(torch.float32)
            assert ((decoded(codes, DIM) - residual).abs() <= 0.51 * step).all()


def test_the_same_rows_give_the_same_lists_and_codes_only_where_asked_for(device):
    first, second = (sealed("by groups", "reference", device, coded=coded) for coded in (True, False))
    assert torch.equal(first.keys, second.keys)
    for one, other in zip(
        (*first.lists.lists, *first.lists.supers), (*second.lists.lists, *second.lists.supers), strict=True
    ):
        assert np.array_equal(one, other)
    assert first.lists.codes.any()
    assert not second.lists.codes.any()


def test_any_number_of_threads_makes_the_same_lists():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(sealed("padding, learnt", "numba"))
    finally:
        torch.set_num_threads(threads)
    one, two = (each.lists for each in found)
    assert torch.equal(found[0].keys, found[1].keys)
    assert np.array_equal(one.codes, two.codes)
    for of_one, of_two in zip((*one.lists, *one.segments), (*two.lists, *two.segments), strict=True):
        assert np.array_equal(of_one, of_two)


def test_rows_sealed_on_a_device_go_back_to_where_they_came(device):
    _, start, bounds, *_ = CASES["padding, learnt"]
    keys, values, lists, came, _ = sealed("padding, learnt", "reference", device)
    keys, values = keys.to(device), values.to(device)
    unseal_rows(keys, values, lists.positions, bounds, start=torch.tensor(start), backend="reference")
    assert torch.equal(keys.cpu(), came[0])
    assert torch.equal(values.cpu(), came[1])
    assert (lists.positions == np.arange(ROWS)).all()


@pytest.mark.parametrize("distances", [1 << 27, 1000, 1])
def test_k_means_finds_clusters_however_few_distances_are_held_at_once(distances, monkeypatch):
    monkeypatch.setattr("index_kernels.kmeans.DISTANCES", distances)
    owner = torch.arange(300) // 15
    x = 100 * torch.randn(2, 20, 8)[:, owner] + torch.randn(2, 300, 8)
    length, count = torch.tensor([[300], [105]]), torch.tensor([[20], [7]])
    means = kmeans(x, length, count, 20, 3, 1)
    found = nearest(x, means, torch.arange(20) >= count)
    assert torch.equal(found[0], owner)
    assert torch.equal(found[1, :105], owner[:105])
    assert (found < count).all()
    torch.testing.assert_close(means[0], x[0].view(20, 15, 8).mean(dim=1))
