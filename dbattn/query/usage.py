"""What a row source reads: rows, lists, bytes, seconds; and what the planner knows of a call."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Rates(NamedTuple):
    """An engine's seconds: ``call + item * items + byte * bytes + operation * operations``.

    Attributes:
        call: of one call, whatever it reads.
        item: of one thing scored to choose rows; 0 for a scan, which chooses nothing.
        byte: of one byte of rows read.
        operation: of one multiply-add over rows read.
    """

    call: float
    item: float
    byte: float
    operation: float

    def seconds(self, work: "Work") -> float:
        """The estimate for that much work."""
        return self.call + self.item * work.items + self.byte * work.bytes + self.operation * work.operations


class Work(NamedTuple):
    """What a call does, in the units of ``Rates``: things scored, bytes of rows read, multiply-adds over them."""

    items: float
    bytes: float
    operations: float


# Rows whose audits find errors above so many times the target are scanned.
FAR = 2.0
# A budget is raised to at most so many times what sampled queries needed: error falls with rows to about power 1.
MOST_MORE = 4.0


class Needs(NamedTuple):
    """What audits of a store's own queries found.

    Attributes:
        read: rows per KV head to read.
        error: mean relative error expected then.
        target: the error asked for.
        rows: rows that were audited, the first of the store.
        head_weights: what a share of the softmax counts for in each query head ``[Hq]`` where rows are chosen.
        factors: of each query head ``[Hq]``, error over what it is estimated from (``StepAnswer.deviation``).
    """

    read: int
    error: float
    target: float
    rows: int
    head_weights: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def about(self) -> tuple[float, ...]:
        """The expectation in numbers, by which audits of answers know it again."""
        return self.read, self.error, self.target, self.rows

    @property
    def scan(self) -> bool:
        """Whether no budget will do: lists say too little of these rows."""
        return self.error > FAR * self.target

    def at(self, times: float) -> "Needs":
        """What they are where answers are ``times`` as far off as the sampled queries' were."""
        error = self.error * times
        more = min(max(error / self.target, 1.0), MOST_MORE)
        return self._replace(read=round(self.read * more), error=error / more)


class Workload(NamedTuple):
    """One call to be planned. (A tuple: it is made and looked up at every call.)

    Attributes:
        rows: rows in the store.
        queries: newest positions that ask (m).
        indexed: rows below this are in the index.
        first_index_row: the least row that the index answers for; earlier ones are padding or sinks.
        batch, heads, kv_heads, dim, value_dim: shapes of the query and of the store.
        row_bytes: bytes of one row: a key and a value.
        learnt: whether the index learnt from queries.
        needs: the budget that audits of its sample found; None: there are none.
        whole_lists: whether the rows of opened lists are all read, as GPUs do.
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
    learnt: bool = False
    needs: Needs | None = None
    whole_lists: bool = False

    @property
    def units(self) -> int:
        """KV heads of all batch rows: each has lists, or a FAISS index, of its own."""
        return self.batch * self.kv_heads

    @property
    def asked(self) -> int:
        """Query heads and positions of all batch rows: each finds rows of its own."""
        return self.batch * self.heads * self.queries

    @property
    def eligible(self) -> int:
        """Rows that the index answers for, at least 1."""
        return max(1, self.indexed - self.first_index_row)

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
        copies: of ``rows`` in the host's memory, those of which the GPU had a copy, mean.
    """

    rows: float
    bytes: int
    lists: float = 0.0
    seconds: float | None = None
    copies: float = 0.0

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
