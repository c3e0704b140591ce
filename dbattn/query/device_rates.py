"""What reading rows costs on a GPU: the rates of a dense scan and of an index, measured with real steps.

A step outside a CUDA graph takes the longer of two times: the host's, to launch it, and the device's. A scan is taken
for the device's alone, an index for the sum of both, so that one is never chosen which is slower than the scan.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..config import RetrievalConfig
from ..store import KVStore
from .call import Call, RowIndex
from .execute import run_plan
from .plan import QueryPlan, Step
from .steps import DenseScan
from .timed import NoIndex, TimedIndex, store_of
from .usage import Rates

HEADS, GROUP, DIM, DTYPE = 8, 4, 128, torch.bfloat16
# Rows of the stores that are timed, two of which no second-level cache holds, and rows retrieved from them.
SMALL, LARGE, MANY = 16384, 65536, 2000
CALLS = 20


@cache
def name_of(device: torch.device) -> str:
    """The GPU's name, by which its rates are kept."""
    return torch.cuda.get_device_name(device)


@torch.no_grad()
def measure_on(name: str, engine: type[TimedIndex] | None) -> Rates:
    """Rates of an index (None: of a dense scan) on the first GPU of this name.

    Raises:
        Exception: whatever went wrong, from too little memory to a stream that may not be captured.
    """
    device = next(i for i in range(torch.cuda.device_count()) if name_of(torch.device("cuda", i)) == name)
    with torch.cuda.device(device), torch.random.fork_rng(devices=[device]):
        torch.manual_seed(0)
        return _measure_scan() if engine is None else _measure_index(engine)


def _measure_scan() -> Rates:
    """Two lengths; a call is what the device takes beside its bytes."""
    points = []
    for rows in (SMALL, LARGE):
        calls = [_call(_store(rows), NoIndex(), RetrievalConfig()) for _ in range(2)]
        runs = [_run((DenseScan.of(call.workload, None),), call) for call in calls]
        points.append((device_seconds(runs), HEADS * rows * calls[0].store.row_bytes))
    (short, few), (long, many) = points
    byte = max(0.0, (long - short) / (many - few))
    return Rates(max(0.0, short - byte * few), 0.0, byte, 0.0)


def _measure_index(engine: type[TimedIndex]) -> Rates:
    """A short and a long store, few and many rows retrieved: three times of the device, and one of the host."""
    points, host = [], 0.0
    for rows, k in ((SMALL, None), (LARGE, None), (LARGE, MANY)):
        config = RetrievalConfig(index=engine.name, k=k, dense_below=0, audit_rate=0.0)
        calls = []
        for _ in range(2):
            store, index = _store(rows), engine.of(config)
            index.extend(store, store.start + config.n_sink)
            calls.append(_call(store, index, config))
        work = calls[0].workload
        runs = [_run(engine.steps(config, work, None, None), call) for call in calls]
        host = host or seconds(runs)
        points.append((device_seconds(runs), engine.work(config, work)))
    (short, few), (long, more), (wide, most) = points
    byte = max(0.0, (wide - long) / (most.bytes - more.bytes))
    item = max(0.0, (long - short - byte * (more.bytes - few.bytes)) / (more.items - few.items))
    return Rates(host, item, byte, 0.0)


def _store(rows: int) -> KVStore:
    return store_of(_random(HEADS, rows), _random(HEADS, rows))


def _call(store: KVStore, index: RowIndex, config: RetrievalConfig) -> Call:
    call = Call.checked(_random(GROUP * HEADS, 1), store, index, config)
    call.needs_lse = False
    return call


def _random(heads: int, rows: int) -> Tensor:
    return torch.randn(1, heads, rows, DIM, device="cuda", dtype=DTYPE)


def _run(steps: tuple[Step, ...], call: Call) -> Callable[[], object]:
    return partial(run_plan, QueryPlan(steps, "timed"), call)


def seconds(runs: Sequence[Callable[[], object]]) -> float:
    """Seconds of one run, median: the longer of what host and device take, where one follows the other."""
    return event_seconds(lambda: [run() for run in runs]) / len(runs)


def device_seconds(runs: Sequence[Callable[[], object]]) -> float:
    """Seconds of one run on the device alone, median: all of them replayed from a graph."""
    for run in runs:
        run()  # compiles, and makes what later calls find
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = [run() for run in runs]
    found = event_seconds(graph.replay) / len(runs)
    del kept
    return found


def event_seconds(run: Callable[[], object], calls: int = CALLS, warm: int = 1) -> float:
    """Seconds between two events around a run, the median of ``calls`` after ``warm`` others."""
    times = []
    for _ in range(warm + calls):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return float(statistics.median(times[warm:]))
