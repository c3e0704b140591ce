"""Adapters (LoRA and its kin, of peft): which of them take part in what a model computes now."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

# One text for each layer that an adapter works in, in the order of the modules; empty where none does.
Adapters = tuple[str, ...]
NONE = "no adapter"


def active_adapters(model: nn.Module) -> Adapters:
    """Which adapters act where, and how strongly; a disabled one acts nowhere. Cheap enough to ask at every call."""
    if "peft" not in sys.modules:
        return ()
    texts = tuple(_acting(module) for _, module in adapted_modules(model))
    return texts if any(texts) else ()


def in_words(adapters: Adapters) -> str:
    """For messages: each different text once."""
    found = dict.fromkeys(text for text in adapters if text)
    shown = [*list(found)[:3], *(["..."] if len(found) > 3 else [])]
    return f"adapter {'; '.join(shown)}" if found else NONE


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that peft put in place of others, by name: its BaseTunerLayer and AuxiliaryTrainingWrapper."""
    for name, module in model.named_modules():
        if hasattr(module, "_disable_adapters") and hasattr(module, "adapter_layer_names"):
            yield name, module


def applied(module: Any) -> tuple[str, ...]:
    """Names of the adapters that such a module adds to its base; merged ones are in the base's weights already."""
    if module.disable_adapters or module.merged_adapters:
        return ()
    known = {adapter for _, each in containers(module) for adapter in each}
    return tuple(adapter for adapter in module.active_adapters if adapter in known)


def containers(module: Any) -> Iterator[tuple[str, Any]]:
    """What such a module keeps by the name of an adapter, weights in the main."""
    for path in (*module.adapter_layer_names, *getattr(module, "other_param_names", ())):
        found: Any = module
        for part in path.split("."):
            found = getattr(found, part, None)
        if hasattr(found, "keys"):
            yield path, found


def details(module: Any) -> dict[str, dict[str, Any]]:
    """Plain settings of the adapters that a module applies, such as their rank and scaling."""
    settings: dict[str, dict[str, Any]] = {adapter: {} for adapter in applied(module)}
    for name, value in vars(module).items():
        if isinstance(value, dict) and name[0] != "_":
            for adapter in settings.keys() & value.keys():
                if isinstance(value[adapter], bool | int | float | str):
                    settings[adapter][name] = value[adapter]
    return settings


def _acting(module: Any) -> str:
    if module.merged_adapters and not module.disable_adapters:
        return ", ".join(f"{adapter!r} (merged)" for adapter in module.merged_adapters)
    scaling = getattr(module, "scaling", {})
    strengths = {adapter: scaling.get(adapter) if isinstance(scaling, dict) else None for adapter in applied(module)}
    return ", ".join(
        repr(adapter) + ("" if strength is None else f" (scaling {strength:g})")
        for adapter, strength in strengths.items()
    )
