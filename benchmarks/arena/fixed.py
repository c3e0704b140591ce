"""Fixed patterns: which rows are read depends on their positions alone."""

from abc import abstractmethod

import torch
from torch import Tensor

from ._contract import SINKS, Answer, Operator


class FixedPattern(Operator):
    """Reads the rows that a pattern names; the setting is how many beside the exact ones."""

    @property
    def most(self) -> int:
        """See Operator: all rows between the sinks and the window."""
        return max(1, self.hot - SINKS)

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        ids = self.pattern(min(setting, max(0, self.hot - SINKS)))
        return self.read(query, ids.expand(len(self.keys), -1))

    @abstractmethod
    def pattern(self, count: int) -> Tensor:
        """At most ``count`` ids from SINKS to ``hot``, each once."""


class StreamingLLM(FixedPattern):
    """Attention sinks and a window, the rest forgotten.

    Positions stay those of the text. The paper counts them within the cache, which matters beyond the trained length.
    """

    paper = "Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023, arXiv:2309.17453"

    def pattern(self, count: int) -> Tensor:
        """See FixedPattern: a wider window."""
        return torch.arange(self.hot - count, self.hot)


class Longformer(FixedPattern):
    """A sliding window, dilated or not, with global rows: the first ones, and one in 512, the paper's window."""

    paper = "Beltagy et al., Longformer: The Long-Document Transformer, 2020, arXiv:2004.05150"
    needs_training = True
    EVERY = 512

    def __init__(self, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation

    def pattern(self, count: int) -> Tensor:
        """See FixedPattern: global rows first, the window for what is left."""
        everywhere = torch.arange(SINKS, self.hot, self.EVERY)[:count]
        window = torch.arange(self.hot - 1, SINKS - 1, -self.dilation)
        window = window[~torch.isin(window, everywhere)]
        return torch.cat([everywhere, window[: count - len(everywhere)]]).sort().values


class BigBird(FixedPattern):
    """Global rows (the sinks), a window, and random blocks of 64 rows: as many random rows as window, as in the paper.

    Blocks are drawn once per 64 positions, as each block of queries has its own.
    """

    paper = "Zaheer et al., Big Bird: Transformers for Longer Sequences, 2020, arXiv:2007.14062"
    needs_training = True
    BLOCK = 64

    def pattern(self, count: int) -> Tensor:
        """See FixedPattern."""
        # The exact window counts as window, so it leaves more of a small budget to random blocks.
        drawn = min(count, (count + len(self) - self.hot) // 2)
        edge = self.hot - (count - drawn)
        blocks = torch.arange(SINKS, edge, self.BLOCK)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(len(self) // self.BLOCK))
        rows = (blocks[order, None] + torch.arange(self.BLOCK)).flatten()
        return torch.cat([rows[rows < edge][:drawn], torch.arange(edge, self.hot)]).sort().values
