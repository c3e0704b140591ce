"""The one contract that every operator of the arena fulfils, and the one rule by which bytes are counted.

**Bytes** are those that one decode step of one layer must read from what grows with the text, whatever code reads them:

- a row is its key and its value in the captures' element size (float32); a row that only lends its key counts half;
- a row read for one query head is read once for the whole group of its KV head;
- summaries (centroids, page bounds, means, pooled rows) count two bytes an element, since all of them are rounded to
  half precision here (dbattn's are 8 bits with a scale each, and counted so); running sums (kernel methods) count four;
  codes count their bits; a list of row ids counts four bytes an id;
- random matrices (rotations, hash planes, features) count nothing: like weights they are shared by all stores.

dbattn is measured by its own accounting (``AttentionDB.explain``), which is stricter in one point: flat, ivf and hnsw
search for every query head alone and count what each reads.

**Exact rows**: each operator reads the first 4 rows and the newest 64 exactly, unless its definition has rows of its
own. Rows that its structure does not hold yet (an incomplete page, say) are read exactly with the newest.

**Groups**: the query heads of a KV head share what is read for them, so operators without weights choose rows per KV
head, by the share of each head's softmax that a row or list has, summed over the heads; all heads attend to them. With
one query head per KV head this is each paper's own rule.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbattn.store import KVStore
from index_kernels import attend_rows, merge_states

SINKS, WINDOW = 4, 64
# Bytes of an element of a summary, of a running sum, and of a row id.
HALF, FULL, ID = 2, 4, 4

# Partial attention ``(out [Hkv, G, Dv], lse [Hkv, G])``; states over disjoint rows merge to attention over all.
State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Answer:
    """What an operator said to one query.

    Attributes:
        out: ``[1, Hq, 1, Dv]`` float32.
        rows_read: rows whose value was read, mean over query heads.
        bytes_read: of the whole call.
        bytes_if_free: the same without the reads that only served to choose rows, for an operator that scores every
            key to choose: what it would read if an oracle told it. None for the others.
        ids: rows read, ``[1, Hq, 1, n]`` int64, -1 = none; None where no row is read as a row.
        seconds: what answering alone took, for an operator that does more to tell what it read; None for the others.
    """

    out: Tensor
    rows_read: float
    bytes_read: float
    bytes_if_free: float | None = None
    ids: Tensor | None = None
    seconds: float | None = None

    @property
    def bytes_charged(self) -> float:
        """What a budget is compared with: selection that is only feasible for free is taken to be free."""
        return self.bytes_read if self.bytes_if_free is None else self.bytes_if_free


class Operator(ABC):
    """Attention of the newest position over rows that arrive in any number of calls; batch size 1.

    A subclass says how it answers at an integer ``setting`` from 1 to ``most``: rows, pages, lists, features. The
    larger, the more it reads. ``attend`` finds the setting that a budget pays for.

    Attributes:
        paper: authors, title, year and arXiv id.
        needs_training: the paper trains the model with the operator; here it runs on weights trained with softmax.
        patience: growth of the rows up to which a setting is kept; above 1 where it is built into a structure.
        implementation: "kernel" where compiled kernels do all the work; "torch" where they only aggregate rows.
    """

    paper: str
    needs_training = False
    implementation = "torch"
    patience = 1.0

    def __init__(self) -> None:
        self.rows: KVStore | None = None
        self._settings: dict[float, tuple[int, int]] = {}

    def fit(self, keys: Tensor, values: Tensor) -> None:
        """Append rows, ``[1, Hkv, n, D]`` and ``[1, Hkv, n, Dv]``; any n, any number of times."""
        if self.rows is None:
            self.rows = KVStore(keys.shape[1], keys.shape[3], values.shape[3])
        self.rows.append(keys, values)
        self.extend()

    def learn(self, queries: Tensor) -> None:  # noqa: B027 most have no use for them
        """Take note of ``queries [1, Hq, m, D]``: what the newest m positions asked."""

    def attend(self, query: Tensor, budget: float) -> Answer:
        """Answer ``query [1, Hq, 1, D]`` of the newest row for a share ``budget`` of a dense scan's bytes.

        Takes the largest setting that costs no more, or the smallest one where none does; it is found on the first
        query and kept until the rows have outgrown ``patience``.
        """
        if not self.has_setting(budget):
            self._settings[budget] = len(self), self._largest_within(query, budget * self.bytes_dense)
        return self.answer(query, self._settings[budget][1])

    def has_setting(self, budget: float) -> bool:
        """Whether ``attend`` need not look for the setting of this budget."""
        return len(self) <= self.patience * self._settings.get(budget, (0, 0))[0]

    @abstractmethod
    def answer(self, query: Tensor, setting: int) -> Answer:
        """Answer at a setting from 1 to ``most``."""

    def _largest_within(self, query: Tensor, allowed: float) -> int:
        """The largest setting that costs at most ``allowed`` bytes, 1 if none does."""
        # Doubling first: large settings take long, and most budgets are small.
        high = 1
        while high < self.most and self.cost(query, high) <= allowed:
            high = min(2 * high, self.most)
        low = high // 2 + 1
        return max(1, low - 1 + bisect_right(range(low, high + 1), allowed, key=lambda s: self.cost(query, s)))

    @property
    def most(self) -> int:
        """The largest setting; 1 for an operator that has no choice."""
        return 1

    def cost(self, query: Tensor, setting: int) -> float:
        """Bytes at a setting; found by answering unless the operator knows better."""
        return self.answer(query, setting).bytes_charged

    def extend(self) -> None:
        """Bring what is kept beside the rows up to the newest rows; called by ``fit``."""
        return  # some keep nothing

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    @property
    def keys(self) -> Tensor:
        """``[Hkv, T, D]``."""
        assert self.rows is not None
        return self.rows.keys[0]

    @property
    def values(self) -> Tensor:
        """``[Hkv, T, Dv]``."""
        assert self.rows is not None
        return self.rows.values[0]

    @property
    def hot(self) -> int:
        """Rows from this one on are read exactly."""
        return max(min(SINKS, len(self)), len(self) - WINDOW)

    @property
    def row_bytes(self) -> int:
        """Of a key and a value."""
        return self.key_bytes + self.values.shape[2] * self.values.element_size()

    @property
    def key_bytes(self) -> int:
        """Of a key."""
        return self.keys.shape[2] * self.keys.element_size()

    @property
    def bytes_dense(self) -> int:
        """What a scan of all rows reads."""
        return self.keys.shape[0] * len(self) * self.row_bytes

    def logits(self, query: Tensor, vectors: Tensor) -> Tensor:
        """Scaled products of ``query [1, Hq, 1, D]`` with ``vectors [Hkv, n, D]``: ``[Hkv, G, n]``."""
        grouped: Tensor = query.float().view(len(vectors), -1, query.shape[3]) * query.shape[3] ** -0.5
        return grouped @ vectors.transpose(1, 2)

    def exact_lse(self, query: Tensor) -> Tensor:
        """Log-sum-exp over the rows that are read in any case, ``[Hkv, G]``; they are read anyway, so it is free."""
        keys = torch.cat([self.keys[:, :SINKS], self.keys[:, self.hot :]], dim=1)
        return torch.logsumexp(self.logits(query, keys), dim=-1)

    def rank(self, query: Tensor, logits: Tensor) -> Tensor:
        """Log of what rows or lists of these ``logits [Hkv, G, n]`` are worth to a group's heads together: [Hkv, n].

        Each head values them by their share of its softmax, which counts the exact rows: a head whose mass lies there
        asks for little else. In logarithms, so that far tails do not underflow to ties.
        """
        total = torch.logaddexp(torch.logsumexp(logits, dim=-1), self.exact_lse(query))
        return torch.logsumexp(logits - total[..., None], dim=1)

    def read(
        self,
        query: Tensor,
        chosen: Tensor,
        *,
        log_weights: Tensor | None = None,
        tail: Sequence[State] = (),
        overhead: float = 0.0,
    ) -> Answer:
        """Attend to the sinks, the hot rows and the ``chosen`` ones, and count.

        Args:
            query: ``[1, Hq, 1, D]``.
            chosen: int64 ids from SINKS to ``hot``, -1 = none: ``[Hkv, n]`` for all heads of a group, or per query
                head ``[Hkv, G, n]``.
            log_weights: like ``chosen``, added to its logits.
            tail: states that stand for rows not read.
            overhead: bytes read beside the rows.
        """
        keys, values = self.keys[None], self.values[None]
        kv_heads, heads = keys.shape[1], query.shape[1]
        shape = (kv_heads, heads // kv_heads, -1)
        exact = torch.cat([torch.arange(min(SINKS, len(self))), torch.arange(self.hot, len(self))])
        ids = torch.cat([exact.expand(*shape), _per_head(chosen, *shape)], dim=-1).view(1, heads, 1, -1)
        weights = None
        if log_weights is not None:
            zeros = torch.zeros(*shape[:2], len(exact))
            weights = torch.cat([zeros, _per_head(log_weights, *shape)], dim=-1).view(ids.shape)
        states = [attend_rows(query, keys, values, ids=ids, log_weights=weights)]
        states += [(out.view(1, heads, 1, -1).float(), lse.view(1, heads, 1).float()) for out, lse in tail]
        out, _ = merge_states(torch.stack([s[0] for s in states]), torch.stack([s[1] for s in states]))
        rows = kv_heads * len(exact) + distinct(chosen, len(self))
        read = float((ids >= 0).sum()) / heads
        return Answer(out, read, rows * self.row_bytes + overhead, ids=ids)


def distinct(chosen: Tensor, rows: int) -> int:
    """Rows read for ``chosen [Hkv, n]`` or ``[Hkv, G, n]`` (-1 = none), each once per group; ``rows`` are stored."""
    if chosen.ndim == 2:
        return int((chosen >= 0).sum())
    flat = torch.where(chosen >= 0, chosen, rows).flatten(1)
    seen = torch.zeros(len(chosen), rows + 1, dtype=torch.bool).scatter_(1, flat, True)
    return int(seen[:, :rows].sum())


def ids_of(mask: Tensor, offset: int = 0) -> Tensor:
    """The ids of a mask's true elements: bool ``[..., n]`` -> int64 ``[..., most]`` plus ``offset``, padded with -1."""
    counts = mask.sum(dim=-1)
    most = int(counts.max()) if mask.numel() else 0
    # A stable sort of the mask puts its true elements first, in their order.
    order = mask.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
    return (order + offset).masked_fill(torch.arange(most) >= counts[..., None], -1)


def _per_head(x: Tensor, kv_heads: int, group: int, _: int) -> Tensor:
    return x[:, None].expand(kv_heads, group, -1) if x.ndim == 2 else x
