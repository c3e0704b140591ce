"""Hide facts in a long text and ask for them densely and through each index (what ``dbattn demo`` does for one)."""

import argparse

from dbattn.demo import run_demo, summary


def main(tokens: int, k: int, needles: int) -> None:
    for index in ("flat", "ivf", "hnsw"):
        result = summary(run_demo(tokens=tokens, index=index, k=k, needles=needles, quiet=True))
        found = sum(needle["retrieval_correct"] for needle in result["needles"])
        print(f"{index}: {found} of {needles} answered, recall {result['recall']:.3f}, error {result['relative_error']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="length of the text (default 2000)")
    parser.add_argument("--k", type=int, default=128, help="rows retrieved per query and KV head (default 128)")
    parser.add_argument("--needles", type=int, default=2, help="facts to hide (default 2)")
    main(**vars(parser.parse_args()))
