"""A command under ``torchrun``: all processes do the same, and rank 0 says what came of it."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..shards import Shards

SERVED = ("ingest", "ask")


def count() -> int:
    """How many processes ``torchrun`` started, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def ranks(args: argparse.Namespace) -> Iterator["Shards | None"]:
    """The shards of these processes, None where there is one. All but rank 0 print nothing but errors.

    Raises:
        ValueError: a command, or an option, for one process alone.
    """
    if count() < 2:
        yield None
        return
    if args.command not in SERVED:
        raise ValueError(
            f"{args.command} runs in one process, {count()} were started: only {' and '.join(SERVED)} share"
        )
    if getattr(args, "question", None) == "-" or getattr(args, "file", None) is sys.stdin:
        raise ValueError("standard input is read by one process: give a file")
    if getattr(args, "show_sources", False):
        raise ValueError("--show-sources needs all rows in one process: they are dealt over several")
    from ..shards import launched

    with launched() as shards:
        assert shards is not None
        if not shards.rank:
            yield shards
            return
        args.quiet = True
        if getattr(args, "json", None) is not None:
            args.json = None
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield shards
