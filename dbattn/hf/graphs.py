"""Decoding by CUDA graphs: the model's pass over one token, captured once and replayed until lists change.

A pass of small kernels takes the host longer than the device. Replayed, it is one call of the host; what differs from
step to step is on the device (the token, its position, the row that is written), and what the host keeps of it
(lengths, counters, sampled queries) is brought up afterwards. A pass that is to be audited, or after which rows are
sealed, runs as ever, and so does the first one after lists have changed: in it every kernel that a graph will hold is
compiled and makes its buffers. The next one is captured.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..attention import AttentionDB
from ..config import RetrievalConfig
from ..query.stats import Told
from .cache import DatabaseLayer
from .function import NAME
from .layer_states import Mark
from .session import Session

# Arguments that say where a token is, which the cache tells as well.
PLACES = ("position_ids", "cache_position")
RETURNED = {"logits", "past_key_values"}
# What is compared by value where it is asked whether a graph still serves.
PLAIN = (bool, int, float, str, tuple)
REPLAYED, CAPTURED = "replayed", "captured"
Recorder = Callable[[Callable[[], Any], Any], tuple[Any, Callable[[], None]]]


def check_graphs(device: torch.device, config: RetrievalConfig, *, exact: bool, sharded: bool) -> None:
    """Raise ValueError where passes cannot be captured."""
    if device.type != "cuda":
        raise ValueError(f"graphs=True captures CUDA graphs, and the model is on {device}: expected a CUDA device")
    for asked, what in ((exact, "exact=True"), (sharded, "group"), (config.max_error is not None, "max_error")):
        if asked:
            raise ValueError(f"graphs=True does not go with {what}: the host decides in the middle of such a pass")


def cuda_graph(run: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """What ``run`` returns, captured, and what replays it; nothing has run yet."""
    graph, stream, here = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            made = run()
        finally:
            graph.capture_end()
    here.wait_stream(stream)
    return made, graph.replay


class UnfitError(Exception):
    """Why a pass over one token runs as ever."""


@dataclass(frozen=True)
class Pass:
    """A pass over one token ``ids [B, 1]`` after a cache's ``rows``, with the call's other arguments."""

    ids: Tensor
    cache: DynamicCache
    rows: int
    others: dict[str, Any]
    databases: tuple[AttentionDB, ...]
    adapters: Any

    @property
    def stands_on(self) -> tuple[Any, ...]:
        """What a graph of it has in it: it serves while this is the same."""
        found: list[Any] = [self.cache, self.ids.shape, tuple(self.others.items()), self.adapters]
        for db in self.databases:
            found += [db, *db.stands_on]
        return tuple(found)


@dataclass(frozen=True)
class Captured:
    """A pass on a device: what it stands on, what it returned, and its replay; ``calls``: those of its layers."""

    stands_on: tuple[Any, ...]
    output: Any
    calls: tuple[tuple[AttentionDB, Tensor, Told], ...]
    replay: Callable[[], None]


class Graphs:
    """``model.forward`` of a wrapped model, by graphs where they serve; ``counts``: how passes over a token ran."""

    def __init__(
        self, model: PreTrainedModel, session: Session, text_config: Any, record: Recorder = cuda_graph
    ) -> None:
        self._model, self._session, self._text_config, self._record = model, session, text_config, record
        self._plain = model.forward
        self.counts: Counter[str] = Counter()
        self._failed = ""
        self._stood: tuple[Any, ...] = ()
        self._captured: Captured | None = None
        self._pool = torch.cuda.graph_pool_handle() if record is cuda_graph else None
        # On the device: the token, and where its row is to be written; and what the host knows of the latter.
        self._ids: Tensor | None = None
        self._newest = self._positions = torch.empty(0)
        self._at = -1

    def begin(self) -> None:
        """Take the place of the model's ``forward``."""
        self._model.forward = update_wrapper(lambda *args, **kwargs: self._forward(args, kwargs), self._plain)

    def undo(self) -> None:
        """Give it back."""
        del self._model.forward
        self._forget()

    def restart(self) -> None:
        """Count from here on."""
        self.counts.clear()

    def __str__(self) -> str:
        parts = [f"{count} {how}" for how, count in self.counts.most_common()]
        return f"passes over one token, by CUDA graphs: {', '.join(parts) or 'none yet'}"

    def _forget(self) -> None:
        self._captured, self._stood = None, ()

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            step = self._pass_of(args, kwargs)
        except UnfitError as why:
            self.counts[f"as ever: {why}"] += 1
            return self._plain(*args, **kwargs)
        if step is None:
            return self._plain(*args, **kwargs)
        self._place(step)
        stands_on = step.stands_on
        if self._captured is not None and not _same(self._captured.stands_on, stands_on):
            self._forget()
        if any(db.audit_is_due for db in step.databases):
            how = "as ever, to be audited"
        elif any(db.index.is_due(step.rows + 1) or step.rows >= db.store.capacity for db in step.databases):
            how = "as ever, before rows were sealed or buffers grew"
        elif self._captured is not None:
            self.counts[REPLAYED] += 1
            return self._replayed(step, self._captured)
        elif _same(self._stood, stands_on):
            captured = self._capture(step, stands_on)
            if captured is not None:
                return captured
            how = f"as ever: {self._failed}"
        else:
            how = "as ever, after lists had changed"
        retrieved = [db.stats.retrieving for db in step.databases]
        with self._told(step):
            output = self._plain(*args, **kwargs)
        self._at, self._stood = -1, ()  # the place on the device was not moved on
        if not (hasattr(output, "keys") and set(output.keys()) <= RETURNED):
            how = "as ever, the call returns more than logits"
        elif not all(db.stats.retrieving > n for db, n in zip(step.databases, retrieved, strict=True)):
            how = "as ever, a layer did not retrieve"
        else:
            self._stood = step.stands_on
        self.counts[how] += 1
        return output

    def _pass_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass | None:
        """A pass that a graph may take; None for what is none over one token.

        Raises:
            UnfitError: one over a token that runs as ever; says why.
        """
        given = dict(kwargs)
        ids = args[0] if len(args) == 1 else given.pop("input_ids", None)
        cache = given.pop("past_key_values", None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1:
            return None
        if self._failed:
            raise UnfitError(self._failed)
        if len(args) > 1 or not isinstance(cache, DynamicCache):
            raise UnfitError("the cache is none of dbattn's, or comes by position")
        databases = tuple(
            layer.db
            for layer in cache.layers
            if type(layer) is DatabaseLayer and layer.session is self._session and layer.base is None and layer.db
        )
        if len(databases) != len(cache.layers):
            raise UnfitError("a layer of the cache holds no rows, or other things than rows")
        if torch.is_grad_enabled() or self._session.changed or self._text_config._attn_implementation != NAME:
            raise UnfitError("gradients, or another way to answer, were asked for")
        if any(db.lists is None for db in databases):
            raise UnfitError("a layer has no lists: few rows, or another index")
        if any(db.has_padding for db in databases):
            raise UnfitError("prompts of a batch are padded")
        rows = cache.get_seq_length()
        mask = given.pop("attention_mask", None)
        places = [given.pop(name) for name in PLACES if isinstance(given.get(name), Tensor)]
        others = {name: value for name, value in given.items() if value is not None}
        if not all(isinstance(value, bool | int | float | str) for value in others.values()):
            raise UnfitError("the call has other arguments that are no plain values")
        checks = [(place == rows).all() for place in places]
        if mask is not None:
            if mask.ndim != 2 or mask.shape[1] != rows + 1:
                raise UnfitError("the attention mask is of other rows")
            checks.append(mask.all())
        if any(place.numel() > len(ids) for place in places) or not all(bool(check) for check in checks):
            raise UnfitError("tokens are not at the positions of their rows")
        return Pass(ids, cache, rows, others, databases, self._session.adapters())

    def _place(self, step: Pass) -> None:
        """Tell the device where the token of a pass is."""
        with torch.inference_mode(False):  # written in either mode
            if self._ids is None or self._ids.shape != step.ids.shape or self._ids.device != step.ids.device:
                self._ids = torch.zeros_like(step.ids)
                self._newest = torch.zeros(1, dtype=torch.int64, device=step.ids.device)
                self._positions = torch.zeros(1, 1, dtype=torch.int64, device=step.ids.device)
                self._at = -1
                self._forget()
            if self._at != step.rows:
                self._newest.fill_(step.rows)
                self._positions.fill_(step.rows)
                self._at = step.rows

    @contextmanager
    def _told(self, step: Pass) -> Iterator[None]:
        """Let the stores of a pass take from the device where its row is written."""
        stores = [db.store for db in step.databases]
        for store in stores:
            store.newest = self._newest
        try:
            yield
        finally:
            for store in stores:
                store.newest = None

    def _run(self, step: Pass) -> Any:
        """What is captured: the pass, and the next one's place."""
        output = self._plain(
            input_ids=self._ids, position_ids=self._positions, past_key_values=step.cache, **step.others
        )
        self._newest.add_(1)
        self._positions.add_(1)
        return output

    def _capture(self, step: Pass, stands_on: tuple[Any, ...]) -> Any:
        """Capture a pass, and replay it; None where that failed, after which all is as before."""
        assert self._ids is not None
        before, counted = Mark.of(step.cache), [db.stats.copy() for db in step.databases]
        asked: list[tuple[AttentionDB, Tensor]] = []
        self._session.note_call(step.cache, step.ids)
        self._ids.copy_(step.ids)
        try:
            with self._told(step), self._session.capturing(lambda _, db, query, *__: asked.append((db, query))):
                output, replay = self._record(lambda: self._run(step), self._pool)
        except Exception as error:  # whatever a model does that cannot be captured
            self._failed = f"capturing failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            before.put_back(step.cache)
            for db, stats in zip(step.databases, counted, strict=True):
                vars(db.stats).update(vars(stats))
            self._at = -1
            self._forget()
            return None
        self.counts[CAPTURED] += 1
        self._at += 1
        calls = tuple((db, query, db.stats.latest) for db, query in asked if db.stats.latest is not None)
        self._captured = Captured(stands_on, output, calls, replay)
        replay()
        for db, query, _ in calls:
            db.note_replayed(query)
        return self._answer(step, output)

    def _replayed(self, step: Pass, captured: Captured) -> Any:
        assert self._ids is not None
        self._session.note_call(step.cache, step.ids)
        self._ids.copy_(step.ids)
        captured.replay()
        self._at += 1
        for db, query, told in captured.calls:
            db.count_replayed(told)
            db.note_replayed(query)
        self._session.note_end(step.cache)
        return self._answer(step, captured.output)

    def _answer(self, step: Pass, output: Any) -> Any:
        """The output, whose logits the next replay will not touch."""
        return type(output)(logits=output.logits.clone(), past_key_values=step.cache)


def _same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether all parts are: objects the very same, numbers, names and tuples of them equal."""
    return len(before) == len(now) and all(
        one is other or (isinstance(one, PLAIN) and isinstance(other, PLAIN) and one == other)
        for one, other in zip(before, now, strict=True)
    )
