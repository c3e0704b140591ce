"""RULER's tasks that need no outside data, drawn from the project's haystack, and RULER's scoring.

Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024, arXiv:2404.06654.
Templates, counts and frequencies are the paper's (appendices B and D) but for what follows:

- prose is the haystack's in place of Paul Graham's essays, from a random sentence on; words (of keys, of the lists) are
  the haystack's own in place of a word list's; the repeated noise of variable tracking is the paper's;
- no chat template, as the paper does for base models: a small model continues a text more reliably than it chats;
- multikey asks of one context for each of its four keys, a question at a time, where the paper asks for one of them;
- answers end after as many tokens as the references take in a plain list, sooner than the paper's: what a small model
  says after them is noise.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import Any

# Needles of a niah task that has several, hops of a chain, words asked for.
NEEDLES, HOPS, COMMON, FREQUENT = 4, 4, 10, 3
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Question:
    """What is asked after the context, what the answer starts with, and what it must name."""

    text: str
    answer_start: str
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What follows the context."""
        return f"\n{self.text} {self.answer_start}"


@dataclass(frozen=True)
class Sample:
    """A context and the questions that are asked of it, each alone."""

    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Task:
    """One task: ``draw(random, haystack, tokens, size)`` makes a sample that grows with ``size >= least``.

    ``tokens`` is the length aimed at, which changes some of the paper's counts; ``answer_tokens`` how many tokens of an
    answer are read.
    """

    name: str
    draw: Callable[[Random, str, int, int], Sample]
    answer_tokens: int
    least: int = 1


def make_sample(task: Task, tokens: int, seed: int, tokenizer: Any, haystack: str) -> Sample:
    """The largest sample whose context, longest question and answer take at most ``tokens``; the same for a seed.

    Raises:
        ValueError: the smallest one takes more.
    """

    def draw(size: int) -> Sample:
        return task.draw(Random(f"{task.name} {tokens} {seed}"), haystack, tokens, size)

    def length(size: int) -> int:
        sample = draw(size)
        context, *questions = (
            len(token_ids(text, tokenizer)) for text in (sample.context, *(q.prompt for q in sample.questions))
        )
        return context + max(questions) + task.answer_tokens

    if length(task.least) > tokens:
        raise ValueError(f"tokens is {tokens}, too few for {task.name}: it takes at least {length(task.least)}")
    high = 2 * task.least
    while length(high) <= tokens:
        high *= 2
    sizes = range(high // 2, high)
    return draw(sizes[bisect_right(sizes, tokens, key=length) - 1])


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a part of the prompt."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def score(answer: str, references: Sequence[str]) -> float:
    """RULER's ``string_match_all``: the share of the references that the answer contains, in percent."""
    said = answer.lower()
    return 100.0 * sum(reference.lower() in said for reference in references) / len(references)


def _niah(random: Random, haystack: str, tokens: int, size: int, *, keys: int, values: int, together: bool) -> Sample:
    """Needles between ``size`` sentences of prose: ``values`` numbers for each of ``keys`` keys."""
    names = [f"{a}-{b}" for a, b in _pairs(random.sample(_vocabulary(haystack), 2 * keys))]
    numbers = iter(random.sample(range(1_000_000, 10_000_000), keys * values))
    hidden = {name: tuple(str(next(numbers)) for _ in range(values)) for name in names}
    sentences = _sentences(haystack)
    start = random.randrange(len(sentences))
    lines = [sentences[(start + i) % len(sentences)] for i in range(size)]
    for name in names:
        for value in hidden[name]:
            lines.insert(random.randint(0, len(lines)), f"One of the special magic numbers for {name} is: {value}.")
    asked = [tuple(names)] if together else [(name,) for name in names]
    questions = tuple(_niah_question(each, [v for name in each for v in hidden[name]]) for each in asked)
    if len(questions[0].references) == 1:
        start_of = "A special magic number is hidden within the following text. Make sure to memorize it. "
        instruction = start_of + "I will quiz you about the number afterwards."
    else:
        start_of = "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        instruction = start_of + "I will quiz you about the numbers afterwards."
    return Sample(f"{instruction}\n{' '.join(lines)}", questions)


def _niah_question(names: Sequence[str], references: Sequence[str]) -> Question:
    many = len(references) > 1
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    what = f"special magic number{'s' * many} for {listed} mentioned in the provided text"
    asks, says = ("What are all the", "are") if many else ("What is the", "is")
    return Question(f"{asks} {what}?", f"The {what} {says}", tuple(references))


def _variable_tracking(random: Random, haystack: str, tokens: int, size: int) -> Sample:
    """A chain of assignments between ``size`` lines of noise, after a solved example with shorter names."""
    example = _chain(random, 10, 3)
    solved = f"{example.context}{example.questions[0].prompt} {' '.join(example.questions[0].references)}"
    sample = _chain(random, size, 5)
    return Sample(f"{solved}\n\n{sample.context}", sample.questions)


def _chain(random: Random, size: int, letters: int) -> Sample:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(random.choices(ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(random.randint(10000, 99999))
    values = [value, *(f"VAR {name}" for name in names)]
    lines = [NOISE] * size
    places = sorted(random.randint(0, size) for _ in names)
    # From the end, so that earlier places stay where they are and the chain keeps its order.
    for name, assigned, at in reversed(list(zip(names, values, places, strict=False))):
        lines.insert(at, f"VAR {name} = {assigned}")
    instruction = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    question = Question(
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        tuple(names),
    )
    return Sample(f"{instruction}\n\n" + "\n".join(lines), (question,))


def _common_words(random: Random, haystack: str, tokens: int, size: int) -> Sample:
    """Ten words more often than ``size`` others, after a solved example."""
    # Words of the example, how often each is there (a common one, another one), and the same of the list itself.
    words, in_example, in_list = (20, (3, 1), (6, 1)) if tokens < 4096 else (40, (10, 3), (30, 3))
    vocabulary = _vocabulary(haystack)
    drawn = random.sample(vocabulary, min(len(vocabulary), words + COMMON + size))
    if len(drawn) < words + COMMON + size:
        raise ValueError(f"the haystack has {len(vocabulary)} words, {words + COMMON + size} are needed")
    example = _word_list(random, drawn[:words], *in_example)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(example.questions[0].references, 1))
    sample = _word_list(random, drawn[words:], *in_list)
    return Sample(f"{example.context}{example.questions[0].prompt} {listed}\n\n{sample.context}", sample.questions)


def _word_list(random: Random, words: list[str], common: int, other: int) -> Sample:
    """The first ten of ``words`` ``common`` times each and the rest ``other`` times, shuffled and numbered."""
    listed = [*words[:COMMON] * common, *words[COMMON:] * other]
    random.shuffle(listed)
    instruction = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    question = Question(
        f"Question: What are the {COMMON} most common words in the above list?",
        f"Answer: The top {COMMON} words that appear most often in the list are:",
        tuple(words[:COMMON]),
    )
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return Sample(f"{instruction}\n{numbered}", (question,))


def _frequent_words(random: Random, haystack: str, tokens: int, size: int) -> Sample:
    """About ``size`` words whose frequency falls with the square of their rank; the most frequent one is dots."""
    counts: list[int] = []
    # A zeta distribution with the paper's exponent 2, whose sum is pi**2 / 6.
    while (count := int(size * 6 / math.pi**2 / (len(counts) + 1) ** 2)) > 0:
        counts.append(count)
    coded: dict[str, None] = {}
    while len(coded) < len(counts):
        coded["".join(random.choices(ascii_lowercase, k=6))] = None
    words = ["...", *coded]
    text = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
    random.shuffle(text)
    question = Question(
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(words[1 : 1 + FREQUENT]),
    )
    instruction = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words."
    )
    return Sample(f"{instruction} {' '.join(text)}", (question,))


def _pairs(items: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(items[::2], items[1::2], strict=True)


@cache
def _sentences(haystack: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", haystack.strip())


@cache
def _vocabulary(haystack: str) -> list[str]:
    """Its plain words of 4 to 8 letters."""
    return sorted(set(re.findall(r"\b[a-z]{4,8}\b", haystack)))


TASKS = {
    task.name: task
    for task in (
        Task("niah_single", partial(_niah, keys=1, values=1, together=False), 16),
        Task("niah_multikey", partial(_niah, keys=NEEDLES, values=1, together=False), 16),
        Task("niah_multivalue", partial(_niah, keys=1, values=NEEDLES, together=True), 64),
        Task("niah_multiquery", partial(_niah, keys=NEEDLES, values=1, together=True), 64),
        Task("variable_tracking", _variable_tracking, 30),
        Task("common_words", _common_words, 80),
        # From so many words on, the ranks asked for have counts of their own.
        Task("frequent_words", _frequent_words, 50, least=128),
    )
}
