"""ListScan: the step of a segmented store. Sinks, hot rows, lists and summaries are read in one kernel call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from index_kernels import ListReading, ListTable, SegmentedAnswer, attend_segmented
from index_kernels.packed import code_bytes
from index_kernels.segmented import rows_opened
from index_kernels.summaries import MANY_ROWS

from ..config import RetrievalConfig
from ..query.call import Call
from ..query.plan import Counted, Source, Step, StepAnswer
from ..query.steps import ExactRows
from ..query.usage import Needs, Rates, Usage, Work, Workload
from ._lists import NUMBERS_BYTES, ROWS_PER_LIST, ROWS_PER_SUPER_LIST, slots_of, vector_bytes


class SegmentedStore(Protocol):
    """What the step needs of the index that offers it."""

    table: ListTable
    summary_bytes: int

    def __len__(self) -> int:
        """Rows that stand in lists."""


# How much of the variance of a list's logits its summary's weight and value are corrected by. A Gaussian would ask
# for 0.5 and 1; real residuals have lighter tails, and the unread lists are those whose spread matters least.
ALPHA, BETA = 0.38, 0.7
# (sealed rows, rows read per KV head), where no queries tell better: a mean error under 0.035 in the layers of three
# models at 16K, and as many rows more with length as SmolLM2 needs.
BUDGETS = np.array([(2048, 160), (7680, 200), (16128, 420), (32256, 540), (130560, 800), (523272, 1300)])
LEAST_SEALED = 128
# A row that answers by its list's summary is about so many times as wrong as one that answers by its code: estimates of
# errors then scatter least, for budgets from 50 to 1,600 rows, in eight layers of three models.
BY_SUMMARY = 3.0
# As many bytes go to codes as to rows: at float32 rows and D = 64, 14 codes for a row.
CODED_PER_READ = 14
# A code costs a part of what a summary does.
CODES_PER_ITEM = 6
# What is told of codes where none were read: lists were opened whole.
NO_CODES = Usage(0.0, 0)
# Rows under opened super-lists for each row coded.
OPENED_PER_CODED = 2
# Rows whose lists are all scored, whatever the budget.
ONE_LEVEL = 8192


class Budget(NamedTuple):
    """Rows per KV head: read, coded (under opened lists), and under opened super-lists."""

    read: int
    coded: int
    opened: int

    def reading(
        self, call: Call, sealed: int, length: int, *, tail: bool, head_weights: tuple[float, ...] = ()
    ) -> ListReading:
        """How the kernel is to read ``sealed`` rows in lists and the hot ones up to ``length`` for calls like this."""
        heads = call.store.num_kv_heads
        return ListReading(
            sealed, length, call.config.n_sink, heads * self.read, heads * self.coded, heads * self.opened, call.scale,
            call.softcap, ALPHA, BETA, tail, head_weights or None,
        )  # fmt: skip


@lru_cache
def default_rows_read(sealed: int) -> int:
    """Rows read per KV head for ``sealed`` rows: BUDGETS interpolated on log-log scales."""
    x, y = np.log(BUDGETS).T
    at = np.log(max(sealed, LEAST_SEALED))
    i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
    return int(np.exp(y[i - 1] + (at - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])))


@lru_cache
def budget(sealed: int, k: int | None) -> Budget:
    """What is read per KV head where ``k`` rows are asked for, or by default for ``sealed`` rows."""
    read = default_rows_read(sealed) if k is None else k
    coded = min(CODED_PER_READ * read, sealed)
    opened = OPENED_PER_CODED * coded
    # Scoring every list, in the order they stand, costs no more than opening half of the super-lists, or any of few.
    return Budget(read, coded, sealed if 2 * opened > sealed or sealed <= ONE_LEVEL else opened)


def needs_of(config: RetrievalConfig, work: Workload) -> Needs | None:
    """What audits found for calls under this config; None where it asks for no such budget."""
    return work.needs if config.finds_budget else None


def rows_wanted(config: RetrievalConfig, work: Workload) -> int | None:
    """Rows per KV head that are asked for, or that audits found to be needed; None: by size."""
    needs = needs_of(config, work)
    if needs is None:
        return config.k
    # What was found for the leading segments grows as the budget by size does.
    return max(1, round(needs.read * default_rows_read(work.indexed) / default_rows_read(needs.rows)))


def list_work(work: Workload, k: int | None) -> Work:
    """What reading under budget ``k`` is expected to do for a call; things scored are summaries and codes."""
    per_unit = work.units * work.queries
    read, coded = rows_of_lists(work, k)
    size = int(per_unit * read) * work.row_bytes
    return Work(per_unit * (_summaries(work, k) + coded / CODES_PER_ITEM), size, work.operations(read))


def rows_of_lists(work: Workload, k: int | None) -> tuple[int, int]:
    """Rows of lists that are read per KV head, and those of which codes are."""
    asks = budget(work.indexed, k)
    if work.whole_lists:
        return min(rows_opened(asks.read, asks.coded), work.indexed), 0
    return min(asks.read, work.indexed), asks.coded


def rows_scored(work: Workload, k: int | None) -> float:
    """Summaries and codes that are multiplied with each query head, KV heads of all batch rows together."""
    return work.units * work.queries * (_summaries(work, k) + rows_of_lists(work, k)[1])


def _summaries(work: Workload, k: int | None) -> float:
    """Summaries scored per KV head and position: of all lists, or of all super-lists and the lists of opened ones."""
    opened = budget(work.indexed, k).opened
    if opened >= work.indexed or (work.whole_lists and work.indexed < MANY_ROWS):
        return work.indexed / ROWS_PER_LIST
    return work.indexed / ROWS_PER_SUPER_LIST + opened / ROWS_PER_LIST


@dataclass(frozen=True)
class ListScan(Step):
    """Sinks and hot rows exactly, the best rows of opened lists, others by code or by summary: two or four sources.

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
        k = rows_wanted(config, work)
        does, (read, coded) = list_work(work, k), rows_of_lists(work, k)
        per_unit, scored, opened = work.units * work.queries, _summaries(work, k), max(read, coded) / ROWS_PER_LIST
        size = int(does.bytes + per_unit * coded * code_bytes(work.dim))
        size += int(per_unit * scored) * (vector_bytes(work.dim) + NUMBERS_BYTES)
        usage = Usage(read, size, opened, None if own is None else own.seconds(does))
        eligible = work.indexed - work.first_index_row
        needs = needs_of(config, work)
        expected = "" if needs is None else f" (audits of sampled queries expect {needs.error:.2g})"
        by = "queries and keys" if work.learnt else "keys alone (no queries to learn from)"
        sources = [
            ExactRows.source(work, work.indexed, config.n_sink, scan),
            Source("list scan", f"segmented by {by}, {asked}{expected} of {eligible} rows", usage),
        ]
        tail = config.tail_name == "centroid"
        if tail:
            each = vector_bytes(work.value_dim)
            answering = coded / ROWS_PER_LIST, max(0.0, scored - opened)
            usages = [Usage(0.0, int(per_unit * n) * each, n) for n in answering]
            sources.append(
                Source("code scan", "rows of opened lists that were not read, by their 4-bit codes", usages[0])
            )
            sources.append(Source("summary scan", "one summary for each list not opened", usages[1]))
        return cls(tuple(sources), k, tail, config.max_error is not None)

    def run(self, call: Call) -> StepAnswer:
        """See Step; one kernel call per position."""
        index: SegmentedStore = call.index  # type: ignore[assignment]  # no other index offers this step
        batch, _, m, _ = call.query.shape
        length = len(call.store)
        queries = (call.query,) if m == 1 else call.query.split(1, dim=2)
        found = [self.attend(call, index, query, length - m + 1 + i) for i, query in enumerate(queries)]
        whole = found[0] if m == 1 else _joined(found)
        units = batch * call.store.num_kv_heads * m
        rows = whole.rows_read / units
        hot = call.config.n_sink + length - (m - 1) / 2 - len(index)
        sizes = self._bytes(call, index, whole, hot, units)
        answer = StepAnswer(
            whole.out,
            whole.lse if call.needs_lse else None,
            rows_read=rows + hot,
            rows_retrieved=rows,
            bytes_read=sum(sizes),
            deviation=partial(unread_share, whole.lse_by_source) if self.bounded or call.tells_unread else None,
            tail="centroid" if self.tail else "none",
            counted=None
            if whole.totals is None
            else Counted(whole.totals, whole.rows_read, units, call.store.row_bytes),
        )
        if not call.measure:
            return answer
        lses = whole.lse_by_source
        exact_lse = torch.logaddexp(lses[0], lses[1])
        slots = [slots_of(one.taken, call.query.shape[1])[:, :, None] for one in found if one.taken is not None]
        widest = max(part.shape[-1] for part in slots)
        padded = [pad(part, (0, widest - part.shape[-1]), value=-1) for part in slots]
        opened, scored = whole.lists_opened, whole.summaries_read
        times = [sum(one.seconds[i] for one in found) for i in range(4)]
        usages = (
            Usage(hot, sizes[0], 0.0, times[0]),
            Usage(rows, sizes[1], opened / units, times[1], whole.copies_read / units),
            Usage(0.0, sizes[2], opened / units, times[2]) if whole.rows_coded or not opened else NO_CODES,
            Usage(0.0, sizes[3], (scored - opened) / units, times[3]),
        )
        return answer._replace(
            usages=usages[: len(self.sources)],
            lses=lses[: len(self.sources)],
            exact_lse=exact_lse,
            slots=torch.cat(padded, dim=2),
            unread=found[-1].unread,
        )

    def measured(self, usages: Sequence[Usage], masses: Sequence[float]) -> Self:
        """See Step; where lists were opened whole, no codes were read."""
        if len(usages) < 4 or usages[2] is not NO_CODES:
            return super().measured(usages, masses)
        hot, lists, _, summaries = self.sources
        whole = replace(
            self, sources=(hot, replace(lists, detail=f"{lists.detail}, opened lists read whole"), summaries)
        )
        return super(ListScan, whole).measured([*usages[:2], usages[3]], [*masses[:2], masses[3]])

    def attend(self, call: Call, index: SegmentedStore, query: Tensor, length: int) -> SegmentedAnswer:
        """The kernel's answer for one position ``[B, Hq, 1, D]``, which sees the first ``length`` rows."""
        store = call.store
        needs = call.index.needs
        weights = () if needs is None else needs.head_weights
        if len(weights) != query.shape[1]:
            weights = ()  # other queries ask than those that were sampled
        how = budget(len(index), self.k).reading(call, len(index), length, tail=self.tail, head_weights=weights)
        return attend_segmented(
            query, *store.buffers, index.table, how, start=store.start, by_code=store.host, with_lse=call.needs_lse,
            details=call.measure, unread=call.weighs, newest=store.newest if call.query.shape[2] == 1 else None,
        )  # fmt: skip

    def _bytes(
        self, call: Call, index: SegmentedStore, whole: SegmentedAnswer, hot: float, units: int
    ) -> tuple[int, int, int, int]:
        """Bytes of each source: keys of summaries and codes are read to choose rows, mean values by what answers."""
        per_row, value_bytes = call.store.row_bytes, vector_bytes(call.store.value_dim)
        choosing = whole.summaries_read * (index.summary_bytes - value_bytes)
        choosing += whole.rows_coded * code_bytes(call.store.head_dim)
        of_codes = min(whole.lists_opened, whole.values_read) * value_bytes if self.tail and whole.rows_coded else 0
        of_rows = whole.rows_read * per_row + choosing
        return int(units * hot) * per_row, of_rows, of_codes, whole.values_read * value_bytes - of_codes


# Along which axis positions stand in what is said of each; all else is counted.
_BY_POSITION = {"out": 2, "lse": 2, "lse_by_source": 3}


def _joined(found: list[SegmentedAnswer]) -> SegmentedAnswer:
    """The answers for several positions as one; what is told of a position alone is left out."""
    first = found[0]
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(one, name) for one in found], dim=dim)
        for name, dim in _BY_POSITION.items()
        if getattr(first, name) is not None
    }
    counts: dict[str, Any] = {
        name: sum(getattr(one, name) for one in found) for name, value in first._asdict().items() if type(value) is int
    }
    return first._replace(**tensors, **counts)


def unread_share(lses: Tensor, whole: Tensor) -> Tensor:
    """What the error of an answer grows with, ``[B, Hq, m]``: the weight of what was not read, as a share of all."""
    return torch.exp(lses[2] - whole) + BY_SUMMARY * torch.exp(lses[3] - whole)
