"""Steps of a shard: all of its own rows, and what all ranks read, for reading alone."""

import time
from dataclasses import dataclass

import torch

from index_kernels import attend_rows

from ..dense import masked_attention
from ..query.call import Call
from ..query.plan import Source, Step, StepAnswer
from ..query.usage import Usage, Workload, scan_usage


@dataclass(frozen=True)
class OwnRows(Step):
    """All of a rank's rows that each query sees: the first ``stops[i]``."""

    stops: tuple[int, ...] = ()

    @classmethod
    def of(cls, work: Workload, stops: tuple[int, ...]) -> "OwnRows":
        """The step for queries that see so many rows each."""
        return cls((Source("dense scan", f"all {work.rows} rows", scan_usage(work, work.rows, None)),), stops)

    def run(self, call: Call) -> StepAnswer:
        """See Step."""
        (keys, values), store, query, began = call.store.rows, call.store, call.query, time.perf_counter()
        stop = torch.tensor(self.stops, device=query.device)
        if call.index.moves_rows and len(call.index) > self.stops[0]:
            # Rows that some queries do not see stand among older ones: causal order is by position, not place.
            places = torch.arange(len(store), device=query.device).expand(*query.shape[:2], 1, -1)
            at = call.index.positions(places)
            mask = (at < stop[:, None]) & (at >= store.start[:, None, None, None])
            out, lse = masked_attention(query, keys, values, mask, scale=call.scale, softcap=call.softcap)
        else:
            first = store.start[:, None].minimum(stop)
            ranges = torch.stack([first, stop.expand_as(first)], dim=-1)[:, None, :, None]
            ranges = ranges.expand(-1, query.shape[1], -1, -1, -1)
            out, lse = attend_rows(query, keys, values, ranges=ranges, scale=call.scale, softcap=call.softcap)
        rows = sum(self.stops) / len(self.stops)
        size = query.shape[0] * store.num_kv_heads * self.stops[-1] * store.row_bytes
        usage = Usage(rows, size, 0.0, time.perf_counter() - began)
        return StepAnswer(out, lse, (usage,), rows_read=rows, bytes_read=size)


@dataclass(frozen=True)
class ShardSources(Step):
    """What the ranks read, each a source; for reading alone."""

    def run(self, call: Call) -> StepAnswer:
        """Not one rank's to run."""
        raise TypeError("these sources are read by several ranks: the plan is for reading, not for running")
