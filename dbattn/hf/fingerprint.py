"""fingerprint: whose rows a snapshot holds, from all that determines what a decoder computes."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..snapshot import ModelInfo
from .adapters import NONE, active_adapters, adapted_modules, applied, containers, details, in_words
from .offload import weight_of

# Settings that no row depends on, and that differ between two ways to load the same model.
UNRELATED = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# Attributes of modules of the same kind.
UNRELATED_ATTRIBUTES = UNRELATED | {"gradient_checkpointing", "hf_device_map", "loss_type", "training"}
# Elements read of each weight, evenly spread: another training run, a merge or a quantisation changes some of them.
SAMPLES = 1024
# Elements kept of a buffer that no checkpoint holds, such as the frequencies of rotary positions.
BUFFER_SAMPLES = 16
# Such buffers are computed where the model is: devices round differently.
TOLERANCE = 1e-5
# How the digest of a setting that differs between modules begins.
DIGEST = "sha256 "


@torch.no_grad()
def fingerprint(decoder: nn.Module) -> ModelInfo:
    """What determines the rows a decoder writes.

    Its class and settings, samples of every weight that takes part (quantised and offloaded ones too, one at a time),
    which adapters act where, plain attributes of its modules (scale of the logits, softcap, windows) and the buffers
    that no checkpoint holds. The same in every process and on every device; reading a text does not change it. Takes
    milliseconds to a second, whatever the model's size.

    Not seen: code changed at runtime (hooks, patched methods), tensors kept as plain attributes, and what surrounds
    the call, such as autocast.

    Raises:
        ValueError: a weight that is on the meta device and that no hook loads.
    """
    digest, tuners = hashlib.sha256(), dict(adapted_modules(decoder))
    idle = tuple(_idle(tuners))
    weights: dict[str, Any] = decoder.state_dict()
    names = {_base_name(name, tuners): name for name in weights if not f"{name}.".startswith(idle)}
    kinds = set()
    for shown, name in sorted(names.items()):
        for part, value in _parts(shown, weights[name]):
            weight = weight_of(decoder, name, value) if isinstance(value, Tensor) else value
            _add(digest, part, weight)
            # Zero points and counts of packed weights are wider.
            if isinstance(weight, Tensor) and (weight.is_floating_point() or weight.dtype.itemsize == 1):
                kinds.add(str(weight.dtype).removeprefix("torch."))
    adapters = in_words(active_adapters(decoder))
    state = {"adapters": adapters, "weights": " and ".join(sorted(kinds)), **_state(decoder, tuners, idle)}
    return ModelInfo(type(decoder).__name__, _settings(decoder), digest.hexdigest(), json.loads(json.dumps(state)))


def difference(saved: ModelInfo, own: ModelInfo) -> str | None:
    """What two fingerprints differ in, first and foremost; None where they are the same.

    What only one of them names is not compared: snapshots of before carry no state, and versions of transformers differ
    in the attributes that modules have.
    """
    if saved.name != own.name:
        return f"it is of a {saved.name}, this is a {own.name}"
    for name in sorted(saved.settings.keys() | own.settings.keys()):
        if saved.settings.get(name) != own.settings.get(name):
            return f"it was saved with {name}={saved.settings.get(name)!r}, this one has {own.settings.get(name)!r}"
    ours, theirs = own.state or {}, saved.state or {}
    active = ours.get("adapters", NONE)
    if theirs.get("adapters", active) != active:
        return f"it was saved with {theirs['adapters']} active, this one has {active}"
    if theirs.get("weights", kinds := ours.get("weights")) != kinds:
        return f"it was saved with weights in {theirs['weights']}, this one has {kinds}"
    if saved.weights != own.weights:
        if saved.state is None and active != NONE:
            return "it was saved before snapshots said which adapter was active, so that its own is not known"
        return "its weights are others"
    for name in sorted(ours.keys() & theirs.keys()):
        if not _alike(theirs[name], ours[name]):
            shown = [json.dumps(value) for value in (theirs[name], ours[name])]
            if max(map(len, shown)) > 60 or any(DIGEST in text for text in shown):
                return f"it was saved with other {name} than this one has"
            return f"it was saved with {name}={shown[0]}, this one has {shown[1]}"
    return None


def _idle(tuners: dict[str, Any]) -> Iterator[str]:
    """Where the weights of adapters lie that do not take part."""
    for name, module in tuners.items():
        acting = applied(module)
        for path, each in containers(module):
            yield from (f"{name}.{path}.{adapter}." for adapter in each if adapter not in acting)


def _base_name(name: str, tuners: dict[str, Any]) -> str:
    """The name a weight has without the modules that peft put around it."""
    if not tuners:
        return name
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and settings that an entry of a state dict consists of; packed and quantised ones have several."""
    if isinstance(value, Tensor) and value.is_quantized:
        yield f"{name}.int", value.int_repr()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{name}.scale", (value.q_scale(), value.q_zero_point())
        else:
            yield f"{name}.scale", value.q_per_channel_scales()
            yield f"{name}.zero_point", value.q_per_channel_zero_points()
    elif hasattr(value, "__tensor_flatten__"):
        # Subclasses of Tensor, such as torchao's: they say what they are made of.
        inner, _ = value.__tensor_flatten__()
        yield f"{name}.type", type(value).__name__
        for each in inner:
            yield from _parts(f"{name}.{each}", getattr(value, each))
    elif isinstance(value, list | tuple | dict):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _parts(f"{name}.{key}", each)
    else:
        yield name, value


def _add(digest: Any, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value if _is_plain(value) else type(value).__name__}".encode())
        return
    flat = value.detach().flatten()
    sample = flat[:: max(1, len(flat) // SAMPLES)].contiguous().cpu()
    digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())


def _state(decoder: nn.Module, tuners: dict[str, Any], idle: tuple[str, ...]) -> dict[str, Any]:
    """Attributes and buffers of the modules that take part, by class and name; what differs between modules, in short.

    And what adapters are set to, module by module.
    """
    found: dict[str, list[Any]] = defaultdict(list)
    acting = {_base_name(name, tuners): details(module) for name, module in tuners.items() if applied(module)}
    for name, module in decoder.named_modules():
        if name in tuners or f"{name}.".startswith(idle):
            continue
        kind = type(module).__name__
        moving = _follows_length(module)
        for key, value in vars(module).items():
            if key[0] != "_" and not moving(key) and key not in UNRELATED_ATTRIBUTES and _is_plain(value):
                found[f"{kind}.{key}"].append(_as_json(value))
        for key, buffer in module._buffers.items():
            if buffer is not None and key in module._non_persistent_buffers_set and not moving(key):
                path = f"{name}.{key}" if name else key
                found[f"{kind}.{key}"].append(_buffer(weight_of(decoder, path, buffer)))
    state = {key: each[0] if all(value == each[0] for value in each) else _short(each) for key, each in found.items()}
    return {**state, "adapters by module": _short(acting)}


def _follows_length(module: nn.Module) -> Any:
    """Which attributes of a module change with the text read: caches, and frequencies that grow with its length."""
    kinds = getattr(module, "rope_type", "")
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    growing = any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)

    def moving(name: str) -> bool:
        rope = name.endswith("inv_freq") and not name.endswith("original_inv_freq")
        return "cache" in name or (growing and (rope or name == "attention_scaling"))

    return moving


def _buffer(buffer: Tensor) -> list[Any]:
    flat = buffer.detach().flatten()
    step = max(1, -(-len(flat) // BUFFER_SAMPLES))
    return [str(buffer.dtype), list(buffer.shape), [_as_json(value) for value in flat[::step].cpu().tolist()]]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _as_json(value: Any) -> Any:
    """A plain value as JSON has it; nan and infinities as text, which JSON lacks."""
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in sorted(value.items())}
    finite = isinstance(value, bool | int | str | None) or (isinstance(value, float) and math.isfinite(value))
    return value if finite else str(value)


def _short(values: Any) -> str:
    """A digest of plain values."""
    return DIGEST + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE)
    return type(one) is type(other) and bool(one == other)


def _settings(decoder: nn.Module) -> dict[str, Any]:
    config: Any = decoder.config
    known = {name: value for name, value in config.to_dict().items() if name not in UNRELATED and name[0] != "_"}
    # As JSON has them, so that they compare equal to those read from a file.
    plain: dict[str, Any] = _as_json(json.loads(json.dumps(known, default=str, sort_keys=True)))
    return plain
