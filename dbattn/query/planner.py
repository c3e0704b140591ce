"""Planner: the plan of each call to one store, chosen anew only where a call differs from the one before."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from index_kernels import resolve_backend

from ..config import RetrievalConfig
from ..store import KVStore
from .call import Call
from .choose import ROWS_PER_PLAN, PlannedIndex, choose_plan, recurring
from .expected import Expected
from .plan import QueryPlan
from .rates import gpu_of
from .steps import with_brought
from .usage import Needs, Workload


class _Kept(NamedTuple):
    """A plan that many calls in a row have, if they are the same in all it is chosen by, for ``rows`` rows or more."""

    about: tuple[Any, ...]
    rows: int
    plan: QueryPlan


class Planner:
    """How calls to one store are planned; another is to be made where its index or its batch rows become others."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def plan(
        self,
        call: Call,
        *,
        config: RetrievalConfig | None = None,
        retrieve: bool = True,
        estimate: bool = False,
        exact: bool = True,
        unindexed: str = "",
    ) -> QueryPlan:
        """How a call will be answered under ``config`` (default: its own); ``exact`` in words and estimates, too.

        ``unindexed``: why rows are not in the index, where they are kept out of it.
        """
        store, config = call.store, config or call.config
        index: PlannedIndex = call.index  # type: ignore[assignment]
        engine, rows, backend, exact = type(index), len(store), resolve_backend(call.query), exact or estimate
        processor, needs = _processor(store, backend), _needs(call)
        about: tuple[Any, ...] | None = None
        if not exact:
            given = None if store.sample is None else store.sample.given_rows
            about = (
                config, call.query.shape, store.starts, len(index), rows + -rows % ROWS_PER_PLAN, backend, processor,
                retrieve, unindexed, given, needs, call.scale, call.softcap,
            )  # fmt: skip
            kept = self._kept
            if kept is not None and kept.about == about and kept.rows <= rows:
                return with_brought(kept.plan, call)

        def chosen(needs: Needs | None) -> tuple[QueryPlan, bool]:
            work = call.workload._replace(needs=needs)
            near = work if exact else recurring(engine.hot, config, work)
            plan = choose_plan(
                engine, config, near, backend=backend, processor=processor, retrieve=retrieve, estimate=estimate
            )
            return plan, near is not work

        plan, recurs = chosen(needs)
        if not plan.is_dense and index.calibrate(call):
            plan, _ = chosen(_needs(call))
            recurs = False  # it is another call's by now
        if unindexed and retrieve:
            plan = replace(plan, reason=unindexed)
        if recurs and about is not None:
            self._kept = _Kept(about, rows, plan)
        return with_brought(plan, call)


def may_retrieve(config: RetrievalConfig, index: PlannedIndex, store: KVStore) -> bool:
    """Whether rows on a device are to be in the index: where a decode call might retrieve."""
    if len(index) or config.dense_below_rows is not None or config.wishes_retrieval:
        return True
    engine, rows = type(index), len(store)
    rows -= rows % ROWS_PER_PLAN  # asked at every step: the same as the last time
    work = Workload(
        rows, 1, engine.rows_indexed(config, rows), config.n_sink, len(store.starts), store.num_kv_heads,
        store.num_kv_heads, store.head_dim, store.value_dim, store.row_bytes, whole_lists=True,
    )  # fmt: skip
    backend = resolve_backend(store.start)
    processor = _processor(store, backend)
    return not choose_plan(
        engine, config, work, backend=backend, processor=processor, retrieve=True, estimate=False
    ).is_dense


def _needs(call: Call) -> Needs | None:
    """The budget that is needed, as far as anything tells."""
    expected = Expected.of(call.index, call.store, call.config)
    return None if expected is None else expected.needs


def _processor(store: KVStore, backend: str) -> int | str | None:
    """Which rates are those of a call: of so many threads, of the GPU of that name, or none."""
    return torch.get_num_threads() if backend == "numba" else gpu_of(store) if backend == "triton" else None
