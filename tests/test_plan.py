"""Plans: estimates, the choice between dense and index, EXPLAIN, and the ladder that keeps an error bound."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import database, random_rows, real_rows

from dbattn import RetrievalConfig, dense_attention, relative_error
from dbattn.config import INDEX_TRAITS
from dbattn.index import index_class
from dbattn.query import rates
from dbattn.query.choose import ROWS_PER_PLAN, choose_plan, recurring
from dbattn.query.ladder import AUDITS_TO_LEARN, rungs_of
from dbattn.query.usage import Rates, Workload

INDEXES = sorted(INDEX_TRAITS)


def filled(n=4096, **options):
    """A database of random rows that reads as the planner chooses, and a query: the same for an ``n``."""
    torch.manual_seed(0)
    return database(*random_rows(n), **{"dense_below": None, **options}), torch.randn(1, 4, 1, 16)


def captured(layer, **options):
    """A store of real rows, and 16 decode steps: (keys, values, query) of each."""
    query, keys, values = real_rows(layer)
    first = keys.shape[2] - 16
    db = database(keys[:, :, :first], values[:, :, :first], **options)
    steps = [
        (keys[:, :, first + i : first + i + 1], values[:, :, first + i : first + i + 1], query[:, :, i : i + 1])
        for i in range(16)
    ]
    return db, steps


@pytest.mark.parametrize("index", INDEXES)
def test_explain_shows_what_each_source_was_expected_to_read_and_what_it_read(index):
    db, query = filled(index=index, k=100, dense_below=0)
    plan = db.explain(query)
    exact, scan, *tail = plan.sources
    assert exact.kind == "sinks + hot rows"
    assert exact.actual.rows == exact.estimated.rows == 4 + 4096 - plan.hot
    assert (exact.actual.bytes, scan.estimated.rows) == (exact.estimated.bytes, 100)
    assert bool(tail) == (index == "segmented")
    assert sum(source.mass for source in plan.sources) == pytest.approx(1.0, abs=1e-4)
    assert plan.bytes_read == db.audit(query).bytes_read
    assert 0.4 < sum(source.estimated.bytes for source in plan.sources) / plan.bytes_read < 2.5
    assert all(source.actual.seconds > 0 for source in plan.sources)
    assert plan.seconds == pytest.approx(sum(source.actual.seconds for source in plan.sources))
    assert plan.seconds_estimated > 0
    assert plan.seconds_dense > 0
    assert json.loads(json.dumps(plan.to_dict()))["sources"][1]["estimated"]["rows"] == 100
    shown = str(plan)
    assert all(source.kind in shown for source in plan.sources)
    assert f"bytes={scan.actual.bytes:,}" in shown


def test_lists_are_counted():
    db, query = filled(16384, index="segmented", dense_below=0)
    _, scan, codes, tail = db.explain(query).sources
    # Fourteen rows are scored by their codes for each that is read.
    assert scan.actual.rows * 14 / 60 < scan.actual.lists < scan.actual.rows * 14 / 20
    assert codes.actual.lists == scan.actual.lists
    assert scan.actual.lists == pytest.approx(scan.estimated.lists, rel=0.3)
    # Beyond 12K rows super-lists stand for most lists.
    assert tail.actual.lists == pytest.approx(tail.estimated.lists, rel=0.3)
    assert tail.actual.lists < 16384 / 32


def test_a_dense_plan_says_what_it_reads_and_why():
    db, query = filled(600)
    plan = db.explain(query)
    assert plan.is_dense
    assert plan.sources[0].actual.rows == plan.sources[0].estimated.rows == 600
    assert plan.sources[0].actual.bytes == plan.sources[0].estimated.bytes == 600 * 2 * 32 * 4
    assert plan.seconds_estimated == plan.seconds_dense


def test_the_estimated_cheaper_plan_is_chosen(monkeypatch):
    db, query = filled()
    free, dear = Rates(0.0, 0.0, 0.0, 0.0), Rates(1.0, 0.0, 0.0, 0.0)
    for dense, lists in ((free, dear), (dear, free)):
        monkeypatch.setattr("dbattn.query.choose.rates", lambda engine, _, a=dense, b=lists: b if engine else a)
        plan = choose_anew(db, query)
        assert plan.is_dense == (lists is dear)
    assert not plan.is_dense
    monkeypatch.setattr("dbattn.query.choose.rates", lambda engine, threads: dear if engine else free)
    assert "estimated to be faster" in choose_anew(db, query).reason


def choose_anew(db, query):
    choose_plan.cache_clear()
    return db.explain(query)


def test_a_decode_call_is_planned_for_once_in_many_rows_and_explained_row_by_row():
    db, query = filled(index="segmented", k=64, dense_below=0, audit_rate=0.0)
    keys, values = random_rows(1)
    planned = choose_plan.cache_info().misses
    for _ in range(ROWS_PER_PLAN):
        db.insert(keys, values)
        db.attend(query)
    assert choose_plan.cache_info().misses - planned <= 4  # as rows are sealed, and as the store grows
    assert db.explain(query).reason.startswith(f"{len(db)} rows, ")
    db.attend(query, audit=True)
    assert db.stats.plan.reason.startswith(f"{len(db)} rows, ")


def test_an_answer_follows_what_has_changed_since_the_one_before():
    def answer(db, query, changes):
        for change, after in changes:
            change(db)
            if after:
                db.attend(query)
        return db.attend(query)

    db, query = filled(index="segmented", k=32, dense_below=1000, audit_rate=0.0)
    keys, values = random_rows(1)
    changes = [
        lambda db: db.insert(keys, values),
        lambda db: setattr(db, "config", replace(db.config, k=8)),
        lambda db: setattr(db, "config", replace(db.config, k=None)),
        lambda db: db.analyze(torch.cat([query] * 300, dim=2)),
        lambda db: db.truncate(1001),
        lambda db: db.truncate(999),
        lambda db: setattr(db, "unindexed", "so it was asked for"),
        lambda db: setattr(db, "unindexed", ""),
        lambda db: [db.insert(keys, values) for _ in range(3)],
    ]
    for count in range(1, len(changes) + 1):
        steps = [answer(copy.deepcopy(db), query, [(one, each) for one in changes[:count]]) for each in (True, False)]
        assert torch.equal(*steps)


@pytest.mark.parametrize(
    "options",
    [
        {"index": "segmented", "dense_below": 3000},
        {"index": "segmented", "dense_below": 3000, "k": 2900, "max_queries": 3},
        {"index": "flat", "dense_below": 3000, "max_queries": 3},
        {"index": "ivf", "window": 300, "k": 64, "tail": "sample"},
    ],
)
def test_calls_that_are_planned_together_run_as_each_alone_would(options):
    config = RetrievalConfig(**options)
    index, chosen = index_class(config.index_name), {"backend": "numba", "processor": 2, "retrieve": True}

    def runs(work):
        plan = choose_plan(index, config, work, estimate=False, **chosen)
        steps = [{**vars(step), "sources": type(step)} for step in plan.steps]
        return plan.hot, steps, plan.reason if plan.is_dense else None

    together = 0
    for rows in range(2900, 3200, 3):
        for indexed in (0, 2816, 2880, rows - 130, rows):
            for queries in (1, 3):
                work = Workload(rows, queries, min(indexed, rows), first_index_row=4)
                shared = recurring(index.hot, config, work)
                together += shared is not work
                assert runs(shared) == runs(work)
    assert together > 50


def test_an_index_asked_for_by_name_is_used_unless_estimates_are_asked_for_too():
    assert not filled(index="flat", k=64)[0].explain(filled()[1]).is_dense
    db, query = filled(index="flat", k=64, dense_below="auto")
    plan = choose_anew(db, query)
    assert plan.is_dense
    assert plan.seconds_dense == plan.seconds_estimated


@pytest.mark.parametrize(
    ("options", "retrieves"),
    [
        ({}, False),
        ({"dense_below": "auto", "index": "flat"}, False),
        ({"tail": "none"}, False),
        ({"k": 64}, True),
        ({"index": "segmented"}, True),
        ({"index": "flat"}, True),
        ({"dense_below": 0}, True),
        ({"dense_below": 2048}, True),
    ],
)
def test_a_device_without_rates_answers_densely_unless_retrieval_is_asked_for(options, retrieves):
    work = Workload(rows=8192, queries=1, indexed=8064, first_index_row=4)
    config = RetrievalConfig(**options)
    index, chosen = index_class(config.index_name), {"backend": "triton", "processor": None, "retrieve": True}
    plan = choose_plan(index, config, work, estimate=False, **chosen)
    assert plan.is_dense != retrieves
    if not retrieves:
        assert plan.reason.startswith("no rates for cuda: answered densely; ask for an index by name, k= or")
    # Reasons are counted: they do not change as the store grows.
    grown = work._replace(rows=8193, indexed=8064)
    later = choose_plan(index, config, grown, estimate=False, **chosen)
    assert (later.reason == plan.reason) != retrieves


@pytest.mark.parametrize(
    ("rows", "options", "measures", "dense"),
    [
        (1500, {}, False, True),
        (1500, {"k": 100}, True, None),
        (8192, {}, True, None),
        (131072, {}, False, False),
        (131072, {"index": "flat", "dense_below": "auto"}, True, None),
    ],
)
def test_rates_are_measured_only_where_the_choice_is_open(rows, options, measures, dense, monkeypatch):
    asked = []

    def measured(engine, threads):
        asked.append(engine)
        return engine.built_in if engine else rates.SCAN

    monkeypatch.setattr("dbattn.query.choose.rates", measured)
    choose_plan.cache_clear()
    work = Workload(rows, queries=1, indexed=rows - 128, first_index_row=4, heads=6, kv_heads=2)
    chosen = {"backend": "numba", "processor": 2, "retrieve": True}
    config = RetrievalConfig(**options)
    index = index_class(config.index_name)
    plan = choose_plan(index, config, work, estimate=False, **chosen)
    assert bool(asked) == measures
    assert dense is None or plan.is_dense == dense
    if not measures and not dense:  # many threads speed up a scan more than an index
        choose_plan(index, config, work, estimate=False, **{**chosen, "processor": 32})
        assert asked


def test_rates_are_measured_once_kept_and_measured_again_when_damaged(monkeypatch, tmp_path):
    measured = []

    def measure():
        measured.append(1)
        return Rates(1e-5, 0.0, 1e-11 * len(measured), 1e-11)

    monkeypatch.setenv("DBATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "_measure_scan", measure)
    first = rates.rates.__wrapped__(None, 3)
    assert rates.rates.__wrapped__(None, 3) == first
    assert len(measured) == 1
    (kept,) = (tmp_path / "machine").iterdir()
    for damage in (b"", b"{", b'{"made on": 1, "rates": {}}', kept.read_bytes().replace(b"1e-11", b"NaN")):
        kept.write_bytes(damage)
        assert rates.rates.__wrapped__(None, 3).byte > first.byte
    assert len(measured) == 5


@pytest.mark.parametrize("name", INDEX_TRAITS)
def test_every_index_can_be_timed(name, monkeypatch):
    # What is timed runs once: whether it answers is the question here, not how fast.
    def run_once(run, other):
        run()
        other()
        return 1e-3

    monkeypatch.setattr(rates, "_seconds", run_once)
    assert rates._measure_index(index_class(name), rates.SCAN).operation == rates.SCAN.operation


def test_rates_of_a_gpu_are_kept_by_its_name_and_where_measuring_fails_there_are_none(monkeypatch, tmp_path):
    asked = []

    def measure(name, engine):
        asked.append(name)
        if engine is not None:
            raise RuntimeError("out of memory")
        return Rates(1e-5, 0.0, 3e-13, 0.0)

    monkeypatch.setenv("DBATTN_CACHE", str(tmp_path))
    monkeypatch.setattr("dbattn.query.device_rates.measure_on", measure)
    for _ in range(2):
        assert rates.rates.__wrapped__(None, "NVIDIA H100 80GB HBM3") == Rates(1e-5, 0.0, 3e-13, 0.0)
    assert asked == ["NVIDIA H100 80GB HBM3"]
    assert rates.rates.__wrapped__(index_class("segmented"), "NVIDIA H100 80GB HBM3") is None
    assert [file.name for file in (tmp_path / "machine").iterdir()] == ["dense-NVIDIA-H100-80GB-HBM3.json"]


# Of a scan, and of lists: twice as fast from 128K rows on, and never.
SCAN_OF_GPU = Rates(1e-5, 0.0, 3e-13, 0.0)
FAST, SLOW = Rates(8e-5, 1e-10, 1e-12, 0.0), Rates(1e-2, 1e-10, 1e-12, 0.0)


@pytest.mark.parametrize(
    ("rows", "own", "options", "retrieves", "reason"),
    [
        (131072, FAST, {}, True, "131072 rows, budget by size"),
        (131072, SLOW, {}, False, "a dense scan is estimated to be faster"),
        (16384, FAST, {}, False, "a dense scan is estimated to be faster"),
        (4096, FAST, {}, False, "a GPU scans so few rows as fast as it is asked to"),
        (131072, None, {}, False, "no rates for cuda: answered densely; ask for"),
        (131072, SLOW, {"k": 64}, True, "131072 rows, k=64"),
        (4096, SLOW, {"index": "segmented"}, True, "4096 rows, budget by size"),
        (131072, FAST, {"dense_below": "auto", "k": 64}, True, "131072 rows, k=64"),
        (131072, SLOW, {"dense_below": "auto", "k": 64}, False, "a dense scan is estimated to be faster"),
    ],
)
def test_a_gpu_retrieves_by_default_only_where_its_rates_say_that_it_is_faster(
    rows, own, options, retrieves, reason, monkeypatch
):
    monkeypatch.setattr("dbattn.query.choose.rates", lambda engine, gpu: own if engine else SCAN_OF_GPU)
    choose_plan.cache_clear()
    work = Workload(rows, 1, rows - 64, 4, 1, 32, 8, 128, 128, row_bytes=512, whole_lists=True)
    config = RetrievalConfig(**options)
    plan = choose_plan(
        index_class("segmented"), config, work, backend="triton", processor="H100", retrieve=True, estimate=False
    )
    choose_plan.cache_clear()
    assert plan.is_dense != retrieves
    assert plan.reason.startswith(reason)
    if retrieves and not config.wishes_retrieval:
        assert plan.seconds_estimated < plan.seconds_dense
        (lists,) = (source for source in plan.sources if source.kind == "list scan")
        assert lists.estimated.rows > 800, "opened lists are read whole"


def test_other_load_is_not_taken_for_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("DBATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "_measure_scan", lambda: Rates(1e-2, 0.0, 1e-9, 1e-9))
    assert rates.rates.__wrapped__(None, 3) is rates.SCAN
    assert not (tmp_path / "machine").exists()


def test_measuring_leaves_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    found = rates._measure_scan()
    assert torch.equal(torch.randn(3), expected)
    assert found.item == 0  # a scan scores nothing to choose rows
    assert 1e-12 < found.byte < 1e-8


@pytest.mark.parametrize("layer", [8, 22])
@pytest.mark.parametrize("bound", [0.05, 0.1])
def test_the_bound_is_kept_on_real_rows_at_fewer_bytes_than_dense(layer, bound):
    db, steps = captured(layer, index="segmented", max_error=bound, audit_rate=1.0)
    for keys, values, query in steps:
        db.insert(keys, values)
        db.attend(query)
    audits, heads = db.stats.audits, db.stats.heads
    errors = torch.cat([audit.relative_error_by_query.flatten() for audit in audits])
    assert float((errors <= bound).float().mean()) >= 0.95
    assert heads.share_within == pytest.approx(float((errors <= bound).float().mean()))
    assert sum(audit.bytes_read for audit in audits) < sum(audit.bytes_dense for audit in audits)
    assert sum(db.stats.rungs.values()) == db.stats.retrieving == 16


@pytest.mark.parametrize("index", INDEXES)
def test_heads_whose_rows_all_matter_are_answered_densely(index):
    """Keys of one head carry nothing: its attention is uniform, and no few rows can stand for all."""
    torch.manual_seed(0)
    keys, values = 3 * torch.randn(1, 2, 3000, 16), torch.randn(1, 2, 3000, 16)
    keys[:, 1] *= 1e-3
    query = keys[:, :, 100:101].repeat_interleave(2, dim=1)
    db = database(keys, values, index=index, k=64, max_error=0.02, audit_rate=1.0)
    for _ in range(4):
        out = db.attend(query)
    assert relative_error(out, dense_attention(query, keys, values)).max() < 0.02
    if index != "segmented":  # equal keys are what summaries stand for exactly
        assert any("dense" in rung or "sampled" in rung for rung in db.stats.rungs)


def test_the_ladder_steps_down_when_it_can():
    torch.manual_seed(0)
    keys, values = torch.randn(1, 1, 4096, 16), torch.randn(1, 1, 4096, 16)
    hard, easy = (q.repeat(1, 2, 1, 1) for q in (2 * torch.randn(1, 1, 1, 16), 8 * keys[:, :, 2000:2001]))
    db = database(keys, values, index="segmented", max_error=0.03, audit_rate=0.1)
    for _ in range(10):
        db.attend(hard)
    high = db.stats.ladder.level
    for _ in range(60):
        db.attend(easy)
    assert db.stats.ladder.level < high


@pytest.mark.parametrize("index", INDEXES)
def test_audit_and_explain_teach_the_ladder_nothing(index):
    db, steps = captured(8, index=index, max_error=0.05, audit_rate=0.0)
    before = copy.copy(db.stats)
    for _, _, query in steps[:3]:
        db.audit(query)
        db.explain(query)
    assert db.stats.ladder is None
    assert db.stats.rungs == before.rungs
    query = steps[0][2]
    answer = db.attend(query)
    level, rungs = db.stats.ladder.level, dict(db.stats.rungs)
    db.audit(query)
    db.explain(query)
    assert (db.stats.ladder.level, dict(db.stats.rungs)) == (level, rungs)
    assert torch.isfinite(answer).all()


def test_early_calls_are_audited_so_that_the_ladder_can_learn():
    db, query = filled(index="segmented", max_error=0.1, audit_rate=0.001, dense_below=0)
    for _ in range(AUDITS_TO_LEARN + 5):
        db.attend(query)
    assert len(db.stats.audits) == AUDITS_TO_LEARN


def test_given_up_tries_and_dense_heads_are_in_the_plan():
    db, query = filled(index="flat", k=16, max_error=0.001, dense_below=0)
    plan = db.explain(query)
    dense = [source for source in plan.sources if source.kind == "dense scan"]
    assert dense
    assert plan.bytes_read == sum(source.actual.bytes for source in plan.sources)
    assert "max_error" in plan.reason
    assert not plan.is_dense
    assert db.audit(query).relative_error < 1e-3


def test_rungs_rise():
    for index in INDEXES:
        for tail in ("none", "sample", "centroid"):
            try:
                rungs = rungs_of(RetrievalConfig(index=index, tail=tail))
            except ValueError:
                continue
            assert len(set(rungs)) == len(rungs)
            assert any(rung.times == 1 for rung in rungs)
            assert [rung.times for rung in rungs] == sorted(rung.times for rung in rungs)


@pytest.mark.parametrize("bound", [0, 1, -0.1, float("nan"), True, "0.1"])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match="max_error"):
        RetrievalConfig(max_error=bound)


def test_a_bound_needs_a_tail_for_lists():
    with pytest.raises(ValueError, match="centroid"):
        RetrievalConfig(index="segmented", tail="none", max_error=0.1)


@pytest.mark.parametrize("below", [-1, True, 1.5, "always"])
def test_dense_below_is_a_number_of_rows_or_auto(below):
    with pytest.raises(ValueError, match="dense_below"):
        RetrievalConfig(dense_below=below)
    assert RetrievalConfig(dense_below="auto").dense_below_rows is None


def test_statistics_of_heads_are_those_of_the_audits():
    db, steps = captured(22, index="segmented", k=100, audit_rate=1.0)
    for keys, values, query in steps[:5]:
        db.insert(keys, values)
        db.attend(query)
    errors = torch.cat([audit.relative_error_by_query for audit in db.stats.audits], dim=2)
    heads = db.stats.heads.means()
    assert [head["audited"] for head in heads] == [5, 5, 5]
    assert [head["relative_error"] for head in heads] == pytest.approx(errors.mean(dim=(0, 2)).tolist())
