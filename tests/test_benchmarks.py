"""The benchmarks measure what they say they do: on synthetic rows, and without timing anything that matters."""

import json

import pytest
import torch
from test_hf import tiny
from transformers import DynamicCache

from dbattn.dense import dense_attention
from dbattn.origin import origin

pytest.importorskip("matplotlib")
pytest.importorskip("numba")

from benchmarks import __main__ as everything
from benchmarks import (
    _gpu_checks,
    _stores,
    bench_decode,
    bench_frontier,
    bench_insert,
    bench_model,
    bench_plan,
    bench_prefill,
    bench_shards,
    readme,
)
from benchmarks._common import (
    RESULTS,
    QuietGuard,
    Side,
    Timing,
    check_exact,
    fit_exponent,
    time_sides,
    timings_of,
    write_json,
)
from benchmarks._model import compare_logits, stretched
from benchmarks._plots import plot_frontier, plot_summary
from benchmarks._stores import STEPS_TO, build, config_of, query_at
from benchmarks._targets import Target, targets
from benchmarks.capture import CONTEXT, SINKS, WINDOW, Rows, join_windows, window_lengths

SIDE_KEYS = {
    "side", "kind", "k", "ms", "ms_p10", "ms_p90", "calls", "quiet", "x_sdpa", "x_dense_decode", "error", "error_p95",
    "recall", "attention_mass", "bytes_read", "bandwidth_share", "build_s",
}  # fmt: skip
POINT_KEYS = {
    "k",
    "error",
    "error_p95",
    "recall",
    "recall_p05",
    "attention_mass",
    "rows_read",
    "bytes_read",
    "bytes_dense",
}


@pytest.fixture(autouse=True)
def _never_wait(monkeypatch):
    monkeypatch.setattr(QuietGuard, "wait", lambda self, seconds=0.0: None)


def synthetic(rows=1536, heads=1, group=2, dim=16):
    return Rows(
        torch.randn(1, heads, rows, dim), torch.randn(1, heads, rows, dim), 2 * torch.randn(1, heads * group, 512, dim)
    )


def test_the_exponent_of_known_times_is_found():
    rows = [8e3, 32e3, 131e3, 524e3]
    assert fit_exponent(rows, [3e-6 * n**0.6 for n in rows]) == pytest.approx(0.6)
    assert fit_exponent(rows, [5.0] * 4) == pytest.approx(0.0)


def test_exact_sides_pass_and_a_wrong_kernel_is_refused():
    rows = synthetic(300, heads=2, group=2)
    db = build(rows, config_of("flat", 10), 300)
    query = query_at(rows, 299)
    right = [contender.side for contender in bench_decode.dense_contenders([db])]
    errors = check_exact(right, query, rows.keys, rows.values)
    assert len(errors) == 3
    assert max(errors.values()) < 1e-5
    forgetful = Side(
        "forgetful", [db], lambda db, q: dense_attention(q, db.store.keys[:, :, 1:], db.store.values[:, :, 1:])
    )
    with pytest.raises(ValueError, match="forgetful is wrong"):
        check_exact([*right, forgetful], query, rows.keys, rows.values)
    broken = Side("broken", [db], lambda db, q: torch.full_like(q, float("nan")))
    with pytest.raises(ValueError, match="broken is wrong"):
        check_exact([broken], query, rows.keys, rows.values)


def test_sides_take_turns_and_read_each_store_once_a_batch():
    seen = []
    many = Side("many", ["a", "b", "c"], lambda store, query: seen.append(store))
    few = Side("few", ["x"], lambda store, query: seen.append(store))
    timings = time_sides([many, few], [torch.zeros(1)], rounds=3, seconds=0)
    assert seen == ["a", "b", "c", "x", "x"] * 3
    # A pass's first call, and the extra call where stores are few, are not counted. Disturbed batches may be left out.
    assert len(timings["many"].times) == 6
    assert len(timings["few"].times) == 3


def test_disturbed_batches_are_left_out_only_where_every_side_has_enough_others():
    calm = [(True, [1.0]), (False, [9.0]), (True, [2.0]), (True, [3.0])]
    assert timings_of({"a": calm, "b": calm})["b"] == Timing([1.0, 2.0, 3.0], 0.75)
    loaded = timings_of({"a": calm, "b": calm[:3]})
    assert loaded["a"].times == [1.0, 9.0, 2.0, 3.0]
    assert loaded["b"].times == [1.0, 9.0, 2.0]
    assert Timing([1.0, 3.0, 2.0], 1.0).median == 2.0


def test_windows_are_joined_with_one_set_of_sinks_and_the_queries_window_last():
    assert window_lengths(4096) == [4096]
    assert window_lengths(32768) == [CONTEXT] + 6 * [WINDOW]
    windows = []
    for w in range(3):
        key = (1000 * w + torch.arange(20.0))[None, None, :, None]
        windows.append({"8.key": key, "8.value": -key})
    windows[0]["8.query"] = torch.randn(1, 1, 4, 1)
    rows = join_windows(windows, 8)
    expected = [*range(SINKS), *range(2000 + SINKS, 2020), *range(1000 + SINKS, 1020), *range(SINKS, 20)]
    assert rows.keys.flatten().tolist() == expected
    assert torch.equal(rows.values, -rows.keys)
    assert torch.equal(query_at(rows, len(rows) - 1), rows.query[:, :, 3:])
    with pytest.raises(ValueError, match="position is 10"):
        query_at(rows, 10)


def test_decode_results_have_the_documented_keys_and_agree_with_each_other(monkeypatch):
    monkeypatch.setattr(_stores, "STRIDE", 64)
    monkeypatch.setattr(bench_decode, "read_bandwidth", lambda: 1e10)
    captures = [synthetic(), synthetic()]
    size = bench_decode.bench_size(captures, 1536, stock=["flat"], quick=True)
    assert set(size) == {"tokens", "rows", "layers", "bandwidth", "sides"}
    assert size["rows"] == 1536 - STEPS_TO
    assert all(set(side) == SIDE_KEYS for side in size["sides"])
    sides = {side["side"]: side for side in size["sides"]}
    assert max(s["x_sdpa"] for s in size["sides"] if s["kind"] == "sdpa") == 1.0
    assert sides["dense_decode"]["x_dense_decode"] == 1.0
    assert sides["dense_decode"]["bytes_read"] == size["rows"] * 2 * 16 * 4
    assert sides["flat, k=100"]["recall"] == 1.0
    segmented = [s for s in size["sides"] if s["kind"] == "segmented"]
    assert all(0 < s["error"] < 1 and s["error"] < s["error_p95"] for s in segmented)
    assert bench_decode.smallest_within({10: 0.06, 20: 0.03, 40: 0.01}, (0.05, 0.03, 0.02, 0.005)) == [20, 40]

    def side(name, ms, error):
        return {"side": name, "kind": "segmented", "ms": ms, "ms_p10": ms, "ms_p90": ms, "error": error}

    made = [{"rows": n, "sides": [side("a", n / 100, 0.04)]} for n in (100, 900)]
    made[1]["sides"] += [side("b", 3.0, 0.05), side("c", 0.1, 0.06)]
    fit = bench_decode.exponent(made)
    assert [point["side"] for point in fit["points"]] == ["a", "b"]
    assert fit["value"] == pytest.approx(0.5)


def test_rows_kept_as_they_came_add_no_error_of_their_own():
    point = bench_frontier.storage_point([synthetic()], "float32")
    assert set(point) == {"storage", "row_bytes", "bytes_dense", "error_dense", "bytes_read", "error"}
    assert point["row_bytes"] == 2 * 16 * 4
    assert point["error_dense"] < 1e-6 < point["error"]
    assert point["bytes_read"] < point["bytes_dense"]


def test_error_falls_along_the_frontier_and_the_plot_is_drawn(tmp_path):
    captures = [synthetic()]
    curve = bench_frontier.curve(captures, "flat", "none", [16, 64, 256])
    assert all(set(point) == POINT_KEYS for point in curve["points"])
    errors = [point["error"] for point in curve["points"]]
    assert errors[0] > errors[1] > errors[2] > 0
    read = [point["rows_read"] for point in curve["points"]]
    assert read[1] - read[0] == 48
    assert read[2] - read[1] == 192
    plot_frontier([{"rows": 1344, "bytes_dense": 1e6, "curves": [curve]}], origin(), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_insert_counts_every_row_and_tells_index_from_spare_memory():
    rows = synthetic(1536)
    for chunk, calls in ((512, 3), (1000, 2)):
        db, seconds = bench_insert.insert_all(rows, "segmented", chunk)
        assert len(db) == 1536
        assert len(seconds) == calls
        memory = bench_insert.memory_of(db)
        assert memory["raw_bytes"] == 1536 * 2 * 16 * 4
        assert memory["raw_bytes"] + memory["index_bytes"] + memory["spare_bytes"] == db.nbytes
        assert memory["overhead"] > 0
    flat, _ = bench_insert.insert_all(rows, "flat", 1536)
    assert bench_insert.memory_of(flat)["overhead"] == 0


def test_the_planner_is_charged_for_the_plan_it_chooses(monkeypatch):
    stores = [bench_plan._store(1280, 1, seed) for seed in range(3)]
    for dense, index, regret in ((1.0, 2.0, {"dense": 1.0, "index": 2.0}), (3.0, 1.5, {"dense": 2.0, "index": 1.0})):
        timings = {"dense": Timing([dense], 1.0), "index": Timing([index], 1.0)}
        monkeypatch.setattr(bench_plan, "time_sides", lambda *args, timings=timings, **options: timings)
        found = bench_plan._choice(stores, 3, 64)
        assert found["regret"] == pytest.approx(regret[found["chosen"]])
        assert found["ms_dense"] == 1000 * dense
        assert found["ms_index_estimated"] > 0


def test_bounds_are_audited_beside_the_answers(monkeypatch):
    monkeypatch.setattr(bench_plan, "load_rows", lambda tokens, layer: synthetic(1536))
    found = bench_plan.bounds(1536, 0.3, steps=6)
    assert found["queries"] == 2 * 6 * 2
    assert sum(found["rungs"].values()) == 12
    assert 0 <= found["within"] <= 1
    assert found["bytes_of_dense"] > 0


def test_fidelity_figures_of_known_logits():
    dense = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    same = compare_logits(dense, dense)
    assert same == {"logits_l2": 0.0, "kl": pytest.approx(0.0), "top1": 1.0}
    other = compare_logits(dense[:1], dense[:1].flip(1))
    assert other["kl"] == pytest.approx(0.5 * torch.tensor(3.0).log().item())
    assert other["top1"] == 0.0
    assert compare_logits(dense, 1.1 * dense)["logits_l2"] == pytest.approx(0.1)


def test_a_stretched_cache_keeps_its_rows_and_repeats_none():
    from transformers import DynamicCache, LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    cache = DynamicCache(config=config)
    for layer in range(2):
        cache.update(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8), layer)
    longer = stretched(cache, 35, config)
    assert longer.get_seq_length() == 35
    assert torch.equal(longer.layers[1].keys[:, :, :10], cache.layers[1].keys)
    assert len(longer.layers[1].keys[0, 0].unique(dim=0)) == 35
    assert torch.equal(stretched(cache, 4, config).layers[0].values, cache.layers[0].values[:, :, :4])


def test_verdicts_follow_the_figures():
    assert Target("t", 2, 4, 4.0, True).verdict == "aim"
    assert Target("t", 2, 4, 3.9, True).verdict == "must"
    assert Target("t", 2, 4, 1.9, True).verdict == "missed"
    assert Target("t", 0.1, 0.03, 0.05, False).verdict == "must"
    assert Target("t", 2, 4, None, True).verdict == "not measured"
    found = targets({})
    assert {t.verdict for t in found if t.note != "not built"} == {"not measured"}

    exact = {"side": "dense_decode", "kind": "dense_decode", "x_sdpa": 3.0, "bandwidth_share": 0.5}
    poor = {"side": "segmented", "kind": "segmented", "ms": 1.0, "error": 0.2, "x_sdpa": 90.0, "x_dense_decode": 90.0}
    sizes = [{"tokens": 131072, "rows": 130760, "sides": [exact, poor]}]
    sizes[0]["sides"][0]["quiet"] = 0.2
    decode = {"sizes": sizes, "exponent": bench_decode.exponent(sizes)}
    found = targets({"decode": decode})
    verdicts = {t.what: t.verdict for t in found}
    assert found[0].note == "dense_decode (disturbed)"
    assert verdicts["dense_decode, times faster than SDPA, 131K"] == "must"
    assert verdicts["dense_decode, share of read bandwidth, 131K"] == "below aim"
    assert verdicts["segmented, times faster than SDPA, error <= 0.05, 131K"] == "missed"


def test_an_operator_leads_the_arena_where_no_other_of_its_kind_errs_less():
    def operator(name, error, share=0.02, family="selection", training=False):
        point = {"budget": 0.02, "error": error, "share": share}
        return {"name": name, "family": family, "needs_training": training, "points": [point]}

    others = [operator("greedy", 0.01, share=0.5), operator("trained", 0.02, training=True), operator("Quest", 0.09)]
    arena = [{"model": "m", "operators": [operator("dbattn", 0.03, family="dbattn"), *others]}]
    found = {t.what: t for t in targets({"arena": arena})}
    lead = found["arena, m, 2%: the best other's error over dbattn's"]
    assert lead.measured == pytest.approx(3)
    assert lead.note == "Quest 0.090, dbattn 0.030"
    assert found["arena, m, 5%: the best other's error over dbattn's"].verdict == "not measured"


def test_the_summary_plot_is_drawn(tmp_path):
    sides = [{"kind": "sdpa", "ms": 3.0}, {"kind": "sdpa", "ms": 2.0}, {"kind": "dense_decode", "ms": 1.0}]
    plot_summary(
        [{"rows": 8000, "sides": sides}], [{"rows": 8000, "ms": 0.1, "error": 0.04}], origin(), tmp_path / "summary.png"
    )
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_record_is_written_whole(tmp_path):
    record = write_json(tmp_path / "new" / "out.json", "decode", {"quick": True}, [1, 2])
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == record
    assert set(record) == {"benchmark", "date", "commit", "machine", "settings", "results"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    "module",
    [bench_decode, bench_frontier, bench_insert, bench_model, bench_plan, bench_prefill, bench_shards, everything],
)
def test_help_teaches_with_an_example(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert "  python -m benchmarks" in capsys.readouterr().out


def test_a_prompt_through_lists_is_measured_and_stands_on_the_page():
    rows = [torch.randn(1, heads, 3072, 16) for heads in (2, 1, 1)]
    size = bench_prefill.bench_layer(rows, 1)
    assert size["rows"] == 3072
    assert size["speedup"] == size["sdpa_s"] / size["s"]
    assert 0 < size["sealing_share"] < 1
    assert 256 < size["rows_read"] < 3072
    results = {"threads": 1, "call": 2048, "chunk": 2048, "sizes": [size], "models": [], "needles": []}
    other = bench_prefill.merged(None, {**results, "sizes": [{**size, "rows": 6144, "s": 4 * size["s"]}]})
    results = bench_prefill.merged(other, results)
    assert results["exponent"] == pytest.approx(2)
    page = readme._prefill(results)
    assert [line.split()[1] for line in page if line.startswith("| ")] == ["rows", "3,072", "6,144"]


def test_a_needle_is_found_where_its_number_is_named_and_the_cache_stays_as_it_was():
    model, cache = tiny(), DynamicCache()
    ids = torch.randint(0, model.config.vocab_size, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids[:, :25], past_key_values=cache)
    number = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 30:]
    for wanted, named in ((number, True), ((number + 1) % model.config.vocab_size, False), (number, True)):
        assert bench_prefill._names(model, cache, ids[:, 25:], wanted) is named
        assert cache.get_seq_length() == 25


def test_a_cluster_is_faster_by_its_formula_until_exchange_takes_longer_than_reading():
    exchange = [{"ranks": 2, "cores": 2, "us": 40.0}, {"ranks": 4, "cores": 2, "us": 8000.0}]
    steps = [{"rows": 1000, "ms": 1.0}, {"rows": 100_000, "ms": 10.0}]
    assert bench_shards.clusters({"exchange": exchange, "steps": steps}, 5.0, 1.0)["hop_us"] == pytest.approx(40.0)
    model = bench_shards.clusters({"exchange": exchange, "steps": steps}, 5.0, 100.0)
    speeds = {(each["rows"], each["ranks"]): each["tokens_per_s"] for each in model["points"]}
    # A step grows with the root of its rows here.
    assert 1000 / speeds[1_000_000, 4] == pytest.approx(5 + 30 * (250**0.5 + 3 * 0.1))
    assert speeds[100_000_000, 64] > 4 * speeds[100_000_000, 1]
    assert speeds[131_072, 64] < speeds[131_072, 16]


def test_the_page_of_figures_is_what_the_records_say():
    found = readme.records_in(RESULTS)
    assert (RESULTS.parent / readme.PAGE).read_text(encoding="utf-8") == readme.page(found)
    assert {"decode", "model", "layers"} <= set(found)


def test_the_page_leaves_rough_records_out_and_names_what_was_not_measured(tmp_path):
    results = [
        {
            "model": "m",
            "text": "code",
            "context": 100,
            "tokens": 9,
            "retrieving": 1,
            "layers": 1,
            "logits_l2": 0.03,
            "kl": 4e-4,
            "top1": 1.0,
        }
    ]
    write_json(tmp_path / "fidelity.json", "fidelity", {}, results)
    write_json(tmp_path / "decode.json", "decode", {"quick": True}, {})
    shown = readme.page(readme.records_in(tmp_path))
    assert "| logits, relative L2: m, code, 100 tokens | 0.02 | 0.01 | 0.03 | **missed** |  |" in shown
    assert "Not measured: `make bench` has left no record." in shown


@pytest.mark.parametrize(
    ("says", "code", "passes"),
    [
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("ERROR SUMMARY: 0 errors", 0, True),
        ("ERROR SUMMARY: 0 errors", 1, False),
        ("RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 0, False),
        ("no GPU", 0, False),
    ],
)
def test_a_check_of_kernels_passes_only_where_its_tool_says_so(says, code, passes, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compute-sanitizer" in _gpu_checks.sanitized("memcheck")["failed"], "there is no such tool"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= {says}'\nexit {code}\n")
    tool.chmod(0o755)
    found = _gpu_checks.sanitized("racecheck")
    assert says.endswith(found["says"]) if passes else says in found["failed"]


@pytest.mark.parametrize(
    ("body", "passes"), [("assert cuda", True), ("assert not cuda", False)], ids=["passing", "failing"]
)
def test_the_tests_of_a_gpu_count_as_passed_only_where_none_failed(body, passes, tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        f"def test_cuda():\n    cuda = 1\n    {body}\n\n\ndef test_cpu():\n    1 / 0\n"
    )
    monkeypatch.setattr(_gpu_checks, "TESTS", tmp_path)
    found = _gpu_checks.tested()
    assert found.get("says", "").startswith("1 passed") == passes
    assert ("1 failed" in found.get("failed", "")) != passes
