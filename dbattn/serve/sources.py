"""Which passages of a context an answer was taken from, by attention."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..hf import Handle
from ..hf.trace import Trace
from ..text.prompt import Passage, answer_tokens, passages, question_ids
from ..windows import Reading

SHOWN = 3
# Asked to learn what every question reads: the newest passages, and rows that attention is parked on.
NEUTRAL = "What does the text say?"


@dataclass(frozen=True)
class Source:
    """A passage, its share of the attention on all passages, and how far that is above a neutral question's share."""

    passage: Passage
    share: float
    excess: float

    def to_dict(self) -> dict[str, Any]:
        """The source as plain data."""
        return {"share": self.share, "excess": self.excess, **vars(self.passage)}


@dataclass(frozen=True)
class Sources:
    """The passages most read, best first, and where an answer's attention went; text, before and after add up to 1.

    Attributes:
        text: share of the softmax weight, mean over layers, heads and answer tokens, on rows of the passages, read or
            not: those of a list not read share the weight of its summary.
        before: on the sinks and the instruction.
        after: on the question and the answer itself.
        summaries: how much of all this lies on rows that were not read, through the summaries that answer for them.
    """

    found: tuple[Source, ...]
    text: float
    before: float
    after: float
    summaries: float

    def to_dict(self) -> dict[str, Any]:
        """The sources as plain data."""
        return {**vars(self), "found": [source.to_dict() for source in self.found]}

    def lines(self, rows: int) -> list[str]:
        """For a reader; ``rows`` of the context."""
        lines = []
        for number, source in enumerate(self.found, 1):
            at = source.passage
            lines += [
                f"{number}. tokens {at.first} to {at.stop - 1} ({at.first / rows:.0%} in): "
                f"{source.share:.1%} of the attention on the text, {100 * source.excess:+.1f} points by this question",
                f'   "{" ".join(at.text.split())}"',
            ]
        lines.append(
            f"Attention while answering: {self.text:.0%} on the text, {self.before:.0%} on its first rows (sinks, "
            f"instruction), {self.after:.0%} on question and answer; {self.summaries:.0%} of it through summaries of "
            "rows not read. Passages are ranked by what they have more than for a question about nothing in particular."
        )
        return lines


class SourceFinder:
    """Finds the sources of answers about the context that a model was wrapped with."""

    def __init__(self, model: Any, tokenizer: Any, handle: Handle) -> None:
        assert handle.context is not None
        self._model, self._tokenizer, self._handle = model, tokenizer, handle
        self._ids = handle.context[0].tolist()
        # The neutral question of the newest answer, and the windows that it was asked of.
        self._newest: tuple[Reading | None, Trace] | None = None

    def _neutral(self, reading: Reading | None) -> Trace:
        """What a question about nothing in particular reads, of the same windows."""
        if self._newest is None or self._newest[0] != reading:
            asked = question_ids(NEUTRAL, self._tokenizer).to(self._model.device)
            with self._handle.trace() as trace, self._handle.same_windows():
                list(answer_tokens(self._model, asked, self._handle.new_cache(reading), None, 1))
            self._newest = reading, trace
        return self._newest[1]

    @cached_property
    def _passages(self) -> list[Passage]:
        return passages(self._ids, self._tokenizer)

    def sources(self, trace: Trace, reading: Reading | None = None) -> Sources:
        """The passages that ``trace`` reads more than the neutral question does; ``reading``: of which windows."""
        rows, parts = len(self._ids), self._passages
        first = max(self._handle.config.n_sink, parts[0].first)
        asked, usual = (one.mass[0] / max(1, one.total) for one in (trace, self._neutral(reading)))
        shares = []
        for mass in (asked, usual):
            of_text = max(float(mass[first:rows].sum()), 1e-12)
            shares.append([float(mass[max(first, p.first) : p.stop].sum()) / of_text for p in parts])
        found = [Source(p, share, share - before) for p, share, before in zip(parts, *shares, strict=True)]
        found.sort(key=lambda source: -source.excess)
        text, before, after = (float(asked[a:b].sum()) for a, b in ((first, rows), (0, first), (rows, None)))
        top = tuple(source for source in found[:SHOWN] if source.excess > 0)
        return Sources(top, text, before, after, float(trace.for_unread[0]) / max(1, trace.total))
