"""Texts longer than a model's own window: how they are cut and read, where a question stands, what a kill leaves."""

import copy
import json
import math
import os
import pickle
import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from dbattn import AttentionDB, RetrievalConfig
from dbattn.cli import main
from dbattn.hf import Handle, wrap
from dbattn.snapshot import SnapshotError, SnapshotWriter, describe, save
from dbattn.text.haystack import read_haystack
from dbattn.windows import Windows

WINDOWS = Windows(prefix=8, overlap=32, tokens=256)
WINDOWS_READ = replace(WINDOWS, rows=1000)
CONFIG = RetrievalConfig(max_queries=64)
ROWS = 1000
QUESTION = torch.arange(5, 12)[None]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 1000, (1, ROWS), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(model, ids, tmp_path_factory):
    """A context of four windows."""
    path = tmp_path_factory.mktemp("windows") / "text.dbattn"
    with torch.inference_mode(), wrap(model, CONFIG) as handle:
        handle.save(path, read(handle, ids))
    return path


def read(handle, ids, windows=WINDOWS, stop=None):
    cache = handle.new_cache()
    while cache.get_seq_length() < (stop or ids.shape[1]):
        handle.read_window(ids, cache, windows)
    return cache


def plain_copy(cache, model, rows):
    """The first rows of a cache in one of transformers."""
    plain = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        plain.update(layer.keys[:, :, :rows].clone(), layer.values[:, :, :rows].clone(), number)
    return plain


@given(st.integers(0, 20), st.integers(0, 50), st.integers(1, 100), st.integers(1, 1000))
def test_windows_tile_a_text_and_all_end_at_one_position(prefix, overlap, tokens, rows):
    windows = Windows(prefix, overlap, tokens)
    found = windows.of(rows)
    assert [w.first for w in found] == [0, *(w.stop for w in found[:-1])]
    assert found[-1].stop == rows
    for window in found[1:]:
        # Positions 0 .. prefix, then the overlap and the window's own tokens, up to the span.
        assert window.stop + window.shift == windows.span
        assert window.since + window.shift == prefix
        assert prefix <= window.since <= window.first - overlap
    whole = replace(windows, rows=rows)
    assert rows + whole.shift == min(rows, windows.span)
    assert (whole.sharpening_over(rows) > 1) == (rows > windows.span > 1)
    assert whole.count == len(whole.of(rows))
    # A text that goes on keeps the windows that were full.
    full = windows.full(rows)
    assert 0 <= rows - full < windows.span
    assert [w for w in found if w.stop <= full] == [w for w in windows.of(rows + 77) if w.stop <= full]


def test_rows_of_a_window_are_those_of_prefix_overlap_and_window_read_alone(model, ids):
    with torch.inference_mode():
        with wrap(model, CONFIG) as handle:
            cache = read(handle, ids)
            assert cache.get_seq_length() == ROWS
            stored = plain_copy(cache, model, ROWS)
        for window in WINDOWS.of(ROWS):
            prefix = ids[:, : WINDOWS.prefix] if window.first else ids[:, :0]
            alone = DynamicCache(config=model.config)
            model(torch.cat([prefix, ids[:, window.since : window.stop]], dim=1), past_key_values=alone)
            for ours, theirs in zip(stored.layers, alone.layers, strict=True):
                new = window.stop - window.first
                own = slice(window.first, window.stop)
                torch.testing.assert_close(ours.keys[:, :, own], theirs.keys[:, :, -new:], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours.values[:, :, own], theirs.values[:, :, -new:], rtol=1e-4, atol=1e-5)


def test_a_text_of_one_window_is_what_it_is_without_windows(model, ids):
    short = ids[:, : WINDOWS.span]
    with torch.inference_mode(), wrap(model, CONFIG) as handle:
        cache = read(handle, short)
        other = handle.new_cache()
        with handle.dense():
            model(short, past_key_values=other)
            ours, theirs = (model(QUESTION, past_key_values=each).logits for each in (cache, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@contextmanager
def logits_times(model, factor):
    for layer in model.model.layers:
        layer.self_attn.scaling *= factor
    yield
    for layer in model.model.layers:
        layer.self_attn.scaling /= factor


def test_a_question_stands_where_the_newest_window_ends_and_sees_every_row_with_sharper_logits(model, ids, folder):
    with torch.inference_mode():
        with wrap(model, context=folder) as handle, handle.dense():
            assert handle.windows == replace(WINDOWS, rows=ROWS)
            cache = handle.new_cache()
            plain = plain_copy(cache, model, ROWS)
            text = torch.cat([handle.context, QUESTION], dim=1)
            generated = model.generate(
                text, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            cache.crop(ROWS - cache.get_seq_length())
            logits = model(QUESTION, past_key_values=cache).logits
        with logits_times(model, math.log(ROWS) / math.log(WINDOWS.span)):
            at = torch.arange(WINDOWS.span, WINDOWS.span + QUESTION.shape[1])[None]
            expected = model(QUESTION, past_key_values=plain, position_ids=at).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            # Each token of ``generate`` stands one further.
            token, tokens = expected[:, -1:].argmax(dim=-1), []
            for step in range(6):
                tokens.append(int(token))
                at = torch.tensor([[WINDOWS.span + QUESTION.shape[1] + step]])
                token = model(token, past_key_values=plain, position_ids=at).logits[:, -1:].argmax(dim=-1)
    assert generated[0, text.shape[1] :].tolist() == tokens


CHOSEN = (1, 3)


@pytest.fixture
def two_of_four(monkeypatch):
    """Whatever is asked reads the windows ``CHOSEN``; what was asked comes in the list."""
    asked = []

    def choose(windows, text, question, most):
        asked.append(question)
        return CHOSEN

    monkeypatch.setattr("dbattn.hf.session.choose", choose)
    return asked


def rows_of(windows):
    """The rows that are read where these windows are."""
    of = WINDOWS.of(ROWS)
    return [*range(WINDOWS.prefix), *(row for number in windows for row in range(of[number].first, of[number].stop))]


@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_question_and_what_follows_see_the_chosen_windows_alone(model, ids, two_of_four, tmp_path, storage):
    rows = rows_of(CHOSEN)
    with torch.inference_mode():
        with wrap(model, replace(CONFIG, storage=storage, n_windows=2)) as handle:
            handle.save(tmp_path / "a", read(handle, ids))
        with wrap(model, context=tmp_path / "a") as handle:
            cache = handle.new_cache()
            plain = DynamicCache(config=model.config)
            for number, layer in enumerate(cache.layers):
                plain.update(layer.keys[:, :, rows].clone(), layer.values[:, :, rows].clone(), number)
            logits = model(QUESTION, past_key_values=cache).logits
            reading = handle.reading(cache)
            assert (reading.numbers, reading.read, cache.get_seq_length()) == (CHOSEN, len(rows), ROWS + 7)
            said = str(handle.report().summary)
            assert f"Windows were chosen: all {len(cache.layers)} decode calls scanned" in said
            assert "the question reads 2 of them (tokens 296 to 551, 808 to 999)" in said
            assert handle.report().summary.rows_stored == ROWS + 7
            second = model(torch.tensor([[3]]), past_key_values=cache).logits
            assert len(two_of_four) == 1  # what follows a question chooses nothing
            # Back at the context, and through generate, which counts all rows.
            cache.crop(ROWS - cache.get_seq_length())
            text = torch.cat([handle.context, QUESTION], dim=1)
            got = model.generate(text, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert torch.equal(two_of_four[1], QUESTION)
        with logits_times(model, math.log(len(rows)) / math.log(WINDOWS.span)):
            at = torch.arange(WINDOWS.span, WINDOWS.span + 8)[None]
            expected = model(QUESTION, past_key_values=plain, position_ids=at[:, :7]).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            assert got[0, ROWS + 7] == expected[0, -1].argmax()
            expected = model(torch.tensor([[3]]), past_key_values=plain, position_ids=at[:, 7:]).logits
            torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


def test_beams_and_batch_edits_share_the_text_and_each_row_answers_as_one_alone(model, ids, folder, two_of_four):
    with torch.inference_mode(), wrap(model, replace(CONFIG, n_windows=2), context=folder) as handle:
        alone, cache = handle.new_cache(), handle.new_cache()
        text = [rows.data_ptr() for layer in cache.layers for rows in layer.base.between(0, 1)]
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert text == [rows.data_ptr() for layer in cache.layers for rows in layer.base.between(0, 1)]
        questions = torch.cat([QUESTION, QUESTION + 1, QUESTION])
        logits = model(questions, past_key_values=cache).logits
        torch.testing.assert_close(logits[[0]], model(QUESTION, past_key_values=alone).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[0], logits[2])
        cache.batch_select_indices(torch.tensor([1]))
        alone.crop(ROWS - alone.get_seq_length())
        expected = model(QUESTION + 1, past_key_values=alone).logits
        torch.testing.assert_close(logits[[1]], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(cache.layers[0].keys[:, :, :ROWS], alone.layers[0].keys[:, :, :ROWS])
        whole = torch.cat([handle.context, QUESTION], dim=1)
        options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
        beams = handle.new_cache()
        beams.batch_repeat_interleave(3)
        found = model.generate(whole, past_key_values=beams, num_beams=3, **options)
        assert found.shape == (1, whole.shape[1] + 5)
        assert text == [rows.data_ptr() for layer in beams.layers for rows in layer.base.between(0, 1)]


def test_files_of_windows_that_are_not_read_are_not_touched(model, ids, two_of_four, tmp_path, monkeypatch):
    monkeypatch.setattr("dbattn.snapshot.writer.ROWS_PER_FILE", 64)
    with torch.inference_mode():
        with wrap(model, replace(CONFIG, n_windows=2)) as handle:
            handle.save(tmp_path / "a", read(handle, ids))
        before = {path: path.read_bytes() for path in tmp_path.glob("a/rows-*")}
        read_rows = set(rows_of(CHOSEN))
        for path, content in before.items():
            first, stop = map(int, path.name.split("-")[1:3])
            if not read_rows & set(range(first, stop)):
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
                spoilt = path
        with wrap(model, context=tmp_path / "a") as handle:
            cache = handle.new_cache()
            model(QUESTION, past_key_values=cache)
            cache.crop(ROWS - cache.get_seq_length())
            with handle.dense(), pytest.raises(SnapshotError, match="is damaged"):
                model(QUESTION, past_key_values=cache)
            # Refused as often as it is asked for, and the cache is of use afterwards.
            with handle.dense(), pytest.raises(SnapshotError, match="is damaged"):
                model(QUESTION, past_key_values=cache)
            model(QUESTION, past_key_values=cache)
        for path, content in before.items():
            path.write_bytes(content)
        chosen = next(path for path in before if int(path.name.split("-")[1]) == 320)
        chosen.write_bytes(before[chosen][:-1] + bytes([before[chosen][-1] ^ 1]))
        with (
            wrap(model, context=tmp_path / "a") as handle,
            pytest.raises(SnapshotError, match=f"{chosen.name} is damaged"),
        ):
            model(QUESTION, past_key_values=handle.new_cache())
    assert spoilt != chosen


def test_a_copy_of_a_cache_goes_on_by_itself_and_a_pickle_holds_all_rows(model, ids, folder, two_of_four):
    with torch.inference_mode(), wrap(model, replace(CONFIG, n_windows=2), context=folder) as handle:
        cache, token = handle.new_cache(), torch.tensor([[3]])
        model(QUESTION, past_key_values=cache)
        twin = copy.deepcopy(cache)
        expected = model(token, past_key_values=cache).logits
        assert torch.equal(model(token, past_key_values=twin).logits, expected)
        twin.crop(ROWS - twin.get_seq_length())
        assert (twin.get_seq_length(), cache.get_seq_length()) == (ROWS, ROWS + 8)
        handle.read_window(torch.cat([ids, ids[:, :48]], dim=1), (more := read_on(handle, ids)), WINDOWS)
        assert more.get_seq_length() == ROWS + 48
        ordinary = pickle.loads(pickle.dumps(cache))
        assert ordinary.layers[1].keys.shape[2] == ROWS + 8
        assert torch.equal(ordinary.layers[1].keys[:, :, :ROWS], handle.new_cache().layers[1].keys)


def test_a_cache_of_windows_moves_to_the_next_wrap_and_outlives_it(model, ids, folder, two_of_four):
    config, token = replace(CONFIG, n_windows=2), torch.tensor([[3]])
    with torch.inference_mode():
        with wrap(model, config, context=folder) as handle:
            cache = handle.new_cache()
            model(QUESTION, past_key_values=cache)
            expected = model(token, past_key_values=cache).logits
            keys = cache.layers[1].keys
        with wrap(model, replace(config, storage="float16")) as handle:
            model(token, past_key_values=cache)
            assert torch.equal(cache.layers[1].keys[:, :, : ROWS + 8], keys)
            # Rows after the windows' are always read.
            assert handle.reading(cache).read == len(rows_of(CHOSEN)) + 8
            cache.crop(ROWS - cache.get_seq_length())
            model(QUESTION, past_key_values=cache)
            torch.testing.assert_close(model(token, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)
        # A model that is not wrapped sees all rows.
        assert model(token, past_key_values=cache).logits.shape == expected.shape


def read_on(handle, ids):
    """A cache of the context that ends with its newest full window."""
    cache = handle.new_cache()
    cache.crop(WINDOWS.full(ROWS) - ROWS)
    return cache


def test_a_context_that_was_saved_with_lists_opens_with_the_same_rows(model, ids, folder, two_of_four, tmp_path):
    with torch.inference_mode(), wrap(model, replace(CONFIG, n_windows=2)) as handle:
        cache = read(handle, ids)
        databases = []
        for layer in cache.layers:
            store = layer.base
            db = AttentionDB(store.num_kv_heads, store.head_dim, config=CONFIG)
            db.insert(store.keys, store.values)
            databases.append((db.store, db.index))
        assert len(databases[0][1])
        save(tmp_path / "old", databases, CONFIG, model=describe(folder).model, token_ids=ids, windows=WINDOWS_READ)
        expected = model(QUESTION, past_key_values=cache).logits
    for path in (folder, tmp_path / "old"):
        with torch.inference_mode(), wrap(model, replace(CONFIG, n_windows=2), context=path) as handle:
            assert torch.equal(model(QUESTION, past_key_values=handle.new_cache()).logits, expected)


def test_a_question_reads_the_windows_that_have_its_rarer_tokens(model, ids, folder):
    with torch.inference_mode(), wrap(model, replace(CONFIG, n_windows=2), context=folder) as handle:
        for number in range(3):
            cache, window = handle.new_cache(), WINDOWS.of(ROWS)[number]
            # Tokens that only this window has.
            others = set(torch.cat([ids[0, : window.first], ids[0, window.stop :]]).tolist())
            own = [token for token in ids[0, window.first : window.stop].tolist() if token not in others][:12]
            model(torch.tensor([own]), past_key_values=cache)
            assert handle.reading(cache).numbers == (number, 3)
        with pytest.raises(ValueError, match="windows are chosen by the token ids of a question"):
            model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size), past_key_values=handle.new_cache())
    with pytest.raises(ValueError, match="n_windows is 0, expected an integer of at least 1"):
        RetrievalConfig(n_windows=0)


def test_a_context_keeps_its_windows_and_a_saved_question_goes_on_from_there(model, ids, folder, tmp_path):
    data = json.loads((folder / "manifest.json").read_text())
    assert data["windows"] == {"prefix": 8, "overlap": 32, "tokens": 256, "rows": ROWS}
    with torch.inference_mode():
        with wrap(model, context=folder) as handle:
            cache = handle.new_cache()
            with handle.dense():
                model(QUESTION, past_key_values=cache)
                read = handle.reading(cache)
                handle.save(tmp_path / "more", cache)
                expected = model(QUESTION, past_key_values=cache).logits
            assert handle.reading(cache) == read
        info = describe(tmp_path / "more")
        assert (info.rows, info.windows) == (ROWS + QUESTION.shape[1], replace(WINDOWS, rows=ROWS))
        with wrap(model, context=tmp_path / "more") as handle, handle.dense():
            # The same rows in other parts: what differs is the order of sums.
            torch.testing.assert_close(model(QUESTION, past_key_values=handle.new_cache()).logits, expected)


def test_a_context_without_windows_has_no_word_of_them(model, ids, tmp_path):
    with torch.inference_mode(), wrap(model, CONFIG) as handle:
        model(ids[:, :100], past_key_values=(cache := handle.new_cache()))
        handle.save(tmp_path / "a", cache)
        assert "window" not in str(handle.report().summary)
    assert "windows" not in json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert describe(tmp_path / "a").windows is None


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ({"prefix": 8, "overlap": 32, "tokens": 0, "rows": ROWS}, "tokens is 0"),
        ({"prefix": 8, "overlap": 32, "tokens": 256, "rows": ROWS + 1}, "more than the 1000 rows"),
        ({"prefix": 8, "overlap": 32, "tokens": 256}, "does not have the fields prefix, overlap, tokens, rows"),
    ],
)
def test_forged_windows_are_refused(windows, message, folder, tmp_path):
    info = describe(folder)
    data = {**info._body(), "windows": windows}
    from dbattn.snapshot.manifest import _dump, hashlib

    digest = hashlib.sha256(_dump(data).encode()).hexdigest()
    with pytest.raises(SnapshotError, match=message):
        info.from_bytes(folder, (_dump({**data, "sha256": digest}) + "\n").encode())


def test_what_cannot_be_read_or_cut_is_refused(model, ids):
    with torch.inference_mode(), wrap(model, CONFIG) as handle:
        cache = read(handle, ids)
        with pytest.raises(ValueError, match=r"700 rows end inside a window.*cut at 552"):
            cache.crop(700 - ROWS)
        assert cache.get_seq_length() == ROWS
        with pytest.raises(ValueError, match=r"no window of 1000 tokens begins at row 1000: crop the cache to 808"):
            handle.read_window(ids, cache, WINDOWS)
        cache.crop(808 - ROWS)
        assert handle.report().summary.windows.startswith("808 tokens read in 3 windows of 256")
        with pytest.raises(ValueError, match="cache holds 808 rows read otherwise: 808 tokens read in 3 windows"):
            handle.read_window(ids, cache, replace(WINDOWS, tokens=100))
        handle.read_window(ids, cache, WINDOWS)
        with pytest.raises(ValueError, match="windows have 4140 positions, the model was made for 4096"):
            handle.read_window(ids, handle.new_cache(), replace(WINDOWS, tokens=4100))
        model(ids[:, :10], past_key_values=(other := handle.new_cache()))
        with pytest.raises(ValueError, match="holds 10 rows read otherwise: in one piece"):
            handle.read_window(ids, other, WINDOWS)


# The command line.


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(read_haystack()[:6000])
    return path


@pytest.fixture(scope="module")
def context(book, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("context") / "book.dbattn"
    assert ingest(book, out, model_folder) == 0
    return out


def ingest(file, out, model, *options):
    words = ["ingest", str(file), "--out", str(out), "--model", str(model), "--window-tokens", "400"]
    return main([*words, "--save-every", "1", *map(str, options)])


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_ask_info_and_explain_say_that_windows_were_read(context, model_folder, tmp_path, capsys):
    info = describe(context)
    assert info.windows is not None
    assert info.rows > 3 * 400
    # Kept as int8, in the order of the text.
    assert (info.layers[0].dtype, info.layers[0].indexed) == ("int8", 0)
    words = re.escape(f"{info.rows} tokens read in {len(info.windows.of(info.rows))} windows of 400")
    model = ["--model", str(model_folder)]
    capsys.readouterr()
    assert main(["ask", str(context), "What is a module?", *model, "--max-tokens", "4"]) == 0
    said = capsys.readouterr().err
    assert re.search(f"Rows: {words}.*the question reads 3 of them", said)
    options = ["--windows", "1", "--max-tokens", "2", "--show-sources"]
    assert main(["ask", str(context), "What is a module?", *model, *options]) == 0
    newest = info.windows.of(info.rows)[-1]
    assert f"reads 1 of them (tokens {newest.first} to {newest.stop - 1})" in capsys.readouterr().err
    assert main(["ask", str(context), "What?", *model, "--windows", "0"]) == 2
    assert "--windows is 0, expected at least 1" in capsys.readouterr().err
    assert main(["explain", str(context), "What is a module?", *model]) == 0
    assert re.search(f"rows: {words}.*position {info.windows.span}", capsys.readouterr().out)
    assert main(["info", str(context), "--json", str(tmp_path / "i.json")]) == 0
    assert re.search(f"windows +{words}", capsys.readouterr().out)
    assert json.loads((tmp_path / "i.json").read_text())["windows"]["tokens"] == 400
    # The text is far longer than what the model could hold beside this question, which counts from the window's end.
    assert main(["ask", str(context), "What? " * 2000, *model]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"windows that end at {info.windows.span} tokens, the question has \d+ .* at most 4096", said)


@pytest.mark.parametrize("at", ["inside a window", "between windows"])
def test_ctrl_c_keeps_whole_windows_and_the_same_command_ends_with_the_same_folder(
    at, book, context, model_folder, tmp_path, monkeypatch, capsys
):
    read_window, save = Handle.read_window, SnapshotWriter.save

    def interrupted_inside(self, token_ids, cache, windows, advance=None):
        if cache.get_seq_length():
            os.kill(os.getpid(), signal.SIGINT)
        read_window(self, token_ids, cache, windows, advance)

    def interrupted_after(*args, **options):
        report = save(*args, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return report

    with monkeypatch.context() as patched:
        if at == "inside a window":
            patched.setattr(Handle, "read_window", interrupted_inside)
        else:
            patched.setattr(SnapshotWriter, "save", interrupted_after)
        assert ingest(book, tmp_path / "a", model_folder) == 130
    windows = describe(context).windows
    total, first = describe(context).rows, windows.span
    assert describe(tmp_path / "a").rows == first
    assert f"holds {first} of {total} tokens; the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    assert ingest(book, tmp_path / "a", model_folder) == 0
    assert f"holds {first} of {total} tokens, going on from there" in capsys.readouterr().err
    assert files_of(tmp_path / "a") == files_of(context)


def test_a_text_that_has_grown_is_read_on_and_ends_with_the_same_folder(book, context, model_folder, tmp_path, capsys):
    assert ingest(book, tmp_path / "a", model_folder, "--tokens", 1100) == 0
    assert ingest(book, tmp_path / "a", model_folder) == 0
    assert files_of(tmp_path / "a") == files_of(context)
    assert ingest(book, tmp_path / "a", model_folder) == 0
    assert "all of it was read before" in capsys.readouterr().out


def test_a_text_too_long_for_the_model_is_read_by_windows_unasked_and_one_that_fits_is_not(
    model_folder, tmp_path, capsys
):
    (tmp_path / "long.txt").write_text(read_haystack()[:15000])
    words = ["ingest", str(tmp_path / "long.txt"), "--model", str(model_folder), "--out"]
    assert main([*words, str(tmp_path / "a")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"has \d+ tokens \(the model reads 3840 at once\): read in 3 windows of 2048, each alone", said)
    assert describe(tmp_path / "a").windows.tokens == 2048
    assert main([*words, str(tmp_path / "b"), "--tokens", "1000"]) == 0
    assert describe(tmp_path / "b").windows is None
    capsys.readouterr()
    # Begun in one piece, it cannot grow beyond what the model reads at once.
    before = files_of(tmp_path / "b")
    assert main([*words, str(tmp_path / "b")]) == 2
    assert "was read in one piece, " in capsys.readouterr().err
    assert main([*words, str(tmp_path / "a"), "--window-tokens", "1000"]) == 2
    assert "--window-tokens is 1000, but" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "c"), "--window-tokens", "3900"]) == 2
    assert re.search(r"--window-tokens is 3900, expected at most \d+: of 4096 that", capsys.readouterr().err)
    assert files_of(tmp_path / "b") == before
    assert not (tmp_path / "c").exists()


def test_a_book_of_one_line_is_one_window(model_folder, tmp_path):
    (tmp_path / "line.txt").write_text("Call me Ishmael.")
    assert ingest(tmp_path / "line.txt", tmp_path / "a", model_folder) == 0
    info = describe(tmp_path / "a")
    assert info.rows == info.windows.rows < info.windows.span
    assert main(["ask", str(tmp_path / "a"), "Who?", "--model", str(model_folder), "--max-tokens", "2"]) == 0


def test_the_benchmark_looks_for_needles_each_way(model_folder, tmp_path):
    from benchmarks import bench_windows

    (tmp_path / "text.txt").write_text(read_haystack()[:8000])
    words = ["--tokens", "1500", "--text", str(tmp_path / "text.txt"), "--model", str(model_folder)]
    words += ["--window-tokens", "600", "--overlap", "100", "--read", "2", "--json", str(tmp_path / "w.json")]
    bench_windows.main(["--ways", "one", "windows", "yarn", *words])
    one, windows, yarn = json.loads((tmp_path / "w.json").read_text())["results"]
    assert one["tokens"] == windows["tokens"] == yarn["tokens"] > 1500
    assert (one["windows"], windows["windows"], yarn["windows"]) == (None, 3, None)
    # Where the model's own range is enough, YaRN changes nothing.
    assert yarn["nll"] == pytest.approx(one["nll"], rel=1e-4)
    assert windows["nll"] != one["nll"]
    assert windows["passages_alone"] == pytest.approx(one["passages_alone"], rel=1e-4)
    assert windows["bytes_per_token"] > 2 * 2 * 2 * (8 + 4)  # layers, keys and values, KV heads, int8 and its scale
    assert windows["ms_per_token"] > 0
    assert windows["rows_read"] < windows["tokens"]
    assert windows["all"] is None
