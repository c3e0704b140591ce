"""The rows of a layer: KVStore keeps them, RowSource and StateSource are rows of other origin."""

from .host import check_host_rows
from .mapped import MappedRows, Part, new_buffer
from .noise import exponential_noise
from .pages import Pages, Spread
from .queries import QuerySample
from .rows import KVStore, rows_at
from .source import RowSource, StateSource
from .storage import check_finite, check_queries, check_range, on_device, stored

__all__ = [
    "KVStore",
    "MappedRows",
    "Pages",
    "Part",
    "QuerySample",
    "RowSource",
    "Spread",
    "StateSource",
    "check_finite",
    "check_host_rows",
    "check_queries",
    "check_range",
    "exponential_noise",
    "new_buffer",
    "on_device",
    "rows_at",
    "stored",
]
