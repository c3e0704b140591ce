"""Attention over depth: earlier layers are rows, too. Two published forms, each checked against its plain formula."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from dbattn import AttentionDB, RetrievalConfig, RowSource


def depth_mixed_attention(db: AttentionDB, query: Tensor, depth_keys: Tensor, depth_values: Tensor) -> Tensor:
    """Mixture-of-Depths attention: a query reads its layer's rows and what earlier layers wrote at its own position.

    query ``[B, Hq, 1, D]`` of the newest position; depth_keys and depth_values ``[B, Hkv, layers, D]``. One softmax
    over both, because states merge exactly.
    """
    out = db.attend(query, extra=RowSource(depth_keys, depth_values))
    assert isinstance(out, Tensor)
    return out


class AttentionResidual:
    """Attention Residuals: a layer's input is a softmax over the outputs of the layers before, not their sum.

    Positions are the batch, layers are the rows. A layer's learned query w weighs output v by exp(w . RMSNorm(v)).
    """

    def __init__(self, width: int) -> None:
        self.db = AttentionDB(1, width, config=RetrievalConfig(index="flat"))

    def write(self, output: Tensor) -> None:
        """Add one layer's output ``[positions, width]``."""
        row = output[:, None, None, :]
        self.db.insert(rms_norm(row, row.shape[-1:]), row)

    def read(self, w: Tensor) -> Tensor:
        """The next layer's input ``[positions, width]`` for its query ``w [width]``."""
        positions = self.db.store.keys.shape[0]
        out = self.db.attend(w.expand(positions, 1, 1, -1), scale=1.0)
        assert isinstance(out, Tensor)
        return out[:, 0, 0]


def main() -> None:
    torch.manual_seed(0)
    heads, kv_heads, dim, rows, layers = 6, 2, 64, 3000, 12

    db = AttentionDB(kv_heads, dim, config=RetrievalConfig(k=rows))
    keys, values = torch.randn(2, 1, kv_heads, rows, dim)
    db.insert(keys, values)
    query = torch.randn(1, heads, 1, dim)
    depth_keys, depth_values = torch.randn(2, 1, kv_heads, layers, dim)
    out = depth_mixed_attention(db, query, depth_keys, depth_values)

    k, v = (
        torch.cat(parts, dim=2).repeat_interleave(heads // kv_heads, dim=1)
        for parts in ((keys, depth_keys), (values, depth_values))
    )
    plain = (query @ k.transpose(2, 3) * dim**-0.5).softmax(-1) @ v
    print(
        f"Mixture-of-Depths attention, {rows} rows + {layers} layers: off by {(out - plain).norm() / plain.norm():.1e}"
    )

    positions, width = 5, 96
    residual, outputs = AttentionResidual(width), []
    for _ in range(layers):
        outputs.append(torch.randn(positions, width))
        residual.write(outputs[-1])
    w = 0.3 * torch.randn(width)
    mixed = residual.read(w)

    stacked = torch.stack(outputs)  # [layers, positions, width]
    weights = (rms_norm(stacked, (width,)) @ w).softmax(0)
    plain = (weights[..., None] * stacked).sum(0)
    print(f"Attention Residuals over {layers} layers: off by {(mixed - plain).norm() / plain.norm():.1e}")


if __name__ == "__main__":
    main()
