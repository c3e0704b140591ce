"""What the README shows can be typed: its commands, options, targets, modules and Python code exist and run."""

import argparse
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from conftest import tiny_llama

import dbattn.cli
from dbattn.cli._parser import make_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# From here on the snippet needs a model.
WRAPS = "from dbattn.hf import wrap"


def parsers():
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


def shown(text):
    """Commands as a text shows them, in code blocks and in backticks: (names, options)."""
    text = re.sub(r"^```python\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for line in re.findall(r"^ *(dbattn [^\n]+)|`(dbattn [^`]+)`", text, re.MULTILINE):
        typed = re.split(r"\s{2,}|\s#", "".join(line))[0]
        names = re.match(r"dbattn ((?:[a-z]+)(?: \| [a-z]+)*)", typed)
        options = re.findall(r"(?<!\S)--[a-z-]+", re.sub(r'"[^"]*"', "", typed))
        found.append((names[1].split(" | ") if names else [], options))
    return found


def test_the_readme_the_help_and_the_parser_name_the_same_commands():
    there = set(parsers())
    named = {name for names, _ in shown(README) for name in names}
    helped = set(re.findall(r"^    ([a-z]+) ", make_parser().format_help(), re.MULTILINE))
    described = set(re.search(r"``dbattn ([a-z |]+)``", dbattn.cli.__doc__)[1].split(" | "))
    files = {file.stem for file in (ROOT / "dbattn" / "cli").glob("[a-z]*.py")} | {"demo"}
    assert named == helped == described == files == there


def test_every_option_that_readme_help_or_a_message_names_is_one_of_its_command():
    every = {option for parser in parsers().values() for option in parser._option_string_actions}
    lines = shown(README) + [line for parser in parsers().values() for line in shown(parser.format_help())]
    assert len(lines) > 20
    for names, options in lines:
        for name in names:
            assert set(options) <= parsers()[name]._option_string_actions.keys(), (name, options)
    for file in (ROOT / "dbattn" / "cli").glob("*.py"):
        # "--no-deps" and the like are pip's.
        said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"pip install [^)]*", "", file.read_text())))
        assert said <= every | {"--version", "--help"}, file


def test_every_target_module_and_file_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert named
    assert named <= targets
    modules = set(re.findall(r"python\s+-m\s+([\w.]+)", README)) - {"venv", "pip"}
    assert modules
    assert all(find_spec(module) for module in modules)
    files = set(re.findall(r"\b(?:examples|tests|benchmarks)/[\w./]+\.(?:py|png)", README))
    assert files
    assert all((ROOT / file).is_file() for file in files)


def namespace():
    keys, values = torch.randn(2, 1, 2, 300, 64)
    return {"keys": keys, "values": values, "query": torch.randn(1, 6, 1, 64)}


def test_the_readmes_python_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = namespace()
    for block in PYTHON:
        exec(block.split(WRAPS)[0], names)
    assert names["out"].shape == names["query"].shape
    printed = capsys.readouterr().out
    rows, error = re.search(r"On these rows (\d+) of 12,280 are read, .* the answer is ([\d.]+) % off", README).groups()
    assert f"{rows} of 12280 rows read" in printed
    assert f"{float(error) / 100:.3f}" in re.search(r"relative error ([\d.]+)", printed)[1]
    # Opened again, it answers as before.
    assert torch.equal(names["db"].attend(names["query"]), names["out"])


def test_the_readmes_code_for_a_model_runs_and_what_it_saves_can_be_opened(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in PYTHON if WRAPS in block)
    inputs = tokenizer("What is a module?", return_tensors="pt", return_token_type_ids=False)
    names = namespace() | {"model": tiny_llama(), "inputs": dict(inputs)}
    exec(WRAPS + block.split(WRAPS)[1], names)
    assert "layer" in capsys.readouterr().out
    with names["wrap"](names["model"], context="book.dbattn") as handle:
        assert handle.new_cache().get_seq_length() >= inputs["input_ids"].shape[1]


def test_python_dash_m_dbattn_is_the_command():
    done = subprocess.run([sys.executable, "-m", "dbattn", "cost", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: dbattn cost")
