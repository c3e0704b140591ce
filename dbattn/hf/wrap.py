"""wrap(model, config): retrieval inside a transformers model."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..audit import AuditReport, RunningStats
from ..config import RetrievalConfig
from ..report import Report
from .cache import Session
from .function import NAME, register, unregister


def wrap(model: PreTrainedModel, config: RetrievalConfig | None = None) -> "Handle":
    """Let a model's full-attention layers answer decode steps from an index.

    Use it as a context manager, or keep the handle and call ``handle.unwrap()``. ``model.generate`` and plain calls
    run unchanged; prompts are read densely, single new tokens retrieve. Inference only: rows are stored detached.

    Args:
        model: a decoder of transformers that goes through its AttentionInterface.
        config: what a query reads, default ``RetrievalConfig()``.

    Raises:
        TypeError: the model cannot be served; names the class and the reason.
        RuntimeError: the model is wrapped already.
    """
    return Handle(model, config or RetrievalConfig())


class Handle:
    """A wrapped model: statistics, a switch to dense answers, and the way back."""

    def __init__(self, model: PreTrainedModel, config: RetrievalConfig) -> None:
        text_config = _check_model(model)
        self.model = model
        self.config = config
        layers = DynamicCache(config=model.config).layers
        self._session = Session(config, [RunningStats() for _ in layers])
        for stats, layer in zip(self._session.stats, layers, strict=True):
            if type(layer) is not DynamicLayer:
                stats.dense_reasons[f"left to transformers ({type(layer).__name__})"] = 0
        self._previous = text_config._attn_implementation
        self._section = next(
            (key for key in model.config.sub_configs if getattr(model.config, key) is text_config), None
        )
        register()
        self._active = True
        self._set_implementation(NAME)
        if text_config._attn_implementation != NAME:
            self.unwrap()
            raise TypeError(
                f"{type(model).__name__} cannot be wrapped: it does not use transformers' AttentionInterface"
            )
        self._hook = model.base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def unwrap(self) -> None:
        """Give the model back as it was. Calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        if hasattr(self, "_hook"):
            self._hook.remove()
        self._set_implementation(self._previous)
        unregister()

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

    def _set_implementation(self, name: str) -> None:
        # A plain string would reach vision towers too.
        self.model.set_attn_implementation(name if self._section is None else {self._section: name})

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if module.training:
            raise RuntimeError(
                f"{type(self.model).__name__} is in training mode; dbattn serves inference: call model.eval()"
            )
        cache = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache", getattr(module.config, "use_cache", False)):
            cache = kwargs["past_key_values"] = DynamicCache(config=self.model.config)
        if isinstance(cache, DynamicCache):
            self._session.adopt(cache)
        return args, kwargs


def _check_model(model: PreTrainedModel) -> Any:
    """The text config of a model that can be served; anything else raises and says why."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{name} cannot be wrapped: expected a transformers PreTrainedModel")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{name} cannot be wrapped: an encoder-decoder's cross-attention has no causal rows")
    text_config = model.config.get_text_config(decoder=True)
    if text_config._attn_implementation == NAME:
        raise RuntimeError(f"this {name} is wrapped already: call unwrap() on its handle first")
    if not model.base_model._can_set_attn_implementation():
        raise TypeError(f"{name} cannot be wrapped: it does not use transformers' AttentionInterface")
    layers = DynamicCache(config=model.config).layers
    if not any(type(layer) is DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise TypeError(
            f"{name} cannot be wrapped: no layer attends to all rows (its cache layers are {', '.join(kinds)})"
        )
    return text_config
