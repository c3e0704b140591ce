"""Prompts: a long text that a model reads once, and questions that follow it."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..files import name_of
from ..windows import Windows

INSTRUCTION = "There is important information hidden inside the following text. Find it and memorize it.\n\n"
# A chat about a text, as ``question_ids`` writes its first question.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '\n\nQuestion: ' + message.content + '\nAnswer:' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim }}"
    "{% else %}{{ '\n\n' + message.content }}{% endif %}"
    "{% endfor %}"
)
# Room that a context must leave for a question and its answer.
QUESTION_TOKENS = 256
# Tokens of one forward pass over a text. Always the same, from the text's first token on: rows then do not depend on
# where a run was interrupted.
CHUNK = 512
# New tokens of a window of a text that is longer than the model's own, and tokens of the window before that are read
# again. A window shorter than LEAST_WINDOW is more overlap than text.
WINDOW, OVERLAP, LEAST_WINDOW = 2048, 256, 64
# A passage ends with a sentence if it can, else where it is this long.
PASSAGE, LONGEST_PASSAGE = 64, 100


def read_text(source: Path | TextIO) -> str:
    """The text of a file or a pipe, or of a stream such as ``sys.stdin``, whose bytes are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or not UTF-8 text.
    """
    if isinstance(source, Path) and (source.is_dir() or not source.exists()):
        raise FileNotFoundError(f"{source} is not a file")
    raw = source.read_bytes() if isinstance(source, Path) else source.buffer.read()
    name = name_of(source)
    try:
        # Line ends are made one, as in every text file.
        text = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from None
    if "\0" in text:
        raise ValueError(f"{name} is not text: it holds NUL characters")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def check_question(question: str) -> None:
    """Raise ValueError for a question that is empty, or was no UTF-8 where it was typed."""
    if not question.strip():
        raise ValueError("the question is empty")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        code, before = ord(question[error.start]), len(question[: error.start].encode("utf-8"))
        # Python keeps a byte that it cannot decode as one of these.
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character, U+{code:04X}"
        raise ValueError(f"the question is not UTF-8 text: {what} after {before} bytes") from None


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


def windows_for(model: Any, tokenizer: Any, tokens: int | None = None) -> Windows:
    """How a model reads a text that is too long for it: after the instruction, in windows of ``tokens`` new tokens.

    Raises:
        ValueError: no room for such windows and a question.
    """
    limit = context_limit(model)
    if tokens is None:
        tokens = WINDOW if limit is None else min(WINDOW, (limit + QUESTION_TOKENS) // 2)
    if tokens < LEAST_WINDOW:
        raise ValueError(f"--window-tokens is {tokens}, expected at least {LEAST_WINDOW}")
    windows = Windows(_ids(INSTRUCTION, tokenizer).shape[1], min(OVERLAP, tokens // 4), tokens)
    if limit is not None and windows.span > limit:
        most = limit - windows.prefix - windows.overlap
        raise ValueError(
            f"--window-tokens is {tokens}, expected at most {most}: of {limit + QUESTION_TOKENS} that the model reads, "
            f"{windows.prefix} are for the instruction, {windows.overlap} for overlap, {QUESTION_TOKENS} for a question"
        )
    return windows


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
    """A context cut into passages of whole sentences where they are short enough, else of whole words.

    The instruction is left out.
    """
    instruction = _ids(INSTRUCTION, tokenizer)[0].tolist()
    first = len(instruction) if ids[: len(instruction)] == instruction else 0
    found = []
    while first < len(ids):
        stop = _end_of_passage(ids, first, tokenizer)
        found.append(Passage(first, stop, tokenizer.decode(ids[first:stop]).strip()))
        first = stop
    return found


def _end_of_passage(ids: list[int], first: int, tokenizer: Any) -> int:
    """After a sentence, else after a word; where all of it is one word, after a whole character."""
    longest = min(first + LONGEST_PASSAGE, len(ids))
    for stop in range(first + PASSAGE, longest):
        before, after = _around(ids, first, stop, tokenizer)
        between_words = after.isspace() or before[-1:].isspace()
        # A point inside a word (3.14) ends nothing; full stops of scripts without spaces always do.
        if re.search(r"[\u3002\uff01\uff1f]$", before) or (between_words and re.search(r"([.!?]|\n)\s*$", before)):
            return stop
    if longest == len(ids):
        return longest
    places = [(stop, *_around(ids, first, stop, tokenizer)) for stop in range(longest, first, -1)]
    words = (stop for stop, before, after in places if after.isspace() or before[-1:].isspace())
    characters = (stop for stop, _, after in places if after)
    return next(words, next(characters, longest))


def _around(ids: list[int], first: int, stop: int, tokenizer: Any) -> tuple[str, str]:
    """The text of ``first .. stop`` and the first character after it, "" where a character goes on there."""
    before, more = (tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False) for end in (stop, stop + 1))
    return (before, more[len(before) : len(before) + 1]) if more.startswith(before) else ("", "")


def _ids(text: str, tokenizer: Any) -> Tensor:
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids
