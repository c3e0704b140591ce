"""Weights in int8: what they are off by, what reads them, and whose rows they write."""

import pytest
import torch
from test_cli import QUESTION
from test_hf import RETRIEVING, prompt, tiny
from test_identity import is_accepted, read_and_save

import dbattn.hf.weights
from dbattn.cli import main
from dbattn.hf import load_model, wrap
from dbattn.hf.weights import Int8Linear, to_int8
from dbattn.snapshot import SnapshotError
from index_kernels import int8_linear, pack_weight, unpack_weight


def in_int8(model):
    to_int8(model)
    return model


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 33), (300, 13), (5, 64), (1200, 100)])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (2, 3), (9,), (0,)])
def test_int8_weights_answer_like_what_they_stand_for(outputs, inputs, shape):
    torch.manual_seed(outputs)
    weight, x = pack_weight(torch.randn(outputs, inputs)), torch.randn(*shape, inputs)
    got = int8_linear(x, weight)
    assert got.shape == (*shape, outputs)
    torch.testing.assert_close(got, x @ unpack_weight(weight, inputs).T, atol=1e-4, rtol=1e-5)


def test_many_weights_are_read_by_all_threads_alike():
    x, weight = torch.randn(2, 640), torch.randn(1001, 640)
    torch.testing.assert_close(int8_linear(x, pack_weight(weight)), x @ weight.T, atol=1.0, rtol=0.05)
    few = torch.cat([int8_linear(x, pack_weight(part)) for part in weight.split(100)], dim=-1)
    torch.testing.assert_close(int8_linear(x, pack_weight(weight)), few)


def test_a_weight_is_off_by_half_a_step_of_its_group_at_most():
    weight = torch.randn(50, 96) * torch.logspace(-6, 6, 50)[:, None]
    weight[3, 7] = 1e9
    error = (unpack_weight(pack_weight(weight), 96) - weight).abs().unflatten(1, (-1, 32))
    largest = weight.abs().unflatten(1, (-1, 32)).amax(dim=2, keepdim=True)
    assert (error <= largest / 253).all()
    assert torch.equal(unpack_weight(pack_weight(torch.zeros(2, 5)), 5), torch.zeros(2, 5))


def test_inputs_keep_their_dtype_and_their_gradients():
    weight, x = pack_weight(torch.randn(10, 40)), torch.randn(3, 40, requires_grad=True)
    assert int8_linear(x.bfloat16(), weight).dtype == torch.bfloat16
    int8_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, unpack_weight(weight, 40).sum(dim=0).expand(3, 40))


@pytest.mark.parametrize(
    ("x", "weight", "match"),
    [
        (torch.zeros(2, 40), torch.zeros(3, 40), r"weight is torch.float32 \[3, 40\], expected int8"),
        (torch.zeros(2, 65), pack_weight(torch.zeros(3, 64)), r"x is \[2, 65\], expected \[..., K\] .* 64"),
        (torch.zeros(2, 32), pack_weight(torch.zeros(3, 64)), r"x is \[2, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(x, weight, match):
    with pytest.raises(ValueError, match=match):
        int8_linear(x, weight)
    with pytest.raises(ValueError, match=r"weight is \[3\], expected \[N, K\]"):
        pack_weight(torch.zeros(3))


def test_load_model_puts_the_linear_layers_in_int8_and_leaves_the_rest(model_folder):
    plain, _ = load_model(model_folder)
    model, _ = load_model(model_folder, weights="int8")
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(layers) == sum(type(module) is torch.nn.Linear for module in plain.modules())
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    for name, layer in layers.items():
        # 32 numbers of four bytes become a byte each and a scale.
        assert layer.packed.nbytes == 36 / 128 * plain.get_submodule(name).weight.nbytes
    ids = torch.randint(2, 900, (1, 40))
    with torch.inference_mode():
        assert 1e-5 < relative(model(ids).logits, plain(ids).logits) < 0.02


def test_other_weights_are_refused_before_anything_is_read(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"weights is 'int4', expected one of float32, int8"):
        load_model(tmp_path / "none", weights="int4")
    monkeypatch.setattr(dbattn.hf.weights, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs numba.*pip install "dbattn\[cpu\]"'):
        load_model(tmp_path / "none", weights="int8")
    with pytest.raises(ValueError, match=r'GPT2LMHeadModel has no torch.nn.Linear in its layers; use "float32"'):
        to_int8(tiny("gpt2"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi"])
def test_a_prompt_and_its_tokens_one_by_one_say_the_same(family):
    model, ids = in_int8(tiny(family)), prompt(batch=1, length=20, padding=())["input_ids"]
    with torch.inference_mode():
        cache, logits = None, []
        for token in ids.split(1, dim=1):
            step = model(token, past_key_values=cache)
            cache = step.past_key_values
            logits.append(step.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_wrapped_model_with_int8_weights_retrieves():
    model, ids = in_int8(tiny()), prompt(batch=1, length=60, padding=())
    with wrap(model, RETRIEVING) as handle:
        model.generate(**ids, max_new_tokens=8, do_sample=False)
        assert all(layer.retrieving == 7 for layer in handle.report().layers)


def test_a_context_belongs_to_the_weights_that_read_it(tmp_path):
    read_and_save(in_int8(tiny()), tmp_path / "int8")
    read_and_save(tiny(), tmp_path / "float32")
    assert is_accepted(in_int8(tiny()), tmp_path / "int8")
    with pytest.raises(SnapshotError, match="saved with weights in float32 and int8, this one has float32"):
        wrap(tiny(), context=tmp_path / "int8")
    with pytest.raises(SnapshotError, match="saved with weights in float32, this one has float32 and int8"):
        wrap(in_int8(tiny()), context=tmp_path / "float32")
    trained = tiny()
    trained.model.layers[1].mlp.up_proj.weight.data[3:] += 1e-1
    with pytest.raises(SnapshotError, match="its weights are others"):
        wrap(in_int8(trained), context=tmp_path / "int8")


def test_a_text_read_with_int8_weights_is_asked_with_them(model_folder, tmp_path, capsys):
    text, out = tmp_path / "book.txt", tmp_path / "book.dbattn"
    text.write_text("The room number is 71304, as the letter said. " * 20)
    model = ["--model", str(model_folder)]
    int8 = ["--weights", "int8"]
    assert main(["ingest", str(text), "--out", str(out), "--quiet", *model, *int8]) == 0
    ask = ["ask", str(out), QUESTION, "--max-tokens", "2", "--quiet", *model]
    assert main([*ask, *int8]) == 0
    capsys.readouterr()
    assert main(ask) == 2
    assert "saved with weights in float32 and int8, this one has float32" in capsys.readouterr().err
    assert main(["info", str(out)]) == 0
    assert "float32 and int8" in capsys.readouterr().out
