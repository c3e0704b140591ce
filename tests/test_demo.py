"""The demo, the command line and the examples, on a tiny model of random weights."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dbattn.cli import main
from dbattn.haystack import hide, make_needles, read_haystack
from dbattn.hf import load_model

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A llama of random weights with a tokenizer trained on the default haystack."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>", "<eos>"])
    tokenizer.train_from_iterator([read_haystack()], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_demo_prints_a_table_and_writes_the_json(model_folder, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = f"--tokens 1500 --k 32 --needles 2 --model {model_folder} --json {out}"
    assert main(["demo", *options.split()]) == 0
    printed = capsys.readouterr()
    assert "dense against retrieval" in printed.out
    assert "reading the text" in printed.err
    result = json.loads(out.read_text())
    assert [needle["depth"] for needle in result["needles"]] == [0.25, 0.75]
    assert {"dense_correct", "retrieval_correct"} < set(result["needles"][0])
    assert result["rows_retrieved"] == 32
    assert 1400 < result["rows_stored"] < 1600
    assert 0 < result["recall"] <= 1
    assert 0 < result["attention_mass"] <= 1
    assert result["relative_error"] > 0
    assert result["ms_per_token"]["dense"] > 0
    assert result["ms_per_token"]["retrieval"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "20"], "tokens is 20, too few to hide 3 needles"),
        (["--tokens", "4000"], "the model's context is 4096"),
        (["--needles", "0"], "needles is 0, expected 1 to 10"),
        (["--k", "0"], "k is 0, expected an integer of at least 1"),
        (["--k", "5000", "--tokens", "1500"], "k covers every row"),
        (["--haystack", "{tmp}/missing.txt"], "missing.txt is not a file"),
        (["--haystack", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--haystack", "{tmp}/binary.txt"], "binary.txt is not UTF-8 text"),
        (["--haystack", "{tmp}/nul.txt"], "nul.txt is not text"),
        (["--tokens", "1500", "--haystack", "{tmp}/short.txt"], r"the haystack has \d tokens"),
        (["--model", "{tmp}/nowhere"], "nowhere does not exist"),
        (["--model", "{tmp}"], "it has no config.json"),
        (["--model", "{tmp}/short.txt"], "short.txt is not a model: expected a folder, or a GGUF file"),
        (["--model", "{tmp}/fake.gguf"], "fake.gguf"),
        (["--model", "{tmp}/broken"], "is not JSON"),
        (["--json", "{tmp}/no/such/folder.json"], "the folder .* does not exist"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_one_clear_line(arguments, message, model_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "nul.txt").write_bytes(b"some\0text")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "fake.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(model_folder)]
    assert main(["demo", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("dbattn: ")
    assert re.search(message, lines[-1])


def test_an_unknown_option_and_help_teach(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--index", "annoy"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = capsys.readouterr().out
    for option in ("--tokens", "--index", "--k", "--needles", "--haystack", "--json", "--model"):
        assert option in shown
    assert "examples:" in shown


def test_ctrl_c_ends_with_130(monkeypatch, model_folder, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dbattn.demo._prefill", interrupted)
    assert main(["demo", "--tokens", "1500", "--model", str(model_folder)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_between_questions_keeps_the_answers_so_far(monkeypatch, model_folder, tmp_path):
    import dbattn.demo as demo

    ask, asked = demo._ask, []

    def once(*args):
        if asked:
            raise KeyboardInterrupt
        asked.append(1)
        return ask(*args)

    monkeypatch.setattr(demo, "_ask", once)
    out = tmp_path / "result.json"
    assert main(["demo", "--tokens", "1500", "--k", "32", "--model", str(model_folder), "--json", str(out)]) == 130
    assert len(json.loads(out.read_text())["needles"]) == 1


def test_needles_stand_at_their_depths_between_sentences(model_folder):
    _, tokenizer = load_model(model_folder)
    needles = make_needles(4)
    text = hide(needles, read_haystack(), 3000, tokenizer)
    for needle in needles:
        at = text.index(needle.sentence)
        assert text[at - 2 : at] == ". "
        assert abs(at / len(text) - needle.depth) < 0.06
    assert abs(len(tokenizer(text)["input_ids"]) - 3000) < 60
    assert len({needle.number for needle in needles}) == 4
    assert make_needles(4) == needles


def test_importing_dbattn_loads_no_heavy_package():
    code = (
        "import sys, dbattn; heavy = {'faiss', 'transformers', 'numba', 'triton'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_run(example, model_folder, monkeypatch, capsys):
    small = {
        "quickstart": [],
        "compare_with_dense": ["--rows", "2048", "--k", "32"],
        "wrap_model": ["--tokens", "1200", "--k", "32", "--model", str(model_folder)],
        "needle_in_haystack": ["--tokens", "1200", "--k", "32", "--needles", "1", "--model", str(model_folder)],
    }[example.stem]
    monkeypatch.setattr(sys, "argv", [str(example), *small])
    runpy.run_path(str(example), run_name="__main__")
    assert "recall" in capsys.readouterr().out
