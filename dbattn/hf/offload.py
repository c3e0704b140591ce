"""Weights that accelerate keeps elsewhere: reading one, and where the model computes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from index_kernels.integer import is_integer


def weight_of(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A parameter or buffer of a model's state dict; where that has a placeholder, what its module would load.

    Raises:
        ValueError: a placeholder (a tensor on the meta device) that nothing known fills; names the weight.
    """
    if weight.device.type != "meta":
        return weight
    parts = name.split(".")
    # The hook that fills it is its module's own, or that of a module around it.
    for at in reversed(range(len(parts))):
        for hook in _hooks(model.get_submodule(".".join(parts[:at]))):
            kept = getattr(hook, "weights_map", None)
            try:
                found: Any = None if kept is None else kept[".".join(parts[at:])]
            except KeyError:
                continue
            if isinstance(found, Tensor):
                return found
    raise ValueError(
        f"the weight {name} of this {type(model).__name__} is a placeholder (device meta), and no hook of accelerate "
        "says where it is kept: load the model's weights first"
    )


def device_of(model: nn.Module) -> torch.device:
    """The device that a model, or a part of one, computes on: that of its first weight."""
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != "meta":
        return weight.device
    found = (hook.execution_device for part in model.modules() for hook in _hooks(part) if hook.offload)
    return torch.device(next((device for device in found if device is not None), "cpu"))


def layer_devices(decoder: nn.Module, layers: int) -> list[torch.device]:
    """The device that each of a decoder's layers makes its rows on: that of its attention."""
    devices = [device_of(decoder)] * layers
    for part in decoder.modules():
        number = getattr(part, "layer_idx", None)
        if is_integer(number, 0, layers - 1) and any(True for _ in part.parameters()):
            devices[number] = device_of(part)
    return devices


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate that place a module's weights."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if hasattr(each, "offload"):
            yield each
