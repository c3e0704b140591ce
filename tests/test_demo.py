"""The demo, the command line and the examples, on a tiny model of random weights."""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from dbattn import AttentionDB
from dbattn.cli import main
from dbattn.cli.demo import Answer, summary
from dbattn.files import write_json
from dbattn.hf import load_model
from dbattn.text.haystack import hide, make_needles, read_haystack

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_demo_prints_a_table_and_writes_the_json(model_folder, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = f"--tokens 1500 --index flat --k 32 --needles 2 --model {model_folder} --json {out}"
    assert main(["demo", *options.split()]) == 0
    printed = capsys.readouterr()
    assert "dense against retrieval" in printed.out
    assert "reading the text" in printed.err
    result = json.loads(out.read_text())
    assert [needle["depth"] for needle in result["needles"]] == [0.25, 0.75]
    assert {"dense_correct", "retrieval_correct"} < set(result["needles"][0])
    assert result["rows_retrieved"] == 32
    assert 1400 < result["rows_stored"] < 1600
    assert 32 + 4 + 64 <= result["rows_read"] < 200
    assert result["dense_calls"] == {}
    assert 0 < result["recall"] <= 1
    assert 0 < result["attention_mass"] <= 1
    assert result["relative_error"] > 0
    assert result["ms_per_token"]["dense"] > 0
    assert result["ms_per_token"]["retrieval"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_demo_counts_calls_that_scanned_everything(model_folder, tmp_path, monkeypatch, capsys):
    out, plan, calls = tmp_path / "result.json", AttentionDB._plan, []

    def half(self, call, *, retrieve=True, **options):
        calls.append(1)
        return plan(self, call, retrieve=retrieve and len(calls) % 4 < 2, **options)

    monkeypatch.setattr(AttentionDB, "_plan", half)
    options = f"--tokens 1500 --index flat --k 32 --needles 1 --model {model_folder} --json {out}"
    assert main(["demo", *options.split()]) == 0
    result = json.loads(out.read_text())
    assert result["dense_calls"]["dense was asked for"] > 5
    assert result["rows_read"] > 0.4 * result["rows_stored"]
    assert "calls answered densely, which read all rows:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "500", "--k", "32"], "tokens is 500, expected more than 2116: with index='segmented' and k=32"),
        (["--tokens", "4000"], "the model's context is 4096"),
        (["--needles", "0"], "needles is 0, expected 1 to 10"),
        (["--k", "0"], "k is 0, expected an integer of at least 1"),
        (["--k", "5000"], "tokens is 4000, expected more than 5068"),
        (["--k", "2430", "--tokens", "2500"], r"nothing was retrieved: k=2430 covers every row in the index$"),
        (["--haystack", "{tmp}/missing.txt"], "missing.txt is not a file"),
        (["--haystack", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--haystack", "{tmp}/binary.txt"], "binary.txt is not UTF-8 text"),
        (["--haystack", "{tmp}/nul.txt"], "nul.txt is not text"),
        (["--tokens", "2500", "--haystack", "{tmp}/short.txt"], r"the haystack has \d tokens"),
        (["--model", "{tmp}/nowhere"], "nowhere does not exist"),
        (["--model", "{tmp}"], "it has no config.json"),
        (["--model", "{tmp}/short.txt"], "short.txt is not a model: expected a folder, or a GGUF file"),
        (["--model", "{tmp}/fake.gguf"], "fake.gguf is not a model: "),
        (["--model", "{tmp}/broken"], "is not JSON"),
        (["--model", "{tmp}/weightless"], r"weightless is not a model: .*no file named model.safetensors"),
        (["--model", "{tmp}/torn"], r"torn is not a model: .*incomplete metadata"),
        (["--model", "{tmp}/float"], r"float is not a model: .*hidden_size"),
        (["--model", "{tmp}/mamba"], "MambaForCausalLM cannot be wrapped"),
        (["--json", "{tmp}"], r"--json .* is a folder, expected a file"),
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
    for folder in ("weightless", "torn", "float"):
        shutil.copytree(model_folder, tmp_path / folder)
    (tmp_path / "weightless" / "model.safetensors").unlink()
    os.truncate(tmp_path / "torn" / "model.safetensors", 100_000)
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "float" / "config.json").write_text(json.dumps(config | {"hidden_size": 1.5}))
    if "{tmp}/mamba" in arguments:
        sizes = {"vocab_size": 1000, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
        shutil.copytree(model_folder, tmp_path / "mamba")
        transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(model_folder)]
    assert main(["demo", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("dbattn: ")
    assert re.search(message, lines[-1])
    assert not any("Traceback" in line for line in lines)


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

    for where in ("dbattn.cli.demo._prefill", "dbattn.hf.load.AutoModelForCausalLM.from_pretrained"):
        monkeypatch.setattr(where, interrupted)
        assert main(["demo", "--tokens", "2500", "--model", str(model_folder)]) == 130
        assert "interrupted" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_leaves_no_file_behind(tmp_path):
    figures = dict.fromkeys(
        ("recall", "attention_mass", "relative_error", "rows_retrieved", "rows_read", "rows_stored"), 1.0
    )
    # Both answers ended with their first token: there was no decode step to time.
    answer = Answer(make_needles(1)[0], "", "", figures, [], [])
    assert summary([answer])["ms_per_token"] == {"dense": None, "retrieval": None}
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_json(tmp_path / "taken", summary([answer]))
    write_json(tmp_path / "result.json", summary([answer]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "taken"]


def test_two_first_runs_at_once_share_one_conversion(model_folder, tmp_path, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF and the rest")
    monkeypatch.setenv("DBATTN_CACHE", str(tmp_path / "cache"))
    load = transformers.AutoModelForCausalLM.from_pretrained

    def convert(path, **options):
        if "gguf_file" not in options:
            return load(path, **options)
        # The other run finishes while this one converts.
        (aside,) = (tmp_path / "cache" / "models").iterdir()
        target = aside.with_name(f"tiny-{hashlib.sha256(gguf.read_bytes()).hexdigest()[:16]}")
        shutil.copytree(model_folder, target)
        return load(model_folder)

    monkeypatch.setattr("dbattn.hf.load.AutoModelForCausalLM.from_pretrained", convert)
    tokenizer = load_model(model_folder)[1]
    monkeypatch.setattr("dbattn.hf.load.AutoTokenizer.from_pretrained", lambda *args, **options: tokenizer)
    assert load_model(gguf)[0].config.vocab_size == 1000
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_ctrl_c_between_questions_keeps_the_answers_so_far(monkeypatch, model_folder, tmp_path):
    import dbattn.cli.demo as demo

    ask, asked = demo._ask, []

    def once(*args):
        if asked:
            raise KeyboardInterrupt
        asked.append(1)
        return ask(*args)

    monkeypatch.setattr(demo, "_ask", once)
    out = tmp_path / "result.json"
    options = f"--tokens 1500 --index flat --k 32 --model {model_folder} --json {out}"
    assert main(["demo", *options.split()]) == 130
    assert len(json.loads(out.read_text())["needles"]) == 1


def test_needles_stand_at_their_depths_between_sentences(model_folder):
    _, tokenizer = load_model(model_folder)
    needles = make_needles(4)
    text = hide(needles, read_haystack(), 3000, tokenizer)
    for needle in needles:
        at = text.index(needle.sentence)
        assert re.search(r"[.!?] $|\n$", text[:at])
        assert abs(at / len(text) - needle.depth) < 0.06
    assert abs(len(tokenizer(text)["input_ids"]) - 3000) < 60
    assert len({needle.number for needle in needles}) == 4
    assert make_needles(4) == needles


class Letters:
    """A tokenizer: a token is a letter."""

    def __call__(self, text, **options):
        return {"input_ids": list(text)}

    def decode(self, ids):
        return "".join(ids)


@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize("line", ["This is line {}", "Is this line {}?", "A line that ends. And goes on to {}"])
def test_needles_stay_whole_in_any_text_that_has_lines(line, count):
    needles = make_needles(count)
    haystack = "\n".join(line.format(i) for i in range(700))
    text = hide(needles, haystack, 9000, Letters())
    assert all(needle.sentence in text for needle in needles)
    places = [text.index(needle.sentence) for needle in needles]
    assert places == sorted(places)
    for needle in needles:
        text = text.replace(f"{needle.sentence} ", "")
    assert haystack.startswith(text)


def test_a_text_without_sentences_or_lines_hides_nothing():
    with pytest.raises(ValueError, match="no sentence or line of the haystack ends near depth 17%"):
        hide(make_needles(3), "word " * 5000, 9000, Letters())


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
        "depth_attention": [],
        "compare_with_dense": ["--k", "32"],
        "wrap_model": ["--tokens", "2500", "--k", "32", "--model", str(model_folder)],
        "needle_in_haystack": ["--tokens", "2200", "--k", "32", "--needles", "1", "--model", str(model_folder)],
    }[example.stem]
    monkeypatch.setattr(sys, "argv", [str(example), *small])
    runpy.run_path(str(example), run_name="__main__")
    says = {"depth_attention": "off by", "quickstart": "relative error against dense"}.get(example.stem, "recall")
    assert says in capsys.readouterr().out
