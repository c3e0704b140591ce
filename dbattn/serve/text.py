"""Text as it comes, up to what ends it."""

from collections.abc import Sequence


class TextUntil:
    """Passes text on until the first of some strings is complete, and nothing of that.

    What may be the beginning of one is held back until it is known. ``lstrip``: without the white space at first.
    """

    def __init__(self, stops: Sequence[str], *, lstrip: bool = False) -> None:
        self._stops, self._lstrip, self._held = tuple(filter(None, stops)), lstrip, ""
        self.has_ended = False

    def feed(self, text: str) -> str:
        """What can be shown now that ``text`` has come."""
        if self.has_ended:
            return ""
        held = self._held + text
        if self._lstrip:
            held = held.lstrip()
            self._lstrip = not held
        ends = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.has_ended, self._held = True, ""
            return held[: min(ends)[1]]
        begun = max((_begun(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - begun :]
        return held[: len(held) - begun]

    def end(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
