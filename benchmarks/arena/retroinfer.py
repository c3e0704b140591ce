"""RetroInfer: clusters read exactly, clusters estimated, clusters dropped."""

from abc import abstractmethod

import torch
from torch import Tensor

from ._contract import FULL, HALF, SINKS, Answer, Operator, State
from ._lists import Lists

ROWS_PER_LIST = 16


class ListOperator(Operator):
    """Rows in lists of about 16, clustered per segment of 8,192 rows; a setting reads so many lists per KV head."""

    def __init__(self) -> None:
        super().__init__()
        self.lists = Lists(ROWS_PER_LIST, segment_rows=8192)

    def extend(self) -> None:
        """See Operator: seals the rows that have left the window."""
        self.lists.extend(self.keys, self.values, SINKS, super().hot)

    @property
    def hot(self) -> int:
        """See Operator."""
        return min(super().hot, max(self.lists.stop, SINKS))

    @property
    def most(self) -> int:
        """See Operator: all lists."""
        return max(1, self.lists.size.shape[1])

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        if not self.lists.size.shape[1]:
            return self.read(query, self.lists.size)
        logits = self.logits(query, self.lists.key).masked_fill(self.lists.size[:, None] == 0, float("-inf"))
        return self.answer_from(query, setting, logits, self.rank(query, logits).argsort(dim=1, descending=True))

    @abstractmethod
    def answer_from(self, query: Tensor, setting: int, logits: Tensor, order: Tensor) -> Answer:
        """Answer with the centroids' ``logits [Hkv, G, L]`` (-inf: an empty list) and lists in ``order [Hkv, L]``."""

    def summary_state(self, logits: Tensor, which: Tensor) -> State:
        """The lists ``which [Hkv, p]`` by their summaries: each as its size in rows of its centroid and mean value.

        By Jensen the weight is too small: the rows' logits scatter around their mean's.
        """
        group = which[:, None].expand(-1, logits.shape[1], -1)
        weights = logits.gather(2, group) + self.lists.size.gather(1, which)[:, None].log()
        lse = torch.logsumexp(weights, dim=-1)
        shares = torch.exp(weights - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        values = self.lists.value.gather(1, which[..., None].expand(-1, -1, self.lists.value.shape[2]))
        return shares @ values, lse


class RetroInfer(ListOperator):
    """Lists in order of their centroids' logits: the first are read, the next 23 % answer by summary, others drop.

    The paper reads 1.8 % of the lists; here the setting says how many.
    """

    paper = (
        "Chen et al., RetroInfer: A Vector Storage Engine for Scalable Long-Context LLM Inference, 2025, "
        "arXiv:2505.02922"
    )
    ESTIMATED = 0.232

    def answer_from(self, query: Tensor, setting: int, logits: Tensor, order: Tensor) -> Answer:
        """See ListOperator."""
        lists = self.lists
        estimated = order[:, setting : setting + round(self.ESTIMATED * order.shape[1])]
        # Every centroid is scored; size and mean value are read of the estimated ones.
        overhead = lists.key.numel() * HALF + estimated.numel() * (FULL + HALF * lists.value.shape[2])
        tail = [self.summary_state(logits, estimated)] if estimated.numel() else []
        return self.read(query, lists.members(order[:, :setting]), tail=tail, overhead=overhead)
