"""dbattn: transformer attention as a database query.

Keys and values go into an :class:`AttentionDB`; a query reads the rows that an approximate nearest-neighbour index
finds for it, and ``audit`` says how far the answer is from the dense one. ``dbattn.hf.wrap`` does this inside a
HuggingFace model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import AttentionDB, Hits
    from .config import RetrievalConfig
    from .dense import dense_attention
    from .metrics import attention_mass, recall_at_k, relative_error
    from .query.audit import AuditReport
    from .query.plan import QueryPlan
    from .store import RowSource, StateSource
    from .text.sample import sample_rows

__version__ = "0.1.0"

__all__ = [
    "AttentionDB",
    "AuditReport",
    "Hits",
    "QueryPlan",
    "RetrievalConfig",
    "RowSource",
    "StateSource",
    "attention_mass",
    "dense_attention",
    "recall_at_k",
    "relative_error",
    "sample_rows",
]

# Imported when first asked for: torch takes seconds to load, and `dbattn --help` needs none of it.
_HOMES = {
    "AttentionDB": "attention",
    "AuditReport": "query.audit",
    "Hits": "attention",
    "QueryPlan": "query.plan",
    "RetrievalConfig": "config",
    "RowSource": "store",
    "StateSource": "store",
    "attention_mass": "metrics",
    "dense_attention": "dense",
    "recall_at_k": "metrics",
    "relative_error": "metrics",
    "sample_rows": "text.sample",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
