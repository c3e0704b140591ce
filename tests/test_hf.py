"""wrap: generate runs unchanged, retrieval really happens, and the model comes back as it was."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from dbattn import AttentionDB, RetrievalConfig
from dbattn.hf import UnsupportedModelError, wrap
from dbattn.hf.function import attention_function
from dbattn.hf.offload import layer_devices

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 127,
}
MIXED = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma2": ("Gemma2", MIXED),
    "gemma3": ("Gemma3", MIXED),
    "phi": ("Phi", {}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt_oss": ("GptOss", {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
EXACT = RetrievalConfig(k=10**6, dense_below=0)
RETRIEVING = RetrievalConfig(index="flat", k=24, window=8, n_sink=2, dense_below=0)


def tiny(family="llama", **changes):
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    sizes = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    options = {**(sizes if family == "gpt2" else SIZES), **options, **changes}
    options = {key: value for key, value in options.items() if value is not None or key == "sliding_window"}
    config_name = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    model_name = "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**options)).eval()


def prompt(batch=2, length=60, padding=(13, 0)):
    ids = torch.randint(2, 126, (batch, length))
    mask = torch.ones_like(ids)
    for b, first in enumerate(padding[:batch]):
        ids[b, :first], mask[b, :first] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **options):
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def assert_close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def assert_same(got, expected, tolerance=1e-5):
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_denses_tokens_when_all_rows_are_read(family):
    model, inputs = tiny(family), prompt()
    expected = generate(model, inputs)
    with wrap(model, EXACT) as handle:
        assert_same(generate(model, inputs), expected)
        layers = handle.report().layers
        served = [layer for layer in layers if not any("left to transformers" in reason for reason in layer.dense)]
    assert len(served) == (1 if FAMILIES[family][1] is MIXED or "layer_types" in FAMILIES[family][1] else 2)
    assert_same(generate(model, inputs), expected, tolerance=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_retrieves(family):
    model, inputs = tiny(family), prompt()
    with wrap(model, RETRIEVING) as handle:
        generate(model, inputs)
        report = handle.report()
    retrieving = [layer for layer in report.layers if layer.retrieving]
    assert retrieving
    for layer in retrieving:
        assert layer.retrieving == 15
        assert 20 < layer.rows_retrieved <= 24
        assert layer.recall == pytest.approx(1.0)
        # The mean of 34 of 75 random rows is off by 1.1 of the mean of all.
        assert 0 < layer.relative_error < 1.5
        assert 0.2 < layer.attention_mass < 1


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"initializer_range": 0.3, "attn_logit_softcapping": 2.0}), ("gpt_oss", {"initializer_range": 0.2})],
)
def test_retrieval_with_softcap_sinks_and_padding_is_close_to_dense(family, changes):
    inputs, model = prompt(length=200, padding=(40, 0)), tiny(family, **changes)
    for name, weights in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(weights, 4.0)  # a third of the softmax weight
    expected = generate(model, inputs, max_new_tokens=2)
    # All rows of the longer sequence but one: the first two, the newest eight, and 190 of 191 others.
    config = RetrievalConfig(index="flat", k=190, window=8, n_sink=2, dense_below=0)
    with wrap(model, config) as handle:
        assert_same(generate(model, inputs, max_new_tokens=2), expected, tolerance=1e-2)
        assert handle.report().layers[1].retrieving > 0


@pytest.mark.parametrize("changed", [False, True])
def test_layers_that_are_given_a_copy_of_the_mask_retrieve_and_any_other_mask_is_honoured(changed):
    """As accelerate gives layers on a second device."""
    model, inputs = tiny(max_position_embeddings=1024), prompt(length=300, padding=(90, 0))

    def copied(layer, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        if changed:
            mask[..., 100] = False
        return args, {**kwargs, "attention_mask": mask}

    hook = model.model.layers[1].register_forward_pre_hook(copied, with_kwargs=True)
    expected = generate(model, inputs, max_new_tokens=4)
    with wrap(model, EXACT) as handle:
        assert_same(generate(model, inputs, max_new_tokens=4), expected)
        first, second = handle.report().layers
    hook.remove()
    told = "the mask is not causal with left padding"
    assert (told in second.dense) == changed
    assert told not in first.dense


def test_rows_of_a_context_are_opened_where_their_layer_is(monkeypatch, tmp_path):
    model = tiny()
    with torch.inference_mode(), wrap(model) as handle:
        model(**prompt(length=300))
        handle.save(tmp_path / "context")
    there, opened, of_snapshot = [torch.device("cpu"), torch.device("cuda:1")], [], AttentionDB.of_snapshot

    def on_cpu(snapshot, number, config, device, group):
        opened.append((number, device))
        return of_snapshot(snapshot, number, config, torch.device("cpu"), group)

    # The module's name is also that of the function that its package exports.
    monkeypatch.setattr(importlib.import_module("dbattn.hf.wrap"), "layer_devices", lambda decoder, layers: there)
    monkeypatch.setattr(AttentionDB, "of_snapshot", on_cpu)
    with wrap(model, context=tmp_path / "context") as handle:
        assert [layer.get_seq_length() for layer in handle.new_cache().layers] == [300, 300]
    assert opened == list(enumerate(there))


def test_a_layer_is_where_its_attention_computes():
    model = tiny()
    assert layer_devices(model.model, 2) == [torch.device("cpu")] * 2
    model.model.layers[1].to("meta").self_attn._hf_hook = SimpleNamespace(offload=True, execution_device="cuda:1")
    assert layer_devices(model.model, 2) == [torch.device("cpu"), torch.device("cuda:1")]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 17},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["sampling", "beams", "beams, two returned", "chunked prefill", "assisted by prompt lookup"],
)
def test_generation_modes_equal_dense_when_all_rows_are_read(options):
    model = tiny()
    inputs = prompt(
        batch=1 if "prompt_lookup_num_tokens" in options else 2,
        padding=() if "prompt_lookup_num_tokens" in options else (13, 0),
    )
    torch.manual_seed(7)
    expected = generate(model, inputs, **options)
    with wrap(model, EXACT):
        torch.manual_seed(7)
        assert torch.equal(generate(model, inputs, **options).sequences, expected.sequences)


def test_assisted_decoding_truncates_the_store():
    model, assistant, inputs = tiny(), tiny(num_hidden_layers=1), prompt(batch=1, padding=())
    expected = generate(model, inputs, assistant_model=assistant)
    with wrap(model, EXACT), wrap(assistant, EXACT):
        assert torch.equal(generate(model, inputs, assistant_model=assistant).sequences, expected.sequences)


def test_beam_search_retrieves():
    model = tiny()
    with wrap(model, RETRIEVING) as handle:
        generate(model, prompt(), num_beams=3)
        assert all(layer.retrieving > 10 and layer.rows_retrieved > 20 for layer in handle.report().layers)


def test_multi_turn_continuation_and_deepcopy_of_a_cache():
    model = tiny()
    first, second = prompt(batch=1, length=50, padding=()), prompt(batch=1, length=9, padding=())["input_ids"]

    def turns():
        cache = DynamicCache(config=model.config)
        out = generate(model, first, past_key_values=cache)
        kept = copy.deepcopy(cache)
        longer = torch.cat([out.sequences, second], dim=1)
        answers = []
        for memory in (cache, kept):
            inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
            answers.append(generate(model, inputs, past_key_values=memory).sequences)
        return answers

    expected = turns()
    with wrap(model, EXACT):
        got = turns()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with wrap(model, RETRIEVING) as handle:
        once, again = turns()
        assert torch.equal(once, again)
        assert handle.report().layers[0].retrieving > 30


def test_a_cache_filled_before_wrapping_is_taken_over_and_survives_unwrapping():
    model, inputs = tiny(), prompt(batch=1, padding=())
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        reference = model(**inputs, past_key_values=copy.deepcopy(cache)).logits[:, -1].argmax(-1, keepdim=True)
        model(input_ids=inputs["input_ids"][:, :-1], past_key_values=cache)
        with wrap(model, RETRIEVING) as handle:
            again = model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache).logits[:, -1]
            assert handle.report().layers[0].rows_stored == 60
            # The first step indexes the rows, the next one retrieves.
            model(input_ids=reference, past_key_values=cache)
            assert handle.report().layers[0].retrieving == 1
        plain = model(input_ids=reference, past_key_values=cache)
    assert torch.equal(again.argmax(-1, keepdim=True), reference)
    assert plain.logits.isfinite().all()
    assert cache.get_seq_length() == 62


@pytest.mark.parametrize("index", ["flat", "segmented"])
def test_a_cache_moves_from_one_wrap_to_the_next_with_its_rows_in_order(index):
    model, inputs = tiny(max_position_embeddings=1024), prompt(length=700, padding=(90, 0))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": mask}
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        plain = model(**inputs).past_key_values
        expected = model(**step, past_key_values=plain).logits
        with wrap(model, RetrievalConfig(index=index, dense_below=0)) as first:
            model(**inputs, past_key_values=cache)
        with wrap(model, EXACT) as second:
            assert_close(model(**step, past_key_values=cache).logits, expected)
        assert second.report().layers[0].rows_stored == 701
        assert first.report().layers[0].rows_stored == 700
    # The second session scans all 701 rows of the store in place, and k-means moved 512 of the first one's.
    layer = cache.layers[0]
    assert layer.db.store.start.tolist() == [90, 0]
    layer.db.release()
    assert_close(layer.keys[1], plain.layers[0].keys[1])


def test_refused_rows_leave_the_cache_as_it_was():
    model, inputs = tiny(), prompt(batch=1, padding=())
    with torch.inference_mode():
        cache = model(**inputs).past_key_values
        rows = cache.layers[1].keys
        rows[0, 0, 3, 0] = float("nan")
        with wrap(model, EXACT), pytest.raises(ValueError, match="keys hold nan"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert cache.get_seq_length() == 60
    assert cache.layers[1].keys is rows


def test_a_mask_shorter_than_the_rows_hides_what_it_does_in_transformers():
    model, inputs = tiny(), prompt(batch=1, padding=())

    def logits():
        out = model(**inputs, use_cache=True)
        short = torch.ones(1, 2, dtype=torch.int64)
        ids = torch.tensor([[5, 6]])
        return model(input_ids=ids, attention_mask=short, past_key_values=out.past_key_values).logits

    with torch.inference_mode():
        expected = logits()
        with wrap(model, EXACT):
            assert_close(logits(), expected)


def test_a_cache_may_come_by_position_and_use_cache_may_be_none():
    model, inputs = tiny(), prompt(batch=1, padding=())
    ids = inputs["input_ids"]
    with torch.inference_mode():
        expected = model.model(ids).last_hidden_state
        with wrap(model, RETRIEVING) as handle:
            given = model.model(ids, None, None, DynamicCache(config=model.config))
            made = model.model(ids, None, None, None, use_cache=None)
            none = model.model(ids, None, None, None, use_cache=False)
            assert none.past_key_values is None
            for out in (given, made):
                assert_close(out.last_hidden_state, expected)
                model(torch.tensor([[5]]), None, None, out.past_key_values)
            assert handle.report().layers[0].retrieving == 2
            with pytest.raises(TypeError, match="multiple values"):
                model.model(ids, None, None, None, past_key_values=None)


def test_batch_edits_of_a_cache_copy_only_what_changes():
    model, inputs = tiny(), prompt(batch=2, padding=(0, 0))
    with torch.inference_mode(), wrap(model, RETRIEVING):
        cache = model(**inputs).past_key_values
        layer = cache.layers[0]
        before, stored = layer.keys, layer.db.store.keys.data_ptr()
        cache.reorder_cache(torch.tensor([0, 1]))
        assert layer.db.store.keys.data_ptr() == stored
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(layer.keys, before.flip(0))
        cache.batch_select_indices(torch.tensor([False, True]))
        assert torch.equal(layer.keys, before[:1])
        cache.batch_repeat_interleave(3)
        assert torch.equal(layer.keys, before[:1].expand(3, -1, -1, -1))


def implementations(config):
    """Every config below one, by path, with its attention implementation."""
    found = {(): config._attn_implementation}
    for key in config.sub_configs:
        if getattr(config, key) is not None:
            found |= {(key, *path): name for path, name in implementations(getattr(config, key)).items()}
    return found


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def llava():
    text, vision = transformers.LlamaConfig(**SIZES), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=126)
    return transformers.LlavaForConditionalGeneration(config)


def paligemma():
    text = transformers.GemmaConfig(**SIZES, head_dim=16)
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=64)
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=64, hidden_size=64)
    return transformers.PaliGemmaForConditionalGeneration(config)


def phi4_multimodal():
    audio = {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 8, "nemo_final_size": 32}
    audio |= {key: VISION[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.Phi4MultimodalConfig(**SIZES, audio_config=audio, vision_config={**VISION, "crop_size": 28})
    return transformers.Phi4MultimodalForCausalLM(config)


def qwen2_5_omni():
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
    thinker = {
        "text_config": {**SIZES, "rope_parameters": rope},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 64,
        },
        "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "output_dim": 64},
        "vision_start_token_id": 120,
    }
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    return transformers.Qwen2_5OmniForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (llava, ("text_config",)),
        (paligemma, ("text_config",)),
        (phi4_multimodal, ()),
        (qwen2_5_omni, ("thinker_config", "text_config")),
    ],
)
def test_composite_models_retrieve_in_their_text_part_only(make, text):
    model, inputs = make().eval(), prompt(batch=1, padding=())
    writer = getattr(model, "thinker", model)
    writer.config.vision_config._attn_implementation = "eager"
    before, expected = implementations(model.config), generate(writer, inputs)
    with wrap(model, RETRIEVING) as handle:
        assert implementations(model.config) == before | {text: "dbattn"}
        generate(writer, inputs)
        # PaliGemma reads its prompt both ways, so that its first step finds nothing indexed yet.
        assert all(layer.retrieving >= 14 for layer in handle.report().layers)
    with wrap(model, EXACT):
        assert_same(generate(writer, inputs), expected)
    assert implementations(model.config) == before


def test_reports_say_why_attention_that_is_not_causal_is_dense():
    model, inputs = paligemma().eval(), prompt(batch=1, padding=())
    with wrap(model, RETRIEVING) as handle:
        model.generate(**inputs, max_new_tokens=3, eos_token_id=None)
        dense = handle.report().layers[0].dense
    assert dense["the model's attention is not causal here"] == 1


def test_a_nan_that_a_query_can_see_stays_one():
    query, key, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    value[0, 0, 1, 0] = float("nan")
    mask = torch.tensor([[True, True, True], [False, False, False]])[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for given in (mask, additive):
        out, _ = attention_function(torch.nn.Module(), query, key, value, given)
        assert out[0, 0, 0].isnan().tolist() == [True, False, False, False]
        assert torch.equal(out[0, 1], torch.zeros(1, 4))


def test_a_copy_of_a_wrapped_model_says_what_it_is():
    model, inputs = tiny(), prompt(batch=1, padding=())
    with wrap(model, EXACT):
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="LlamaForCausalLM is a copy of a wrapped model"):
            twin(**inputs)
        model(**inputs)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is a copy of a wrapped model"):
        twin(**inputs)


def test_a_wrap_that_fails_leaves_nothing_behind(monkeypatch):
    model = tiny()
    before = snapshot(model)

    def refuse(*args, **kwargs):
        raise ValueError("no hooks here")

    monkeypatch.setattr(type(model.model), "register_forward_pre_hook", refuse)
    with pytest.raises(ValueError, match="no hooks here"):
        wrap(model)
    assert snapshot(model) == before


def test_calls_without_generate_retrieve_too():
    model, inputs = tiny(), prompt(batch=1, padding=())
    with wrap(model, RETRIEVING) as handle:
        out = model(**inputs)
        model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
        assert handle.report().layers[1].retrieving == 1


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_longer_contexts_through_every_index(index):
    model = tiny(max_position_embeddings=4096)
    inputs = prompt(batch=2, length=1500, padding=(300, 0))
    config = RetrievalConfig(index=index, k=64, max_queries=4)
    with wrap(model, config) as handle, torch.inference_mode():
        generate(model, inputs)
        layer = handle.report().layers[0]
    assert layer.retrieving == 15
    assert layer.rows_retrieved == 64
    assert layer.recall > 0.7
    assert layer.index["index"] == index


def test_dense_and_audit_switches():
    model, inputs = tiny(), prompt()
    expected = generate(model, inputs)
    with wrap(model, RETRIEVING) as handle:
        with handle.dense():
            assert_same(generate(model, inputs), expected)
        assert not any(layer.retrieving for layer in handle.report().layers)
        with handle.audit() as audits:
            audited = generate(model, inputs).sequences
        assert len(audits) == 2 * 15
        assert torch.equal(generate(model, inputs).sequences, audited)


def snapshot(model):
    config = model.config
    return (
        config._attn_implementation,
        sorted(config.to_dict().items(), key=str),
        len(model.base_model._forward_pre_hooks),
        sorted(AttentionInterface._global_mapping),
        sorted(AttentionMaskInterface._global_mapping),
        sorted(vars(model)),
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_model_comes_back_as_it_was(family):
    model, inputs = tiny(family), prompt()
    before, logits = snapshot(model), model(**inputs).logits
    with wrap(model, RETRIEVING):
        generate(model, inputs)
        assert snapshot(model) != before
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="max_new_tokens"), wrap(model, RETRIEVING):
        generate(model, inputs, max_new_tokens=-1)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, logits)
    handle = wrap(model)
    handle.unwrap()
    handle.unwrap()
    assert snapshot(model) == before


def test_what_cannot_be_served_is_refused_by_name():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    )
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration cannot be wrapped: an encoder-decoder"):
        wrap(t5)
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM cannot be wrapped: it does not use"):
        wrap(falcon)
    with pytest.raises(
        UnsupportedModelError, match="MistralForCausalLM cannot be wrapped: no layer attends to all rows"
    ):
        wrap(tiny("mistral", sliding_window=8))
    with pytest.raises(UnsupportedModelError, match="Linear cannot be wrapped"):
        wrap(torch.nn.Linear(2, 2))
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM cannot be wrapped: it is torch.float64, expected"
    ):
        wrap(tiny().double())
    model = tiny()
    with wrap(model), pytest.raises(RuntimeError, match=r"wrapped already"):
        wrap(model)


def test_training_mode_and_flash_arguments_are_refused():
    model, inputs = tiny(), prompt(batch=1, padding=())
    with wrap(model):
        with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
            model(**inputs, cu_seq_lens_q=torch.tensor([0, 60]), cu_seq_lens_k=torch.tensor([0, 60]))
        model.train()
        with pytest.raises(RuntimeError, match=r"call model.eval"):
            model(**inputs)


def test_a_static_cache_is_left_to_transformers_and_stays_exact():
    model, inputs = tiny(), prompt(batch=1, padding=())
    expected = generate(model, inputs)
    with wrap(model, RETRIEVING) as handle:
        got = generate(model, inputs, cache_implementation="static", disable_compile=True)
        assert not any(layer.retrieving for layer in handle.report().layers)
    assert torch.equal(got.sequences, expected.sequences)


def test_report_is_a_table_and_data():
    model = tiny("gemma2")
    with wrap(model, RETRIEVING) as handle:
        generate(model, prompt())
        report = handle.report()
    text = str(report)
    assert "left to transformers (DynamicSlidingWindowLayer)" in text
    assert "recall@k" in text
    data = report.to_dict()["layers"]
    assert data[0]["retrieving"] == 0
    assert data[0]["recall"] is None
    assert data[1]["dense"] == {"more queries in one call than max_queries=1": 1}


def test_error_is_followed_through_the_residual_stream():
    model, ids = tiny(num_hidden_layers=3), torch.randint(2, 126, (1, 80))
    with torch.inference_mode(), wrap(model, RETRIEVING) as handle:
        cache = handle.new_cache()
        with handle.dense():
            model(ids, past_key_values=cache)
        handle.follow_error(torch.randint(2, 126, (1, 4)), cache)
        assert cache.get_seq_length() == 80
        layers = handle.report().layers
    assert all(layer.stream_error > 0 for layer in layers)
    assert all(layer.audited == 4 for layer in layers)
    # The first layer adds its attention's error to an input that is the same on both sides.
    assert layers[0].stream_error < layers[0].relative_error
    assert not any(module._forward_hooks for module in model.modules())
    with torch.inference_mode(), wrap(model, EXACT) as handle:
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        handle.follow_error(ids[:, :2], cache)
        assert all(layer.stream_error < 1e-5 for layer in handle.report().layers)


def falcon_h1():
    torch.manual_seed(0)
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**SIZES, **mamba, head_dim=16)).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_layers_that_hold_full_and_linear_attention_retrieve(options):
    model, inputs = falcon_h1(), prompt()
    expected = generate(model, inputs, **options)
    with wrap(model, EXACT):
        assert_same(generate(model, inputs, **options), expected)
    with wrap(model, RETRIEVING) as handle:
        generate(model, inputs, **options)
        assert all(layer.retrieving >= 14 and layer.rows_retrieved > 20 for layer in handle.report().layers)
    assert_same(generate(model, inputs, **options), expected, tolerance=0)


def test_a_hybrid_cache_filled_before_wrapping_keeps_its_linear_state_and_is_saved_with_it(tmp_path):
    model, ids = falcon_h1(), prompt(batch=1, padding=())["input_ids"]
    with torch.inference_mode():
        cache = model(ids).past_key_values
        twin = copy.deepcopy(cache)
        step = {"input_ids": torch.tensor([[5]])}
        expected = model(**step, past_key_values=cache).logits
        with wrap(model, EXACT) as handle:
            assert_close(model(**step, past_key_values=twin).logits, expected)
            handle.save(tmp_path / "a", twin, token_ids=torch.cat([ids, step["input_ids"]], dim=1))
            expected = model(**step, past_key_values=twin).logits
        with wrap(model, context=tmp_path / "a") as handle:
            assert_close(model(**step, past_key_values=handle.new_cache()).logits, expected)
        twin.reset()
        assert_close(model(ids, past_key_values=twin).logits, model(ids).logits)


def test_a_peft_model_is_wrapped_with_its_adapters():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, inputs = peft.get_peft_model(tiny(), lora).eval(), prompt()
    expected = generate(model, inputs)
    with wrap(model, EXACT):
        assert_same(generate(model, inputs), expected)
    with wrap(model, RETRIEVING) as handle:
        generate(model, inputs)
        assert all(layer.retrieving == 15 for layer in handle.report().layers)
        ids = torch.randint(2, 126, (1, 20))
        cache = handle.new_cache()
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache)
            handle.follow_error(ids[:, :1], cache)
    assert_same(generate(model, inputs), expected, tolerance=0)


def test_refusals_say_what_layers_do_in_place_of_attending_to_all_rows():
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4))
    with pytest.raises(UnsupportedModelError, match="linear attention, which keeps a state in place of rows"):
        wrap(mamba)
    with pytest.raises(UnsupportedModelError, match="a window or chunk of the newest rows"):
        wrap(tiny("mistral", sliding_window=8))
    indexed = tiny()
    indexed.config.layer_types = ["indexed_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="a learnt indexer of the model's own, which chooses the rows"):
        wrap(indexed)
    with pytest.raises(UnsupportedModelError, match="if it holds one, wrap that"):
        wrap(torch.nn.Sequential(tiny()))
