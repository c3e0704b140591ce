"""Call: a query to one store, checked, with all that shapes its answer."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..config import RetrievalConfig
from ..store import KVStore, RowSource, StateSource, check_queries, check_range, on_device
from .usage import Needs, Workload


class RowIndex(Protocol):
    """What a call knows of its index; ``index.KeyIndex`` is all of it."""

    moves_rows: bool
    learnt: bool
    needs: Needs | None

    def __len__(self) -> int:
        """Rows below this are in the index."""

    def positions(self, slots: Tensor) -> Tensor:
        """Row positions of places in the store."""


@dataclass(slots=True)
class Call:
    """The m newest positions of a store ask.

    Attributes:
        query: ``[B, Hq, m, D]``, turned as the store's rows are (``KVStore.turn``), and so is the answer.
        scale, softcap: of the logits.
        extra: rows of other origin, or a state, that the answer takes in as well.
        sink_logits: ``[Hq]``, logit of one more row with value zero per head.
        measure: tell what each source did, too.
        needs_lse: whether the log-sum-exp of the answer is wanted.
        tells_unread: say what weight was left unread, where that is known without reading more.
        weighs: say in a measured call what share of the weight each row has that was not read.
        effort: rows of lists that a block of a prompt is to read, in those by size.
        until: rows of the store when the prompt has been read of which this call is a chunk; None: it is none.
    """

    query: Tensor
    store: KVStore
    index: RowIndex
    config: RetrievalConfig
    scale: float
    softcap: float | None = None
    extra: RowSource | StateSource | None = None
    sink_logits: Tensor | None = None
    measure: bool = False
    needs_lse: bool = True
    tells_unread: bool = False
    weighs: bool = False
    effort: float = 1.0
    until: int | None = None

    @classmethod
    def checked(
        cls,
        query: Tensor,
        store: KVStore,
        index: RowIndex,
        config: RetrievalConfig,
        rows: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        extra: RowSource | StateSource | None = None,
        sink_logits: Tensor | None = None,
    ) -> "Call":
        """The call with its default scale; ValueError states what was received where it does not fit the store.

        ``rows``: of which the query's positions are the newest; the store may hold some of them alone.
        """
        keys, dim, shape = store.buffers[0], store.head_dim, query.shape
        rows = len(store) if rows is None else rows
        if len(shape) != 4 or shape[0] != keys.shape[0] or shape[3] != dim:
            raise ValueError(f"query has shape {list(shape)}, expected [{keys.shape[0]}, Hq, m, {dim}]")
        if not 1 <= shape[2] <= rows:
            raise ValueError(f"query has {shape[2]} positions, expected 1 to {rows}: they are the newest rows")
        check_queries("query is", query, store.num_kv_heads, keys.device)
        if scale is None:
            scale = dim**-0.5
        elif not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}, expected a positive number: an index finds the largest products")
        if sink_logits is not None:
            if sink_logits.shape != (query.shape[1],):
                raise ValueError(f"sink_logits have shape {list(sink_logits.shape)}, expected [{query.shape[1]}]")
            check_range("sink_logits", sink_logits)
        if extra is not None:
            extra.check(query, store.value_dim)
        return cls(store.turn(query), store, index, config, float(scale), softcap, extra, sink_logits)

    @property
    def workload(self) -> Workload:
        """What the planner knows of the call."""
        store, (batch, heads, m, _) = self.store, self.query.shape
        return Workload(
            rows=len(store),
            queries=m,
            indexed=len(self.index),
            first_index_row=self.config.n_sink + (min(store.starts) if store.has_padding else 0),
            batch=batch,
            heads=heads,
            kv_heads=store.num_kv_heads,
            dim=store.head_dim,
            value_dim=store.value_dim,
            row_bytes=store.row_bytes,
            learnt=self.index.learnt,
            needs=self.index.needs,
            whole_lists=on_device(self.query) and not store.host,
        )

    def plainly(self) -> "Call":
        """The same call for the yardstick: not measured, its lse wanted."""
        return replace(self, measure=False, needs_lse=True)

    @property
    def is_synchronous(self) -> bool:
        """Whether a call that has returned is done, so that its time can be taken."""
        return self.query.device.type == "cpu"

    @property
    def is_prompt(self) -> bool:
        """Whether more positions ask than retrieval is for: a prompt is being read."""
        return self.query.shape[2] > self.config.max_queries

    @property
    def first_index_row(self) -> Tensor:
        """``[B]``, the first row of each batch row that the index answers for."""
        return self.store.start + self.config.n_sink

    @property
    def is_sealed_ahead(self) -> bool:
        """Whether rows after the first query's position have been moved among older ones."""
        return self.index.moves_rows and len(self.index) > len(self.store) - self.query.shape[2] + 1

    def sink_slots(self, hot: int) -> Tensor:
        """``[B, Hq, m, n_sink]``: the first rows of each batch row, -1 from ``hot`` on."""
        slots = self.store.start[:, None] + torch.arange(min(self.config.n_sink, hot), device=self.query.device)
        slots = slots.masked_fill(slots >= hot, -1)
        return slots[:, None, None, :].expand(*self.query.shape[:3], -1)

    @property
    def rows_visible(self) -> float:
        """Rows that a query may see, mean over batch rows and positions."""
        last = len(self.store)
        if not self.store.has_padding:
            return last - (self.query.shape[2] - 1) / 2
        stop = torch.arange(last - self.query.shape[2] + 1, last + 1)
        return float((stop - torch.tensor(self.store.starts)[:, None]).clamp(min=0).float().mean())

    @property
    def bytes_dense(self) -> int:
        """Bytes that a dense scan of the store reads."""
        return self.query.shape[0] * self.store.num_kv_heads * len(self.store) * self.store.row_bytes

    def causal_mask(self) -> Tensor:
        """``[B, Hq, m, T]`` bool by the positions of rows, wherever they stand."""
        batch, heads, m, _ = self.query.shape
        rows = len(self.store)
        slots = torch.arange(rows, device=self.query.device).expand(batch, heads, 1, -1)
        positions = self.index.positions(slots)
        newest = torch.arange(rows - m, rows, device=self.query.device)[:, None]
        return (positions <= newest) & (positions >= self.store.start[:, None, None, None])
