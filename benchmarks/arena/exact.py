"""Exact attention: the full scan, the tiled one, and both with fewer KV heads."""

import torch
from torch import Tensor

from index_kernels import dense_decode

from ._contract import Answer, Operator


class Dense(Operator):
    """All rows, all logits, one softmax.

    ``share`` says who shares keys and values: "gqa" as the model was trained; "mha" a copy for every query head, which
    answers the same and shows what grouping saves; "mqa" one KV head for all, the mean of the model's, as at the start
    of uptraining (Ainslie et al.), which shows what it costs.
    """

    paper = (
        "Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762; MQA: Shazeer, Fast Transformer Decoding, "
        "2019, arXiv:1911.02150; GQA: Ainslie et al., 2023, arXiv:2305.13245"
    )

    def __init__(self, share: str = "gqa") -> None:
        super().__init__()
        self.share = share
        self.needs_training = share == "mqa"

    def fit(self, keys: Tensor, values: Tensor) -> None:
        """See Operator; MQA keeps pooled rows only."""
        if self.share == "mqa":
            keys, values = pool_heads(keys, 1), pool_heads(values, 1)
        super().fit(keys, values)

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator; there is one setting."""
        heads, kv_heads = query.shape[1], self.keys.shape[0]
        copies = heads // kv_heads if self.share == "mha" else 1
        ids = torch.arange(len(self)).expand(1, heads, 1, -1)
        return Answer(self.scan(query).reshape(1, heads, 1, -1), len(self), copies * self.bytes_dense, ids=ids)

    def scan(self, query: Tensor) -> Tensor:
        """``[Hkv, G, Dv]`` from all rows."""
        return torch.softmax(self.logits(query, self.keys), dim=-1) @ self.values


class Tiled(Dense):
    """The same sums tile by tile with a running maximum, so that no row of logits is ever held whole."""

    paper = (
        "Dao et al., FlashAttention, 2022, arXiv:2205.14135; online softmax: Milakov and Gimelshein, 2018, "
        "arXiv:1805.02867"
    )

    def __init__(self, share: str = "gqa", tile: int = 128) -> None:
        super().__init__(share)
        self.tile = tile

    def scan(self, query: Tensor) -> Tensor:
        """See Dense."""
        kv_heads, _, value_dim = self.values.shape
        group = query.shape[1] // kv_heads
        peak = torch.full((kv_heads, group, 1), float("-inf"))
        total, out = torch.zeros(kv_heads, group, 1), torch.zeros(kv_heads, group, value_dim)
        for keys, values in zip(self.keys.split(self.tile, 1), self.values.split(self.tile, 1), strict=True):
            logits = self.logits(query, keys)
            higher = torch.maximum(peak, logits.amax(dim=-1, keepdim=True))
            weights, correction = torch.exp(logits - higher), torch.exp(peak - higher)
            total = correction * total + weights.sum(dim=-1, keepdim=True)
            out = correction * out + weights @ values
            peak = higher
        return out / total


class DenseKernel(Dense):
    """The same by dbattn's own split-K kernel: what a scan takes when it is tuned."""

    paper = "Dao et al., Flash-Decoding for long-context inference, 2023 (blog post)"
    implementation = "kernel"

    def scan(self, query: Tensor) -> Tensor:
        """See Dense."""
        out = dense_decode(query, self.keys[None], self.values[None])[0]
        return out.view(len(self.keys), -1, out.shape[-1])


def pool_heads(rows: Tensor, heads: int) -> Tensor:
    """Mean of each run of neighbouring KV heads: ``[B, Hkv, n, D]`` -> ``[B, heads, n, D]``; heads divides Hkv."""
    if rows.shape[1] % heads:
        raise ValueError(f"{rows.shape[1]} KV heads do not pool to {heads}")
    runs: Tensor = rows.unflatten(1, (heads, -1))
    return runs.mean(dim=2)
