"""FlatIndex: exact search over every key. The yardstick for recall, and an ordinary member."""

from typing import Any

from torch import Tensor

from index_kernels import top_k

from .base import Candidates, KeyIndex


class FlatIndex(KeyIndex):
    """Scores every row with the top_k kernel; holds nothing of its own."""

    name = "flat"

    def __init__(self) -> None:
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, keys: Tensor, lo: Tensor) -> None:
        """See KeyIndex; every row is answered for at once."""
        self._length = keys.shape[2]

    def search(self, query: Tensor, keys: Tensor, k: int, lo: Tensor, stop: int) -> Candidates:
        """See KeyIndex; exact."""
        ids, _ = top_k(query, keys[:, :, :stop], min(k, max(stop, 1)), scale=1.0, start=lo)
        rows = int((stop - lo).clamp(min=0).sum()) * keys.shape[1]
        return Candidates(ids, rows * keys.shape[3] * keys.element_size())

    def truncate(self, length: int) -> None:
        """See KeyIndex."""
        self._length = min(self._length, length)

    def select(self, batch: Tensor) -> None:
        """See KeyIndex; nothing is held per batch row."""

    @property
    def nbytes(self) -> int:
        """See KeyIndex."""
        return 0

    def describe(self) -> dict[str, Any]:
        """See KeyIndex."""
        return {"index": self.name, "rows": self._length}
