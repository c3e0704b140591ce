"""Rows of a real model that come with the package: something to try a database on."""

from importlib.resources import as_file, files

from safetensors.torch import load_file
from torch import Tensor


def sample_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of SmolLM2-135M-Instruct, layer 8, first KV head, over 12,280 tokens of English prose; float32.

    Returns:
        keys and values ``[1, 1, 12280, 64]`` as they enter the cache, and the queries of the 16 newest positions in the
        three query heads that share them, ``[1, 3, 16, 64]``.
    """
    with as_file(files("dbattn") / "data" / "smollm2_12k.safetensors") as path:
        rows = load_file(path)
    return rows["8.key"].float(), rows["8.value"].float(), rows["8.query"].float()
