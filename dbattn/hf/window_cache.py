"""WindowCache: the rows of one window while it is read."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens of one forward pass over a window.
CHUNK = 1024


class WindowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A plain layer; no database, so nothing is indexed."""

    def newest(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the newest rows."""
        return self.keys[:, :, -rows:], self.values[:, :, -rows:]


class WindowCache(DynamicCache):  # type: ignore[misc]  # as above
    """A cache of WindowLayers for a wrapped model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers: list[WindowLayer] = [WindowLayer() for _ in range(len(self))]
