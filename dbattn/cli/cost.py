"""dbattn cost: what a model's call costs, by formula."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

from ..config import RetrievalConfig
from ..cost import ModelShape, model_cost
from ..files import check_output, write_json


def run_cost(
    *,
    model: Path | None,
    tokens: int,
    index: str,
    k: int | None,
    kv_heads: int | None,
    phase: str,
    batch: int,
    dtype: str | None,
    json_path: Path | TextIO | None,
    quiet: bool,
) -> None:
    """Print FLOPs, bytes, memory and crossovers of a decode step or a prompt; nothing is run.

    Raises:
        FileNotFoundError, ValueError: a model that is not there, or a field or option out of range; names it.
    """
    check_output("--json", json_path)
    if index == "dense" and k is not None:
        raise ValueError(f"--k is {k}, expected none with --index dense, which reads all rows")
    # What the index costs is asked for, whether or not the planner would use it at this length.
    config = None if index == "dense" else RetrievalConfig(index=index, k=k, dense_below=0)
    shape = ModelShape.of(_config_of(model), dtype)
    if kv_heads is not None:
        shape = shape.with_kv_heads(kv_heads)
    # There are rates for the compiled kernels alone.
    threads = torch.get_num_threads() if find_spec("numba") else None
    cost = model_cost(shape, tokens, config=config, batch=batch, phase=phase, threads=threads)
    print(cost.table() if quiet else cost)
    write_json(json_path, cost.to_dict())


def _config_of(model: Path | None) -> Any:
    """What ModelShape.of reads: the path itself, or the folder of a GGUF file or the default model."""
    if model is not None and model.suffix != ".gguf":
        return model
    from ..hf.load import model_folder

    return model_folder(model)
