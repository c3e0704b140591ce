"""What a person sees meanwhile: lines, how far long work is, and tables that stay readable without a terminal."""

import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# Seconds between two lines of progress where there is no terminal.
BETWEEN_LINES = 5


@contextmanager
def long_work(console: Console, what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Call what the block gets with each number of units done: from the first on, it shows the time left.

    A bar on a terminal; elsewhere a line for the first and then one every few seconds.
    """
    began, reached, shown = time.perf_counter(), done, -float(BETWEEN_LINES)
    text, bar, count, pace = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), "{task.fields[pace]}"
    progress = Progress(
        text, bar, count, TextColumn(pace), console=console, disable=not console.is_terminal or console.quiet
    )
    task = progress.add_task(what, total=total, completed=done, pace="")

    def advance(units: int) -> None:
        nonlocal reached, shown
        reached += units
        took = time.perf_counter() - began
        speed = (reached - done) / max(took, 1e-9)
        pace = f"{speed:,.3g} {unit}/s, {(total - reached) / speed:.0f} s left"
        progress.update(task, completed=reached, pace=pace)
        if not console.is_terminal and reached < total and took - shown >= BETWEEN_LINES:
            shown = took
            console.print(f"{what}: {reached} of {total} {unit}, {pace}", soft_wrap=True, highlight=False)

    with progress:
        yield advance


def waiting(console: Console, what: str) -> AbstractContextManager[Any]:
    """Says what is being waited for inside the block."""
    if console.is_terminal:
        return console.status(what)
    console.print(what, soft_wrap=True, highlight=False)
    return nullcontext()


def line_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """For lines of text: a terminal's are broken between words, others are not broken."""
    console = Console(stderr=stderr, quiet=quiet, highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def wrapped(lines: list[str]) -> list[str]:
    """Lines for standard output: on a terminal they are broken between words, indented as they began."""
    if not sys.stdout.isatty():
        return lines
    found = []
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        found += textwrap.wrap(
            line,
            shutil.get_terminal_size().columns,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return found


def table_console() -> Console:
    """Standard output. Piped output has no width of its own; a table cut to 80 columns would be unreadable there."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=140, highlight=False)


@contextmanager
def first_ctrl_c() -> Iterator[Callable[[], bool]]:
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
