"""Stages of benchmarks.gpu beside decode steps: errors on captured rows, sealing, rows in host memory, the default."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dbattn import AttentionDB, RetrievalConfig
from dbattn.index import index_class
from dbattn.index._lists import Lists
from dbattn.index.segmented import CLUSTERING, segment_bounds
from dbattn.query.device_rates import event_seconds, name_of
from dbattn.query.device_rates import seconds as call_seconds
from dbattn.query.rates import rates
from dbattn.store.host import host_buffer
from index_kernels import LearntMetric, ListReading, attend_segmented, seal_rows
from index_kernels.segmented import rows_opened

from ._gpu_stores import DIM, HEADS, KV_HEADS, asked, dense64, relative_error

WINDOW, N_SINK = 64, 4
REPLAYS, WARM = 30, 3
# Asked one after the other of rows in host memory: what one has read is in no second-level cache for the next.
QUERIES = 12


def graph_seconds(steps: Sequence[Callable[[], object]]) -> float:
    """Seconds of one step: the median of replays of a graph that takes all steps, over their number."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return event_seconds(graph.replay, REPLAYS, WARM) / len(steps)


def flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The step as torch's flash attention takes it."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def captured_errors(file: Path) -> list[dict[str, Any]]:
    """The library's answers on a layer's rows, sealed here: errors against float64, mean and greatest, by budget.

    ``file`` holds ``{layer}.key``, ``.value`` ``[Hkv, T, D]`` and ``.query`` of the newest positions, which ask the
    rows before theirs.
    """
    from safetensors.torch import load_file

    rows, lines = load_file(file), []
    for layer in sorted({name.split(".")[0] for name in rows}, key=int):
        keys, values, queries = (rows[f"{layer}.{name}"][None].cuda() for name in ("key", "value", "query"))
        stored = keys.shape[2] - queries.shape[2]
        keys, values, queries = keys[:, :, :stored], values[:, :, :stored], queries[:, :, ::32]
        for where, k in (("device", None), ("device", 200), ("host", None), ("host", 200)):
            config = RetrievalConfig(k=k, dense_below=0, audit_rate=0.0, rows=where)
            db = AttentionDB(keys.shape[1], keys.shape[3], config=config)
            db.insert(keys, values)
            errors = []
            for query in queries.split(1, dim=2):
                out = db.attend(query)
                assert isinstance(out, Tensor)
                errors.append(relative_error(out, dense64(query, *db.store.rows, keys.shape[3] ** -0.5)))
            plan = db.explain(queries[:, :, :1])
            read = [source.actual.rows for source in plan.sources if source.actual is not None]
            lines.append({
                "rows of": f"{file.stem}, layer {layer}", "rows": stored, "in": where, "k": k,
                "error": statistics.mean(errors), "most": max(errors), "read": read, "plan": str(plan),
            })  # fmt: skip
    return lines


def clustered(rows: int, heads: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys in clusters of clusters and random values, ``[1, heads, rows, DIM]`` bfloat16."""
    noise = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, device="cuda")

    def of(count: int) -> Tensor:
        return torch.randint(0, count, (heads, rows), generator=noise, device="cuda")

    number, coarse, fine = torch.arange(heads, device="cuda")[:, None], rows // 512 + 1, rows // 32 + 1
    keys = normal(heads, coarse, DIM)[number, of(coarse)] + 0.6 * normal(heads, fine, DIM)[number, of(fine)]
    keys += 0.6 * normal(heads, rows, DIM)
    return keys.bfloat16()[None], normal(heads, rows, DIM).bfloat16()[None]


def seal(keys: Tensor, values: Tensor) -> Lists:
    """Seal all rows but the window, in a metric, as a prompt's end does."""
    bounds, heads, dim = segment_bounds(keys.shape[2] - WINDOW), keys.shape[1], keys.shape[3]
    lists = Lists(1, heads, dim, dim)
    lists.reserve(bounds, keys.shape[2])
    metric = np.broadcast_to(np.eye(dim, dtype=np.float32), (len(bounds) - 1, 1, heads, dim, dim)).copy()
    learnt = LearntMetric(metric, np.ones((len(bounds) - 1, 1), np.bool_))
    start = torch.full((1,), N_SINK, device=keys.device)
    seal_rows(
        keys, values, lists.positions, lists.codes, bounds, 0, CLUSTERING, learnt, lists.lists, lists.supers,
        lists.segments, start=start, backend="auto" if keys.is_cuda else "reference",
    )  # fmt: skip
    lists.settle(len(bounds) - 1)
    return lists


def scatter(lists: Lists) -> float:
    """Mean squared distance of rows from the mean of their list."""
    used = np.arange(lists.lists.size.shape[2]) < lists.lists.used[..., None]
    size = lists.lists.size * used
    return float((size * lists.lists.variance).sum() / size.sum())


def sealing(rows: int) -> dict[str, Any]:
    """Seconds to seal a prompt's rows of one layer, and how tight lists are beside those that a CPU makes."""
    few = clustered(min(rows, 16384), 1)
    here, there = scatter(seal(*(part.clone() for part in few))), scatter(seal(*(part.cpu() for part in few)))
    came, times = clustered(rows, KV_HEADS), []
    for _ in range(5):
        keys, values = (part.clone() for part in came)
        torch.cuda.synchronize()
        began = time.perf_counter()
        lists = seal(keys, values)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    place = torch.from_numpy(lists.positions).cuda().long()
    kept = all(
        torch.equal(torch.take_along_dim(before, place[..., None], dim=2), after)
        for before, after in zip(came, (keys, values), strict=True)
    )
    line = {
        "rows": rows,
        "scatter": here,
        "scatter_cpu": there,
        "first": times[0],
    }
    if not (kept and abs(here / there - 1) < 0.01):
        return line | {"failed": "the lists are wrong: not timed"}
    return line | {"seconds": statistics.median(times[1:])}


@contextmanager
def copying(wanted: bool) -> Iterator[None]:
    """Let the device keep copies of rows in host memory, or not."""
    kernels: Any = import_module("index_kernels._triton_segmented")
    before = kernels.COPIES
    kernels.COPIES = before * wanted
    try:
        yield
    finally:
        kernels.COPIES = before


def offload(rows: int, reading: Callable[..., ListReading]) -> dict[str, Any]:
    """A step over rows in pinned host memory: read whole by flash, copied and scanned, and by lists under some budgets.

    With copies on the device and without: the same queries are replayed, so that ``copies`` of the rows, nearly all,
    were read before. Of how many that is true in a text a model's own queries tell.

    ``reading``: see gpu.reading.
    """
    near = clustered(rows, KV_HEADS)
    keys, values = (host_buffer(tuple(part.shape), part.dtype, part.device) for part in near)
    for to, of in zip((keys, values), near, strict=True):
        to.copy_(of)
    torch.cuda.synchronize()
    began = time.perf_counter()
    table, start = seal(keys, values).table, torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    sealed, took, near = segment_bounds(rows - WINDOW)[-1], time.perf_counter() - began, (keys.clone(), values.clone())
    pinned, staging = [part.cpu().pin_memory() for part in near], [torch.empty_like(part[:, :1]) for part in near]
    noise, group = torch.Generator("cuda").manual_seed(2), HEADS // KV_HEADS
    queries = [asked(near[0], N_SINK, sealed, noise) for _ in range(QUERIES)]
    wanted = [dense64(query, *near, DIM**-0.5) for query in queries]

    def copied(query: Tensor) -> Tensor:
        """Head by head: its rows are copied to the device, then scanned."""
        outs = []
        for h in range(KV_HEADS):
            for to, of in zip(staging, pinned, strict=True):
                to.copy_(of[:, h : h + 1], non_blocking=True)
            outs.append(flash(query[:, h * group : (h + 1) * group], *staging))
        return torch.cat(outs, dim=1)

    query, size = queries[0], 2 * pinned[0].nbytes
    line: dict[str, Any] = {
        "rows": rows, "bytes": size, "sealing": took, "error_copied": relative_error(copied(query), wanted[0]),
        "error_flash": relative_error(flash(query, keys, values), wanted[0]),
        "copied": event_seconds(lambda: copied(query), 10, WARM),
        "flash": graph_seconds([lambda: flash(query, keys, values)]),
        "on_device": graph_seconds([lambda: flash(query, *near)]), "steps": [],
    }  # fmt: skip
    line["bytes_per_second"] = size / line["copied"]
    dense = min(line["copied"], line["flash"])
    for by_code, k, copies in (
        (True, None, True), (True, None, False), (True, 200, True), (True, 200, False), (False, None, False),
        (False, 200, False),
    ):  # fmt: skip
        table = replace(table, before=None, _cache={})
        how = reading(sealed, rows, KV_HEADS, k, DIM**-0.5)

        def step(query: Tensor, table: Any = table, how: Any = how, by_code: bool = by_code) -> Tensor:
            found = attend_segmented(query, keys, values, table, how, start=start, by_code=by_code)
            return found.out

        with copying(copies):
            error = statistics.mean(relative_error(step(of), to) for of, to in zip(queries, wanted, strict=True))
            took = graph_seconds([lambda query=query: step(query) for query in queries])  # type: ignore[misc]
            told = attend_segmented(query, keys, values, table, how, start=start, by_code=by_code, details=True)
        read = how.rows_read if by_code else rows_opened(how.rows_read, how.rows_coded, KV_HEADS)
        line["steps"].append({
            "k": k, "by_code": by_code, "budget": read // KV_HEADS, "error": error, "seconds": took,
            "times": dense / took, "copies": told.copies_read / told.rows_read,
        })  # fmt: skip
    return line


def default(rows: int, batch: int) -> dict[str, Any]:
    """What the default config does, outside a graph, beside a dense scan and torch's own call, on this card's rates."""
    keys, values = clustered(rows, batch * KV_HEADS)
    keys, values = (part.view(batch, KV_HEADS, rows, DIM) for part in (keys, values))
    query = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    db = AttentionDB(KV_HEADS, DIM, config=RetrievalConfig(audit_rate=0.0))
    began = time.perf_counter()
    db.insert(keys, values)
    torch.cuda.synchronize()
    took, plan = time.perf_counter() - began, db.explain(query)
    line: dict[str, Any] = {
        "rows": rows, "batch": batch, "insert": took, "retrieves": not plan.is_dense, "reason": plan.reason,
        "estimated": plan.seconds_estimated, "estimated_dense": plan.seconds_dense,
    }  # fmt: skip
    for name, run in (
        ("default", lambda: db.attend(query)), ("dense", lambda: db.attend(query, retrieve=False)),
        ("flash", lambda: flash(query, keys, values)),
    ):  # fmt: skip
        line[name] = call_seconds([run] * 20)
    return line


def rates_here() -> dict[str, Any]:
    """The rates that the planner has of this card; measured where they are not kept."""
    name, found = name_of(torch.device("cuda", torch.cuda.current_device())), {}
    for engine in (None, index_class("segmented")):
        began = time.perf_counter()
        known = rates(engine, name)
        found["dense" if engine is None else engine.name] = {
            "rates": None if known is None else known._asdict(), "took": time.perf_counter() - began
        }  # fmt: skip
    return found
