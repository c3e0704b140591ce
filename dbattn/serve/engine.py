"""Engine: one model step after the other for all answers under way; what can be read together is read together."""

import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ..hf.batch import BatchCache
from ..hf.report import Report
from ..query.stats import RunningStats
from .contexts import Served
from .conversations import Conversations
from .metrics import Metrics
from .sources import Sources

logger = logging.getLogger(__name__)
# Tokens of prompts that are read in a round, before answers get their next token.
PIECE = 128


@dataclass(frozen=True)
class Evidence:
    """What an answer was made of.

    Attributes:
        rows_read: rows read per query, mean over layers and steps; of: rows there were.
        error: relative error of the attention output, as audits of some of the calls found it; None: not known; 0 where
            everything was read.
        sources: passages of the context, None without one.
    """

    rows_read: float
    of: int
    error: float | None
    sources: Sources | None


class TooLongError(ValueError):
    """More tokens than the model has room for."""


class Generation:
    """One answer in the making.

    Attributes:
        ids: token ids of all that was read or said, the context's first; grows as the answer does.
        prompt_tokens: how many of them were there at first; tokens_reused: of these, the rows that were there already.
        cancelled: set it, and the answer ends before the next step.
        evidence: what the answer was made of, if that was asked for and it has ended.
        error: why the answer failed.
        is_over: whether the answer has its last token.
        outcome: "done", "cancelled" or "failed"; "" until it has ended.
        began, first_token, ended: ``time.perf_counter()``; 0 until then.
    """

    def __init__(
        self,
        served: Served,
        ids: Sequence[int],
        config: GenerationConfig,
        *,
        put: Callable[[int], bool],
        done: Callable[["Generation"], None] = lambda _: None,
        owner: str = "",
        seed: int | None = None,
        wants_sources: bool = False,
    ) -> None:
        """``put`` is called with each token, and says whether the answer goes on; ``done`` once, at the end.

        ``wants_sources``: look at what the answer reads; it is not part of a batch then, and each token takes longer.

        Raises:
            ValueError: no token beside the context's, more than the model's range has room for, or a way to generate
                that is not sampling or the likeliest token.
        """
        if not len(ids) > len(served.ids):
            raise ValueError("the prompt is empty")
        room = None if served.most_tokens is None else served.most_tokens - len(ids)
        if room is not None and config.max_new_tokens > room:
            raise TooLongError(
                f"this model's maximum context length is {served.most_tokens} tokens; {len(served.ids)} are the "
                f"context's, {len(ids) - len(served.ids)} the prompt's, and {config.max_new_tokens} were asked for"
            )
        if (mode := config.get_generation_mode()) not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"generation_config asks for {mode.value}, expected greedy search or sampling")
        self.served, self.owner, self.ids = served, owner, list(ids)
        self.prompt_tokens, self.tokens_reused = len(self.ids), 0
        self.cancelled = threading.Event()
        self.wants_sources = wants_sources
        self.evidence: Evidence | None = None
        self.error: Exception | None = None
        self.is_over, self.outcome = False, ""
        self.began, self.first_token, self.ended = time.perf_counter(), 0.0, 0.0
        self.done, self._put = done, put
        self._chooser = _Chooser(served, config, seed)
        self._most = config.max_new_tokens
        self._cache: Any = None
        self._trace: Any = None
        self._entered = ExitStack()
        # What it traces, others do not: its steps run in a context of their own.
        self._context = contextvars.copy_context()

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.prompt_tokens

    @property
    def unread(self) -> int:
        """Tokens that the model has not read yet."""
        return len(self.ids) - int(self._cache.get_seq_length())

    @property
    def can_join(self) -> bool:
        """Whether its next step can be part of a batch."""
        return self.unread == 1 and not self.wants_sources and BatchCache.takes(self._cache)

    def start(self, conversations: Conversations) -> None:
        """Find what rows there are."""
        self._cache = conversations.take(self.owner, self.served, self.ids)
        self.tokens_reused = self.prompt_tokens - self.unread
        handle = self.served.handle
        if handle.choose_windows(self._cache, torch.tensor([self.ids[len(self.served.ids) :]])) is not None:
            # The whole question has chosen; it is read in pieces.
            self._context.run(self._entered.enter_context, handle.same_windows())
        shared = handle.stats
        for layer, stats in zip(self._cache.layers, shared, strict=True):
            if getattr(layer, "db", None) is not None:
                # Its own where figures of this answer alone are asked for.
                layer.db.stats = RunningStats(ladder=stats.ladder) if self.wants_sources else stats
        if self.wants_sources and self.served.finder is not None:
            self._trace = self._context.run(self._entered.enter_context, handle.trace())

    def read(self, tokens: int = 1) -> None:
        """Read the next ``tokens`` of what is unread; at its end, say the next token."""
        piece = self.ids[len(self.ids) - self.unread :][:tokens]
        logits = self._context.run(_logits, self.served.model, [piece], self._cache)
        if not self.unread:
            self._say(logits[0])

    @staticmethod
    def read_together(several: Sequence["Generation"]) -> None:
        """Read the one unread token of each, and say the next ones."""
        batch = BatchCache([each._cache for each in several])
        logits = _logits(several[0].served.model, [each.ids[-1:] for each in several], batch)
        for each, own in zip(several, logits, strict=True):
            try:
                each._say(own)
            except Exception as error:  # what one asked for is no fault of the others
                logger.exception("an answer failed")
                each.error = error

    def _say(self, logits: Tensor) -> None:
        token = self._chooser.choose(logits, self.ids)
        self.ids.append(token)
        self.first_token = self.first_token or time.perf_counter()
        goes_on = self._put(token)
        self.is_over = not goes_on or token in self._chooser.ends or self.new_tokens >= self._most

    def end(self, conversations: Conversations, error: Exception | None = None) -> None:
        """Keep the rows, find the evidence."""
        self.error = error or self.error
        error = self.error
        try:
            if self._cache is not None and error is None:
                if self.wants_sources:
                    self.evidence = self._found()
                read = self.ids[: len(self.ids) - self.unread]
                conversations.keep(self.owner, self.served, read, self.prompt_tokens, self._cache)
        except Exception as failed:
            self.error = failed
        finally:
            self._context.run(self._entered.close)
            self._cache = self._trace = None
            self.ended = time.perf_counter()
            self.outcome = "failed" if self.error else "done" if self.is_over else "cancelled"

    def _found(self) -> Evidence:
        stats = [layer.db.stats for layer in self._cache.layers if getattr(layer, "db", None) is not None]
        reading = self.served.handle.reading(self._cache)
        found = Report.of(stats, self.served.handle.windows, reading).summary
        error = 0.0 if not found.retrieving else found.expected_error if found.error is None else found.error
        finder = self.served.finder
        sources = None if finder is None or self._trace is None else finder.sources(self._trace, reading)
        return Evidence(found.rows_read or float(found.rows_stored), found.rows_stored, error, sources)


class Engine:
    """Answers what is submitted, up to ``batch`` answers at a time, the others in the order they came.

    In each round some tokens of prompts are read, in turn, and each answer under way gets its next token: those after
    the same context in one pass through the model. A seed gives the same tokens whoever else is served, as far as
    a batch's rounding allows, and what retrieval leaves unread: rows that several share are all read, where reading
    them once for all is faster (``attend_together``).
    """

    def __init__(self, conversations: Conversations, *, batch: int = 8, metrics: Metrics | None = None) -> None:
        self.conversations, self.batch = conversations, batch
        self.metrics = metrics or Metrics()
        self._waiting: deque[Generation] = deque()
        self._active: deque[Generation] = deque()
        self._work = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def submit(self, generation: Generation) -> None:
        """Answer it when its turn comes; from any thread.

        Raises:
            RuntimeError: the engine was stopped.
        """
        with self._work:
            if self._stopping:
                raise RuntimeError("the server is shutting down")
            self._waiting.append(generation)
            self._work.notify()

    def start(self) -> None:
        """Run rounds in a thread until ``stop``."""
        self._thread = threading.Thread(target=self._run, name="dbattn-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End what is under way, and the thread."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join()
        for generation in (*self._active, *self._waiting):
            self._end(generation, RuntimeError("the server is shutting down"))
        self._active.clear()
        self._waiting.clear()
        self.conversations.clear()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Answers that have not begun."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Answers under way."""
        return len(self._active)

    def answer(self, generation: Generation, stop_asked: Callable[[], bool] = lambda: False) -> None:
        """Answer it here and now, without a thread; ``stop_asked`` is asked before every step.

        Raises:
            Exception: why it failed.
        """
        self.submit(generation)
        while not generation.ended:
            if stop_asked():
                generation.cancelled.set()
            self.round()
        if generation.error is not None:
            raise generation.error

    def round(self) -> None:
        """One step of every answer under way."""
        with torch.inference_mode():
            self._admit()
            self._settle()
            left = PIECE
            for each in [each for each in self._active if each.unread > 1]:
                if left and not each.ended:
                    tokens = min(each.unread, left)
                    left -= tokens
                    # The next round begins with another one.
                    self._active.remove(each)
                    self._active.append(each)
                    self._attempt(partial(each.read, tokens), [each])
                    self._settle()  # an answer that has ended does not wait for the prompts of others
            groups: dict[Any, list[Generation]] = {}
            for each in [each for each in self._active if each.unread == 1]:
                groups.setdefault(each.served if each.can_join else each, []).append(each)
            for several in groups.values():
                if len(several) == 1:
                    self._attempt(several[0].read, several)
                else:
                    self._attempt(partial(Generation.read_together, several), several)
            self._settle()

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self._stopping or self._waiting or self._active):
                    self._work.wait()
                if self._stopping:
                    return
            self.round()

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.batch:
            generation = self._waiting.popleft()
            if generation.cancelled.is_set():
                self._end(generation)
                continue
            self._active.append(generation)
            self._attempt(partial(generation.start, self.conversations), [generation])

    def _settle(self) -> None:
        for each in [each for each in self._active if each.is_over or each.error or each.cancelled.is_set()]:
            self._active.remove(each)
            self._end(each)

    def _attempt(self, step: Callable[[], None], several: list[Generation]) -> None:
        try:
            step()
        except Exception as error:
            logger.exception("an answer failed")
            for each in several:
                self._active.remove(each)
                self._end(each, error)

    def _end(self, generation: Generation, error: Exception | None = None) -> None:
        generation.end(self.conversations, error)
        self.metrics.note(generation)
        generation.done(generation)


class _Chooser:
    """Chooses tokens as a GenerationConfig says."""

    def __init__(self, served: Served, config: GenerationConfig, seed: int | None) -> None:
        model = served.model
        model._prepare_special_tokens(config, device=model.device)
        self._processors = model._get_logits_processor(config, input_ids_seq_length=0, device=model.device)
        self._samples = bool(config.do_sample)
        self._generator = torch.Generator(model.device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        eos = config.eos_token_id
        self.ends = {served.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

    def choose(self, logits: Tensor, ids: list[int]) -> int:
        """The token after ``ids``, of logits ``[V]``."""
        scores = logits.float()[None]
        if self._processors:
            scores = self._processors(torch.tensor([ids], device=logits.device), scores)
        if not self._samples:
            return int(scores.argmax())
        weights = scores.softmax(dim=-1)
        if not bool(weights.isfinite().all()):
            raise ValueError("sampling was asked for with options under which no token has a probability")
        return int(torch.multinomial(weights, 1, generator=self._generator))


def _logits(model: Any, tokens: list[list[int]], cache: Any) -> Tensor:
    """Logits ``[B, V]`` of what follows tokens ``[B, n]`` after the rows of a cache."""
    ids = torch.tensor(tokens, device=model.device)
    logits: Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return logits
