"""What an index learns from queries: the metric it clusters keys in, a function of rows and queries in their order."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import real_rows, tiny_llama
from safetensors.torch import load_file, save_file

from dbattn import AttentionDB, RetrievalConfig, dense_attention
from dbattn.hf import wrap
from dbattn.index._calibration import Audited, solve
from dbattn.snapshot import SnapshotError
from dbattn.store.queries import GIVEN, STRIDE, QuerySample
from index_kernels import attend_segmented

SEGMENTED = RetrievalConfig(index="segmented", k=50, dense_below=0, n_sink=2, window=8, audit_rate=0.0)


def rows_and_queries(n=2400, batch=1):
    """Keys that differ most where no query looks: of 16 dimensions queries see four."""
    keys, values = torch.randn(batch, 2, n, 16), torch.randn(batch, 2, n, 16)
    queries = torch.randn(batch, 4, n, 16)
    keys[..., 4:] *= 4
    queries[..., 4:] *= 0.02
    return keys, values, 3 * queries


def filled(keys, values, queries=None, chunks=(), **options):
    db = AttentionDB(2, 16, config=SEGMENTED)
    for first, stop in zip((0, *chunks), (*chunks, keys.shape[2]), strict=True):
        asked = None if queries is None else queries[:, :, first:stop]
        db.insert(keys[:, :, first:stop], values[:, :, first:stop], asked, **(options if not first else {}))
    return db


def newest(queries):
    return queries[:, :, -1:]


def test_lists_that_learn_from_queries_answer_them_better():
    keys, values, queries = rows_and_queries()
    plain, learnt = filled(keys, values), filled(keys, values, queries)
    errors = [db.audit(newest(queries)).relative_error for db in (plain, learnt)]
    assert errors[1] < 0.7 * errors[0]
    assert "keys alone" in str(plain.explain(newest(queries)))
    assert "queries and keys" in str(learnt.explain(newest(queries)))


@pytest.mark.parametrize("layer", [8, 22])
def test_real_queries_lower_the_error_of_the_default(layer):
    query, keys, values = real_rows(layer)
    errors = []
    for learns in (False, True):
        db = AttentionDB(1, 64, config=RetrievalConfig(k=150, dense_below=0, audit_rate=0.0))
        db.insert(keys, values)
        if learns:
            db.analyze(query)
        errors.append(db.audit(query[:, :, -1:]).relative_error)
    assert errors[1] < 1.15 * errors[0]


@pytest.mark.parametrize("chunks", [(1,), (100, 1023, 1024, 1025), (8, 2000), tuple(range(7, 2400, 97))])
def test_what_is_learnt_does_not_depend_on_how_rows_arrived(chunks):
    keys, values, queries = rows_and_queries()
    whole, pieces = filled(keys, values, queries), filled(keys, values, queries, chunks)
    assert torch.equal(whole.attend(newest(queries)), pieces.attend(newest(queries)))
    assert torch.equal(whole.store.keys, pieces.store.keys)


def test_without_queries_nothing_is_learnt_and_with_too_few_neither():
    keys, values, queries = rows_and_queries()
    plain = filled(keys, values)
    few = AttentionDB(2, 16, config=SEGMENTED)
    few.insert(keys[:, :, :100], values[:, :, :100], queries[:, :, :100])
    few.insert(keys[:, :, 100:], values[:, :, 100:])
    assert few.store.sample.present.sum() == 4
    assert torch.equal(few.attend(newest(queries)), plain.attend(newest(queries)))


@pytest.mark.parametrize("length", [900, 1300, 2200])
def test_cut_rows_leave_no_trace(length):
    keys, values, queries = rows_and_queries()
    other = rows_and_queries()[2]
    db = filled(keys, values, torch.cat([queries[:, :, :length], other[:, :, length:]], dim=2))
    db.truncate(length)
    db.insert(keys[:, :, length:], values[:, :, length:], queries[:, :, length:])
    assert torch.equal(db.attend(newest(queries)), filled(keys, values, queries).attend(newest(queries)))


def test_a_snapshot_goes_on_learning_where_it_was(tmp_path):
    keys, values, queries = rows_and_queries()
    for stop in (700, 2300):
        db = filled(keys[:, :, :stop], values[:, :, :stop], queries[:, :, :stop])
        db.save(tmp_path / f"{stop}.dbattn")
        opened = AttentionDB.open(tmp_path / f"{stop}.dbattn")
        assert torch.equal(opened.attend(queries[:, :, stop - 1 : stop]), db.attend(queries[:, :, stop - 1 : stop]))
        for each in (db, opened):
            each.insert(keys[:, :, stop:], values[:, :, stop:], queries[:, :, stop:])
        assert torch.equal(opened.attend(newest(queries)), db.attend(newest(queries)))


def test_a_forged_sample_is_refused():
    keys, values, queries = rows_and_queries(1300)
    db = filled(keys, values, queries)
    db.analyze(queries[:, :, -100:])
    state = db.store.sample.state()

    def refused(**changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            QuerySample.of_state({**state, **changes}, 1300, 1, 2, 16, torch.device("cpu"))

    refused(queries=state["queries"][:, :3])
    refused(queries=state["queries"].float())
    refused(queries=state["queries"].repeat(1, 1, 2, 1))
    refused(queries=torch.full_like(state["queries"], -1))
    refused(present=state["present"][1:])
    refused(present=state["present"] + 1)
    refused(given=state["given"].repeat(1, 1, 3, 1))
    refused(given_known=state["given_known"][:, 1:])
    refused(given_rows=state["given_rows"] * 0)
    refused(other=state["queries"])


def test_a_damaged_file_of_queries_is_refused_by_name(tmp_path):
    keys, values, queries = rows_and_queries(1300)
    filled(keys, values, queries).save(tmp_path / "db")
    (file,) = (tmp_path / "db").glob("queries-*")
    tensors = load_file(file)
    save_file({name: part.flip(-1).contiguous() for name, part in tensors.items()}, file)
    with pytest.raises(SnapshotError, match="queries-"):
        AttentionDB.open(tmp_path / "db")


def test_analyze_indexes_anew_what_came_without_queries():
    keys, values, queries = rows_and_queries()
    db = filled(keys, values)
    before = db.audit(newest(queries)).relative_error
    db.analyze(queries[:, :, -300:])
    assert db.audit(newest(queries)).relative_error < 0.7 * before
    assert "queries and keys" in str(db.explain(newest(queries)))
    assert torch.equal(db.keys, keys)
    # Answers do not depend on what had been learnt before.
    other = filled(keys, values, queries.flip(3))
    other.analyze(queries[:, :, -300:])
    assert torch.equal(other.attend(newest(queries)), db.attend(newest(queries)))


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_faiss_indexes_learn_too_and_find_by_the_same_products(index, tmp_path):
    pytest.importorskip("faiss")
    keys, values, queries = rows_and_queries()
    config = RetrievalConfig(index=index, k=64, dense_below=0, window=8, n_sink=2, audit_rate=0.0)
    built = []
    for chunks in ((2400,), (100, 900, 1000, 400)):
        db = AttentionDB(2, 16, config=config)
        for part in zip(*(rows.split(chunks, dim=2) for rows in (keys, values, queries)), strict=True):
            db.insert(*part)
        built.append(db)
    answers = [db.attend(newest(queries)) for db in built]
    assert torch.equal(answers[0], answers[1])
    assert built[0].index.describe()["learnt_from"] == "queries"
    exact = AttentionDB(2, 16, config=RetrievalConfig(index="flat", k=64, dense_below=0, window=8, n_sink=2))
    exact.insert(keys, values)
    found, best = (db.search(newest(queries), 64).scores for db in (built[0], exact))
    assert (found >= best[..., -1:] - 1e-4).float().mean() > 0.9
    built[0].save(tmp_path / "db")
    assert torch.equal(AttentionDB.open(tmp_path / "db").attend(newest(queries)), answers[0])
    plain = AttentionDB(2, 16, config=config)
    plain.insert(keys, values)
    assert "learnt_from" not in plain.index.describe()
    plain.analyze(queries[:, :, -200:])
    assert plain.index.describe()["learnt_from"] == "queries"
    assert (plain.search(newest(queries), 64).scores >= best[..., -1:] - 1e-4).float().mean() > 0.9


def test_with_every_row_read_what_is_learnt_changes_nothing():
    keys, values, queries = rows_and_queries()
    db = filled(keys, values, queries)
    exact = db.attend(newest(queries), retrieve=False)
    db.config = RetrievalConfig(index="segmented", k=len(db), dense_below=0, n_sink=2, window=8)
    assert torch.allclose(db.attend(newest(queries)), exact, rtol=0, atol=1e-5)


def test_padding_is_not_learnt_from():
    keys, values, queries = rows_and_queries(batch=2)
    start = torch.tensor([0, 301])
    other = queries.clone()
    other[1, :, :301] = 1e4
    dbs = [filled(keys, values, each, (1100,), start=start) for each in (queries, other)]
    metrics = [db.store.sample.metric(1024, start, 2) for db in dbs]
    assert torch.allclose(metrics[0][0], metrics[1][0])
    assert metrics[0][1].all()
    assert not dbs[0].store.sample.metric(512, start, 2)[1][1]


def test_selected_batch_rows_keep_what_they_learnt():
    keys, values, queries = rows_and_queries(batch=2)
    db = filled(keys, values, queries)
    db.select(torch.tensor([1, 1]))
    alone = filled(keys[1:], values[1:], queries[1:])
    out = db.attend(newest(queries)[[1, 1]])
    assert torch.equal(out[:1], out[1:])
    assert torch.allclose(out[:1], alone.attend(newest(queries)[1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda q: q[:, :, 1:], r"queries have shape \[1, 4, 2399, 16\], expected \[1, Hq, 2400, 16\]"),
        (lambda q: q[:, :3], "3 query heads do not divide"),
        (lambda q: q.double(), "queries are torch.float64"),
        (lambda q: q / 0, "queries hold"),
    ],
)
def test_queries_that_do_not_fit_are_refused_before_anything_is_stored(change, word):
    keys, values, queries = rows_and_queries()
    db = AttentionDB(2, 16, config=SEGMENTED)
    with pytest.raises(ValueError, match=word):
        db.insert(keys, values, change(queries))
    assert len(db) == 0
    db.insert(keys, values, queries)
    with pytest.raises(ValueError, match="expected"):
        db.analyze(torch.zeros(1, 4, len(db) + 1, 16))
    with pytest.raises(ValueError, match=r"queries have shape \[1, 2, 1, 16\], expected \[1, 4, 1, 16\]"):
        db.insert(keys[:, :, :1], values[:, :, :1], queries[:, :2, :1])


def test_a_wrapped_model_learns_from_its_prompt():
    model, ids = tiny_llama(), torch.arange(1300)[None] % 1000
    with wrap(model, RetrievalConfig(k=64, dense_below=0)) as handle, torch.inference_mode():
        cache = handle.new_cache()
        for chunk in ids.split(400, dim=1):
            model(chunk, past_key_values=cache)
        samples = [layer.db.store.sample for layer in cache.layers]
        metrics = [layer.db.store.sample.metric(1024, layer.db.store.start, 2)[0] for layer in cache.layers]
        assert all(layer.db.index.learnt for layer in cache.layers)
    assert all(sample.present[: 1300 // STRIDE].all() and sample.heads == 4 for sample in samples)
    assert not torch.equal(metrics[0], metrics[1])


def test_a_metric_is_symmetric_and_on_the_scale_of_the_identity():
    keys, values, queries = rows_and_queries(1024)

    def metric(queries):
        db = filled(keys, values, queries)
        return db.store.sample.metric(1024, db.store.start, 2)[0]

    found = metric(queries)
    assert torch.allclose(found, found.transpose(2, 3), atol=1e-6)
    assert np.all(np.linalg.eigvalsh(found.numpy()) > 0)
    assert torch.allclose(metric(64 * queries), found, atol=1e-5)


def test_a_sample_that_no_query_came_to_tells_nothing():
    metric, enough = QuerySample(1, 4, 16, torch.device("cpu")).metric(768, torch.zeros(1, dtype=torch.int64), 2)
    assert not enough.any()
    assert metric.isfinite().all()


def test_the_queries_before_a_segment_ends_are_those_it_learns_from():
    keys, values, queries = rows_and_queries(4200)
    old = queries.clone()
    old[:, :, : 4096 - 2048] *= 100
    answers = [filled(keys, values, each).attend(newest(queries)) for each in (queries, old)]
    assert torch.equal(*answers)


def test_a_sample_stays_small():
    keys, values, queries = rows_and_queries(4096)
    db = filled(keys, values, queries)
    rows = db.store.keys.nbytes + db.store.values.nbytes
    assert db.store.sample.nbytes < 0.02 * rows
    db.analyze(queries)
    assert db.store.sample.given.shape[2] == GIVEN


def calibrated(target=0.1, chunks=(), n=3000, rows=None):
    keys, values, queries = rows_and_queries(n) if rows is None else rows
    db = AttentionDB(2, 16, config=replace(SEGMENTED, k=None, target_error=target))
    for first, stop in zip((0, *chunks), (*chunks, n), strict=True):
        db.insert(*(part[:, :, first:stop] for part in (keys, values, queries)))
        if chunks:
            db.attend(queries[:, :, stop - 1 : stop])
    return db, newest(queries)


def test_a_budget_is_found_for_the_error_asked_for_and_told():
    rows = rows_and_queries(3000)
    errors, budgets = [], []
    for target in (0.4, 0.1):
        db, query = calibrated(target, rows=rows)
        plan = db.explain(query)
        assert f"target_error={target}" in plan.reason
        assert f"expect {db.index.needs.at(1.0).error:.2g}" in str(plan)
        budgets.append(db.index.needs.read)
        errors.append(db.audit(query).relative_error)
    assert budgets[0] < budgets[1]
    assert errors[1] < errors[0]


def test_heads_that_err_more_for_what_is_not_read_count_more():
    error, unread = torch.tensor([[0.08, 0.01], [0.1, 0.03]]), torch.tensor([[0.1, 0.2], [0.1, 0.2]])
    audited = Audited(error, unread, torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    weights = audited.head_weights(of_worst=False)
    assert weights[0] / weights[1] == pytest.approx(3.0)
    assert sum(weights) == pytest.approx(2.0)
    worst = audited.head_weights(of_worst=True)
    assert worst[0] / worst[1] == pytest.approx(3 * math.sqrt(4.5))
    assert audited.factors == pytest.approx((1.6, 0.15))


def test_rows_go_to_the_heads_whose_error_they_lower():
    keys, values, queries = rows_and_queries(3000)
    values[:, 0] = 1.0  # the first KV head's answer is the same whatever is read
    db, query = calibrated(rows=(keys, values, queries))
    read = (db.row_weights(query).read > 0).sum(dim=-1)[0]
    assert read[0] < read[2] / 4


def test_other_query_heads_than_those_sampled_may_ask(monkeypatch):
    db, query = calibrated()
    db.attend(query)
    more, given = query.repeat_interleave(2, dim=1), []
    monkeypatch.setattr("dbattn.index._list_scan.attend_segmented", lambda *args, **_: given.append(args[4]))
    with pytest.raises(AttributeError):  # nothing was answered
        db.attend(more)
    assert given[0].head_weights is None
    how = given[0]._replace(head_weights=db.index.needs.head_weights)
    with pytest.raises(ValueError, match="head_weights are 4, expected one for each of 8 heads"):
        attend_segmented(more, *db.store.buffers, db.index.table, how, start=db.store.start)


def test_a_budget_does_not_depend_on_how_rows_arrived_or_what_was_asked_between():
    rows = rows_and_queries(3000)
    whole, query = calibrated(rows=rows)
    pieces, _ = calibrated(rows=rows, chunks=(1500, 2200, 2990))
    assert torch.equal(whole.attend(query), pieces.attend(query))
    assert whole.index.needs == pieces.index.needs


def test_a_budget_is_found_again_in_a_snapshot(tmp_path):
    db, query = calibrated()
    answer = db.attend(query)
    db.save(tmp_path / "rows")
    again = AttentionDB.open(tmp_path / "rows")
    assert torch.equal(again.attend(query), answer)
    assert again.index.needs == db.index.needs


def test_calls_of_several_kinds_are_audited_once_each(monkeypatch):
    db, query = calibrated()
    kinds = [db.config, replace(db.config, k=50), replace(db.config, target_error=0.2), db.config]
    answers = []
    for db.config in kinds:
        answers.append(db.attend(query))
    monkeypatch.setattr("dbattn.index.segmented.calibrate", None)
    for db.config, answer in zip(kinds, answers, strict=True):
        assert torch.equal(db.attend(query), answer)


@pytest.mark.parametrize("options", [{"k": 77}, {"target_error": None}])
def test_a_budget_of_the_users_or_none_is_not_calibrated(options):
    keys, values, queries = rows_and_queries(3000)
    db = AttentionDB(2, 16, config=replace(SEGMENTED, **{"k": None, **options}))
    db.insert(keys, values, queries)
    assert "expect" not in str(db.explain(newest(queries)))
    assert db.index.needs is None


def test_audits_of_queries_may_raise_a_budget_but_not_lower_it():
    keys, values, queries = rows_and_queries(3000)
    db = AttentionDB(2, 16, config=replace(SEGMENTED, k=None, target_error=0.5))
    db.insert(keys, values)
    by_size = db.explain(newest(queries)).sources[1].estimated.rows
    db.analyze(queries[:, :, -100:])
    assert db.explain(newest(queries)).sources[1].estimated.rows == pytest.approx(by_size, rel=0.05)
    db.config = replace(db.config, target_error=0.1)
    assert db.explain(newest(queries)).sources[1].estimated.rows > 1.5 * by_size


def test_a_layer_whose_audits_find_no_budget_is_scanned_and_says_so():
    """As layer 0 of Qwen2.5-Coder is: keys of huge scatter, values that nearly cancel."""
    keys, _, queries = rows_and_queries(3000)
    values = torch.randn_like(keys)
    db = AttentionDB(2, 16, config=replace(SEGMENTED, k=None, target_error=0.01))
    db.insert(20 * keys, values, queries=20 * torch.randn_like(queries))
    query = newest(queries)
    plan = db.explain(query)
    assert db.index.needs.error > 0.02
    assert plan.is_dense
    assert "audits found no budget for target_error=0.01" in str(plan)
    torch.testing.assert_close(db.attend(query), dense_attention(query, 20 * keys, values), atol=1e-5, rtol=1e-5)
    db.config = replace(db.config, k=50)
    assert not db.explain(query).is_dense


def drifting():
    """Decode asks what the prompt did not: its queries look where keys differ most."""
    keys, values, queries = rows_and_queries(3000)
    db = AttentionDB(2, 16, config=replace(SEGMENTED, k=None, target_error=0.2, audit_rate=0.01))
    db.insert(keys, values, queries)
    looks = torch.tensor([1.0] * 4 + [0.12] * 12)
    return db, [looks * torch.randn(1, 4, 1, 16) for _ in range(30)]


def test_audits_of_answers_raise_a_budget_that_sampled_queries_told_too_small():
    db, asked = drifting()
    first = db.explain(asked[0])
    before = [db.audit(query).relative_error for query in asked]
    assert sum(before) / 30 > 1.5 * db.index.needs.error
    for query in asked[:8]:
        db.attend(query)
    assert len(db.stats.audits) == 8
    db.attend(asked[8])
    assert len(db.stats.audits) == 8
    after = [db.audit(query).relative_error for query in asked]
    assert sum(after) < 0.9 * sum(before)
    assert db.explain(asked[0]).sources[1].estimated.rows > 1.5 * first.sources[1].estimated.rows


def test_a_snapshot_keeps_what_audits_of_answers_told(tmp_path):
    db, asked = drifting()
    for query in asked[:9]:
        db.attend(query)
    db.save(tmp_path / "rows")
    again = AttentionDB.open(tmp_path / "rows")
    assert torch.equal(again.attend(asked[-1]), db.attend(asked[-1]))
    assert len(again.stats.audits) == 1
    state = db.store.sample.state()
    for forged in (torch.full((3,), -1.0), torch.ones(65), torch.full((3,), float("nan"))):
        with pytest.raises(ValueError, match="drift_ratios"):
            QuerySample.of_state(state | {"drift_ratios": forged.double()}, 3000, 1, 2, 16, torch.device("cpu"))
    older = {name: part for name, part in state.items() if "drift" not in name}
    assert QuerySample.of_state(older, 3000, 1, 2, 16, torch.device("cpu")).drift.times(db.index.needs.about) == 1


@pytest.mark.parametrize("power", [0.8, 1.0, 1.7])
@pytest.mark.parametrize("target", [0.01, 0.03, 0.2])
def test_a_search_for_a_budget_finds_where_a_power_law_meets_the_target(power, target):
    least = round((5 / target) ** (1 / power) / 8)
    read, expected = solve(lambda read: 5 * read**-power, least, target, 10**9)
    assert 5 * read**-power == pytest.approx(target, rel=0.12)
    assert expected == pytest.approx(5 * read**-power, rel=0.05)


def test_a_search_for_a_budget_keeps_its_bounds():
    assert solve(lambda read: 1.0, 200, 0.03, 400) == (400, 1.0)
    assert solve(lambda read: 1e-5, 200, 0.03, 400) == (200, 1e-5)


@pytest.mark.parametrize("target", [0, 1, -0.1, "0.1", float("nan")])
def test_a_target_that_is_no_share_is_refused(target):
    with pytest.raises(ValueError, match="target_error is"):
        RetrievalConfig(target_error=target)
