"""FlatIndex: exact search over every key. The yardstick for recall, and an ordinary member."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from index_kernels import floats, top_k

from ..config import RetrievalConfig
from ..query.usage import Rates, Work, Workload
from ..store import KVStore, exponential_noise
from ._scan import SearchIndex
from .base import Arrays, Candidates, expect_no_more


class FlatIndex(SearchIndex):
    """Scores every row with the top_k kernel; holds nothing of its own."""

    name = "flat"
    searches_all = True
    built_in = Rates(6e-4, 1.2e-7, 2.2e-10, 1.2e-11)
    typical = Work(1 << 14, 1 << 18, 1 << 16)

    def __init__(self) -> None:
        self._length = 0

    @classmethod
    def of(cls, config: RetrievalConfig) -> Self:
        """See KeyIndex."""
        return cls()

    @classmethod
    def rows_scored(cls, config: RetrievalConfig, work: Workload) -> float:
        """See SearchIndex; the heads of a group share the keys."""
        return work.units * work.queries * work.eligible * work.dim / 64

    @classmethod
    def operations_to_choose(cls, config: RetrievalConfig, work: Workload) -> float:
        """See KeyIndex; each head of a group multiplies the keys they share."""
        return super().operations_to_choose(config, work) * (work.heads // work.kv_heads)

    @classmethod
    def rows_indexed(cls, config: RetrievalConfig, rows: int) -> int:
        """See KeyIndex."""
        return rows

    @classmethod
    def bytes_for(cls, config: RetrievalConfig, rows: int, dim: int) -> int:
        """See KeyIndex."""
        return 0

    def __len__(self) -> int:
        return self._length

    def extend(self, store: KVStore, lo: Tensor) -> None:
        """See KeyIndex; every row is answered for at once."""
        self._length = len(store)

    def search(
        self, query: Tensor, store: KVStore, k: int, lo: Tensor, stop: int, lift: float | None = None
    ) -> Candidates:
        """See KeyIndex; exact."""
        keys = store.rows[0][:, :, :stop]
        rows = int((stop - lo).clamp(min=0).sum()) * keys.shape[1]
        size = rows * keys.shape[3] * keys.element_size()
        if lift is not None:
            noise = exponential_noise(keys.shape[1], 0, stop, keys.device)[None, :, :, None]
            keys = torch.cat([floats(keys), noise.expand(len(keys), -1, -1, -1)], dim=-1)
            query = pad(query.float(), (0, 1), value=lift)
        ids, _ = top_k(query, keys, k, scale=1.0, start=lo)
        return Candidates(ids, size)

    def truncate(self, store: KVStore, length: int, lo: Tensor) -> None:
        """See KeyIndex."""
        self._length = min(self._length, length)

    def select(self, batch: Tensor) -> None:
        """See KeyIndex; nothing is held per batch row."""

    def state(self, first: int, stop: int) -> Arrays:
        """See KeyIndex; there is none."""
        return {}

    def load_state(self, store: KVStore, lo: Tensor, first: int, stop: int, state: Arrays) -> None:
        """See KeyIndex."""
        expect_no_more(state)
        self._length = stop

    @property
    def nbytes(self) -> int:
        """See KeyIndex."""
        return 0

    def describe(self) -> dict[str, Any]:
        """See KeyIndex."""
        return {"index": self.name, "rows": self._length}
