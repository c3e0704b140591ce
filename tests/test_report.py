"""The report of a wrapped model: what it counts, how it says so, and what it folds."""

import re

import pytest
import torch
from conftest import database, random_rows, tiny_llama

from dbattn import RetrievalConfig
from dbattn.hf import wrap
from dbattn.hf.report import Report
from dbattn.query.audit import AuditReport, figure
from dbattn.query.stats import RunningStats

OPTIONS = {"index": "flat", "k": 16, "window": 8}


def filled(n=400, **changes):
    return database(*random_rows(n), **{**OPTIONS, **changes})


def audit(error, seconds=None, seconds_dense=None, heads=4):
    errors = torch.full((1, heads, 1), error)
    return AuditReport(1 - errors, 1 - errors, errors, 16.0, 40.0, 400, 1000, 10000, seconds, seconds_dense)


def stats(*audits, retrieving=0, dense=(), prompts=(), rows=400):
    """Statistics of a layer with so many calls."""
    found = RunningStats(rows_stored=rows)
    for _ in range(retrieving):
        found.add_answer(16.0, 40.0, 1000, 10000)
    for reason, count in dense:
        for _ in range(count):
            found.add_dense(reason, float(rows), 10000, prompt=False)
    for reason, count in prompts:
        for _ in range(count):
            found.add_dense(reason, 0.0, 0, prompt=True)
    for one in audits:
        found.add_audit(one)
    return found


def test_rows_read_are_a_mean_over_all_decode_calls_and_dense_ones_read_all_rows():
    db = filled()
    for call in range(8):
        db.attend(torch.randn(1, 4, 1, 16), retrieve=call < 2)
    db.attend(torch.randn(1, 4, 5, 16))
    (layer,) = Report.of([db.stats]).layers
    assert (layer.calls, layer.retrieving, layer.dense_calls) == (8, 2, 6)
    assert layer.prompts == {"more queries in one call than max_queries=1": 1}
    assert layer.rows_read == layer.rows_retrieved + 8 + 4 == 28
    assert layer.rows_read_all_calls == (2 * 28 + 6 * 400) / 8
    assert layer.bytes_dense == 8 * 400 * 2 * (16 + 16) * 4
    assert 6 / 8 < layer.bytes_share == layer.bytes_read / layer.bytes_dense < 0.95


@pytest.mark.parametrize(
    "changes",
    [
        {"index": "segmented"},
        {"index": "segmented", "tail": "none"},
        {"index": "segmented", "max_error": 0.01},
        {"tail": "sample"},
        {"index": "hnsw"},
        {"max_error": 0.01},
        {"storage": "int8"},
        {"max_queries": 3},
    ],
)
def test_bytes_counted_at_every_call_are_those_that_audits_measure(changes):
    db = filled(700, **changes)
    query = torch.randn(1, 4, changes.get("max_queries", 1), 16)
    for _ in range(3):
        db.attend(query, audit=True)
    assert db.stats.retrieving == 3
    assert db.stats.bytes_read == sum(report.bytes_read for report in db.stats.audits) > 0
    assert db.stats.bytes_dense == 3 * 700 * 2 * db.store.row_bytes
    plain = filled(700, **changes)
    plain.store, plain.index = db.store, db.index
    if "max_error" not in changes:  # which learns from audits
        plain.attend(query)
        assert plain.stats.bytes_read == db.stats.audits[0].bytes_read


def test_queries_of_padded_rows_count_the_rows_they_see():
    db = database(*random_rows(50, batch=2), torch.tensor([0, 20]), **OPTIONS, max_queries=4)
    db.attend(torch.randn(2, 4, 1, 16), retrieve=False)
    db.attend(torch.randn(2, 4, 3, 16), retrieve=False)
    assert db.stats.rows_dense == (50 + 30) / 2 + (49 + 29) / 2


def test_the_verdict_counts_every_call_and_says_why_some_were_dense():
    reason = "a dense scan is estimated to be faster"
    layers = [stats(audit(0.02), audit(0.04), retrieving=1, dense=[(reason, 7)]) for _ in range(30)]
    summary = Report.of(layers).summary
    assert summary.verdict == (
        "Close to dense: 30 of 30 layers and 30 of 240 decode calls (12%) retrieved, error mean 0.0300, "
        "95th percentile 0.0400 (60 audits), 89% of dense's bytes read, time not measured"
    )
    assert str(summary).splitlines() == [
        summary.verdict,
        f"Of 240 decode calls 30 retrieved; 210 scanned everything: 210x {reason}",
    ]
    assert summary.rows_read == (40 + 7 * 400) / 8


def test_calls_that_passed_by_a_database_count_as_dense_under_their_reason():
    passed = stats(audit(0.02), retrieving=1)
    passed.dense_reasons["the model makes its keys after the cache"] += 3
    never = RunningStats()
    never.dense_reasons["the model makes its keys after the cache"] += 4
    report = Report.of([passed, never])
    assert report.layers[0].rows_read_all_calls == (40 + 3 * 400) / 4
    assert report.summary.bytes_share == (0.1 + 7) / 8
    assert "8 decode calls (12%) retrieved" in str(report)
    assert "7 scanned everything: 7x the model makes its keys after the cache" in str(report)


def test_nothing_retrieved_and_nothing_called_are_said():
    assert str(Report.of([stats()]).summary) == "No decode call yet: nothing to judge"
    read = Report.of([stats(prompts=[("long", 2)])]).summary
    assert str(read).splitlines() == ["No decode call yet: nothing to judge", "2 calls read a prompt densely: 2x long"]
    dense = str(Report.of([stats(dense=[("too few rows", 5)])]).summary)
    assert dense.startswith("Nothing was retrieved: all 5 decode calls scanned everything, so answers are dense's")
    assert "5x too few rows" in dense


@pytest.mark.parametrize(
    ("error", "word", "advice"),
    [(0.01, "Close to dense", ""), (0.07, "Not far from dense", ""), (0.4, "Far from dense", "max_error=0.05, or a")],
)
def test_the_verdict_says_how_far_from_dense_and_what_to_do(error, word, advice):
    text = str(Report.of([stats(audit(error), retrieving=9)]).summary)
    assert text.startswith(f"{word}: 1 of 1 layers")
    assert advice in text
    assert ("consider" in text) == bool(advice)


def test_without_audits_the_verdict_says_so():
    text = str(Report.of([stats(retrieving=9)]).summary)
    assert text.startswith("Not audited: ")
    assert "audit_rate above 0" in text


def test_no_figure_from_one_audit_has_more_than_two_digits():
    assert [figure(value, 1) for value in (0.04321, 0.98765, 0.0, 1.0, None)] == ["0.043", "0.99", "0.0", "1.0", "-"]
    assert [figure(value, 9) for value in (0.04321, 0.98765, 12.345)] == ["0.0432", "0.988", "12.3"]
    one = Report.of([stats(audit(0.04321), retrieving=1)])
    assert "(1 audit)" in one.summary.verdict
    assert "0.043" in one.table()
    for text in (str(one), str(audit(0.04321))):
        assert not re.search(r"0\.0*[1-9]\d{2}", text)
    assert "0.0432" in str(Report.of([stats(audit(0.04321), audit(0.04321), retrieving=2)]))


def test_time_is_told_where_enough_audits_of_single_tokens_measured_it():
    timed = [audit(0.01, 1e-3, 4e-3)] * 4
    assert "time not measured" in Report.of([stats(*timed, retrieving=9)]).summary.verdict
    one_slow_first = stats(audit(0.01, 9.0, 4e-3), *timed, retrieving=9)
    assert (
        "a retrieving call 4.0x as fast as a dense scan (medians of 5 audited"
        in Report.of([one_slow_first]).summary.verdict
    )
    slow = Report.of([stats(*[audit(0.01, 3e-3, 1e-3)] * 5, retrieving=9)]).summary
    assert "a retrieving call 3x as slow as a dense scan" in slow.verdict
    assert "Little is gained" in str(slow)
    db = filled(max_queries=4)
    for m in (1, 1, 1, 1, 4, 4):
        db.attend(torch.randn(1, 4, m, 16), audit=True)
    assert all(report.seconds > 0 and report.seconds_dense > 0 for report in db.stats.audits)
    assert Report.of([db.stats]).summary.timed == 4


def test_layers_that_are_alike_are_one_row_and_every_layer_stays_in_the_data():
    layers = [stats(audit(0.01 + i / 1000), retrieving=4) for i in range(30)]
    layers[7] = stats(audit(0.5), retrieving=4)
    layers[12:15] = [stats(dense=[("too few rows", 4)]) for _ in range(3)]
    report = Report.of(layers)
    rows = [line for line in str(report).splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["0-6, 8-11, 15-29", "7", "12-14"]
    assert "0.0250 (0.039)" in rows[0]
    assert "0.50" in rows[1]
    assert "layers 12-14: dense: 12x too few rows" in str(report)
    assert len(str(report).splitlines()) < 16
    assert max(map(len, report.table().splitlines())) <= 150
    assert sum(line.startswith("│") for line in report.table(all_layers=True).splitlines()) == 30
    data = report.to_dict()
    assert len(data["layers"]) == 30
    assert data["layers"][7]["relative_error"] == 0.5
    assert data["summary"]["verdict"] == report.summary.verdict


def test_a_wrapped_models_report_begins_with_its_verdict():
    model, ids = tiny_llama(), torch.randint(2, 900, (1, 300))
    with torch.inference_mode(), wrap(model, RetrievalConfig(**OPTIONS, dense_below=0, audit_rate=0.5)) as handle:
        model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        with handle.dense():
            model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        report = handle.report()
    first, second, *_ = str(report).splitlines()
    assert "2 of 2 layers and 14 of 20 decode calls (70%) retrieved, error mean " in first
    assert "(8 audits)" in first
    assert second == "Of 20 decode calls 14 retrieved; 6 scanned everything: 6x dense was asked for"
    assert sum(report.summary.prompts.values()) == 4
