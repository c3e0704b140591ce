"""LayerState: what a layer of a model holds in place of rows of a database, or beside them."""

from dataclasses import dataclass

from torch import Tensor

from .manifest import Number, StateInfo


@dataclass(frozen=True)
class LayerState:
    """What a layer holds that is no database: the newest rows of a window, a state of linear attention.

    Attributes:
        layer: its number in the model.
        kind: its class, by name.
        numbers: its counts and flags, by name.
        tensors: likewise, floats of any shape.
    """

    layer: int
    kind: str
    numbers: dict[str, Number]
    tensors: dict[str, Tensor]

    @property
    def info(self) -> StateInfo:
        """What the manifest says of it."""
        described = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        }
        return StateInfo(self.layer, self.kind, self.numbers, described)
