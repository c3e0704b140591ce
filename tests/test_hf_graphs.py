"""wrap(graphs=True): passes over one token, captured and replayed.

On a GPU; elsewhere by a graph of torch's operations, which holds what a pass did and to which tensors, and refuses one
that waits for a number: what a replay gives shows whether anything of a step was left on the host.
"""

import re
from contextlib import ExitStack
from functools import partial
from importlib import import_module

import pytest
import torch
from conftest import TRITON, rows_as_if_on_a_device, stand_in_for_host_rows, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from test_device_steps import WAITS

# Rows are sealed after five tokens.
PROMPT, TOKENS = 315, 14


def place(tensor):
    return tensor.untyped_storage().data_ptr()


class Operations(TorchDispatchMode):
    """Records operations, to be done again to the same tensors."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in WAITS:
            raise RuntimeError(f"{name}: the host waits while a graph is captured")
        made = func(*args, **kwargs)
        given = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        new = isinstance(made, torch.Tensor) and place(made) not in set(map(place, given))
        assert isinstance(made, torch.Tensor) or not isinstance(made, tuple | list) or name.startswith("split"), name

        def again():
            if new and name != "empty":
                made.copy_(func(*args, **kwargs))
            elif func._schema.is_mutable:
                func(*args, **kwargs)

        self.done.append((again, made))
        return made


class Kernel:
    """Stands in for a kernel, and records that it was launched."""

    def __init__(self, kernel, operations):
        self.kernel, self.operations = kernel, operations

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)
            self.operations.done.append((lambda: self.kernel[grid](*args, **kwargs), None))

        return launch


def record(run, pool):
    """As cuda_graph: what ``run`` returns, and what does it again; like a graph's, its rows are not yet there."""
    operations, patch = Operations(), pytest.MonkeyPatch()
    kernels = import_module("index_kernels._triton_segmented")
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        patch.setattr(kernels, name, Kernel(getattr(kernels, name), operations))
    with ExitStack() as stack:
        stack.callback(patch.undo)
        stack.enter_context(operations)
        made = run()
    # What ran while it was recorded is undone where it would count twice: a graph has run nothing yet.
    done = [again for again, _ in operations.done]
    once = iter([True])

    def replay():
        if next(once, False):
            return
        for again in done:
            again()

    return made, replay


def greedy(model, ids, tokens):
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.cat(made.logits)


def going_back(model, ids, tokens):
    """Plain calls on one cache, which is cropped back on the way, to rows of lists as well, and forked."""
    cache, logits = model.new_cache(), []
    model(ids, past_key_values=cache)
    for back in (0, 3, 130):
        if back:
            cache.crop(-back)
        for i in range(5):
            token = torch.full((len(ids), 1), 7 * i + back, device=ids.device)
            logits.append(model(token, past_key_values=cache).logits[:, -1])
    return torch.cat(logits)


def waiting(model, ids, tokens):
    """A model that waits for a number in each pass."""
    hook = model.model.layers[0].register_forward_hook(lambda _, __, output: output[0].sum().item() and None)
    try:
        return greedy(model, ids, tokens)
    finally:
        hook.remove()


def batch(model, ids, tokens):
    return greedy(model, torch.cat([ids, ids.flip(1)]), tokens)


def padded(model, ids, tokens):
    mask = torch.ones(2, PROMPT, dtype=torch.int64, device=ids.device)
    mask[1, :100] = 0
    made = model.generate(
        torch.cat([ids, ids]), attention_mask=mask, max_new_tokens=tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(made.logits)


WAYS = {way.__name__: way for way in (greedy, going_back, waiting, batch, padded)}


def decoded(graphs, device, way="greedy", prompt=PROMPT, tokens=TOKENS, layers=1, **options):
    """Logits of what a model generates, how its passes ran, its report, and what each layer counted."""
    from dbattn import RetrievalConfig
    from dbattn.hf import wrap
    from dbattn.hf.graphs import Graphs

    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            rows_as_if_on_a_device(patch)
            stand_in_for_host_rows(patch)
            patch.setattr("dbattn.store.rows._is_captured", lambda tensor: True)
            patch.setattr("index_kernels.segmented.resolve_backend", lambda query, backend: "triton")
            for few in ("SCORING", "READING", "CHOOSING"):  # programs, which the interpreter runs one after the other
                patch.setattr(f"index_kernels._triton_segmented.{few}", 0)
            wrapping = import_module("dbattn.hf.wrap")
            patch.setattr(wrapping, "check_host_rows", lambda device=None: None)
            patch.setattr(wrapping, "check_graphs", lambda *_, **__: None)
            patch.setattr(wrapping, "Graphs", partial(Graphs, record=record))
        model = tiny_llama(num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1).to(device)
        torch.manual_seed(1)
        ids = torch.randint(0, 1000, (1, prompt), device=device)
        config = RetrievalConfig(k=30, dense_below=0, **{"audit_rate": 0.0, **options})
        with torch.inference_mode(), wrap(model, config, graphs=graphs) as handle:
            model.new_cache = handle.new_cache
            logits = WAYS[way](model, ids, tokens)
            report = handle.report()
            counted = [(s.retrieving, round(s.rows_read, 3), s.bytes_read, s.audited) for s in handle.stats]
            samples = [layer.db.store.sample for layer in handle._session.newest.layers]
            counted += [sample.queries[:, :, : sample.present.sum()].double().sum().item() for sample in samples]
        return logits.cpu(), report.summary.graphs, str(report), counted


@pytest.fixture(params=TRITON)
def ask(request):
    """``decoded`` on a backend, plainly and by graphs: the latter's words on how passes ran, where both agree."""
    if request.param == "triton-interpreter":
        pool = request.getfixturevalue("interpreter")
        run = lambda *args, **options: pool.submit(decoded, *args, "cpu", **options).result()  # noqa: E731
    else:
        run = lambda *args, **options: decoded(*args, "cuda", **options)  # noqa: E731

    def ask(**options):
        logits, _, _, counted = run(False, **options)
        same_logits, how, report, same_counted = run(True, **options)
        torch.testing.assert_close(same_logits, logits, rtol=0, atol=1e-5)
        assert (same_logits.argmax(dim=-1) == logits.argmax(dim=-1)).all()
        if options.get("way") != "waiting":  # here, what is not captured in the end has run
            layers = len(counted) // 2
            assert same_counted[:layers] == counted[:layers]
            assert same_counted[layers:] == pytest.approx(counted[layers:])
        assert how in report
        return {words: int(count) for count, words in re.findall(r"(\d+) ([^,]*(?:, (?!\d)[^,]*)*)", how)}

    return ask


@pytest.mark.parametrize("options", [{"layers": 2}, {"rows": "host"}], ids=["rows", "host rows"])
def test_a_replayed_pass_is_the_pass(ask, options):
    how = ask(**options)
    assert how["captured"] == 2, "once more when rows were sealed"
    assert how["replayed"] >= TOKENS // 2 - 1
    assert sum(how.values()) == TOKENS - 1


def test_a_query_that_is_sampled_as_it_is_captured_is_sampled_once(ask):
    how = ask(prompt=351, tokens=5)
    assert (how["captured"], how["replayed"]) == (1, 2), "at row 352"


def test_a_batch_goes_by_graphs(ask):
    how = ask(way="batch", tokens=6)
    assert (how["captured"], how["replayed"]) == (1, 2)


def test_a_pass_that_is_audited_is_not_replayed(ask):
    how = ask(audit_rate=0.4, tokens=10)
    assert how["as ever, to be audited"] >= 3
    assert how["replayed"] >= 1


def test_a_cache_that_goes_back_goes_on_by_graphs(ask):
    how = ask(way="going_back")
    assert how["captured"] >= 2
    assert how["replayed"] >= 4


@pytest.mark.parametrize(
    ("way", "why"), [("waiting", "capturing failed: "), ("padded", "prompts of a batch are padded")]
)
def test_a_pass_that_does_not_fit_runs_as_ever_and_says_why(ask, way, why):
    how = ask(way=way, tokens=5)
    assert "replayed" not in how
    assert any(why in words for words in how)


def test_graphs_are_refused_where_there_can_be_none():
    from dbattn import RetrievalConfig
    from dbattn.hf import wrap
    from dbattn.hf.graphs import check_graphs

    with pytest.raises(ValueError, match=r"graphs=True captures CUDA graphs, and the model is on cpu: expected a CUDA"):
        wrap(tiny_llama(), graphs=True)
    for options, config, what in (
        ({"exact": True, "sharded": False}, RetrievalConfig(), "exact=True"),
        ({"exact": False, "sharded": True}, RetrievalConfig(), "group"),
        ({"exact": False, "sharded": False}, RetrievalConfig(max_error=0.1), "max_error"),
    ):
        with pytest.raises(ValueError, match=f"graphs=True does not go with {what}"):
            check_graphs(torch.device("cuda"), config, **options)
