"""dbattn serve: time to first token and tokens per second for 1, 8 and 32 clients at once, against dense generate.

A context of prose is read once. Then every client asks another question about it at the same moment: of a server in a
process of its own, streamed, and one after the other of the unwrapped model's ``generate`` (torch's SDPA), whose cache
holds the same context and is cropped back after each question. A client's time to first token counts from that moment,
so it has waited for those before it. Questions are greedy, of up to ``--tokens`` tokens; rates count those that came.
A second turn of each conversation follows, of which the server has the rows and reads only what is new.

A number of clients on one side is a stage, and so is each one's second turn: it ends after ``--seconds`` at the latest,
and the record is written. What had not come by then is cut, and counted (``cut``: answers that did not come to their
end); figures are of what came.

The side "forks" asks databases alone, captured rows of two layers, 8K and 32K: one query to each of 2, 4 and 8 forks,
which share their rows, read together (``attend_together``), each by its own plan, and each by a scan.

  python -m benchmarks.bench_serve
  python -m benchmarks.bench_serve --quick
  python -m benchmarks.bench_serve --clients 32 --sides server       a part of it, which is added to the record

JSON: results[] = {clients, side: "server" or "dense", context, weights, tokens, s, tokens_per_s, first_p50, first_p95,
asked, cut}, and of the server next_turn: {first_p50, first_p95, read, cut}; times in seconds. For "forks", {clients:
forks, context: rows, side, weights, together_ms, each_ms, scans_ms, quiet}.
"""

import argparse
import asyncio
import copy
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from dbattn import AttentionDB, RetrievalConfig
from dbattn.cli import main as dbattn
from dbattn.config import WEIGHTS
from dbattn.hf import load_model
from dbattn.text.haystack import read_haystack
from dbattn.text.prompt import context_ids, question_ids
from dbattn.together import scan_together
from index_kernels.folders import cache_folder

from ._common import (
    OUT_HELP,
    SIZES,
    Side,
    console,
    print_table,
    progress,
    results_folder,
    time_sides,
    with_earlier,
    write_json,
)
from ._model import prefill
from ._stores import STEPS_FROM, build
from .capture import load_rows
from .readme import write

THINGS = ("module", "class", "function", "name", "value", "object", "statement", "list")
# Entries of a record that are the same in these are of the same stage.
SAME = ("weights", "context", "clients", "side")
LAYERS, FORKS = (8, 22), (2, 4, 8)
ASKED = ("What is a {}?", "How is a {} made?", "When is a {} used?", "Where does a {} come from?")


def question(number: int) -> str:
    """What client ``number`` asks."""
    return ASKED[number // len(THINGS) % len(ASKED)].format(THINGS[number % len(THINGS)])


@dataclass
class Asked:
    """One answer: its text, seconds until the first token (None: none came), tokens said, and tokens read for it."""

    text: str = ""
    first: float | None = None
    tokens: int = 0
    read: int = 0
    is_whole: bool = False


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


async def ask(client: openai.AsyncOpenAI, messages: list[dict[str, str]], tokens: int, answer: Asked) -> None:
    """Ask, and note what comes of the answer, and when."""
    began = time.perf_counter()
    options: Any = {"model": "smollm2@book", "messages": messages, "temperature": 0, "max_tokens": tokens}
    async with await client.chat.completions.create(**options, stream=True) as parts:
        async for part in parts:
            if said := part.choices[0].delta.content:
                answer.first = answer.first or time.perf_counter() - began
                answer.text, answer.tokens = answer.text + said, answer.tokens + 1
            if (usage := part.usage) is not None:
                assert usage.prompt_tokens_details is not None
                answer.read = usage.prompt_tokens - (usage.prompt_tokens_details.cached_tokens or 0)
                answer.tokens, answer.is_whole = usage.completion_tokens, True
    answer.first = answer.first or time.perf_counter() - began  # an answer without text


async def ask_at_once(
    client: openai.AsyncOpenAI, conversations: Sequence[list[dict[str, str]]], tokens: int, seconds: float
) -> tuple[list[Asked], float]:
    """All of them at the same moment, for so many seconds at most; the answers, whole or cut, and the seconds taken."""
    answers, began = [Asked() for _ in conversations], time.perf_counter()
    asking = [
        asyncio.ensure_future(ask(client, messages, tokens, answer))
        for messages, answer in zip(conversations, answers, strict=True)
    ]
    _, late = await asyncio.wait(asking, timeout=seconds)
    took = time.perf_counter() - began
    for each in late:
        each.cancel()  # the server sees that its client has left
    for failed in await asyncio.gather(*asking, return_exceptions=True):
        if isinstance(failed, Exception):
            raise failed
    return answers, took


async def ask_all(url: str, clients: int, tokens: int, seconds: float) -> AsyncIterator[dict[str, Any]]:
    """Figures of all clients' first questions, asked at once, then the same with those of their next ones."""
    async with openai.AsyncOpenAI(base_url=url, api_key=f"bench{clients}", timeout=3600, max_retries=0) as client:
        first = [[{"role": "user", "content": question(number)}] for number in range(clients)]
        answers, took = await ask_at_once(client, first, tokens, seconds)
        found = figures(answers, took)
        yield found
        turns = [
            [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
            for messages, answer in zip(first, answers, strict=True)
            if answer.is_whole
        ]
        if not turns:
            return
        again, took = await ask_at_once(client, turns, 1, seconds)
    read, figured = [answer.read for answer in again if answer.is_whole], figures(again, took)
    next_turn = {name: figured[name] for name in ("first_p50", "first_p95", "asked", "cut")}
    yield found | {"next_turn": next_turn | {"read": statistics.fmean(read) if read else None}}


def figures(answers: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """What clients that asked at once saw."""
    tokens = sum(answer.tokens for answer in answers)
    first = torch.tensor([answer.first for answer in answers if answer.first is not None])
    p50, p95 = (first.quantile(q).item() if len(first) else None for q in (0.5, 0.95))
    cut = sum(not answer.is_whole for answer in answers)
    return {
        "tokens": tokens, "s": seconds, "tokens_per_s": tokens / seconds, "first_p50": p50, "first_p95": p95,
        "asked": len(answers), "cut": cut,
    }  # fmt: skip


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
    model: Any, tokenizer: Any, ids: torch.Tensor, cache: DynamicCache, clients: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """The same questions, one after the other, for so many seconds at most."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.max_new_tokens, config.pad_token_id, config.stop_strings = False, tokens, 0, ["\n\n"]
    answers, began = [Asked() for _ in range(clients)], time.perf_counter()
    with torch.inference_mode(), progress("dense generate", clients) as tick:
        for number, answer in enumerate(answers):
            if (left := began + seconds - time.perf_counter()) <= 0:
                break
            config.max_time = left
            whole, streamer = torch.cat([ids, question_ids(question(number), tokenizer)], dim=1), _First()
            said = model.generate(
                whole, past_key_values=cache, generation_config=config, streamer=streamer, tokenizer=tokenizer,
            )  # fmt: skip
            answer.first, answer.tokens = streamer.first - began, said.shape[1] - whole.shape[1]
            answer.is_whole = time.perf_counter() < began + seconds
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


@dataclass(frozen=True)
class Asking:
    """What all stages have in common."""

    clients: Sequence[int]
    context: int
    tokens: int
    weights: str
    seconds: float
    sizes: Sequence[str]


def run_server(asking: Asking) -> Iterator[dict[str, Any]]:
    """The server's entries of ``results``, each once more when the next turn is known."""
    book = book_of(read_haystack(), asking.context, asking.weights)
    with server(book, ["--weights", asking.weights]) as url, asyncio.Runner() as loop:
        list(_each(loop, ask_all(url, 2, 8, 600)))  # compiles, and audits its first answers
        for clients in asking.clients:
            with console.status(f"{clients} clients"):
                for found in _each(loop, ask_all(url, clients, asking.tokens, asking.seconds)):
                    yield _entry(asking, "server", clients, found)


def _each(loop: asyncio.Runner, parts: AsyncIterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What comes of ``parts``, as it comes."""

    async def following() -> dict[str, Any] | None:
        return await anext(parts, None)

    while (found := loop.run(following())) is not None:
        yield found


def run_dense(asking: Asking) -> Iterator[dict[str, Any]]:
    """Those of the unwrapped model."""
    model, tokenizer = load_model(weights=asking.weights)
    ids = context_ids(read_haystack(), tokenizer)[:, : asking.context]
    cache, _ = prefill(model, ids)
    ask_densely(model, tokenizer, ids, cache, 1, 2, asking.seconds)
    for clients in asking.clients:
        found = ask_densely(model, tokenizer, ids, cache, clients, asking.tokens, asking.seconds)
        yield _entry(asking, "dense", clients, found)


def _entry(asking: Asking, side: str, clients: int, found: dict[str, Any]) -> dict[str, Any]:
    return {"context": asking.context, "weights": asking.weights, "clients": clients, "side": side, **found}


def run_forks(asking: Asking) -> Iterator[dict[str, Any]]:
    """One query to each of several forks: together, and one after the other."""
    for size in asking.sizes:
        captured = [load_rows(SIZES[size], layer) for layer in LAYERS]
        origins = [build(rows, RetrievalConfig(audit_rate=0.0), len(rows) - STEPS_FROM) for rows in captured]
        for clients in FORKS:
            stores = [[origin.fork() for _ in range(clients)] for origin in origins]
            for forks, rows in zip(stores, captured, strict=True):
                for own, fork in enumerate(forks, len(rows) - STEPS_FROM + 1):
                    fork.insert(*(part[:, :, own - 1 : own] for part in (rows.keys, rows.values)))
            queries = [captured[0].query[:, :, i : i + clients].transpose(0, 2) for i in range(16)]
            sides = [Side(name, stores, run) for name, run in ASKED_FORKS.items()]
            timed = time_sides(sides, queries, rounds=40, seconds=asking.seconds, label=f"{clients} forks of {size}")
            ms = {f"{name}_ms": 1e3 * timing.median for name, timing in timed.items()}
            plans = [forks[0].plan_of(queries[0][:1]) for forks in stores]
            scanning = sum(plan.is_dense for plan in plans)
            quiet = min(timing.quiet for timing in timed.values())
            entry = {"context": SIZES[size], "weights": "float32", "clients": clients, "side": "forks"}
            yield entry | {"layers": len(plans), "scanning": scanning, **ms, "quiet": quiet}


def _together(forks: Sequence[AttentionDB], query: Tensor) -> Tensor:
    rows = min(forks[0].store.rows_shared(fork.store) for fork in forks)
    return scan_together(forks, query, rows, scale=query.shape[3] ** -0.5)


def _one_by_one(forks: Sequence[AttentionDB], query: Tensor, *, retrieve: bool) -> list[Any]:
    return [fork.attend(one, retrieve=retrieve) for fork, one in zip(forks, query.split(1), strict=True)]


ASKED_FORKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "together": _together,
    "each": partial(_one_by_one, retrieve=True),
    "scans": partial(_one_by_one, retrieve=False),
}
SIDES = {"server": run_server, "dense": run_dense, "forks": run_forks}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, nargs="+", metavar="N", help="clients at once (default 1 8 32)")
    options.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="default all")
    options.add_argument("--context", type=int, metavar="T", help="tokens of the context (default 7500)")
    options.add_argument("--tokens", type=int, metavar="N", help="of an answer, at most (default 32)")
    options.add_argument("--seconds", type=float, metavar="S", help="of a stage, at most (default 180)")
    options.add_argument("--weights", default="float32", choices=WEIGHTS, help="of both sides (default float32)")
    options.add_argument(
        "--quick", action="store_true", help="1 and 8 clients, 1000 tokens, answers of 12, a minute each"
    )
    options.add_argument("--json", type=Path, metavar="OUT", help=OUT_HELP.replace("results,", "results/serve.json,"))
    args = options.parse_args(argv)
    asking = Asking(
        args.clients or ((1, 8) if args.quick else (1, 8, 32)),
        args.context or (1000 if args.quick else 7500),
        args.tokens or (12 if args.quick else 32),
        args.weights,
        args.seconds or (60 if args.quick else 180),
        ("8K",) if args.quick else ("8K", "32K"),
    )
    path = args.json or results_folder(args.quick) / "serve.json"
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    held: list[dict[str, Any]] = []
    for side in args.sides:
        for one in SIDES[side](asking):
            found[tuple(one[name] for name in SAME)] = one
            held = with_earlier(path, list(found.values()), SAME)
            settings = {"quick": args.quick, "tokens": asking.tokens, "seconds": asking.seconds}
            write_json(path, "serve", settings, held)
    _print(asking, held)
    write(path.parent)


def _print(asking: Asking, held: Sequence[dict[str, Any]]) -> None:
    """Sides next to each other, as the record has them."""
    rows, same = [], (asking.weights, asking.context)
    found = [one for one in held if one["side"] == "forks" or (one["weights"], one["context"]) == same]
    for clients in asking.clients:
        sides = {one["side"]: one for one in found if one["clients"] == clients and one["side"] != "forks"}
        served, dense = sides.get("server", {}), sides.get("dense", {})
        again = served.get("next_turn", {})
        figures = [side.get(name) for name in ("first_p50", "first_p95", "tokens_per_s") for side in (served, dense)]
        cut = [f"{side['cut']} of {side['asked']}" if side else None for side in (served, dense)]
        rows.append([str(clients), *figures, again.get("first_p50"), again.get("first_p95"), *cut])
    names = ("first token, s", "p95", "tokens/s")
    columns = [f"{name}{of}" for name in names for of in ("", " (dense)")]
    print_table(
        f"a context of {asking.context:,} tokens, {asking.weights}",
        ("clients", *columns, "next turn, s", "p95", "cut", "cut (dense)"),
        rows,
    )
    if forks := [one for one in found if one["side"] == "forks"]:
        fields = ("context", "clients", "scanning", "together_ms", "each_ms", "scans_ms")
        print_table(
            "one query to each of several forks, ms",
            ("rows", "forks", "layers whose plan scans", "together", "each by its plan", "each scanning"),
            [[one[name] for name in fields] for one in forks],
        )


if __name__ == "__main__":
    main()
