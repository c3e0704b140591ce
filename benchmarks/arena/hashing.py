"""Hashing and clustering: a query reads the rows that fall into its own bucket."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._contract import HALF, ID, SINKS, Answer, Operator, ids_of
from ._lists import Lists


class Reformer(Operator):
    """Angular LSH: bucket = argmax of [xR, -xR]; a query attends to the rows that share its bucket in any round.

    The setting is the number of rounds (8 at most in the paper), of 512 buckets each: at the same bytes, more rounds of
    small buckets find more than few rounds of the paper's buckets of 64 rows. The paper shares queries and keys and
    trains with it; here they differ, so keys are centred, without which nearly all would fall into one bucket. Buckets
    are read whole, where the paper cuts them into chunks.
    """

    paper = "Kitaev et al., Reformer: The Efficient Transformer, 2020, arXiv:2001.04451"
    needs_training = True
    ROUNDS = 32

    def __init__(self, buckets: int = 512, seed: int = 0) -> None:
        super().__init__()
        self._rotations = torch.Generator().manual_seed(seed), buckets // 2
        self._mean: Tensor | None = None
        self._rounds: list[tuple[Tensor, Tensor]] = []

    @property
    def most(self) -> int:
        """See Operator."""
        return self.ROUNDS

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        grouped = query.view(len(self.keys), -1, query.shape[3])
        found, entries = torch.zeros(len(self.keys), self.hot - SINKS, dtype=torch.bool), 0.0
        for i in range(setting):
            rotation, codes = self._round(i, query.shape[3])
            same = codes[:, None, SINKS : self.hot] == bucket_of(grouped, rotation)[..., None]
            found |= same.any(dim=1)
            entries += float(same.sum())
        return self.read(query, ids_of(found, SINKS), overhead=ID * entries)

    def _round(self, i: int, dim: int) -> tuple[Tensor, Tensor]:
        """The rotation of a round and the buckets ``[Hkv, T]`` of all keys, hashed when first asked for."""
        if self._mean is None:
            self._mean = self.keys.mean(dim=1, keepdim=True)
        while len(self._rounds) <= i:
            generator, half = self._rotations
            self._rounds.append((torch.randn(dim, half, generator=generator), torch.zeros(len(self.keys), 0).long()))
        rotation, codes = self._rounds[i]
        new = [bucket_of(x - self._mean, rotation) for x in self.keys[:, codes.shape[1] :].split(4096, dim=1)]
        self._rounds[i] = rotation, torch.cat([codes, *new], dim=1)
        return self._rounds[i]


def bucket_of(rows: Tensor, rotation: Tensor) -> Tensor:
    """Bucket of each of ``rows [..., n, D]``, ``[..., n]``; rotation ``[D, buckets / 2]``, of which 0 is one bucket."""
    turned = rows @ rotation
    if not turned.shape[-1]:
        return torch.zeros(rows.shape[:-1], dtype=torch.int64)
    return torch.cat([turned, -turned], dim=-1).argmax(dim=-1)


class RoutingTransformer(Operator):
    """Spherical k-means with about sqrt(T) clusters; a query attends to the rows of the clusters nearest to it.

    The setting is how many clusters; the paper takes one, and trains the model with it.
    """

    paper = "Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, 2020, arXiv:2003.05997"
    needs_training = True

    def __init__(self) -> None:
        super().__init__()
        self._lists = Lists(rows_per_list=None, segment_rows=1 << 30)

    def extend(self) -> None:
        """See Operator."""
        self._lists.extend(self.keys, self.values, SINKS, super().hot)

    @property
    def hot(self) -> int:
        """See Operator."""
        return min(super().hot, max(self._lists.stop, SINKS))

    @property
    def most(self) -> int:
        """See Operator: all clusters."""
        return max(1, self._lists.size.shape[1])

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        lists = self._lists
        # Nearness of directions, as in the paper: queries and centroids both have unit length there.
        share = (lists.size / lists.size.sum(dim=1, keepdim=True))[..., None]
        mean = (share * lists.key).sum(dim=1, keepdim=True)
        nearness = self.logits(query, normalize(lists.key - mean, dim=-1)).amax(dim=1)
        nearness = nearness.masked_fill(lists.size == 0, float("-inf"))
        chosen = nearness.topk(min(setting, nearness.shape[1]), dim=1).indices
        return self.read(query, lists.members(chosen), overhead=lists.key.numel() * HALF)
