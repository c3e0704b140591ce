"""What is timed to measure rates: an index as it is asked, and a store of given rows."""

from typing import ClassVar, Protocol, Self

import torch

from ..config import RetrievalConfig
from ..store import KVStore
from .call import RowIndex
from .plan import Step
from .usage import Needs, Rates, Work, Workload


class TimedIndex(RowIndex, Protocol):
    """What timing an index asks of its class; see ``index.KeyIndex``."""

    name: ClassVar[str]
    built_in: ClassVar[Rates]
    typical: ClassVar[Work]

    @classmethod
    def of(cls, config: RetrievalConfig) -> Self:
        """An empty index."""

    @classmethod
    def work(cls, config: RetrievalConfig, work: Workload) -> Work:
        """What it does for a call."""

    @classmethod
    def steps(cls, config: RetrievalConfig, work: Workload, own: Rates | None, scan: Rates | None) -> tuple[Step, ...]:
        """The steps that answer a call."""

    def extend(self, store: KVStore, lo: torch.Tensor) -> None:
        """Take in the store's rows."""


class NoIndex:
    """A store's index that holds nothing."""

    moves_rows = learnt = False
    needs: Needs | None = None

    def __len__(self) -> int:
        return 0

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """See RowIndex."""
        return slots


def store_of(keys: torch.Tensor, values: torch.Tensor) -> KVStore:
    """A store of rows ``[1, Hkv, n, D]``, without padding."""
    store = KVStore(keys.shape[1], keys.shape[3], values.shape[3])
    store.append(keys, values)
    store.set_start(store.start)
    return store
