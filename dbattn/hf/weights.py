"""A model's weights in int8: a token then reads a third of the bytes of float32."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from index_kernels import int8_linear, pack_weight

from ..config import WEIGHTS


def check_weights(weights: str) -> None:
    """Raise ValueError for a kind of weights that does not exist, ImportError where it needs what is not installed."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    if weights == "int8" and find_spec("numba") is None:
        raise ImportError(
            'weights="int8" needs numba, without which it is slower than float32: pip install "dbattn[cpu]"'
        )


class Int8Linear(nn.Module):
    """A linear layer with a packed weight (see ``index_kernels.int8_linear``); its bias stays as it is."""

    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", pack_weight(linear.weight))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        out = int8_linear(x, self.packed)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def to_int8(model: nn.Module) -> None:
    """Put an ``Int8Linear`` in place of every linear layer; a head keeps no part in embeddings that it was tied to.

    Raises:
        ValueError: a model whose layers are of other classes, such as GPT-2's.
    """
    found: list[tuple[Any, str, nn.Linear]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if all(child is head for _, _, child in found):
        raise ValueError(f'weights="int8": {type(model).__name__} has no torch.nn.Linear in its layers; use "float32"')
    for parent, name, child in found:
        setattr(parent, name, Int8Linear(child))


class Int8Meanwhile:
    """Packed copies of a model's linear layers, which answer in their place while ``active()`` says so."""

    def __init__(self, model: nn.Module, active: Callable[[], bool]) -> None:
        # Not those with a forward of their own, as accelerate's hooks give them.
        layers = [one for one in model.modules() if type(one) is nn.Linear and "forward" not in vars(one)]
        self._packed, self._active = [(layer, pack_weight(layer.weight)) for layer in layers], active

    def begin(self) -> None:
        """Let them answer; on the objects: their class, parameters and hooks are what they were."""
        for layer, packed in self._packed:
            layer.forward = partial(_int8_meanwhile, layer, packed, self._active)  # type: ignore[method-assign]

    def undo(self) -> None:
        """Give the layers back."""
        for layer, _ in self._packed:
            vars(layer).pop("forward", None)


def _int8_meanwhile(layer: nn.Linear, packed: Tensor, active: Callable[[], bool], x: Tensor) -> Tensor:
    if not active():
        return linear(x, layer.weight, layer.bias)
    out = int8_linear(x, packed)
    return out if layer.bias is None else out + layer.bias
