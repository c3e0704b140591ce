"""The operator in 30 lines: real rows go in, 16 decode steps read a few percent of them; how far off, how fast."""

import statistics
import time

from torch.nn.functional import scaled_dot_product_attention

import dbattn


def milliseconds(run, *inputs):
    """Median time of 20 calls."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        run(*inputs)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


keys, values, queries = dbattn.sample_rows()  # one KV head of a real model: [batch, heads, rows or positions, dim]
total, steps = keys.shape[2], queries.shape[2]

db = dbattn.AttentionDB(num_kv_heads=1, head_dim=64, config=dbattn.RetrievalConfig(k=400, audit_rate=0.0))
db.insert(keys[:, :, : total - steps], values[:, :, : total - steps])

audits, ours, torchs = [], [], []
for position in range(total - steps, total):
    new = slice(position, position + 1)
    db.insert(keys[:, :, new], values[:, :, new])  # as a model writes a token's row ...
    query = queries[:, :, new.stop - total - 1, None]  # ... and then asks, with three heads
    audits.append(db.audit(query))
    ours.append(milliseconds(db.attend, query))
    # torch in its faster form: the heads that share the rows as query positions.
    stored = keys[:, :, : new.stop], values[:, :, : new.stop]
    torchs.append(milliseconds(scaled_dot_product_attention, query.transpose(1, 2), *stored))

print(db.explain(query))
rows = statistics.fmean(audit.rows_read for audit in audits)
error = statistics.fmean(float(audit.relative_error) for audit in audits)
print(f"{steps} steps over {total:,} rows: {rows:.0f} rows read a query, {rows / total:.1%}")
print(f"relative error against dense: mean {error:.3f}")
print(f"median time of a step: {statistics.median(ours):.2f} ms, torch's attention {statistics.median(torchs):.2f} ms")
