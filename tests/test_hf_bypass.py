"""Calls that no database answers, gradients, threads and torch.compile: each is right, or says what it is."""

import contextvars
import threading

import pytest
import torch
import transformers
from test_hf import RETRIEVING, SIZES, generate, prompt, tiny

from dbattn import AttentionDB, RetrievalConfig, RowSource, dense_attention
from dbattn.hf import wrap

REFUSED = "dbattn serves inference"


def deepseek():
    torch.manual_seed(0)
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 2, "n_group": 1}
    sizes = {**SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 16, "topk_group": 1}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **latent, **experts)).eval()


def test_keys_made_after_the_cache_are_answered_densely_and_reported():
    model, inputs = deepseek(), prompt()
    expected = generate(model, inputs).sequences
    with wrap(model, RETRIEVING) as handle:
        assert torch.equal(generate(model, inputs).sequences, expected)
        layers = handle.report().layers
    reason = "the model makes its keys after its cache (as multi-head latent attention does)"
    assert [layer.dense for layer in layers] == [{reason: 16}] * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": "static", "disable_compile": True}, "left to transformers (StaticLayer)"),
        ({"use_cache": False}, "no cache (use_cache=False)"),
    ],
)
def test_calls_that_bypass_the_databases_are_counted_with_the_reason(options, reason):
    model, inputs = tiny(), prompt(batch=1, padding=())
    expected = generate(model, inputs).sequences
    with wrap(model, RETRIEVING) as handle:
        assert torch.equal(generate(model, inputs, **options).sequences, expected)
        assert [layer.dense for layer in handle.report().layers] == [{reason: 16}] * 2


def test_layers_left_to_transformers_count_their_calls():
    model = tiny("gemma2")
    with wrap(model, RETRIEVING) as handle:
        generate(model, prompt())
        assert handle.report().layers[0].dense == {"left to transformers (DynamicSlidingWindowLayer)": 16}


@pytest.mark.parametrize("frozen", ["nothing", "all but the keys"])
def test_gradients_through_a_wrapped_model_are_refused_at_backward(frozen):
    model, ids = tiny(), torch.randint(2, 126, (1, 60))
    if frozen != "nothing":
        for name, weight in model.named_parameters():
            weight.requires_grad_("k_proj" in name)
    expected = model(ids).logits
    with wrap(model, RETRIEVING):
        out = model(ids)
        torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
        step = model(torch.tensor([[5]]), past_key_values=out.past_key_values)
        for logits in (out.logits, step.logits):
            with pytest.raises(RuntimeError, match=REFUSED):
                logits.sum().backward()
        # Without a cache nothing is detached, and gradients are those of transformers.
        model.zero_grad()
        model(ids, use_cache=False).logits.square().sum().backward()
        got = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    expected.square().sum().backward()
    torch.testing.assert_close(got, model.model.layers[0].self_attn.k_proj.weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("family", "storage"), [("deepseek", None), ("llama", "int8")])
def test_rows_handed_to_other_attention_refuse_gradients_too(family, storage):
    model, ids = deepseek() if family == "deepseek" else tiny(), torch.randint(2, 126, (1, 9))
    with wrap(model, RetrievalConfig(index="flat", storage=storage)):
        if storage:
            model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match=REFUSED):
            model(ids).logits.sum().backward()


def test_a_databases_answers_refuse_gradients():
    query, keys = torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 1, 200, 16, requires_grad=True)
    db, of_graph = (AttentionDB(1, 16, config=RetrievalConfig(index="flat", k=8, dense_below=0)) for _ in range(2))
    db.insert(keys.detach(), keys.detach())
    of_graph.insert(keys, keys)
    depth = RowSource(keys[:, :, :4], keys[:, :, :4])
    constant = query.detach()
    answers = [
        db.attend(query),
        db.attend(query, return_lse=True)[1],
        db.search(query, 3).scores,
        db.weights(query),
        db.attend(constant, extra=depth),
        of_graph.attend(constant),
        dense_attention(query, keys, keys),
        dense_attention(constant, keys, keys),
    ]
    for answer in answers:
        with pytest.raises(RuntimeError, match=REFUSED):
            answer.sum().backward()
    assert not db.attend(constant).requires_grad
    with torch.no_grad():
        assert not of_graph.attend(query).requires_grad


def test_switches_hold_for_the_thread_that_entered_the_block():
    model, inputs = tiny(), prompt(batch=1, padding=())
    inside, done = threading.Event(), threading.Event()
    seen = []

    def dense(handle):
        with handle.dense(), handle.audit() as audits, handle.watch(lambda *call: seen.append(call)):
            inside.set()
            done.wait(60)
            # Threads started inside may take the block over.
            context = contextvars.copy_context()
            taken_over = threading.Thread(target=context.run, args=(generate, model, inputs))
            taken_over.start()
            taken_over.join()
            assert not audits

    with wrap(model, RETRIEVING) as handle:
        other = threading.Thread(target=dense, args=(handle,))
        other.start()
        inside.wait(60)
        generate(model, inputs)
        assert not seen
        done.set()
        other.join()
        assert [layer.retrieving for layer in handle.report().layers] == [15, 15]
        assert len(seen) == 2 * 16
        with handle.dense():
            with handle.audit() as audits:
                generate(model, inputs)
            assert not audits
        generate(model, inputs)
        assert handle.report().layers[0].retrieving == 30


def test_a_compiled_model_answers_the_same_through_the_index():
    model, inputs = tiny(num_hidden_layers=1), prompt(batch=1, padding=())
    with torch.inference_mode(), wrap(model, RETRIEVING) as handle:
        answers = []
        for call in (model, torch.compile(model, backend="eager")):
            cache = model(**inputs).past_key_values
            answers.append(call(torch.tensor([[5]]), past_key_values=cache).logits)
        torch.compiler.reset()
        assert torch.equal(*answers)
        assert handle.report().layers[0].retrieving == 2
