"""Wrap a transformers model: generate runs unchanged, and the report says what retrieval did in each layer."""

import argparse

import torch

import dbattn
from dbattn.hf import load_model, wrap
from dbattn.text.haystack import read_haystack


def main(tokens: int, k: int, model: str | None) -> None:
    lm, tokenizer = load_model(model)
    inputs = tokenizer(read_haystack()[: 8 * tokens], return_tensors="pt", truncation=True, max_length=tokens)
    with wrap(lm, dbattn.RetrievalConfig(k=k)) as handle, torch.inference_mode():
        output = lm.generate(**inputs, max_new_tokens=16, do_sample=False)
        print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
        print(handle.report())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2500, help="length of the prompt (default 2500)")
    parser.add_argument("--k", type=int, default=128, help="rows retrieved per query and KV head (default 128)")
    parser.add_argument("--model", help="model folder or .gguf file (default: SmolLM2-135M-Instruct)")
    main(**vars(parser.parse_args()))
