"""What a wrapped model's cache holds, read from outside: by position, in any type, pickled, saved, and its context."""

import io
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from test_hf import RETRIEVING, assert_close, generate, prompt, tiny
from transformers import DynamicCache

from dbattn import AttentionDB, RetrievalConfig
from dbattn.hf import wrap
from dbattn.hf.batch import BatchCache

SEALING = {"index": "segmented", "k": 10**6, "window": 8, "n_sink": 2, "dense_below": 0, "audit_rate": 0.0}
LISTS = RetrievalConfig(**SEALING)
FLAT = RetrievalConfig(**{**SEALING, "index": "flat"})


def sealed(model, inputs):
    """A cache whose rows stand in lists, and the one that transformers makes of the same tokens."""
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    assert len(cache.layers[0].db.index) > 128
    return cache


def test_rows_read_from_outside_come_by_position():
    model, inputs = tiny(max_position_embeddings=1024), prompt(length=400, padding=(90, 0))
    with torch.inference_mode():
        plain = model(**inputs).past_key_values
        with wrap(model, LISTS):
            cache = sealed(model, inputs)
            taken = DynamicCache(iter(cache))
            for ours, theirs, copied in zip(cache.layers, plain.layers, taken.layers, strict=True):
                assert not torch.equal(ours.db.store.keys[1], theirs.keys[1])
                for rows in (ours, copied, ours.db):
                    assert_close(rows.keys[1], theirs.keys[1])
                    assert_close(rows.values[1], theirs.values[1])
                    assert_close(rows.keys[0, :, 90:], theirs.keys[0, :, 90:])
            before = cache.layers[0].keys
            kept = before.clone()
            cache.crop(-200)
            model(torch.randint(2, 126, (2, 300)), past_key_values=cache)
            assert torch.equal(before, kept)


def test_packed_rows_come_by_position_too():
    db = AttentionDB(2, 16, value_dim=8, config=RetrievalConfig(**SEALING, storage="int8"))
    keys, values = torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 8)
    db.insert(keys, values)
    assert len(db.index) > 128
    for got, given in ((db.keys, keys), (db.values, values)):
        torch.testing.assert_close(got, given, atol=0.05, rtol=0.05)


def holes(rows):
    """The arguments of a call whose mask hides rows here and there."""
    more = torch.randint(2, 126, (1, 9))
    return {"input_ids": more, "attention_mask": (torch.arange(rows + 9)[None] % 5 > 0).long()}


def test_a_cache_that_outlives_its_wrap_gives_rows_in_order():
    model, inputs = tiny(max_position_embeddings=1024), prompt(batch=1, length=400, padding=())
    more = holes(400)
    with torch.inference_mode():
        expected = model(**more, past_key_values=model(**inputs).past_key_values).logits
        with wrap(model, LISTS):
            cache = sealed(model, inputs)
        assert_close(model(**more, past_key_values=cache).logits, expected)


def test_another_attention_set_while_wrapped_reads_rows_in_order_and_is_reported():
    model, inputs = tiny(max_position_embeddings=1024), prompt(batch=1, length=400, padding=())
    more = holes(400)
    with torch.inference_mode():
        expected = model(**more, past_key_values=model(**inputs).past_key_values).logits
        with wrap(model, LISTS) as handle:
            cache = sealed(model, inputs)
            model.set_attn_implementation("eager")
            assert_close(model(**more, past_key_values=cache).logits, expected)
            reason = "attention was set to 'eager' while the model was wrapped"
            assert all(layer.dense[reason] == 1 for layer in handle.report().layers)
            cache.crop(-9)
            model.set_attn_implementation("dbattn")
            assert_close(model(**more, past_key_values=cache).logits, expected)
            model.set_attn_implementation("eager")
        # What was set meanwhile stays set.
        assert model.config._attn_implementation == "eager"


def test_a_pickled_cache_is_an_ordinary_one_with_the_same_rows():
    model, inputs = tiny(max_position_embeddings=1024), prompt(batch=1, length=400, padding=())
    step = torch.tensor([[5]])
    with torch.inference_mode(), wrap(model, LISTS) as handle:
        cache = sealed(model, inputs)
        twin = pickle.loads(pickle.dumps(cache))
        assert torch.equal(twin.layers[1].keys, cache.layers[1].keys)
        expected = model(step, past_key_values=cache).logits
        assert pickle.loads(pickle.dumps(handle.new_cache())).get_seq_length() == 0
    with torch.inference_mode():
        assert_close(model(step, past_key_values=twin).logits, expected)


def test_a_wrapped_model_is_saved_but_not_pickled(tmp_path):
    model = tiny()
    with wrap(model) as handle:
        for pickled in (model, handle):
            with pytest.raises(TypeError, match=r"cannot be pickled: call unwrap\(\) first"):
                torch.save(pickled, io.BytesIO())
        model.save_pretrained(tmp_path)
    assert "dbattn" not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("config", [{"k": 3}, "book.dbattn", 128])
def test_a_config_of_another_type_is_refused_at_the_door(config):
    with pytest.raises(TypeError, match=r"config is .*, expected a RetrievalConfig"):
        wrap(tiny(), config)
    with pytest.raises(TypeError, match=r"config is .*, expected a RetrievalConfig"):
        AttentionDB(1, 8, config=config)


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float16)])
def test_autocast_is_served_in_the_type_that_transformers_uses(family, dtype):
    model, inputs = tiny(family), prompt()
    with torch.inference_mode():
        with torch.autocast("cpu", dtype):
            expected = model(**inputs).logits
        with wrap(model, RETRIEVING) as handle:
            with torch.autocast("cpu", dtype):
                got = model(**inputs)
                generate(model, inputs)
            assert got.logits.dtype == expected.dtype
            assert_close(got.logits, expected, tolerance=0.05)
            assert all(layer.retrieving == 15 for layer in handle.report().layers)


def test_autocast_entered_or_left_between_two_calls_loses_nothing():
    model, inputs = tiny("gpt2"), prompt(batch=1, padding=())
    step = torch.tensor([[5]])
    with torch.inference_mode(), wrap(model, FLAT):
        inside, outside = (DynamicCache(config=model.config) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs, past_key_values=inside)
        model(**inputs, past_key_values=outside)
        before = inside.layers[0].keys.clone(), outside.layers[0].keys.clone()
        model(step, past_key_values=inside)
        with torch.autocast("cpu", torch.bfloat16):
            model(step, past_key_values=outside)
        for cache, rows in zip((inside, outside), before, strict=True):
            assert cache.layers[0].keys.dtype == torch.float32
            assert torch.equal(cache.layers[0].keys[:, :, :60], rows.float())


def test_a_database_answers_under_autocast_as_without():
    db = AttentionDB(2, 16, config=RetrievalConfig(index="flat", k=24, dense_below=0))
    db.insert(torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16))
    query = torch.randn(1, 4, 1, 16)
    expected, hits, weights = db.attend(query), db.search(query, 5), db.weights(query)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(db.attend(query), expected)
        assert torch.equal(db.search(query, 5).scores, hits.scores)
        assert torch.equal(db.weights(query), weights)


def test_the_last_cache_can_be_saved_after_generate_and_read_on(tmp_path):
    model, inputs = tiny(), prompt(batch=1, padding=())
    with wrap(model) as handle:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        handle.save(tmp_path / "book.dbattn")
    # The last token was sampled, and never read.
    with wrap(model, context=tmp_path / "book.dbattn") as handle:
        assert torch.equal(handle.context, tokens[:, :-1])
        assert handle.new_cache().get_seq_length() == 63
    with pytest.raises(ValueError, match="no cache went through the model since it was wrapped"):
        handle.save(tmp_path / "other.dbattn")


def test_a_call_that_begins_without_the_context_says_so_once(tmp_path):
    model, inputs = tiny(), prompt(batch=1, padding=())
    question = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        with wrap(model) as handle:
            model(**inputs)
            handle.save(tmp_path / "book.dbattn")
        with wrap(model, context=tmp_path / "book.dbattn") as handle:
            whole = torch.cat([handle.context, question], dim=1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                generate(model, {"input_ids": whole}, past_key_values=handle.new_cache())
                # Read anew, as a whole or in chunks: nothing is missing.
                generate(model, {"input_ids": whole}, prefill_chunk_size=17)
            assert "without the context" not in str(handle.report().layers[0].remarks)
            with pytest.warns(UserWarning, match=r"past_key_values=handle.new_cache\(\)"):
                generate(model, {"input_ids": question})
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                generate(model, {"input_ids": question})
            assert all("without the context" in layer.remarks for layer in handle.report().layers)


def test_caches_of_any_length_take_a_step_together_as_each_would_alone(tmp_path):
    model, generator = tiny(max_position_embeddings=1024), torch.Generator().manual_seed(1)
    text = torch.randint(2, 126, (1, 200), generator=generator)
    with torch.inference_mode(), wrap(model, RETRIEVING) as handle:
        cache = handle.new_cache()
        model(text, past_key_values=cache)
        handle.save(tmp_path / "text", cache)
    with torch.inference_mode(), wrap(model, RETRIEVING, context=tmp_path / "text") as handle:
        alone, together = ([handle.new_cache() for _ in range(3)] for _ in range(2))
        for number, caches in enumerate(zip(alone, together, strict=True)):
            more = torch.randint(2, 126, (1, 1 + 40 * number), generator=generator)
            for one in caches:
                model(more, past_key_values=one)
        for tokens in torch.randint(2, 126, (3, 3, 1), generator=generator):
            parts = [model(t[None], past_key_values=c).logits for t, c in zip(tokens, alone, strict=True)]
            handle.restart_report()
            assert_close(model(tokens, past_key_values=BatchCache(together)).logits, torch.cat(parts))
            assert handle.report().summary.retrieving == 3 * len(together[0].layers)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one.layers[0].token_ids, other.layers[0].token_ids)
            assert one.get_seq_length() == other.get_seq_length()
        with pytest.raises(ValueError, match="one token each"):
            model(torch.ones(2, 1, dtype=torch.long), past_key_values=BatchCache(together))
        with pytest.raises(ValueError, match="one token each"):
            model(torch.ones(3, 2, dtype=torch.long), past_key_values=BatchCache(together))


@pytest.mark.parametrize(("rate", "audits"), [(0.05, [0, 1, 1]), (1.0, [1, 2, 3])])
def test_the_first_token_after_a_question_waits_for_no_audit_and_the_next_one_makes_up_for_it(rate, audits):
    model = tiny(max_position_embeddings=1024)
    with torch.inference_mode(), wrap(model, replace(RETRIEVING, audit_rate=rate, max_queries=8)) as handle:
        cache, found = handle.new_cache(), []
        model(torch.randint(2, 126, (1, 200)), past_key_values=cache)
        for tokens in (5, 1, 1):
            model(torch.randint(2, 126, (1, tokens)), past_key_values=cache)
            found.append([len(stats.audits) for stats in handle.stats])
        assert found == [[each] * len(cache.layers) for each in audits]
        assert all(stats.retrieving == 3 for stats in handle.stats)
