"""Long prompts that a wrapped model reads a chunk at a time: the same answers, or left whole."""

from contextlib import nullcontext

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_hf import prompt, tiny  # noqa: E402 (after the check that there is a transformers)
from transformers import DynamicCache  # noqa: E402

from dbattn import RetrievalConfig  # noqa: E402
from dbattn.hf import wrap  # noqa: E402

LISTS = RetrievalConfig(prefill="lists", target_error=None, audit_rate=0.0)


@pytest.fixture
def calls(monkeypatch):
    """Positions of each call of the attention function, of a model of two layers that reads chunks of 512."""
    from dbattn.attention import AttentionDB

    seen, attend = [], AttentionDB.attend

    def noted(self, query, **options):
        seen.append((query.shape[2], options["until"]))
        return attend(self, query, **options)

    monkeypatch.setattr("dbattn.hf.chunks.CHUNK", 512)
    monkeypatch.setattr("dbattn.query.prompt.END", 300)
    monkeypatch.setattr(AttentionDB, "attend", noted)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss", "gpt2"])
def test_chunks_give_the_hidden_states_and_rows_of_one_call(family, calls, monkeypatch):
    model, inputs = tiny(family, max_position_embeddings=4096), prompt(length=2500, padding=(90, 0))
    seen = inputs["attention_mask"].bool()
    with torch.inference_mode(), wrap(model, LISTS):
        chunked = model(**inputs)
        asked = calls.copy()
        monkeypatch.setattr("dbattn.hf.chunks.CHUNK", 4096)
        calls.clear()
        whole = model(**inputs)
    assert {layer.db.store.capacity for layer in chunked.past_key_values.layers if hasattr(layer, "db")} == {2812}
    assert {n for n, _ in asked} == {512, 2500 - 4 * 512}
    assert {until for _, until in asked} == {2500}
    assert set(calls) == {(2500, None)}
    torch.testing.assert_close(chunked.logits[seen], whole.logits[seen], atol=1e-4, rtol=1e-4)
    for one, other in zip(chunked.past_key_values.layers, whole.past_key_values.layers, strict=True):
        if one.keys.shape[2] == 2500:
            torch.testing.assert_close(one.keys[1], other.keys[1], atol=1e-4, rtol=1e-4)


def test_generate_goes_on_from_chunks_that_begin_at_any_row(calls):
    model = tiny(max_position_embeddings=4096)
    ids = prompt(batch=1, length=3100, padding=())["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        expected = model.generate(ids, **options)
        with wrap(model, RetrievalConfig(prefill="lists", k=10**6, dense_below=0, audit_rate=0.0)) as handle:
            cache = handle.new_cache()
            model(ids[:, :700], past_key_values=cache)
            calls.clear()
            got = model.generate(ids, past_key_values=cache, **options)
            assert [n for n, _ in calls[::2]] == [324, 512, 512, 512, 512, 28, 1, 1, 1, 1]
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_embeddings_and_positions_are_cut_as_tokens_are(calls):
    model = tiny(max_position_embeddings=4096)
    ids = prompt(batch=1, length=2000, padding=())["input_ids"]
    positions = torch.arange(7, 2007)[None]
    with torch.inference_mode(), wrap(model, LISTS):
        expected = model(ids, position_ids=positions).logits
        got = model(inputs_embeds=model.get_input_embeddings()(ids), position_ids=positions).logits
        other = model(ids).logits
    assert {n for n, _ in calls} == {512, 2000 - 3 * 512}
    torch.testing.assert_close(got, expected)
    # Rotary positions count by their distance.
    torch.testing.assert_close(other, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "how",
    ["short", "dense", "dense block", "auto", "flat", "hidden states", "a mask of its own", "no cache", "a watcher"],
)
def test_what_is_of_all_positions_together_or_read_densely_is_left_whole(how, calls):
    model = tiny(max_position_embeddings=4096)
    length = 1024 if how == "short" else 1500
    ids = prompt(batch=1, length=length, padding=())["input_ids"]
    config = {"dense": {}, "auto": {"prefill": "auto"}, "flat": {"index": "flat"}}.get(how, {"prefill": "lists"})
    given = {
        "hidden states": {"output_hidden_states": True},
        "a mask of its own": {"attention_mask": torch.ones(length, length).tril().bool()[None, None]},
        "no cache": {"use_cache": False},
    }.get(how, {})
    with torch.inference_mode():
        expected = model(ids, **given)
        with wrap(model, RetrievalConfig(audit_rate=0.0, **config)) as handle:
            block = {"dense block": handle.dense, "a watcher": lambda: handle.watch(lambda *seen: None)}
            with block.get(how, nullcontext)():
                got = model(ids, **given)
    assert set(calls) <= {(length, None)}
    assert got.logits.shape == expected.logits.shape
    if how == "hidden states":
        assert [each.shape for each in got.hidden_states] == [each.shape for each in expected.hidden_states]


def test_a_call_that_fails_in_a_chunk_leaves_the_chunks_before_it(calls, monkeypatch):
    model = tiny(max_position_embeddings=4096)
    ids = prompt(batch=1, length=2000, padding=())["input_ids"]
    with torch.inference_mode(), wrap(model, LISTS) as handle:
        cache = handle.new_cache()
        begin = model.model.forward

        def interrupted(*args, **kwargs):
            if cache.get_seq_length() == 1024:
                raise KeyboardInterrupt
            return begin(*args, **kwargs)

        monkeypatch.setattr(model.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        monkeypatch.undo()
        assert cache.get_seq_length() == 1024
        rest = model(ids[:, 1024:], past_key_values=cache).logits
        whole = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(rest[:, :400], whole[:, 1024:1424], atol=1e-3, rtol=1e-3)
