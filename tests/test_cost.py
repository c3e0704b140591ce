"""The cost model: its FLOPs are those torch counts on real modules, its bytes those that caches and indexes hold."""

import json

import pytest
import torch
from conftest import database, random_rows

from dbattn import RetrievalConfig
from dbattn.cli import main
from dbattn.config import INDEX_TRAITS
from dbattn.cost import ModelShape, model_cost

INDEXES = sorted(INDEX_TRAITS)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = 16
MIXED = {"head_dim": 20, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "multi-head": ("Llama", {"num_key_value_heads": 4}),
    "grouped-query": ("Llama", {}),
    "multi-query": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "head_dim of its own": ("Qwen3", {"head_dim": 20}),
    "all layers slide": ("Mistral", {"sliding_window": WINDOW}),
    "some layers slide": ("Gemma3", MIXED),
    "no gate": ("Phi", {}),
}
LAYERS = 30
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "head_dim": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def tiny(family):
    transformers = pytest.importorskip("transformers")
    name, changes = FAMILIES[family]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    # Eager attention is two plain products, which the counter sees; SDPA's CPU kernel has no formula there.
    made = config(**{**SIZES, **changes}, pad_token_id=0, attn_implementation="eager")
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


def count(model, ids, cache):
    """FLOPs that torch counts in each layer's projections, MLP and attention, and in the output."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
        model(ids, past_key_values=cache, logits_to_keep=1)
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    name, layers = type(model).__name__, []
    for i, layer in enumerate(model.model.layers):
        own = f"{name}.model.layers.{i}"
        linear = [n for n, part in layer.self_attn.named_modules() if isinstance(part, torch.nn.Linear)]
        projections = sum(by_module[f"{own}.self_attn.{n}"] for n in linear)
        attention = by_module[f"{own}.self_attn"] - projections
        layers.append({"projections": projections, "MLP": by_module[f"{own}.mlp"], "attention": attention})
    return layers, by_module[f"{name}.lm_head"]


def by_layer(cost):
    """The cost's FLOPs in the shape of ``count``."""
    kinds = {}
    for layer in cost.layers:
        flops = {op.name: op.flops for op in layer.operators}
        flops["attention"] = flops.pop("scores") + flops.pop("values")
        kinds[layer.window] = flops
    return [kinds[window] for window in cost.shape.windows], cost.output.flops


def one_layer(kv_heads=2, dim=32, dtype="float32", **changes):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": dim}
    return ModelShape.of({**SIZES, **sizes, **changes}, dtype)


def size_of(cost, *names):
    return sum(op.bytes for op in cost.layers[0].operators if op.name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_prompt_and_step_are_those_that_torch_counts(family):
    from transformers import DynamicCache

    model, length, batch = tiny(family), 40, 3
    cache = DynamicCache(config=model.config)
    counted, output = count(model, torch.randint(1, 128, (batch, length)), cache)
    prompt = model_cost(model.config, length, batch=batch, phase="prefill")
    ours, our_output = by_layer(prompt)
    assert our_output == output
    at = torch.arange(length)
    for layer, found, window in zip(ours, counted, prompt.shape.windows, strict=True):
        assert (layer["projections"], layer["MLP"]) == (found["projections"], found["MLP"])
        # The counter takes every pair of a masked product; the formula those that see each other.
        seen = (at <= at[:, None]) & (at > at[:, None] - (window or length))
        assert layer["attention"] * length**2 == found["attention"] * int(seen.sum())

    counted, output = count(model, torch.randint(1, 128, (batch, 1)), cache)
    assert by_layer(model_cost(model.config, length + 1, batch=batch)) == (counted, output)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_what_parameters_and_a_cache_hold(family):
    from transformers import DynamicCache

    model = tiny(family)
    cache = DynamicCache(config=model.config)
    for length, new in ((10, 10), (40, 30), (41, 1)):
        with torch.no_grad():
            model(torch.randint(1, 128, (2, new)), past_key_values=cache)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert model_cost(model.config, length, batch=2).memory.rows == held
    memory = model_cost(model.config, 41, dtype="float16").memory
    assert memory.weights == sum(p.numel() * 2 for p in model.parameters() if p.ndim > 1)
    assert memory.index == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_its_dict_and_its_file_say_the_same(family, tmp_path):
    config = tiny(family).config
    config.save_pretrained(tmp_path)
    shape = ModelShape.of(config)
    assert (
        shape == ModelShape.of(config.to_dict()) == ModelShape.of(tmp_path) == ModelShape.of(tmp_path / "config.json")
    )
    assert shape == ModelShape.of({"text_config": config.to_dict(), "vision_config": {}})
    if family in ("multi-head", "grouped-query", "multi-query"):
        assert shape.variant == family


def test_smollm2_by_hand():
    cost = model_cost({**SMOLLM2, "dtype": "bfloat16"}, 8192)
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert cost.shape.weights == LAYERS * layer + 49152 * 576
    assert cost.memory.weights == 2 * cost.shape.weights
    assert cost.memory.rows == LAYERS * 8192 * 2 * 192 * 2
    assert cost.flops == 2 * cost.shape.weights + LAYERS * 4 * 576 * 8192
    rows, vectors = cost.memory.rows, cost.bytes - cost.memory.weights - cost.memory.rows
    assert 0 < vectors < 0.01 * rows
    assert cost.crossovers.flops_over_projections == (2 * 576 * 576 + 2 * 576 * 192) // (2 * 576) + 1


def test_fewer_kv_heads_shrink_rows_and_projections_but_not_the_work_over_rows():
    shape = ModelShape.of(SMOLLM2)
    multi_head, grouped, multi_query = (model_cost(shape.with_kv_heads(n), 4096) for n in (9, 3, 1))
    assert [c.shape.variant for c in (multi_head, grouped, multi_query)] == [
        "multi-head", "grouped-query", "multi-query",
    ]  # fmt: skip
    assert multi_head.memory.rows == 3 * grouped.memory.rows == 9 * multi_query.memory.rows
    assert multi_head.totals["scores"].flops == multi_query.totals["scores"].flops
    assert multi_head.totals["projections"].flops > grouped.totals["projections"].flops
    # Shazeer's point: a step over shared rows is bound by their bytes later.
    lengths = [c.crossovers.bytes_over_weights for c in (multi_head, grouped, multi_query)]
    assert lengths == sorted(lengths)
    assert model_cost({**SMOLLM2, "num_key_value_heads": None}, 4096).shape == multi_head.shape


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("batch", [1, 4])
def test_attention_overtakes_the_weights_where_counting_every_length_says(phase, batch):
    shape, size = one_layer(), 4
    found = model_cost(shape, 100, phase=phase, batch=batch).crossovers
    heads, kv, dim, matrices = 4, 2, 32, shape.projections

    def first(what, matrices):
        for tokens in range(1, 3000):
            new, pairs = (tokens, tokens * (tokens + 1) // 2) if phase == "prefill" else (1, tokens)
            if what == "flops":
                attention = 2 * 2 * batch * heads * dim * pairs
                weights = sum(2 * batch * new * i * o for i, o in matrices)
            else:
                attention = 2 * size * batch * (kv * dim * tokens + heads * dim * new)
                weights = size * sum(i * o + batch * new * (i + o) for i, o in matrices)
            if attention > weights:
                return tokens
        return None

    assert found.flops_over_projections == first("flops", matrices)
    assert found.bytes_over_projections == first("bytes", matrices)
    assert found.flops_over_weights == first("flops", matrices + shape.mlp)
    assert found.bytes_over_weights == first("bytes", matrices + shape.mlp)


def test_layers_that_only_slide_stay_below_their_weights():
    cost = model_cost({**SMOLLM2, "model_type": "mistral", "sliding_window": 64}, 10**6, config=RetrievalConfig())
    assert set(vars(cost.crossovers).values()) == {None}
    assert cost.memory.index == 0
    assert model_cost({**SMOLLM2, "model_type": "mistral", "sliding_window": 64}, 64).flops == cost.flops


@pytest.mark.parametrize("index", INDEXES)
def test_the_index_reads_fewer_bytes_from_its_crossover_on(index):
    shape, config = one_layer(), RetrievalConfig(index=index, k=64, dense_below=0)
    length = model_cost(shape, 1, config=config).crossovers.index_bytes
    assert 64 < length < 20000

    def wins(tokens):
        ours, dense = model_cost(shape, tokens, config=config), model_cost(shape, tokens)
        return size_of(ours, "scores", "values", "index", "tail") < size_of(dense, "scores", "values")

    assert not any(wins(tokens) for tokens in (1, length // 4, length // 2, *range(length - 12, length)))
    assert all(wins(tokens) for tokens in (*range(length, length + 12), 2 * length, 9 * length))


@pytest.mark.parametrize("index", INDEXES)
def test_the_index_is_estimated_faster_from_its_crossover_on(index):
    shape, config = one_layer(), RetrievalConfig(index=index, k=64, dense_below=0)
    untimed = model_cost(shape, 5000, config=config)
    assert untimed.seconds is untimed.seconds_dense is untimed.crossovers.index_seconds is None
    length = model_cost(shape, 5000, config=config, threads=1).crossovers.index_seconds
    if index == "flat":
        # At these rates a key costs more to score than a row to read.
        assert length is None
        return
    before, after = (model_cost(shape, tokens, config=config, threads=1) for tokens in (length - 1, length))
    assert after.seconds < after.seconds_dense
    assert before.plan.is_dense or before.seconds >= before.seconds_dense


def test_half_precision_rows_are_never_dearer_than_scoring_every_key_in_float32():
    config = RetrievalConfig(index="flat", k=64)
    assert model_cost(one_layer(dtype="float16"), 4096, config=config).crossovers.index_bytes is None


@pytest.mark.parametrize("rows", [1500, 4096, 16384])
@pytest.mark.parametrize("index", INDEXES)
def test_index_memory_and_bytes_are_those_of_a_real_index(index, rows):
    db, query = database(*random_rows(rows), index=index, k=100), torch.randn(1, 4, 1, 16)
    cost = model_cost(one_layer(dim=16), rows, config=db.config)
    assert cost.memory.index == pytest.approx(db.index.nbytes, rel=0.03)
    plan, report = db.explain(query), db.audit(query)
    vectors = 2 * 4 * 4 * 16
    read = size_of(cost, "scores", "values", "index", "tail") - vectors
    # One estimate in the library: the planner's.
    assert read == pytest.approx(sum(source.estimated.bytes for source in plan.sources), abs=2)
    assert [(s.kind, s.detail) for s in cost.plan.sources] == [(s.kind, s.detail) for s in plan.sources]
    # How far a graph is walked, or how full the probed cells are, depends on the keys.
    low, high = (0.4, 2.5) if index in ("ivf", "hnsw") else (0.9, 1.1)
    assert low < read / report.bytes_read < high
    assert size_of(model_cost(one_layer(dim=16), rows), "scores", "values") - vectors == report.bytes_dense


def test_flops_under_an_index_follow_the_rows_it_reads():
    config = RetrievalConfig(index="segmented", k=100, dense_below=0)
    cost = model_cost(one_layer(), 8192, config=config)
    flops = {op.name: op.flops for op in cost.layers[0].operators}
    exact, found, codes, tail = (source.estimated for source in cost.plan.sources)
    assert flops["scores"] == flops["values"] == int(2 * 4 * 32 * (exact.rows + found.rows))
    assert flops["tail"] == int(2 * 4 * 32 * (codes.lists + tail.lists))
    # Every head scores every summary of its group, and the codes of opened lists.
    scored = found.lists + tail.lists + 14 * found.rows
    assert flops["index"] == pytest.approx(2 * 4 * 32 * scored, rel=0.01)
    assert "tail" not in model_cost(one_layer(), 8192, config=RetrievalConfig(tail="none", dense_below=0)).totals


def test_the_plan_decides_what_is_counted():
    prompt = model_cost(SMOLLM2, 8192, phase="prefill", config=RetrievalConfig())
    assert prompt.plan.is_dense
    assert set(prompt.totals) == {"projections", "MLP", "scores", "values", "output"}
    assert prompt.memory.index > 0
    short = model_cost(SMOLLM2, 1500, config=RetrievalConfig())
    assert short.plan.reason.startswith("fewer rows than 2048")
    assert short.totals == model_cost(SMOLLM2, 1500).totals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing, expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"intermediate_size": 1.5}, "intermediate_size is 1.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of the 4 query heads"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"hidden_size": 50}, "head_dim is missing, and hidden_size=50 is no multiple of 4"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* num_hidden_layers=2"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has linear_attention"),
        ({"layer_types": 2 * ["sliding_attention"]}, "sliding_window is missing"),
        ({"model_type": "gemma2", "sliding_window": 8}, "layer_types is missing"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is 512"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_a_bad_config_is_refused_by_the_name_of_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        model_cost({**SIZES, **changes}, 100)


def test_bad_arguments_are_refused(tmp_path):
    for options, message in (
        ({"tokens": 0}, "tokens is 0"),
        ({"batch": 1.0}, "batch is 1.0"),
        ({"phase": "train"}, "phase is 'train', expected one of decode, prefill"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"model": 7}, "config is a int"),
    ):
        with pytest.raises(ValueError, match=message):
            model_cost(**{"model": SIZES, "tokens": 100, **options})
    with pytest.raises(FileNotFoundError, match="does not exist; expected a model folder"):
        model_cost(tmp_path, 100)
    for text, message in (("{", "is not JSON"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            model_cost(tmp_path, 100)


def test_the_command_prints_what_it_writes(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    out = tmp_path / "cost.json"
    words = ["cost", "--model", str(tmp_path), "--tokens", "8192"]
    assert main([*words, "--index", "segmented", "--k", "128", "--kv-heads", "1", "--json", str(out)]) == 0
    shown, data = capsys.readouterr().out, json.loads(out.read_text())
    assert data["shape"]["kv_heads"] == 1
    assert data["flops"] == sum(op["flops"] for op in data["totals"].values())
    assert data["totals"]["scores"]["bytes"] == LAYERS * data["layers"][0]["operators"][2]["bytes"]
    assert data["seconds"] < data["seconds_dense"]
    for text in ("multi-query", "projections", "MLP", "scores", "values", "index", "tail", "output", "overtakes"):
        assert text in shown
    assert f"{data['flops'] / 1e6:,.2f}" in shown
    assert main([*words, "--index", "dense", "--phase", "prefill", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "a prompt of 8,192 tokens" in shown
    assert "overtakes" not in shown
    for wrong, message in (
        (["--index", "dense", "--k", "9"], "--k is 9, expected none"),
        (["--tokens", "0"], "tokens is 0, expected an integer from 1"),
        (["--kv-heads", "2"], "num_key_value_heads is 2, expected a divisor of the 9 query heads"),
    ):
        assert main([*words, *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_the_benchmark_sets_every_side_beside_its_estimate(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import bench_cost
    from benchmarks._common import QuietGuard
    from benchmarks._model import prefill, twin_of
    from dbattn.hf import wrap

    monkeypatch.setattr(QuietGuard, "wait", lambda self, seconds=0.0: None)
    plain = tiny("grouped-query")
    cache, _ = prefill(plain, torch.randint(1, 128, (1, 64)))
    config = RetrievalConfig(index="flat", k=32, dense_below=0, audit_rate=0.0)
    with wrap(twin_of(plain), config) as handle:
        size = bench_cost.bench_size(plain, handle, cache, 600, bandwidth=1e9, rounds=3)
    assert set(size["sides"]) == {"unwrapped", "dense", "retrieval"}
    for name, side in size["sides"].items():
        expected = model_cost(plain.config, 600, config=config if name == "retrieval" else None)
        assert (side["bytes"], side["flops"]) == (expected.bytes, expected.flops)
        assert side["estimated_ms"] == pytest.approx(expected.bytes / 1e6)
        assert side["ratio"] == pytest.approx(side["ms"] / side["estimated_ms"])
    with pytest.raises(SystemExit):
        bench_cost.main(["--help"])
    assert "  python -m benchmarks.bench_cost" in capsys.readouterr().out
