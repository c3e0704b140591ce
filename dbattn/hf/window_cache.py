"""Caches that a window is read in, and a question about windows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens of one forward pass over a window.
CHUNK = 1024


class WindowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A plain layer, with the rows of one window while it is read; no database, so nothing is indexed."""

    def newest(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the newest rows."""
        return self.keys[:, :, -rows:], self.values[:, :, -rows:]


class CandidateLayer(WindowLayer):
    """A layer that lets a question see rows which are fetched when it comes to this layer, and not kept."""

    def __init__(self, rows: int, fetch: Callable[[torch.dtype], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._rows, self._fetch = rows, fetch

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The rows and, after them, the question's, which are forgotten."""
        keys, values = self._fetch(key_states.dtype)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self) -> int:
        """Rows before the question."""
        return self._rows


class WindowCache(DynamicCache):  # type: ignore[misc]  # as above
    """A cache of WindowLayers for a wrapped model."""

    def __init__(self, config: Any, layers: list[WindowLayer] | None = None) -> None:
        super().__init__(config=config)
        self.layers: list[WindowLayer] = [WindowLayer() for _ in range(len(self))] if layers is None else layers
