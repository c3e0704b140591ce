"""RULER's tasks: what is asked has the answer that is expected, and serving changes nothing but what is read."""

import json
import re
from collections import Counter

import pytest
import torch
import transformers
from conftest import tiny_llama
from transformers import AttentionInterface

from dbattn import RetrievalConfig
from dbattn.text.haystack import read_haystack

pytest.importorskip("matplotlib")
pytest.importorskip("numba")

from benchmarks.arena import OPERATORS
from benchmarks.tasks import __main__ as tasks
from benchmarks.tasks._operators import NAME, InModel, Wrapped, make_server, server_names
from benchmarks.tasks._ruler import TASKS, Question, Sample, make_sample, score, token_ids
from benchmarks.tasks._run import ask, summarise

HAYSTACK = read_haystack()
# The word list has other counts from 4096 tokens on.
DRAWN = [*((name, 2048) for name in TASKS), ("common_words", 8192)]
NIAH = {
    "niah_single": (1, 1, 1),
    "niah_multikey": (4, 1, 4),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 1),
}
READS_ALL = RetrievalConfig(k=10**6, dense_below=0, max_queries=256)


@pytest.fixture(scope="module")
def model():
    # Large weights: what is said must depend on what is attended to.
    return tiny_llama(initializer_range=0.3)


@pytest.mark.parametrize(("name", "tokens"), DRAWN)
def test_a_sample_follows_from_its_seed_fills_its_length_and_holds_the_answers(name, tokens, tokenizer):
    task = TASKS[name]
    sample = make_sample(task, tokens, 0, tokenizer, HAYSTACK)
    assert sample == make_sample(task, tokens, 0, tokenizer, HAYSTACK)
    assert sample.context != make_sample(task, tokens, 1, tokenizer, HAYSTACK).context
    asked = max(len(token_ids(question.prompt, tokenizer)) for question in sample.questions)
    length = len(token_ids(sample.context, tokenizer)) + asked + task.answer_tokens
    assert 0.9 * tokens < length <= tokens
    for question in sample.questions:
        assert question.references
        assert all(reference in sample.context for reference in question.references)
        assert not any(reference in question.prompt for reference in question.references)


@pytest.mark.parametrize("name", NIAH)
def test_needles_have_the_numbers_that_questions_ask_for(name, tokenizer):
    sample = make_sample(TASKS[name], 2048, 3, tokenizer, HAYSTACK)
    hidden = {}
    for key, number in re.findall(r"special magic numbers for (\S+) is: (\d{7})\.", sample.context):
        hidden.setdefault(key, set()).add(number)
    assert (len(hidden), *{len(numbers) for numbers in hidden.values()}, len(sample.questions)) == NIAH[name]
    asked_of_all = set()
    for question in sample.questions:
        listed = re.search(r"for (.*) mentioned in the provided text\?", question.text).group(1)
        keys = re.split(r", and |, ", listed)
        assert set(question.references) == set.union(*(hidden[key] for key in keys))
        assert listed in question.answer_start
        asked_of_all.update(keys)
    assert asked_of_all == set(hidden)


def run_program(text):
    """The value of each variable after the assignments of a text, from top to bottom."""
    values = {}
    for name, right in re.findall(r"^VAR ([A-Z]+) = (.+)$", text, re.MULTILINE):
        values[name] = values[right.removeprefix("VAR ")] if right.startswith("VAR ") else right
    return values


@pytest.mark.parametrize("seed", range(5))
def test_the_variables_asked_for_are_those_an_interpreter_finds(seed, tokenizer):
    sample = make_sample(TASKS["variable_tracking"], 1024, seed, tokenizer, HAYSTACK)
    example, text = sample.context.split("\n\nMemorize")
    (question,) = sample.questions
    value = re.search(r"assigned the value (\d{5}) in", question.text).group(1)
    found = {name for name, held in run_program(text).items() if held == value}
    assert found == set(question.references)
    assert len(found) == 5
    assert f"5 variables are assigned the value {value}" in question.answer_start
    solved = example.rsplit("they are: ", 1)[1].split()
    assert set(solved) == set(run_program(example))


@pytest.mark.parametrize("tokens", [2048, 8192])
def test_the_common_words_are_the_most_common_by_counting(tokens, tokenizer):
    sample = make_sample(TASKS["common_words"], tokens, 1, tokenizer, HAYSTACK)
    lists = sample.context.split("\n\n")
    assert len(lists) == 2
    solved = re.findall(r"\d+\. (\w+)", lists[0].split("Answer:")[1])
    for text, common in ((lists[0].split("Question:")[0], solved), (lists[1], sample.questions[0].references)):
        numbered = re.findall(r"(\d+)\. (\w+)", text)
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(word for _, word in numbered).most_common()
        assert {word for word, _ in counts[:10]} == set(common)
        assert counts[9][1] > counts[10][1]


def test_the_frequent_words_are_the_most_frequent_by_counting(tokenizer):
    sample = make_sample(TASKS["frequent_words"], 1024, 1, tokenizer, HAYSTACK)
    counts = Counter(sample.context.split("coded words. ")[1].split()).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == sample.questions[0].references
    assert counts[1][1] > counts[2][1] > counts[3][1] > counts[4][1]


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        (" 1234567.", ["1234567"], 100.0),
        (" 1,234,567.", ["1234567"], 0.0),
        ("numbers 1111111 and 3333333", ["1111111", "2222222", "3333333", "4444444"], 50.0),
        ("1. Apple 2. pear", ["apple", "PEAR", "plum"], 200 / 3),
        ("", ["ABC"], 0.0),
    ],
)
def test_the_score_is_the_share_of_references_in_the_answer(answer, references, expected):
    assert score(answer, references) == pytest.approx(expected)


def test_a_length_that_holds_no_sample_is_refused(tokenizer):
    with pytest.raises(ValueError, match="tokens is 256, too few for frequent_words: it takes at least"):
        make_sample(TASKS["frequent_words"], 256, 0, tokenizer, HAYSTACK)


def test_servers_that_read_all_rows_give_denses_answers_and_others_do_not(model, tokenizer):
    before = model.config._attn_implementation
    servers = [
        make_server("dense", 1.0),
        Wrapped("all rows", READS_ALL),
        InModel(OPERATORS["dense"], 1.0),
        InModel(OPERATORS["StreamingLLM"], 0.1),
    ]
    servers[2].name = "arena's dense"
    sample = make_sample(TASKS["niah_multikey"], 1500, 0, tokenizer, HAYSTACK)
    ticks = []
    record = ask(model, tokenizer, TASKS["niah_multikey"], sample, servers, lambda: ticks.append(1))
    assert len(ticks) == 3
    summary = summarise([record], list(record["servers"]))
    assert len(set(record["questions"][0]["answers"]["dense"])) > 3
    for name in ("dense", "all rows", "arena's dense"):
        assert summary[name]["same_answers"] == 1
        assert summary[name]["difference"] == 0
        assert summary[name]["rows_read"] == pytest.approx(summary[name]["rows_stored"])
    assert summary["dense"]["dense_calls"] == summary["all rows"]["dense_calls"] == 1
    assert summary["StreamingLLM"]["same_answers"] < 1
    assert summary["StreamingLLM"]["dense_calls"] == 0
    assert 68 < summary["StreamingLLM"]["rows_read"] < 0.15 * summary["StreamingLLM"]["rows_stored"]
    assert model.config._attn_implementation == before
    assert NAME not in AttentionInterface._global_mapping


def test_the_models_own_generation_gives_denses_answers(model, tokenizer):
    sample = make_sample(TASKS["niah_single"], 700, 0, tokenizer, HAYSTACK)
    record = ask(model, tokenizer, TASKS["niah_single"], sample, [make_server("dense", 1.0)])
    ids = torch.tensor([[*token_ids(sample.context, tokenizer), *token_ids(sample.questions[0].prompt, tokenizer)]])
    said = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=1, pad_token_id=1)[0, ids.shape[1] :]
    assert record["questions"][0]["answers"]["dense"] == tokenizer.decode(said, skip_special_tokens=True)


def test_the_wrapped_model_retrieves_the_question_and_the_answer(model, tokenizer):
    sample = make_sample(TASKS["niah_single"], 3000, 0, tokenizer, HAYSTACK)
    for name in ("dbattn", "dbattn flat, none"):
        record = ask(
            model, tokenizer, TASKS["niah_single"], sample, [make_server("dense", 1.0), make_server(name, 1.0)]
        )
        used = record["servers"][name]
        assert used["dense_calls"] == 0
        assert used["rows_read"] < 0.6 * used["rows_stored"]
        assert used["rows_stored"] > 2900


@pytest.mark.parametrize("name", ["dense", "dbattn", "dbattn hnsw, none", "StreamingLLM"])
def test_a_server_leaves_the_rows_of_the_context_in_their_order(name, model):
    """An index may move them; operators that go by position are served from the same cache."""
    ids = torch.randint(2, 1000, (1, 2600))
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :2550], past_key_values=cache, logits_to_keep=1)
        before = [layer.keys.clone() for layer in cache.layers]
        with make_server(name, 0.1).serving(model, cache, ids[:, 2550:2551]):
            model(ids[:, 2551:], past_key_values=cache, logits_to_keep=1)
            cache.crop(-49)
    for keys, layer in zip(before, cache.layers, strict=True):
        assert torch.equal(layer.keys, keys)


def test_an_operator_of_the_arena_answers_each_query_from_the_rows_before_it(model):
    """A question in one call, or token by token: the same logits."""
    ids = torch.randint(2, 1000, (1, 220))
    logits = []
    for step in (20, 1):
        cache = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids[:, :199], past_key_values=cache)
            with InModel(OPERATORS["dense"], 1.0).serving(model, cache, ids[:, 199:200]) as usage:
                parts = [model(part, past_key_values=cache).logits for part in ids[:, 200:].split(step, dim=1)]
                assert usage().calls == 2 * len(parts)
            assert cache.get_seq_length() == 199
        logits.append(torch.cat(parts, dim=1))
    with torch.inference_mode():
        expected = model(ids).logits[:, 200:]
    for got in logits:
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_what_an_operator_of_the_arena_cannot_honour_is_refused(tokenizer):
    config = transformers.Gemma2Config(
        vocab_size=1000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=["full_attention"], max_position_embeddings=512,
    )  # fmt: skip
    gemma = transformers.Gemma2ForCausalLM(config).eval()
    sample = Sample("some context", (Question("what?", "this is", ("x",)),))
    with pytest.raises(NotImplementedError, match="Gemma2Attention asks for softcap"):
        ask(gemma, tokenizer, TASKS["niah_single"], sample, [InModel(OPERATORS["dense"], 1.0)])
    assert NAME not in AttentionInterface._global_mapping


def test_every_operator_that_answers_from_rows_can_be_named():
    names = server_names()
    assert {"dbattn", "dbattn flat, sample", "dbattn hnsw, none", "dbattn segmented, none", "Quest"} <= set(names)
    assert len(names) == len(set(names))
    for name in names:
        assert make_server(name, 0.1).name == name
    with pytest.raises(ValueError, match="operator 'dense MQA' cannot serve decoding"):
        make_server("dense MQA", 0.1)


def record_of(task, dense, other):
    """A sample of one question, with the scores of two servers; equal scores are equal answers."""
    scores = {"dense": dense, "other": other}
    used = {
        name: {"score": each, "rows_read": 10, "rows_stored": 20, "dense_calls": 0} for name, each in scores.items()
    }
    answers = {name: str(each) for name, each in scores.items()}
    return {"task": task, "servers": used, "questions": [{"answers": answers}]}


def test_averages_are_over_tasks_and_differences_have_their_standard_error():
    records = [record_of("a", 100, 0), record_of("a", 100, 100), record_of("b", 50, 50), record_of("b", 100, 100)]
    found = summarise(records, ["dense", "other"])
    assert found["dense"]["tasks"] == {"a": 100, "b": 75}
    assert found["dense"]["average"] == 87.5
    assert found["dense"]["difference"] == found["dense"]["standard_error"] == 0
    assert found["other"]["tasks"] == {"a": 50, "b": 75}
    assert found["other"]["difference"] == -25
    # The gaps of task a are -100 and 0: variance 5000, of their mean 2500; its root is shared by two tasks.
    assert found["other"]["standard_error"] == pytest.approx(25)
    assert found["other"]["same_answers"] == 0.75
    assert summarise(records[:1], ["other"])["other"]["standard_error"] is None


def test_the_command_prints_a_table_and_writes_the_answers(model, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "load_model", lambda path=None: (model, tokenizer))
    out = tmp_path / "tasks.json"
    options = ["--tokens", "700", "--samples", "2", "--tasks", "niah_single", "frequent_words", "--json", str(out)]
    tasks.main([*options, "--operators", "dbattn flat, none", "StreamingLLM", "--budget", "0.2"])
    printed = capsys.readouterr().out
    assert "RULER's tasks, SmolLM2-135M, 700 tokens, 4 samples: scores in percent" in printed
    assert "points from dense" in printed
    (result,) = json.loads(out.read_text())["results"]
    assert list(result["operators"]) == ["dense", "dbattn flat, none", "StreamingLLM"]
    assert result["operators"]["dense"]["difference"] == 0
    assert set(result["operators"]["StreamingLLM"]["tasks"]) == {"niah_single", "frequent_words"}
    assert [sample["task"] for sample in result["samples"]] == 2 * ["niah_single", "frequent_words"]
    assert set(result["samples"][0]["questions"][0]["answers"]) == set(result["operators"])


def test_an_interrupted_run_reports_what_was_asked(model, tokenizer, tmp_path, capsys, monkeypatch):
    def interrupted_third(*args, **options):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(*args, **options)

    asked = []
    monkeypatch.setattr(tasks, "load_model", lambda path=None: (model, tokenizer))
    monkeypatch.setattr(tasks, "ask", interrupted_third)
    out = tmp_path / "tasks.json"
    tasks.main(f"--tokens 500 --samples 2 --tasks niah_single niah_multikey --json {out}".split())
    assert "interrupted: 2 of 4 samples were asked" in " ".join(capsys.readouterr().err.split())
    (result,) = json.loads(out.read_text())["results"]
    assert [sample["task"] for sample in result["samples"]] == ["niah_single", "niah_multikey"]
    assert result["operators"]["dense"]["standard_error"] is None


@pytest.mark.parametrize("name", ["dense", "dbattn", "StreamingLLM"])
def test_a_model_in_bfloat16_is_asked_on_its_device(name, device, tokenizer):
    model = tiny_llama(initializer_range=0.3).to(device, torch.bfloat16)
    sample = make_sample(TASKS["niah_single"], 700, 0, tokenizer, HAYSTACK)
    record = ask(model, tokenizer, TASKS["niah_single"], sample, [make_server(name, 1.0)])
    assert record["questions"][0]["answers"][name]
    assert record["servers"][name]["dense_calls"] == (name == "dense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused_before_the_model_is_loaded(capsys):
    with pytest.raises(SystemExit):
        tasks.main(["--device", "cuda", "--dtype", "bfloat16"])
    assert "--device is cuda, but torch sees no CUDA device here" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--samples 0", "--samples is 0, expected at least 1"),
        ("--budget 2", "--budget is 2.0, expected a share above 0"),
        ("--tokens 5000", "tokens is 5000, expected at most the model's context, 4096"),
        ("--tokens 100 --tasks common_words", "tokens is 100, too few for common_words"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, model, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "load_model", lambda path=None: (model, tokenizer))
    with pytest.raises(SystemExit):
        tasks.main(options.split())
    assert message in " ".join(capsys.readouterr().err.split())
