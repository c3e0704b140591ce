"""The command line: ``dbattn demo | ingest | ask | chat | serve | info | explain | compare | cost``.

Commands are imported when they run: ``--help`` answers without torch.
"""

import argparse
import io
import os
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from typing import Any

from ._parser import make_parser
from ._ranks import ranks


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 it failed, 2 wrong usage or input, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal cannot show (a mark, a file's name that is no text) is shown escaped.
            stream.reconfigure(errors="backslashreplace")
    args = make_parser().parse_args(argv)
    if "torch" not in sys.modules and not args.quiet:
        print(f"dbattn {args.command}: loading torch", file=sys.stderr, flush=True)
    aside = redirect_stdout(sys.stderr) if getattr(args, "json", None) is sys.stdout else nullcontext()
    try:
        with aside, ranks(args) as shards:
            _run(args, shards)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(f"dbattn: interrupted{': ' if str(stop) else ''}{stop}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough (head, less).
        _end_output()
        return 1
    except OSError as error:
        _end_output()
        print(f"dbattn: {error}", file=sys.stderr)
        wrong_input = FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError
        # What no system call refused (errno is not set) is a message of ours about the input.
        return 2 if isinstance(error, wrong_input) or error.errno is None else 1
    except (ValueError, ImportError) as error:
        print(f"dbattn: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not _is_of_shards(error):
            raise
        print(f"dbattn: {error}", file=sys.stderr)
        return 1
    return 0


def _is_of_shards(error: RuntimeError) -> bool:
    from ..shards import ShardError

    return isinstance(error, ShardError)


def _end_output() -> None:
    """What standard output did not take is not tried again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace, shards: Any) -> None:
    commands = {
        "demo": _demo,
        "ingest": partial(_ingest, shards=shards),
        "ask": partial(_ask, shards=shards),
        "chat": _chat,
        "serve": _serve,
        "info": _info,
        "explain": _explain,
        "compare": _compare,
        "cost": _cost,
    }
    commands[args.command](args)  # type: ignore[operator]


def _demo(args: argparse.Namespace) -> None:
    from ..hf import UnsupportedModelError
    from .demo import run_demo

    try:
        run_demo(**_options(args, json_path="json"))
    except UnsupportedModelError as error:
        raise ValueError(f"--model: {error}") from error


def _ingest(args: argparse.Namespace, shards: Any) -> None:
    from .ingest import run_ingest

    run_ingest(**_options(args), shards=shards)


def _ask(args: argparse.Namespace, shards: Any) -> None:
    from .ask import run_ask

    run_ask(**_options(args, json_path="json"), shards=shards)


def _chat(args: argparse.Namespace) -> None:
    from .chat import run_chat

    run_chat(**_options(args))


def _serve(args: argparse.Namespace) -> None:
    from .serve import run_serve

    run_serve(**_options(args))


def _info(args: argparse.Namespace) -> None:
    from .info import run_info

    run_info(**_options(args, json_path="json"))


def _explain(args: argparse.Namespace) -> None:
    from .explain import run_explain

    run_explain(**_options(args, json_path="json"))


def _compare(args: argparse.Namespace) -> None:
    from .compare import run_compare

    run_compare(**_options(args, json_path="json", png_path="png"))


def _cost(args: argparse.Namespace) -> None:
    from .cost import run_cost

    run_cost(**_options(args, json_path="json"))


def _options(args: argparse.Namespace, **renamed: str) -> dict[str, Any]:
    """The parsed options as keyword arguments of a command."""
    options = {name: value for name, value in vars(args).items() if name != "command"}
    if options.get("question") is not None:
        options["question"] = _question(options["question"])
    for name, option in renamed.items():
        options[name] = options.pop(option)
    return options


def _question(text: str) -> str:
    """What is asked; ``-`` is what standard input says."""
    from ..text.prompt import check_question, read_text

    question = read_text(sys.stdin).strip() if text == "-" else text
    check_question(question)
    return question
