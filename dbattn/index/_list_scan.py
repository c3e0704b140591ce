"""ListScan: the step of a segmented store. Sinks, hot rows, lists and summaries are read in one kernel call."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from index_kernels import ListReading, ListTable, SegmentedAnswer, attend_segmented

from ..config import RetrievalConfig
from ..query.call import Call
from ..query.plan import Source, Step, StepAnswer
from ..query.steps import ExactRows
from ..query.usage import Rates, Usage, Work, Workload
from ._lists import NUMBERS_BYTES, ROWS_PER_LIST, ROWS_PER_SUPER_LIST, vector_bytes


class SegmentedStore(Protocol):
    """What the step needs of the index that offers it."""

    table: ListTable
    summary_bytes: int

    def __len__(self) -> int:
        """Rows that stand in lists."""

    def slots(self, chosen: Tensor, heads: int) -> Tensor:
        """Places of the rows of chosen lists."""


# How much of the variance of a list's logits its summary's weight and value are corrected by. A Gaussian would ask
# for 0.5 and 1; real residuals have lighter tails, and the unread lists are those whose spread matters least.
ALPHA, BETA = 0.38, 0.7
# (sealed rows, rows read per KV head), from a sweep on SmolLM2's rows for a mean error of 0.035 (32K to 524K). Below
# that a call's fixed cost rules: at 8K twice the rows cost a fifth of the time more, and halve the error to 0.013.
BUDGETS = np.array([(2048, 1024), (7680, 960), (32256, 520), (130560, 900), (523272, 2000)])
LEAST_SEALED = 128
# Rows under opened super-lists for each row read: opening costs a sixteenth of reading.
OPENED_PER_READ = 16


@lru_cache
def default_rows_read(sealed: int) -> int:
    """Rows read per KV head for ``sealed`` rows: BUDGETS interpolated on log-log scales."""
    x, y = np.log(BUDGETS).T
    at = np.log(max(sealed, LEAST_SEALED))
    i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
    return int(np.exp(y[i - 1] + (at - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])))


def budget(sealed: int, k: int | None) -> tuple[int, int]:
    """(rows read, rows opened) per KV head where ``k`` rows are asked for, or the default for ``sealed`` rows."""
    read = default_rows_read(sealed) if k is None else k
    opened = OPENED_PER_READ * read
    # Scoring every list, in the order they stand, costs no more than opening half of the super-lists.
    return read, sealed if 2 * opened > sealed else opened


def list_work(work: Workload, k: int | None) -> Work:
    """What reading lists under budget ``k`` is expected to do for a call; things scored are summaries."""
    per_unit = work.units * work.queries
    read = min(budget(work.indexed, k)[0], work.indexed)
    size = int(per_unit * read) * work.row_bytes
    return Work(per_unit * _summaries(work, k), size, work.operations(read))


def _summaries(work: Workload, k: int | None) -> float:
    """Summaries scored per KV head and position: of all lists, or of all super-lists and the lists of opened ones."""
    opened = budget(work.indexed, k)[1]
    if opened >= work.indexed:
        return work.indexed / ROWS_PER_LIST
    return work.indexed / ROWS_PER_SUPER_LIST + opened / ROWS_PER_LIST


@dataclass(frozen=True)
class ListScan(Step):
    """Sinks and hot rows exactly, lists under a budget, the rest by summary: two or three sources, fused.

    Attributes:
        k: rows read per KV head on average over the heads, which share them by need; None: by size.
        tail: whether lists that are not read answer by their summary.
        bounded: say what the error is estimated from.
    """

    k: int | None = None
    tail: bool = True
    bounded: bool = False

    @classmethod
    def of(
        cls, config: RetrievalConfig, work: Workload, asked: str, own: Rates | None, scan: Rates | None
    ) -> "ListScan":
        """The step with its estimates; the summaries' time is part of the list scan's."""
        k, does = config.k, list_work(work, config.k)
        read = does.operations / work.operations(1)
        size = int(does.bytes) + int(does.items) * (vector_bytes(work.dim) + NUMBERS_BYTES)
        usage = Usage(read, size, read / ROWS_PER_LIST, None if own is None else own.seconds(does))
        eligible = work.indexed - work.first_index_row
        by = "queries and keys" if work.learnt else "keys alone (no queries to learn from)"
        sources = [
            ExactRows.source(work, work.indexed, config.n_sink, scan),
            Source("list scan", f"segmented by {by}, {asked} of {eligible} rows", usage),
        ]
        tail = config.tail_name == "centroid"
        if tail:
            unread = max(0.0, _summaries(work, k) - budget(work.indexed, k)[0] / ROWS_PER_LIST)
            values = int(work.units * work.queries * unread) * vector_bytes(work.value_dim)
            sources.append(Source("summary scan", "one summary for each list not read", Usage(0.0, values, unread)))
        return cls(tuple(sources), k, tail, config.max_error is not None)

    def run(self, call: Call) -> StepAnswer:
        """See Step; one kernel call per position."""
        index: SegmentedStore = call.index  # type: ignore[assignment]  # no other index offers this step
        m, first = call.query.shape[2], len(call.store) - call.query.shape[2] + 1
        found = [self.attend(call, index, call.query[:, :, i : i + 1], first + i) for i in range(m)]
        units = call.query.shape[0] * call.store.num_kv_heads * m
        rows = sum(one.rows_read for one in found) / units
        hot = call.config.n_sink + len(call.store) - (m - 1) / 2 - len(index)

        def cat(name: str, dim: int) -> Tensor:
            parts = [getattr(one, name) for one in found]
            return parts[0] if m == 1 else torch.cat(parts, dim=dim)

        lse, lses = cat("lse", 2), cat("lse_by_source", 3)
        sizes = self._bytes(call, index, found, hot, units)
        answer = StepAnswer(
            cat("out", 2),
            lse,
            lses=lses[: len(self.sources)],
            rows_read=rows + hot,
            rows_retrieved=rows,
            bytes_read=sum(sizes),
            deviation=partial(_share, cat("deviation", 2), lse) if self.bounded else None,
            tail="centroid" if self.tail else "none",
        )
        if not call.measure:
            return answer
        exact_lse = torch.logaddexp(lses[0], lses[1])
        slots = [index.slots(one.chosen, call.query.shape[1]) for one in found if one.chosen is not None]
        widest = max(part.shape[-1] for part in slots)
        padded = [pad(part, (0, widest - part.shape[-1]), value=-1) for part in slots]
        lists, scored = (sum(getattr(one, name) for one in found) for name in ("lists_read", "summaries_read"))
        times = [sum(one.seconds[i] for one in found) for i in range(3)]
        usages = (
            Usage(hot, sizes[0], 0.0, times[0]),
            Usage(rows, sizes[1], lists / units, times[1]),
            Usage(0.0, sizes[2], (scored - lists) / units, times[2]),
        )
        return answer._replace(
            usages=usages[: len(self.sources)],
            exact_lse=exact_lse,
            slots=torch.cat(padded, dim=2),
            unread=found[-1].unread,
        )

    def attend(self, call: Call, index: SegmentedStore, query: Tensor, length: int) -> SegmentedAnswer:
        """The kernel's answer for one position ``[B, Hq, 1, D]``, which sees the first ``length`` rows."""
        store = call.store
        read, opened = budget(len(index), self.k)
        how = ListReading(
            len(index), length, call.config.n_sink, read * store.num_kv_heads, opened * store.num_kv_heads, call.scale,
            call.softcap, ALPHA, BETA, self.tail,
        )  # fmt: skip
        return attend_segmented(
            query, *store.buffers, index.table, how, start=store.start, want_deviation=self.bounded,
            details=call.measure,
        )  # fmt: skip

    def _bytes(
        self, call: Call, index: SegmentedStore, found: list[SegmentedAnswer], hot: float, units: int
    ) -> tuple[int, int, int]:
        """Bytes of each source: keys of summaries are read to choose lists, their values by the tail."""
        per_row, value_bytes = call.store.row_bytes, vector_bytes(call.store.value_dim)
        rows = sum(one.rows_read for one in found)
        scored, values = (sum(getattr(one, name) for one in found) for name in ("summaries_read", "values_read"))
        choosing = scored * (index.summary_bytes - value_bytes)
        return int(units * hot) * per_row, rows * per_row + choosing, values * value_bytes


def _share(deviation: Tensor, lse: Tensor, whole: Tensor) -> Tensor:
    """The deviation, a share of the step's own weight, as a share of the whole answer's."""
    return deviation if whole is lse else deviation * torch.exp(lse - whole)
