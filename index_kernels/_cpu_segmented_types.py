"""What the phases of attend_segmented hand each other. Numba takes NamedTuples apart where it compiles.

States [3 * parts, B, Hq] hold sinks and hot rows, then lists, then the tail, each cut into one part per thread.
"""

from typing import Any, NamedTuple

# What the columns of stats [B, 8] count; three of cycles, one for each source.
ROWS_READ, LISTS_READ, LISTS_SCORED, SUPERS_SCORED, CYCLES, VALUES_READ = 0, 1, 2, 3, 4, 7


class Rows(NamedTuple):
    """Flat memory of ``[B, Hkv, T, D]`` rows, with the steps of batch row, KV head and row in elements."""

    memory: Any
    batch: Any
    head: Any
    row: Any


class Reading(NamedTuple):
    """What a call reads: rows ``sealed .. length`` are hot; budgets are of rows, for all KV heads of a batch row."""

    n_sink: Any
    sealed: Any
    length: Any
    opened: Any
    read: Any
    softcap: Any
    alpha: Any
    beta: Any
    tail: Any
    parts: Any


class Asked(NamedTuple):
    """The query, scaled ``[B, Hkv, G, D]``, the spread ``[B, Hq]`` of its logits, whether super-lists are opened."""

    query: Any
    spread: Any
    start: Any
    two_level: Any


class Scratch(NamedTuple):
    """Arrays a call works in: super-lists ``[B, Hkv, ..]``, lists under opened ones ("candidates"), cycles spent."""

    super_logit: Any
    super_rank: Any
    super_taken: Any
    super_chosen: Any
    super_count: Any
    super_offset: Any
    id: Any
    size: Any
    variance: Any
    logit: Any
    rank: Any
    taken: Any
    chosen: Any
    count: Any
    total: Any
    spent: Any


class States(NamedTuple):
    """Running states: top and total ``[n, B, Hq]``, acc ``[n, B, Hq, Dv]``."""

    top: Any
    total: Any
    acc: Any


class Masses(NamedTuple):
    """Weights relative to exp(peak), ``[B, Hq]`` each: of sinks and hot rows, of super-lists not opened, of all."""

    peak: Any
    hot: Any
    supers: Any
    whole: Any
