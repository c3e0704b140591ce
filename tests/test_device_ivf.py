"""ivf where rows lie on a device, beside FAISS's lists: on the CPU as if on one, and on a GPU where there is one."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import real_rows
from test_device_steps import WAITS, Dispatched
from test_indexes import scores_of, stored

from dbattn import AttentionDB, RetrievalConfig, recall_at_k
from dbattn.index import make_index
from dbattn.index._cells import Cells
from dbattn.store import KVStore
from index_kernels import top_k


@pytest.fixture
def built(monkeypatch):
    """``built(where, keys, lo)``: an index over all whole blocks of the keys, its store and lo; "faiss": FAISS's."""

    def built(where, keys, lo=0, chunks=None, state=None, **options):
        monkeypatch.setattr("dbattn.index.ivf.on_device", lambda tensor: where != "faiss")
        keys = torch.cat([keys, keys[:, :, :1]], dim=2).to("cpu" if where == "faiss" else where)
        lo = torch.as_tensor(lo, device=keys.device).expand(len(keys)).clone()
        engine = make_index(RetrievalConfig(index="ivf", window=1, **options))
        if state is not None:
            store = stored(keys)
            engine.load_state(store, lo, 0, keys.shape[2] - 1, state)
        else:
            store = KVStore(keys.shape[1], keys.shape[3], keys.shape[3])
            for part in keys.split(chunks or keys.shape[2], dim=2):
                store.append(part, part)
                engine.extend(store, lo)
        assert isinstance(engine._units[0][0], Cells) == (where != "faiss")
        return engine, store, lo

    return built


@contextmanager
def waiting_for_nothing(device):
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Dispatched() as step:
            yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not [name for name in step.names if name in WAITS]


def found(index, query, k, stop=None, lift=None):
    engine, store, lo = index
    return engine.search(query.to(store.device), store, k, lo, len(engine) if stop is None else stop, lift).ids.cpu()


def assert_alike(ids, others):
    """Products summed in another order may rank rows of about one score otherwise."""
    assert (ids == others).float().mean() > 0.99


@pytest.mark.parametrize("layer", [8, 22])
@pytest.mark.parametrize("nprobe", [16, 128, 10**6])
def test_as_many_lists_find_as_many_of_the_best_rows_as_in_faiss(device, built, layer, nprobe):
    query, keys, _ = real_rows(layer)
    best, exact = top_k(query, keys, 100, scale=1.0, start=torch.tensor([4]))
    recalls = []
    for where in ("faiss", device):
        ids = found(built(where, keys, 4, nprobe=nprobe), query, 100)
        scores = scores_of(query, keys, ids)
        assert not (scores.diff(dim=-1) > 1e-4).any()
        recalls.append(float(recall_at_k(scores, exact).mean()))
    print(f"layer {layer}, nprobe {nprobe}: recall@100 {recalls[0]:.3f} with FAISS, {recalls[1]:.3f} on {device}")
    assert recalls[1] >= recalls[0]
    if nprobe == 10**6:
        torch.testing.assert_close(scores, exact)
        assert_alike(ids, best)


def test_padded_batch_rows_answer_as_they_would_alone(device, built):
    keys, query, first = torch.randn(3, 2, 2560, 16), torch.randn(3, 4, 2, 16), (0, 300, 1600)
    index = built(device, keys, torch.tensor(first), nprobe=8)
    for stop in (2560, 1700, 200):
        together = found(index, query, 50, stop)
        for b, lo in enumerate(first):
            alone = found(built(device, keys[b : b + 1], lo, nprobe=8), query[b : b + 1], 50, stop)
            assert_alike(together[b : b + 1], alone)
            assert ((alone == -1) | ((alone >= lo) & (alone < stop))).all()
        # The last one has too few rows to train on: it is exact.
        best, _ = top_k(query[2:], keys[2:], 50, scale=1.0, start=torch.tensor(first[2:]), stop=torch.full((2,), stop))
        assert_alike(together[2:], best)


def test_rows_that_are_sampled_are_found_with_their_noise(device, built):
    keys, query = torch.randn(1, 2, 2048, 16), torch.randn(1, 4, 1, 16)
    exact, store, lo = built("faiss", keys, tail="sample", nprobe=10**6)
    index = built(device, keys, tail="sample", nprobe=10**6)
    for lift in (None, 4.0):
        best = exact.search(query, store, 64, lo, 2048, lift).ids
        assert_alike(found(index, query, 64, lift=lift), best)


@pytest.mark.parametrize("options", [{}, {"tail": "sample"}])
def test_a_snapshot_of_one_kind_opens_as_the_other(device, built, options):
    keys, query = torch.randn(2, 2, 2304, 16), torch.randn(2, 4, 1, 16)
    lo, options = torch.tensor([0, 500]), {"nprobe": 32, **options}
    by_kind = {where: built(where, keys, lo, **options) for where in ("faiss", device)}
    _, exact = top_k(query, keys, 50, scale=1.0, start=lo)
    for saved, index in by_kind.items():
        state = index[0].state(0, 2304)
        for where, own in by_kind.items():
            opened = built(where, keys, lo, state=dict(state), **options)
            again = opened[0].state(0, 2304)
            assert state.keys() == again.keys()
            assert all(np.array_equal(state[name], again[name]) for name in state)
            ids = found(opened, query, 50)
            if where == saved:
                assert torch.equal(ids, found(own, query, 50))
            assert recall_at_k(scores_of(query, keys, ids), exact).mean() > 0.5


def test_what_is_not_the_state_of_cells_is_refused(device, built):
    keys = torch.randn(1, 2, 2048, 16)
    state = built(device, keys)[0].state(0, 2048)
    for name, wrong, message in (
        ("0.1.nearest", np.full(2048, 10**6, np.int32), r"0: 1\.nearest has cells from 1000000"),
        ("0.1.sums", np.zeros((3, 16)), r"0: 1\.sums is float64 \[3, 16\]"),
        ("0.2.sums", np.zeros((3, 16)), r"2\.sums is not part of it"),
        ("1.0.sums", np.zeros((3, 16)), r"1\.0\.sums is not part of 1 batch rows and 2 KV heads"),
    ):
        with pytest.raises(ValueError, match=message):
            built(device, keys, state={**state, name: wrong})


def test_what_is_built_depends_on_the_rows_alone(device, built):
    keys, query = torch.randn(2, 2, 2560, 16), torch.randn(2, 4, 1, 16)
    lo = torch.tensor([0, 300])
    indexes = [built(device, keys, lo, chunks, nprobe=8) for chunks in (None, None, 300, 1500)]
    states = [engine.state(0, 2560) for engine, _, _ in indexes]
    ids = [found(index, query, 50) for index in indexes]
    for state, each in zip(states[1:], ids[1:], strict=True):
        assert all(np.array_equal(states[0][name], state[name]) for name in states[0])
        assert torch.equal(ids[0], each)


def test_copies_selections_and_cuts_leave_each_other_alone(device, built):
    keys, query = torch.randn(2, 2, 2560, 16), torch.randn(2, 4, 1, 16)
    engine, store, lo = built(device, keys[:, :, :2048], nprobe=8)
    before = found((engine, store, lo), query, 50)
    twin, twin_store = copy.deepcopy(engine), copy.deepcopy(store)
    assert twin.nbytes == engine.nbytes < keys[:, :, :2048].nbytes
    twin_store.truncate(2048)
    more = torch.cat([keys, keys[:, :, :1]], dim=2)[:, :, 2048:].to(device)
    twin_store.append(more, more)
    twin.extend(twin_store, lo)
    assert len(twin) == 2560
    assert torch.equal(found((engine, store, lo), query, 50), before)
    assert torch.equal(found((twin, twin_store, lo), query, 50), found(built(device, keys, nprobe=8), query, 50))
    beams = torch.tensor([1, 1, 0], device=device)
    engine.select(beams)
    store.select(beams)
    beams = beams.cpu()
    assert_alike(found((engine, store, lo[:1].expand(3)), query[beams], 50), before[beams])
    engine.truncate(store, 600, lo[:1].expand(3))
    assert len(engine) == engine.nbytes == 0


def test_a_search_waits_for_nothing(device, built):
    keys, query = torch.randn(2, 2, 2048, 16), torch.randn(2, 4, 1, 16, device=device)
    for options, lift in (({}, None), ({"tail": "sample"}, 4.0)):
        engine, store, lo = built(device, keys, torch.tensor([0, 1500]), **options)
        with waiting_for_nothing(device):
            engine.search(query, store, 50, lo, 1800, lift)


def test_what_queries_teach_is_learnt_on_a_device(device, monkeypatch):
    monkeypatch.setattr("dbattn.index.ivf.on_device", lambda tensor: True)
    keys, values, queries = (torch.randn(1, heads, 2400, 16).to(device) for heads in (2, 2, 4))
    keys[..., 0] *= 8
    config = RetrievalConfig(index="ivf", k=64, dense_below=0, window=8, n_sink=2, audit_rate=0.0, nprobe=32)
    built = []
    for chunks in (2400, (100, 900, 1000, 400)):
        db = AttentionDB(2, 16, config=config)
        for part in zip(*(rows.split(chunks, dim=2) for rows in (keys, values, queries)), strict=True):
            db.insert(*part)
        built.append(db)
    query = queries[:, :, -1:]
    answers = [db.attend(query) for db in built]
    assert torch.equal(answers[0], answers[1])
    assert built[0].index.describe()["learnt_from"] == "queries"
    _, best = top_k(query, keys[:, :, :2304], 64, scale=1.0)
    lo = torch.zeros(1, dtype=torch.int64, device=device)
    learnt = built[0].index.search(query, built[0].store, 64, lo + 2, 2304)
    with waiting_for_nothing(device):
        built[0].index.search(query, built[0].store, 64, lo + 2, 2304)
    assert recall_at_k(built[0].store.scores(query, learnt.ids, 1.0), best).mean() > 0.8
