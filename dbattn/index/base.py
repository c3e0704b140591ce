"""KeyIndex: what every index over the keys of one store can do."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from ..config import RetrievalConfig
from ..query.call import Call
from ..query.plan import Step
from ..query.usage import Needs, Rates, Work, Workload
from ..store import KVStore

Arrays = dict[str, np.ndarray[Any, Any]]
# Rows enter an index in blocks that end at multiples of this, so that an index is a function of its rows alone and
# not of the chunks they came in. Rows after the last full block are hot: they are scanned exactly.
BLOCK = 256


@dataclass(frozen=True)
class Candidates:
    """Rows an index chose: ids ``[B, Hq, m, k]`` int64 (-1 = none), and the bytes it read to choose them."""

    ids: Tensor
    bytes_read: int


class KeyIndex(ABC):
    """One index per batch row and KV head over the keys of one store.

    ``lo [B]`` is the first row of each batch row that the index answers for: earlier rows are padding or sinks.

    Attributes:
        name: as ``RetrievalConfig.index`` names it.
        moves_rows: whether rows stand permuted inside the runs that ``bounds`` marks.
        learnt: whether what was built last was built by what queries told.
        needs: the budget that ``calibrate`` found.
        searches_all: whether ``search`` scores every row that it may find.
        block: positions of a prompt that it reads together, see ``block_steps``; 0: it reads none.
        in_pieces: whether rows were sealed as a prompt was read, and wait to be merged by ``extend``.
        built_in: its rates on two cores of an AMD EPYC (Zen 5), for where nothing can be measured.
        typical: the work of a call over 8K rows: where measured rates make that far slower than the built-in ones,
            other processes disturbed the measurement.
    """

    name: ClassVar[str]
    moves_rows = False
    learnt = False
    needs: Needs | None = None
    searches_all = False
    block: ClassVar[int] = 0
    in_pieces = False
    built_in: ClassVar[Rates]
    typical: ClassVar[Work]

    @classmethod
    @abstractmethod
    def of(cls, config: RetrievalConfig) -> Self:
        """An empty index as a config wants it."""

    @classmethod
    @abstractmethod
    def work(cls, config: RetrievalConfig, work: Workload) -> Work:
        """What it is expected to do for a call."""

    @classmethod
    @abstractmethod
    def steps(cls, config: RetrievalConfig, work: Workload, own: Rates | None, scan: Rates | None) -> tuple[Step, ...]:
        """The steps that answer a call, rows outside the index included, with estimates at its rates and a scan's."""

    @classmethod
    @abstractmethod
    def operations_to_choose(cls, config: RetrievalConfig, work: Workload) -> float:
        """Multiply-adds over what it scores for a call."""

    @classmethod
    @abstractmethod
    def rows_indexed(cls, config: RetrievalConfig, rows: int) -> int:
        """How many of so many rows in a store ``extend`` takes in."""

    @classmethod
    @abstractmethod
    def bytes_for(cls, config: RetrievalConfig, rows: int, dim: int) -> int:
        """Bytes of one KV head's index over ``rows`` rows of keys and values of ``dim`` numbers; see ``nbytes``."""

    @classmethod
    def sealed_before(cls, position: int, sealed: int) -> int:
        """Rows in lists when a prompt's block at ``position`` is read, where the first ``sealed`` are so already."""
        return sealed

    @classmethod
    def block_steps(cls, config: RetrievalConfig, work: Workload, scan: Rates | None) -> tuple[Step, ...]:
        """The steps that answer a prompt's block, estimated at a scan's rates; none where the config wants none."""
        return ()

    def kept_before(self, position: int) -> int:
        """Rows that stay in lists when a prompt's block at ``position`` is read, before ``seal_before``."""
        return len(self)

    def seal_before(self, store: KVStore, lo: Tensor, position: int) -> None:
        """Seal what a prompt's block at ``position`` is to find in lists; nothing is merged before ``extend``."""
        return  # most indexes read no blocks

    def unseal_after(self, store: KVStore, lo: Tensor, position: int) -> None:
        """Put back the rows that a prompt's block at ``position`` must find in the order of their positions."""
        return

    @classmethod
    def hot(cls, config: RetrievalConfig, work: Workload) -> int:
        """Rows from here on are scanned exactly: the window of the oldest query, and all that is not indexed yet."""
        return max(0, min(work.rows - work.queries - config.window + 1, work.indexed))

    @classmethod
    def rows_asked(cls, config: RetrievalConfig, work: Workload) -> int:
        """Rows that the budget reads per KV head."""
        return config.rows_retrieved

    @classmethod
    def covers(cls, config: RetrievalConfig, eligible: int) -> bool:
        """Whether the budget asked for covers ``eligible`` rows, all there are."""
        return config.rows_retrieved >= eligible

    @classmethod
    def asked(cls, config: RetrievalConfig, work: Workload) -> str:
        """The budget in words, without numbers that change from call to call."""
        return f"k={config.rows_retrieved}"

    @abstractmethod
    def __len__(self) -> int:
        """Rows ``[0, len)`` of the store are answered for; later rows are hot."""

    def is_due(self, rows: int) -> bool:
        """Whether ``extend`` would change anything for a store of so many rows; True where that is not known."""
        return True

    @abstractmethod
    def extend(self, store: KVStore, lo: Tensor) -> None:
        """Take in the store's rows that are not indexed yet, as many as fill whole blocks."""

    def calibrate(self, call: Call) -> bool:
        """Find what budget calls like this one need, where that may have changed; returns whether ``needs`` did."""
        return False  # most indexes have no budget of their own

    @abstractmethod
    def search(
        self, query: Tensor, store: KVStore, k: int, lo: Tensor, stop: int, lift: float | None = None
    ) -> Candidates:
        """The k rows of ``lo[b] <= id < stop`` with the largest ``q.k``, as far as the index finds them.

        query ``[B, Hq, m, D]``, ``stop <= len(self)``. With ``lift`` the largest ``q.k + lift * noise`` are sought,
        where noise is the row's own (see store.exponential_noise): priority sampling.
        """

    @abstractmethod
    def truncate(self, store: KVStore, length: int, lo: Tensor) -> None:
        """Forget the rows from ``length`` on, before the store does; the rest answers as if they had never come."""

    @abstractmethod
    def select(self, batch: Tensor) -> None:
        """Keep the batch rows ``batch [B']``; an index may repeat."""

    def fork(self, rows: int) -> Self:
        """The same index for a fork of its store, with room for ``rows`` rows; neither sees the other's later ones."""
        return copy.deepcopy(self)  # most indexes hold little beside the rows, or share it among copies

    def positions(self, slots: Tensor) -> Tensor:
        """Row positions of places in the store, ``[B, Hq, m, n]``: the same, unless the index moves rows."""
        return slots

    def release(self, store: KVStore, lo: Tensor) -> None:
        """Put moved rows back in the order of their positions, for code that cannot do without it."""
        return  # most indexes move none

    @property
    def bounds(self) -> list[int]:
        """``[0, ..., len(self)]``: the runs of rows that have a state of their own."""
        return [0, len(self)] if len(self) else [0]

    @abstractmethod
    def state(self, first: int, stop: int) -> Arrays:
        """What was built from the rows ``first .. stop``, a run, and would take long to build again; for a snapshot."""

    @abstractmethod
    def load_state(self, store: KVStore, lo: Tensor, first: int, stop: int, state: Arrays) -> None:
        """Take in the next run, as ``state`` gave it; after it, the index answers bit for bit like the one saved.

        ``state`` may come from anyone: it is checked so far that no search reads or writes outside the index.

        Raises:
            ValueError: arrays that are not the state of such a run; names the array.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held beside the store's rows."""

    @property
    def own_nbytes(self) -> int:
        """The part of them that is not shared with forks."""
        return self.nbytes

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was built, as plain data for reports."""


def expect(state: Arrays, name: str, dtype: Any, *shape: int | None) -> np.ndarray[Any, Any]:
    """Take the array ``name`` out of ``state``; raises ValueError unless it has this dtype and shape (None: any)."""
    array = state.pop(name, None)
    if array is None:
        raise ValueError(f"{name} is missing")
    fits = len(array.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} [{wanted}]")
    return array


def expect_no_more(state: Arrays) -> None:
    """Raise ValueError if arrays are left in ``state``."""
    if state:
        raise ValueError(f"{next(iter(state))} is not part of it")


def require_faiss() -> Any:
    """Import faiss, or say which extra brings it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'this index needs FAISS: pip install "dbattn[cpu]", or "dbattn[gpu]" on a GPU machine; '
            'index="flat" works without it'
        ) from error
    return faiss
