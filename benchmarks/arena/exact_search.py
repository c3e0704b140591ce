"""Operators that score every key to choose rows; what they would read were the choice free is counted beside."""

from dataclasses import replace

import torch
from torch import Tensor

from dbattn.store import exponential_noise

from ._contract import SINKS, Answer, Operator, distinct
from ._sampling import priority_sample


class ExactSearch(Operator):
    """Scores all keys; the setting is how many rows it then reads."""

    @property
    def most(self) -> int:
        """See Operator."""
        return max(1, self.hot - SINKS)

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator: a chosen row's key has been read already, so only its value is added to the scan of keys."""
        keys = self.keys[:, SINKS : self.hot]
        chosen, log_weights = self.choose(query, self.logits(query, keys), min(setting, keys.shape[1]))
        found = self.read(query, torch.where(chosen >= 0, chosen + SINKS, -1), log_weights=log_weights)
        unread = keys.shape[0] * keys.shape[1] - distinct(chosen, len(self))
        return replace(found, bytes_read=found.bytes_read + unread * self.key_bytes, bytes_if_free=found.bytes_read)

    def choose(self, query: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Places in ``logits [Hkv, G, n]`` and their log-weights: ``[Hkv, k]`` for a group or ``[Hkv, G, k]``."""
        raise NotImplementedError


class TopK(ExactSearch):
    """The rows with the largest logits: the oracle of everything that reads rows and drops the rest."""

    paper = "Gupta et al., Memory-efficient Transformers via Top-k Attention, 2021, arXiv:2106.06899"

    def choose(self, query: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """See ExactSearch."""
        return self.rank(query, logits).topk(count, dim=1).indices, None


class VAttention(ExactSearch):
    """Half the rows by exact top-k, half a uniform sample of the others, weighted by the inverse of their chance.

    The paper lets (epsilon, delta) set the sample's size by the central limit theorem; here the bytes do.
    """

    paper = "Desai et al., vAttention: Verified Sparse Attention, 2025, arXiv:2510.05688"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, query: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """See ExactSearch."""
        heads, _, rows = logits.shape
        heavy = count if count == rows else (count + 1) // 2
        order = self.rank(query, logits).argsort(dim=1, descending=True)
        top, rest = order[:, :heavy], order[:, heavy:]
        drawn = torch.rand(rest.shape, generator=self._generator).topk(count - heavy, dim=1).indices
        weights = torch.zeros(heads, count)
        if count > heavy:
            weights[:, heavy:] = torch.tensor(rest.shape[1] / (count - heavy)).log()
        return torch.cat([top, rest.gather(1, drawn)], dim=1), weights


class SoftmaxLift(ExactSearch):
    """Top-(K+1) of logits lifted by each row's own noise: a priority sample of the softmax, drawn by a search.

    Per query head, as a search in an index of lifted keys would; the noise is drawn once per row. The paper also
    searches by FAISS IVF: that is ``dbattn ivf, sample``.
    """

    paper = "SoftmaxLift, 2026"

    def __init__(self) -> None:
        super().__init__()
        self._noise = torch.zeros(0)

    def extend(self) -> None:
        """See Operator: draws the new rows' noise."""
        known = self._noise.shape[-1]
        new = exponential_noise(len(self.keys), known, len(self), self.keys.device)
        self._noise = torch.cat([self._noise.view(len(new), known), new], dim=1)

    def choose(self, query: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """See ExactSearch."""
        noise = self._noise[:, None, SINKS : self.hot].expand_as(logits)
        return priority_sample(logits, noise, count)
