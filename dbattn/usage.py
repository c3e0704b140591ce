"""What each row source is expected to read: rows, lists, bytes; and seconds, at the rates of ``machine``."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .config import RetrievalConfig
from .index._lists import NUMBERS_BYTES, ROWS_PER_LIST, ROWS_PER_SUPER_LIST, vector_bytes
from .index.segmented import budget
from .machine import Rates


class Workload(NamedTuple):
    """One call to be planned. (A tuple: it is made and looked up at every call.)

    Attributes:
        rows: rows in the store.
        queries: newest positions that ask (m).
        indexed: rows below this are in the index.
        first_index_row: the least row that the index answers for; earlier ones are padding or sinks.
        batch, heads, kv_heads, dim, value_dim: shapes of the query and of the store.
        row_bytes: bytes of one row: a key and a value.
    """

    rows: int
    queries: int
    indexed: int
    first_index_row: int
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dim: int = 64
    value_dim: int = 64
    row_bytes: int = 512

    @property
    def units(self) -> int:
        """KV heads of all batch rows: each has lists, or a FAISS index, of its own."""
        return self.batch * self.kv_heads

    def operations(self, rows: float) -> float:
        """Multiply-adds of all query heads and positions over ``rows`` rows each."""
        return self.batch * self.heads * self.queries * rows * (self.dim + self.value_dim)


@dataclass(frozen=True)
class Usage:
    """What a row source reads, estimated before a plan runs or counted while it does.

    Attributes:
        rows: rows whose key and value are read, per query head and position, mean.
        bytes: bytes read by the whole call, what is scored to choose rows included.
        lists: lists whose rows ("list scan") or summaries ("summary scan") are read, per KV head and position, mean.
        seconds: None where it is not known: not measured, or an engine without rates on this device.
    """

    rows: float
    bytes: int
    lists: float = 0.0
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


def scan_usage(work: Workload, rows: float, rates: Rates | None, *, alone: bool = False) -> Usage:
    """Reading ``rows`` contiguous rows; the query heads of a group share them. ``alone``: in a call of its own."""
    size = int(work.units * rows) * work.row_bytes
    seconds = None
    if rates is not None:
        seconds = rates.byte * size + rates.operation * work.operations(rows) + (rates.call if alone else 0.0)
    return Usage(rows, size, 0.0, seconds)


def index_work(work: Workload, config: RetrievalConfig, k: int | None) -> tuple[float, int, float]:
    """What an index does for a call: things scored to choose rows, bytes of rows read, operations over those rows.

    Things scored are summaries ("segmented"), keys in units of 64 numbers ("flat", "ivf"), or places of the search
    queue ("hnsw"); the heads of a group share summaries and the keys of "flat".
    """
    per_unit, asked = work.units * work.queries, work.batch * work.heads * work.queries
    if config.index_name == "segmented":
        read = min(budget(work.indexed, k)[0], work.indexed)
        return per_unit * _summaries(work, k), int(per_unit * read) * work.row_bytes, work.operations(read)
    rows, options = config.rows_retrieved if k is None else k, config.index_options
    eligible = max(1, work.indexed - work.first_index_row)
    match config.index_name:
        case "flat":
            scored = per_unit * eligible * work.dim / 64
        case "ivf":
            cells = 8 * math.sqrt(eligible)
            scored = asked * (cells + min(1.0, options["nprobe"] / cells) * eligible) * work.dim / 64
        case _:
            scored = asked * max(options["ef_search"], rows) * math.log2(eligible + 1) * work.dim / 64
    return scored, int(asked * rows) * work.row_bytes, work.operations(rows)


def index_usage(work: Workload, config: RetrievalConfig, k: int | None, rates: Rates | None) -> Usage:
    """The list scan or index scan under budget ``k``."""
    items, size, operations = index_work(work, config, k)
    seconds = None if rates is None else rates.seconds(items, size, operations)
    if config.index_name == "segmented":
        read = operations / work.operations(1)
        size += int(items) * (vector_bytes(work.dim) + NUMBERS_BYTES)
        return Usage(read, size, read / ROWS_PER_LIST, seconds)
    rows = config.rows_retrieved if k is None else k
    return Usage(rows, size + int(items) * 4 * 64, 0.0, seconds)


def summary_usage(work: Workload, k: int | None) -> Usage:
    """The summaries of the lists that are not read; their time is part of the list scan's."""
    unread = max(0.0, _summaries(work, k) - budget(work.indexed, k)[0] / ROWS_PER_LIST)
    return Usage(0.0, int(work.units * work.queries * unread) * vector_bytes(work.value_dim), unread)


def _summaries(work: Workload, k: int | None) -> float:
    """Summaries scored per KV head and position: of all lists, or of all super-lists and the lists of opened ones."""
    opened = budget(work.indexed, k)[1]
    if opened >= work.indexed:
        return work.indexed / ROWS_PER_LIST
    return work.indexed / ROWS_PER_SUPER_LIST + opened / ROWS_PER_LIST
