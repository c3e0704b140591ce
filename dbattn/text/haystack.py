"""Long texts with facts hidden in them: the needle-in-a-haystack test."""

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

from .prompt import read_text

# Different kinds of things: a small model confuses several keys of one kind.
_THINGS = (
    "room number",
    "flight number",
    "parcel weight",
    "phone extension",
    "postal code",
    "bus fare",
    "prize money",
    "invoice total",
    "lottery jackpot",
    "locker combination",
)
# How far from its depth a needle may stand, as a share of the text.
NEAR = 0.1


@dataclass(frozen=True)
class Needle:
    """One hidden fact. ``depth`` is where it stands in the text, 0 (start) to 1 (end)."""

    depth: float
    thing: str
    number: str

    @property
    def sentence(self) -> str:
        """What is hidden in the text."""
        return f"The {self.thing} is {self.number}. Remember it. {self.number} is the {self.thing}."

    @property
    def question(self) -> str:
        """What the model is asked."""
        return f"What is the {self.thing}?"

    @property
    def answer_start(self) -> str:
        """What the answer starts with, so that its next tokens are the number."""
        return f"The {self.thing} is"

    def is_answered_by(self, answer: str) -> bool:
        """Whether an answer names the number."""
        return self.number in answer.replace(",", "")


def read_haystack(path: Path | TextIO | None = None) -> str:
    """The text of a file or a stream, or prose of every Python (the standard library's language reference).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or not UTF-8 text.
    """
    return _language_reference() if path is None else read_text(path)


def _language_reference() -> str:
    """The prose of the standard library's ``pydoc`` topics, without their grammar, tables and code."""
    from pydoc_data.topics import topics

    paragraphs = (part for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    prose = (p.strip() for p in paragraphs if p.rstrip().endswith(".") and not p.startswith((" ", "*", "-", "+", "|")))
    # Topics repeat each other's sections; the order of first appearance is kept.
    return "\n\n".join(dict.fromkeys(re.sub(r"\s+", " ", p) for p in prose if len(p) > 120))


def make_needles(count: int, seed: int = 0) -> list[Needle]:
    """``count`` needles with random five-digit numbers, evenly spread over the depths.

    Raises:
        ValueError: a count below 1 or above the number of things that can be hidden.
    """
    if not 1 <= count <= len(_THINGS):
        raise ValueError(f"needles is {count}, expected 1 to {len(_THINGS)}")
    random = Random(seed)
    numbers = random.sample(range(10000, 100000), count)
    return [Needle((i + 0.5) / count, _THINGS[i], str(number)) for i, number in enumerate(numbers)]


def hide(needles: list[Needle], haystack: str, tokens: int, tokenizer: Any) -> str:
    """``haystack`` cut to about ``tokens`` tokens in all, with each needle between two sentences or lines at its depth.

    Raises:
        ValueError: the haystack is shorter than that, the needles alone are longer, or no sentence or line ends near
            a depth.
    """
    ids = tokenizer(haystack, add_special_tokens=False)["input_ids"]
    room = tokens - sum(len(tokenizer(n.sentence, add_special_tokens=False)["input_ids"]) + 2 for n in needles)
    if room < 1:
        raise ValueError(f"tokens is {tokens}, too few to hide {len(needles)} needles: raise it, or hide fewer")
    if len(ids) < room:
        raise ValueError(f"the haystack has {len(ids)} tokens, {room} are needed: give a longer file or fewer tokens")
    text: str = tokenizer.decode(ids[:room])
    ends = [match.end() for match in re.finditer(r"[.!?]\s+|\n+", text)]
    places = []
    for needle in needles:
        at = min(ends, key=lambda end: abs(end - needle.depth * len(text)), default=-len(text))
        if abs(at / len(text) - needle.depth) > NEAR:
            raise ValueError(
                f"no sentence or line of the haystack ends near depth {needle.depth:.0%}: give a text with more of them"
            )
        places.append((at, needle.depth, needle.sentence))
    # From the end, so that earlier places stay where they are.
    for at, _, sentence in sorted(places, reverse=True):
        text = f"{text[:at]}{sentence} {text[at:]}"
    return text
