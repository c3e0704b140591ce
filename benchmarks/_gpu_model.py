"""A stage of benchmarks.gpu: tokens a second of a model of random weights, alone and wrapped."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dbattn import RetrievalConfig
from dbattn.hf import wrap
from dbattn.hf.cache import DatabaseLayer

from ._gpu_stores import DIM, HEADS, KV_HEADS

LAYERS, CHUNK = 8, 4096
WARM, TOKENS = 8, 48
GRAPHED = "retrieving by graphs"


def model_speed(rows: int) -> dict[str, Any]:
    """Eight layers of Llama-3-8B after ``rows`` tokens: alone, wrapped, made to retrieve, and that by CUDA graphs.

    All go on from the same cache, greedily: ``same`` is the share of tokens that are those of the model alone, and
    ``logits`` how far those of the first token are from its own, relative L2. Beside them "alone, plainly": torch's
    attention without its fused kernels, which differs by rounding alone.
    """
    config = LlamaConfig(
        vocab_size=32000, hidden_size=HEADS * DIM, intermediate_size=14336, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2 * rows,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: Any = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    cache, ids = DynamicCache(config=config), torch.randint(0, 32000, (1, rows), device="cuda")
    line: dict[str, Any] = {"rows": rows, "layers": LAYERS}
    ways = {
        "alone": None, "alone, plainly": None, "default": RetrievalConfig(audit_rate=0.0),
        "retrieving": RetrievalConfig(dense_below=0, audit_rate=0.0),
        GRAPHED: RetrievalConfig(dense_below=0, audit_rate=0.0),
    }  # fmt: skip
    with torch.inference_mode():
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        said: dict[str, list[int]] = {}
        first: dict[str, torch.Tensor] = {}
        for name, how in ways.items():
            plainly = sdpa_kernel(SDPBackend.MATH) if name == "alone, plainly" else nullcontext()
            wrapped = nullcontext() if how is None else wrap(model, how, graphs=name == GRAPHED)
            with plainly, wrapped as handle:
                line[name], said[name], first[name] = _decoded(model, cache, ids[:, -1:])
                if handle is not None:
                    report = handle.report()
                    line[f"{name} retrieves"] = sum(layer.retrieving for layer in report.layers)
                    line[f"{name} ran"] = report.summary.graphs
            cache.crop(rows - cache.get_seq_length())
            for layer in cache.layers:
                if isinstance(layer, DatabaseLayer) and layer.db is not None:
                    layer.db.release()  # who comes next counts on rows in the order of their positions
            line[f"{name} logits"] = float((first[name] - first["alone"]).norm() / first["alone"].norm())
            line[f"{name} same"] = sum(map(int.__eq__, said[name], said["alone"])) / len(said[name])
    return line


def _decoded(model: Any, cache: Any, newest: torch.Tensor) -> tuple[float, list[int], torch.Tensor]:
    """Tokens a second, the tokens, and the first one's logits ``[V]``, float32."""
    tokens, began, first = [newest], 0.0, newest
    for i in range(WARM + TOKENS):
        if i == WARM:
            torch.cuda.synchronize()
            began = time.perf_counter()
        logits = model(tokens[-1], past_key_values=cache, logits_to_keep=1).logits[:, -1:]
        first = logits[0, 0].float() if i == 0 else first
        tokens.append(logits.argmax(dim=-1))
    torch.cuda.synchronize()
    speed = TOKENS / (time.perf_counter() - began)
    return speed, torch.cat(tokens[1:], dim=1)[0].tolist(), first
