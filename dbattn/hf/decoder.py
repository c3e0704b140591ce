"""find_decoder: the part of a model that is served, or why it cannot be."""

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from index_kernels.ops import FLOATS

from .cache import SERVED
from .function import NAME


class UnsupportedModelError(TypeError):
    """A model that cannot be wrapped; the message names its class and the reason."""


def find_decoder(model: Any) -> Any:
    """The text decoder of a model that can be served; anything else raises and says why."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # of a PeftModel, whose adapters are inside it
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{name} cannot be wrapped: expected a transformers PreTrainedModel (if it holds one, wrap that)"
        )
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
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name} cannot be wrapped: transformers makes no cache from its configuration ({error})"
        ) from None
    if not any(type(layer) in SERVED for layer in layers):
        kinds = ", ".join(sorted({_kind(layer) for layer in layers}))
        raise UnsupportedModelError(
            f"{name} cannot be wrapped: no layer attends to all rows, so there is nothing to retrieve. "
            f"Its layers: {kinds}"
        )
    # Some heads call the innermost part past the base model: where it exists, it meets the cache.
    inner = [part for part in decoders if "past_key_values" in inspect.signature(part.forward).parameters]
    decoder = inner[-1] if inner else decoders[0].base_model
    by_itself = next((kind.__name__ for kind in {type(part) for part in decoder.modules()} if _attends(kind)), None)
    if by_itself is not None:
        raise UnsupportedModelError(
            f"{name} cannot be wrapped: its {by_itself} does not use transformers' AttentionInterface"
        )
    for kind in vars(sys.modules[type(decoder).__module__]).values():
        own = isinstance(kind, type) and issubclass(kind, DynamicCache) and kind.__module__ == type(decoder).__module__
        if own:
            raise UnsupportedModelError(f"{name} cannot be wrapped: it asks for a cache of its own, a {kind.__name__}")
    return decoder


def check_exact(model: Any, layers: Sequence[Any]) -> None:
    """Raise UnsupportedModelError for a model that cannot decode exactly, whose fresh cache has such layers."""
    name = type(model).__name__
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(f"{name} has no generate, whose answers exact=True is about")
    if (
        number := next((i for i, each in enumerate(layers) if isinstance(each, LinearAttentionLayer)), None)
    ) is not None:
        raise UnsupportedModelError(
            f"{name} cannot be exact: layer {number} ({type(layers[number]).__name__}) keeps a state that does not go "
            "back over drafted tokens that are rejected"
        )


def _attends(kind: type[nn.Module]) -> bool:
    """Whether a class reads a cache's rows without the AttentionInterface: the mask of dbattn would be taken wrongly.

    transformers' own check is by file, where a vision tower that uses the interface speaks for the text's attention.
    """
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return False
    return bool(re.search(r"past_key_values?\.update\(", source)) and "attention_interface" not in source.lower()


def _kind(layer: Any) -> str:
    """What a cache layer that is not served does instead, and its class."""
    kinds = []
    if isinstance(layer, LinearAttentionLayer):
        kinds.append("linear attention, which keeps a state in place of rows")
    if type(layer) is DynamicSlidingWindowLayer:
        kinds.append("a window or chunk of the newest rows")
    if isinstance(layer, DynamicIndexedLayer):
        kinds.append("a learnt indexer of the model's own, which chooses the rows already")
    return f"{' and '.join(kinds) or 'another cache'} ({type(layer).__name__})"
