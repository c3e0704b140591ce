"""Compare every index with dense attention on one set of keys: recall, attention mass, error, rows and bytes read."""

import argparse

import torch

import dbattn


def main(rows: int, k: int) -> None:
    torch.manual_seed(0)
    # Clustered keys with a common mean, a rough likeness of real ones.
    centres = torch.randn(1, 2, 64, 64)
    keys = centres.repeat_interleave(rows // 64, dim=2) + 0.5 * torch.randn(1, 2, rows // 64 * 64, 64) + 1.0
    values = torch.randn_like(keys)
    query = torch.randn(1, 4, 1, 64) + 1.5 * keys[:, :, rows // 2 : rows // 2 + 1].repeat_interleave(2, dim=1)
    for index in ("segmented", "flat", "ivf", "hnsw"):
        db = dbattn.AttentionDB(2, 64, config=dbattn.RetrievalConfig(index=index, k=k))
        db.insert(keys, values)
        print(f"{index:9} {db.audit(query)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192, help="rows in the store (default 8192)")
    parser.add_argument("--k", type=int, default=128, help="rows retrieved per query (default 128)")
    main(**vars(parser.parse_args()))
