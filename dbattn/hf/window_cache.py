"""WindowCache: the rows of one window while it is read, and the queries that they were asked."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens of one forward pass over a window.
CHUNK = 1024


class WindowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A plain layer that also keeps the queries ``[B, Hq, n, D]`` of its rows; no database, so nothing is indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Tensor] = []

    def rows(self, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and queries from position ``first`` on; queries are None where attention was not dbattn's."""
        queries = torch.cat(self.queries, dim=2)[:, :, first:] if self.queries else None
        return self.keys[:, :, first:], self.values[:, :, first:], queries


class WindowCache(DynamicCache):  # type: ignore[misc]  # as above
    """A cache of WindowLayers for a wrapped model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers: list[WindowLayer] = [WindowLayer() for _ in range(len(self))]
