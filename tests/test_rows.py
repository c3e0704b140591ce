"""Rows of other origin: merged exactly, whichever plan answers; and attention over depth, built from them."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import database
from conftest import random_rows as rows
from test_attention import plain_attention

from dbattn import RowSource, relative_error
from dbattn.config import INDEX_TRAITS
from dbattn.store import new_buffer

EXAMPLE = Path(__file__).parents[1] / "examples" / "depth_attention.py"


def example():
    spec = importlib.util.spec_from_file_location("depth_attention", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("index", sorted(INDEX_TRAITS))
@pytest.mark.parametrize("retrieve", [True, False])
@pytest.mark.parametrize("m", [1, 3])
def test_extra_rows_are_as_if_they_had_been_stored(index, retrieve, m):
    keys, values = rows(1500, batch=2)
    extra_keys, extra_values = rows(7, batch=2)
    query = torch.randn(2, 4, m, 16)
    db = database(keys, values, index=index, k=1500, max_queries=8)
    out = db.attend(query, extra=RowSource(extra_keys, extra_values), retrieve=retrieve)
    for i in range(m):
        stop = 1500 - m + i + 1
        joined = [
            torch.cat(parts, dim=2) for parts in ((extra_keys, keys[:, :, :stop]), (extra_values, values[:, :, :stop]))
        ]
        plain = plain_attention(query[:, :, i : i + 1], *joined)
        assert relative_error(out[:, :, i : i + 1], plain).max() < 1e-5


def test_two_shards_make_one_store():
    keys, values = rows(800)
    query = torch.randn(1, 2, 1, 16)
    db = database(keys[:, :, 300:], values[:, :, 300:], index="flat", k=800)
    out, lse = db.attend(query, extra=RowSource(keys[:, :, :300], values[:, :, :300]), return_lse=True)
    whole, whole_lse = database(keys, values, index="flat", k=800).attend(query, return_lse=True)
    assert relative_error(out, whole).max() < 1e-5
    torch.testing.assert_close(lse, whole_lse)


def test_log_weights_count_rows_and_hide_them():
    keys, values = rows(600)
    query = torch.randn(1, 4, 2, 16)
    db = database(keys, values)
    more = rows(3)
    twice = RowSource(*more, torch.tensor(2.0).log())
    again = RowSource(*(torch.cat([each, each], dim=2) for each in more))
    torch.testing.assert_close(db.attend(query, extra=twice), db.attend(query, extra=again))
    hidden = torch.zeros(1, 1, 2, 3)
    hidden[..., 0, :] = float("-inf")
    part = db.attend(query, extra=RowSource(*more, hidden))
    torch.testing.assert_close(part[:, :, 0], db.attend(query)[:, :, 0])
    torch.testing.assert_close(part[:, :, 1], db.attend(query, extra=RowSource(*more))[:, :, 1])
    none = RowSource(more[0][:, :, :0], more[1][:, :, :0])
    torch.testing.assert_close(db.attend(query, extra=none), db.attend(query))


@pytest.mark.parametrize(
    ("keys", "values", "log_weights", "message"),
    [
        ((1, 2, 3, 15), (1, 2, 3, 16), None, "15"),
        ((1, 2, 3, 16), (1, 2, 4, 16), None, "4"),
        ((1, 2, 3, 16), (1, 2, 3, 8), None, "dimension 16"),
        ((2, 2, 3, 16), (2, 2, 3, 16), None, "2, 2, 3, 16"),
        ((1, 2, 3, 16), (1, 2, 3, 16), torch.zeros(5), "broadcast"),
        ((1, 2, 3, 16), (1, 2, 3, 16), torch.zeros(3, dtype=torch.int64), "floats"),
        ((1, 2, 3, 16), (1, 2, 3, 16), torch.tensor([0.0, float("nan"), 0.0]), "NaN"),
        ((1, 2, 3, 16), (1, 2, 3, 16), torch.tensor([0.0, float("inf"), 0.0]), "inf"),
    ],
)
def test_rows_that_do_not_fit_are_refused(keys, values, log_weights, message):
    db = database(*rows(50))
    with pytest.raises(ValueError, match=message):
        db.attend(torch.randn(1, 2, 1, 16), extra=RowSource(torch.randn(keys), torch.randn(values), log_weights))
    bad = torch.randn(1, 2, 3, 16)
    bad[0, 1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="extra values hold nan"):
        db.attend(torch.randn(1, 2, 1, 16), extra=RowSource(torch.randn(1, 2, 3, 16), bad))


def test_depth_mixed_attention_is_one_softmax_over_time_and_depth():
    keys, values = rows(400)
    depth = rows(9)
    query = torch.randn(1, 4, 1, 16)
    out = example().depth_mixed_attention(database(keys, values, index="flat", k=400), query, *depth)
    joined = [torch.cat(parts, dim=2) for parts in zip(depth, (keys, values), strict=True)]
    assert relative_error(out, plain_attention(query, *joined)).max() < 1e-5


def test_attention_residuals_are_a_softmax_over_layer_outputs():
    residual, outputs, w = example().AttentionResidual(32), [], torch.randn(32)
    for layer in range(6):
        outputs.append(torch.randn(4, 32) * (layer + 1))
        residual.write(outputs[-1])
        stacked = torch.stack(outputs).double()
        normed = stacked / (stacked.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        weights = (normed @ w.double()).softmax(0)
        expected = (weights[..., None] * stacked).sum(0)
        torch.testing.assert_close(residual.read(w).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_buffers_ask_for_large_pages_and_small_ones_do_not():
    found = []
    for count in (1 << 17, 1 << 10):
        buffer = new_buffer(torch.zeros(1, 3, 1, 64), count)
        middle, inside = buffer.data_ptr() + buffer.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
            elif inside and line.startswith("VmFlags:"):
                found.append("hg" in line.split())
    assert found == [True, False]
