"""Requests in OpenAI's form: transformers' serving handlers, with an engine of ours behind them."""

import asyncio
import copy
import hashlib
import inspect
import json
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseGenerateManager, DirectStreamer, GenerationState, _StreamError

from .contexts import Served
from .engine import Engine, Generation, TooLongError
from .text import TextUntil


@dataclass
class Caller:
    """Who sent the request under way, by the hash of the API key; and the answer that is made for it."""

    key: str
    generation: Generation | None = None


caller: ContextVar[Caller] = ContextVar("caller")
# What transformers' handlers ignore, and the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "prediction": (),
    "tool_choice": ("auto", "none"),
    "web_search_options": (),
}
# What a request's ``generation_config`` may say.
SAMPLING = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "max_new_tokens",
    "stop_strings",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
# What ``chat_template_kwargs`` must leave alone: what is no variable of the template, but changes the call.
OWN_ARGUMENTS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
FAILED = "the answer failed"


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused(message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> HTTPException:
    """A request that is not answered, and why."""
    return HTTPException(status, error_body(status, message, code, param))


class Models(ModelManager):  # type: ignore[misc]  # transformers is untyped here
    """The models that are served, loaded and wrapped; a context is a model, too: ``smollm2@book``."""

    def __init__(self, served: dict[str, Served], engine: Engine) -> None:
        super().__init__(model_timeout=-1)
        self.served, self.engine, self._since = served, engine, int(time.time())

    def find(self, model: Any, context: Any = None) -> Served:
        """The model of that name (default: the one without a context), or its context of that name.

        Raises:
            HTTPException (404): there is none.
        """
        name = next(iter(self.served)) if model is None else model
        if context is not None:
            name = f"{str(name).partition('@')[0]}@{context}"
        if not isinstance(name, str) or name not in self.served:
            known = ", ".join(self.served)
            raise refused(f"model {name!r} is not served here; these are: {known}", status=404, code="model_not_found")
        return self.served[name]

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """See ModelManager; a name is a name."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See ModelManager; nothing is loaded any more."""
        served = self.find(model_id_and_revision)
        return served.model, served.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """See ModelManager; with the rows of a context."""
        return [self.describe(served) for served in self.served.values()]

    def describe(self, served: Served) -> dict[str, Any]:
        """An entry of ``/v1/models``."""
        return {
            "id": served.name,
            "object": "model",
            "created": self._since,
            "owned_by": "dbattn",
            "context_tokens": len(served.ids),
            "max_model_len": served.most_tokens,
        }

    def shutdown(self) -> None:
        """See ModelManager; the models belong to who wrapped them."""
        self.engine.stop()


class EngineState(GenerationState):  # type: ignore[misc]  # as above
    """Whether the engine is alive, for ``/health``."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def is_cb_alive(self) -> bool:
        """See GenerationState."""
        return self.engine.is_alive

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        """See GenerationState; transformers' own has no databases."""
        return False


class Request(EngineState, BaseGenerateManager):  # type: ignore[misc]  # as above
    """One request: who asks which model for what, and the answer in the making."""

    def __init__(self, engine: Engine, served: Served, owner: str, seed: int | None, wants_sources: bool) -> None:
        super().__init__(engine)
        self.served, self.owner, self.seed, self.wants_sources = served, owner, seed, wants_sources
        self.stops: tuple[str, ...] = ()
        self.lstrip = False
        self.generation: Generation | None = None

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """See GenerationState."""
        return self

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], "Stream"]:
        """See BaseGenerateManager."""
        stream = Stream(self, response_parser)
        self.generation = Generation(
            self.served,
            inputs["input_ids"][0].tolist(),
            gen_config,
            put=stream.say,
            done=stream.finish,
            owner=self.owner,
            seed=self.seed,
            wants_sources=self.wants_sources,
        )
        caller.get().generation = self.generation
        self.engine.submit(self.generation)
        return stream.queue, stream

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: dict[str, Any], gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        """See BaseGenerateManager."""
        queue, _ = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        text = ""
        while (item := await queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise RuntimeError(item.msg)
            text += item
        made = self.generation
        assert made is not None
        return text, made.prompt_tokens, made.ids[made.prompt_tokens :]

    def stop(self) -> None:
        """See BaseGenerateManager; the engine goes on."""

    def details(self) -> dict[str, Any] | None:
        """What the response says of its sources, if it was asked for them."""
        found = None if self.generation is None else self.generation.evidence
        if found is None:
            return None
        shown = () if found.sources is None else found.sources.found
        return {
            "rows_read": round(found.rows_read, 1),
            "of": found.of,
            "error_estimate": found.error,
            "sources": [
                {"start": s.passage.first, "end": s.passage.stop, "text": s.passage.text, "share": s.share}
                for s in shown
            ],
        }


class Stream(DirectStreamer):  # type: ignore[misc]  # as above
    """Text of an answer on its way from the engine's thread to the event loop."""

    def __init__(self, request: Request, response_parser: Any) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self._request = request
        self._until = TextUntil(request.stops, lstrip=request.lstrip)
        super().__init__(
            request.served.tokenizer._tokenizer, asyncio.get_running_loop(), self.queue, response_parser=response_parser
        )
        self.put(torch.empty(0))  # the prompt, as generate would

    def say(self, token: int) -> bool:
        """Show a token; whether the answer goes on."""
        self.put(torch.tensor([token]))
        return not self._until.has_ended

    def finish(self, generation: Generation) -> None:
        """The answer has ended."""
        if generation.error is None:
            self.end()
        else:
            super()._enqueue(_StreamError(FAILED))

    def cancel(self) -> None:
        """See DirectStreamer; the engine looks before every step."""
        if self._request.generation is not None:
            self._request.generation.cancelled.set()

    def _enqueue(self, item: Any) -> None:
        if item is not None and type(item) is not str:
            super()._enqueue(item)
            return
        text = self._until.end() if item is None else self._until.feed(item)
        if text:
            super()._enqueue(text)
        if item is None:
            super()._enqueue(None)


class _Answering:
    """What our handlers add to transformers': contexts, limits, owners, sources, and errors that clients can read.

    Each request is handled by a copy, which knows it.
    """

    request: Request
    model_manager: Models
    is_chat = False

    def __init__(self, models: Models, max_tokens: int) -> None:
        super().__init__(models, EngineState(models.engine))  # type: ignore[call-arg]  # BaseHandler's
        self.max_tokens = max_tokens
        self._is_limit_asked = False

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """See BaseHandler.

        Raises:
            HTTPException: it cannot be answered, and why.
        """
        one = copy.copy(self)
        try:
            return await one._handle(dict(body), request_id)
        except HTTPException as error:
            raise error if isinstance(error.detail, dict) else refused(str(error.detail)) from error
        except TooLongError as error:
            raise refused(str(error), code="context_length_exceeded") from error
        except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise refused(f"the request cannot be answered: {what}") from error

    async def _handle(self, body: dict[str, Any], request_id: str) -> Any:
        for name, harmless in UNSERVED.items():
            if body.get(name) is not None and body[name] not in harmless:
                raise refused(f"{name}={body[name]!r} is not served", param=name)
        wishes, context = body.pop("dbattn", None) or {}, body.pop("context", None)
        if not isinstance(wishes, dict) or wishes.keys() - {"sources"}:
            raise refused(f"dbattn is {wishes!r}, expected {{'sources': true}}", param="dbattn")
        seed = body.pop("seed", None)
        if seed is not None and not isinstance(seed, int):
            raise refused(f"seed is {seed!r}, expected an integer", param="seed")
        served = self.model_manager.find(body.get("model"), context)
        body["model"] = served.name
        if self.is_chat:
            _check_chat(body, served)
        if asked := json.loads(body.get("generation_config") or "{}").keys() - SAMPLING:
            raise refused(f"generation_config asks for {', '.join(sorted(asked))}, which is not served")
        who = f"{caller.get().key}/{body.get('user') or body.get('safety_identifier') or ''}"
        owner = hashlib.sha256(who.encode()).hexdigest()
        self.request = Request(self.model_manager.engine, served, owner, seed, bool(wishes.get("sources")))
        self.request.lstrip = self.is_chat
        self.generation_state = self.request
        return await super().handle_request(body, request_id)  # type: ignore[misc]  # BaseHandler's

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        self._is_limit_asked = any(
            body.get(name) is not None for name in ("max_tokens", "max_completion_tokens", "generation_config")
        )
        if not self._is_limit_asked:
            config.max_new_tokens = min(config.max_new_tokens, self.max_tokens)
        if not 1 <= (config.max_new_tokens or 0) <= self.max_tokens:
            raise refused(f"max_tokens is {config.max_new_tokens}, expected 1 to {self.max_tokens}", param="max_tokens")
        # transformers takes a temperature for a wish only where the model samples anyway.
        config.do_sample = bool(body["temperature"] if body.get("temperature") is not None else config.do_sample)
        stops = config.stop_strings or []
        if not all(isinstance(stop, str) for stop in stops):
            raise refused(f"stop is {stops!r}, expected text, or a list of texts", param="stop")
        self.request.stops = (*([stops] if isinstance(stops, str) else stops), *self._stops())
        config.stop_strings = None  # the text is cut where they begin
        return config

    def _stops(self) -> tuple[str, ...]:
        return self.request.served.stops if self.is_chat else ()

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        response: Any = super()._streaming(*self._after_context(*args), **kwargs)  # type: ignore[misc]  # as above
        response.body_iterator = self._until_done(response.body_iterator)
        return response

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        response: Any = await super()._non_streaming(*self._after_context(*args), **kwargs)  # type: ignore[misc]  # as above
        return JSONResponse(self._with_figures(json.loads(response.body)))

    def _after_context(
        self,
        request_id: str,
        model: Any,
        processor: Any,
        model_id: str,
        inputs: Any,
        config: GenerationConfig,
        *rest: Any,
    ) -> tuple[Any, ...]:
        """The arguments, the context's tokens before those of the request; no more new ones than there is room for."""
        served, ids = self.request.served, [int(token) for token in inputs["input_ids"][0].tolist()]
        if served.ids and ids and ids[0] == served.tokenizer.bos_token_id and not self.is_chat:
            ids = ids[1:]  # a text that goes on does not begin
        ids = [*served.ids, *ids]
        if not self._is_limit_asked and served.most_tokens is not None:
            config.max_new_tokens = max(1, min(config.max_new_tokens, served.most_tokens - len(ids)))
        return request_id, model, processor, model_id, {"input_ids": torch.tensor([ids])}, config, *rest

    def _build_chunk_sse(self, *args: Any, usage: CompletionUsage | None = None, **kwargs: Any) -> str:
        event: str = super()._build_chunk_sse(*args, usage=usage, **kwargs)  # type: ignore[misc]
        if usage is None:
            return event
        return f"data: {json.dumps(self._with_figures(json.loads(event.removeprefix('data: '))))}\n\n"

    def _with_figures(self, body: dict[str, Any]) -> dict[str, Any]:
        """A response, or its last part, with rows that were there already, and its sources if asked for."""
        made = self.request.generation
        assert made is not None
        body["usage"]["prompt_tokens_details"] = PromptTokensDetails(cached_tokens=made.tokens_reused).model_dump(
            exclude_none=True
        )
        details = self.request.details()
        return body if details is None else body | {"dbattn": details}

    async def _until_done(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """The events, an error in OpenAI's form, and the mark that clients end at."""
        failed = f'data: {{"error": "{FAILED}"}}\n\n'
        async for part in events:
            yield part.replace(failed, f"data: {json.dumps(error_body(500, FAILED))}\n\n")
        yield "data: [DONE]\n\n"


def _check_chat(body: dict[str, Any], served: Served) -> None:
    """Refuse what transformers' handler would leave out, and what only a server may say."""
    if not (isinstance(body.get("messages"), list) and body["messages"]):
        raise refused("messages is missing or empty, expected a list of them", param="messages")
    for message in body["messages"]:
        parts = message.get("content") if isinstance(message.get("content"), list) else []
        if others := {part["type"] for part in parts} - {*TEXT_PARTS}:
            raise refused(f"messages hold {', '.join(sorted(others))}, expected text", param="messages")
    if body.get("tools") and "tools" not in str(served.tokenizer.chat_template):
        raise refused(f"{served.name} takes no tools", param="tools")
    if own := (body.get("chat_template_kwargs") or {}).keys() & OWN_ARGUMENTS:
        raise refused(f"chat_template_kwargs may not hold {', '.join(sorted(own))}", param="chat_template_kwargs")


class Chat(_Answering, ChatCompletionHandler):  # type: ignore[misc]  # as above
    """``/v1/chat/completions``."""

    is_chat = True


class Text(_Answering, CompletionHandler):  # type: ignore[misc]  # as above
    """``/v1/completions``."""
