"""What cache layers of transformers hold that is no database: the newest rows of a window, a state of linear attention.

``KEPT`` says, by class, what is taken; nothing else of a layer is looked at or set. A layer that is put back is a fresh
one of the model's own, given these tensors and numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from ..snapshot import LayerState
from ..snapshot.manifest import Number, StateInfo
from .cache import DatabaseLayer, HybridDatabaseLayer

WINDOW = ("keys", "values", "cumulative_length")
LINEAR = ("conv_states", "recurrent_states", "has_previous_state")
# By name, for versions of transformers differ in which there are.
KEPT: dict[str, tuple[str, ...]] = {
    "DynamicSlidingWindowLayer": WINDOW,
    "LinearAttentionLayer": LINEAR,
    "LinearAttentionAndFullAttentionLayer": LINEAR,
    "LinearAttentionAndSlidingWindowAttentionLayer": WINDOW + LINEAR,
}


def kind_of(layer: Any) -> str:
    """The name of a layer's class; that of transformers where ours has taken its place."""
    if isinstance(layer, DatabaseLayer):
        return "LinearAttentionAndFullAttentionLayer" if isinstance(layer, HybridDatabaseLayer) else "DynamicLayer"
    return type(layer).__name__


@dataclass(frozen=True)
class Mark:
    """Where a cache was: its rows, and what those of its layers held that cannot be cropped."""

    rows: int
    states: tuple[LayerState, ...]

    @classmethod
    def of(cls, cache: DynamicCache) -> Self:
        """Where a cache is now."""
        return cls(cache.get_seq_length(), tuple(_taken(number, layer) for number, layer in _keeping(cache)))

    def put_back(self, cache: DynamicCache) -> None:
        """Make a cache of the same kind, with these rows or more, what it was."""
        for layer in cache.layers:
            if isinstance(layer, DatabaseLayer):
                # The state beside its rows comes below.
                DatabaseLayer.crop(layer, min(0, self.rows - layer.get_seq_length()))
                layer.unfinished = 0
        held = {state.layer: state for state in self.states}
        for number, layer in _keeping(cache):
            if number in held:
                _give(layer, held[number])
            elif isinstance(layer, LinearAttentionLayer):
                LinearAttentionLayer.reset(layer)
            if number not in held and isinstance(layer, DynamicSlidingWindowLayer):
                DynamicSlidingWindowLayer.reset(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class ContextCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """A cache that can be cropped to where it was marked, whatever its layers hold; and elsewhere where they can.

    It is marked where it begins. What cannot be done is refused before any layer is changed.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._mark = Mark(0, ())

    def mark(self, mark: Mark | None = None) -> None:
        """Let ``crop`` go back to where the cache is now, or to a mark of as many rows."""
        self._mark = mark or Mark.of(self)

    def why_not(self, rows: int) -> str | None:
        """Why the cache cannot be cropped to so many rows; None where it can."""
        if rows in (self._mark.rows, length := self.get_seq_length()):
            return None
        for number, layer in _keeping(self):
            if (kept := _one_way(layer, length - rows)) is not None:
                return (
                    f"layer {number} ({kind_of(layer)}) keeps {kept}: a cache of {length} rows can be cropped to "
                    f"{self._mark.rows}, where it was marked, not to {rows}; take a new cache"
                )
        return None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` rows.

        Raises:
            ValueError: a positive count; or a layer that cannot go back so far, says why.
        """
        rows = max(0, self.get_seq_length() + tokens_to_remove)
        if tokens_to_remove < 0 and any(_keeping(self)):
            if (reason := self.why_not(rows)) is not None:
                raise ValueError(reason)
            if rows == self._mark.rows:
                self._mark.put_back(self)
                return
        if tokens_to_remove or all(getattr(layer, "record_past", False) for _, layer in _keeping(self)):
            super().crop(tokens_to_remove)
        if rows < self._mark.rows:
            self._mark = Mark(0, ())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._mark = Mark(0, ())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._mark = Mark(0, ())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        super().batch_repeat_interleave(repeats)
        self._mark = Mark(0, ())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows: their numbers, or a bool mask."""
        super().batch_select_indices(indices)
        self._mark = Mark(0, ())


def refuse_states(cache: DynamicCache, what: str) -> None:
    """Raise ValueError for a cache with layers that hold a state: with such layers a model ... ``what``."""
    if (found := next(_keeping(cache), None)) is not None:
        raise ValueError(f"layer {found[0]} ({kind_of(found[1])}) keeps more than rows: such a model {what}")


def check_states(states: Sequence[StateInfo], layers: Sequence[Any], rows: int, batch: int) -> None:
    """Raise ValueError for states that do not fit the fresh ``layers`` of a model's cache, at so many rows."""
    wanted = {number: layer for number, layer in enumerate(layers) if kind_of(layer) in KEPT}
    found = {state.layer: state for state in states}
    if found.keys() != wanted.keys():
        raise ValueError(f"it has states of the layers {list(found)}, this model of {list(wanted)}")
    for number, layer in wanted.items():
        try:
            _check(found[number], layer, rows, batch)
        except ValueError as error:
            raise ValueError(f"the state of layer {number} {error}") from None


def _check(state: StateInfo, layer: Any, rows: int, batch: int) -> None:
    kind = kind_of(layer)
    if state.kind != kind:
        raise ValueError(f"is of a {state.kind}, here it is a {kind}")
    names = dict(_entries(layer))
    if names.keys() != state.numbers.keys() | state.tensors.keys() or state.numbers.keys() & state.tensors.keys():
        raise ValueError(f"has {[*state.numbers, *state.tensors]}, expected {list(names)}")
    for name, value in state.numbers.items():
        begins = names[name]
        if type(value) is not type(begins) or (begins is None and name in WINDOW):
            raise ValueError(f"has {name}={value!r}, which is none")
    for name, (_, shape) in state.tensors.items():
        if names[name] is not None:
            raise ValueError(f"has a tensor {name}, expected a number")
        if len(shape) < 2 or shape[0] != batch:
            raise ValueError(f"has {name} of shape {list(shape)}, expected [{batch}, ...]")
    if "cumulative_length" not in names:
        return
    newest = min(rows, layer.sliding_window - 1) if layer.sliding_window > 1 else rows
    if state.numbers["cumulative_length"] != rows:
        raise ValueError(f"is of {state.numbers['cumulative_length']} rows, expected {rows}")
    for name in ("keys", "values"):
        _, shape = state.tensors[name]
        if len(shape) != 4 or shape[2] != newest:
            raise ValueError(f"has {name} of shape {list(shape)}, expected the newest {newest} rows")


def _keeping(cache: DynamicCache) -> Iterator[tuple[int, Any]]:
    """Layers that hold a state, with their numbers."""
    return ((number, layer) for number, layer in enumerate(cache.layers) if kind_of(layer) in KEPT)


def _entries(layer: Any) -> Iterator[tuple[str, Any]]:
    """What is kept of a layer, by name: ``keys``, ``conv_states.0``."""
    for name in KEPT[kind_of(layer)]:
        value = getattr(layer, name)
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", each) for key, each in value.items())
        else:
            yield name, value


def _taken(number: int, layer: Any) -> LayerState:
    numbers: dict[str, Number] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in _entries(layer):
        if not isinstance(value, Tensor):
            numbers[name] = value
            continue
        # While transformers records the past, more is there than the next token needs.
        if name in ("keys", "values"):
            tensors[name] = value[:, :, -layer.sliding_window + 1 :]
        elif name.startswith("conv_states"):
            width = layer.conv_kernel_size[int(name.partition(".")[2])]
            tensors[name] = F.pad(value[..., -width:], (max(0, width - value.shape[-1]), 0)).clone()
        else:
            # Written in place by the next token.
            tensors[name] = value.clone()
    return LayerState(number, kind_of(layer), numbers, tensors)


def _give(layer: Any, state: LayerState) -> None:
    """Make a layer hold a state, in tensors of its own."""
    for name, value in state.numbers.items():
        attribute, _, key = name.partition(".")
        if key:
            getattr(layer, attribute)[int(key)] = value
        else:
            setattr(layer, attribute, value)
    # Tensors made in inference mode could not be written outside it.
    with torch.inference_mode(False):
        if "keys" in state.tensors:
            layer.lazy_initialization(state.tensors["keys"], state.tensors["values"])
            layer.keys, layer.values = state.tensors["keys"].clone(), state.tensors["values"].clone()
        for name, tensor in state.tensors.items():
            attribute, _, key = name.partition(".")
            if attribute in ("conv_states", "recurrent_states"):
                layer.lazy_initialization(**{attribute: tensor}, state_idx=int(key))
                getattr(layer, attribute)[int(key)].copy_(tensor)


def _one_way(layer: Any, tokens: int) -> str | None:
    """What a layer keeps that does not let it go back so many tokens; None where it can."""
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.cumulative_length >= layer.sliding_window:
        held, needed = layer.keys.shape[-2], min(layer.cumulative_length, layer.sliding_window - 1 + tokens)
        if not layer.record_past or held < needed:
            return f"its newest {held} rows alone"
    if isinstance(layer, LinearAttentionLayer):
        if any(state is not None for state in layer.recurrent_states.values()):
            return "one state of all that was read"
        for key, state in layer.conv_states.items():
            if state is not None and (not layer.record_past or state.shape[-1] < layer.conv_kernel_size[key] + tokens):
                return f"its newest {layer.conv_kernel_size[key]} inputs alone"
    return None
