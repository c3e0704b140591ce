"""The operator in 20 lines: insert rows, attend through an index, and see how far off it was."""

import torch

import dbattn

torch.manual_seed(0)
keys, values = torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64)  # [batch, KV heads, rows, dim]
query = 1.5 * keys[:, :, 1234:1235].repeat_interleave(4, dim=1)  # [batch, query heads, newest positions, dim]
query += 0.5 * torch.randn_like(query)  # four query heads share a KV head, and look for something like row 1234

db = dbattn.AttentionDB(num_kv_heads=2, head_dim=64, config=dbattn.RetrievalConfig(index="ivf", k=256))
db.insert(keys, values)

out = db.attend(query)
hits = db.search(query, k=3)
print(f"out {list(out.shape)}; the best rows of head 0 are {hits.ids[0, 0, 0].tolist()}")
print(db.explain(query))
print(db.audit(query))

exact = dbattn.dense_attention(query, keys, values)
print(f"relative error against dense: {dbattn.relative_error(out, exact).mean():.4f}")
