"""Models with layers that keep no row for ever: what these hold is saved, opened, shared and gone back to."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from test_cli import ingest
from test_hf import RETRIEVING, assert_close, generate, prompt, tiny
from test_snapshot import forge, sign
from transformers import DynamicCache

from benchmarks.families import tiny_model
from dbattn import RetrievalConfig
from dbattn.cli import main
from dbattn.hf import Windows, wrap
from dbattn.snapshot import SnapshotError, describe

# Those of benchmarks/families.py that wrap and have layers which are no databases; with a vision tower: one.
FAMILIES = (
    "afmoe", "bamba", "beam", "cohere2", "cohere2_moe", "cwm", "exaone4", "exaone_moe", "falcon_h1", "flint",
    "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "gpt_oss",
    "granite_swa", "granitemoe_swa", "granitemoehybrid", "jamba", "kimi_linear", "kolibri1", "lfm2_moe", "lfm3",
    "llama4_text", "mimo_v2_flash", "modernbert-decoder", "nemotron_h", "olmo3", "olmo_hybrid", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next", "vaultgemma",
)  # fmt: skip
QUESTION = torch.tensor([[5, 6, 7]])


def text(rows=40, batch=1):
    return torch.randint(3, 120, (batch, rows))


def asked(model, cache, question=QUESTION):
    """Logits after a question and after two more tokens, one by one."""
    parts = (question, question[:, :1], question[:, 1:2])
    return torch.stack([model(part, past_key_values=cache).logits[:, -1] for part in parts])


def saved(model, folder, ids, config=None):
    """Read ``ids`` in two chunks, save them, and ask: the logits of never having stopped."""
    with torch.inference_mode(), wrap(model, config) as handle:
        cache = handle.new_cache()
        for chunk in ids.split(25, dim=1):
            model(chunk, past_key_values=cache)
        handle.save(folder, cache, token_ids=ids)
        return asked(model, cache, QUESTION.expand(len(ids), 3))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_on_from_its_context_as_if_it_had_never_stopped(name, tmp_path):
    model = tiny_model(name)
    expected = saved(model, tmp_path / "a", text())
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        first, second = handle.new_cache(), handle.new_cache()
        model(QUESTION, past_key_values=first)
        assert_close(asked(model, second), expected)
        first.crop(-3)
        assert first.get_seq_length() == 40
        assert_close(model(QUESTION, past_key_values=first).logits[:, -1], expected[0])


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_a_padded_batch_goes_on_while_its_full_layers_retrieve(family, tmp_path):
    model, inputs, more = tiny(family), prompt(), torch.randint(2, 126, (2, 4))
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], more], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1),
    }
    with torch.inference_mode():
        with wrap(model, RETRIEVING) as handle:
            cache = handle.new_cache()
            model(**inputs, past_key_values=cache)
            handle.save(tmp_path / "a")
            expected = generate(model, whole, past_key_values=cache)
        with wrap(model, context=tmp_path / "a") as handle:
            got = generate(model, whole, past_key_values=handle.new_cache())
            assert handle.report().layers[1].retrieving > 14
    assert torch.equal(got.sequences, expected.sequences)


def test_copies_of_a_cache_are_their_own_and_one_whose_batch_rows_changed_cannot_go_back(tmp_path):
    model = tiny("gemma3")
    expected = saved(model, tmp_path / "a", text())
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        cache = handle.new_cache()
        twin = copy.deepcopy(cache)
        asked(model, cache)
        assert_close(asked(model, twin), expected)
        twin.crop(-5)
        assert_close(asked(model, twin), expected)
        twin.crop(-5)
        twin.batch_repeat_interleave(2)
        assert_close(asked(model, twin, QUESTION.expand(2, 3)), expected.expand(3, 2, -1))
        with pytest.raises(ValueError, match="not to 40"):
            twin.crop(-5)


@pytest.mark.parametrize(
    ("name", "keeps"),
    [("gemma3_text", r"layer 0 \(DynamicSlidingWindowLayer\) keeps its newest 15 rows alone"),
     ("qwen3_next", r"layer 0 \(LinearAttentionLayer\) keeps one state of all that was read"),
     ("falcon_h1", r"layer 0 \(LinearAttentionAndFullAttentionLayer\) keeps one state of all that was read"),
     ("lfm2_moe", r"layer 0 \(LinearAttentionLayer\) keeps its newest 3 inputs alone")],
)  # fmt: skip
def test_a_crop_to_elsewhere_than_the_context_s_end_is_refused_with_the_reason_and_changes_nothing(
    name, keeps, tmp_path
):
    model = tiny_model(name)
    expected = saved(model, tmp_path / "a", text())
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        cache = handle.new_cache()
        for fewer in (-1, -39):
            with pytest.raises(ValueError, match=rf"{keeps}.* 40 rows can be cropped to 40, .* not to {40 + fewer}"):
                cache.crop(fewer)
        model(text(7), past_key_values=cache)
        with pytest.raises(ValueError, match="not to 46"):
            cache.crop(-1)
        assert {layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")} == {47}
        cache.crop(0)
        cache.crop(-7)
        assert_close(asked(model, cache), expected)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_window_that_is_not_full_is_cropped_like_rows(tmp_path):
    model, ids = tiny("gemma3"), text(12)
    saved(model, tmp_path / "a", ids)
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        cache = handle.new_cache()
        cache.crop(-4)
        fresh = handle.new_cache()
        fresh.crop(-12)
        assert fresh.get_seq_length() == 0
        model(ids[:, :8], past_key_values=fresh)
        assert_close(asked(model, cache), asked(model, fresh))
        # What it began with is gone: there is no way back to it.
        model(text(20), past_key_values=cache)
        with pytest.raises(ValueError, match="not to 12"):
            cache.crop(12 - cache.get_seq_length())


def test_the_past_that_assisted_generation_records_is_not_saved(tmp_path):
    model, ids = tiny_model("lfm3"), text()
    expected = saved(model, tmp_path / "a", ids)
    with torch.inference_mode(), wrap(model) as handle:
        cache = handle.new_cache()
        cache.activate_past_recording()
        for chunk in (ids[:, :2], ids[:, 2:]):
            model(chunk, past_key_values=cache)
        assert cache.layers[0].conv_states[0].shape[-1] == 40
        cache.crop(-3)
        model(ids[:, -3:], past_key_values=cache)
        handle.save(tmp_path / "b", cache)
    assert [state.tensors for state in describe(tmp_path / "b").states] == [
        state.tensors for state in describe(tmp_path / "a").states
    ]
    with torch.inference_mode(), wrap(model, context=tmp_path / "b") as handle:
        assert_close(asked(model, handle.new_cache()), expected)


def test_an_interrupted_call_is_not_saved_and_can_be_gone_back_from(tmp_path):
    model, ids = tiny_model("qwen3_next"), text()
    expected = saved(model, tmp_path / "a", ids)

    def stop(*_):
        raise KeyboardInterrupt

    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        cache = handle.new_cache()
        hook = model.model.layers[5].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(QUESTION, past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="a call on this cache was interrupted"):
            handle.save(tmp_path / "b", cache, token_ids=ids)
        cache.crop(-3)
        assert_close(asked(model, cache), expected)
    with torch.inference_mode(), wrap(model) as handle:
        handle.model(ids, past_key_values=(cache := handle.new_cache()))
        cache.layers[0].has_previous_state[0] = None
        with pytest.raises(ValueError, match=r"the state of layer 0 has has_previous_state\.0=None"):
            handle.save(tmp_path / "b", cache)


def test_other_layers_than_the_model_s_own_are_not_saved(tmp_path):
    model = tiny("gemma2")
    with torch.inference_mode(), wrap(model) as handle:
        cache = DynamicCache()
        model(text(), past_key_values=cache)
        with pytest.raises(ValueError, match=r"layer 0 of the cache is a DynamicLayer, expected .*SlidingWindowLayer"):
            handle.save(tmp_path / "a", cache)
    assert not (tmp_path / "a").exists()


def test_a_model_whose_layers_keep_more_than_rows_reads_no_windows():
    refusal = pytest.raises(ValueError, match=r"layer 0 \(DynamicSlidingWindowLayer\) keeps more than rows: .* windows")
    with wrap(tiny("gemma2")) as handle, refusal:
        handle.read_window(text(), handle.new_cache(), Windows(2, 4, 16))


def test_errors_are_followed_and_the_cache_is_left_as_it_was():
    model, ids = tiny("gemma2"), text()
    with torch.inference_mode(), wrap(model, RETRIEVING) as handle:
        cache, twin = handle.new_cache(), handle.new_cache()
        for each in (cache, twin):
            model(ids, past_key_values=each)
        handle.follow_error(text(2), cache)
        assert handle.report().layers[1].stream_error > 0
        assert torch.equal(model(QUESTION, past_key_values=cache).logits, model(QUESTION, past_key_values=twin).logits)


@pytest.fixture
def context(tmp_path):
    """A model with states, and a folder with a context of it."""
    model = tiny_model("lfm3")
    saved(model, tmp_path / "a", text())
    return model, tmp_path / "a"


def refused(model, folder, match):
    with pytest.raises(SnapshotError, match=match), wrap(model, context=folder) as handle:
        handle.new_cache()


def test_a_missing_damaged_or_forged_file_of_states_is_refused_by_name(context):
    model, folder = context
    (path,) = folder.glob("states-*")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(model, folder, f"{path.name} is damaged")
    path.write_bytes(content[:-1])
    refused(model, folder, path.name)
    path.unlink()
    refused(model, folder, f"{path.name} is missing")
    path.write_bytes(content)
    number = describe(folder).states[0].layer
    name = next(iter(describe(folder).states[0].tensors))
    for change in (
        lambda tensors: tensors.update({f"layer.{number}.{name}": torch.zeros(1, 2, 3)}),
        lambda tensors: tensors.update({f"layer.{number}.{name}": tensors[f"layer.{number}.{name}"].double()}),
        lambda tensors: tensors.update({f"layer.{number}.more": torch.zeros(1)}),
        lambda tensors: tensors.pop(f"layer.{number}.{name}"),
    ):
        folder = shutil.copytree(context[1], folder.with_name(folder.name + "x"))
        refused(model, folder, rf"{forge(folder, 'states', change)} is refused: layer {number} has ")


def numbers(**changes):
    return lambda data: window_of(data)["numbers"].update(changes)


def keys(*described):
    return lambda data: window_of(data)["tensors"].update(keys=list(described))


def window_of(data):
    """What a manifest says of the layer with a window."""
    return next(state for state in data["states"] if "Sliding" in state["kind"])


FORGERIES = {
    "one less": (lambda data: data["states"].pop(), r"the files of states are"),
    "another order": (lambda data: data["states"].reverse(), "each once, in order"),
    "none": (lambda data: data.update(states=[]), "the files of states are"),
    "another class": (lambda data: window_of(data).update(kind="DummyLayer"), "is of a DummyLayer, here it is a Dyn"),
    "fewer rows": (numbers(cumulative_length=39), "is of 39 rows, expected 40"),
    "a flag": (numbers(cumulative_length=True), "cumulative_length=True, which is none"),
    "a text": (numbers(cumulative_length="40"), "expected an integer"),
    "another attribute": (numbers(sliding_window=9), "sliding_window.*, expected .*'keys'"),
    "no attribute": (numbers(**{"a b": 9}), "expected an object of names"),
    "a longer window": (keys("float32", [1, 2, 40, 16]), "expected the newest 15 rows"),
    "a batch": (keys("float32", [2, 2, 15, 16]), r"expected \[1, ...\]"),
    "another type": (keys("int64", [1, 2, 15, 16]), "one of float32"),
    "many dimensions": (keys("float32", [1] * 9), "9 dimensions"),
    "no keys": (lambda data: window_of(data)["tensors"].pop("keys"), "expected .*'keys'"),
}


@pytest.mark.parametrize("forgery", sorted(FORGERIES))
def test_a_forged_state_in_a_signed_manifest_is_refused_saying_what_is_wrong(forgery, context):
    model, folder = context
    change, match = FORGERIES[forgery]
    sign(folder, change)
    refused(model, folder, match)


def test_a_context_without_states_is_opened_as_ever_and_has_no_word_of_them(tmp_path):
    model = tiny()
    saved(model, tmp_path / "a", text())
    assert "states" not in json.loads((tmp_path / "a" / "manifest.json").read_text())
    other = tiny_model("lfm3")
    with pytest.raises(SnapshotError, match="another model"):
        wrap(other, context=tmp_path / "a")


def test_saving_again_replaces_the_states(tmp_path):
    model, ids = tiny("gemma3"), text(50)
    with torch.inference_mode(), wrap(model) as handle:
        cache = handle.new_cache()
        model(ids[:, :40], past_key_values=cache)
        handle.save(tmp_path / "a")
        model(ids[:, 40:], past_key_values=cache)
        handle.save(tmp_path / "a")
        assert handle.save(tmp_path / "a").files_written == 0
        assert [path.name[:26] for path in (tmp_path / "a").glob("states-*")] == ["states-000000000-000000050"]
        expected = asked(model, cache)
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        assert_close(asked(model, handle.new_cache()), expected)


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory, tokenizer):
    """A tiny Gemma 3 of random weights and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tiny-gemma3")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], bos_token_id=1, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).eval().save_pretrained(folder)
    return folder


def test_a_gemma_is_ingested_asked_described_explained_and_compared(gemma_folder, tmp_path, capsys):
    book, out = tmp_path / "book.txt", tmp_path / "book.dbattn"
    words = "The module is imported once. Nothing else is known of it, and nobody asks.\n" * 60
    book.write_text(words[: len(words) // 2])
    assert ingest(book, out, gemma_folder, "--quiet") == 0
    held = describe(out).rows
    book.write_text(words)
    # It ended inside a chunk, and cannot go back to where that began.
    assert held % 512
    assert ingest(book, out, gemma_folder) == 0
    info = describe(out)
    assert f"holds {held} of {info.rows} tokens, going on from there" in capsys.readouterr().err
    assert [state.layer for state in info.states] == [0, 2]

    model = ["--model", str(gemma_folder)]
    figures = tmp_path / "a.json"
    options = [*model, "--max-tokens", "4", "--k", "32", "--dense", "--show-sources", "--json", str(figures)]
    assert main(["ask", str(out), "What is it?", *options]) == 0
    again = json.loads(figures.read_text())["dense"]["answer"]
    assert main(["ask", str(out), "What is it?", *options]) == 0
    assert json.loads(figures.read_text())["dense"]["answer"] == again
    capsys.readouterr()

    assert main(["info", str(out), "--json", str(figures)]) == 0
    facts = json.loads(figures.read_text())
    (path,) = out.glob("states-*")
    assert (facts["states"], facts["bytes_of_states"]) == ("2 DynamicSlidingWindowLayer", path.stat().st_size)
    assert "2 DynamicSlidingWindowLayer" in capsys.readouterr().out

    assert main(["explain", str(out), "What is it?", *model, "--layer", "0"]) == 2
    assert "--layer is 0, expected one of 1" in capsys.readouterr().err
    assert main(["explain", str(out), "What is it?", *model]) == 0
    assert main(["compare", str(out), "What is it?", *model, "--queries", "2"]) == 0


def test_states_are_those_of_the_rows_they_are_saved_with(tmp_path):
    model, ids = tiny_model("granitemoehybrid"), text(60)
    config = RetrievalConfig(index="flat")
    with torch.inference_mode(), wrap(model, config) as handle:
        cache = handle.new_cache()
        for chunk in ids.split(20, dim=1):
            model(chunk, past_key_values=cache)
            if cache.get_seq_length() < 60:
                handle.save(tmp_path / "a", cache)
        expected = asked(model, cache)
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        cache = handle.new_cache()
        model(ids[:, 40:], past_key_values=cache)
        assert_close(asked(model, cache), expected)
