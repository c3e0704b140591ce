"""The parser of the command line. It imports nothing slow: ``--help`` answers without torch."""

import argparse
import sys
from pathlib import Path
from typing import Any, TextIO

from .. import __version__
from ..config import INDEX_TRAITS, STORAGES, WEIGHTS

_EXIT_CODES = "exit codes: 0 done, 1 it failed (a full disk, say), 2 wrong usage or input, 130 interrupted"
_EPILOG = f"""examples:
  dbattn ingest book.txt --out book.dbattn          read a long text once
  dbattn ask book.dbattn "Who wrote the letter?"    ask as often as you like

in place of a file or a question, - is standard input; --json - prints JSON alone, and all else to standard error
{_EXIT_CODES}
"""
_INDEXES = ("auto", *INDEX_TRAITS)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it returns has the command's name as ``command``."""
    parser = argparse.ArgumentParser(
        prog="dbattn",
        description="Transformer attention as a database query.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dbattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_demo, _add_ingest, _add_ask, _add_chat, _add_serve, _add_info, _add_explain, _add_compare, _add_cost,
    ):  # fmt: skip
        add(commands)
    return parser


def _command(commands: Any, name: str, help_line: str, description: str, examples: str) -> Any:
    command = commands.add_parser(
        name,
        help=help_line,
        description=description,
        epilog=f"examples:\n{examples}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=name)
    return command


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        "answer questions about a long text from retrieved rows, checked against dense",
        "Hides pass keys at several depths of a long text, lets a model read it, and asks for each key\n"
        "twice: densely, and through the index. Prints both answers with recall, attention mass, error and time.",
        "  dbattn demo                                three needles in 4000 tokens of prose, retrieval against dense\n"
        "  dbattn demo --index hnsw --k 128           another index, fewer rows\n"
        "  dbattn demo --haystack book.txt --tokens 7000 --needles 5 --json result.json",
    )
    demo.add_argument("--tokens", type=int, default=4000, metavar="N", help="length of the text (default 4000)")
    demo.add_argument("--index", default="auto", choices=_INDEXES, help="index over the keys (default auto)")
    demo.add_argument("--k", type=int, default=256, help="rows retrieved per query and KV head (default 256)")
    demo.add_argument("--needles", type=int, default=3, metavar="N", help="pass keys to hide, 1 to 10 (default 3)")
    demo.add_argument(
        "--haystack",
        type=_input,
        metavar="FILE",
        help="UTF-8 text to hide them in, - is standard input (default: Python's own docs)",
    )
    _add_model(demo)
    _add_weights(demo)
    demo.add_argument("--json", type=_output, metavar="OUT", help="write the result to this file; - is standard output")
    demo.add_argument("--quiet", action="store_true", help="print only the table")


def _add_ingest(commands: Any) -> None:
    ingest = _command(
        commands,
        "ingest",
        "let a model read a long text once, and keep what it read on disk",
        "Reads a UTF-8 text in chunks and saves its rows to a snapshot folder as it goes. Killed at any point and run\n"
        "again, it goes on from the last save and ends with the same rows, bit for bit. Ctrl-C finishes the present\n"
        "chunk and saves; a second Ctrl-C ends at once. A text that has grown at its end is read on.\n"
        "\n"
        "A text that is longer than what the model reads at once is read in windows, each alone (after the first\n"
        "tokens of the text and the end of the window before), in time linear in its length; a question then reads\n"
        "three of them, each as if it stood right before it: the newest, and two that have most of the question's\n"
        "rarer words. So the model may find what is said in one place, if it is asked for in the text's words; it\n"
        "does not follow a plot: what must be put together from several windows it has never read together.",
        "  dbattn ingest book.txt --out book.dbattn\n"
        "  dbattn ingest book.txt --out book.dbattn --model ./my-model --save-every 8192\n"
        "  dbattn ingest - --out book.dbattn                            what a pipe brings\n"
        "  dbattn ingest book.txt --out book.dbattn --tokens 7936       only its beginning\n"
        "  dbattn ingest book.txt --out book.dbattn --window-tokens 4096 --storage float16",
    )
    ingest.add_argument("file", type=_input, metavar="FILE", help="UTF-8 text; - is standard input")
    ingest.add_argument("--out", type=Path, required=True, metavar="CONTEXT", help="snapshot folder, made or resumed")
    _add_model(ingest)
    _add_weights(ingest)
    ingest.add_argument(
        "--index", choices=_INDEXES, help="index over the keys (default auto, or what the folder began with)"
    )
    ingest.add_argument("--tokens", type=int, metavar="N", help="read no more than the first N tokens (default: all)")
    ingest.add_argument(
        "--window-tokens",
        type=int,
        metavar="N",
        help="read by windows of N new tokens (default: only a text too long for the model, of 2048)",
    )
    ingest.add_argument(
        "--storage",
        choices=STORAGES,
        help="keep rows as this type; int8 is a quarter of float32 (default: as they come, by windows int8)",
    )
    ingest.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help="tokens between two saves (default 2048, by windows 8192)",
    )
    ingest.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_ask(commands: Any) -> None:
    ask = _command(
        commands,
        "ask",
        "ask about a text that was ingested",
        "Opens a context, reads only the question, and streams the answer (greedy; a blank line ends it). Below it:\n"
        "how many calls retrieved, how far they were from dense (a few are answered both ways), and what they read.",
        '  dbattn ask book.dbattn "What is the room number?"\n'
        '  dbattn ask book.dbattn "What is the room number?" --show-sources\n'
        '  dbattn ask book.dbattn "What is the room number?" --dense    also densely: where do the answers differ?\n'
        '  dbattn ask book.dbattn "Who wrote the letter?" --k 256 --max-tokens 100 --quiet\n'
        '  dbattn ask book.dbattn "Who wrote the letter?" --windows 5   of a long text, read five windows',
    )
    _add_question(ask)
    ask.add_argument("--max-tokens", type=int, default=48, metavar="N", help="length of the answer (default 48)")
    ask.add_argument(
        "--show-sources",
        action="store_true",
        help="print the passages that carried the most attention while answering (each token then takes longer)",
    )
    ask.add_argument(
        "--dense",
        action="store_true",
        help="answer again from every row (of all windows), and show where the two answers differ and what each took",
    )
    ask.add_argument("--json", type=_output, metavar="OUT", help="also write answer, sources and figures to this file")
    ask.add_argument("--quiet", action="store_true", help="print no figures")


def _add_chat(commands: Any) -> None:
    chat = _command(
        commands,
        "chat",
        "a conversation about a text that was ingested",
        "Asks for a line, streams the answer (greedy; a blank line ends it), and remembers both: the next question\n"
        "may refer to them, and only what is new is read. Ctrl-C ends an answer; where none is under way, the chat.",
        "  dbattn chat book.dbattn\n"
        "  dbattn chat book.dbattn --show-sources --max-tokens 200\n"
        "  dbattn chat book.dbattn --quiet                answers alone; where input is a pipe, a question is a line",
    )
    _add_context(chat)
    _add_model(chat)
    _add_weights(chat)
    chat.add_argument("--k", type=int, help="rows retrieved per query and KV head (default: as planned)")
    chat.add_argument("--max-tokens", type=int, default=256, metavar="N", help="length of an answer (default 256)")
    _add_memory(chat)
    chat.add_argument(
        "--show-sources",
        action="store_true",
        help="print the passages that an answer read most (each token then takes longer)",
    )
    chat.add_argument("--quiet", action="store_true", help="print no figures")


def _add_serve(commands: Any) -> None:
    serve = _command(
        commands,
        "serve",
        "answer OpenAI's clients: chats and completions, about texts that were ingested",
        "Serves a model, and the same model after each context, at /v1/models, /v1/chat/completions and\n"
        "/v1/completions, with /health and /metrics (Prometheus). A context is a model: smollm2@book is smollm2 after\n"
        'book.dbattn; "context": "book" in a request does the same. "dbattn": {"sources": true} in a request asks for\n'
        "the passages that an answer read, how many rows, and an estimate of the error. A conversation's rows are\n"
        "kept for its next turn, for the API key (or user) it came with and nobody else. Keys are not checked.\n"
        "Ctrl-C and SIGTERM: no new requests; those under way are answered.",
        "  dbattn serve --context book.dbattn\n"
        "  dbattn serve --context book.dbattn --context law=laws.dbattn --port 8080 --memory 4G\n"
        "  dbattn serve --model ./my-model --weights int8 --host 0.0.0.0     behind a proxy that checks keys",
    )
    _add_model(serve)
    _add_weights(serve)
    serve.add_argument(
        "--context",
        action="append",
        default=[],
        metavar="[NAME=]CONTEXT",
        help="snapshot folder of an ingest; may be given several times (the name: as the folder's)",
    )
    serve.add_argument("--name", help="what the model is called (default smollm2, or as its folder or file)")
    serve.add_argument("--k", type=int, help="rows retrieved per query and KV head (default: as planned)")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)"
    )
    serve.add_argument("--port", type=int, default=8000, help="port; 0 is any that is free (default 8000)")
    serve.add_argument("--batch", type=int, default=8, metavar="N", help="answers under way at a time (default 8)")
    serve.add_argument(
        "--requests", type=int, default=64, metavar="N", help="requests taken at a time; others get 429 (default 64)"
    )
    serve.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="length of an answer (default 4096)")
    serve.add_argument("--max-body", type=_size, default="4M", metavar="BYTES", help="size of a request (default 4M)")
    _add_memory(serve)
    serve.add_argument(
        "--drain", type=int, default=60, metavar="S", help="seconds for requests under way to end (default 60)"
    )
    serve.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_info(commands: Any) -> None:
    info = _command(
        commands,
        "info",
        "what a context holds, and what it takes on disk",
        "Reads only the manifest of a snapshot; its files are neither read nor checked.",
        "  dbattn info book.dbattn\n  dbattn info book.dbattn --json info.json",
    )
    _add_context(info)
    info.add_argument("--json", type=_output, metavar="OUT", help="also write it to this file")
    info.add_argument("--quiet", action="store_true", help="leave out the list of files")


def _add_explain(commands: Any) -> None:
    explain = _command(
        commands,
        "explain",
        "what the first step of an answer reads: the plan, as a tree",
        "Reads the question, makes one step of the answer, and prints its plan with what each source was estimated to\n"
        "read and really read: summed over all layers, or of one.",
        '  dbattn explain book.dbattn "What is the room number?"\n'
        '  dbattn explain book.dbattn "What is the room number?" --layer 8 --k 128',
    )
    _add_question(explain)
    explain.add_argument("--layer", type=int, metavar="I", help="the plan of this layer alone, 0 is the first")
    explain.add_argument("--json", type=_output, metavar="OUT", help="also write the plan to this file")
    explain.add_argument("--quiet", action="store_true", help="print no progress")


def _add_compare(commands: Any) -> None:
    compare = _command(
        commands,
        "compare",
        "recall, mass, error and time of indexes and budgets, beside dense",
        "Takes queries that a model really asked (the steps of its answer to a question about a context, or a capture\n"
        "of benchmarks/capture.py) and answers them with every index and k. Figures are means over layers, heads and\n"
        "queries; ms is the attention of one token in all layers compared.",
        '  dbattn compare book.dbattn "What is the room number?" --index segmented,flat --k 64,256\n'
        "  dbattn compare --capture rows.safetensors --index segmented,ivf --k 128 --png out.png --json out.json\n"
        '  dbattn compare book.dbattn "What is the room number?" --layers 8,22',
    )
    compare.add_argument("context", type=Path, nargs="?", metavar="CONTEXT", help="snapshot folder of an ingest")
    compare.add_argument("question", nargs="?", metavar="QUESTION", help="what to ask; - is standard input")
    compare.add_argument("--capture", type=Path, metavar="FILE", help="rows and queries in place of a context")
    _add_model(compare)
    _add_weights(compare)
    compare.add_argument(
        "--index",
        type=_names,
        default=["segmented"],
        metavar="A,B",
        help=f"indexes, of {', '.join(_INDEXES)} (default segmented)",
    )
    compare.add_argument("--k", type=_integers, default=[64, 128, 256], metavar="N,M", help="budgets (64,128,256)")
    compare.add_argument("--layers", type=_integers, metavar="I,J", help="layers to compare (default all)")
    compare.add_argument("--queries", type=int, default=16, metavar="N", help="decode steps to answer (default 16)")
    compare.add_argument("--json", type=_output, metavar="OUT", help="also write the figures to this file")
    compare.add_argument("--png", type=Path, metavar="OUT", help="also plot error, recall and time to this file")
    compare.add_argument("--quiet", action="store_true", help="print only the table")


def _add_cost(commands: Any) -> None:
    cost = _command(
        commands,
        "cost",
        "FLOPs, bytes and memory of a model's call, by formula",
        "Counts what one decode step or a prompt costs in each operator, densely and through an index, and from which\n"
        "length on one reads less than the other. Only the model's config is read; nothing is run, but for the rates\n"
        "of this machine, which are measured once.",
        "  dbattn cost --tokens 131072                          a decode step of the default model at 128K\n"
        "  dbattn cost --model ./my-model --tokens 32768 --index flat --k 256\n"
        "  dbattn cost --tokens 8192 --phase prefill --batch 4 --dtype bfloat16 --json cost.json",
    )
    _add_model(cost)
    cost.add_argument("--tokens", type=int, default=8192, metavar="N", help="rows of each text (default 8192)")
    cost.add_argument("--index", default="auto", choices=(*_INDEXES, "dense"), help="what reads them (default auto)")
    cost.add_argument("--k", type=int, help="rows retrieved per query and KV head (default: as planned)")
    cost.add_argument("--kv-heads", type=int, metavar="N", help="as if the model had so many (default: as it has)")
    cost.add_argument(
        "--phase", default="decode", choices=("decode", "prefill"), help="a step, or a prompt of N tokens"
    )
    cost.add_argument("--batch", type=int, default=1, metavar="B", help="texts at a time (default 1)")
    cost.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of weights and rows (default: the model's)"
    )
    cost.add_argument("--json", type=_output, metavar="OUT", help="also write the figures to this file")
    cost.add_argument("--quiet", action="store_true", help="print only the table")


def _add_model(command: Any) -> None:
    command.add_argument(
        "--model", type=Path, metavar="DIR_OR_GGUF", help="model to use (default: SmolLM2-135M-Instruct)"
    )


def _add_weights(command: Any) -> None:
    command.add_argument(
        "--weights",
        default="float32",
        choices=WEIGHTS,
        help="int8: half the memory, faster, logits 1.4%% off (SmolLM2); ask with what ingest had (default float32)",
    )


def _add_memory(command: Any) -> None:
    command.add_argument(
        "--memory",
        type=_size,
        default="1G",
        metavar="BYTES",
        help="kept for what was said: rows, 1G = 2^30 (default 1G)",
    )


def _add_context(command: Any) -> None:
    command.add_argument("context", type=Path, metavar="CONTEXT", help="snapshot folder of an ingest")


def _add_question(command: Any) -> None:
    _add_context(command)
    command.add_argument("question", metavar="QUESTION", help="what to ask; - is standard input")
    _add_model(command)
    _add_weights(command)
    command.add_argument("--k", type=int, help="rows retrieved per query and KV head (default: as planned)")
    command.add_argument(
        "--windows", type=int, metavar="N", help="windows read of a text that was read by windows (default 3)"
    )


def _input(text: str) -> Path | TextIO:
    return sys.stdin if text == "-" else Path(text)


def _output(text: str) -> Path | TextIO:
    return sys.stdout if text == "-" else Path(text)


def _size(text: str) -> int:
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in {"K", "M", "G"} else (text, "")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 512M or 4G")
    return int(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in _INDEXES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(_INDEXES)}")
    return names


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 64,256") from None
