"""Windows: how a text is read that is longer than what a model was trained to see at once.

The text is cut into windows. Each is read alone, from position 0 on: the text's first tokens (the prefix), the last
tokens of the window before (the overlap), then its own; only the rows of its own are kept. So the work is linear in the
text, no position is beyond the trained range, and a question, which follows the newest window, sees the rows of all
windows as if each stood right before it. After parallel context windows (Ratner et al. 2023); that many of them need a
sharper softmax is from adaptive parallel encoding (Yang et al. 2025).
"""

import math
from dataclasses import dataclass, replace

from index_kernels.integer import is_integer


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
    def sharpening(self) -> float:
        """Factor of the logits of what follows: so many windows at once would drown what one of them says.

        The log of the rows that are seen over that of the rows of a window, as for positions beyond a trained range
        (log-n scaling): a softmax over more rows keeps the entropy that the model knows. 1 for a single window.
        """
        return math.log(self.rows) / math.log(self.span) if self.rows > self.span > 1 else 1.0

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
            f"{self.rows} tokens read in {len(self.of(self.rows))} windows of {self.tokens}, each after the first "
            f"{self.prefix} of the text and {self.overlap} or more of the window before; what follows stands at "
            f"position {self.rows + self.shift}, with logits times {self.sharpening:.3g}"
        )
