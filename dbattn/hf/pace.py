"""Pace: how many tokens retrieval drafts before a dense pass checks them; Drafts and Chance: what became of them."""

from collections import deque
from dataclasses import dataclass
from statistics import fmean, linear_regression, median

# Tokens of the drafts that are to tell times, in turn: the first of all warms up what it reads, and a second
# token makes a pass longer than further ones do. And tokens of the longest draft.
TRIALS, MOST = (1, 1, 4), 8
# Dense steps that are timed before the first draft; and after how many more another is tried where none paid.
TIMED, RETRY = 2, 64
# Drafting must be expected to be so many times as fast as dense steps; expectations were up to a fifth off.
GAIN = 1.25
# What drafts may lose where expectations are wrong, as a share of the time of dense steps; it is saved up over RETRY.
LOST = 0.02
# What earlier passes count beside the latest; and what is thought of acceptance before any.
FADE, ACCEPTED, TRIED = 0.9, 4.0, 5.0


@dataclass
class Drafts:
    """Counts of exact decoding, over all calls of ``generate``; ``str()`` is a line for the report.

    Attributes:
        tokens: tokens written, but the first of each call.
        passes: dense passes that they took.
        drafted, accepted: tokens drafted, and those of them that dense wrote, too.
        why_none: why tokens were written without drafts, latest reason.
    """

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    why_none: str = ""

    def restart(self) -> None:
        """Count from here on."""
        vars(self).update(vars(Drafts()))

    def __str__(self) -> str:
        if not self.tokens:
            return f"Exact: {self.why_none}" if self.why_none else ""
        text = f"Exact: {self.tokens} tokens in {self.passes} dense passes"
        if self.drafted:
            text += f", {self.accepted} of {self.drafted} drafted tokens accepted"
        return text + (f"; {self.why_none}" if self.why_none else "")


class Chance:
    """The chance that a drafted token is accepted whose predecessors were: what newer passes told counts more."""

    def __init__(self) -> None:
        self._accepted, self._tried = ACCEPTED, TRIED

    def note(self, drafted: int, accepted: int) -> None:
        """Note what a dense pass made of so many drafted tokens."""
        self._accepted = FADE * self._accepted + accepted
        self._tried = FADE * self._tried + min(accepted + 1, drafted)

    @property
    def value(self) -> float:
        """From 0 to 0.99."""
        return min(0.99, self._accepted / self._tried)


class Pace:
    """How many tokens to draft: as many as let a token take the least time, by what drafts and passes took so far.

    One serves all calls of a model over about as many rows; ``chance`` is what calls over any number of rows told.
    """

    def __init__(self, chance: Chance | None = None) -> None:
        self._drafting: deque[float] = deque(maxlen=2 * MOST)
        self._passes: dict[int, deque[float]] = {}
        self._chance = chance or Chance()
        self._trials = self._without = 0
        # Seconds of the drafts since the latest pass; and those that drafts may lose from here on.
        self._drafted = self._spare = 0.0
        # Why none are drafted now.
        self.why_none = ""

    def note_draft(self, seconds: float) -> None:
        """Note the time of one drafted token."""
        self._drafting.append(seconds)
        self._drafted += seconds

    def note_pass(self, drafted: int, accepted: int, seconds: float) -> None:
        """Note a dense pass over so many drafted tokens and the one before them."""
        self._passes.setdefault(drafted, deque(maxlen=MOST)).append(seconds)
        earned = LOST * seconds
        if drafted:
            self._chance.note(drafted, accepted)
            earned = (accepted + 1) * self._pass_seconds(0) - seconds - self._drafted
        self._drafted, self._spare = 0.0, min(self._spare + earned, LOST * RETRY * self._pass_seconds(0))

    @property
    def acceptance(self) -> float:
        """See Chance."""
        return self._chance.value

    def seconds_a_token(self, drafted: int) -> float:
        """What a token takes if so many are drafted before each pass; 0 is plain dense decoding."""
        a = self.acceptance
        tokens = (1 - a ** (drafted + 1)) / (1 - a)
        return (drafted * median(self._drafting or [0.0]) + self._pass_seconds(drafted)) / tokens

    def choose(self) -> int:
        """Tokens to draft next."""
        if len(self._passes.get(0, ())) < TIMED:
            return 0
        if self._trials < len(TRIALS):
            self._trials += 1
            return TRIALS[self._trials - 1]
        best = min(range(1, MOST + 1), key=self.seconds_a_token)
        gain = self.seconds_a_token(0) / self.seconds_a_token(best)
        if gain >= GAIN and self._spare >= 0:
            self.why_none, self._without = "", 0
            return best
        self.why_none = (
            f"no drafts: a drafted token takes {1e3 * median(self._drafting):.3g} ms, a dense step "
            f"{1e3 * self._pass_seconds(0):.3g} ms and over {1 + best} tokens {1e3 * self._pass_seconds(best):.3g}; "
            f"with {self.acceptance:.0%} accepted, drafting would be {gain:.2g}x as fast"
        )
        if gain >= GAIN:
            self.why_none += f", but {-self._spare:.2g} s that they lost are not made up for yet"
        self._without += 1
        return 0 if self._without % RETRY or self._spare < 0 else TRIALS[0]

    def _pass_seconds(self, drafted: int) -> float:
        """By a line through what passes over drafts took; through what one without took, too, while they were alike."""
        alone = median(self._passes.get(0, [0.0]))
        known = {more: median(seconds) for more, seconds in self._passes.items() if more}
        if drafted == 0 or not known:
            return alone
        if len(known) == 1:
            known[0] = alone
        slope, height = linear_regression(list(known), list(known.values()))
        return max(alone, height + slope * drafted) if slope > 0 else max(alone, fmean(known.values()))
