"""The segmented index: its kernel against plain torch, and the invariants in any order of events."""

import copy
import subprocess
import sys
from functools import partial
from itertools import pairwise
from textwrap import dedent

import conftest
import numpy as np
import pytest
import torch
from conftest import real_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dbattn import AttentionDB, dense_attention, relative_error
from dbattn.index import make_index
from dbattn.index._list_scan import ListScan, budget
from dbattn.index.segmented import SEGMENT_ROWS, segment_bounds
from dbattn.query.call import Call
from index_kernels import attend_segmented, top_k

database = partial(conftest.database, index="segmented", n_sink=2)


def clustered(n, batch=1, kv_heads=2, dim=16, value_dim=16, dtype=torch.float32):
    """Rows that form clusters, as real keys do."""
    centres = 2 * torch.randn(batch, kv_heads, 40, dim)
    keys = centres[:, :, torch.arange(n) % 40] + 0.5 * torch.randn(batch, kv_heads, n, dim)
    return keys.to(dtype), torch.randn(batch, kv_heads, n, value_dim).to(dtype)


def lists_answer(db, query, k):
    """What the lists answer under a budget of k rows per KV head."""
    call = Call.checked(query, db.store, db.index, db.config)
    return ListScan((), k).attend(call, db.index, query, len(db))


def _in_order(db):
    keys, values = db.store.keys.clone(), db.store.values.clone()
    if db.index._lists is not None:
        places = torch.from_numpy(db.index._lists.positions[:, :, : len(db.index)].copy()).long().argsort(dim=-1)
        for rows in (keys, values):
            rows[:, :, : len(db.index)] = rows.gather(2, places[..., None].expand(-1, -1, -1, rows.shape[3]))
    return keys, values


def test_reading_every_list_equals_dense_and_an_honest_summary_beats_none():
    keys, values = clustered(4096)
    query = torch.randn(1, 4, 1, 16)
    exact = dense_attention(query, keys, values)
    db = database(keys, values)
    assert relative_error(lists_answer(db, query, 4096).out, exact).max() < 1e-5
    errors = {
        tail: float(relative_error(database(keys, values, k=256, tail=tail).attend(query), exact).mean())
        for tail in ("centroid", "none")
    }
    assert errors["centroid"] < 0.5 * errors["none"]


@given(st.lists(st.tuples(st.sampled_from(["insert", "truncate", "release", "copy"]), st.integers(0, 900)), max_size=8))
@settings(max_examples=30)
def test_any_order_of_events_gives_the_store_of_its_rows(events):
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(1, 2, 0, 16)
    db = database(kept, kept, k=64)
    for event, size in events:
        if event == "insert":
            new = torch.randn(1, 2, size, 16, generator=generator)
            db.insert(new, new)
            kept = torch.cat([kept, new], dim=2)
        elif event == "truncate":
            kept = kept[:, :, : min(size, kept.shape[2])]
            db.truncate(kept.shape[2])
        elif event == "copy":
            db = copy.deepcopy(db)
        else:
            db.release()
            db.sync()
        assert len(db) == kept.shape[2]
    if not len(db):
        return
    keys, values = _in_order(db)
    assert torch.equal(keys, kept)
    assert torch.equal(values, kept)
    fresh, query = database(kept, kept, k=64), torch.randn(1, 4, 1, 16, generator=generator)
    assert torch.equal(db.store.keys, fresh.store.keys)
    assert torch.equal(db.attend(query), fresh.attend(query))


def test_segments_are_a_function_of_the_number_of_rows_and_merge_as_they_grow():
    for rows in (0, 511, 512, 5000, 131072 + 700):
        bounds = segment_bounds(rows)
        assert rows - bounds[-1] < SEGMENT_ROWS[-1]
        sizes = [b - a for a, b in pairwise(bounds)]
        assert sizes == sorted(sizes, reverse=True)
        assert set(sizes) <= set(SEGMENT_ROWS)
    budgets = [budget(rows, None)[0] / rows for rows in (8192, 32768, 131072, 524288)]
    assert budgets == sorted(budgets, reverse=True)


def test_several_queries_see_only_their_own_past():
    keys, values = clustered(2000)
    query = torch.randn(1, 4, 9, 16)
    db = database(keys, values, k=300, max_queries=9)
    together = db.attend(query)
    assert not db.explain(query).is_dense
    for i in range(9):
        shorter = database(keys[:, :, : 2000 - 8 + i], values[:, :, : 2000 - 8 + i], k=300)
        torch.testing.assert_close(together[:, :, i], shorter.attend(query[:, :, i : i + 1])[:, :, 0])
    many = torch.randn(1, 4, 900, 16)
    assert db.explain(many).reason == "more queries in one call than max_queries=9"
    dense = database(keys, values, k=300, max_queries=1000)
    assert "sealed already" in dense.explain(many).reason
    assert relative_error(dense.attend(many), dense_attention(many, keys, values)).max() < 1e-4
    assert dense.search(many, k=3).ids.max() < 2000


@pytest.mark.parametrize("layer", [8, 22])
def test_error_on_real_rows_at_the_default_budget(layer):
    """SmolLM2-135M, 3840 tokens of prose, one KV head: output error against dense, hot rows and budget at default."""
    query, keys, values = real_rows(layer)
    db = database(keys, values, n_sink=4)
    report = db.audit(query[:, :, -1:])
    assert report.relative_error < 0.08
    assert report.bytes_read < 0.6 * report.bytes_dense


def test_same_inputs_give_the_same_bits():
    keys, values = clustered(3000)
    query = torch.randn(1, 4, 1, 16)
    answers = [database(keys, values).attend(query) for _ in range(3)]
    assert all(torch.equal(answers[0], other) for other in answers)


@pytest.mark.parametrize("place", [50, 3000, 5800])
def test_a_lone_best_row_is_found_and_has_its_weight_wherever_it_stands(place):
    """Its list has one row and no variance, so that reading it is worth nothing to the answer: the summary says it."""
    keys, values = 2 * torch.randn(2, 1, 2, 6000, 16)
    query = torch.randn(1, 4, 1, 16)
    keys[0, 0, place] = 100 * query[0, 0, 0] / query[0, 0, 0].norm()
    db = database(keys, values)
    hits = db.search(query, 1)
    assert hits.ids[0, 0, 0, 0] == place
    assert hits.exact
    weights = db.row_weights(query)
    torch.testing.assert_close(weights.total.sum(dim=-1), torch.ones(1, 4), atol=1e-5, rtol=0)
    assert weights.total[0, 0, place] > 0.99
    # What was not read is not counted as read: the answer is right, and its audit says where it comes from.
    report = db.audit(query)
    assert report.relative_error_by_query[0, 0] < 0.02
    assert report.attention_mass_by_query[0, 0] == pytest.approx(float(weights.read[0, 0].sum()), abs=0.02)


def test_search_looks_at_every_row_in_the_order_of_positions():
    keys, values = clustered(3000, batch=2)
    keys[:, :, 2000:2010] = keys[:, :, 1000:1010]
    query, start = torch.randn(2, 4, 3, 16), torch.tensor([0, 700])
    hits = database(keys, values, start=start).search(query, 40)
    exact = top_k(query, keys, 40, start=start, stop=torch.arange(2998, 3001))
    assert torch.equal(hits.ids, exact[0])
    torch.testing.assert_close(hits.scores, exact[1])


def plain_weights(db, query, keys):
    """Softmax weights by position, relative to the answer's whole weight; and the answer."""
    answer = lists_answer(db, query, db.config.k)
    logits = (query.unflatten(1, (keys.shape[1], -1))[:, :, :, 0] @ keys.transpose(2, 3)).flatten(1, 2) * 0.25
    return torch.exp(logits - answer.lse), answer


@pytest.mark.parametrize("rows", [3000, 20000])  # one level, and two
@pytest.mark.parametrize("portable", [False, True])
def test_weights_give_rows_not_read_the_weight_of_their_code_or_summary(rows, portable, monkeypatch):
    keys, values = clustered(rows)
    query = torch.randn(1, 4, 1, 16)
    db = database(keys, values, k=300)
    if portable:
        reference = partial(attend_segmented, backend="reference")
        monkeypatch.setattr("dbattn.index._list_scan.attend_segmented", reference)
    own, answer = plain_weights(db, query, keys)
    weights = db.row_weights(query)
    read, unread = weights.read > 0, weights.for_unread > 0
    torch.testing.assert_close(weights.read[read], own[read], atol=1e-6, rtol=1e-3)
    # Each row one way or the other (a weight may round to nothing), and together what each source weighs.
    assert not (read & unread).any()
    assert (read | unread).float().mean() > 0.99
    by_source = torch.exp(answer.lse_by_source - answer.lse)[..., 0]
    torch.testing.assert_close(weights.for_unread.sum(-1), by_source[2:].sum(dim=0))
    torch.testing.assert_close(weights.total.sum(-1), torch.ones(1, 4), atol=1e-5, rtol=0)
    # By clusters of rows, a summary's share is near what its rows would have weighed.
    shares, exact = (x.unflatten(-1, (-1, 40)).sum(-2) for x in (weights.for_unread, own.masked_fill(~unread, 0)))
    assert torch.cosine_similarity(shares, exact, dim=-1).min() > 0.9


@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_segment_saved_before_codes_were_kept_gets_them_when_it_is_loaded(storage):
    keys, values = clustered(2600)
    db = database(keys, values, k=64, storage=storage)
    loaded = make_index(db.config)
    for first, stop in pairwise(db.index.bounds):
        state = {name: array for name, array in db.index.state(first, stop).items() if name != "codes"}
        loaded.load_state(db.store, db.store.start + db.config.n_sink, first, stop, state)
    ours, theirs = (index.table.codes[:, :, : len(loaded), :-4] for index in (db.index, loaded))
    assert (ours != theirs).mean() < 0.01
    assert len(loaded) == 2432


def moments(index):
    return index.table.shape, index.table.cross


def test_moments_saved_as_sums_are_what_they_are_saved_as_now_when_they_are_loaded():
    keys, values = clustered(2600)
    db = database(keys, values, k=64)
    loaded = make_index(db.config)
    for first, stop in pairwise(db.index.bounds):
        state = db.index.state(first, stop)
        for name in ("segment_shape", "segment_cross"):
            state[name] = state[name] * state["segment_trace"][..., None, None]
            assert state[name].dtype == np.float32
        loaded.load_state(db.store, db.store.start + db.config.n_sink, first, stop, state)
    for ours, theirs in zip(moments(db.index), moments(loaded), strict=True):
        np.testing.assert_allclose(theirs.view(np.float16), ours.view(np.float16), rtol=2e-3, atol=1e-6)


def test_a_segment_of_equal_rows_leaves_the_moments_of_its_head_finite():
    keys, values = clustered(2600)
    keys[:, :, 2048:] = 3 * torch.randn(16)  # whole segments
    db = database(keys, values, k=64)
    assert all(np.isfinite(bits.view(np.float16)).all() for bits in moments(db.index))
    assert bool(db.attend(torch.randn(1, 4, 1, 16)).isfinite().all())


def test_missing_numba_names_the_extra(monkeypatch):
    monkeypatch.setattr("dbattn.index.segmented.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"dbattn\[cpu\]"):
        AttentionDB(2, 16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    db = AttentionDB(2, 16)
    with pytest.raises(ImportError, match=r"dbattn\[cpu\]"):
        db.insert(*conftest.random_rows(400))
    assert len(db) == 0


def test_a_gpu_needs_no_numba():
    """As if on one: rows are sealed and read in torch."""
    program = """
        import sys
        sys.modules["numba"] = None
        import pytest, torch, dbattn
        patch = pytest.MonkeyPatch()
        patch.setattr("dbattn.index.segmented.find_spec", lambda name: None)
        patch.setattr("index_kernels.ops._installed", lambda name: False)
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("dbattn.index.segmented.on_device", lambda tensor: True)
        db = dbattn.AttentionDB(2, 16, config=dbattn.RetrievalConfig(k=400, dense_below=0))
        db.insert(*torch.randn(2, 1, 2, 400, 16))
        query = torch.randn(1, 4, 1, 16)
        print(len(db.index), float((db.attend(query) - db.attend(query, retrieve=False)).abs().max()))
    """
    ended = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=True)
    sealed, off = ended.stdout.split()
    assert int(sealed) > 0
    assert float(off) < 1e-5
