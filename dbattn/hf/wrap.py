"""wrap(model, config): retrieval inside a transformers model."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import DynamicCache, PreTrainedModel

from ..attention import AttentionDB
from ..config import RetrievalConfig
from ..query.audit import AuditReport
from ..query.plan import QueryPlan, sum_plans
from ..query.stats import RunningStats
from ..sharded import check_config
from ..shards import Shards
from ..snapshot import SaveReport, ShardWriter, SnapshotWriter, open_parts
from ..store import check_host_rows
from ..windows import Reading, Windows
from .adapters import active_adapters
from .batch import BatchCache
from .cache import SERVED
from .chunks import chunks_of, joined
from .context import open_context, save_context
from .decoder import UnsupportedModelError as UnsupportedModelError
from .decoder import check_exact, find_decoder
from .exact import ExactGenerate
from .function import NAME, register, unregister
from .graphs import Graphs, check_graphs
from .in_step import InStep, check_shards
from .layer_states import ContextCache, Mark, refuse_states
from .offload import device_of, layer_devices
from .pace import Drafts
from .report import Report
from .session import ForwardPass, Session, forward_pass, left_to_transformers
from .shared_context import SharedContext
from .switches import Watcher
from .trace import Trace
from .travel import residual_stream, stream_errors
from .weights import Int8Meanwhile, check_weights
from .window_cache import CHUNK, WindowCache


def wrap(
    model: PreTrainedModel,
    config: RetrievalConfig | None = None,
    *,
    context: str | os.PathLike[str] | None = None,
    exact: bool = False,
    draft_weights: str = "float32",
    group: ProcessGroup | Shards | None = None,
    graphs: bool = False,
) -> "Handle":
    """Let a model's full-attention layers answer decode steps from an index.

    Use it as a context manager, or keep the handle and call ``handle.unwrap()``. ``model.generate`` and plain calls run
    unchanged; prompts are read as ``config.prefill`` says (through lists a chunk at a time), single new tokens
    retrieve. Inference only: rows are stored detached, and backward through an answer raises RuntimeError. Copy or
    pickle a model before it is wrapped: a ``copy.deepcopy`` of a wrapped one refuses to run. While it is wrapped,
    ``set_attn_implementation`` takes attention away from the databases; ``report`` says so, and ``unwrap`` leaves it as
    it was set.

    Args:
        model: a decoder of transformers that goes through its AttentionInterface.
        config: what a query reads; default the context's, or ``RetrievalConfig()``.
        context: a snapshot folder that ``handle.save`` wrote for this model: what the model read then need not be read
            again. ``handle.new_cache()`` begins with it; a call with another empty cache does not, and warns once.
        exact: ``model.generate`` gives dense's tokens (greedy; up to ties that rounding decides) or samples from its
            distribution: retrieval only drafts tokens, and one dense pass checks several. How many are drafted follows
            from what is accepted and from the times measured; none where that would not be faster, and for batches and
            beams: ``report`` says so. Plain calls of the model are answered densely. Of a context that was read by
            windows, both are over the windows that a question chooses.
        draft_weights: what drafts are made with: the model's own weights ("float32"), or int8 copies of those of its
            linear layers ("int8": a fourth more memory, and a third of the bytes that a drafted token reads), on CPUs.
        group: a process group of ``torch.distributed`` over which each layer's rows are dealt (``ShardedDB``). Every
            rank wraps the same model and makes the same calls; ``generate`` begins with rank 0's random numbers on all
            of them, and states are merged in one order, so that greedy and sampled tokens are the same. A rank that is
            given another token raises ShardError. Contexts are opened by as many ranks as saved them. Not with
            ``exact``, contexts read by windows, ``rows="host"`` or ``prefill`` other than "dense". Of a model whose
            heads are split over ranks (tensor parallelism), ``group`` holds ranks with the same heads.
        graphs: on a GPU, replay passes over one token from CUDA graphs: ``generate``'s, and plain calls of the model.
            A pass is captured where every layer retrieves, and anew when lists have changed (each 128 tokens or so);
            prompts, audits and padded batches run as ever, and ``report`` says how often and why. Hooks of modules, and
            what else Python does in a pass, do not run in a replay. For one thread at a time. Not with ``exact``,
            ``group`` or ``max_error``.

    Raises:
        TypeError: a config that is no RetrievalConfig.
        ValueError: draft weights that there are not, or that do not serve: not exact, or not on a CPU; graphs where
            there can be none.
        UnsupportedModelError (a TypeError): the model cannot be served, or not exactly (linear attention does not go
            back over tokens that were rejected); names the class and the reason.
        RuntimeError: the model is wrapped already.
        FileNotFoundError: there is no such context.
        SnapshotError (a ValueError): the context is of another model, was built with another config, or lacks a file or
            part of one; names the file or what differs. Of the other files' bytes none is read yet: damage to them is
            found by the first ``handle.new_cache()``.

    Example:
        >>> with torch.inference_mode(), wrap(model, context="book.dbattn") as handle:
        ...     ids = torch.cat([handle.context, question], dim=1)
        ...     model.generate(ids, past_key_values=handle.new_cache())
    """
    return Handle(model, config, context, exact=exact, draft_weights=draft_weights, group=group, graphs=graphs)


class Handle:
    """A wrapped model: statistics, a switch to dense answers, and the way back.

    ``dense``, ``audit``, ``watch`` and ``trace`` hold for the calls of the thread (or asyncio task) that entered the
    block. A thread started inside takes them over with ``contextvars.copy_context().run``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RetrievalConfig | None,
        context: str | os.PathLike[str] | None,
        *,
        exact: bool = False,
        draft_weights: str = "float32",
        group: ProcessGroup | Shards | None = None,
        graphs: bool = False,
    ) -> None:
        check_weights(draft_weights)
        int8 = draft_weights == "int8"
        if int8 and not (exact and device_of(model).type == "cpu"):
            raise ValueError(
                f'draft_weights="int8" with exact={exact} on {device_of(model)}: expected exact=True, on the CPU'
            )
        config = None if config is None else RetrievalConfig.checked(config)
        # The decoder inside a composite model: it meets the cache whichever way the model is called.
        self._decoder = find_decoder(model)
        self._text_config = self._decoder.config
        self.model = model
        layers = DynamicCache(config=model.config).layers
        if exact:
            check_exact(model, layers)
        shards, parts = None if group is None else Shards.of(group), None
        if shards is not None:
            check_shards(shards, model, exact=exact)
            if context is not None:
                parts, context = open_parts(context, shards)
        snapshot = None if context is None else open_context(context, self._decoder, layers, parts)
        self.config = (config or RetrievalConfig()) if snapshot is None else snapshot.config(config)
        if self.config.rows == "host":
            check_host_rows(device_of(model))
        if shards is not None:
            check_config(self.config)
        if graphs:
            check_graphs(device_of(model), self.config, exact=exact, sharded=shards is not None)
        self._session = Session(self.config, [RunningStats() for _ in layers], exact=exact, shards=shards)
        self._session.adapters = partial(active_adapters, self._decoder)
        if snapshot is not None:
            self._session.context_adapters = self._session.adapters()
            self._session.token_ids, self._session.windows = snapshot.token_ids, snapshot.info.windows
            if shards is not None and snapshot.token_ids is not None:
                self._session.token_ids = shards.together(snapshot.token_ids)
            devices = layer_devices(self._decoder, len(layers))
            of_rows = [device for device, layer in zip(devices, layers, strict=True) if type(layer) in SERVED]
            self._session.context = SharedContext(snapshot, self.config, of_rows, devices, shards, parts)
        for stats, layer in zip(self._session.stats, layers, strict=True):
            if type(layer) not in SERVED:
                stats.dense_reasons[left_to_transformers(layer)] = 0
        self._signature = inspect.signature(self._decoder.forward)
        # What can fail comes first, so that a failure leaves nothing behind.
        self._int8 = Int8Meanwhile(model, lambda: self._session.switches.drafting) if int8 else None
        self._graphs = Graphs(model, self._session, self._text_config) if graphs else None
        self._hooks = [
            self._decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._decoder.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._previous = self._text_config._attn_implementation
        register()
        # Not set_attn_implementation: it, and the public attribute, reach the configs nested below (vision towers).
        self._text_config._attn_implementation_internal = NAME
        if self._session.drafts is not None:
            model.generate = ExactGenerate(model, self._session, self._session.drafts)
        elif shards is not None:
            model.generate = InStep(model, shards)
        if self._int8 is not None:
            self._int8.begin()
        if self._graphs is not None:
            self._graphs.begin()
        self._active = True

    def unwrap(self) -> None:
        """Give the model back as it was, and let the last cache go. Calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        self._session.newest = None
        if self._session.drafts is not None or self._session.shards is not None:
            del self.model.generate
        if self._int8 is not None:
            self._int8.undo()
        if self._graphs is not None:
            self._graphs.undo()
        forward_pass.set(None)
        for hook in self._hooks:
            hook.remove()
        if self._text_config._attn_implementation == NAME:
            self._text_config._attn_implementation_internal = self._previous
        unregister()

    @property
    def context(self) -> Tensor | None:
        """Token ids ``[B, n]`` of the context that new caches begin with, for ``generate``; None without one."""
        ids = self._session.token_ids
        return None if ids is None else ids.to(device_of(self.model))

    @property
    def windows(self) -> Windows | None:
        """How the context was read, where that was by windows."""
        return self._session.windows

    @property
    def drafts(self) -> Drafts | None:
        """What became of drafted tokens, where answers are exact; ``restart_report`` counts anew."""
        return self._session.drafts

    def reading(self, cache: DynamicCache) -> Reading | None:
        """Which windows a cache reads, since a question came; None where there are none, or none came yet."""
        return self._session.reading_of(cache)

    def new_cache(self, reading: Reading | None = None) -> ContextCache:
        """A cache for the wrapped model, its layers databases already; to read a text once and ask often.

        It begins with the context's rows, if there is a context. All such caches share them, and own what comes after
        (``AttentionDB.fork``): the first one reads the context into memory, the next ones take next to no time and
        memory. Crop it back after a question, or take a new one. Where layers keep only the newest rows of a window, or
        a state of all that was read, it can be cropped to where the context ends, and to few other lengths.

        Of a context that was read by windows no rows are read yet. What comes right after it chooses windows
        (``RetrievalConfig.n_windows``; see ``reading``), whose rows are copied from the files, and all that follows
        sees these, until the cache is cropped back to the context. Inside ``dense()`` all windows are read. Inside
        ``same_windows()`` a question reads those of ``reading``, if it is given.

        Raises:
            ValueError: the model's adapters have changed since the context was opened.
            SnapshotError (a ValueError): the first time, a file of the context is damaged; names it. The first
                question that reads windows raises it of their files.
        """
        cache = ContextCache(self.model.config)
        self._session.adopt(cache)
        self._session.fill(cache, reading)
        return cache

    def read_window(
        self,
        token_ids: Tensor,
        cache: DynamicCache,
        windows: Windows,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Read the next window of a text that may be longer than what the model was trained to see at once.

        Which one is next is told by the cache's rows; a text is read when the cache has as many as it has tokens. Each
        window is read alone (see ``Windows``) and its rows appended when it has been read to its end: until then the
        cache is as it was. The rows' own positions stay in their window; whatever is read after them stands where the
        newest window ends, also in ``generate``: position ids, given or not, count rows, and are moved.

        Args:
            token_ids: int64 ``[B, n]``, the whole text.
            cache: of this wrapped model, empty or with windows of this text in it.
            windows: how to cut it.
            advance: called with numbers of new tokens read, several times.

        Raises:
            ValueError: a model that takes no positions or has layers that keep more than rows (see ``new_cache``),
                windows beyond its range, a cache with rows that were not read so, or all of the text in it.
        """
        if self._session.shards is not None:
            raise ValueError("a text cannot be read by windows where rows are dealt over a group")
        held, total = cache.get_seq_length(), token_ids.shape[1]
        before = self._session.windows_of(cache)
        limit = getattr(self._text_config, "max_position_embeddings", None)
        if "position_ids" not in self._signature.parameters:
            raise ValueError(f"{type(self.model).__name__} takes no position_ids: it cannot read by windows")
        refuse_states(cache, "cannot read by windows, each of which has states of its own")
        if before is not None and before.rows != held:
            raise ValueError(f"the cache holds {held} rows, {before.rows} of windows: crop it to these first")
        if limit is not None and windows.span > limit:
            raise ValueError(f"windows have {windows.span} positions, the model was made for {limit}")
        if (held and before is None) or (before is not None and replace(before, rows=0) != replace(windows, rows=0)):
            raise ValueError(f"the cache holds {held} rows read otherwise: {before or 'in one piece'}")
        window = next((each for each in windows.of(total) if each.first == held < total), None)
        if window is None:
            raise ValueError(
                f"no window of {total} tokens begins at row {held}: crop the cache to {windows.full(held)}"
            )
        text = token_ids[:, window.since : window.stop]
        if window.first:
            text = torch.cat([token_ids[:, : windows.prefix], text], dim=1)
        new, reading = window.stop - window.first, WindowCache(self.model.config)
        for chunk in text.split(CHUNK, dim=1):
            at = reading.get_seq_length() + new - text.shape[1]
            self.model(chunk, past_key_values=reading, logits_to_keep=1)
            if advance is not None:
                advance(max(0, at + chunk.shape[1]) - max(0, at))
        self._session.add_window(
            cache, reading, token_ids[:, window.first : window.stop], replace(windows, rows=window.stop)
        )

    def save(
        self,
        target: str | os.PathLike[str] | SnapshotWriter | ShardWriter,
        cache: DynamicCache | None = None,
        *,
        token_ids: Tensor | None = None,
    ) -> SaveReport:
        """Write a cache's rows to a snapshot folder, for ``wrap(model, context=...)``; only what is new since the last.

        Args:
            target: the folder, made if need be; or a SnapshotWriter (with ``group`` a ShardWriter), which keeps it
                locked between saves.
            cache: default: the one that went through the model last, whichever thread it was. The handle keeps it (its
                memory, too) until another cache goes through or the model is unwrapped.
            token_ids: int64 ``[B, n]``, of the rows. Default: what the model was given, which is known unless it was
                given embeddings or the cache came with rows in it.

        Raises:
            ValueError: no cache, an empty one, one with other layers than the model's own cache has, one whose rows
                were written under other adapters than are active now, one whose layers are not of one length, or token
                ids that are missing or of another length.
            SnapshotError (a ValueError): another writer holds the folder, or it holds something else.
        """
        cache = self._session.newest if cache is None else cache
        if cache is None:
            raise ValueError("no cache went through the model since it was wrapped: pass the cache to save")
        return save_context(target, cache, self._session, self._decoder, token_ids)

    def report(self) -> Report:
        """What retrieval did in each layer since the model was wrapped."""
        drafts, graphs, newest = self._session.drafts, self._graphs, self._session.newest
        return Report.of(
            self._session.stats,
            self._session.windows_of(newest),
            self._session.reading_of(newest),
            "" if drafts is None else str(drafts),
            "" if graphs is None else str(graphs),
        )

    @property
    def stats(self) -> list[RunningStats]:
        """What calls did, for each layer; databases of caches count there, unless they are given other stats."""
        return self._session.stats

    def restart_report(self) -> None:
        """Let ``report`` count from here on."""
        for stats in self._session.stats:
            stats.restart()
        for each in (self._session.drafts, self._graphs):
            if each is not None:
                each.restart()

    def explain(self) -> QueryPlan:
        """The plans of each layer's latest audited call, summed: what a token's attention reads in the whole model.

        Raises:
            ValueError: no call has been audited yet.
        """
        return sum_plans([stats.plan for stats in self._session.stats if stats.plan is not None])

    def follow_error(self, token_ids: Tensor, cache: DynamicCache) -> None:
        """Read tokens after a cache twice each, densely and through the index, for ``report`` to compare the layers.

        The report then shows, beside the error of a layer's attention, that of the residual stream after the layer:
        what the residual path damps. The cache is left as it was.

        Args:
            token_ids: int64 ``[B, n]``, read one by one.
            cache: of this wrapped model, with the rows before them.

        Raises:
            ValueError: a model whose layers cannot be followed.
        """
        began = Mark.of(cache)
        with residual_stream(self._decoder, len(self._session.stats)) as states, self.audit():
            for at in range(token_ids.shape[1]):
                token, before = token_ids[:, at : at + 1], Mark.of(cache)
                with self.dense():
                    self.model(token, past_key_values=cache)
                dense = list(states)
                before.put_back(cache)
                with self._session.switched(retrieve=True):
                    self.model(token, past_key_values=cache)
                for stats, error in zip(self._session.stats, stream_errors(states, dense), strict=True):
                    stats.add_stream_error(error)
        began.put_back(cache)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Answer every call inside the block densely; rows are indexed all the same."""
        with self._session.switched(retrieve=False, drafts=False):
            yield

    def choose_windows(self, cache: DynamicCache, question: Tensor) -> Reading | None:
        """Let a cache read the windows for a question, token ids ``[B, m]``, that will come in pieces.

        Read these inside ``same_windows()``. None, and nothing done, where the context was not read by windows.

        Raises:
            SnapshotError (a ValueError): a file with rows of them is damaged.
        """
        return self._session.choose_windows(cache, question)

    @contextmanager
    def same_windows(self) -> Iterator[None]:
        """Let what follows a context inside the block read the windows that its cache read before, and choose none."""
        with self._session.switched(same_windows=True):
            yield

    @contextmanager
    def audit(self) -> Iterator[list[AuditReport]]:
        """Audit every retrieving call inside the block; yields the list that its reports are added to."""
        audits: list[AuditReport] = []
        with self._session.switched(audits=audits):
            yield audits

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Call ``watcher(layer, db, query, scale, softcap)`` after each call in the block that a database answered.

        The newest rows of ``db`` are the queries' own. The watcher must not change the database.
        """
        with self._session.switched(watcher=watcher):
            yield

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Sum up, over all layers, which row positions the newest query of each call inside the block attends to."""
        trace = Trace()

        def add(layer: int, db: AttentionDB, query: Tensor, scale: float, softcap: float | None) -> None:
            retrieve = self._session.switches.retrieve
            weights = db.row_weights(query, scale=scale, softcap=softcap, retrieve=retrieve)
            reading = self._session.reading_of(self._session.newest)
            trace.add(
                *(each if reading is None else reading.spread(each) for each in (weights.total, weights.for_unread))
            )

        with self.watch(add):
            yield trace

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unwrap()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a wrapped model, or its handle, cannot be pickled: call unwrap() first (handle.save keeps a cache's rows, "
            "model.save_pretrained the model)"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo need not look into databases
    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._check_serves(module)
        self._signature.bind_partial(*args, **kwargs)  # raises what the call itself would
        given = dict(zip(self._signature.parameters, args, strict=False)) | kwargs
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._text_config, "use_cache", False)
        if cache is None and use_cache:
            cache = DynamicCache(config=self.model.config)
            given |= {"past_key_values": cache}
            args, kwargs = (), given
        served = self._text_config._attn_implementation == NAME
        if not served:
            reason = f"attention was set to {self._text_config._attn_implementation!r} while the model was wrapped"
            for stats in self._session.stats:
                stats.dense_reasons[reason] += 1
        if isinstance(cache, WindowCache):
            forward_pass.set(ForwardPass(self._session, cache, served))
            return args, kwargs
        if isinstance(cache, BatchCache):
            positions = self._session.note_batch(cache, given["input_ids"])
            forward_pass.set(ForwardPass(self._session, cache, served))
            return (), given | {"position_ids": positions}
        self._session.note_missing_context(cache, given.get("input_ids"))
        if not isinstance(cache, DynamicCache):
            forward_pass.set(ForwardPass(self._session, cache, served))
            return args, kwargs
        self._session.adopt(cache)
        given, until, before = self._read_chunks(module, cache, given, served)
        sharpening = 1.0
        if (reading := self._session.choose_windows(cache, given.get("input_ids"))) is not None:
            given = given | {"position_ids": _positions(given, cache, reading.windows)}
            sharpening = reading.windows.sharpening_over(reading.read)
        if not self._session.switches.capturing:  # token ids come from the device
            self._session.note_call(cache, given.get("input_ids"))
        forward_pass.set(ForwardPass(self._session, cache, served, sharpening, until=until, before=before))
        return (), given

    def _check_serves(self, decoder: nn.Module) -> None:
        if decoder is not self._decoder:
            raise RuntimeError(
                f"this {type(self.model).__name__} is a copy of a wrapped model; copy it before wrap, or after unwrap"
            )
        if decoder.training:
            raise RuntimeError(
                f"{type(self.model).__name__} is in training mode; dbattn serves inference: call model.eval()"
            )

    def _read_chunks(
        self, decoder: nn.Module, cache: DynamicCache, given: dict[str, Any], served: bool
    ) -> tuple[dict[str, Any], int | None, list[Tensor]]:
        """Let the decoder read all chunks of a long prompt but the last.

        Returns:
            What is left of the call; the rows there are after all of it, None where it is not one of chunks; and the
            hidden states of what was read.
        """
        until = self._session.switches.until
        if until is not None or not served or (found := chunks_of(self._session, cache, given)) is None:
            return given, until, []
        chunks, until = found
        with self._session.switched(until=until):
            read = [decoder(**chunk).last_hidden_state for chunk in chunks[:-1]]
        return chunks[-1], until, read

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        # The hook is called after errors, too, which have no output.
        if output is not None and (under_way := forward_pass.get()) is not None:
            for cache in getattr(under_way.cache, "caches", (under_way.cache,)):
                self._session.note_end(cache)
            if under_way.before:
                output = joined(output, under_way.before)
        forward_pass.set(None)
        return output


def _positions(given: dict[str, Any], cache: DynamicCache, windows: Windows) -> Tensor:
    """Position ids of a call whose cache begins with windows; those given count rows, and are moved."""
    if (positions := given.get("position_ids")) is None:
        held, ids = cache.get_seq_length(), given.get("input_ids")
        new = given["inputs_embeds"] if ids is None else ids
        positions = torch.arange(held, held + new.shape[1], device=new.device)[None]
    return positions + windows.shift
