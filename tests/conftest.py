import io
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

# Both torch and FAISS bring a thread pool; with several pytest workers on few cores, one thread each is fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only

CAPTURE = Path(__file__).parent / "data" / "smollm2_4k.safetensors"

settings.register_profile("dbattn", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dbattn")


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# Of an operator's backends those that are compared with the reference, and of these Triton's.
BACKENDS = [
    "numba",
    pytest.param("triton-interpreter", marks=NO_TRITON),
    pytest.param("triton-cuda", marks=(NO_TRITON, NO_GPU)),
]
TRITON = BACKENDS[1:]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    """Where rows are: on the CPU, and on a GPU where there is one."""
    return request.param


def _called(op, args, kwargs, settings):
    import index_kernels

    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(name, value)
        return getattr(index_kernels, op)(*args, **kwargs)


def _interpreted(payload):
    return _called(*torch.load(io.BytesIO(payload), weights_only=False))


@pytest.fixture(scope="session")
def interpreter():
    """A process with Triton's interpreter: triton reads TRITON_INTERPRET once, when first imported."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(int).result()
        patch.undo()
        yield pool


@pytest.fixture
def run(request):
    """``run(backend, op, ...)`` calls an operator on one of BACKENDS, under ``settings`` (what is patched, by name)."""

    def run(backend, op, *args, settings=None, **kwargs):
        kind, _, where = backend.partition("-")
        call = op, args, {**kwargs, "backend": kind}, settings or {}
        if where == "interpreter":
            buffer = io.BytesIO()
            torch.save(call, buffer)
            return request.getfixturevalue("interpreter").submit(_interpreted, buffer.getvalue()).result()
        if where == "cuda":
            found = _called(*tree_map_only(torch.Tensor, lambda rows: rows.cuda(), call))
            return tree_map_only(torch.Tensor, lambda rows: rows.cpu(), found)
        return _called(*call)

    return run


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    """The planner's choices must not depend on how busy the machine is."""
    from dbattn.query.rates import SCAN

    def built_in(engine, threads):
        return SCAN if engine is None else engine.built_in

    monkeypatch.setattr("dbattn.query.choose.rates", built_in)
    monkeypatch.setattr("dbattn.query.prompt.rates", built_in)


def rows_as_if_on_a_device(patch, gpu=None):
    """Let stores and planner take rows for those of a device whose rates are known by the name ``gpu``."""
    patch.setattr("dbattn.query.planner.gpu_of", lambda store: gpu)
    for name in ("dbattn.store.storage", "dbattn.store.rows", "dbattn.indexed", "dbattn.query.call"):
        patch.setattr(f"{name}.on_device", lambda tensor: True)
    patch.setattr("dbattn.query.planner.resolve_backend", lambda tensor: "triton")


def stand_in_for_host_rows(patch):
    """Let any memory be the host's that a GPU reads."""
    patch.setattr("dbattn.store.rows.check_host_rows", lambda device=None: None)
    patch.setattr("dbattn.store.mapped.host_buffer", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))


def real_rows(layer):
    """query ``[1, 3, 16, 64]``, keys and values ``[1, 1, 3840, 64]`` of layer 8 or 22 of SmolLM2-135M over prose."""
    import dbattn

    if layer == 8:
        *rows, query = dbattn.sample_rows()
        return (query, *(torch.cat([x[:, :, :8], x[:, :, -3832:]], dim=2) for x in rows))
    data = load_file(CAPTURE)
    return tuple(data[f"{layer}.{name}"].float() for name in ("query", "key", "value"))


def random_rows(n, batch=1, kv_heads=2, dim=16, value_dim=None, dtype=torch.float32):
    """Keys ``[batch, kv_heads, n, dim]`` and values likewise, of ``value_dim`` numbers (default dim)."""
    return tuple(torch.randn(batch, kv_heads, n, numbers, dtype=dtype) for numbers in (dim, value_dim or dim))


def database(keys, values, start=None, **options):
    """A database of these rows that retrieves however few they are, and audits only when asked to."""
    import dbattn

    config = dbattn.RetrievalConfig(**{"dense_below": 0, "audit_rate": 0.0, **options})
    db = dbattn.AttentionDB(keys.shape[1], keys.shape[3], value_dim=values.shape[3], config=config)
    db.insert(keys, values, start=start)
    return db


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 1,000 words, trained on the default haystack."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from dbattn.text.haystack import read_haystack

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        [read_haystack()], trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>", "<eos>"])
    )
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny_llama(**changes):
    """A llama of random weights for that tokenizer."""
    import transformers

    torch.manual_seed(0)
    usual = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    config = transformers.LlamaConfig(**usual | changes)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny model and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer.save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder
