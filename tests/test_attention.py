"""AttentionDB against plain attention: the invariants a user relies on, for every index."""

import copy
from functools import partial

import conftest
import pytest
import torch
from conftest import random_rows as rows
from hypothesis import given
from hypothesis import strategies as st

from dbattn import AttentionDB, dense_attention, relative_error
from dbattn.config import INDEX_TRAITS

INDEXES = sorted(INDEX_TRAITS)
SEARCHED = [name for name in INDEXES if name != "segmented"]
database = partial(conftest.database, window=8, n_sink=2)


def plain_attention(query, keys, values, start=None, scale=None, softcap=None):
    """Softmax attention of the newest positions, written out."""
    batch, heads, m, dim = query.shape
    rows = keys.shape[2]
    k, v = (x.double().repeat_interleave(heads // keys.shape[1], dim=1) for x in (keys, values))
    logits = query.double() @ k.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = torch.ones(m, rows, device=query.device).tril(rows - m).bool().expand(batch, 1, m, rows)
    if start is not None:
        mask = mask & (torch.arange(rows, device=query.device) >= start[:, None, None, None])
    return logits.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "dtype"),
    [
        (2, 2, 16, 16, torch.float32),
        (9, 3, 13, 5, torch.float32),
        (4, 1, 16, 8, torch.float16),
        (4, 2, 16, 8, torch.bfloat16),
    ],
)
def test_reading_every_row_equals_dense(index, heads, kv_heads, dim, value_dim, dtype, device):
    keys, values = (part.to(device) for part in rows(300, 2, kv_heads, dim, value_dim, dtype))
    query = torch.randn(2, heads, 3, dim, dtype=dtype).to(device)
    out = database(keys, values, index=index, k=300, max_queries=8).attend(query)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert relative_error(out, plain_attention(query, keys, values)).max() < tolerance


def test_every_list_probed_equals_exact_search():
    keys, values = rows(2048 + 8)  # whole blocks and the window: both indexes answer for the same rows
    query = torch.randn(1, 4, 1, 16)
    db = database(keys, values, index="ivf", k=500, nprobe=10**6)
    assert db.audit(query).recall == 1.0
    exact = database(keys, values, index="flat", k=500).attend(query)
    assert relative_error(db.attend(query), exact).max() < 1e-5


@pytest.mark.parametrize("index", INDEXES)
def test_retrieval_reads_less_and_audit_measures_the_difference(index):
    keys, values = rows(2048)
    query = 3 * torch.randn(1, 4, 1, 16)
    db = database(keys, values, index=index, k=64)
    report = db.audit(query)
    exact = plain_attention(query, keys, values)
    if index == "segmented":  # lists are read whole, and up to a segment's rows are still hot
        assert 48 <= report.rows_retrieved <= 64
        assert report.rows_read < 2048 / 3
    else:
        assert report.rows_retrieved == 64
        assert report.rows_read < 2048 / 4
    assert report.bytes_dense == 2 * 2048 * 2 * 16 * 4
    assert (0.1 if index == "segmented" else 0.5) < report.recall <= 1.0
    assert 0.3 < report.attention_mass < 1.0
    torch.testing.assert_close(
        report.relative_error_by_query, relative_error(db.attend(query), exact), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("index", SEARCHED)
def test_retrieval_is_attention_over_exactly_the_rows_it_names(index):
    keys, values = rows(1500)
    query = 2 * torch.randn(1, 2, 1, 16)
    db = database(keys, values, index=index, k=40)
    plan = db.explain(query)
    found = db.index.search(query, db.store, 40, torch.tensor([2]), plan.hot).ids[0, :, 0]
    for head in range(2):
        read = torch.cat([torch.arange(2), torch.arange(plan.hot, 1500), found[head]]).sort().values
        assert len(set(read.tolist())) == len(read)
        part = plain_attention(
            query[:, head : head + 1], keys[:, head : head + 1, read], values[:, head : head + 1, read]
        )
        assert relative_error(db.attend(query)[:, head], part[:, 0]).max() < 1e-5


@given(st.lists(st.integers(0, 700), min_size=1, max_size=5), st.sampled_from(INDEXES))
def test_chunks_do_not_matter(chunks, index):
    total = sum(chunks)
    if total == 0:
        return
    keys, values = rows(total)
    query = 2 * torch.randn(1, 4, 1, 16)
    at_once = database(keys, values, index=index, k=32)
    in_chunks = database(keys[:, :, :0], values[:, :, :0], index=index, k=32)
    for k, v in zip(keys.split(chunks, dim=2), values.split(chunks, dim=2), strict=True):
        in_chunks.insert(k, v)
    assert torch.equal(at_once.store.keys, in_chunks.store.keys)
    assert torch.equal(at_once.store.values, in_chunks.store.values)
    assert torch.equal(at_once.attend(query), in_chunks.attend(query))


@given(st.integers(1, 1400), st.integers(0, 1400), st.integers(1, 400), st.sampled_from(INDEXES))
def test_truncate_is_never_having_inserted(kept, cut, added, index):
    keys, values = rows(kept + added)
    query = 2 * torch.randn(1, 4, 1, 16)
    db = database(keys[:, :, :kept], values[:, :, :kept], index=index, k=32)
    db.insert(*rows(cut))
    db.truncate(kept)
    assert len(db) == kept
    db.insert(keys[:, :, kept:], values[:, :, kept:])
    fresh = database(keys, values, index=index, k=32)
    assert torch.equal(db.store.keys, fresh.store.keys)
    assert torch.equal(db.attend(query), fresh.attend(query))


@pytest.mark.parametrize("index", INDEXES)
def test_truncate_to_nothing_forgets_batch_padding_and_dtype(index):
    db = database(*rows(1500, batch=2), start=torch.tensor([0, 5]), index=index, k=32)
    db.truncate(0)
    keys, values = rows(1500, batch=3, dtype=torch.float16)
    db.insert(keys, values)
    query = torch.randn(3, 4, 1, 16)
    assert torch.equal(db.attend(query), database(keys, values, index=index, k=32).attend(query))


@pytest.mark.parametrize("index", INDEXES)
def test_rows_inserted_under_inference_mode_can_be_added_to_outside_it(index):
    with torch.inference_mode():
        db = database(*rows(1500), index=index, k=32)
    db.insert(*rows(700))
    assert len(db) == 2200
    assert db.attend(torch.randn(1, 4, 1, 16)).isfinite().all()


def test_a_refused_insert_leaves_the_index_as_it_was():
    keys, values = rows(1500)
    db, untouched = (database(keys, values, index="ivf", k=32) for _ in range(2))
    with pytest.raises(ValueError, match=r"keys hold 1e\+25 at \[0, 0, 0, 0\], expected at most 1e\+08 in size"):
        db.insert(1e25 * torch.ones(1, 2, 600, 16), torch.ones(1, 2, 600, 16))
    more = rows(600)
    db.insert(*more)
    untouched.insert(*more)
    query = torch.randn(1, 4, 1, 16)
    assert torch.equal(db.attend(query), untouched.attend(query))


@pytest.mark.parametrize("index", SEARCHED)
def test_a_sampled_tail_is_unbiased_and_beats_dropping_it(index):
    """Weights of priority sampling: over many draws of rows, the sum they stand for is the sum over all rows."""
    keys, _ = rows(4096 + 8)
    values = keys + 1.0  # values that go with their keys, so that what is dropped matters
    query = 1.5 * torch.randn(1, 4, 1, 16)
    exact, lse = dense_attention(query, keys, values, return_lse=True)
    effort = {"ivf": {"nprobe": 10**6}, "hnsw": {"ef_search": 2048}}.get(index, {})
    errors, ratios = {}, []
    for tail in ("none", "sample"):
        db = database(keys, values, index=index, k=256, tail=tail, **effort)
        errors[tail] = float(relative_error(db.attend(query), exact).mean())
        ratios.append(float(torch.exp(db.attend(query, return_lse=True)[1] - lse).mean()))
    assert errors["sample"] < 0.75 * errors["none"]
    assert ratios[0] < 0.9
    assert abs(ratios[1] - 1) < 0.08


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive(scale):
    db = database(*rows(600), index="flat", k=32)
    query = torch.randn(1, 4, 1, 16)
    for call in (db.attend, db.audit, db.explain):
        with pytest.raises(ValueError, match="scale is"):
            call(query, scale=scale)


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("m", [1, 5, 300])
def test_no_row_after_the_query_is_read(index, m, device):
    keys, values = (part.to(device) for part in rows(1800))
    query = 2 * torch.randn(1, 4, m, 16).to(device)
    options = {"index": index, "k": 48, "max_queries": 400}
    late = database(keys, values, **options).attend(query)
    for i in (0, m - 1):
        position = 1800 - m + i
        # Later keys are made irresistible: whoever reads one answers with it.
        poisoned_keys, poisoned_values = keys.clone(), values.clone()
        poisoned_keys[:, :, position + 1 :] *= 50
        poisoned_values[:, :, position + 1 :] = 1e6
        out = database(poisoned_keys, poisoned_values, **options).attend(query)
        assert out[:, :, i].abs().max() < 1e3
        if index == "flat":
            torch.testing.assert_close(out[:, :, i], late[:, :, i])


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("start", [[0, 7], [500, 0], [1299, 3]])
def test_padded_rows_are_never_read(index, start, device):
    keys, values = (part.to(device) for part in rows(1300, batch=2))
    starts = torch.tensor(start, device=device)
    for b, first in enumerate(start):
        keys[b, :, :first] *= 50
        values[b, :, :first] = 1e6
    query = 2 * torch.randn(2, 4, 1, 16).to(device)
    db = database(keys, values, start=starts, index=index, k=64)
    assert not db.explain(query).is_dense
    assert db.attend(query).abs().max() < 1e3
    everything = database(keys, values, start=starts, index=index, k=2000).attend(query)
    assert relative_error(everything, plain_attention(query, keys, values, starts)).max() < 1e-5
    hits = db.search(query, k=50)
    for b, first in enumerate(start):
        ids = hits.ids[b][hits.ids[b] >= 0]
        assert ids.min() >= first
        assert len(ids) == 4 * min(50, 1300 - first)


@pytest.mark.parametrize("index", SEARCHED)
def test_k_of_all_rows_of_a_padded_batch_row_is_dense_for_it(index):
    keys, values = rows(2048, batch=2)
    query = torch.randn(2, 4, 1, 16)
    start = torch.tensor([0, 1200])
    out = database(keys, values, start=start, index=index, k=900).attend(query)
    exact = plain_attention(query, keys, values, start)
    assert relative_error(out[1], exact[1]).max() < (1e-5 if index != "hnsw" else 0.2)
    assert relative_error(out[0], exact[0]).max() > 1e-3


@pytest.mark.parametrize("index", INDEXES)
def test_audit_and_explain_change_no_answer(index, device):
    keys, values = (part.to(device) for part in rows(1500))
    queries = [torch.randn(1, 4, 1, 16).to(device) for _ in range(3)]
    quiet = database(keys, values, index=index, k=32)
    loud = database(keys, values, index=index, k=32, audit_rate=1.0)
    for query in queries:
        loud.explain(query)
        loud.audit(query)
        assert torch.equal(quiet.attend(query), loud.attend(query))
    assert len(loud.stats.audits) == 3
    assert not quiet.stats.audits


@pytest.mark.parametrize(("rate", "audited"), [(0.0, 0), (0.1, 1), (0.5, 5), (1.0, 10)])
def test_audit_rate_spreads_audits(rate, audited):
    db = database(*rows(600), index="flat", k=32, audit_rate=rate)
    for _ in range(10):
        db.attend(torch.randn(1, 4, 1, 16))
    assert len(db.stats.audits) == audited


def test_an_audit_that_was_due_and_not_made_is_made_at_the_next_call():
    db = database(*rows(600), index="flat", k=32, audit_rate=0.25)
    made = []
    for audit in (False, None, None, None, False, False, None, None, None):
        db.attend(torch.randn(1, 4, 1, 16), audit=audit)
        made.append(len(db.stats.audits))
    assert made == [0, 1, 1, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("index", INDEXES)
def test_search_finds_the_best_rows_in_order(index):
    keys, values = rows(1600)
    query = 2 * torch.randn(1, 4, 2, 16)
    hits = database(keys, values, index=index, k=64).search(query, k=20)
    assert hits.ids.shape == hits.scores.shape == (1, 4, 2, 20)
    logits = (query.view(1, 2, 4, 16) @ keys.transpose(2, 3)).view(1, 4, 2, 1600) * 16**-0.5
    logits[:, :, 0, 1599] = float("-inf")
    exact = logits.sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(hits.scores, logits.gather(-1, hits.ids))
    assert (hits.scores.diff(dim=-1) <= 0).all()
    recall = (hits.scores >= exact.values[..., 19:20] - 1e-4).float().mean()
    assert recall == 1.0 if index == "flat" else recall > 0.8
    if index == "flat":
        assert torch.equal(hits.ids, exact.indices[..., :20])


def test_search_pads_with_missing_rows_and_breaks_ties_by_id():
    keys = torch.ones(1, 1, 5, 4)
    hits = database(keys, keys, index="flat", k=2).search(torch.ones(1, 1, 1, 4), k=8)
    assert hits.ids[0, 0, 0].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert hits.scores[0, 0, 0, 5:].eq(float("-inf")).all()


@pytest.mark.parametrize("index", INDEXES)
def test_select_and_deepcopy_follow_their_rows(index):
    keys, values = rows(1300, batch=2)
    query = 2 * torch.randn(3, 4, 1, 16)
    db = database(keys, values, index=index, k=32)
    clone = copy.deepcopy(db)
    chosen = torch.tensor([1, 0, 1])
    db.select(chosen)
    more = rows(700, batch=3)
    db.insert(*more)
    fresh = database(torch.cat([keys[chosen], more[0]], 2), torch.cat([values[chosen], more[1]], 2), index=index, k=32)
    assert torch.equal(db.attend(query), fresh.attend(query))
    assert len(clone) == 1300
    untouched = database(keys, values, index=index, k=32)
    assert torch.equal(clone.attend(query[:2]), untouched.attend(query[:2]))


def test_softcap_and_sink_logits():
    keys, values = rows(400)
    query = 3 * torch.randn(1, 4, 1, 16)
    capped = database(keys, values, index="flat", k=400).attend(query, softcap=2.0)
    assert relative_error(capped, plain_attention(query, keys, values, softcap=2.0)).max() < 1e-5

    sinks = torch.randn(4)
    for k in (400, 16):
        db = database(keys, values, index="flat", k=k)
        out, lse = db.attend(query, return_lse=True)
        with_sink = db.attend(query, sink_logits=sinks)
        share = torch.sigmoid(lse - sinks[None, :, None])  # of the real rows, beside one row of value zero
        torch.testing.assert_close(with_sink, out * share[..., None])


@pytest.mark.parametrize("index", INDEXES)
def test_growing_one_row_at_a_time_copies_seldom(index):
    db = database(*rows(1), index=index, k=16)
    buffers = set()
    for _ in range(600):
        db.insert(*rows(1))
        buffers.add(db.store.keys.data_ptr())
    assert len(db) == 601
    assert len(buffers) <= 10  # 64, 128, 192, ... 576, 648 rows: an eighth more, 64 at least


def test_rows_that_were_announced_find_their_room():
    db = AttentionDB(2, 16)
    db.reserve(1000)
    seen = set()
    for _ in range(10):
        db.insert(*rows(100))
        seen.add(db.store.buffers[0].data_ptr())
    assert len(seen) == 1
    assert db.store.capacity == 1125
    db.insert(*rows(200))
    assert (len(db), db.store.capacity) == (1200, 1265)
    with pytest.raises(ValueError, match="rows is -1, expected an integer of at least 0"):
        db.reserve(-1)


def test_dense_attention_matches_plain_attention():
    keys, values = rows(130, batch=2, kv_heads=3, dim=13, value_dim=5)
    start = torch.tensor([0, 40])
    for m in (1, 7, 130):
        query = torch.randn(2, 6, m, 13)
        for options in ({}, {"start": start}, {"softcap": 3.0}, {"scale": 0.7}):
            out = dense_attention(query, keys, values, **options)
            torch.testing.assert_close(
                out.double(), plain_attention(query, keys, values, **options), atol=1e-5, rtol=1e-5
            )
    out, lse = dense_attention(query, keys, values, return_lse=True)
    assert out.shape == (2, 6, 130, 5)
    assert lse.shape == (2, 6, 130)


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"softcap": 5.0}, {"start": torch.tensor([3, 1330])}])
def test_few_positions_over_many_rows_are_read_once_for_all_and_as_exact(options, monkeypatch):
    from dbattn import dense

    keys, values = rows(1333, batch=2, kv_heads=3, dim=16, value_dim=16)
    read, ours = [], dense.dense_decode
    monkeypatch.setattr(
        dense, "dense_decode", lambda query, *rest, **more: read.append(query) or ours(query, *rest, **more)
    )
    query = torch.randn(2, 6, 7, 16)
    exact = plain_attention(query, keys, values, **options)
    torch.testing.assert_close(dense_attention(query, keys, values, **options).double(), exact, atol=1e-5, rtol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        other = dense_attention(query.to(dtype), keys.to(dtype), values.to(dtype), **options)
        assert other.dtype == dtype
        torch.testing.assert_close(other.double(), exact, atol=0.05, rtol=0.05)
    assert len(read) == 3


def test_one_position_is_scanned_by_sdpa_where_that_is_faster(monkeypatch):
    from dbattn import dense

    assert dense._prefers_sdpa(torch.device("cuda"))
    assert not dense._prefers_sdpa(torch.device("cpu"))
    keys, values = rows(200, batch=2)
    query, start = torch.randn(2, 4, 1, 16), torch.tensor([0, 70])
    expected = {first: dense_attention(query, keys, values, start=first) for first in (None, start)}
    _, lse = dense_attention(query, keys, values, return_lse=True)
    monkeypatch.setattr(dense, "_prefers_sdpa", lambda device: True)
    ours = dense.dense_decode
    monkeypatch.setattr(dense, "dense_decode", None)
    for first, out in expected.items():
        torch.testing.assert_close(dense_attention(query, keys, values, start=first), out)
    # What SDPA cannot give, or would copy the rows for, stays with our kernel.
    monkeypatch.setattr(dense, "dense_decode", ours)
    torch.testing.assert_close(dense_attention(query, keys, values, return_lse=True)[1], lse)
    for other in (
        dense_attention(query, keys, values, softcap=50.0),
        dense_attention(query, keys.half(), values.half()),
    ):
        assert relative_error(other, expected[None]).max() < 0.05


def test_dense_attention_of_several_positions_over_many_rows_has_gradients():
    keys, values = rows(1100)
    query = torch.randn(1, 4, 8, 16, requires_grad=True)
    dense_attention(query, keys, values).sum().backward()
    assert query.grad.abs().sum() > 0
