"""ModelShape: the sizes of a decoder that its cost depends on, read from its config."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from index_kernels.integer import is_integer

DTYPES = ("float32", "float16", "bfloat16")
# Families whose MLP has no gate: two matrices, not three.
UNGATED = frozenset({"gpt_neox", "nemotron", "persimmon", "phi", "starcoder2"})
# Families whose config has a window and no layer_types: every layer slides. None: a config that names no family.
ALL_SLIDE = frozenset({"mistral", "phi3", "starcoder2", None})
# What this arithmetic does not describe, and how the config says so.
REFUSED = {
    "is_encoder_decoder": "a decoder without cross-attention",
    "kv_lora_rank": "keys and values of their own, no latent of them",
    "num_kv_shared_layers": "rows of its own in every layer",
    "num_local_experts": "one MLP a layer, no mixture",
    "num_experts": "one MLP a layer, no mixture",
    "n_routed_experts": "one MLP a layer, no mixture",
}
Matrices = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. Biases and norms are left out: vectors, under a thousandth of the weights.

    Attributes:
        hidden_size, intermediate_size, vocab_size: d, the width of the MLP, the tokens known.
        heads, kv_heads, head_dim: query heads, the KV heads they share, and the dimension of both.
        windows: per layer, how many newest rows a query sees, its own included; None: all of them.
        gated: the MLP has a gate beside up and down.
        tied: the output reads the embedding's matrix and has none of its own.
        dtype: of weights and rows.
    """

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    gated: bool
    tied: bool
    dtype: str

    @classmethod
    def of(cls, config: Any, dtype: str | None = None) -> Self:
        """Read a config.

        Args:
            config: a transformers config, the same as a dict, a path to a ``config.json`` or its folder, or a
                ModelShape. Without ``num_key_value_heads`` it is multi-head, without ``head_dim`` the heads share the
                hidden size.
            dtype: "float32", "float16" or "bfloat16"; default the config's, or float32.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a field that is missing, out of range, or of a model this does not describe; names the field.
        """
        if isinstance(config, cls):
            return config if dtype is None else replace(config, dtype=_dtype(dtype))
        read = _reader(config)
        for name, expected in REFUSED.items():
            if read(name):
                raise ValueError(f"{name} is {read(name)!r}, expected {expected}")
        heads, hidden = _integer(read, "num_attention_heads"), _integer(read, "hidden_size")
        if read("head_dim") is None and hidden % heads:
            raise ValueError(f"head_dim is missing, and hidden_size={hidden} is no multiple of {heads} heads")
        kind = read("model_type")
        tied = read("tie_word_embeddings")
        shape = cls(
            hidden_size=hidden,
            intermediate_size=_integer(read, "intermediate_size"),
            vocab_size=_integer(read, "vocab_size"),
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads if read("head_dim") is None else _integer(read, "head_dim"),
            windows=_windows(read, _integer(read, "num_hidden_layers")),
            gated=kind not in UNGATED,
            # Gemma's files say nothing where the matrix is shared, those of other families where it is not.
            tied=str(kind).startswith("gemma") if tied is None else bool(tied),
            dtype=_dtype(dtype or read("dtype") or read("torch_dtype") or "float32"),
        )
        return shape.with_kv_heads(heads if read("num_key_value_heads") is None else read("num_key_value_heads"))

    def with_kv_heads(self, kv_heads: int) -> Self:
        """The model with its KV heads pooled to so many, or split: all heads is multi-head, 1 is multi-query.

        Raises:
            ValueError: a number that does not divide the query heads.
        """
        if not is_integer(kv_heads, 1) or self.heads % kv_heads:
            raise ValueError(f"num_key_value_heads is {kv_heads!r}, expected a divisor of the {self.heads} query heads")
        return replace(self, kv_heads=kv_heads)

    @property
    def variant(self) -> str:
        """How query heads share rows."""
        return {self.heads: "multi-head", 1: "multi-query"}.get(self.kv_heads, "grouped-query")

    @property
    def element_size(self) -> int:
        """Bytes of one number."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    @property
    def projections(self) -> Matrices:
        """(inputs, outputs) of a layer's q, k, v and o matrices."""
        d, kv = self.hidden_size, self.kv_heads * self.head_dim
        return (d, self.heads * self.head_dim), (d, kv), (d, kv), (self.heads * self.head_dim, d)

    @property
    def mlp(self) -> Matrices:
        """(inputs, outputs) of a layer's up, down and, where there is one, gate."""
        up = self.hidden_size, self.intermediate_size
        return (*(2 if self.gated else 1) * (up,), up[::-1])

    @property
    def output(self) -> Matrices:
        """(inputs, outputs) of the matrix that makes logits."""
        return ((self.hidden_size, self.vocab_size),)

    @property
    def weights(self) -> int:
        """Numbers in all matrices."""
        layer = sum(inputs * outputs for inputs, outputs in self.projections + self.mlp)
        return len(self.windows) * layer + (1 if self.tied else 2) * self.vocab_size * self.hidden_size


def _reader(config: Any) -> Callable[[str], Any]:
    """``read(name)``: a field of the text model's config, None where it is absent."""
    if isinstance(config, str | os.PathLike):
        config = _load(Path(config))
    if isinstance(config, Mapping):
        return dict(config.get("text_config") or config).get
    if not callable(getattr(config, "get_text_config", None)):
        raise ValueError(f"config is a {type(config).__name__}, expected a transformers config, a dict or a path")
    text = config.get_text_config(decoder=True)
    return lambda name: getattr(text, name, None)


def _load(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a model folder or its config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a model's config: it holds a {type(config).__name__}, expected an object")
    return config


def _integer(read: Callable[[str], Any], name: str) -> int:
    value = read(name)
    if not is_integer(value, 1):
        raise ValueError(f"{name} is {'missing' if value is None else repr(value)}, expected a positive integer")
    return value


def _dtype(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return name


def _windows(read: Callable[[str], Any], layers: int) -> tuple[int | None, ...]:
    """Per layer its window, None for one that sees all rows; as transformers' DynamicCache takes the config."""
    kinds, slides = read("layer_types"), read("sliding_window") is not None and read("use_sliding_window") is not False
    if kinds is None:
        if slides and read("model_type") not in ALL_SLIDE:
            raise ValueError(
                f"layer_types is missing, expected one a layer: sliding_window is {read('sliding_window')!r}, "
                f"and which layers of a {read('model_type')} slide is not said"
            )
        kinds = layers * ["sliding_attention" if slides else "full_attention"]
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise ValueError(f"layer_types is {kinds!r}, expected a list of num_hidden_layers={layers} kinds")
    strange = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if strange:
        raise ValueError(f"layer_types has {', '.join(strange)}, expected full_attention or sliding_attention")
    return tuple(_integer(read, "sliding_window") if kind == "sliding_attention" else None for kind in kinds)
