"""wrap(model, config): retrieval inside a transformers model."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from index_kernels.ops import FLOATS

from ..audit import AuditReport, RunningStats
from ..config import RetrievalConfig
from ..report import Report
from .cache import Session
from .function import NAME, register, unregister


class UnsupportedModelError(TypeError):
    """A model that cannot be wrapped; the message names its class and the reason."""


def wrap(model: PreTrainedModel, config: RetrievalConfig | None = None) -> "Handle":
    """Let a model's full-attention layers answer decode steps from an index.

    Use it as a context manager, or keep the handle and call ``handle.unwrap()``. ``model.generate`` and plain calls
    run unchanged; prompts are read densely, single new tokens retrieve. Inference only: rows are stored detached.
    Copy a model before it is wrapped: a ``copy.deepcopy`` of a wrapped one refuses to run.

    Args:
        model: a decoder of transformers that goes through its AttentionInterface.
        config: what a query reads, default ``RetrievalConfig()``.

    Raises:
        UnsupportedModelError: the model cannot be served; names the class and the reason.
        RuntimeError: the model is wrapped already.
    """
    return Handle(model, config or RetrievalConfig())


class Handle:
    """A wrapped model: statistics, a switch to dense answers, and the way back."""

    def __init__(self, model: PreTrainedModel, config: RetrievalConfig) -> None:
        # The decoder inside a composite model: it meets the cache whichever way the model is called.
        self._decoder = _find_decoder(model)
        self._text_config = self._decoder.config
        self.model = model
        self.config = config
        layers = DynamicCache(config=model.config).layers
        self._session = Session(config, [RunningStats() for _ in layers])
        for stats, layer in zip(self._session.stats, layers, strict=True):
            if type(layer) is not DynamicLayer:
                stats.dense_reasons[f"left to transformers ({type(layer).__name__})"] = 0
        self._signature = inspect.signature(self._decoder.forward)
        # What can fail comes first, so that a failure leaves nothing behind.
        self._hook = self._decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._previous = self._text_config._attn_implementation
        register()
        # Not set_attn_implementation: it, and the public attribute, reach the configs nested below (vision towers).
        self._text_config._attn_implementation_internal = NAME
        self._active = True

    def unwrap(self) -> None:
        """Give the model back as it was. Calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        self._hook.remove()
        self._text_config._attn_implementation_internal = self._previous
        unregister()

    def new_cache(self) -> DynamicCache:
        """An empty cache for the wrapped model, its layers databases already; to read a text once and ask often."""
        cache = DynamicCache(config=self.model.config)
        self._session.adopt(cache)
        return cache

    def report(self) -> Report:
        """What retrieval did in each layer since the model was wrapped."""
        return Report.of(self._session.stats)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Answer every call inside the block densely; rows are indexed all the same."""
        before, self._session.retrieve = self._session.retrieve, False
        try:
            yield
        finally:
            self._session.retrieve = before

    @contextmanager
    def audit(self) -> Iterator[list[AuditReport]]:
        """Audit every retrieving call inside the block; yields the list that its reports are added to."""
        audits: list[AuditReport] = []
        before, self._session.audits = self._session.audits, audits
        try:
            yield audits
        finally:
            self._session.audits = before

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unwrap()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if module is not self._decoder:
            raise RuntimeError(
                f"this {type(self.model).__name__} is a copy of a wrapped model; copy it before wrap, or after unwrap"
            )
        if module.training:
            raise RuntimeError(
                f"{type(self.model).__name__} is in training mode; dbattn serves inference: call model.eval()"
            )
        self._signature.bind_partial(*args, **kwargs)  # raises what the call itself would
        given = dict(zip(self._signature.parameters, args, strict=False)) | kwargs
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._text_config, "use_cache", False)
        if cache is None and use_cache:
            cache = DynamicCache(config=self.model.config)
            args, kwargs = (), given | {"past_key_values": cache}
        if isinstance(cache, DynamicCache):
            self._session.adopt(cache)
        return args, kwargs


def _find_decoder(model: PreTrainedModel) -> Any:
    """The text decoder of a model that can be served; anything else raises and says why."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name} cannot be wrapped: expected a transformers PreTrainedModel")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} cannot be wrapped: an encoder-decoder's cross-attention has no causal rows"
        )
    text_config = model.config.get_text_config(decoder=True)
    if text_config._attn_implementation == NAME:
        raise RuntimeError(f"this {name} is wrapped already: call unwrap() on its handle first")
    decoders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text_config]
    if not decoders or not all(decoder._can_set_attn_implementation() for decoder in decoders):
        raise UnsupportedModelError(f"{name} cannot be wrapped: it does not use transformers' AttentionInterface")
    if model.dtype not in FLOATS:
        raise UnsupportedModelError(
            f"{name} cannot be wrapped: it is {model.dtype}, expected float32, float16 or bfloat16"
        )
    layers = DynamicCache(config=model.config).layers
    if not any(type(layer) is DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise UnsupportedModelError(
            f"{name} cannot be wrapped: no layer attends to all rows (its cache layers are {', '.join(kinds)})"
        )
    return decoders[0].base_model
