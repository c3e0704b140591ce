"""Kernels of attention as a query: exact top-k, attention over chosen rows, dense decode, the merge of states."""

from .lists import Summaries, attend_lists, probe_lists, summary_logits, unread_deviation
from .ops import attend_rows, dense_decode, merge_states, read_bandwidth, resolve_backend, top_k
from .packed import floats, pack_rows

__all__ = [
    "Summaries",
    "attend_lists",
    "attend_rows",
    "dense_decode",
    "floats",
    "merge_states",
    "pack_rows",
    "probe_lists",
    "read_bandwidth",
    "resolve_backend",
    "summary_logits",
    "top_k",
    "unread_deviation",
]
