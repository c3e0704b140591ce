"""Pages: runs of consecutive rows, chosen by what is kept of their keys."""

from abc import abstractmethod

import torch
from torch import Tensor

from ._contract import HALF, SINKS, Answer, Operator
from ._lists import half


class Pages(Operator):
    """Reads the best pages of ``page_rows`` rows; the setting is how many. A page that is not full is hot."""

    page_rows: int

    def __init__(self) -> None:
        super().__init__()
        self._kept = torch.zeros(0)

    @property
    def hot(self) -> int:
        """See Operator."""
        return min(super().hot, SINKS + self._pages * self.page_rows)

    @property
    def most(self) -> int:
        """See Operator: all pages."""
        return max(1, self._pages)

    @property
    def _pages(self) -> int:
        return self._kept.shape[1] if self._kept.ndim > 1 else 0

    def extend(self) -> None:
        """See Operator: summarises the pages that have become full and left the window."""
        done = SINKS + self._pages * self.page_rows
        stop = done + max(0, super().hot - done) // self.page_rows * self.page_rows
        if stop > done:
            new = half(self.summarise(self.keys[:, done:stop].unflatten(1, (-1, self.page_rows))))
            self._kept = torch.cat([self._kept, new], dim=1) if self._pages else new

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        if not self._pages:
            return self.read(query, torch.zeros(len(self.keys), 0, dtype=torch.int64))
        worth = self.rank(query, self.scores(query, self._kept))
        chosen = worth.topk(min(setting, self._pages), dim=1).indices
        rows = SINKS + chosen[..., None] * self.page_rows + torch.arange(self.page_rows)
        return self.read(query, rows.flatten(1), overhead=self._kept.numel() * HALF)

    @abstractmethod
    def summarise(self, pages: Tensor) -> Tensor:
        """What is kept of pages of keys ``[Hkv, P, page_rows, D]``: ``[Hkv, P, r, D]``."""

    @abstractmethod
    def scores(self, query: Tensor, kept: Tensor) -> Tensor:
        """How well pages suit each query head, ``[Hkv, G, P]``, on the scale of logits."""


class Quest(Pages):
    """Pages of 16 rows with the least and the largest element of each channel: an upper bound of their logits."""

    paper = "Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024, arXiv:2406.10774"
    page_rows = 16

    def summarise(self, pages: Tensor) -> Tensor:
        """See Pages: ``r`` is least, largest."""
        return torch.stack([pages.amin(dim=2), pages.amax(dim=2)], dim=2)

    def scores(self, query: Tensor, kept: Tensor) -> Tensor:
        """See Pages: each channel takes the bound that its sign asks for."""
        grouped = query.view(len(kept), -1, query.shape[3])
        # max(q * lo, q * hi), summed: the positive part of q meets the upper bound, the negative part the lower one.
        upper = self.logits(grouped.clamp(min=0).flatten(0, 1)[None, :, None], kept[:, :, 1])
        lower = self.logits(grouped.clamp(max=0).flatten(0, 1)[None, :, None], kept[:, :, 0])
        return upper + lower


class InfLLM(Pages):
    """Blocks of 128 rows with 4 representative keys each; a block's relevance is the sum of their logits.

    The paper represents a block by the keys that the following queries attend to most. A store sees keys only, so the
    block's own mean of the centred keys stands for those queries.
    """

    paper = "Xiao et al., InfLLM: Training-Free Long-Context Extrapolation for LLMs, 2024, arXiv:2402.04617"
    page_rows = 128
    REPRESENTATIVES = 4

    def summarise(self, pages: Tensor) -> Tensor:
        """See Pages: the representative keys themselves."""
        best = self.representative(pages).topk(self.REPRESENTATIVES, dim=2).indices
        return pages.gather(2, best[..., None].expand(-1, -1, -1, pages.shape[3]))

    def representative(self, pages: Tensor) -> Tensor:
        """How representative each key of a block is, ``[Hkv, P, page_rows]``."""
        centred = pages - self.keys.mean(dim=1)[:, None, None]
        return (centred @ centred.mean(dim=2, keepdim=True).transpose(2, 3))[..., 0]

    def scores(self, query: Tensor, kept: Tensor) -> Tensor:
        """See Pages: the mean of the representatives' logits, which orders blocks as the sum does."""
        logits: Tensor = self.logits(query, kept.flatten(1, 2)).unflatten(-1, (-1, self.REPRESENTATIVES))
        return logits.mean(dim=-1)
