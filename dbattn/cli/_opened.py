"""What the commands that ask about a context begin with: the model, the context, and a cache that holds it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..config import RetrievalConfig
from ..hf import Handle, UnsupportedModelError, load_model, wrap
from ..hf.cache import DatabaseLayer
from ..serve.contexts import reading_config
from ..shards import Shards
from ..snapshot import SnapshotError, open_parts
from ..text.prompt import check_question, question_ids
from ._console import waiting


@dataclass(frozen=True)
class Opened:
    """A context and the model that goes on from it.

    Attributes:
        cache: holds the context's rows.
        ids: token ids of the context.
        seconds: time it took to open the context, the model's loading not included.
    """

    model: Any
    tokenizer: Any
    handle: Handle
    cache: Any
    ids: list[int]
    seconds: float

    @property
    def databases(self) -> list[int]:
        """Numbers of the model's layers that keep all rows."""
        return [number for number, layer in enumerate(self.cache.layers) if isinstance(layer, DatabaseLayer)]

    def take_back(self) -> None:
        """Leave the context alone in the cache, as before the question."""
        self.cache.crop(len(self.ids) - self.cache.get_seq_length())

    def asked(self, question: str, max_tokens: int) -> Tensor:
        """Token ids ``[1, n]`` of a question.

        Raises:
            ValueError: it is empty or not UTF-8, or it and an answer of ``max_tokens`` do not fit the model's context
                any more.
        """
        check_question(question)
        if max_tokens < 1:
            raise ValueError(f"--max-tokens is {max_tokens}, expected at least 1")
        asked = question_ids(question, self.tokenizer)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # Where a context was read by windows, the question stands where the newest one ends.
        windows = self.handle.windows
        before = len(self.ids) + (0 if windows is None else windows.shift)
        needed = before + asked.shape[1] + max_tokens
        if limit is not None and needed > limit:
            end = f"the context {'has' if windows is None else 'was read by windows that end at'} {before} tokens"
            raise ValueError(
                f"{end}, the question has {asked.shape[1]} and the answer up to {max_tokens}: {needed}, and the model "
                f"reads at most {limit}"
            )
        return asked


def load(model: Path | None, weights: str, console: Console) -> tuple[Any, Any]:
    """The model and its tokenizer; says that it is loading."""
    with waiting(console, "loading the model (the first time, a GGUF file is converted: about half a minute)"):
        return load_model(model, weights=weights)


@contextmanager
def serving(
    model: Any, config: RetrievalConfig | None, context: Path | None, shards: Shards | None = None
) -> Iterator[Handle]:
    """The model wrapped, in inference mode.

    Raises:
        ValueError: a model that cannot be wrapped, or another one's context.
    """
    try:
        handle = wrap(model, config, context=context, group=shards)
    except UnsupportedModelError as error:
        raise ValueError(f"--model: {error}") from error
    with torch.inference_mode(), handle:
        yield handle


@contextmanager
def opened(
    context: Path,
    model: Path | None,
    weights: str,
    k: int | None,
    console: Console,
    windows: int | None = None,
    shards: Shards | None = None,
) -> Iterator[Opened]:
    """A context ready for a question, read as it was ingested to be.

    ``k``: with so many rows per query and KV head. ``windows``: with so many windows, where it was read by windows.

    Raises:
        FileNotFoundError, ValueError: the context or the model is missing, damaged, or they do not belong together.
    """
    config = reading_config(context if shards is None else open_parts(context, shards)[1], k)
    if windows is not None:
        if windows < 1:
            raise ValueError(f"--windows is {windows}, expected at least 1")
        config = replace(config, n_windows=windows)
    lm, tokenizer = load(model, weights, console)
    began = time.perf_counter()
    with serving(lm, config, context, shards) as handle:
        if handle.context is None:
            raise SnapshotError(f"{context} is not a context of dbattn ingest: its token ids are missing")
        cache = handle.new_cache()
        ids = handle.context[0].tolist()
        yield Opened(lm, tokenizer, handle, cache, ids, time.perf_counter() - began)
