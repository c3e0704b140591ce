"""Choosing windows: which of a text's windows a question reads."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from index_kernels import floats

from ..store import KVStore
from ..windows import Windows
from .window_cache import CandidateLayer, WindowCache

# Windows that are read with the question before some are chosen: those that share most words with it.
CANDIDATES = 8
# Of them together; the rows of one layer are in memory as floats.
AT_ONCE = 4
# Tokens of a question that are judged, the newest.
JUDGED = 256
# As in Lucene.
K1, B = 1.2, 0.75


def choose_windows(
    model: nn.Module, stores: Sequence[KVStore], windows: Windows, text: Tensor | None, asked: Tensor, most: int
) -> tuple[int, ...]:
    """The numbers of at most ``most`` windows, rising: the newest, and those after which the question is likeliest.

    Of many windows, the likelihood is asked of those alone that have most of the question's tokens (BM25).

    Args:
        model: a wrapped one. One without logits is not asked: then tokens decide alone.
        stores: of all layers, with the rows of all windows by position.
        text: token ids ``[B, n]`` of these rows, None where they are not known.
        asked: token ids ``[B, m]`` of the question.
    """
    newest = len(windows.of(windows.rows)) - 1
    if most <= 1:
        return (newest,)
    # Of windows that are alike the later one: it was read last.
    others = list(range(newest - 1, -1, -1))
    asked = asked[:, -JUDGED:]
    if text is not None:
        shared = shared_tokens(text, windows, asked)
        others = sorted(others, key=lambda number: -shared[number])
        others = others[: max(CANDIDATES, most - 1)]
    if len(others) > most - 1 and asked.shape[1] > 1:
        likely = likelihoods(model, stores, windows, others, asked)
        if likely is not None:
            others = sorted(others, key=lambda number: -likely[number])
    return (*sorted(others[: most - 1]), newest)


def shared_tokens(text: Tensor, windows: Windows, asked: Tensor) -> list[float]:
    """BM25 of each window for the question's tokens, summed over texts."""
    parts = windows.of(windows.rows)
    bounds = torch.tensor([part.stop for part in parts])
    sizes = torch.tensor([part.stop - part.first for part in parts])
    found = torch.zeros(len(parts), dtype=torch.float64)
    for ids, question in zip(text[:, : windows.rows].cpu(), asked.cpu(), strict=True):
        for token in question.unique():
            at = (ids == token).nonzero()[:, 0]
            counts = torch.bincount(torch.bucketize(at, bounds, right=True), minlength=len(parts)).double()
            have = int((counts > 0).sum())
            rarity = math.log(1 + (len(parts) - have + 0.5) / (have + 0.5))
            found += rarity * counts * (K1 + 1) / (counts + K1 * (1 - B + B * sizes / sizes.double().mean()))
    return found.tolist()


def likelihoods(
    model: nn.Module, stores: Sequence[KVStore], windows: Windows, numbers: Sequence[int], asked: Tensor
) -> dict[int, float] | None:
    """Log-likelihood of the question after each of some windows alone, summed over texts; None without logits."""
    parts = windows.of(windows.rows)
    found: dict[int, float] = {}
    by_size: dict[int, list[int]] = {}
    for number in numbers:
        by_size.setdefault(parts[number].stop - parts[number].first, []).append(number)
    for same in by_size.values():
        for at in range(0, len(same), AT_ONCE):
            group = same[at : at + AT_ONCE]
            runs = [[(0, min(windows.prefix, parts[n].first)), (parts[n].first, parts[n].stop)] for n in group]
            rows = sum(stop - first for first, stop in runs[0])
            layers = [CandidateLayer(rows, _fetcher(store, runs)) for store in stores]
            ids = asked.repeat(len(group), 1)
            positions = torch.arange(windows.span, windows.span + ids.shape[1], device=ids.device)[None]
            cache = WindowCache(model.config, list(layers))
            answer = model(ids, past_key_values=cache, position_ids=positions.expand(len(ids), -1))
            if getattr(answer, "logits", None) is None:
                return None
            said = answer.logits[:, :-1].float().log_softmax(dim=-1).gather(2, ids[:, 1:, None])
            found |= dict(zip(group, said.view(len(group), -1).sum(dim=1).tolist(), strict=True))
    return found


def _fetcher(
    store: KVStore, runs: Sequence[Sequence[tuple[int, int]]]
) -> Callable[[torch.dtype], tuple[Tensor, Tensor]]:
    """Gives the rows of each group of runs as batch rows, as floats by position."""

    def fetch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        both = zip(*(store.between(first, stop) for group in runs for first, stop in group), strict=True)
        keys, values = (
            torch.cat([torch.cat(rows[at : at + len(runs[0])], dim=2) for at in range(0, len(rows), len(runs[0]))])
            for rows in both
        )
        return store.turn(floats(keys)).to(dtype), store.turn(floats(values)).to(dtype)

    return fetch
