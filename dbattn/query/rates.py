"""What reading rows costs on this machine: rates of each engine, measured once and kept for the planner; on the CPU."""

import json
import logging
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import cache, partial

import torch

from index_kernels import read_bandwidth

from ..config import RetrievalConfig
from ..files import cache_folder, write_json
from ..store import KVStore
from . import device_rates
from .call import Call, RowIndex
from .execute import run_plan
from .plan import QueryPlan
from .steps import DenseScan
from .timed import NoIndex, TimedIndex, store_of
from .usage import Rates, Work, Workload

VERSION = 4
HEADS, GROUP, DIM = 2, 3, 64
# Rows of the stores that are timed, and rows retrieved from them: enough that all lists of segmented are scored.
SMALL, LARGE, FEW, MANY = 2048, 12288, 400, 2000
# Read between timed calls: twice the largest cache of common machines.
FLUSH_BYTES = 64 << 20
# Times this many as long as the built-in rates say are not the machine's: other processes keep it busy.
DISTURBED = 10
# A scan's on two cores of an AMD EPYC (Zen 5), and its work over 8K rows; see KeyIndex for those of indexes.
SCAN = Rates(1.3e-4, 0.0, 2.7e-11, 1.5e-11)
TYPICAL_SCAN = Work(0, 1 << 23, 1 << 22)

_log = logging.getLogger("dbattn")


@cache
def rates(engine: type[TimedIndex] | None, processor: int | str) -> Rates | None:
    """Rates of an index (None: of a dense scan) on a processor: as kept, or measured now (seconds).

    ``processor``: threads of the CPU, or a GPU's name. Where other processes keep the CPU busy, built-in rates of
    another machine stand in until the next process; a GPU on which measuring fails has none until then.
    """
    name = "dense" if engine is None else engine.name
    path = cache_folder() / "machine" / f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', str(processor))}.json"
    made_on = {"version": VERSION, "machine": platform.node(), "cpus": os.cpu_count(), "torch": torch.__version__}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = Rates(*(float(kept["rates"][field]) for field in Rates._fields))
        if kept["made on"] == made_on and all(math.isfinite(rate) and rate >= 0 for rate in found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or damaged: measured again
    _log.warning("dbattn: measuring how fast this machine reads rows (%s), once: some seconds", name)
    measured = _measured_on_cpu(engine, processor) if isinstance(processor, int) else _measured_on(processor, engine)
    if measured is None:
        return (SCAN if engine is None else engine.built_in) if isinstance(processor, int) else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"made on": made_on, "rates": measured._asdict()})
    except OSError:
        pass  # nowhere to keep them: the next process measures again
    return measured


def gpu_of(store: KVStore) -> str | None:
    """The GPU whose rates are those of a store's rows; None where there are none.

    Rates are of rows of 16 bits on the GPU itself, which torch's flash kernel scans; packed rows are taken to cost as
    much by the byte. While a CUDA graph is captured none are measured: those that are not known yet are not known then.
    """
    of_16_bits = store.row_bytes == 2 * (store.head_dim + store.value_dim)
    if store.host or not (of_16_bits or store.storage == "int8"):
        return None
    name = device_rates.name_of(store.start.device)
    return None if torch.cuda.is_current_stream_capturing() and not rates.cache_info().currsize else name


def _measured_on_cpu(engine: type[TimedIndex] | None, threads: int) -> Rates | None:
    """None where other processes keep the CPU busy."""
    if engine is None:
        found, built_in, typical = _measure_scan(), SCAN, TYPICAL_SCAN
    else:
        scan = rates(None, threads)
        if scan is None or scan is SCAN:
            return None
        found, built_in, typical = _measure_index(engine, scan), engine.built_in, engine.typical
    return None if found.seconds(typical) > DISTURBED * built_in.seconds(typical) else found


def _measured_on(gpu: str, engine: type[TimedIndex] | None) -> Rates | None:
    """None where measuring fails."""
    try:
        found = device_rates.measure_on(gpu, engine)
    except Exception as error:  # whatever it was, calls are answered all the same: densely
        _log.warning("dbattn: it could not be measured: %s", error)
        return None
    return found if all(math.isfinite(rate) and rate >= 0 for rate in found) else None


@torch.no_grad()
def _measure_scan() -> Rates:
    """Scans of rows that lie in the cache, of two lengths; one of rows that do not; and the bandwidth of memory."""
    config, byte = RetrievalConfig(), 1.0 / read_bandwidth()

    def scan(rows: int) -> Callable[[], object]:
        call = _call(_store(rows), NoIndex(), config)
        return partial(run_plan, QueryPlan((DenseScan.of(call.workload, None),), "timed"), call)

    short, long = scan(SMALL // 2), scan(SMALL)
    in_cache = [_seconds(run, None) for run in (short, long)]
    work = Workload(SMALL, 1, 0, 0, heads=GROUP * HEADS, kv_heads=HEADS, dim=DIM, value_dim=DIM)
    operation = max(0.0, in_cache[1] - in_cache[0]) / work.operations(SMALL - SMALL // 2)
    size = HEADS * SMALL * 2 * 4 * DIM
    return Rates(
        max(0.0, _seconds(long, short) - operation * work.operations(SMALL) - byte * size), 0.0, byte, operation
    )


@torch.no_grad()
def _measure_index(engine: type[TimedIndex], scan: Rates) -> Rates:
    """A short and a long store, few and many rows retrieved: three times for three rates; operations cost as always."""
    points = []

    def step(rows: int, k: int) -> tuple[Callable[[], object], Call]:
        config = RetrievalConfig(index=engine.name, k=k, dense_below=0, audit_rate=0.0)
        store, index = _store(rows), engine.of(config)
        index.extend(store, store.start + config.n_sink)
        call = _call(store, index, config)
        return partial(run_plan, QueryPlan(engine.steps(config, call.workload, None, None), "timed"), call), call

    other, _ = step(SMALL, FEW)
    for rows, k in ((SMALL, FEW), (LARGE, FEW), (LARGE, MANY)):
        run, call = step(rows, k)
        work = call.workload
        does = engine.work(call.config, work)
        exact = work.rows - work.indexed + call.config.n_sink
        apart = scan.byte * int(work.units * exact) * work.row_bytes + scan.operation * work.operations(exact)
        points.append((_seconds(run, other) - apart - scan.operation * does.operations, does))
    (short, few_short), (long, few_long), (wide, many_long) = points
    byte = max(0.0, (wide - long) / (many_long.bytes - few_long.bytes))
    more = few_long.items - few_short.items
    item = max(0.0, (long - short - byte * (few_long.bytes - few_short.bytes)) / more)
    return Rates(max(0.0, short - item * few_short.items - byte * few_short.bytes), item, byte, scan.operation)


def _store(rows: int) -> KVStore:
    return store_of(_random(HEADS, rows), _random(HEADS, rows))


def _call(store: KVStore, index: RowIndex, config: RetrievalConfig) -> Call:
    return Call.checked(_random(GROUP * HEADS, 1), store, index, config)


def _random(heads: int, rows: int) -> torch.Tensor:
    """Numbers of our own: the caller's random state stays as it is."""
    return torch.randn(1, heads, rows, DIM, generator=torch.Generator().manual_seed(rows))


def _seconds(run: Callable[[], object], other: Callable[[], object] | None, calls: int = 25) -> float:
    """Seconds of a call, median; with ``other``, of one whose rows are in no cache but whose code is, as between the
    layers of a model: ``other`` does the same over other rows.
    """
    run()
    flush, times = torch.ones(FLUSH_BYTES // 4), []
    for _ in range(calls):
        if other is not None:
            flush.sum()
            other()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
