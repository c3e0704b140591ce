"""KeyIndex: what every index over the keys of one store can do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

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
    """

    name: str
    # Whether rows stand permuted inside the runs that ``bounds`` marks.
    moves_rows = False
    # Whether ``search`` scores every row that it may find.
    searches_all = False

    @abstractmethod
    def __len__(self) -> int:
        """Rows ``[0, len)`` of the store are answered for; later rows are hot."""

    @abstractmethod
    def extend(self, store: KVStore, lo: Tensor) -> None:
        """Take in the store's rows that are not indexed yet, as many as fill whole blocks."""

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
