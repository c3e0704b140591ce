"""Whose rows a snapshot holds: whatever changes what a model computes is refused by name, and nothing else is."""

import copy
import hashlib
import json
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from test_hf import prompt, tiny

from dbattn.hf import wrap
from dbattn.hf.fingerprint import difference, fingerprint
from dbattn.snapshot import SnapshotError
from dbattn.snapshot.manifest import _dump

IDS = prompt(batch=1, length=40, padding=())["input_ids"]


def read_and_save(model, folder):
    """Read a text with a model, and save its rows."""
    with torch.inference_mode(), wrap(model) as handle:
        cache = handle.new_cache()
        model(IDS, past_key_values=cache)
        handle.save(folder, cache)


def is_accepted(model, folder):
    wrap(model, context=folder).unwrap()
    return True


def adapted():
    """A llama with two adapters, of which the first is active."""
    model = tiny()
    for name, seed in (("french", 1), ("legal", 2)):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model.add_adapter(lora, adapter_name=name)
    model.set_adapter("french")
    return model.eval()


def tuners(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda model: model.set_adapter("legal"),
            r"adapter 'french' \(scaling 4\) active, this one has adapter 'legal'",
        ),
        (lambda model: model.set_adapter(["french", "legal"]), r"adapter 'french' .*this one has .*'legal'"),
        (lambda model: model.disable_adapters(), r"adapter 'french' .*this one has no adapter"),
        (lambda model: [tuner.scale_layer(0.5) for tuner in tuners(model)], r"this one has .*\(scaling 2\)"),
        (lambda model: tuners(model)[1].scale_layer(0.5), r"this one has .*\(scaling 4\); 'french' \(scaling 2\)"),
        (lambda model: [tuner.merge() for tuner in tuners(model)], r"this one has adapter 'french' \(merged\)"),
        (lambda model: tuners(model)[0].lora_B["french"].weight.data.add_(0.1), "weights"),
    ],
    ids=["another", "two", "disabled", "scaled", "one layer scaled", "merged", "trained"],
)
def test_a_context_is_refused_under_other_adapters_and_taken_again_under_its_own(change, match, tmp_path):
    model = adapted()
    read_and_save(model, tmp_path / "a")
    other = copy.deepcopy(model)
    change(other)
    with pytest.raises(SnapshotError, match=match):
        wrap(other, context=tmp_path / "a")
    assert is_accepted(model, tmp_path / "a")


def test_adapters_that_do_nothing_are_no_part_of_a_model(tmp_path):
    model = adapted()
    alone = adapted()
    alone.delete_adapter("legal")
    assert difference(fingerprint(model.model), fingerprint(alone.model)) is None
    model.disable_adapters()
    read_and_save(tiny(), tmp_path / "plain")
    read_and_save(model, tmp_path / "disabled")
    assert is_accepted(model, tmp_path / "plain")
    assert is_accepted(tiny(), tmp_path / "disabled")


def test_modules_that_an_adapter_brings_along_count_while_it_is_active():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = peft.get_peft_model(tiny(), lora).get_base_model().eval()
    model.model.norm.modules_to_save["default"].weight.data.add_(1.0)
    active = fingerprint(model.model)
    for module in model.modules():
        if hasattr(module, "enable_adapters") and hasattr(module, "adapter_layer_names"):
            module.enable_adapters(False)
    assert difference(active, fingerprint(model.model)) is not None
    assert difference(fingerprint(tiny().model), fingerprint(model.model)) is None


def test_rows_written_under_several_adapters_are_not_saved(tmp_path):
    model = adapted()
    with torch.inference_mode(), wrap(model) as handle:
        cache = handle.new_cache()
        model(IDS[:, :30], past_key_values=cache)
        model.set_adapter("legal")
        with pytest.raises(ValueError, match=r"written with adapter 'french' .* active, the model now has .*'legal'"):
            handle.save(tmp_path / "a", cache)
        model(IDS[:, 30:], past_key_values=cache)
        twin = copy.deepcopy(cache)
        model.set_adapter("french")
        with pytest.raises(ValueError, match=r"written with adapter 'legal' .* active, the model now has .*'french'"):
            handle.save(tmp_path / "a", twin)
        # Without the rows of the other one it is one model's again.
        cache.crop(-10)
        handle.save(tmp_path / "a", cache)
    with wrap(model, context=tmp_path / "a") as handle:
        assert handle.new_cache().get_seq_length() == 30
        model.set_adapter("legal")
        with pytest.raises(ValueError, match=r"context was read with adapter 'french' .*the model now has .*'legal'"):
            handle.new_cache()


def test_rows_of_a_context_keep_their_adapter(tmp_path):
    model = adapted()
    read_and_save(model, tmp_path / "a")
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        cache = handle.new_cache()
        model.set_adapter("legal")
        model(IDS[:, :3], past_key_values=cache)
        with pytest.raises(ValueError, match=r"written with adapter 'french'"):
            handle.save(tmp_path / "b", cache)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1), "other Gemma2Attention.scaling than"),
        (lambda model: [setattr(layer.self_attn, "attn_logit_softcapping", 9.0) for layer in model.model.layers],
         "Gemma2Attention.attn_logit_softcapping=50.0, this one has 9.0"),
        (lambda model: setattr(model.model.layers[0].self_attn, "sliding_window", 8), "Gemma2Attention.sliding_window"),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(0.5), "other Gemma2RotaryEmbedding.inv_freq than"),
        (lambda model: setattr(model.model.rotary_emb, "attention_scaling", 2.0), "attention_scaling=1.0, this one"),
        (lambda model: setattr(model.model.norm, "eps", 0.1), "Gemma2RMSNorm.eps"),
    ],
    ids=["scale of the logits", "softcap", "window", "rope", "rope scaling", "norm"],
)  # fmt: skip
def test_settings_changed_at_runtime_are_another_model(change, match):
    model = tiny("gemma2")
    before = fingerprint(model.model)
    change(model)
    assert model.config.to_dict() == tiny("gemma2").config.to_dict()
    differs = difference(before, fingerprint(model.model))
    assert differs is not None
    assert match in differs


@pytest.mark.parametrize("rope", ["default", "dynamic", "longrope", "yarn"])
def test_a_model_is_the_same_after_reading_and_after_a_round_trip_to_disk(rope, tmp_path):
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 64}
    elif rope == "default":
        del parameters["factor"]
    model = tiny(max_position_embeddings=64, rope_parameters=parameters)
    before = fingerprint(model.model)
    with torch.inference_mode():
        model(prompt(batch=1, length=100, padding=())["input_ids"])
    assert difference(before, fingerprint(model.model)) is None
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(before, fingerprint(loaded.model)) is None
    assert difference(before, fingerprint(transformers.AutoModel.from_pretrained(tmp_path))) is None


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def test_a_quantized_model_has_an_identity_of_its_own(tmp_path):
    read_and_save(quantized(tiny()), tmp_path / "a")
    assert is_accepted(quantized(tiny()), tmp_path / "a")
    trained = tiny()
    trained.model.layers[1].mlp.up_proj.weight.data[3:] += 1e-1
    for other, match in (
        (tiny(), "with weights in float32 and int8, this"),
        (quantized(trained), "weights are others"),
    ):
        with pytest.raises(SnapshotError, match=match):
            wrap(other, context=tmp_path / "a")


class Halves(torch.Tensor):
    """A weight in two parts, as torchao's classes have them: what it is made of are other tensors."""

    @staticmethod
    def __new__(cls, low, high):
        made = torch.Tensor._make_wrapper_subclass(cls, (2 * len(low), *low.shape[1:]), dtype=low.dtype)
        made.low, made.high = low, high
        return made

    def __tensor_flatten__(self):
        return ["low", "high"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].low, args[0].high)
        raise NotImplementedError(f"{func} of a weight in parts")


def test_weights_of_a_tensor_subclass_are_read_by_their_parts():
    def halved(model):
        weight = model.model.layers[1].mlp.up_proj.weight.data
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(Halves(*weight.chunk(2)), requires_grad=False)
        return model

    trained = tiny()
    trained.model.layers[1].mlp.up_proj.weight.data[-1] += 1e-3
    own = fingerprint(halved(tiny()).model)
    assert difference(own, fingerprint(halved(tiny()).model)) is None
    assert difference(own, fingerprint(halved(trained).model)) == "its weights are others"


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_the_model_that_it_is(where, tmp_path):
    def offloaded():
        return accelerate.cpu_offload(tiny()) if where == "cpu" else accelerate.disk_offload(tiny(), tmp_path / "disk")

    model = offloaded()
    assert model.model.norm.weight.is_meta
    assert difference(fingerprint(tiny().model), fingerprint(model.model)) is None
    assert model.model.norm.weight.is_meta
    read_and_save(model, tmp_path / "a")
    answers = []
    for each in (tiny(), offloaded()):
        with torch.inference_mode(), wrap(each, context=tmp_path / "a") as handle:
            ids = torch.cat([handle.context, IDS[:, :5]], dim=1)
            answers.append(each.generate(ids, past_key_values=handle.new_cache(), max_new_tokens=3, do_sample=False))
    assert torch.equal(*answers)


def test_placeholders_without_weights_are_named():
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(ValueError, match=r"weight embed_tokens.weight of this LlamaModel is a placeholder"):
        fingerprint(model.model)


def without_state(folder):
    """Make a snapshot what it was before it kept more than settings and weights."""
    manifest = folder / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["model"]["state"], data["sha256"]
    data["sha256"] = hashlib.sha256(_dump(data).encode()).hexdigest()
    manifest.write_text(_dump(data) + "\n")


def test_snapshots_of_before_are_opened_as_far_as_they_can_be_known(tmp_path):
    read_and_save(tiny(), tmp_path / "a")
    without_state(tmp_path / "a")
    assert is_accepted(tiny(), tmp_path / "a")
    with pytest.raises(SnapshotError, match="before snapshots said which adapter was active"):
        wrap(adapted(), context=tmp_path / "a")
