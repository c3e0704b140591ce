"""Kernels of attention as a query: exact top-k, attention over chosen rows, dense decode, the merge of states.

And one for a model's weights: ``int8_linear``.
"""

from .blocks import BlockAnswer, BlockReading, attend_block, multiplies_halves
from .int8_linear import int8_linear, pack_weight, unpack_weight
from .lists import attend_lists, probe_lists, summary_logits
from .ops import attend_rows, dense_decode, merge_states, read_bandwidth, resolve_backend, top_k
from .packed import floats, pack_rows
from .rotation import pack_rotated, rotate
from .seal import seal_rows, unseal_rows
from .segmented import attend_segmented
from .summaries import (
    LearntMetric,
    ListArrays,
    ListReading,
    ListTable,
    SegmentArrays,
    SegmentedAnswer,
    Summaries,
    SuperListArrays,
)

__all__ = [
    "BlockAnswer",
    "BlockReading",
    "LearntMetric",
    "ListArrays",
    "ListReading",
    "ListTable",
    "SegmentArrays",
    "SegmentedAnswer",
    "Summaries",
    "SuperListArrays",
    "attend_block",
    "attend_lists",
    "attend_rows",
    "attend_segmented",
    "dense_decode",
    "floats",
    "int8_linear",
    "merge_states",
    "multiplies_halves",
    "pack_rotated",
    "pack_rows",
    "pack_weight",
    "probe_lists",
    "read_bandwidth",
    "resolve_backend",
    "rotate",
    "seal_rows",
    "summary_logits",
    "top_k",
    "unpack_weight",
    "unseal_rows",
]
