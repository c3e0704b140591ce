"""dbattn ask: only the question is read; the answer comes as it is found."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ..console import line_console, wrapped
from ..files import check_output, write_json
from ..prompt import answer_tokens
from ..report import LayerReport
from ._opened import Opened, opened
from ._sources import find_sources, neutral_trace


def run_ask(
    *,
    context: Path,
    question: str,
    model: Path | None,
    k: int | None,
    max_tokens: int,
    show_sources: bool,
    json_path: Path | TextIO | None,
    quiet: bool,
) -> str:
    """Print the answer to a question about a context, token by token; returns it.

    Raises:
        FileNotFoundError, ValueError: see ``opened``, and a question that does not fit.
    """
    check_output("--json", json_path)
    console = line_console(stderr=True, quiet=quiet)
    with opened(context, model, k, console) as about:
        asked = about.asked(question, max_tokens)
        neutral = neutral_trace(about) if show_sources else None
        # The figures are of this question alone.
        before = about.handle.report().layers
        began = time.perf_counter()
        with about.handle.trace() if neutral is not None else nullcontext() as trace:
            answer, times = _stream(about, asked, max_tokens)
        sources = None if trace is None or neutral is None else find_sources(about, trace, neutral)
        reads = _reads(before, about.handle.report().layers)
    if sources is not None:
        print("\nsources:", *wrapped(sources.lines(len(about.ids))), sep="\n")
    figures = {
        "open_seconds": about.seconds,
        "first_token_seconds": times[0] - began,
        "ms_per_token": 1000 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        **reads,
    }
    console.print(_figures_line(figures), markup=False)
    write_json(
        json_path,
        {"question": question, "answer": answer, "sources": sources and sources.to_dict(), "figures": figures},
    )
    return answer


def _stream(about: Opened, asked: Tensor, max_tokens: int) -> tuple[str, list[float]]:
    """Print the answer as its tokens come; returns it with the instants they came at."""
    tokens: list[int] = []
    times = []
    shown = ""
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
    return shown, times


def _reads(before: Sequence[LayerReport], after: Sequence[LayerReport]) -> dict[str, Any]:
    """Rows read per query, mean over the retrieving calls that ``after`` has more than ``before``; and dense calls."""
    calls = sum(a.retrieving - b.retrieving for b, a in zip(before, after, strict=True))
    rows = sum(a.rows_read * a.retrieving - b.rows_read * b.retrieving for b, a in zip(before, after, strict=True))
    dense = sum((Counter(a.dense) - Counter(b.dense) for b, a in zip(before, after, strict=True)), Counter[str]())
    return {
        "rows_read": rows / calls if calls else None,
        "rows_stored": max(layer.rows_stored for layer in after),
        "dense": dict(dense),
    }


def _figures_line(figures: dict[str, Any]) -> str:
    if figures["rows_read"] is None:
        reads = f"all {figures['rows_stored']} rows read ({'; '.join(figures['dense'])})"
    else:
        reads = f"{figures['rows_read']:.0f} of {figures['rows_stored']} rows read per query"
    pace = "" if figures["ms_per_token"] is None else f", then {figures['ms_per_token']:.0f} ms a token"
    return (
        f"{reads}; context opened in {figures['open_seconds']:.1f} s, first token "
        f"{figures['first_token_seconds']:.1f} s later{pace}"
    )
