"""Kernels of attention as a query: exact top-k, attention over chosen rows, and the merge of partial states."""

from .ops import attend_rows, merge_states, resolve_backend, top_k

__all__ = ["attend_rows", "merge_states", "resolve_backend", "top_k"]
