"""Session: what the caches of one wrapped model share; and its forward pass under way."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from index_kernels.integer import is_integer

from ..config import RetrievalConfig
from ..query.stats import RunningStats
from ..shards import Shards
from ..windows import Reading, Windows, choose
from .adapters import Adapters, in_words
from .batch import BatchCache
from .cache import SERVED, DatabaseLayer, HybridDatabaseLayer
from .layer_states import ContextCache, Mark
from .pace import Drafts
from .shared_context import SharedContext
from .switches import Switches, Watcher
from .window_cache import WindowCache, WindowLayer

WITHOUT_CONTEXT = "began without the context that the model was wrapped with"


class Session:
    """What the layers of all caches of one wrapped model share. Copies of a cache stay in their session."""

    def __init__(
        self,
        config: RetrievalConfig,
        stats: list[RunningStats],
        *,
        exact: bool = False,
        shards: Shards | None = None,
    ) -> None:
        self.config = config
        self.stats = stats
        # The ranks that rows are dealt over; None: this process has them all.
        self.shards = shards
        # Where answers must be dense's, retrieval is for drafts alone.
        self._usual = Switches(retrieve=not exact)
        # What became of these; None where there are none.
        self.drafts = Drafts() if exact else None
        self._switches: ContextVar[Switches | None] = ContextVar("switches", default=None)
        # What every new cache begins with; and its token ids.
        self.context: SharedContext | None = None
        self.token_ids: Tensor | None = None
        # How the context was read, where that was by windows.
        self.windows: Windows | None = None
        # The adapters that act in the model now; and those that the context was saved with.
        self.adapters: Callable[[], Adapters] = tuple
        self.context_adapters: Adapters = ()
        # The cache that went through the model last, kept alive for ``Handle.save``.
        self.newest: DynamicCache | None = None

    @property
    def switches(self) -> Switches:
        """Those of the present thread or task."""
        return self._switches.get() or self._usual

    @property
    def changed(self) -> bool:
        """Whether the present thread or task is inside a block that changes how calls are answered."""
        return self.switches != self._usual

    def capturing(self, watcher: Watcher) -> AbstractContextManager[None]:
        """Let passes inside the block be captured; ``watcher`` is told of each layer's query."""
        return self.switched(watcher=watcher, capturing=True)

    @property
    def serving(self) -> bool:
        """Whether a forward pass of this session is under way whose attention goes through dbattn's function."""
        under_way = forward_pass.get()
        return under_way is not None and under_way.served and under_way.session is self

    @contextmanager
    def switched(self, **changes: Any) -> Iterator[None]:
        """Change switches for the calls that this thread or task makes inside the block."""
        token = self._switches.set(replace(self.switches, **changes))
        try:
            yield
        finally:
            self._switches.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def adopt(self, cache: DynamicCache) -> None:
        """Put our database in place of every plain layer of a cache, and of another session's; their rows move over."""
        if cache.offloading:
            raise ValueError("an offloaded cache cannot be served: its rows leave the device between layers")
        if cache.layer_class_to_replicate is DynamicLayer:
            missing = len(self.stats) - len(cache.layers)
            cache.layers.extend(DynamicLayer() for _ in range(missing))
            cache.layer_class_to_replicate = None
        for i, layer in enumerate(cache.layers):
            if type(layer) in SERVED or (isinstance(layer, DatabaseLayer) and layer.session is not self):
                # Assigned when it is complete: rows that are refused stay where they were.
                cache.layers[i] = self._with_rows_of(layer, i)

    def note_call(self, cache: DynamicCache, token_ids: Tensor | None) -> None:
        """Remember that the model is about to read ``token_ids [B, n]`` (None: unknown) into a cache of ours."""
        self.newest = cache
        if self.shards is not None:
            self.shards.about = _in_a_number(token_ids)
        if (first := self._first(cache)) is not None:
            first.note_tokens(token_ids)
            first.note_adapters(self.adapters())
            first.unfinished += 1

    def note_end(self, cache: Cache | None) -> None:
        """Remember that a call on a cache came to its end."""
        if isinstance(cache, DynamicCache) and (first := self._first(cache)) is not None:
            first.unfinished -= 1

    def was_interrupted(self, cache: DynamicCache) -> bool:
        """Whether a call on a cache did not come to its end: its layers may differ in what they have read."""
        first = self._first(cache)
        return first is not None and first.unfinished > 0

    def note_batch(self, batch: BatchCache, token_ids: Tensor) -> Tensor:
        """Remember the token ``[B, 1]`` of each cache; their position ids ``[B, 1]``.

        Raises:
            ValueError: more than a token each, or caches that are not this session's, or were read by windows.
        """
        if self.shards is not None:
            raise ValueError("a batch of caches cannot be read over the ranks of a group: one cache at a time")
        ours = all(map(BatchCache.takes, batch.caches)) and all(
            layer.session is self for cache in batch.caches for layer in cache.layers
        )
        if token_ids.shape != (len(batch.caches), 1) or not ours:
            raise ValueError(
                f"a batch of {len(batch.caches)} caches was given tokens {list(token_ids.shape)}: expected one token "
                "each, and caches of this model that were not read by windows"
            )
        positions = [[cache.get_seq_length()] for cache in batch.caches]
        for cache, token in zip(batch.caches, token_ids.split(1), strict=True):
            self.note_call(cache, token)
        return torch.tensor(positions, device=token_ids.device)

    def note_missing_context(self, cache: Any, token_ids: Tensor | None) -> None:
        """Say once where a call begins with neither the context's rows nor its tokens."""
        context = self.token_ids
        if context is None or (cache is not None and cache.get_seq_length()):
            return
        if token_ids is not None:
            begins = min(token_ids.shape[1], context.shape[1])
            ids, expected = token_ids[:, :begins].cpu(), context[:, :begins]
            if torch.equal(ids, expected.expand_as(ids)):
                return  # the context is read again
        if all(WITHOUT_CONTEXT in stats.dense_reasons for stats in self.stats):
            return
        for stats in self.stats:
            stats.dense_reasons[WITHOUT_CONTEXT] += 0
        warnings.warn(
            f"this call {WITHOUT_CONTEXT}: its cache is empty. To go on after the context: ids = "
            "torch.cat([handle.context, question], dim=1); model.generate(ids, past_key_values=handle.new_cache())",
            stacklevel=2,
        )

    def check_adapters(self, cache: DynamicCache) -> None:
        """Refuse rows that the model, with the adapters of now, would not write.

        Raises:
            ValueError: some of the cache's rows were written under other adapters; says which.
        """
        now, first = self.adapters(), self._first(cache)
        for adapters in () if first is None else first.adapters_of_rows():
            if adapters != now:
                raise ValueError(
                    f"rows of this cache were written with {in_words(adapters)} active, the model now has "
                    f"{in_words(now)}: make that active again, or read the text anew"
                )

    def note_dense(self, number: int, reason: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Count a call of layer ``number`` that no database answered: a query ``[B, Hq, m, D]`` over T rows."""
        stats, rows = self.stats[number], key.shape[2]
        stats.rows_stored = rows
        prompt = query.shape[2] > self.config.max_queries
        stats.add_dense(reason, 0.0 if prompt else float(rows), key.nbytes + value.nbytes, prompt=prompt)

    def tokens_of(self, cache: DynamicCache) -> Tensor | None:
        """Token ids ``[B, n]`` of a cache's rows, as far as they are known."""
        first = self._first(cache)
        return None if first is None else first.token_ids

    def windows_of(self, cache: Cache | None) -> Windows | None:
        """How a cache's first rows were read, where that was by windows."""
        first = self._first(cache) if isinstance(cache, DynamicCache) else None
        return None if first is None else first.windows

    def add_window(self, cache: DynamicCache, read: WindowCache, token_ids: Tensor, windows: Windows) -> None:
        """Append the newest rows of a window that was read, those of ``token_ids [B, n]``, to a cache of ours."""
        self.note_call(cache, token_ids)
        self.note_end(cache)
        for layer, window in zip(cache.layers, read.layers, strict=True):
            layer.add_window(*window.newest(token_ids.shape[1]))
        first = self._first(cache)
        assert first is not None
        first.windows, first.reading = windows, None

    def choose_windows(self, cache: DynamicCache, asked: Tensor | None) -> Reading | None:
        """Let a cache that has been read by windows read those for what comes now, ``asked [B, m]``.

        Only what comes right after the context chooses; what follows reads the same. None where there are no windows.

        Raises:
            ValueError: token ids are missing.
            SnapshotError (a ValueError): a file with rows of them is damaged.
        """
        first = self._first(cache)
        if first is None or first.windows is None or first.base is None:
            return None
        rows, windows = len(first.base), first.windows
        held = first.reading
        if held is not None and (cache.get_seq_length() > held.rows or self.switches.same_windows):
            return held
        numbers, most = tuple(range(windows.count)), self.config.n_windows
        # Drafts are checked over what they read.
        some = self.switches.retrieve or self.drafts is not None
        if most is not None and most < len(numbers) and some:
            if asked is None:
                raise ValueError(
                    "windows are chosen by the token ids of a question, but the call has none (inputs_embeds?): pass "
                    "input_ids, or wrap the model with n_windows=None to read all windows"
                )
            numbers = choose(windows, first.token_ids, asked, most)
        reading = Reading(windows, numbers, rows)
        if reading != held:
            self._read(cache, reading)
        return reading

    def _read(self, cache: DynamicCache, reading: Reading) -> None:
        """Let a cache that has been read by windows read some of them."""
        first = cache.layers[0]
        first.reading = None  # should a file be damaged, nothing has been chosen
        for layer in cache.layers:
            layer.read(reading.runs)
        first.reading = reading

    def reading_of(self, cache: Cache | None) -> Reading | None:
        """Which windows a cache reads; None where there are none, or none has been chosen yet."""
        first = self._first(cache) if isinstance(cache, DynamicCache) else None
        return None if first is None else first.reading

    def fill(self, cache: ContextCache, reading: Reading | None = None) -> None:
        """Give an empty cache of ours the context's rows; all caches share them, see ``AttentionDB.fork``.

        ``reading``: which windows it reads, if they are known already.

        Raises:
            ValueError: the model's adapters have changed since the context was opened.
            SnapshotError (a ValueError): the first time, a file of the context is damaged; names it.
        """
        if self.context is None:
            return
        if (now := self.adapters()) != self.context_adapters:
            raise ValueError(
                f"the context was read with {in_words(self.context_adapters)} active, the model now has "
                f"{in_words(now)}: make that active again, or wrap the model anew with another context"
            )
        databases = [layer for layer in cache.layers if isinstance(layer, DatabaseLayer)]
        for layer, db in zip(databases, self.context.layers, strict=True):
            if self.windows is None:
                layer.begin_with(db)
            else:
                layer.begin_with_windows(db.store)
        first = databases[0]
        mark = Mark(first.get_seq_length(), self.context.states)
        mark.put_back(cache)
        cache.mark(mark)
        if self.token_ids is not None:
            first.token_ids = self.token_ids
        first.adapters, first.windows = [(0, self.context_adapters)], self.windows
        if reading is not None:
            self._read(cache, reading)

    def _first(self, cache: DynamicCache) -> DatabaseLayer | None:
        return next((layer for layer in cache.layers if isinstance(layer, DatabaseLayer)), None)

    def _with_rows_of(self, layer: DynamicLayer, layer_index: int) -> DatabaseLayer:
        hybrid = isinstance(layer, LinearAttentionAndFullAttentionLayer)
        ours = HybridDatabaseLayer(self, layer_index, layer) if hybrid else DatabaseLayer(self, layer_index)
        if not layer.get_seq_length():
            return ours
        if isinstance(layer, DatabaseLayer):
            ours.token_ids, ours.adapters, ours.windows = layer.token_ids, layer.adapters, layer.windows
            if layer.base is not None:
                ours.begin_with_windows(layer.whole()[0])
                return ours
        ours.update(layer.keys, layer.values)
        if isinstance(layer, DatabaseLayer):
            assert ours.db is not None
            assert layer.db is not None
            if layer.db.has_padding:
                ours.db.set_start(layer.db.start)
            ours.db.store.take_sample(copy.deepcopy(layer.db.store.sample))
        return ours


def _in_a_number(token_ids: Tensor | None) -> int:
    """What differs for other tokens, nearly always, and as a float64 is exact."""
    if token_ids is None:
        return 0
    at = torch.arange(1, token_ids.numel() + 1, device=token_ids.device)
    return int(((token_ids.reshape(-1) + 1) * at * 2654435761 % (1 << 31)).sum() % (1 << 50)) + 1


@dataclass
class ForwardPass:
    """A wrapped model's forward pass that is under way: its session, the cache it was given, and who attends.

    ``served``: attention goes through dbattn's function. ``sharpening``: a factor of its logits. ``padded``: the mask
    that was made last of those that are causal order and left padding, and the first valid row of each batch row.
    ``until``: where it reads a chunk of a prompt, the rows that there are after all of it. ``before``: the hidden
    states of the chunks before the last, which is what this pass reads.
    """

    session: Session
    cache: Cache | None
    served: bool
    sharpening: float = 1.0
    padded: tuple[Tensor, Tensor] | None = None
    until: int | None = None
    before: list[Tensor] = field(default_factory=list)

    def padding_of(self, mask: Tensor) -> Tensor | None:
        """The first valid rows where ``mask`` is a copy of ``padded``'s, as layers on another device are given."""
        if self.padded is None:
            return None
        made, start = self.padded
        same = mask.shape == made.shape and mask.dtype == made.dtype and torch.equal(mask.to(made.device), made)
        return start.to(mask.device) if same else None

    def note_bypass(self, number: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Count a call of layer ``number`` whose keys came from no database, with the reason."""
        if not is_integer(number, 0, len(self.session.stats) - 1):
            return
        layers = getattr(self.cache, "layers", ())
        holder = layers[number] if number < len(layers) else self.cache
        if isinstance(holder, WindowLayer):
            return
        if holder is None:
            reason = "no cache (use_cache=False)"
        elif isinstance(holder, DatabaseLayer):
            reason = "the model makes its keys after its cache (as multi-head latent attention does)"
        else:
            reason = left_to_transformers(holder)
        self.session.note_dense(number, reason, query, key, value)


def left_to_transformers(holder: Any) -> str:
    """Why a layer with such a cache, or cache layer, is answered densely."""
    return f"left to transformers ({type(holder).__name__})"


# The pass under way in this thread or task.
forward_pass: ContextVar[ForwardPass | None] = ContextVar("forward_pass", default=None)
