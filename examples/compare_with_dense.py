"""Compare every index with dense attention on rows of a real model: recall, attention mass, error, what was read."""

import argparse

import dbattn


def main(k: int) -> None:
    keys, values, queries = dbattn.sample_rows()
    for index in ("segmented", "flat", "ivf", "hnsw"):
        db = dbattn.AttentionDB(1, 64, config=dbattn.RetrievalConfig(index=index, k=k))
        db.insert(keys, values)
        print(f"{index:9} {db.audit(queries[:, :, -1:])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=400, help="rows retrieved per query (default 400)")
    main(**vars(parser.parse_args()))
