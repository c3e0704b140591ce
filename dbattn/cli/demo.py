"""The main job, end to end: a model reads a long text and answers from retrieved rows, checked against dense."""

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from ..config import RetrievalConfig
from ..files import check_output, write_json
from ..hf.layer_report import counted
from ..query.audit import AuditReport, figure
from ..text.haystack import Needle, hide, make_needles, read_haystack
from ..text.prompt import CHUNK, QUESTION_TOKENS, answer_tokens, context_ids, context_limit, question_ids
from ._console import long_work, table_console

if TYPE_CHECKING:
    from ..hf import Handle

ANSWER_TOKENS = 12


@dataclass
class Answer:
    """One question answered both ways.

    Attributes:
        figures: means over the audited calls of the retrieving pass; ``rows_read`` over all of its calls.
        audits: audited calls behind them.
        scanned: calls of that pass that were answered densely, by reason.
    """

    needle: Needle
    dense: str
    retrieval: str
    figures: dict[str, float]
    ms_dense: list[float]
    ms_retrieval: list[float]
    audits: int = 0
    scanned: dict[str, int] = field(default_factory=dict)


def run_demo(
    *,
    tokens: int = 4000,
    index: str = "auto",
    k: int = 256,
    needles: int = 3,
    haystack: Path | TextIO | None = None,
    model: Path | None = None,
    weights: str = "float32",
    json_path: Path | TextIO | None = None,
    quiet: bool = False,
) -> list[Answer]:
    """Hide needles, prefill densely, answer every question densely and through the index; print one table.

    Raises:
        ValueError: an option that cannot work; says which and why.
        FileNotFoundError: a haystack, model or output folder that is not there.
        KeyboardInterrupt: Ctrl-C; the questions answered by then have been printed and written.
    """
    from ..hf import wrap
    from ._opened import load

    # Everything cheap that can be wrong is checked before the minute-long work starts.
    config = RetrievalConfig(index=index, k=k, audit_rate=0.0, max_queries=QUESTION_TOKENS, dense_below=0)
    least = max(config.traits.dense_below, config.rows_retrieved) + config.window + config.n_sink
    if tokens <= least:
        raise ValueError(
            f"tokens is {tokens}, expected more than {least}: with index={config.index_name!r} and k={k}, "
            "a shorter text is read densely"
        )
    check_output("--json", json_path)
    prose, hidden = read_haystack(haystack), make_needles(needles)
    console = Console(stderr=True, quiet=quiet)
    lm, tokenizer = load(model, weights, console)
    limit = context_limit(lm)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"tokens is {tokens}, expected at most {limit}: the model's context is {limit + QUESTION_TOKENS}"
        )
    context = context_ids(hide(hidden, prose, tokens, tokenizer), tokenizer)

    answers: list[Answer] = []
    interrupted = False
    with torch.inference_mode(), wrap(lm, config) as handle:
        cache = handle.new_cache()
        with handle.dense():
            _prefill(lm, context, cache, console)
        cache.mark()
        try:
            for needle in hidden:
                answers.append(_ask(lm, tokenizer, handle, cache, needle))
                console.print(
                    f"depth {needle.depth:.0%}: dense {answers[-1].dense!r}, retrieval {answers[-1].retrieval!r}"
                )
        except KeyboardInterrupt:
            interrupted = True
            console.print(f"interrupted: {len(answers)} of {len(hidden)} questions were answered")
    if not answers:
        raise KeyboardInterrupt
    table_console().print(_table(answers, config))
    write_json(json_path, summary(answers))
    if interrupted:
        raise KeyboardInterrupt
    return answers


def summary(answers: list[Answer]) -> dict[str, Any]:
    """The result as plain data: per-needle verdicts, means over the questions, and median times (None: not timed)."""

    def mean(name: str) -> float:
        return statistics.fmean(a.figures[name] for a in answers)

    return {
        "needles": [
            {
                "depth": a.needle.depth,
                "dense_correct": a.needle.is_answered_by(a.dense),
                "retrieval_correct": a.needle.is_answered_by(a.retrieval),
            }
            for a in answers
        ],
        "recall": mean("recall"),
        "attention_mass": mean("attention_mass"),
        "relative_error": mean("relative_error"),
        "rows_retrieved": mean("rows_retrieved"),
        "rows_read": mean("rows_read"),
        "rows_stored": mean("rows_stored"),
        "dense_calls": dict(_scanned(answers)),
        "ms_per_token": {
            "dense": _median([ms for a in answers for ms in a.ms_dense]),
            "retrieval": _median([ms for a in answers for ms in a.ms_retrieval]),
        },
    }


def _median(times: list[float]) -> float | None:
    # An answer that ends with its first token has no decode step to time.
    return statistics.median(times) if times else None


def _prefill(lm: Any, ids: torch.Tensor, cache: Any, console: Console) -> None:
    with long_work(console, "reading the text", ids.shape[1], "tokens") as advance:
        for chunk in torch.split(ids, CHUNK, dim=1):
            lm(chunk, past_key_values=cache, logits_to_keep=1)
            advance(chunk.shape[1])


def _ask(lm: Any, tokenizer: Any, handle: "Handle", cache: Any, needle: Needle) -> Answer:
    """Three passes over one question: dense, retrieving (both timed), and the retrieving one again with audits."""
    question = question_ids(needle.question, tokenizer, needle.answer_start)
    with handle.dense():
        dense, ms_dense = _generate(lm, question, cache, tokenizer.eos_token_id)
    retrieved, ms_retrieval = _generate(lm, question, cache, tokenizer.eos_token_id)
    handle.restart_report()
    with handle.audit() as audits:
        _generate(lm, question, cache, tokenizer.eos_token_id)
    summary = handle.report().summary
    if not audits:
        raise ValueError(f"nothing was retrieved: {'; '.join(summary.dense | summary.prompts)}")
    return Answer(
        needle,
        tokenizer.decode(dense, skip_special_tokens=True).strip(),
        tokenizer.decode(retrieved, skip_special_tokens=True).strip(),
        _figures(audits) | {"rows_read": summary.rows_read or 0.0},
        ms_dense,
        ms_retrieval,
        len(audits),
        summary.dense,
    )


def _scanned(answers: list[Answer]) -> Counter[str]:
    return sum((Counter(answer.scanned) for answer in answers), Counter())


def _figures(audits: list[AuditReport]) -> dict[str, float]:
    """Means over the audited calls of one question."""
    names = ("recall", "attention_mass", "relative_error", "rows_retrieved", "rows_read", "rows_stored")
    return {name: statistics.fmean(float(getattr(audit, name)) for audit in audits) for name in names}


def _generate(lm: Any, question: torch.Tensor, cache: Any, eos: int | None) -> tuple[list[int], list[float]]:
    """Greedy tokens after the question, and the milliseconds of each decode step; the cache is left as it was."""
    length = cache.get_seq_length()
    tokens, times = [], []
    began = None
    for token in answer_tokens(lm, question, cache, eos, ANSWER_TOKENS):
        if began is not None:
            times.append(1000 * (time.perf_counter() - began))
        tokens.append(token)
        began = time.perf_counter()
    cache.crop(length - cache.get_seq_length())
    return tokens, times


def _table(answers: list[Answer], config: RetrievalConfig) -> Table:
    table = Table(title=f"index={config.index_name}, k={config.k}: dense against retrieval")
    if scanned := _scanned(answers):
        table.caption = f"calls answered densely, which read all rows: {counted(scanned)}"
    for name in ("depth", "dense says", "retrieval says"):
        table.add_column(name)
    for name in ("rows read / stored", "recall@k", "mass", "rel. error", "ms/token dense", "ms/token retrieval"):
        table.add_column(name, justify="right")
    for a in answers:
        marks = ["✓" if a.needle.is_answered_by(said) else "✗" for said in (a.dense, a.retrieval)]
        figures = a.figures
        table.add_row(
            f"{a.needle.depth:.0%}",
            f"{marks[0]} {a.dense}",
            f"{marks[1]} {a.retrieval}",
            f"{figures['rows_read']:.0f} / {figures['rows_stored']:.0f}",
            *(figure(figures[name], a.audits) for name in ("recall", "attention_mass", "relative_error")),
            *("-" if ms is None else f"{ms:.1f}" for ms in (_median(a.ms_dense), _median(a.ms_retrieval))),
        )
    return table
