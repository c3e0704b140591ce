"""dbattn serve: time to first token and tokens per second for 1, 8 and 32 clients at once, against dense generate.

A context of prose is read once. Then every client asks another question about it at the same moment: of a server in a
process of its own, streamed, and one after the other of the unwrapped model's ``generate`` (torch's SDPA), whose cache
holds the same context and is cropped back after each question. A client's time to first token counts from that moment,
so it has waited for those before it. Questions are greedy, of up to ``--tokens`` tokens; rates count those that came.
A second turn of each conversation follows, of which the server has the rows and reads only what is new.

  python -m benchmarks.bench_serve
  python -m benchmarks.bench_serve --quick
  python -m benchmarks.bench_serve --clients 32 --sides server       a part of it, which is added to the record

JSON: results[] = {clients, side: "server" or "dense", context, weights, tokens, s, tokens_per_s, first_p50, first_p90},
and of the server next_turn: {first_p50, read}; times in seconds.
"""

import argparse
import asyncio
import copy
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import DynamicCache, TextStreamer

from dbattn.cli import main as dbattn
from dbattn.config import WEIGHTS
from dbattn.hf import load_model
from dbattn.text.haystack import read_haystack
from dbattn.text.prompt import context_ids, question_ids
from index_kernels.folders import cache_folder

from ._common import OUT_HELP, console, print_table, progress, results_folder, with_earlier, write_json
from ._model import prefill
from .readme import write

THINGS = ("module", "class", "function", "name", "value", "object", "statement", "list")
ASKED = ("What is a {}?", "How is a {} made?", "When is a {} used?", "Where does a {} come from?")


def question(number: int) -> str:
    """What client ``number`` asks."""
    return ASKED[number // len(THINGS) % len(ASKED)].format(THINGS[number % len(THINGS)])


@dataclass
class Asked:
    """One answer: its text, the seconds until the first token, tokens said, and tokens read for it."""

    text: str
    first: float
    tokens: int
    read: int


@contextmanager
def server(context: Path, options: list[str]) -> Iterator[str]:
    """The address of a server in a process of its own."""
    words = ["-m", "dbattn", "serve", "--context", f"book={context}", "--port", "0", *options]
    serving = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    try:
        assert serving.stderr is not None
        for line in serving.stderr:
            if found := re.search(r"http\S+/v1", line):
                yield found[0]
                return
        raise SystemExit("the server did not start")
    finally:
        serving.terminate()
        serving.communicate()


async def ask(client: openai.AsyncOpenAI, messages: list[dict[str, str]], tokens: int) -> Asked:
    """Ask, and note when the answer comes."""
    began, first, text, usage = time.perf_counter(), 0.0, "", None
    options: Any = {"model": "smollm2@book", "messages": messages, "temperature": 0, "max_tokens": tokens}
    async for part in await client.chat.completions.create(**options, stream=True):
        if said := part.choices[0].delta.content:
            first, text = first or time.perf_counter(), text + said
        usage = part.usage or usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    read = usage.prompt_tokens - (usage.prompt_tokens_details.cached_tokens or 0)
    return Asked(text, (first or time.perf_counter()) - began, usage.completion_tokens, read)


async def ask_all(url: str, clients: int, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of all clients' first questions, asked at once, and of their next ones."""
    async with openai.AsyncOpenAI(base_url=url, api_key=f"bench{clients}", timeout=3600) as client:
        first = [[{"role": "user", "content": question(number)}] for number in range(clients)]
        began = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, messages, tokens) for messages in first))
        found = figures(answers, time.perf_counter() - began)
        turns = [
            [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
            for messages, answer in zip(first, answers, strict=True)
        ]
        again = await asyncio.gather(*(ask(client, messages, 1) for messages in turns))
    read = statistics.fmean(answer.read for answer in again)
    return found, {"first_p50": statistics.median(answer.first for answer in again), "read": read}


def figures(answers: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """What clients that asked at once saw."""
    tokens = sum(answer.tokens for answer in answers)
    first = torch.tensor([answer.first for answer in answers])
    p50, p90 = first.quantile(0.5).item(), first.quantile(0.9).item()
    return {"tokens": tokens, "s": seconds, "tokens_per_s": tokens / seconds, "first_p50": p50, "first_p90": p90}


class _First(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
    """Notes when the first token comes."""

    def __init__(self) -> None:
        self.puts, self.first = 0, 0.0

    def put(self, value: Any) -> None:
        self.puts += 1
        if self.puts == 2:  # the first is the prompt
            self.first = time.perf_counter()

    def end(self) -> None:
        """All has been said."""


def ask_densely(
    model: Any, tokenizer: Any, ids: torch.Tensor, cache: DynamicCache, clients: int, tokens: int
) -> dict[str, Any]:
    """The same questions, one after the other."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.max_new_tokens, config.pad_token_id, config.stop_strings = False, tokens, 0, ["\n\n"]
    answers, began = [], time.perf_counter()
    with torch.inference_mode(), progress("dense generate", clients) as tick:
        for number in range(clients):
            whole, streamer = torch.cat([ids, question_ids(question(number), tokenizer)], dim=1), _First()
            said = model.generate(
                whole, past_key_values=cache, generation_config=config, streamer=streamer, tokenizer=tokenizer,
            )  # fmt: skip
            answers.append(Asked("", streamer.first - began, said.shape[1] - whole.shape[1], 0))
            cache.crop(ids.shape[1] - cache.get_seq_length())
            tick()
    return figures(answers, time.perf_counter() - began)


def book_of(text: str, context: int, weights: str) -> Path:
    """A context of the first ``context`` tokens of the text, read once and kept."""
    folder = cache_folder() / "bench_serve"
    folder.mkdir(parents=True, exist_ok=True)
    book = folder / f"{context}-{weights}.dbattn"
    (folder / "book.txt").write_text(text, encoding="utf-8")
    words = ["ingest", str(folder / "book.txt"), "--out", str(book), "--tokens", str(context), "--weights", weights]
    if dbattn([*words, "--quiet"]):
        raise SystemExit("the context could not be read")
    return book


def run_server(clients: Sequence[int], context: int, tokens: int, weights: str) -> Iterator[dict[str, Any]]:
    """The server's entries of ``results``."""
    book = book_of(read_haystack(), context, weights)
    with server(book, ["--weights", weights]) as url:
        asyncio.run(ask_all(url, 2, 8))  # compiles, and audits its first answers
        for number in clients:
            with console.status(f"{number} clients"):
                found, again = asyncio.run(ask_all(url, number, tokens))
            yield {"clients": number, "side": "server", **found, "next_turn": again}


def run_dense(clients: Sequence[int], context: int, tokens: int, weights: str) -> Iterator[dict[str, Any]]:
    """Those of the unwrapped model."""
    model, tokenizer = load_model(weights=weights)
    ids = context_ids(read_haystack(), tokenizer)[:, :context]
    cache, _ = prefill(model, ids)
    ask_densely(model, tokenizer, ids, cache, 1, 2)
    for number in clients:
        yield {"clients": number, "side": "dense", **ask_densely(model, tokenizer, ids, cache, number, tokens)}


SIDES = {"server": run_server, "dense": run_dense}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, nargs="+", metavar="N", help="clients at once (default 1 8 32)")
    options.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="default both")
    options.add_argument("--context", type=int, metavar="T", help="tokens of the context (default 7500)")
    options.add_argument("--tokens", type=int, metavar="N", help="of an answer, at most (default 32)")
    options.add_argument("--weights", default="float32", choices=WEIGHTS, help="of both sides (default float32)")
    options.add_argument("--quick", action="store_true", help="1 and 8 clients, 1000 tokens, answers of 12")
    options.add_argument("--json", type=Path, metavar="OUT", help=OUT_HELP.replace("results,", "results/serve.json,"))
    args = options.parse_args(argv)
    context = args.context or (1000 if args.quick else 7500)
    tokens = args.tokens or (12 if args.quick else 32)
    path = args.json or results_folder(args.quick) / "serve.json"
    found = []
    for side in args.sides:
        for one in SIDES[side](args.clients or ((1, 8) if args.quick else (1, 8, 32)), context, tokens, args.weights):
            found.append({"context": context, "weights": args.weights, **one})
            held = with_earlier(path, found, ("weights", "context", "clients", "side"))
            write_json(path, "serve", {"quick": args.quick, "tokens": tokens}, held)
    columns = ("side", "clients", "tokens/s", "first token, s", "p90", "next turn, s")
    rows = [
        [
            *(one[name] for name in ("side", "clients", "tokens_per_s", "first_p50", "first_p90")),
            one["next_turn"]["first_p50"] if "next_turn" in one else None,
        ]
        for one in found
    ]
    print_table(f"a context of {context:,} tokens, {args.weights}", columns, rows)
    write(path.parent)


if __name__ == "__main__":
    main()
