"""Kernel methods and projections: the rows are summed up into a state of fixed size, or pooled to fewer rows."""

import math

import torch
from torch import Tensor
from torch.nn.functional import elu

from ._contract import FULL, HALF, SINKS, Answer, Operator, State
from ._lists import half


class Performer(Operator):
    """FAVOR+: exp(q.k) as the expectation of a product of positive random features, orthogonal in blocks of D.

    The setting is the number of features m; the state holds m sums of values and weights per KV head. Estimates
    exp(q.k) without bias, so sinks and hot rows are read exactly and merged. Keys are centred: that shifts every logit
    alike and makes features vary less.
    """

    paper = "Choromanski et al., Rethinking Attention with Performers, 2020, arXiv:2009.14794"
    needs_training = True
    patience = 1.25
    MOST = 2048

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed
        self._mean: Tensor | None = None
        self._states: dict[int, tuple[int, Tensor, Tensor, Tensor]] = {}

    @property
    def most(self) -> int:
        """See Operator."""
        return self.MOST

    def cost(self, query: Tensor, setting: int) -> float:
        """See Operator; known without building a state."""
        hot = min(SINKS, len(self)) + len(self) - self.hot
        return len(self.keys) * (setting * (self.values.shape[2] + 1) * FULL + hot * self.row_bytes)

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        tail = self._middle(query, setting)
        nothing = torch.zeros(len(self.keys), 0, dtype=torch.int64)
        overhead = len(self.keys) * setting * (self.values.shape[2] + 1) * FULL
        return self.read(query, nothing, tail=[tail], overhead=overhead)

    def _middle(self, query: Tensor, features: int) -> State:
        """The estimated state of the rows between the sinks and the window."""
        root = query.shape[3] ** -0.25
        omega = orthogonal_features(features, query.shape[3], self._seed)
        sums, weights, shift = self._sums(features, omega, root)
        grouped = query[0, :, 0].view(len(self.keys), -1, query.shape[3]).double()
        exponents = log_features(grouped * root, omega)
        peak = exponents.amax(dim=-1, keepdim=True)
        phi = torch.exp(exponents - peak)
        total = phi @ weights[..., None]
        assert self._mean is not None
        moved = grouped @ self._mean.double().transpose(1, 2) * root**2
        lse = (total.log() + peak + shift - math.log(features) + moved)[..., 0]
        out = phi @ sums / total.clamp(min=torch.finfo(torch.float64).tiny)
        return out.float(), lse.float()

    def _sums(self, features: int, omega: Tensor, root: float) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over rows of features times values ``[Hkv, m, Dv]``, of features ``[Hkv, m]``, and their log-scale."""
        if self._mean is None:
            self._mean = self.keys.mean(dim=1, keepdim=True)
        heads, _, value_dim = self.values.shape
        sums = torch.zeros(heads, features, value_dim, dtype=torch.float64)
        done, sums, weights, shift = self._states.get(features, (SINKS, sums, sums[..., 0], sums[:, :1, :1]))
        for at in range(done, self.hot, 1024):
            stop = min(at + 1024, self.hot)
            exponents = log_features((self.keys[:, at:stop] - self._mean).double() * root, omega)
            # One scale per KV head, raised with the largest feature seen, so that no sum overflows.
            peak = (
                torch.maximum(shift, exponents.amax(dim=(1, 2), keepdim=True))
                if at > SINKS
                else (exponents.amax(dim=(1, 2), keepdim=True))
            )
            phi, correction = torch.exp(exponents - peak), torch.exp(shift - peak)
            sums = sums * correction + phi.transpose(1, 2) @ self.values[:, at:stop].double()
            weights, shift = weights * correction[..., 0] + phi.sum(dim=1), peak
        self._states[features] = self.hot, sums, weights, shift
        return sums, weights, shift


def log_features(x: Tensor, omega: Tensor) -> Tensor:
    """Log of the positive features of ``x [..., D]``: ``omega.x - |x|^2 / 2``, ``[..., m]``."""
    return x @ omega.T - x.square().sum(dim=-1, keepdim=True) / 2


def orthogonal_features(count: int, dim: int, seed: int) -> Tensor:
    """``count`` Gaussian directions of ``dim``, orthogonal within each run of ``dim`` of them; float64 ``[m, D]``."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // dim)):
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        lengths = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        q, r = torch.linalg.qr(gaussian)
        # QR fixes the signs of q by a convention; with those of r's diagonal its directions are uniform.
        blocks.append((q * r.diagonal().sign()).T * lengths)
    return torch.cat(blocks)[:count]


class Linformer(Operator):
    """The length is projected down: p neighbouring rows become one, their mean.

    Pooling is one of the paper's projections; the one it prefers is learned. The setting fixes p = 256 / setting;
    pooled rows enter the softmax as one row each, as in the paper, beside the sinks and the hot rows.
    """

    paper = "Wang et al., Linformer: Self-Attention with Linear Complexity, 2020, arXiv:2006.04768"
    needs_training = True
    MOST = 256

    def __init__(self) -> None:
        super().__init__()
        self._pooled: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def most(self) -> int:
        """See Operator: rows as they are."""
        return self.MOST

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        p = -(-self.MOST // setting)
        keys, values = self._pool(p)
        logits = self.logits(query, keys)
        lse = torch.logsumexp(logits, dim=-1)
        out = torch.softmax(logits, dim=-1) @ values
        left = torch.arange(SINKS + p * keys.shape[1], self.hot).expand(len(keys), -1)
        size = keys.numel() + values.numel()
        if p == 1:
            return self.read(query, left, tail=[(out, lse)], overhead=size * self.keys.element_size())
        return self.read(query, left, tail=[(out, lse)], overhead=size * HALF)

    def _pool(self, p: int) -> tuple[Tensor, Tensor]:
        """Means of each p rows, ``[Hkv, n, D]`` and ``[Hkv, n, Dv]``."""
        keys, values = self._pooled.get(p, (self.keys[:, :0], self.values[:, :0]))
        done = SINKS + p * keys.shape[1]
        stop = done + max(0, self.hot - done) // p * p
        new = [rows[:, done:stop].unflatten(1, (-1, p)).mean(dim=2) for rows in (self.keys, self.values)]
        # A row that is not averaged is the row itself.
        rounded = new if p == 1 else [half(x) for x in new]
        keys, values = (torch.cat(pair, dim=1) for pair in zip((keys, values), rounded, strict=True))
        self._pooled[p] = keys, values
        return keys, values


class LinearAttention(Operator):
    """Feature map elu(x) + 1 in place of exp: all rows in one sum of D x Dv per KV head, nothing else is read.

    Its weights are not those of softmax, on which these models were trained, so no row can be read exactly beside it.
    """

    paper = "Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236"
    needs_training = True

    def __init__(self) -> None:
        super().__init__()
        self._done = 0
        self._sums = self._weights = torch.zeros(())

    def extend(self) -> None:
        """See Operator: adds the new rows."""
        phi = elu(self.keys[:, self._done :].double()) + 1
        self._sums = self._sums + phi.transpose(1, 2) @ self.values[:, self._done :].double()
        self._weights = self._weights + phi.sum(dim=1)
        self._done = len(self)

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        phi = elu(query[0, :, 0].view(len(self.keys), -1, query.shape[3]).double()) + 1
        out = phi @ self._sums / (phi @ self._weights[..., None])
        size = self._sums.numel() + self._weights.numel()
        return Answer(out.float().view(1, query.shape[1], 1, -1), 0.0, size * FULL)
