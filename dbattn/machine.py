"""What reading rows costs on this machine: the rates of each engine, measured once and kept for the planner."""

import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial

import torch

from index_kernels import dense_decode, read_bandwidth

from .files import cache_folder, write_json

VERSION = 3
HEADS, GROUP, DIM = 2, 3, 64
# Rows of the stores that are timed, and rows retrieved from them: enough that all lists of segmented are scored.
SMALL, LARGE, FEW, MANY = 2048, 12288, 400, 2000
# Read between timed calls: twice the largest cache of common machines.
FLUSH_BYTES = 64 << 20
# Times this many as long as the built-in rates say are not the machine's: other processes keep it busy.
DISTURBED = 10


@dataclass(frozen=True)
class Rates:
    """An engine's seconds: ``call + item * items + byte * bytes + operation * operations``.

    Attributes:
        call: of one call, whatever it reads.
        item: of one thing scored to choose rows: a summary ("segmented"), a key of 64 numbers ("flat", "ivf"), a place
            of the search queue ("hnsw"); 0 for "dense", which chooses nothing.
        byte: of one byte of rows read.
        operation: of one multiply-add over rows read.
    """

    call: float
    item: float
    byte: float
    operation: float

    def seconds(self, items: float, size: float, operations: float) -> float:
        """The estimate for so many items, bytes and operations."""
        return self.call + self.item * items + self.byte * size + self.operation * operations


_log = logging.getLogger("dbattn")
# Two cores of an AMD EPYC (Zen 5), for when nothing can be measured.
BUILT_IN = {
    "dense": Rates(1.3e-4, 0.0, 2.7e-11, 1.5e-11),
    "segmented": Rates(2.6e-4, 5e-8, 3e-11, 1.5e-11),
    "flat": Rates(6e-4, 1.2e-7, 2.2e-10, 1.2e-11),
    "ivf": Rates(4e-4, 8e-9, 8e-10, 1.2e-11),
    "hnsw": Rates(4e-4, 3e-8, 8e-10, 1.2e-11),
}
# Things scored, bytes and operations of a call over 8K rows.
TYPICAL = {
    "dense": (0, 1 << 23, 1 << 22),
    "segmented": (1024, 1 << 19, 1 << 18),
    "flat": (1 << 14, 1 << 18, 1 << 16),
    "ivf": (1 << 15, 1 << 18, 1 << 16),
    "hnsw": (1 << 14, 1 << 18, 1 << 16),
}


@cache
def rates(engine: str, threads: int) -> Rates:
    """Rates on the CPU of "dense" or an index with so many threads: as kept, or measured now (a second or two).

    Where other processes keep the processor busy, built-in rates of another machine stand in until the next process.
    """
    path = cache_folder() / "machine" / f"{engine}-{threads}.json"
    made_on = {"version": VERSION, "machine": platform.node(), "cpus": os.cpu_count(), "torch": torch.__version__}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = Rates(*(float(kept["rates"][field.name]) for field in fields(Rates)))
        if kept["made on"] == made_on and all(math.isfinite(rate) and rate >= 0 for rate in asdict(found).values()):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or damaged: measured again
    if engine != "dense" and rates("dense", threads) is BUILT_IN["dense"]:
        return BUILT_IN[engine]
    _log.warning("dbattn: measuring how fast this machine reads rows (%s), once: some seconds", engine)
    found = _measure_dense() if engine == "dense" else _measure_index(engine)
    if found.seconds(*TYPICAL[engine]) > DISTURBED * BUILT_IN[engine].seconds(*TYPICAL[engine]):
        return BUILT_IN[engine]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"made on": made_on, "rates": asdict(found)})
    except OSError:
        pass  # nowhere to keep them: the next process measures again
    return found


@torch.no_grad()
def _measure_dense() -> Rates:
    """Two scans that differ in how often they use the rows they read, and the bandwidth of memory."""
    keys, other, byte = _random(HEADS, SMALL), _random(HEADS, SMALL // 2), 1.0 / read_bandwidth()

    def scan(batch: int) -> float:
        # The same rows for each batch row: from memory once, then from the cache. Another group of query heads would
        # do the same, but each takes seconds to compile.
        query = _random(GROUP * HEADS, 1).expand(batch, -1, -1, -1)
        ours, theirs = keys.expand(batch, -1, -1, -1), other.expand(batch, -1, -1, -1)
        return _seconds(partial(dense_decode, query, ours, ours), partial(dense_decode, query, theirs, theirs))

    few, many = scan(1), scan(3)
    operations = GROUP * HEADS * SMALL * 2 * DIM
    operation = max(0.0, many - few) / (2 * operations)
    return Rates(max(0.0, few - operation * operations - byte * 2 * keys.nbytes), 0.0, byte, operation)


@torch.no_grad()
def _measure_index(engine: str) -> Rates:
    """A short and a long store, few and many rows retrieved: three times for three rates; operations cost as always."""
    from .attention import AttentionDB
    from .config import RetrievalConfig
    from .query import Query
    from .usage import index_work, scan_usage

    dense = rates("dense", torch.get_num_threads())
    query = _random(GROUP * HEADS, 1)
    points = []

    def database(rows: int, k: int) -> AttentionDB:
        config = RetrievalConfig(index=engine, k=k, dense_below=0, audit_rate=0.0)
        db = AttentionDB(HEADS, DIM, config=config)
        db.insert(_random(HEADS, rows), _random(HEADS, rows))
        return db

    other = database(SMALL // 2, FEW)
    for rows, k in ((SMALL, FEW), (LARGE, FEW), (LARGE, MANY)):
        db = database(rows, k)
        took = _seconds(partial(db.attend, query), partial(other.attend, query))
        work = Query.checked(query, db.store, db.index, db.config, db.stats, None, None).workload
        items, size, operations = index_work(work, db.config, k)
        exact = scan_usage(work, work.rows - work.indexed + db.config.n_sink, dense).seconds or 0.0
        points.append((took - exact - dense.operation * operations, items, size))
    (short, items_short, size_short), (long, items_long, size_long), (wide, _, size_wide) = points
    byte = max(0.0, (wide - long) / (size_wide - size_long))
    item = max(0.0, (long - short - byte * (size_long - size_short)) / (items_long - items_short))
    return Rates(max(0.0, short - item * items_short - byte * size_short), item, byte, dense.operation)


def _random(heads: int, rows: int) -> torch.Tensor:
    """Numbers of our own: the caller's random state stays as it is."""
    return torch.randn(1, heads, rows, DIM, generator=torch.Generator().manual_seed(rows))


def _seconds(run: Callable[[], object], other: Callable[[], object], calls: int = 25) -> float:
    """Seconds of a call whose rows are in no cache but whose code is, as between the layers of a model: median.

    ``other`` does the same over other rows.
    """
    run()
    flush, times = torch.ones(FLUSH_BYTES // 4), []
    for _ in range(calls):
        flush.sum()
        other()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
