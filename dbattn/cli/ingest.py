"""dbattn ingest: a long text is read once, in chunks, and saved as it goes."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from ..config import RetrievalConfig
from ..files import name_of
from ..hf import Handle
from ..shards import Shards
from ..snapshot import ShardWriter, SnapshotError, SnapshotInfo, SnapshotWriter, describe, open_parts
from ..text.prompt import CHUNK, QUESTION_TOKENS, context_ids, context_limit, read_text, windows_for
from ..windows import Windows
from ._console import first_ctrl_c, line_console, long_work
from ._opened import load, serving

# Tokens between two saves. The newest file of rows is written anew by each.
SAVE_EVERY, SAVE_EVERY_BY_WINDOWS = 2048, 8192


class StopAsked(Exception):
    """Ctrl-C was heard inside a window."""


def run_ingest(
    *,
    file: Path | TextIO,
    out: Path,
    model: Path | None,
    weights: str,
    index: str | None,
    storage: str | None,
    tokens: int | None,
    window_tokens: int | None,
    save_every: int | None,
    quiet: bool,
    shards: Shards | None = None,
) -> None:
    """Read what ``out`` does not hold yet of a text, saving every ``save_every`` tokens; nothing to do is no error.

    A text that is longer than what the model reads at once is read by windows, whose rows are kept as int8 if nothing
    else is asked for. ``shards``: the processes that share the rows, all of which do the same.

    Raises:
        ValueError: options that do not fit the model, a folder that holds another text, another model's rows or
            something else, or that another ingest is writing to.
        OSError: a file or folder that is missing, or cannot be written.
        KeyboardInterrupt: Ctrl-C; what was read by then is saved, of windows those that were read to their end.
    """
    for name, value in (("--save-every", save_every), ("--tokens", tokens), ("--window-tokens", window_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    text = read_text(file)
    # One decision of all ranks: a fast one must not make the folder before a slow one has looked for it.
    if _begun(out) if shards is None else any(shards.agreed(lambda: _begun(out))):
        # What can be wrong with it is said before the model is loaded.
        with _writer(out, shards) as writer:
            if writer.exists:
                _check_begun_with(out, _described(out, shards), index, storage)
    console, name = line_console(stderr=True, quiet=quiet), name_of(file)
    lm, tokenizer = load(model, weights, console)
    ids, limit = context_ids(text, tokenizer)[:, :tokens], context_limit(lm)
    by_windows = window_tokens is not None or (limit is not None and ids.shape[1] > limit)
    if by_windows and shards is not None:
        raise ValueError(
            f"{name} must be read by windows, which one process does: the model reads {limit} tokens at once"
        )
    windows = windows_for(lm, tokenizer, window_tokens) if by_windows else None
    with _writer(out, shards) as writer:
        config = None
        if writer.exists:
            windows = _windows(out, _described(out, shards), windows, window_tokens, name)
        else:
            kept = storage or (None if windows is None else "int8")
            config = RetrievalConfig(index=index or "auto", storage=kept, max_queries=QUESTION_TOKENS)
        with serving(lm, config, out if writer.exists else None, shards) as handle:
            held = _held(handle, ids, out, name) if writer.exists else 0
            began = time.perf_counter()
            if held < ids.shape[1]:
                if windows is not None:
                    console.print(_how(ids.shape[1], windows, lm, name))
                every = save_every or (SAVE_EVERY if windows is None else SAVE_EVERY_BY_WINDOWS)
                _read(lm, handle, writer, ids, held, windows, every, console, shards)
    info = _described(out, shards)
    nbytes = info.nbytes if shards is None else sum(shards.gather_objects(info.nbytes))
    size = f"{nbytes / 1e6:,.1f} MB on disk, {nbytes / ids.shape[1]:,.0f} bytes a token"
    if held == ids.shape[1]:
        done = "all of it was read before"
    else:
        done = f"{ids.shape[1] - held} of them read in {time.perf_counter() - began:.0f} s"
    line_console(quiet=quiet).print(f"{out}: {ids.shape[1]} tokens of {name}, {done}; {size}", markup=False)


def _begun(out: Path) -> bool:
    """Whether there is something at ``out``.

    Raises:
        OSError: there is nothing, and it cannot be made.
    """
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {out.parent} does not exist")
    if os.path.lexists(out):
        return True
    if not os.access(out.absolute().parent, os.W_OK):
        raise PermissionError(f"--out {out}: the folder {out.parent} cannot be written")
    return False


def _writer(out: Path, shards: Shards | None) -> SnapshotWriter | ShardWriter:
    return SnapshotWriter(out) if shards is None else ShardWriter(out, shards)


def _described(out: Path, shards: Shards | None) -> SnapshotInfo:
    """What the folder holds, or this rank's part of it."""
    return describe(out if shards is None else open_parts(out, shards)[1])


def _windows(out: Path, info: SnapshotInfo, wanted: Windows | None, tokens: int | None, file: str) -> Windows | None:
    """How the folder ``out`` was begun to be read.

    Raises:
        ValueError: another way than is wanted now.
    """
    begun = info.windows
    if begun is None and wanted is not None:
        raise ValueError(
            f"{out} was read in one piece, {file} must be read by windows (--window-tokens, or it is longer than what "
            "the model reads at once): give another --out"
        )
    if begun is not None and tokens is not None and tokens != begun.tokens:
        raise ValueError(f"--window-tokens is {tokens}, but {out} was begun with {begun.tokens}: give another --out")
    return begun


def _how(total: int, windows: Windows, lm: Any, file: str) -> str:
    """How a long text is read, and what that is good for."""
    limit = context_limit(lm)
    at_once = "" if limit is None else f" (the model reads {limit} at once)"
    return (
        f"{file} has {total} tokens{at_once}: read in {len(windows.of(total))} windows of {windows.tokens}, each "
        "alone. What is said in one place can be asked about, in words of that place; what follows from several places "
        "far apart (a plot, a count, a summary) cannot be expected"
    )


def _check_begun_with(out: Path, info: SnapshotInfo, index: str | None, storage: str | None) -> None:
    config = info.config
    if index is not None and RetrievalConfig(index=index).index_name != config.index_name:
        raise ValueError(f"--index is {index}, but {out} was begun with {config.index_name}: give another --out")
    if storage is not None and storage != config.storage:
        kept = config.storage or "rows as they come"
        raise ValueError(f"--storage is {storage}, but {out} was begun with {kept}: give another --out")


def _held(handle: Handle, ids: Tensor, out: Path, file: str) -> int:
    """How many of ``ids`` a context holds.

    Raises:
        ValueError: it holds something else, or more.
    """
    held = handle.context
    if held is None or held.shape[0] != 1:
        raise SnapshotError(f"{out} was not made by dbattn ingest: give another --out")
    common = min(held.shape[1], ids.shape[1])
    differs = (held[0, :common] != ids[0, :common]).nonzero()
    if len(differs):
        raise ValueError(
            f"{out} holds another text: token {int(differs[0])} differs from {file}'s (was the file changed?); "
            "nothing was written: give another --out"
        )
    if held.shape[1] > ids.shape[1]:
        raise ValueError(
            f"{out} holds {held.shape[1]} tokens, more than the {ids.shape[1]} asked for of {file}; "
            "nothing was written: give another --out"
        )
    return common


def _read(
    lm: Any,
    handle: Handle,
    writer: SnapshotWriter | ShardWriter,
    ids: Tensor,
    held: int,
    windows: Windows | None,
    save_every: int,
    console: Console,
    shards: Shards | None = None,
) -> None:
    """Read ``ids`` from ``held`` on, and save."""
    total, cache = ids.shape[1], handle.new_cache()
    # A text that has grown since may have ended inside a chunk or a window: that one is read again, whole.
    durable = held - held % CHUNK if windows is None else windows.full(held)
    if cache.why_not(durable) is not None:
        durable = held  # what its layers hold cannot go back: rows differ in rounding alone
    elif durable < held:
        cache.crop(durable - held)
    if durable:
        console.print(f"{writer.path} holds {durable} of {total} tokens, going on from there")
    began = time.perf_counter()
    with first_ctrl_c() as heard, long_work(console, "reading", total, "tokens", durable) as advance:
        # Where one process hears it, all stop at the same token.
        stop_asked = heard if shards is None else lambda: any(shards.gather_objects(heard()))
        parts = _chunks(lm, handle, cache, ids, advance)
        if windows is not None:
            parts = _each_window(handle, cache, ids, windows, advance, stop_asked)
        for read in parts:
            if read > durable and (read == total or read - durable >= save_every or stop_asked()):
                handle.save(writer, cache, token_ids=ids[:, :read])
                durable = read
                if not console.is_terminal:
                    console.print(_line(durable, total, held, time.perf_counter() - began))
            if durable < total and stop_asked():
                raise KeyboardInterrupt(
                    f"{writer.path} holds {durable} of {total} tokens; the same command goes on from there"
                )


def _chunks(lm: Any, handle: Handle, cache: Any, ids: Tensor, advance: Callable[[int], None]) -> Iterator[int]:
    """Prefill what the cache lacks of ``ids``; yields the tokens read by then."""
    held = cache.get_seq_length()
    for chunk in torch.split(ids[:, held:], CHUNK, dim=1):
        with handle.dense():
            lm(chunk, past_key_values=cache, logits_to_keep=1)
        advance(chunk.shape[1])
        held += chunk.shape[1]
        yield held


def _each_window(
    handle: Handle,
    cache: Any,
    ids: Tensor,
    windows: Windows,
    advance: Callable[[int], None],
    stop_asked: Callable[[], bool],
) -> Iterator[int]:
    """Read the windows that the cache lacks of ``ids``; yields the tokens read by then. A window is left when asked."""

    def go_on(tokens: int) -> None:
        if stop_asked():
            raise StopAsked
        advance(tokens)

    try:
        while cache.get_seq_length() < ids.shape[1]:
            handle.read_window(ids, cache, windows, go_on)
            yield cache.get_seq_length()
    except StopAsked:
        yield cache.get_seq_length()


def _line(durable: int, total: int, held: int, seconds: float) -> str:
    """Progress where there is no terminal to draw a bar on."""
    speed = (durable - held) / max(seconds, 1e-9)
    left = f", {(total - durable) / speed:.0f} s left" if durable < total and speed > 0 else ""
    return f"{durable} of {total} tokens saved, {speed:.0f} tokens/s{left}"
