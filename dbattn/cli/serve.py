"""dbattn serve: a model and its contexts behind an OpenAI-compatible interface."""

import ipaddress
import logging
import signal
import socket
from pathlib import Path

from rich.console import Console

from ..serve.contexts import model_name, named, reading_config, wrapped
from ..serve.conversations import Conversations
from ..serve.engine import Engine
from ._console import line_console
from ._opened import load


def run_serve(
    *,
    model: Path | None,
    weights: str,
    context: list[str],
    name: str | None,
    k: int | None,
    host: str,
    port: int,
    batch: int,
    requests: int,
    max_tokens: int,
    max_body: int,
    memory: int,
    drain: int,
    quiet: bool,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are answered to their end, for ``drain`` seconds at most.

    Raises:
        FileNotFoundError, ValueError: a context or the model is missing, damaged, or they do not belong together.
        ImportError: the extra ``serve`` is not installed.
        OSError: the address is taken.
    """
    for option, value in (("--batch", batch), ("--requests", requests), ("--max-tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{option} is {value}, expected at least 1")
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}, expected 0 (any) to 65535")
    contexts = named(context)
    for path in contexts.values():
        reading_config(path, k)  # what can be wrong with it is said before the model is loaded
    try:
        import uvicorn

        from ..serve.app import Limits, make_app
    except ImportError as error:
        raise ImportError(f'dbattn serve needs its extra: pip install "dbattn[serve]" ({error})') from error
    # Each request is told of in the metrics; transformers says it in its log, too.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    console = line_console(stderr=True, quiet=quiet)
    # Before the model is loaded, so that a port that is taken is said at once.
    listening = _listen(host, port)
    lm, tokenizer = load(model, weights, console)
    with listening, wrapped(lm, tokenizer, name or model_name(model), contexts, k) as served:
        engine = Engine(Conversations(memory), batch=batch)
        app = make_app(served, engine, Limits(max_tokens, max_body, requests))
        config = uvicorn.Config(
            app, lifespan="on", log_level="warning", timeout_graceful_shutdown=drain, server_header=False
        )
        listening.listen()  # who connects from here on waits for the server, which is about to start
        _say(console, listening, list(served))
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn's own drains; then it is raised once more
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
            engine.stop()
        console.print("all requests were answered" if not engine.active else "stopped")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror or error}") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"{error.strerror}: give another --port or --host", f"{host}:{port}") from error
    return listening


def _say(console: Console, listening: socket.socket, names: list[str]) -> None:
    host, port = listening.getsockname()[:2]
    console.print(f"serving {', '.join(names)} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    if not ipaddress.ip_address(host).is_loopback:
        console.print(
            f"{host} can be reached from other machines, and no key is checked here: put a proxy that does before it"
        )
