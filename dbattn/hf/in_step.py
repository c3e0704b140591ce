"""What keeps the ranks of a group in step: the same model, the same calls, the same random numbers."""

from typing import Any

import torch.distributed as dist
from torch import nn

from ..shards import Shards


class InStep:
    """A model's ``generate`` that begins with rank 0's random numbers on every rank.

    Logits are equal on all ranks, since each merges the same states in the same order: so are the tokens drawn by them.
    """

    def __init__(self, model: Any, shards: Shards) -> None:
        # An object, not a closure: see ExactGenerate.
        self._model, self._shards = model, shards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        self._shards.share_random_state()
        return type(self._model).generate(self._model, *args, **kwargs)


def check_shards(shards: Shards, model: nn.Module, *, exact: bool) -> None:
    """Refuse what does not go with shards.

    Raises:
        ValueError: says what.
    """
    if exact:
        raise ValueError("exact=True does not go with group: drafts are not checked over several ranks")
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "tp_size", None) or 1) == 1:
        return
    split = set(mesh.mesh.flatten().tolist()) & set(dist.get_process_group_ranks(shards.group))
    if len(split) > 1:
        raise ValueError(
            f"the heads of {type(model).__name__} are split over ranks {sorted(split)}, which group holds as well: "
            "pass a group of ranks that have the same heads"
        )
