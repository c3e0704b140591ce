"""attend_together: one query to each of several databases that share rows, which are scanned once for all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from index_kernels import dense_decode, merge_states, resolve_backend

from .attention import AttentionDB
from .query.rates import rates
from .query.usage import Workload

# Of the operations of a scan for one query, those of a query for many more heads take so much of the time.
WIDE = 0.5
TOGETHER = "rows that several ask for at once are scanned once for all"


def attend_together(dbs: Sequence[AttentionDB], query: Tensor, *, scale: float) -> Tensor | None:
    """Exact attention of the newest position of each database: ``query [B, Hq, 1, D]`` to ``[B, Hq, 1, Dv]``.

    The leading rows that all of them share (see ``AttentionDB.fork``) are read once, with the queries side by side as
    one wide query; then each one's own rows; and the two states are merged.

    None, and nothing done, where that is not estimated to be faster than each one's own plan, or not wanted.
    """
    first, stores = dbs[0], [db.store for db in dbs]
    rows = min((stores[0].rows_shared(store) for store in stores[1:]), default=0)
    auto = first.config.dense_below_rows is None
    if not rows or not auto or resolve_backend(query) != "numba" or any(store.has_padding for store in stores):
        return None
    for db in dbs:
        if db.is_reading:
            db.sync()  # the prompt has been read
    rows = min(stores[0].rows_shared(store) for store in stores[1:])
    if not _pays(first, query, rows, scale):
        return None
    asked = first.store.turn(query)
    # Side by side, as positions that all see the same rows.
    out, lse = dense_decode(asked.transpose(0, 2), *stores[0].between(0, rows), scale=scale, causal=False)
    own = [
        dense_decode(one, *store.between(rows, len(store)), scale=scale)
        for one, store in zip(asked.split(1), stores, strict=True)
    ]
    outs = torch.stack([out.transpose(0, 2), torch.cat([one for one, _ in own])])
    found, _ = merge_states(outs, torch.stack([lse.transpose(0, 2), torch.cat([one for _, one in own])]))
    for db in dbs:
        size = (rows // len(dbs) + len(db) - rows) * db.store.num_kv_heads * db.store.row_bytes
        db.stats.rows_stored = len(db)
        db.stats.add_dense(TOGETHER, float(len(db)), size, prompt=False)
    return first.store.turn(found).to(query.dtype)


def _pays(db: AttentionDB, query: Tensor, rows: int, scale: float) -> bool:
    """Whether a scan of so many rows for all is estimated to take less time than as many calls of one's own."""
    scan = rates(None, torch.get_num_threads())
    each = db.plan_of(query[:1], scale=scale)
    if scan is None or each.seconds_estimated is None:
        return False
    batch, heads, _, dim = query.shape
    store = db.store
    work = Workload(rows, batch, 0, 0, 1, heads, store.num_kv_heads, dim, store.value_dim, store.row_bytes)
    size = store.num_kv_heads * rows * store.row_bytes
    own = (len(store) - rows) * (scan.operation * heads * (dim + store.value_dim) + scan.byte * size / rows)
    together = scan.byte * size + WIDE * scan.operation * work.operations(rows) + batch * (scan.call + own)
    return together < batch * each.seconds_estimated
