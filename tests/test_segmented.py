"""The segmented index: its kernel against plain torch, and the invariants in any order of events."""

import copy
from itertools import pairwise

import pytest
import torch
from conftest import real_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dbattn import AttentionDB, RetrievalConfig, dense_attention, relative_error
from dbattn.index.segmented import SEGMENT_ROWS, Reading, SegmentedIndex, budget, segment_bounds
from index_kernels import merge_states, top_k


def clustered(n, batch=1, kv_heads=2, dim=16, value_dim=16, dtype=torch.float32):
    """Rows that form clusters, as real keys do."""
    centres = 2 * torch.randn(batch, kv_heads, 40, dim)
    keys = centres[:, :, torch.arange(n) % 40] + 0.5 * torch.randn(batch, kv_heads, n, dim)
    return keys.to(dtype), torch.randn(batch, kv_heads, n, value_dim).to(dtype)


def database(keys, values, start=None, **options):
    options = {"index": "segmented", "dense_below": 0, "n_sink": 2, "audit_rate": 0.0, **options}
    db = AttentionDB(keys.shape[1], keys.shape[3], value_dim=values.shape[3], config=RetrievalConfig(**options))
    db.insert(keys, values, start=start)
    return db


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "value_dim"), [(torch.float32, 6, 16, 16), (torch.bfloat16, 2, 24, 8)]
)
def test_the_fused_kernel_is_the_exact_rows_and_the_summaries(dtype, heads, dim, value_dim, softcap):
    """Whatever lists it chose: their rows exactly, sinks and hot rows exactly, every other list by its summary."""
    keys, values = clustered(3000, batch=2, dim=dim, value_dim=value_dim, dtype=dtype)
    start = torch.tensor([0, 700])
    query = torch.randn(2, heads, 1, dim)
    db = database(keys, values, start=start, k=200)
    for tail in (True, False):
        how = Reading(200, dim**-0.5, softcap, n_sink=2, tail=tail, want_slots=True)
        fused = db.index.attend(query, db.store, how)
        same = _plain(db, query, fused.slots, how.scale, softcap, tail)
        # Summaries of negligible weight count in the lse, but the kernel does not fetch their values.
        assert relative_error(fused.out, same[0]).max() < (1e-3 if tail else 2e-5)
        torch.testing.assert_close(fused.lse, same[1], atol=2e-5, rtol=1e-5)


def _plain(db, query, slots, scale, softcap, tail):
    """The same answer from the formulas, in float64."""
    store, lists = db.store, db.index._lists.summaries(query.device)
    group = query.shape[1] // store.num_kv_heads
    out, lse = torch.zeros(*query.shape[:3], store.value_dim), torch.zeros(query.shape[:3])
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            g, q = h // group, scale * query[b, h, 0].double()
            first, read = int(store.start[b]), slots[b, h, 0][slots[b, h, 0] >= 0]
            rows = torch.cat([torch.arange(first, first + 2), torch.arange(len(db.index), len(store)), read])
            logits = store.keys[b, g, rows].double() @ q
            values = store.values[b, g, rows].double()
            centre = lists.key[b, g].double() @ q
            slope = torch.ones_like(centre)
            if softcap is not None:
                logits, centre = softcap * torch.tanh(logits / softcap), softcap * torch.tanh(centre / softcap)
                slope = 1 - (centre / softcap) ** 2
            unread = ~torch.isin(lists.begin[b, g], read) & (lists.size[b, g] > 0)
            spread = q @ lists.shape[b, g].double() @ q
            mean = centre + 0.38 * spread * lists.variance[b, g] * slope**2 + lists.size[b, g].log()
            moved = lists.value[b, g] + 0.7 * lists.variance[b, g][:, None] * (q @ lists.cross[b, g].double())
            if tail:
                logits, values = torch.cat([logits, mean[unread]]), torch.cat([values, moved[unread].double()])
            out[b, h, 0], lse[b, h, 0] = logits.softmax(0) @ values, logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_portable_path_answers_like_the_fused_one(softcap):
    keys, values = clustered(3000, batch=2)
    query = torch.randn(2, 6, 1, 16)
    db = database(keys, values, start=torch.tensor([0, 700]))
    how = Reading(300, 0.25, softcap, n_sink=2, tail=True, want_deviation=True, want_slots=True)
    arguments = (query[:, :, 0], db.store, 3000, how)
    fused, portable = db.index._attend_fused(*arguments), db.index._attend_portable(*arguments)
    exact = dense_attention(query, *_in_order(db), start=db.store.start, scale=0.25, softcap=softcap)
    assert abs(portable.rows_read - fused.rows_read) < 20
    errors = [float(relative_error(answer.out, exact).mean()) for answer in (fused, portable)]
    assert errors[1] < 1.1 * errors[0] + 1e-3
    same = merge_states(*_states(portable))
    torch.testing.assert_close(same[1], portable.lse)
    torch.testing.assert_close(portable.deviation, fused.deviation, rtol=0.1, atol=0.1 * float(fused.deviation.mean()))


def _states(answer):
    outs = answer.out.expand(3, *answer.out.shape)
    return outs, answer.lse_by_source


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
    everything = db.index.attend(query, db.store, Reading(4096, 0.25, None, n_sink=2, tail=True))
    assert relative_error(everything.out, exact).max() < 1e-5
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
    assert db.explain(many[:, :, :1]).reason != ""
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
    """Softmax weights by position, the rows of each unread list or super-list under its summary's even share."""
    how = Reading(db.config.k, 0.25, None, n_sink=2, tail=True, want_slots=True)
    answer = db.index.attend(query, db.store, how)
    logits = (query.unflatten(1, (keys.shape[1], -1))[:, :, :, 0] @ keys.transpose(2, 3)).flatten(1, 2) * 0.25
    return torch.exp(logits - answer.lse), answer


@pytest.mark.parametrize("rows", [3000, 20000])  # one level, and two
@pytest.mark.parametrize("portable", [False, True])
def test_weights_give_rows_not_read_their_summarys_weight(rows, portable, monkeypatch):
    keys, values = clustered(rows)
    query = torch.randn(1, 4, 1, 16)
    db = database(keys, values, k=300)
    if portable:
        monkeypatch.setattr(SegmentedIndex, "_attend_fused", SegmentedIndex._attend_portable)
    own, answer = plain_weights(db, query, keys)
    weights = db.row_weights(query)
    read, unread = weights.read > 0, weights.for_unread > 0
    torch.testing.assert_close(weights.read[read], own[read], atol=1e-6, rtol=1e-3)
    # Each row one way or the other (a weight may round to nothing), and together what each source weighs.
    assert not (read & unread).any()
    assert (read | unread).float().mean() > 0.99
    torch.testing.assert_close(weights.for_unread.sum(-1), torch.exp(answer.lse_by_source[2] - answer.lse)[..., 0])
    torch.testing.assert_close(weights.total.sum(-1), torch.ones(1, 4), atol=1e-5, rtol=0)
    # By clusters of rows, a summary's share is near what its rows would have weighed.
    shares, exact = (x.unflatten(-1, (-1, 40)).sum(-2) for x in (weights.for_unread, own.masked_fill(~unread, 0)))
    assert torch.cosine_similarity(shares, exact, dim=-1).min() > 0.9


def test_missing_numba_names_the_extra(monkeypatch):
    monkeypatch.setattr("dbattn.index.segmented.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"dbattn\[cpu\]"):
        AttentionDB(2, 16)
