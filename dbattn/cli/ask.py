"""dbattn ask: only the question is read; the answer comes as it is found."""

import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..files import check_output, write_json
from ..serve.sources import SourceFinder
from ..shards import Shards
from ..text.prompt import answer_tokens
from ._console import line_console, wrapped
from ._opened import Opened, opened


@dataclass(frozen=True)
class Answer:
    """What was said, its tokens, and how long it took.

    Attributes:
        first_token_seconds: from the question to the first token.
        ms_per_token: median of the steps after it (a few of them are audited); None for a single token.
    """

    text: str
    tokens: list[int]
    first_token_seconds: float
    ms_per_token: float | None


@dataclass(frozen=True)
class Difference:
    """Where two answers part: the number of the first word and token that differ (0 is the first), and both words."""

    word: int
    token: int
    retrieval: str
    dense: str


def run_ask(
    *,
    context: Path,
    question: str,
    model: Path | None,
    weights: str,
    k: int | None,
    windows: int | None,
    max_tokens: int,
    show_sources: bool,
    dense: bool,
    json_path: Path | TextIO | None,
    quiet: bool,
    shards: Shards | None = None,
) -> str:
    """Print the answer to a question about a context, token by token; returns it.

    ``dense``: answer once more from all rows, from the same state, and print that and where the two differ.
    ``shards``: the processes that share the context's rows, all of which do the same.

    Raises:
        FileNotFoundError, ValueError: see ``opened``, and a question that does not fit.
    """
    check_output("--json", json_path)
    console = line_console(stderr=True, quiet=quiet)
    with opened(context, model, weights, k, console, windows, shards) as about:
        asked = about.asked(question, max_tokens)
        finder = SourceFinder(about.model, about.tokenizer, about.handle) if show_sources else None
        # The figures are of this question alone.
        about.handle.restart_report()
        with about.handle.trace() if finder is not None else nullcontext() as trace:
            answer = _stream(about, asked, max_tokens)
        summary = about.handle.report().summary
        reading = about.handle.reading(about.cache)
        sources = None if trace is None or finder is None else finder.sources(trace, reading)
        second = None
        if dense:
            about.take_back()
            with about.handle.dense():
                print("\ndense: ", end="")
                second = _stream(about, asked, max_tokens)
    difference = None if second is None else first_difference(answer, second)
    if second is not None:
        Console(highlight=False, soft_wrap=True).print(_comparison(answer, second, difference))
    if sources is not None:
        print("\nsources:", *wrapped(sources.lines(len(about.ids))), sep="\n")
    figures = {
        "open_seconds": about.seconds,
        "first_token_seconds": answer.first_token_seconds,
        "ms_per_token": answer.ms_per_token,
        **summary.to_dict(),
    }
    console.print(str(summary), markup=False)
    console.print(_figures_line(figures, second), markup=False)
    if second is not None and sources is not None:
        console.print("(looking for sources is part of the retrieving answer's time, not of the dense one's)")
    result = {"question": question, "answer": answer.text, "sources": sources and sources.to_dict(), "figures": figures}
    if second is not None:
        result["dense"] = {
            "answer": second.text,
            "same": difference is None,
            "first_difference": difference and asdict(difference),
            "first_token_seconds": second.first_token_seconds,
            "ms_per_token": second.ms_per_token,
        }
    write_json(json_path, result)
    return answer.text


def first_difference(retrieval: Answer, dense: Answer) -> Difference | None:
    """Where two answers begin to differ, None if they are the same word for word; "" where one has ended."""
    words = list(zip_longest(retrieval.text.split(), dense.text.split(), fillvalue=""))
    word = next((i for i, (ours, theirs) in enumerate(words) if ours != theirs), None)
    if word is None:
        return None
    pairs = zip_longest(retrieval.tokens, dense.tokens)
    token = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
    return Difference(word, token, *words[word])


def _stream(about: Opened, asked: Tensor, max_tokens: int) -> Answer:
    """Print the answer as its tokens come."""
    tokens: list[int] = []
    times = []
    shown = ""
    began = time.perf_counter()
    for token in answer_tokens(about.model, asked, about.cache, about.tokenizer.eos_token_id, max_tokens):
        times.append(time.perf_counter())
        tokens.append(token)
        text = about.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
        if text.endswith("\ufffd"):
            continue  # inside a character of several tokens
        # What a model writes after a blank line is the next question, not this answer.
        answer, blank, _ = text.partition("\n\n")
        answer = answer.rstrip()
        print(answer[len(shown) :], end="", flush=True)
        shown = answer
        if blank:
            break
    print(flush=True)
    steps = [1000 * (after - before) for before, after in pairwise(times)]
    return Answer(shown, tokens, times[0] - began, statistics.median(steps) if steps else None)


def _comparison(retrieval: Answer, dense: Answer, difference: Difference | None) -> Text:
    """Whether the answers are the same, or both from the word on where they part; that word stands out."""
    if difference is None:
        return Text("the answers are the same, word for word")
    ours, theirs = (repr(word) if word else "the end" for word in (difference.retrieval, difference.dense))
    text = Text(f"the answers part at word {difference.word + 1} (token {difference.token + 1}): ")
    text.append(f"retrieval has {ours}, dense {theirs}")
    for name, answer in (("retrieval", retrieval), ("dense", dense)):
        words = answer.text.split()
        text.append(f"\n  {name + ':':10}")
        for i, word in enumerate(words):
            text.append(" ")
            text.append(f">>{word}<<" if i == difference.word else word, "bold red" if i == difference.word else "")
    return text


def _figures_line(figures: dict[str, Any], dense: Answer | None) -> str:
    pace = "" if figures["ms_per_token"] is None else f", then {figures['ms_per_token']:.0f} ms a token"
    line = (
        f"{figures['rows_read'] or 0:.0f} of {figures['rows_stored']} rows read per query; context opened in "
        f"{figures['open_seconds']:.1f} s, first token {figures['first_token_seconds']:.1f} s later{pace}"
    )
    if dense is None:
        return line
    pace = "" if dense.ms_per_token is None else f", then {dense.ms_per_token:.0f} ms a token"
    return f"{line}; densely, first token after {dense.first_token_seconds:.1f} s{pace}"
