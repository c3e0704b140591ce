"""Switches: how calls are answered inside the blocks that a thread or task has entered."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..attention import AttentionDB
from ..query.audit import AuditReport

# Called after every call that a database answered: layer number, database, query, scale of the logits, softcap.
Watcher = Callable[[int, AttentionDB, Tensor, float, float | None], None]


@dataclass(frozen=True)
class Switches:
    """How calls are answered inside the blocks that a thread or task has entered, and what becomes of them."""

    retrieve: bool = True
    # Whether indexes are brought up to the rows of each call.
    sync: bool = True
    # Whether tokens may be drafted, where answers are exact.
    drafts: bool = True
    # Whether a draft is made now, for which int8 weights may do.
    drafting: bool = False
    audits: list[AuditReport] | None = None
    watcher: Watcher | None = None
    # What follows a context directly reads the windows that were read before, and chooses none.
    same_windows: bool = False
    # Whether a CUDA graph of the pass is captured, which the host may not wait for.
    capturing: bool = False
    # Rows that there are after the prompt of which a chunk is read now.
    until: int | None = None
