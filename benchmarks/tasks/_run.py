"""Asking: every context is read once by the model alone, then every server answers its questions (protocol B)."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ._operators import DENSE, Server
from ._ruler import Sample, Task, score, token_ids

CHUNK = 512

Record = dict[str, Any]


def pieces(tokens: int) -> int:
    """In how many pieces a context of so many tokens is read."""
    return -(-tokens // CHUNK)


def ask(
    model: Any,
    tokenizer: Any,
    task: Task,
    sample: Sample,
    servers: Sequence[Server],
    tick: Callable[[], None] = lambda: None,
) -> Record:
    """One sample through all servers; ``tick`` is called for every piece of the context that was read.

    Returns:
        {task, context_tokens, questions[] = {question, references, answers{server: answer}}, servers{server: {score,
        rows_read, rows_stored, dense_calls}}}: score is the mean over the questions in percent, rows are means over
        calls and layers, dense_calls the share of calls that were answered densely.
    """
    context = torch.tensor([token_ids(sample.context, tokenizer)], device=model.device)
    prompts = [
        torch.tensor([token_ids(question.prompt, tokenizer)], device=model.device) for question in sample.questions
    ]
    questions: list[Record] = [
        {"question": question.prompt.strip(), "references": list(question.references), "answers": {}}
        for question in sample.questions
    ]
    figures = {}
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        # The last token is left to the servers: with it they take over.
        for chunk in context[:, :-1].split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
            tick()
        for server in servers:
            with server.serving(model, cache, context[:, -1:]) as usage:
                for prompt, question in zip(prompts, questions, strict=True):
                    ids = generate(model, prompt, cache, tokenizer.eos_token_id, task.answer_tokens)
                    question["answers"][server.name] = tokenizer.decode(ids, skip_special_tokens=True)
                used = usage()
            figures[server.name] = {
                "score": statistics.fmean(score(q["answers"][server.name], q["references"]) for q in questions),
                "rows_read": used.rows_read / used.calls,
                "rows_stored": used.rows_stored / used.calls,
                "dense_calls": used.dense / used.calls,
            }
    return {"task": task.name, "context_tokens": context.shape[1], "questions": questions, "servers": figures}


def generate(model: Any, prompt: torch.Tensor, cache: DynamicCache, eos: int | None, limit: int) -> list[int]:
    """At most ``limit`` greedy tokens after ``prompt [1, n]``; the cache is left as it was."""
    rows, ids, tokens = cache.get_seq_length(), prompt, list[int]()
    while len(tokens) < limit and (not tokens or tokens[-1] != eos):
        tokens.append(int(model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]], device=prompt.device)
    cache.crop(rows - cache.get_seq_length())
    return tokens


def summarise(records: Sequence[Record], names: Sequence[str]) -> dict[str, Record]:
    """What the servers ``names`` scored on the samples of one size.

    Returns:
        Per server {tasks{task: score}, average, difference, standard_error, same_answers, rows_read, rows_stored,
        dense_calls}: scores are means over samples, ``average`` their mean over tasks as in RULER; ``difference`` in
        points from dense's, with its standard error over samples (None with one sample of a task); ``same_answers`` the
        share of questions answered with dense's very string.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    summary = {}
    for name in names:
        gaps = {
            task: [r["servers"][name]["score"] - r["servers"][DENSE]["score"] for r in records if r["task"] == task]
            for task in tasks
        }
        scores = {
            task: statistics.fmean(r["servers"][name]["score"] for r in records if r["task"] == task) for task in tasks
        }
        answers = [question["answers"] for record in records for question in record["questions"]]
        summary[name] = {
            "tasks": scores,
            "average": statistics.fmean(scores.values()),
            "difference": statistics.fmean(statistics.fmean(each) for each in gaps.values()),
            "standard_error": _standard_error(list(gaps.values())),
            "same_answers": statistics.fmean(each[name] == each[DENSE] for each in answers),
            **{
                what: statistics.fmean(record["servers"][name][what] for record in records)
                for what in ("rows_read", "rows_stored", "dense_calls")
            },
        }
    return summary


def _standard_error(groups: Sequence[Sequence[float]]) -> float | None:
    """Of the mean of the groups' means."""
    if any(len(group) < 2 for group in groups):
        return None
    return math.sqrt(sum(statistics.variance(group) / len(group) for group in groups)) / len(groups)
