"""Hide facts in a long text and ask for them densely and through each index (what ``dbattn demo`` does for one)."""

import argparse
from pathlib import Path

from dbattn.cli.demo import run_demo, summary


def main(tokens: int, k: int, needles: int, model: Path | None) -> None:
    for index in ("segmented", "flat", "ivf", "hnsw"):
        result = summary(run_demo(tokens=tokens, index=index, k=k, needles=needles, model=model, quiet=True))
        found = sum(needle["retrieval_correct"] for needle in result["needles"])
        recall, error = result["recall"], result["relative_error"]
        print(f"{index}: {found} of {needles} answered, recall {recall:.3f}, relative error {error:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2500, help="length of the text (default 2500)")
    parser.add_argument("--k", type=int, default=128, help="rows retrieved per query and KV head (default 128)")
    parser.add_argument("--needles", type=int, default=2, help="facts to hide (default 2)")
    parser.add_argument("--model", type=Path, help="model folder or .gguf file (default: SmolLM2-135M-Instruct)")
    main(**vars(parser.parse_args()))
