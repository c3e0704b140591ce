"""dbattn chat: a conversation about a context, in a terminal."""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..serve.contexts import Served, model_name, reading_config, wrapped
from ..serve.conversations import Conversations
from ..serve.engine import Engine, Generation
from ..serve.text import TextUntil
from ..text.prompt import check_question
from ._console import first_ctrl_c, line_console
from ._console import wrapped as broken
from ._opened import load

HELP = "/sources shows or hides passages, /new forgets what was said, /help, /quit (or Ctrl-D)"


@dataclass
class Chat:
    """A conversation.

    Attributes:
        said: the messages so far.
        sources: whether answers come with the passages they read.
    """

    served: Served
    engine: Engine
    max_tokens: int
    console: Console
    sources: bool = False
    said: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> str:
        """Print the answer as it comes; Ctrl-C ends it, and what was said until then stays."""
        messages = [*self.said, {"role": "user", "content": question}]
        served, shown = self.served, ""
        encoded = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids = [*served.ids, *encoded["input_ids"]]
        config = copy.deepcopy(served.model.generation_config)
        config.do_sample, config.max_new_tokens = False, self.max_tokens
        until = TextUntil(served.stops, lstrip=True)
        tokens: list[int] = []
        passed = ""

        def show(text: str) -> None:
            nonlocal shown
            shown += text
            print(text, end="", flush=True)

        def put(token: int) -> bool:
            nonlocal passed
            tokens.append(token)
            text: str = served.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # else inside a character of several tokens
                show(until.feed(text[len(passed) :]))
                passed = text
            return not until.has_ended

        made = Generation(served, ids, config, put=put, wants_sources=self.sources)
        with first_ctrl_c() as stop_asked:
            self.engine.answer(made, stop_asked)
        show(until.end())
        print(flush=True)
        self.said = [*messages, {"role": "assistant", "content": shown.strip()}]
        if made.evidence is not None and made.evidence.sources is not None:
            print("\nsources:", *broken(made.evidence.sources.lines(len(served.ids))), sep="\n")
        self.console.print(_figures(made), markup=False)
        return shown.strip()

    def command(self, line: str) -> bool:
        """Do what ``/...`` says; whether the chat goes on."""
        if line == "/quit":
            return False
        if line == "/new":
            self.said = []
            self.console.print("nothing was said yet")
        elif line == "/sources":
            self.sources = not self.sources
            self.console.print(f"sources are {'shown' if self.sources else 'hidden'}")
        else:
            self.console.print(HELP)
        return True


def run_chat(
    *,
    context: Path,
    model: Path | None,
    weights: str,
    k: int | None,
    max_tokens: int,
    memory: int,
    show_sources: bool,
    quiet: bool,
) -> None:
    """Answer questions about a context, line by line, until the input ends.

    Raises:
        FileNotFoundError, ValueError: the context or the model is missing, damaged, or they do not belong together.
    """
    if max_tokens < 1:
        raise ValueError(f"--max-tokens is {max_tokens}, expected at least 1")
    reading_config(context, k)
    console = line_console(stderr=True, quiet=quiet)
    lm, tokenizer = load(model, weights, console)
    with wrapped(lm, tokenizer, model_name(model), {"context": context}, k) as served:
        *_, about = served.values()
        chat = Chat(about, Engine(Conversations(memory), batch=1), max_tokens, console, show_sources)
        console.print(f"{context}: {len(about.ids)} tokens. Ctrl-C ends an answer; {HELP}", markup=False)
        while (line := _line(console)) is not None:
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                try:
                    check_question(line)
                    chat.answer(line)
                except ValueError as error:
                    # Too long, say: the conversation is as it was.
                    console.print(f"{error}", markup=False)


def _line(console: Console) -> str | None:
    """What is typed next; None where there is no more. Ctrl-C at an empty prompt ends the chat, too."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # lines can be edited, and earlier ones asked for again
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            console.print()
        return None


def _figures(made: Generation) -> str:
    new, seconds = made.new_tokens, made.ended - made.first_token
    pace = "" if new < 2 else f", then {1000 * seconds / (new - 1):.0f} ms a token"
    read = made.prompt_tokens - made.tokens_reused
    rows = made.evidence and f"; {made.evidence.rows_read:.0f} of {made.evidence.of} rows read per query"
    stopped = ", stopped" if made.outcome == "cancelled" else ""
    return (
        f"{read} tokens read, {made.tokens_reused} reused, first token after {made.first_token - made.began:.1f} s"
        f"{pace}{rows or ''}{stopped}"
    )
