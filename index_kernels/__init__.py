"""Kernels of attention as a query: exact top-k, attention over chosen rows, dense decode, the merge of states."""

from .ops import attend_rows, dense_decode, merge_states, resolve_backend, top_k

__all__ = ["attend_rows", "dense_decode", "merge_states", "resolve_backend", "top_k"]
