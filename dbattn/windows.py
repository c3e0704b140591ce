"""Windows: how a text is read that is longer than what a model was trained to see at once.

The text is cut into windows. Each is read alone, from position 0 on: the text's first tokens (the prefix), the last
tokens of the window before (the overlap), then its own; only the rows of its own are kept. So the work is linear in the
text, no position is beyond the trained range, and a question, which follows the newest window, sees the rows of windows
as if each stood right before it. After parallel context windows (Ratner et al. 2023); that many of them need a sharper
softmax is from adaptive parallel encoding (Yang et al. 2025). A small model finds nothing in dozens of windows at once:
a question reads a few, those that have most of its words; see ``choose`` and ``Reading``.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from index_kernels.integer import is_integer

# Of BM25; and how many tokens of a question are looked at, the newest.
K1, B, ASKED = 1.2, 0.75, 256


@dataclass(frozen=True)
class Window:
    """The rows ``first .. stop`` of a context, and how they were read: after the prefix, from token ``since`` on.

    Row r of it stands at position ``r + shift``.
    """

    first: int
    stop: int
    since: int
    shift: int


@dataclass(frozen=True)
class Windows:
    """A text cut into windows.

    Attributes:
        prefix: tokens of the text's beginning that are read before every window.
        overlap: tokens of the window before that are read again, for continuity; at least so many.
        tokens: new tokens of each window.
        rows: tokens of the text read so far; rows after them go on where the newest window ends.

    Raises:
        ValueError: counts out of range.
    """

    prefix: int
    overlap: int
    tokens: int
    rows: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prefix", 0), ("overlap", 0), ("tokens", 1), ("rows", 0)):
            value = getattr(self, name)
            if not is_integer(value, least):
                raise ValueError(f"{name} of windows is {value!r}, expected an integer of at least {least}")

    @property
    def span(self) -> int:
        """Positions of a window, and where a question begins."""
        return self.prefix + self.overlap + self.tokens

    @property
    def shift(self) -> int:
        """What a row after those of the windows is moved by: row r stands at position ``r + shift``."""
        return min(0, self.span - self.rows)

    @property
    def count(self) -> int:
        """How many windows the rows make."""
        return 1 + -(-max(0, self.rows - self.span) // self.tokens)

    def sharpening_over(self, rows: int) -> float:
        """Factor of the logits of what sees so many rows of windows: what one of them says would drown in the others.

        The log of the rows that are seen over that of the rows of a window, as for positions beyond a trained range
        (log-n scaling): a softmax over more rows keeps the entropy that the model knows. 1 for a single window.
        """
        return math.log(rows) / math.log(self.span) if rows > self.span > 1 else 1.0

    def full(self, rows: int) -> int:
        """Of so many rows, those of full windows: they stay as they are when the text goes on."""
        return 0 if rows < self.span else rows - (rows - self.span) % self.tokens

    def of(self, rows: int) -> list[Window]:
        """The windows of a text of so many tokens.

        The first has no overlap and so more tokens of its own. All end at position ``span``, the last one, too, which
        has more overlap where it has fewer tokens; a text of one window stands where it would without windows.
        """
        if rows <= self.span:
            return [Window(0, rows, 0, 0)]
        windows, first = [], 0
        for stop in [*range(self.span, rows, self.tokens), rows]:
            shift = self.span - stop
            windows.append(Window(first, stop, self.prefix - shift if first else 0, shift))
            first = stop
        return windows

    def cut(self, rows: int) -> "Windows | None":
        """The windows of a cache that is cut to so many rows; None without any.

        Raises:
            ValueError: the cut is inside a window, of which no part can stand alone.
        """
        if rows < self.rows and rows != self.full(rows):
            raise ValueError(
                f"{rows} rows end inside a window, of {self.rows} that were read in windows: cut at {self.full(rows)} "
                f"or leave all {self.rows}"
            )
        return replace(self, rows=min(rows, self.rows)) if rows else None

    def __str__(self) -> str:
        return (
            f"{self.rows} tokens read in {self.count} windows of {self.tokens}, each after the first "
            f"{self.prefix} of the text and {self.overlap} or more of the window before; what follows stands at "
            f"position {self.rows + self.shift}"
        )


def choose(windows: Windows, text: Tensor | None, asked: Tensor, most: int) -> tuple[int, ...]:
    """The numbers of ``most`` windows, rising: the newest, and those that have most of the question's rarer tokens.

    By BM25 (k1 = 1.2, b = 0.75); of windows that are alike, the later one.

    Args:
        windows: there are at least ``most``.
        text: token ids ``[B, n]`` of their rows, which choose together; None where they are not known.
        asked: token ids ``[B, m]`` of the question, of which the newest 256 count.
    """
    parts = windows.of(windows.rows)
    shared = torch.zeros(len(parts), dtype=torch.float64)
    if text is not None:
        bounds = torch.tensor([part.stop for part in parts])
        sizes = torch.tensor([part.stop - part.first for part in parts], dtype=torch.float64)
        for ids, question in zip(text[:, : windows.rows], asked[:, -ASKED:].cpu(), strict=True):
            for token in question.unique():
                at = (ids == token).nonzero()[:, 0]
                counts = torch.bincount(torch.bucketize(at, bounds, right=True), minlength=len(parts)).double()
                have = int((counts > 0).sum())
                rarity = math.log(1 + (len(parts) - have + 0.5) / (have + 0.5))
                shared += rarity * counts * (K1 + 1) / (counts + K1 * (1 - B + B * sizes / sizes.mean()))
    newest = len(parts) - 1
    best = sorted(range(newest), key=lambda number: (float(shared[number]), number), reverse=True)
    return (*sorted(best[: most - 1]), newest)


@dataclass(frozen=True)
class Reading:
    """The windows that a question reads, by number; others do not exist for it and what follows it.

    ``rows``: of the context; those after the windows' are always read.
    """

    windows: Windows
    numbers: tuple[int, ...]
    rows: int

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The rows that are read, ``first .. stop`` each: the prefix, the windows', and those after all windows."""
        windows = self.windows.of(self.windows.rows)
        chosen = [(windows[number].first, windows[number].stop) for number in self.numbers]
        runs: list[tuple[int, int]] = []
        for first, stop in [(0, min(self.windows.prefix, self.windows.rows)), *chosen, (self.windows.rows, self.rows)]:
            first = max(first, runs[-1][1] if runs else 0)
            if first < stop and runs and runs[-1][1] == first:
                runs[-1] = runs[-1][0], stop
            elif first < stop:
                runs.append((first, stop))
        return runs

    @property
    def read(self) -> int:
        """How many rows that is."""
        return sum(stop - first for first, stop in self.runs)

    def spread(self, weights: Tensor) -> Tensor:
        """Weights ``[..., n]`` of the rows that are read, and those that came after, by their places in the context."""
        parts, at, row = [], 0, 0
        for first, stop in self.runs:
            parts += [weights.new_zeros(*weights.shape[:-1], first - row), weights[..., at : at + stop - first]]
            at, row = at + stop - first, stop
        return torch.cat([*parts, weights.new_zeros(*weights.shape[:-1], self.rows - row), weights[..., at:]], dim=-1)

    @property
    def is_whole(self) -> bool:
        """Whether all windows are read."""
        return len(self.numbers) == self.windows.count

    def __str__(self) -> str:
        sharpening = f"logits times {self.windows.sharpening_over(self.read):.3g}"
        if self.is_whole:
            return f"{self.windows}; all windows are read, with {sharpening}"
        windows = self.windows.of(self.windows.rows)
        read = ", ".join(f"{windows[number].first} to {windows[number].stop - 1}" for number in self.numbers)
        return f"{self.windows}; the question reads {len(self.numbers)} of them (tokens {read}), with {sharpening}"
