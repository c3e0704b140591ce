"""dbattn ingest: a long text is read once, in chunks, and saved as it goes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from ..config import RetrievalConfig
from ..files import name_of
from ..hf import Handle
from ..snapshot import SnapshotError, SnapshotWriter, describe
from ..text.prompt import CHUNK, QUESTION_TOKENS, context_ids, context_limit, read_text
from ._console import line_console, long_work
from ._opened import load, serving


def run_ingest(
    *,
    file: Path | TextIO,
    out: Path,
    model: Path | None,
    weights: str,
    index: str | None,
    tokens: int | None,
    save_every: int,
    quiet: bool,
) -> None:
    """Read what ``out`` does not hold yet of a text, saving every ``save_every`` tokens; nothing to do is no error.

    Raises:
        ValueError: a text that does not fit the model, a folder that holds another text, another model's rows or
            something else, or that another ingest is writing to.
        OSError: a file or folder that is missing, or cannot be written.
        KeyboardInterrupt: Ctrl-C; what was read by then is saved.
    """
    for name, value in (("--save-every", save_every), ("--tokens", tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    text = read_text(file)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {out.parent} does not exist")
    if os.path.lexists(out):
        # What can be wrong with it is said before the model is loaded.
        with SnapshotWriter(out) as writer:
            if writer.exists and index is not None:
                _check_index(out, index)
    elif not os.access(out.absolute().parent, os.W_OK):
        raise PermissionError(f"--out {out}: the folder {out.parent} cannot be written")
    console, name = line_console(stderr=True, quiet=quiet), name_of(file)
    lm, tokenizer = load(model, weights, console)
    ids = _cut(context_ids(text, tokenizer), tokens, context_limit(lm), name)
    with SnapshotWriter(out) as writer:
        config = None if writer.exists else RetrievalConfig(index=index or "auto", max_queries=QUESTION_TOKENS)
        with serving(lm, config, out if writer.exists else None) as handle:
            held = _held(handle, ids, out, name) if writer.exists else 0
            began = time.perf_counter()
            if held < ids.shape[1]:
                _read(lm, handle, writer, ids, held, save_every, console)
    info = describe(out)
    size = f"{info.nbytes / 1e6:,.1f} MB on disk, {info.nbytes / info.rows:,.0f} bytes a token"
    if held == ids.shape[1]:
        done = "all of it was read before"
    else:
        done = f"{ids.shape[1] - held} of them read in {time.perf_counter() - began:.0f} s"
    line_console(quiet=quiet).print(f"{out}: {info.rows} tokens of {name}, {done}; {size}", markup=False)


def _cut(ids: Tensor, tokens: int | None, limit: int | None, file: str) -> Tensor:
    """The first ``tokens`` ids; too many for the model are refused, not cut silently."""
    asked = ids.shape[1] if tokens is None else min(tokens, ids.shape[1])
    if limit is not None and asked > limit:
        given = f"--tokens is {tokens}" if tokens is not None else f"{file} has {asked} tokens"
        raise ValueError(
            f"{given}, the model reads at most {limit} ({limit + QUESTION_TOKENS} less {QUESTION_TOKENS} for a "
            f"question and its answer): read the beginning with --tokens {limit}"
        )
    return ids[:, :asked]


def _check_index(out: Path, index: str) -> None:
    began_with = describe(out).config.index_name
    if RetrievalConfig(index=index).index_name != began_with:
        raise ValueError(f"--index is {index}, but {out} was begun with {began_with}: give another --out")


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
    lm: Any, handle: Handle, writer: SnapshotWriter, ids: Tensor, held: int, save_every: int, console: Console
) -> None:
    """Prefill ``ids`` from ``held`` on, and save."""
    total, cache = ids.shape[1], handle.new_cache()
    # A text that has grown since may have ended inside a chunk: that chunk is read again, whole.
    durable = held - held % CHUNK
    if durable < held:
        cache.crop(durable - held)
    if durable:
        console.print(f"{writer.path} holds {durable} of {total} tokens, going on from there")
    began = time.perf_counter()
    with _stop_asked() as stop_asked, long_work(console, "reading", total, "tokens", durable) as advance:
        for at, chunk in zip(range(durable, total, CHUNK), torch.split(ids[:, durable:], CHUNK, dim=1), strict=True):
            with handle.dense():
                lm(chunk, past_key_values=cache, logits_to_keep=1)
            read = at + chunk.shape[1]
            advance(chunk.shape[1])
            if read < total and read - durable < save_every and not stop_asked():
                continue
            handle.save(writer, cache)
            durable = read
            if not console.is_terminal:
                console.print(_line(durable, total, held, time.perf_counter() - began))
            if durable < total and stop_asked():
                raise KeyboardInterrupt(
                    f"{writer.path} holds {durable} of {total} tokens; the same command goes on from there"
                )


def _line(durable: int, total: int, held: int, seconds: float) -> str:
    """Progress where there is no terminal to draw a bar on."""
    speed = (durable - held) / max(seconds, 1e-9)
    left = f", {(total - durable) / speed:.0f} s left" if durable < total and speed > 0 else ""
    return f"{durable} of {total} tokens saved, {speed:.0f} tokens/s{left}"


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Inside the block the first Ctrl-C only notes itself, so that no row is left half written; a second one stops."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread hears signals.
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
