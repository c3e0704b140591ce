"""fingerprint: whose rows a snapshot holds, from a decoder's class, settings and weights."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..snapshot import ModelInfo

# Settings that no row depends on, and that differ between two ways to load the same model.
UNRELATED = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# Elements read of each weight, evenly spread: another training run, a merge or a quantisation changes some of them.
SAMPLES = 1024


@torch.no_grad()
def fingerprint(decoder: nn.Module) -> ModelInfo:
    """What determines the rows a decoder writes: its class, its settings, and samples of every weight.

    The same in every process and on every device. Takes milliseconds to a second, whatever the model's size.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(decoder.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return ModelInfo(type(decoder).__name__, _settings(decoder), digest.hexdigest())


def difference(saved: ModelInfo, own: ModelInfo) -> str | None:
    """What two fingerprints differ in, first and foremost; None where they are the same."""
    if saved.name != own.name:
        return f"it is of a {saved.name}, this is a {own.name}"
    for name in sorted(saved.settings.keys() | own.settings.keys()):
        if saved.settings.get(name) != own.settings.get(name):
            return f"it was saved with {name}={saved.settings.get(name)!r}, this one has {own.settings.get(name)!r}"
    return None if saved.weights == own.weights else "its weights are others"


def _settings(decoder: nn.Module) -> dict[str, Any]:
    config: Any = decoder.config
    known = {name: value for name, value in config.to_dict().items() if name not in UNRELATED and name[0] != "_"}
    # As JSON has them, so that they compare equal to those read from a file.
    plain: dict[str, Any] = json.loads(json.dumps(known, default=str, sort_keys=True))
    return plain
