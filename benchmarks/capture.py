"""Capture queries, keys and values of a real model over real prose, for tests and benchmarks.

Keys are stored as they enter the cache (after rotary embedding): ``{layer}.key`` and ``{layer}.value`` are
``[1, Hkv, T, D]``, ``{layer}.query`` holds the last positions, ``[1, Hq, m, D]``; float16.

  python benchmarks/capture.py --tokens 3840 --queries 16 --kv-heads 1 --out tests/data/smollm2_4k.safetensors
"""

import argparse
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dbattn.haystack import read_haystack
from dbattn.hf import load_model

CHUNK = 512


def capture(tokens: int, layers: list[int], queries: int, kv_heads: int | None = None) -> dict[str, torch.Tensor]:
    """Run the model over ``tokens`` tokens of prose and return the rows of ``layers``."""
    model, tokenizer = load_model()
    seen: dict[str, torch.Tensor] = {}

    def record(module, query, key, value, attention_mask, **kwargs):
        if module.layer_idx in layers:
            kept = torch.cat([seen.get(f"{module.layer_idx}.query", query[:, :, :0]), query], dim=2)
            seen[f"{module.layer_idx}.query"] = kept[:, :, -queries:]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("capture", record)
    # Chunks need their mask spelt out: SDPA's own causal order is aligned to the upper left.
    AttentionMaskInterface.register("capture", lambda **kw: sdpa_mask(**{**kw, "allow_is_causal_skip": False}))
    model.set_attn_implementation("capture")
    ids = tokenizer(read_haystack(), return_tensors="pt")["input_ids"][:, :tokens]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in track(ids.split(CHUNK, dim=1), description="reading the text"):
            model(chunk, past_key_values=cache, logits_to_keep=1)
    for layer in layers:
        seen[f"{layer}.key"], seen[f"{layer}.value"] = cache.layers[layer].keys, cache.layers[layer].values
    if kv_heads is not None:
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        seen = {name: x[:, : kv_heads * (group if name.endswith("query") else 1)] for name, x in seen.items()}
    return {name: x.half().contiguous() for name, x in seen.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of prose to read (default 4096)")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 22], help="layers to keep (default 8 22)")
    parser.add_argument("--queries", type=int, default=64, help="last query positions to keep (default 64)")
    parser.add_argument("--kv-heads", type=int, help="keep only the first KV heads and their query heads")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(capture(args.tokens, args.layers, args.queries, args.kv_heads), args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
