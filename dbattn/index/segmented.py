"""SegmentedIndex: rows sealed into segments of small lists, kept in the store itself.

The newest rows are hot and scanned exactly. Older rows form segments: k-means lists of about 32 rows under
super-lists of about 512, permuted in place so that each list is contiguous (attention does not mind the order of
rows; ``positions`` remembers it). Each list keeps a summary: mean key, mean value, size and variance; each row a 4-bit
code of its key less its list's mean. A query opens the lists whose rows would cost it most by summary alone, scores
their codes and reads the rows with the largest share of the softmax; the others of opened lists answer with the weight
of their code, all other lists by summary. Follows RetroInfer's wave index (segments, small lists, an estimation zone);
the codes as weights, the metric learnt from queries and the second-moment corrections are our own.
"""

import copy
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from index_kernels import LearntMetric, ListTable, seal_rows, top_k, unseal_rows
from index_kernels.packed import code_bytes
from index_kernels.summaries import Clustering

from ..config import RetrievalConfig
from ..query.call import Call
from ..query.plan import Step
from ..query.usage import Needs, Rates, Work, Workload
from ..store import KVStore, on_device, rows_at
from ._block_scan import ANEW, BLOCK, NEWEST, PER_LIST, PER_SUPER_LIST, PIECE, BlockScan
from ._calibration import Question, calibrate, question_of
from ._list_scan import ListScan, budget, list_work, needs_of, rows_scored, rows_wanted
from ._list_state import code_segment, load_segment, segment_state
from ._lists import NUMBERS_BYTES, ROWS_PER_LIST, ROWS_PER_SUPER_LIST, Lists, vector_bytes
from .base import Arrays, Candidates, KeyIndex

# Upper levels of the clustering are trained on every fourth row.
CLUSTERING = Clustering(ROWS_PER_SUPER_LIST, ROWS_PER_LIST, iterations=6, training_stride=4)
# Of the pieces of a prompt, which are sealed again when it has been read.
OF_PIECES = Clustering(PER_SUPER_LIST, PER_LIST, iterations=2, training_stride=4)
# Rows of a segment, large to small; two of one size merge into one of the next, as in an LSM tree.
SEGMENT_ROWS = tuple(128 << i for i in range(10, -1, -1))


# Kinds of calls whose calibration is kept.
KINDS = 8


def segment_bounds(rows: int) -> list[int]:
    """Where segments end among the first ``rows`` rows: as many large ones as fit, then smaller ones.

    A function of the number of rows alone, so that the structure does not depend on how they arrived.
    """
    bounds = [0]
    for size in SEGMENT_ROWS:
        while bounds[-1] + size <= rows:
            bounds.append(bounds[-1] + size)
    return bounds


class SegmentedIndex(KeyIndex):
    """Lists of every batch row and KV head, in arrays ``[B, Hkv, ...]`` that grow with the store."""

    name = "segmented"
    moves_rows = True
    searches_all = True
    block = BLOCK
    built_in = Rates(2.6e-4, 5e-8, 3e-11, 1.5e-11)
    typical = Work(1024, 1 << 19, 1 << 18)

    @classmethod
    def of(cls, config: RetrievalConfig) -> Self:
        """See KeyIndex."""
        return cls(config.window)

    @classmethod
    def hot(cls, config: RetrievalConfig, work: Workload) -> int:
        """See KeyIndex; the window is never sealed."""
        return work.indexed

    @classmethod
    def rows_asked(cls, config: RetrievalConfig, work: Workload) -> int:
        """See KeyIndex; what audits found or by size, where no k was asked for."""
        return budget(work.indexed, rows_wanted(config, work)).read

    @classmethod
    def covers(cls, config: RetrievalConfig, eligible: int) -> bool:
        """See KeyIndex."""
        return config.k is not None and config.k >= eligible

    @classmethod
    def asked(cls, config: RetrievalConfig, work: Workload) -> str:
        """See KeyIndex."""
        if config.k is not None:
            return f"k={config.k}"
        needs = needs_of(config, work)
        return "budget by size" if needs is None else f"budget for target_error={needs.target:g}"

    @classmethod
    def work(cls, config: RetrievalConfig, work: Workload) -> Work:
        """See KeyIndex; things scored are summaries, and codes as parts of one; the heads of a group share them."""
        return list_work(work, rows_wanted(config, work))

    @classmethod
    def operations_to_choose(cls, config: RetrievalConfig, work: Workload) -> float:
        """See KeyIndex; each head of a group multiplies the summaries and codes they share."""
        return rows_scored(work, rows_wanted(config, work)) * (work.heads // work.kv_heads) * work.dim

    @classmethod
    def rows_indexed(cls, config: RetrievalConfig, rows: int) -> int:
        """See KeyIndex."""
        return segment_bounds(max(0, rows - config.window))[-1]

    @classmethod
    def bytes_for(cls, config: RetrievalConfig, rows: int, dim: int) -> int:
        """See KeyIndex; lists and super-lists, positions, matrices of moments."""
        if not rows:
            return 0
        summaries = rows / ROWS_PER_LIST + rows / ROWS_PER_SUPER_LIST
        moments = 2 * dim * dim * (2 + 2 * (len(segment_bounds(rows)) - 1))
        return int(summaries * (2 * vector_bytes(dim) + NUMBERS_BYTES)) + (4 + code_bytes(dim)) * rows + moments

    @classmethod
    def steps(cls, config: RetrievalConfig, work: Workload, own: Rates | None, scan: Rates | None) -> tuple[Step, ...]:
        """See KeyIndex; one step answers for all sources."""
        return (ListScan.of(config, work, cls.asked(config, work), own, scan),)

    @classmethod
    def sealed_before(cls, position: int, sealed: int) -> int:
        """See KeyIndex; whole pieces of what is not among the newest rows, after those sealed."""
        return sealed + max(0, position - position % BLOCK - NEWEST - sealed) // PIECE * PIECE

    @classmethod
    def block_steps(cls, config: RetrievalConfig, work: Workload, scan: Rates | None) -> tuple[Step, ...]:
        """See KeyIndex."""
        wanted = config.prefill == "lists" or (config.prefill == "auto" and config.max_error is None)
        return (BlockScan.of(config, work, scan),) if wanted else ()

    def __init__(self, window: int) -> None:
        _require_numba(or_a_gpu=True)
        self._window = window
        self._bounds = [0]
        # Segments before the first piece, while there are pieces.
        self._before_pieces = 0
        self._lists: Lists | None = None
        self._audited: dict[Question, Needs | None] = {}
        # What was found of the first ``_common`` rows, in lists since before a fork: one finds it for all.
        self._audited_in_common: dict[Question, Needs | None] = {}
        self._common = 0

    def __len__(self) -> int:
        return self._bounds[-1]

    def is_due(self, rows: int) -> bool:
        """See KeyIndex; where segments end follows from how many rows they hold."""
        return self.in_pieces or len(self) != max(rows - self._window, 0) // SEGMENT_ROWS[-1] * SEGMENT_ROWS[-1]

    def extend(self, store: KVStore, lo: Tensor) -> None:
        """See KeyIndex; seals what is due, merging smaller segments into larger ones."""
        target = segment_bounds(max(len(store) - self._window, 0))
        keep = self._shared_segments(target)
        if keep + 1 < len(self._bounds):
            self._unseal(store, lo, keep)
        if keep + 1 < len(target):
            self._seal(store, lo, keep, target)
        self.in_pieces = False

    def kept_before(self, position: int) -> int:
        """See KeyIndex; segments that end before its newest rows, but not a few that a prompt's first queries made."""
        if not self.in_pieces and len(self) <= ANEW:
            return 0
        return max(stop for stop in self._bounds if stop <= max(0, position - NEWEST))

    def seal_before(self, store: KVStore, lo: Tensor, position: int) -> None:
        """See KeyIndex; in pieces of one size, however many there are: ``extend`` seals them again as segments."""
        last = self._bounds[-1]
        more = range(last + PIECE, self.sealed_before(position, last) + 1, PIECE)
        if more:
            # By the queries just before the block, which is what will be asked: a prompt's first queries mislead.
            whole = len(self._bounds) - 1
            self._before_pieces = min(self._before_pieces, whole) if self.in_pieces else whole
            self._seal(store, lo, whole, [*self._bounds, *more], how=OF_PIECES, asked=position)
            self.in_pieces = True

    def unseal_after(self, store: KVStore, lo: Tensor, position: int) -> None:
        """See KeyIndex; segments that end among its newest rows, of which sealing will make pieces."""
        self._unseal(store, lo, self._bounds.index(self.kept_before(position)))

    def _seal(
        self, store: KVStore, lo: Tensor, keep: int, target: list[int], *, how: Clustering = CLUSTERING, asked: int = 0
    ) -> None:
        """Make segments that end at ``target[keep + 1:]`` after the first ``keep``, which stay.

        They learn from the queries before their ends, or before row ``asked`` where that is later.
        """
        keys, values = store.buffers
        if not on_device(store.start):
            _require_numba()
        if self._lists is None:
            self._lists = Lists(keys.shape[0], store.num_kv_heads, store.head_dim, store.value_dim)
        lists = self._lists
        lists.reserve(target, keys.shape[2], per_super=how.rows_per_super_list, per_list=how.rows_per_list)
        store.touch(target[keep])
        learnt = _learnt(store, [max(stop, asked) for stop in target[keep + 1 :]])
        self.learnt = bool(learnt.holds.any())
        seal_rows(
            keys, values, lists.positions, lists.codes, target[keep:], keep, how, learnt, lists.lists,
            lists.supers, lists.segments, start=lo, coded=how is CLUSTERING,
        )  # fmt: skip
        self._bounds = target
        lists.settle(len(target) - 1)

    def calibrate(self, call: Call) -> bool:
        """See KeyIndex; anew where the leading segments are others, or for calls of another kind."""
        asked = question_of(call, self._bounds)
        if asked is None:
            return False
        audited = self._audited_in_common if asked.rows <= self._common else self._audited
        try:
            found = audited[asked]
        except KeyError:
            assert self._lists is not None
            found = calibrate(call, asked, self._lists.table_of(self._bounds.index(asked.rows)))
            if len(audited) >= KINDS:
                audited.clear()
            audited[asked] = found
        before, self.needs = self.needs, found
        return self.needs != before

    def search(
        self, query: Tensor, store: KVStore, k: int, lo: Tensor, stop: int, lift: float | None = None
    ) -> Candidates:
        """See KeyIndex; exact: lists answer by summary as well, so those left unread may hold the best row. No lift."""
        assert self._lists is not None
        positions = torch.from_numpy(self._lists.positions[:, :, : len(self)]).to(query.device).long()
        places = positions.argsort(dim=-1)[:, :, :stop]
        keys = rows_at(store.rows[0], places)
        rows, _ = top_k(query, keys, k, scale=1.0, start=lo)
        group = query.shape[1] // store.num_kv_heads
        found = places.repeat_interleave(group, dim=1)[:, :, None].expand(-1, -1, query.shape[2], -1)
        ids = torch.where(rows >= 0, found.gather(-1, rows.clamp(min=0)), rows)
        return Candidates(ids, keys.numel() * keys.element_size())

    def positions(self, slots: Tensor) -> Tensor:
        """Row positions of places in the store, ``[B, Hq, m, n]``; -1 stays -1."""
        if self._lists is None:
            return slots
        table = torch.from_numpy(self._lists.positions).to(slots.device)
        group = slots.shape[1] // table.shape[1]
        b = torch.arange(slots.shape[0], device=slots.device)[:, None, None, None]
        h = (torch.arange(slots.shape[1], device=slots.device) // group)[:, None, None]
        # The table may be shorter than the store: hot rows stand at their positions and are not looked up.
        found = table[b, h, slots.clamp(0, table.shape[2] - 1)].long()
        return torch.where((slots < 0) | (slots >= len(self)), slots, found)

    def release(self, store: KVStore, lo: Tensor) -> None:
        """Put all rows back in the order of their positions; the next extend seals them again."""
        self._unseal(store, lo, 0)
        self.in_pieces = False

    def truncate(self, store: KVStore, length: int, lo: Tensor) -> None:
        """See KeyIndex; segments that the shorter store would not have become hot again."""
        self._unseal(store, lo, self._shared_segments(segment_bounds(max(length - self._window, 0))))
        self.in_pieces = False
        if not length:
            self._lists = None  # the next rows may come in another batch size

    def fork(self, rows: int) -> Self:
        """See KeyIndex; the lists are shared as the rows are, and so is what audits find of these rows."""
        if self._common != len(self):
            found = {**self._audited_in_common, **self._audited}
            self._audited, self._audited_in_common, self._common = {}, found, len(self)
        twin = copy.copy(self)
        twin._audited = {}
        if self._lists is not None:
            twin._lists = self._lists.fork(len(self._bounds) - 1, len(self), rows)
        return twin

    def select(self, batch: Tensor) -> None:
        """See KeyIndex."""
        self._forget_audits()
        if self._lists is not None:
            self._lists = self._lists.select(batch.cpu().numpy())

    def _forget_audits(self) -> None:
        self._audited, self._audited_in_common, self._common = {}, {}, 0

    @property
    def bounds(self) -> list[int]:
        """See KeyIndex; where segments end."""
        return list(self._bounds)

    def state(self, first: int, stop: int) -> Arrays:
        """See KeyIndex; a segment's lists."""
        assert self._lists is not None
        return segment_state(self._lists, self._bounds.index(first), first, stop)

    def load_state(self, store: KVStore, lo: Tensor, first: int, stop: int, state: Arrays) -> None:
        """See KeyIndex."""
        target = segment_bounds(stop)
        if target != [*self._bounds, stop] or stop > len(store) - self._window:
            raise ValueError(f"rows {first} to {stop} are not a segment after {self._bounds} within {len(store)} rows")
        if self._lists is None:
            self._lists = Lists(len(lo), store.num_kv_heads, store.head_dim, store.value_dim)
        coded = load_segment(self._lists, target, len(store), lo.cpu().numpy(), state)
        self._bounds = target
        if not coded:
            code_segment(self._lists, store, first, stop)
        self.learnt = store.sample is not None and bool(store.sample.tells(stop, store.start).any())

    @property
    def nbytes(self) -> int:
        """See KeyIndex; the part in use."""
        return 0 if self._lists is None else self._lists.nbytes(len(self), len(self._bounds) - 1)

    @property
    def own_nbytes(self) -> int:
        """See KeyIndex."""
        return 0 if self._lists is not None and self._lists.is_shared else self.nbytes

    def describe(self) -> dict[str, Any]:
        """See KeyIndex."""
        lists = 0 if self._lists is None else int(self._lists.lists.used[0, 0])
        return {"index": self.name, "rows": len(self), "segments": len(self._bounds) - 1, "lists": lists}

    @property
    def table(self) -> ListTable:
        """The lists as the kernels take them."""
        assert self._lists is not None
        return self._lists.table

    def _shared_segments(self, target: list[int]) -> int:
        """How many leading segments the present and the target bounds share; pieces are none."""
        shared, whole = 0, self._before_pieces if self.in_pieces else len(self._bounds) - 1
        for ours, theirs in zip(self._bounds[1 : whole + 1], target[1:], strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared

    def _unseal(self, store: KVStore, lo: Tensor, keep: int) -> None:
        """Return the segments after the first ``keep`` to hot rows in the order of their positions."""
        if keep + 1 >= len(self._bounds):
            return
        assert self._lists is not None
        store.touch(self._bounds[keep])
        unseal_rows(*store.buffers, self._lists.positions, self._bounds[keep:], start=lo)
        self._bounds = self._bounds[: keep + 1]
        self._forget_audits()
        self.needs = None
        self._lists.keep_segments(keep)

    @property
    def summary_bytes(self) -> int:
        """Bytes of one list's summary, its mean value included."""
        assert self._lists is not None
        return self._lists.summary_bytes


def _learnt(store: KVStore, stops: list[int]) -> LearntMetric:
    """What each segment is clustered by, as far as the store's queries before its row of ``stops`` tell."""
    batch, heads, count = len(store.start), store.num_kv_heads, len(stops)
    if store.sample is None:
        return LearntMetric(np.zeros((count, batch, heads, 0, 0), np.float32), np.zeros((count, batch), np.bool_))
    found = [store.sample.metric(stop, store.start, heads) for stop in stops]
    return LearntMetric(*(torch.stack(parts).numpy() for parts in zip(*found, strict=True)))


def _require_numba(*, or_a_gpu: bool = False) -> None:
    """Rows on a GPU are sealed there, and need none."""
    if find_spec("numba") is None and not (or_a_gpu and torch.cuda.is_available()):
        raise ImportError('index="segmented" needs Numba: pip install "dbattn[cpu]"; index="flat" works without it')
