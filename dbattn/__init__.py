"""dbattn: transformer attention as a database query.

Keys and values go into an :class:`AttentionDB`; a query reads the rows that an approximate nearest-neighbour index
finds for it, and ``audit`` says how far the answer is from the dense one. ``dbattn.hf.wrap`` does this inside a
HuggingFace model.
"""

from .attention import AttentionDB, Hits
from .audit import AuditReport
from .config import RetrievalConfig
from .dense import dense_attention
from .metrics import attention_mass, recall_at_k, relative_error
from .plan import QueryPlan
from .rows import RowSource

__version__ = "0.1.0"

__all__ = [
    "AttentionDB",
    "AuditReport",
    "Hits",
    "QueryPlan",
    "RetrievalConfig",
    "RowSource",
    "attention_mass",
    "dense_attention",
    "recall_at_k",
    "relative_error",
]
