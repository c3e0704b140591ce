"""The main job, end to end: a model reads a long text and answers from retrieved rows, checked against dense."""

import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .audit import AuditReport
from .config import DENSE_BELOW, RetrievalConfig
from .haystack import Needle, hide, make_needles, read_haystack

if TYPE_CHECKING:
    from .hf import Handle

INSTRUCTION = "There is important information hidden inside the following text. Find it and memorize it.\n\n"
CHUNK = 512
ANSWER_TOKENS = 12
QUESTION_TOKENS = 256


@dataclass
class Answer:
    """One question answered both ways; figures are means over layers of the retrieving pass."""

    needle: Needle
    dense: str
    retrieval: str
    figures: dict[str, float]
    ms_dense: list[float]
    ms_retrieval: list[float]


def run_demo(
    *,
    tokens: int = 4000,
    index: str = "auto",
    k: int = 256,
    needles: int = 3,
    haystack: Path | None = None,
    model: Path | None = None,
    json_path: Path | None = None,
    quiet: bool = False,
) -> list[Answer]:
    """Hide needles, prefill densely, answer every question densely and through the index; print one table.

    Raises:
        ValueError: an option that cannot work; says which and why.
        FileNotFoundError: a haystack, model or output folder that is not there.
        KeyboardInterrupt: Ctrl-C; the questions answered by then have been printed and written.
    """
    from .hf import load_model, wrap

    # Everything cheap that can be wrong is checked before the minute-long work starts.
    config = RetrievalConfig(index=index, k=k, audit_rate=0.0, max_queries=QUESTION_TOKENS, dense_below=0)
    least = max(DENSE_BELOW[config.index_name], config.rows_retrieved) + config.window + config.n_sink
    if tokens <= least:
        raise ValueError(
            f"tokens is {tokens}, expected more than {least}: with index={config.index_name!r} and k={k}, "
            "a shorter text is read densely"
        )
    if json_path is not None and not json_path.parent.is_dir():
        raise FileNotFoundError(f"--json {json_path}: the folder {json_path.parent} does not exist")
    if json_path is not None and json_path.is_dir():
        raise ValueError(f"--json {json_path} is a folder, expected a file")
    prose, hidden = read_haystack(haystack), make_needles(needles)
    console = Console(stderr=True, quiet=quiet)
    with console.status("loading the model (the first time, a GGUF file is converted: about half a minute)"):
        lm, tokenizer = load_model(model)
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + QUESTION_TOKENS > limit:
        raise ValueError(
            f"tokens is {tokens}, expected at most {limit - QUESTION_TOKENS}: the model's context is {limit}"
        )
    context, _ = _prompt(hide(hidden, prose, tokens, tokenizer), hidden[0], tokenizer)

    answers: list[Answer] = []
    interrupted = False
    with torch.inference_mode(), wrap(lm, config) as handle:
        cache = handle.new_cache()
        with handle.dense():
            _prefill(lm, context, cache, console)
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
    output = Console()
    # Piped output has no width of its own; a table cut to 80 columns would be unreadable there.
    (output if output.is_terminal else Console(width=140)).print(_table(answers, config))
    if json_path is not None:
        _write_json(json_path, answers)
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
        "ms_per_token": {
            "dense": _median([ms for a in answers for ms in a.ms_dense]),
            "retrieval": _median([ms for a in answers for ms in a.ms_retrieval]),
        },
    }


def _median(times: list[float]) -> float | None:
    # An answer that ends with its first token has no decode step to time.
    return statistics.median(times) if times else None


def _prompt(text: str, needle: Needle, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[1, n]`` of the context, the same for every question, and of one question."""
    # Plain text, not a chat: a small model finds facts more reliably when it continues the document itself.
    parts = (INSTRUCTION + text, f"\n\n{needle.question}\n{needle.answer_start}")
    context, asked = (tokenizer(part, add_special_tokens=False, return_tensors="pt")["input_ids"] for part in parts)
    return context, asked


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Speed over the last seconds."""
        return Text("" if task.speed is None else f"{task.speed:.0f} tokens/s")


def _prefill(lm: Any, ids: torch.Tensor, cache: Any, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _TokensPerSecond(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading the text", total=ids.shape[1])
        for chunk in torch.split(ids, CHUNK, dim=1):
            lm(chunk, past_key_values=cache, logits_to_keep=1)
            progress.advance(task, chunk.shape[1])


def _ask(lm: Any, tokenizer: Any, handle: "Handle", cache: Any, needle: Needle) -> Answer:
    """Three passes over one question: dense, retrieving (both timed), and the retrieving one again with audits."""
    _, question = _prompt("", needle, tokenizer)
    with handle.dense():
        dense, ms_dense = _generate(lm, question, cache, tokenizer.eos_token_id)
    before = _dense_reasons(handle)
    retrieved, ms_retrieval = _generate(lm, question, cache, tokenizer.eos_token_id)
    with handle.audit() as audits:
        _generate(lm, question, cache, tokenizer.eos_token_id)
    if not audits:
        raise ValueError(f"nothing was retrieved: {'; '.join(_dense_reasons(handle) - before)}")
    return Answer(
        needle,
        tokenizer.decode(dense, skip_special_tokens=True).strip(),
        tokenizer.decode(retrieved, skip_special_tokens=True).strip(),
        _figures(audits),
        ms_dense,
        ms_retrieval,
    )


def _dense_reasons(handle: "Handle") -> Counter[str]:
    return sum((Counter(layer.dense) for layer in handle.report().layers), Counter())


def _figures(audits: list[AuditReport]) -> dict[str, float]:
    """Means over the audited calls of one question."""
    names = ("recall", "attention_mass", "relative_error", "rows_retrieved", "rows_read", "rows_stored")
    return {name: statistics.fmean(float(getattr(audit, name)) for audit in audits) for name in names}


def _generate(lm: Any, question: torch.Tensor, cache: Any, eos: int | None) -> tuple[list[int], list[float]]:
    """Greedy tokens after the question, and the milliseconds of each decode step; the cache is left as it was."""
    length = cache.get_seq_length()
    tokens = [int(lm(question, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())]
    times = []
    while len(tokens) < ANSWER_TOKENS and tokens[-1] != eos:
        began = time.perf_counter()
        logits = lm(torch.tensor([[tokens[-1]]]), past_key_values=cache, logits_to_keep=1).logits
        times.append(1000 * (time.perf_counter() - began))
        tokens.append(int(logits[0, -1].argmax()))
    cache.crop(length - cache.get_seq_length())
    return tokens, times


def _table(answers: list[Answer], config: RetrievalConfig) -> Table:
    table = Table(title=f"index={config.index_name}, k={config.k}: dense against retrieval")
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
            f"{figures['recall']:.3f}",
            f"{figures['attention_mass']:.3f}",
            f"{figures['relative_error']:.4f}",
            *("-" if ms is None else f"{ms:.1f}" for ms in (_median(a.ms_dense), _median(a.ms_retrieval))),
        )
    return table


def _write_json(path: Path, answers: list[Answer]) -> None:
    """Written aside and renamed: the file is whole or absent."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_text(json.dumps(summary(answers), indent=2) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
