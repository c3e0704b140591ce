"""Prompts: a long text that a model reads once, and questions that follow it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INSTRUCTION = "There is important information hidden inside the following text. Find it and memorize it.\n\n"
# Room that a context must leave for a question and its answer.
QUESTION_TOKENS = 256
# Tokens of one forward pass over a text. Always the same, from the text's first token on: rows then do not depend on
# where a run was interrupted.
CHUNK = 512
# A passage ends with a sentence if it can, else where it is this long.
PASSAGE, LONGEST_PASSAGE = 64, 100


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or not UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds NUL characters")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def context_ids(text: str, tokenizer: Any) -> Tensor:
    """Token ids ``[1, n]`` of a text with the instruction before it, the same for every question."""
    # Apart, so that no token is of both: a context can be told from its instruction later.
    return torch.cat([_ids(INSTRUCTION, tokenizer), _ids(text, tokenizer)], dim=1)


def question_ids(question: str, tokenizer: Any, answer_start: str | None = None) -> Tensor:
    """Token ids ``[1, n]`` of a question that follows the text, and of what the answer starts with."""
    # Plain text, not a chat: a small model finds facts more reliably when it continues the document itself.
    if answer_start is None:
        return _ids(f"\n\nQuestion: {question}\nAnswer:", tokenizer)
    return _ids(f"\n\n{question}\n{answer_start}", tokenizer)


def context_limit(model: Any) -> int | None:
    """Tokens that a context may have in all, for a question to fit behind it; None where the model names no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else limit - QUESTION_TOKENS


def answer_tokens(model: Any, asked: Tensor, cache: Any, eos: Any, most: int) -> Iterator[int]:
    """Greedy tokens after ``asked [1, n]``, at most ``most``, each as soon as it is known; ``eos`` ends them.

    ``eos`` is an id, several or None, and is yielded too. The rows of what was read stay in the cache.
    """
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    for _ in range(most):
        token = int(model(asked, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())
        yield token
        if token in ends:
            return
        asked = torch.tensor([[token]], device=asked.device)


@dataclass(frozen=True)
class Passage:
    """Rows ``first .. stop`` of a context, and what they say."""

    first: int
    stop: int
    text: str


def passages(ids: list[int], tokenizer: Any) -> list[Passage]:
    """A context cut into passages of whole sentences where they are short enough; the instruction is left out."""
    instruction = _ids(INSTRUCTION, tokenizer)[0].tolist()
    first = len(instruction) if ids[: len(instruction)] == instruction else 0
    found = []
    for at in range(first, len(ids)):
        length = at + 1 - first
        ends = length >= PASSAGE and re.search(r"[.!?]\s*$|\n", tokenizer.decode([ids[at]]))
        if ends or length == LONGEST_PASSAGE or at == len(ids) - 1:
            found.append(Passage(first, at + 1, tokenizer.decode(ids[first : at + 1]).strip()))
            first = at + 1
    return found


def _ids(text: str, tokenizer: Any) -> Tensor:
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids
