"""The command line: ``dbattn demo``."""

import argparse
import sys
from pathlib import Path

from . import __version__
from .config import INDEX_OPTIONS

_EXAMPLES = """examples:
  dbattn demo                                  three needles in 4000 tokens of prose, retrieval against dense
  dbattn demo --index hnsw --k 128             another index, fewer rows
  dbattn demo --haystack book.txt --tokens 7000 --needles 5 --json result.json
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 it failed, 2 wrong usage or input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("dbattn: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"dbattn: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo
    from .hf import UnsupportedModelError

    try:
        run_demo(
            tokens=args.tokens,
            index=args.index,
            k=args.k,
            needles=args.needles,
            haystack=args.haystack,
            model=args.model,
            json_path=args.json,
            quiet=args.quiet,
        )
    except UnsupportedModelError as error:
        raise ValueError(f"--model: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dbattn",
        description="Transformer attention as a database query.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dbattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="answer questions about a long text from retrieved rows, checked against dense",
        description="Hides pass keys at several depths of a long text, lets a model read it, and asks for each key "
        "twice: densely, and through the index. Prints both answers with recall, attention mass, error and time.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--tokens", type=int, default=4000, metavar="N", help="length of the text (default 4000)")
    demo.add_argument(
        "--index", default="auto", choices=["auto", *INDEX_OPTIONS], help="index over the keys (default auto)"
    )
    demo.add_argument("--k", type=int, default=256, help="rows retrieved per query and KV head (default 256)")
    demo.add_argument("--needles", type=int, default=3, metavar="N", help="pass keys to hide, 1 to 10 (default 3)")
    demo.add_argument(
        "--haystack", type=Path, metavar="FILE", help="UTF-8 text to hide them in (default: Python's own docs)"
    )
    demo.add_argument("--model", type=Path, metavar="DIR_OR_GGUF", help="model to use (default: SmolLM2-135M-Instruct)")
    demo.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    demo.add_argument("--quiet", action="store_true", help="print only the table")
    demo.set_defaults(run=_demo)
    return parser
