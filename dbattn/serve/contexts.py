"""What is served: a model, and the same model after each context, under names."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import RetrievalConfig
from ..hf import Handle, UnsupportedModelError, wrap
from ..snapshot import SnapshotError, describe
from ..text.prompt import CHAT_TEMPLATE, QUESTION_TOKENS
from .sources import SourceFinder

AUDIT_RATE = 0.02
DEFAULT_NAME = "smollm2"


@dataclass(frozen=True, eq=False)
class Served:
    """A wrapped model under a name: ``smollm2``, or ``smollm2@book`` where it goes on from a context.

    Attributes:
        tokenizer: its chat template continues the context as ``dbattn ask`` does; without a context, the model's own.
        stops: what ends an answer in a chat.
    """

    name: str
    model: Any
    tokenizer: Any
    handle: Handle
    stops: tuple[str, ...] = ()

    @cached_property
    def ids(self) -> list[int]:
        """Token ids of the context; none without one."""
        context = self.handle.context
        return [] if context is None else context[0].tolist()

    @cached_property
    def finder(self) -> SourceFinder | None:
        """Finds the sources of answers about the context."""
        return SourceFinder(self.model, self.tokenizer, self.handle) if self.ids else None

    @property
    def most_tokens(self) -> int | None:
        """Tokens, the context's included, that the model can have in all; None where it names no limit."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        windows = self.handle.windows
        return limit if limit is None or windows is None else limit - windows.shift


def reading_config(context: Path, k: int | None = None) -> RetrievalConfig:
    """How questions about a context are read: as it was ingested to be, or with ``k`` rows per query and KV head.

    Raises:
        FileNotFoundError: there is no such folder.
        SnapshotError (a ValueError): it is not a context of one text.
    """
    info = describe(context)  # what can be wrong with it is said before a model is loaded
    if info.model is None or not info.rows:
        raise SnapshotError(f"{context} is not a context: it holds the rows of no model (make one with dbattn ingest)")
    if info.batch != 1:
        raise SnapshotError(f"{context} holds {info.batch} texts, expected one")
    config = replace(info.config, max_queries=QUESTION_TOKENS)
    # The first calls and every 50th: an answer comes with its error. An audited call takes some twenty times as long.
    config = replace(config, audit_rate=max(AUDIT_RATE, config.audit_rate))
    # A budget asked for is a wish to retrieve.
    return config if k is None else replace(config, k=k, dense_below=0)


def named(contexts: Sequence[str]) -> dict[str, Path]:
    """The folders of ``book.dbattn`` and ``name=folder``, by name: what a folder is called, without ``.dbattn``.

    Raises:
        ValueError: a name that clients could not type, or one that is given twice.
    """
    found: dict[str, Path] = {}
    for text in contexts:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.absolute().name.removesuffix(".dbattn")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"--context {text}: {name!r} is no name for clients: give one, --context NAME={path}")
        if name in found:
            raise ValueError(f"--context {text}: {found[name]} is called {name}, too: --context OTHER_NAME={path}")
        found[name] = path
    return found


def model_name(path: Path | None) -> str:
    """What a model is called: the default's name, or that of its folder or file."""
    return DEFAULT_NAME if path is None else re.sub(r"[^\w.-]", "-", path.absolute().name.removesuffix(".gguf"))


def twin_of(model: Any) -> Any:
    """A second model over the same weights, so that both can be wrapped."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


@contextmanager
def wrapped(
    model: Any, tokenizer: Any, name: str, contexts: dict[str, Path], k: int | None = None
) -> Iterator[dict[str, Served]]:
    """The model, and one over the same weights for each context, by name; contexts are in memory by then.

    Raises:
        ValueError: a model that cannot be wrapped, or another one's context.
        SnapshotError (a ValueError): a context is damaged.
    """
    configs = {each: reading_config(path, k) for each, path in contexts.items()}
    twins = {each: twin_of(model) for each in contexts}
    with ExitStack() as stack:
        try:
            plain = stack.enter_context(wrap(model))
            handles = {
                each: stack.enter_context(wrap(twins[each], configs[each], context=path))
                for each, path in contexts.items()
            }
        except UnsupportedModelError as error:
            raise ValueError(f"--model: {error}") from error
        own = tokenizer if tokenizer.chat_template else _continuing(tokenizer)
        found = [Served(name, model, own, plain, () if tokenizer.chat_template else ("\n\n",))]
        for each, handle in handles.items():
            if handle.context is None:
                raise SnapshotError(f"{contexts[each]} is not a context of dbattn ingest: its token ids are missing")
            handle.new_cache()  # reads and checks it
            found.append(Served(f"{name}@{each}", twins[each], _continuing(tokenizer), handle, ("\n\n",)))
        yield {served.name: served for served in found}


def _continuing(tokenizer: Any) -> Any:
    """The tokenizer with a chat template that continues a document."""
    twin = copy.copy(tokenizer)
    twin.chat_template = CHAT_TEMPLATE
    return twin
