"""How retrieval error travels: what a layer's attention got wrong, and what of it the residual stream carries on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics import relative_error


@contextmanager
def residual_stream(decoder: nn.Module, layers: int) -> Iterator[list[Tensor]]:
    """The list that each forward pass inside the block fills anew: the hidden state ``[B, m, width]`` after each layer.

    Raises:
        ValueError: the decoder keeps its layers in no ``nn.ModuleList`` of that length.
    """
    blocks = next((part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == layers), None)
    if blocks is None:
        raise ValueError(f"{type(decoder).__name__} has no list of {layers} layers whose outputs could be followed")
    states: list[Tensor] = [torch.empty(0)] * layers

    def keep(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[number] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def stream_errors(retrieved: list[Tensor], dense: list[Tensor]) -> list[float]:
    """Relative error of the newest position's residual stream after each layer, mean over the batch."""
    pairs = zip(retrieved, dense, strict=True)
    return [float(relative_error(ours[:, -1].float(), theirs[:, -1].float()).mean()) for ours, theirs in pairs]
