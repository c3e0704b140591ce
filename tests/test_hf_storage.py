"""A wrapped model whose rows are kept in another type than its own."""

import copy

import pytest
import torch
from test_hf import generate, prompt, tiny
from test_storage import LargestMade
from transformers import DynamicCache

from dbattn import RetrievalConfig
from dbattn.hf import wrap
from dbattn.hf.stored_rows import StoredRows
from index_kernels import rotate

OPTIONS = {"k": 24, "window": 8, "n_sink": 2, "dense_below": 0, "audit_rate": 0.0}
# Rows for which other tests compile the kernels of int8, too.
WIDE = {"hidden_size": 48, "head_dim": 64, "num_attention_heads": 6}


@pytest.mark.parametrize(
    ("index", "storage"), [("flat", "int8"), ("flat", "bfloat16"), ("flat", "float16"), ("segmented", "int8")]
)
def test_a_model_generates_from_rows_of_another_type(index, storage):
    model = tiny(max_position_embeddings=1024)
    inputs = prompt(length=700, padding=(90, 0))
    kept = RetrievalConfig(index=index, storage=storage, **{**OPTIONS, "k": 10**6})
    with torch.inference_mode():
        expected = generate(model, inputs, max_new_tokens=4)
        with wrap(model, kept) as handle:
            got = generate(model, inputs, max_new_tokens=4)
            cache = got.past_key_values
            assert cache.layers[0].db.store.rows[0].dtype == getattr(torch, storage)
            for a, b in zip(got.logits, expected.logits, strict=True):
                assert 0 < (a - b).norm() / b.norm() < 0.03
        assert handle.report().layers[0].rows_stored == 703
        with wrap(model, RetrievalConfig(index=index, storage=storage, **OPTIONS)) as handle:
            generate(model, inputs, max_new_tokens=4)
            assert all(layer.retrieving == 3 for layer in handle.report().layers)
            assert ("rows kept as int8, rotated" in handle.report().layers[0].remarks) == (storage == "int8")


def test_a_decode_step_makes_no_floats_of_all_rows(monkeypatch):
    model, inputs = tiny(max_position_embeddings=4096, **WIDE), prompt(batch=1, length=3000, padding=())
    with torch.inference_mode(), wrap(model, RetrievalConfig(index="segmented", storage="int8", **OPTIONS)):
        cache = model(inputs["input_ids"]).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
        monkeypatch.setattr(StoredRows, "plain", lambda rows: pytest.fail("a decode step read all rows as floats"))
        with LargestMade() as made:
            model(torch.tensor([[6]]), past_key_values=cache)
    # A KV head's rows as floats are more than twice that.
    assert made.nbytes < 3000 * 64 * 4 / 2


def test_code_that_reads_the_cache_gets_floats_of_the_models_type():
    model, inputs = tiny(**WIDE), prompt(batch=1, padding=())
    with torch.inference_mode(), wrap(model, RetrievalConfig(index="flat", storage="int8", **OPTIONS)):
        cache = model(**inputs).past_key_values
        layer = cache.layers[0]
        assert layer.keys.shape == (1, 2, 60, 64)
        assert layer.keys.dtype == torch.float32
        for read, kept in ((layer.keys, layer.db.store.keys), (layer.values, layer.db.store.values)):
            assert torch.equal(read[:, :, 3:9] * 2, kept[:, :, 3:9] * 2)
            assert torch.equal(torch.cat([read, read], dim=2), torch.cat([kept, kept], dim=2))
            assert torch.nn.functional.pad(read, (0, 1)).shape == (1, 2, 60, 65)
        copied = copy.deepcopy(cache)
        before = copied.layers[0].keys.clone()
        copied.crop(-10)
        model(torch.tensor([[5]]), past_key_values=cache)
        model(torch.tensor([[6]]), past_key_values=copied)
        assert torch.equal(copied.layers[0].keys[:, :, :50], before[:, :, :50])
        assert (layer.keys.shape[2], copied.layers[0].keys.shape[2]) == (61, 51)


def test_a_mask_that_is_not_causal_is_served_from_floats():
    model, inputs = tiny(**WIDE), prompt(batch=1, padding=())
    mask = torch.ones(1, 61, dtype=torch.int64)
    mask[0, 20:30] = 0
    step = {"input_ids": torch.tensor([[5]]), "attention_mask": mask}
    with torch.inference_mode():
        expected = model(**step, past_key_values=model(**inputs).past_key_values).logits
        with wrap(model, RetrievalConfig(index="flat", storage="int8", **OPTIONS)) as handle:
            got = model(**step, past_key_values=model(**inputs).past_key_values).logits
        assert "the mask is not causal with left padding" in handle.report().layers[0].dense
    assert 0 < (got - expected).norm() / expected.norm() < 0.03


def test_a_cache_moves_between_wraps_of_different_storage():
    model, inputs = tiny(max_position_embeddings=1024, **WIDE), prompt(batch=1, length=700, padding=())
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        with wrap(model, RetrievalConfig(index="segmented", storage="int8", **OPTIONS)):
            model(**inputs, past_key_values=cache)
        kept = cache.layers[0].db
        with wrap(model, RetrievalConfig(index="flat", **OPTIONS)):
            model(torch.tensor([[5]]), past_key_values=cache)
        kept.release()
        rows = cache.layers[0].db.store.rows[0]
        assert rows.dtype == torch.float32
        assert torch.equal(rows[:, :, :700], kept.store.keys[:, :, :700])


def test_what_a_cache_learnt_moves_with_it_between_wraps_of_different_storage():
    model, inputs = tiny(max_position_embeddings=2048, **WIDE), prompt(batch=1, length=1200, padding=())
    metrics = []
    with torch.inference_mode():
        for storages in (("int8", "float32"), ("float32", "int8"), ("float32", "float32")):
            cache = DynamicCache(config=model.config)
            for storage, ids in zip(storages, (inputs["input_ids"], torch.tensor([[5]])), strict=True):
                with wrap(model, RetrievalConfig(index="segmented", storage=storage, **OPTIONS)):
                    model(ids, past_key_values=cache)
            store = cache.layers[0].db.store
            metric = store.sample.metric(1024, store.start, 2)[0]
            metrics.append(rotate(rotate(metric).transpose(2, 3)) if storages[1] == "int8" else metric)
    for each in metrics[:2]:
        assert (each - metrics[2]).norm() < 0.02 * metrics[2].norm()
