"""BlockScan: the step that reads a block of a prompt over a segmented store. Its positions share lists."""

from dataclasses import dataclass

import numpy as np

from index_kernels import BlockReading, attend_block, multiplies_halves
from index_kernels.lists import ASKING

from ..config import RetrievalConfig
from ..query.call import Call
from ..query.plan import Source, Step, StepAnswer
from ..query.steps import ExactRows
from ..query.usage import Rates, Usage, Workload
from ._list_scan import ALPHA, BETA, SegmentedStore
from ._lists import NUMBERS_BYTES, vector_bytes

# Positions that share lists; that many lose next to nothing against sixteen.
BLOCK = 512
# A prompt's rows are sealed in runs of so many, which are not merged while it is read; and so many of the newest rows
# are left unsealed before each block, for they matter to it most.
PIECE, NEWEST = 512, 256
# Rows of the lists and super-lists of such a run, which are shorter than those that decoding finds: no codes stand
# between the rows and the summary of a list.
PER_LIST, PER_SUPER_LIST = 8, 64
# So many rows are sealed anew when lists are first read for a prompt.
ANEW = 4096
# (sealed rows, rows of lists read per KV head), interpolated on log scales; swept on layers of SmolLM2.
ROWS = np.log(np.array([(2048, 288), (8192, 336), (32768, 768), (131072, 1472)]))
# Summaries of neighbours of the lists that are opened answer, for each row of these.
BESIDE = 0.3
# What a multiply-add of a block takes of a dense scan's, scoring lists to choose some included: in float32, and where
# a processor multiplies bfloat16 faster.
PRICE, PRICE_IN_HALVES = 1.0, 0.7


def rows_of_block(sealed: int, k: int | None, effort: float = 1.0) -> int:
    """Rows of lists that a block reads per KV head: by size times ``effort``, and at least ``k``."""
    by_size = int(effort * np.exp(np.interp(np.log(max(sealed, 1)), *ROWS.T)))
    return min(sealed, by_size if k is None else max(k, by_size))


@dataclass(frozen=True)
class BlockScan(Step):
    """Sinks and newest rows exactly, rows of the lists that cost a block most, all others by summary.

    Attributes:
        k: rows per KV head that were asked for; None: by size.
        tail: whether lists that are not read answer by their summary.
    """

    k: int | None = None
    tail: bool = True

    @classmethod
    def of(cls, config: RetrievalConfig, work: Workload, scan: Rates | None) -> "BlockScan":
        """The step with its estimates; the summaries' time is part of the list scan's."""
        read, lists = rows_of_block(work.indexed, config.k), work.indexed / PER_LIST
        tail = config.tail_name == "centroid"
        rest = min(lists, BESIDE * read + work.indexed / PER_SUPER_LIST) if tail else 0.0
        multiplied = read + rest + lists / ASKING
        # Rates are a CPU's; where all rows are read they are read as they stand.
        halves = scan is not None and read < work.eligible and multiplies_halves()
        price = PRICE_IN_HALVES if halves else PRICE
        seconds = None if scan is None else scan.call + price * scan.operation * work.operations(multiplied)
        each = work.row_bytes
        size = int(work.units * (read * each + lists * (vector_bytes(work.dim) + NUMBERS_BYTES)))
        detail = f"segmented, blocks of {BLOCK} positions share lists, {work.indexed} rows" + halves * ", as bfloat16"
        sources = [
            ExactRows.source(work, work.indexed, config.n_sink, scan),
            Source("list scan", detail, Usage(read, size, read / PER_LIST, seconds)),
        ]
        if tail:
            usage = Usage(0.0, int(work.units * rest) * vector_bytes(work.value_dim), rest)
            detail = "summaries of lists beside those opened, of super-lists elsewhere" + halves * ", as bfloat16"
            sources.append(Source("summary scan", detail, usage))
        return cls(tuple(sources), config.k, tail)

    def run(self, call: Call) -> StepAnswer:
        """See Step; the store's newest rows are the block's."""
        index: SegmentedStore = call.index  # type: ignore[assignment]  # no other index offers this step
        store, sealed, m = call.store, len(index), call.query.shape[2]
        units = call.query.shape[0] * store.num_kv_heads
        read = rows_of_block(sealed, self.k, call.effort) * store.num_kv_heads
        how = BlockReading(sealed, call.config.n_sink, read, call.scale, call.softcap, ALPHA, BETA, self.tail, True)
        # The kernel reads a row once for every tile of queries: rows in the host's memory are gathered first.
        backend = "reference" if store.host else "auto"
        found = attend_block(call.query, *store.rows, index.table, how, start=store.start, backend=backend)
        counts = found.rows_read, found.lists_opened, found.summaries_answering
        rows, opened, answering = (n / units for n in counts)
        hot = call.config.n_sink + len(store) - sealed - (m - 1) / 2
        per_row, mean_value = store.row_bytes, vector_bytes(store.value_dim)
        sizes = (
            int(units * (call.config.n_sink + len(store) - sealed)) * per_row,
            found.rows_read * per_row + found.summaries_read * (index.summary_bytes - mean_value),
            found.summaries_answering * mean_value,
        )
        answer = StepAnswer(
            found.out,
            found.lse,
            rows_read=rows + hot,
            rows_retrieved=rows,
            bytes_read=sum(sizes),
            tail="centroid" if self.tail else "none",
        )
        if not call.measure:
            return answer
        usages = (
            Usage(hot, sizes[0], 0.0, found.seconds[0]),
            Usage(rows, sizes[1], opened, found.seconds[1]),
            Usage(0.0, sizes[2], answering, found.seconds[2]),
        )
        lses = found.lse_by_source
        return answer._replace(
            usages=usages[: len(self.sources)], lses=lses[: len(self.sources)], exact_lse=lses[:2].logsumexp(dim=0)
        )
