"""Three stages: centroids choose lists, codes of their rows choose a sample, the sample is read exactly."""

import torch
from torch import Tensor

from ._contract import FULL, HALF, Answer
from ._sampling import priority_sample
from .retroinfer import ROWS_PER_LIST, ListOperator


class ThreeStages(ListOperator):
    """Lists of about 16, 4-bit codes of the probed lists' rows, a priority sample of the coded scores read exactly.

    A row's code is its key minus the list's centroid, rotated, in 4 bits a channel with a scale of its own. A sampled
    row weighs exp(its true logit) over its chance to be sampled, so what the code got wrong costs variance, not bias.
    Lists that were not probed answer by their summaries. The setting K is the rows sampled per KV head, out of the
    codes of 13 K (FIELD: 10 % of the rows coded, 0.8 % read at 32K).
    """

    paper = (
        "after Chen et al., RetroInfer, 2025, arXiv:2505.02922 (lists, summaries), Gao and Long, RaBitQ, 2024, "
        "arXiv:2405.12497 (rotated codes) and SoftmaxLift, 2026 (priority sampling)"
    )
    CODED_PER_READ = 13
    LEVELS = 7

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._rotation = self._coded = torch.zeros(0)

    def extend(self) -> None:
        """See Operator: seals rows and codes them."""
        super().extend()
        lists, dim = self.lists, self.keys.shape[2]
        if not self._rotation.numel():
            self._rotation = torch.linalg.qr(torch.randn(dim, dim, generator=self._generator)).Q
            self._coded = self.keys[:, :0]
        done = self._coded.shape[1]
        centroids = lists.key.gather(1, lists.home[:, done:, None].expand(-1, -1, dim))
        residuals = self.keys[:, lists.first + done : lists.stop] - centroids
        coded = centroids + four_bits(residuals @ self._rotation, self.LEVELS) @ self._rotation.T
        self._coded = torch.cat([self._coded, coded], dim=1)

    @property
    def most(self) -> int:
        """See Operator: every row."""
        return max(1, self.lists.stop - self.lists.first)

    def answer_from(self, query: Tensor, setting: int, logits: Tensor, order: Tensor) -> Answer:
        """See ListOperator."""
        lists = self.lists
        probed = min(order.shape[1], -(-setting * self.CODED_PER_READ // ROWS_PER_LIST))
        rows = lists.members(order[:, :probed])
        left = order[:, probed:]
        tail = [self.summary_state(logits, left)] if left.numel() else []
        # A head's rows are worth their share of all it attends to: what is exact, coded and left.
        place = (rows - lists.first).clamp(min=0)
        coded = self._coded.gather(1, place[..., None].expand(-1, -1, self._coded.shape[2]))
        scores = self.logits(query, coded).masked_fill(rows[:, None] < 0, float("-inf"))
        parts = [self.exact_lse(query), torch.logsumexp(scores, dim=-1), *(lse for _, lse in tail)]
        total = torch.logsumexp(torch.stack(parts), dim=0)
        worth = torch.logsumexp(scores - total[..., None], dim=1)
        noise = -torch.log(1 - torch.rand(worth.shape, generator=self._generator))
        places, log_weights = priority_sample(worth, noise, setting)
        sampled = torch.where(places >= 0, rows.gather(1, places.clamp(min=0)), -1)
        code_bytes = query.shape[3] / 2 + HALF
        # Of every list its centroid and size, of those that were not probed the mean value too.
        overhead = float((rows >= 0).sum()) * code_bytes + lists.key.numel() * HALF + lists.size.numel() * FULL
        overhead += left.numel() * lists.value.shape[2] * HALF
        return self.read(query, sampled, log_weights=log_weights, tail=tail, overhead=overhead)


def four_bits(rows: Tensor, levels: int) -> Tensor:
    """``rows [..., D]`` as a signed 4-bit integer per channel and a half-precision scale per row, decoded again."""
    scale = (rows.abs().amax(dim=-1, keepdim=True) / levels).half().float().clamp(min=1e-6)
    return torch.round(rows / scale).clamp(-levels, levels) * scale
