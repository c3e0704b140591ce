"""The application: transformers' routes, and what stands before them: limits, owners, disconnects, figures."""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send
from transformers.cli.serving.server import build_server

from .contexts import Served
from .engine import Engine
from .handlers import FAILED, Caller, Chat, EngineState, Models, Text, caller, error_body

# Of transformers' routes; the others load models or unload them, or serve what is not text.
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
# Seconds for the body of a request to come.
BODY_SECONDS = 60


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Attributes:
        tokens: of an answer.
        body: bytes of a request.
        requests: in the server at a time, those that wait included.
    """

    tokens: int = 4096
    body: int = 4 << 20
    requests: int = 64


def make_app(served: dict[str, Served], engine: Engine, limits: Limits) -> "Gate":
    """The ASGI application that serves these models, the engine started; it stops the engine when it is shut down."""
    models = Models(served, engine)
    app = build_server(
        models,
        Chat(models, limits.tokens),
        completion_handler=Text(models, limits.tokens),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=EngineState(engine),
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path in ROUTES]
    gate = Gate(app, engine, limits)

    def model(name: str) -> JSONResponse:
        return JSONResponse(models.describe(models.find(name)))

    def metrics() -> PlainTextResponse:
        text = engine.metrics.text(
            requests_under_way=gate.under_way,
            answers_waiting=engine.waiting,
            answers_active=engine.active,
            conversations_kept=len(engine.conversations),
            conversations_bytes=engine.conversations.nbytes,
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    app.add_api_route("/v1/models/{name:path}", model)
    app.add_api_route("/metrics", metrics)
    for kind, say in ((HTTPException, _http_error), (RequestValidationError, _invalid), (Exception, _failed)):
        app.add_exception_handler(kind, say)
    engine.start()
    return gate


async def _http_error(_: HTTPRequest, error: Any) -> JSONResponse:
    body = error.detail if isinstance(error.detail, dict) else error_body(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _invalid(_: HTTPRequest, error: Any) -> JSONResponse:
    what = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return JSONResponse(error_body(400, f"the body is not a JSON object: {what}"), 400)


async def _failed(_: HTTPRequest, error: Any) -> JSONResponse:
    return JSONResponse(error_body(500, FAILED), 500)


class Gate:
    """Before the application: takes in whole requests, not too many, and drops those whose client has left."""

    def __init__(self, app: Any, engine: Engine, limits: Limits) -> None:
        self._app, self._engine, self._limits = app, engine, limits
        self._inside: set[object] = set()

    @property
    def under_way(self) -> int:
        """Requests whose answer has not been sent to its end."""
        return len(self._inside)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client left before an answer began

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["method"] == "POST":
                await self._post(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        finally:
            path = scope["path"] if scope["path"] in (*ROUTES, "/metrics") else "other"
            self._engine.metrics.note_request(path, status)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.under_way >= self._limits.requests:
            said = f"{self.under_way} requests are under way, which is all that this server takes: try again later"
            await _refuse(scope, receive, send, 429, said, retry_after=1)
            return
        request = object()
        self._inside.add(request)

        async def sending(message: Message) -> None:
            # A client that has its whole answer may ask again at once: it has left by then.
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._inside.discard(request)
            await send(message)

        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await self._body(receive)
            except TimeoutError:
                await _refuse(scope, receive, sending, 408, f"the body did not come within {BODY_SECONDS} seconds")
                return
            if body is None:
                said = f"the body is larger than {self._limits.body} bytes"
                await _refuse(scope, receive, sending, 413, said)
                return
            who = Caller(hashlib.sha256(dict(scope["headers"]).get(b"authorization", b"")).hexdigest())
            caller.set(who)
            try:
                await self._answer(scope, body, receive, sending)
            finally:
                if who.generation is not None:
                    who.generation.cancelled.set()  # if it has not ended, nobody waits for it any more
        finally:
            self._inside.discard(request)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where it is too large."""
        parts, size = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body:
                return None
            if not message.get("more_body"):
                return b"".join(parts)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let the application answer; when the client leaves, what it does is cancelled."""
        left = asyncio.Event()
        given: Iterator[Message] = iter([{"type": "http.request", "body": body}])

        async def receiving() -> Message:
            if (message := next(given, None)) is None:
                await left.wait()
                return {"type": "http.disconnect"}
            return message

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        answering = asyncio.ensure_future(self._app(scope, receiving, send))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not answering.done():
                answering.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)
        if not answering.cancelled() and (error := answering.exception()) is not None and not left.is_set():
            raise error


async def _refuse(
    scope: Scope, receive: Receive, send: Send, status: int, message: str, retry_after: int | None = None
) -> None:
    headers = {"connection": "close"} if retry_after is None else {"retry-after": str(retry_after)}
    await JSONResponse(error_body(status, message), status, headers=headers)(scope, receive, send)
