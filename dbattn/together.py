"""attend_together: one query to each of several databases that share rows, which are scanned once for all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from index_kernels import dense_decode, merge_states, resolve_backend

from .attention import AttentionDB
from .query.choose import ROWS_PER_PLAN

# Rows that each would scan alone, all together: of fewer bytes, scanning them once is not faster. Where each would
# retrieve it is not either, for up to eight over 4K to 32K rows (``bench_serve --forks``).
LEAST_BYTES = 16 << 20
TOGETHER = "rows that several ask for at once are scanned once for all"


class _Kept(NamedTuple):
    """Whether a database's own plan scans, for calls that are the same in what it is chosen by."""

    about: tuple[Any, ...]
    scans: bool


_kept: "WeakKeyDictionary[AttentionDB, _Kept]" = WeakKeyDictionary()


def attend_together(dbs: Sequence[AttentionDB], query: Tensor, *, scale: float) -> Tensor | None:
    """Exact attention of the newest position of each database: ``query [B, Hq, 1, D]`` to ``[B, Hq, 1, Dv]``.

    The leading rows that all of them share (see ``AttentionDB.fork``) are read once, with the queries side by side as
    one wide query; then each one's own rows; and the two states are merged.

    None, and nothing done, where that is not faster than each one's own plan, or not wanted: rows that each would scan
    are scanned for all, unless they are few; where each would retrieve, it reads less.
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
    return scan_together(dbs, query, rows, scale=scale) if _pays(first, query, rows, scale) else None


def scan_together(dbs: Sequence[AttentionDB], query: Tensor, rows: int, *, scale: float) -> Tensor:
    """``attend_together`` whether it is faster or not, where the first ``rows`` rows are shared by all."""
    first, stores = dbs[0], [db.store for db in dbs]
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
    """Whether a scan of so many rows for all takes less time than as many calls of one's own."""
    if len(query) * rows * db.store.num_kv_heads * db.store.row_bytes < LEAST_BYTES:
        return False
    # Chosen anew, as a plan is, after some rows: every layer asks at every step.
    about = db.config, len(db) // ROWS_PER_PLAN, len(db.index), query.shape[1:], scale, torch.get_num_threads()
    kept = _kept.get(db)
    if kept is None or kept.about != about:
        kept = _kept[db] = _Kept(about, db.plan_of(query[:1], scale=scale).is_dense)
    return kept.scans
