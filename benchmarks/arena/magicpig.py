"""MagicPIG: rows sampled by locality-sensitive hashing, weighted by the chance of their being sampled."""

import torch
from torch import Tensor

from ._contract import ID, SINKS, Answer, Operator, ids_of


class MagicPIG(Operator):
    """SimHash tables of K = 10 bits; a row that shares at least two buckets with the query is read.

    The setting is the number of tables L (150 and more in the paper). Keys are centred by the mean of the first rows
    that were fitted, as the paper does after prefill. A row's weight is the inverse of its chance to be read.
    """

    paper = "Chen et al., MagicPIG: LSH Sampling for Efficient LLM Generation, 2024, arXiv:2410.16179"
    BITS = 10
    TABLES = 300

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed
        self._planes = self._mean = self._codes = torch.zeros(0)
        self._counts: tuple[Tensor | None, int, Tensor] = None, 0, torch.zeros(0)

    @property
    def most(self) -> int:
        """See Operator."""
        return self.TABLES

    def extend(self) -> None:
        """See Operator: hashes the new rows."""
        keys = self.keys
        if not self._planes.numel():
            generator = torch.Generator().manual_seed(self._seed)
            self._planes = torch.randn(keys.shape[2], self.TABLES * self.BITS, generator=generator)
            self._mean = keys.mean(dim=1, keepdim=True)
            self._codes = torch.zeros(len(keys), 0, self.TABLES, dtype=torch.int16)
        new = [self._hash(part - self._mean) for part in keys[:, self._codes.shape[1] :].split(1024, dim=1)]
        self._codes = torch.cat([self._codes, *new], dim=1)

    def cost(self, query: Tensor, setting: int) -> float:
        """See Operator; buckets are compared once for all settings."""
        kept, length, counts = self._counts
        if kept is not query or length != len(self):
            mine = self._hash(query.view(len(self.keys), -1, query.shape[3]))
            same = [self._codes[:, SINKS : self.hot] == mine[:, g, None] for g in range(mine.shape[1])]
            counts = torch.stack([each.cumsum(dim=-1, dtype=torch.int16) for each in same], dim=1)
            self._counts = query, len(self), counts
        shared = counts[..., setting - 1]
        rows = len(self.keys) * (len(self) - self.hot + SINKS) + int((shared >= 2).any(dim=1).sum())
        return rows * self.row_bytes + ID * float(shared.sum())

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        grouped = query.view(len(self.keys), -1, query.shape[3])
        mine = self._hash(grouped)[..., :setting]
        theirs = self._codes[:, SINKS : self.hot, :setting]
        shared = torch.stack([(theirs == mine[:, g, None]).sum(dim=-1) for g in range(mine.shape[1])], dim=1)
        ids = ids_of(shared >= 2, SINKS)
        heads = torch.arange(len(ids))[:, None, None]
        cosine = torch.cosine_similarity(
            grouped[:, :, None], self.keys[heads, ids.clamp(min=0)] - self._mean[:, None], -1
        )
        weights = -torch.log(chance(cosine, self.BITS, setting)).float()
        return self.read(query, ids, log_weights=weights, overhead=ID * float(shared.sum()))

    def _hash(self, rows: Tensor) -> Tensor:
        """Codes ``[..., n, TABLES]`` int16 of ``rows [..., n, D]``: the signs of BITS products each."""
        signs: Tensor = (rows @ self._planes > 0).unflatten(-1, (self.TABLES, self.BITS))
        return (signs * 2 ** torch.arange(self.BITS)).sum(dim=-1).short()


def chance(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """Chance to meet a row at this cosine in at least two tables; float64, and above 0 where it underflows."""
    meets = (1 - torch.arccos(cosine.double().clamp(-1, 1)) / torch.pi).pow(bits)
    # 1 - (1 - p)^L - L p (1 - p)^(L - 1), arranged so that a small p does not cancel.
    misses = (tables - 1) * torch.log1p(-meets) + torch.log1p((tables - 1) * meets)
    return -torch.expm1(misses.clamp(max=0.0)).clamp(max=-1e-300)
