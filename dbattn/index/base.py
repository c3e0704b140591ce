"""KeyIndex: what every index over the keys of one store can do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..store import KVStore

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
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held beside the store's rows."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was built, as plain data for reports."""


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
