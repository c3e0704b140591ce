"""Steps that every store offers: the dense scan, the rows scanned exactly, and what a call brings along."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from index_kernels import attend_rows

from ..dense import dense_attention, exact_ranges, masked_attention
from ..store import StateSource
from .call import Call
from .plan import QueryPlan, Source, Step, StepAnswer
from .usage import Rates, Usage, Workload, scan_usage


@dataclass(frozen=True)
class DenseScan(Step):
    """All rows, exactly: the fallback, and the yardstick."""

    @classmethod
    def of(cls, work: Workload, rates: Rates | None) -> "DenseScan":
        """The step with its estimate."""
        return cls((Source("dense scan", f"all {work.rows} rows", scan_usage(work, work.rows, rates, alone=True)),))

    def run(self, call: Call) -> StepAnswer:
        """See Step."""
        store, began = call.store, time.perf_counter()
        keys, values = store.rows_for(call.query.shape[2])
        out: Tensor
        lse: Tensor | None = None
        if call.is_sealed_ahead:
            # Rows after a query's position were moved among the older ones: causal order is by position, not place.
            out, lse = masked_attention(
                call.query, keys, values, call.causal_mask(), scale=call.scale, softcap=call.softcap
            )
        elif call.needs_lse:
            state = dense_attention(
                call.query,
                keys,
                values,
                start=store.start if store.has_padding else None,
                scale=call.scale,
                softcap=call.softcap,
                return_lse=True,
            )
            out, lse = state[0], state[1]
        else:
            start = store.start if store.has_padding else None
            scanned = dense_attention(call.query, keys, values, start=start, scale=call.scale, softcap=call.softcap)
            assert isinstance(scanned, Tensor)
            out = scanned
        if not call.measure:
            return StepAnswer(out, lse, rows_read=call.rows_visible, bytes_read=call.bytes_dense)
        usage = Usage(call.rows_visible, call.bytes_dense, 0.0, time.perf_counter() - began)
        return StepAnswer(out, lse, (usage,), rows_read=usage.rows, bytes_read=usage.bytes)


@dataclass(frozen=True)
class DenseHeads(Step):
    """All rows for some KV heads alone: where ``max_error`` asks for it. Other heads get no rows from it."""

    heads: tuple[int, ...] = ()

    @classmethod
    def of(cls, heads: tuple[int, ...], call: Call) -> "DenseHeads":
        """The step for KV heads ``heads`` of a call."""
        rows, share = len(call.store), len(heads) / call.store.num_kv_heads
        usage = Usage(share * rows, call.query.shape[0] * len(heads) * rows * call.store.row_bytes)
        return cls((Source("dense scan", f"all {rows} rows of KV heads {', '.join(map(str, heads))}", usage),), heads)

    def asking(self, call: Call) -> Tensor:
        """Bool ``[Hq]``: the query heads that this step answers."""
        group = call.query.shape[1] // call.store.num_kv_heads
        asking = torch.zeros(call.query.shape[1], dtype=torch.bool, device=call.query.device)
        for head in self.heads:
            asking[head * group : (head + 1) * group] = True
        return asking

    def run(self, call: Call) -> StepAnswer:
        """See Step; ``lse`` is -inf for the other heads."""
        (keys, values), query, began = call.store.rows, call.query, time.perf_counter()
        group = query.shape[1] // call.store.num_kv_heads
        out = query.new_zeros((*query.shape[:3], call.store.value_dim), dtype=torch.float32)
        lse = torch.full(query.shape[:3], float("-inf"), device=query.device)
        for head in self.heads:
            asking, rows = slice(head * group, (head + 1) * group), slice(head, head + 1)
            out[:, asking], lse[:, asking] = dense_attention(
                query[:, asking],
                keys[:, rows],
                values[:, rows],
                start=call.store.start,
                scale=call.scale,
                softcap=call.softcap,
                return_lse=True,
            )
        expected = self.sources[0].estimated
        usage = Usage(expected.rows, expected.bytes, 0.0, time.perf_counter() - began)
        return StepAnswer(out, lse, (usage,), rows_read=expected.rows, bytes_read=expected.bytes)


@dataclass(frozen=True)
class ExactRows(Step):
    """Sinks, and the rows from ``hot`` on, up to each query's own."""

    hot: int = 0

    @classmethod
    def source(cls, work: Workload, hot: int, n_sink: int, rates: Rates | None) -> Source:
        """The rows in words, with their estimate; an index that reads them itself names them so, too."""
        rows = work.rows - hot + n_sink - (work.queries - 1) / 2
        detail = f"first {n_sink} rows and rows {hot} to {work.rows - 1}"
        return Source("sinks + hot rows", detail, scan_usage(work, rows, rates))

    def run(self, call: Call) -> StepAnswer:
        """See Step."""
        (keys, values), query, began = call.store.rows, call.query, time.perf_counter()
        first = len(call.store) - query.shape[2]
        ranges = exact_ranges(query, first, call.store.start, self.hot, call.config.n_sink)
        out, lse = attend_rows(query, keys, values, ranges=ranges, scale=call.scale, softcap=call.softcap)
        took = time.perf_counter() - began
        rows = (ranges[..., 1] - ranges[..., 0]).clamp(min=0).sum(dim=-1).float()
        # Heads of a group and queries of a call share the rows of their ranges.
        shared = int(query.shape[0] * keys.shape[1] * float(rows.max())) * call.store.row_bytes
        usage = Usage(float(rows.mean()), shared, 0.0, took)
        return StepAnswer(out, lse, (usage,), rows_read=usage.rows, bytes_read=usage.bytes)


@dataclass(frozen=True)
class ExtraRows(Step):
    """What a call brings along: rows of other origin, or a state that was made of some elsewhere."""

    @classmethod
    def of(cls, call: Call) -> "ExtraRows":
        """The step for ``call.extra``."""
        extra = call.extra
        assert extra is not None
        if isinstance(extra, StateSource):
            return cls((Source("state", extra.detail, Usage(extra.rows, extra.bytes, 0.0, extra.seconds)),))
        rows = extra.keys.shape[2]
        size = extra.keys.nbytes + extra.values.nbytes
        return cls((Source("extra rows", f"{rows} rows of other origin", Usage(rows, size)),))

    def run(self, call: Call) -> StepAnswer:
        """See Step."""
        assert call.extra is not None
        began, turn = time.perf_counter(), call.store.turn
        out, lse = call.extra.state(turn(call.query), scale=call.scale, softcap=call.softcap)
        expected = self.sources[0].estimated
        took = time.perf_counter() - began if expected.seconds is None else expected.seconds
        usage = Usage(expected.rows, expected.bytes, 0.0, took)
        return StepAnswer(turn(out), lse, (usage,), rows_read=expected.rows, bytes_read=expected.bytes)


@dataclass(frozen=True)
class SinkLogits(Step):
    """A model's attention sink: one more row per head, of value zero."""

    def run(self, call: Call) -> StepAnswer:
        """See Step."""
        assert call.sink_logits is not None
        query = call.query
        out = query.new_zeros((*query.shape[:3], call.store.value_dim), dtype=torch.float32)
        lse = call.sink_logits.float()[None, :, None].expand(query.shape[:3])
        return StepAnswer(out, lse, (Usage(0.0, 0, 0.0, 0.0),))


SINK_LOGITS = SinkLogits((Source("sink logits", "one row of value zero for each head", Usage(0.0, 0)),))


def steps_of_call(call: Call) -> tuple[Step, ...]:
    """What any plan for this call runs beside the store's own steps."""
    extra = () if call.extra is None or call.extra.is_empty else (ExtraRows.of(call),)
    return extra if call.sink_logits is None else (*extra, SINK_LOGITS)


def with_brought(plan: QueryPlan, call: Call) -> QueryPlan:
    """The plan, and the steps of what the call brings along."""
    brought = steps_of_call(call)
    return replace(plan, steps=(*plan.steps, *brought)) if brought else plan
