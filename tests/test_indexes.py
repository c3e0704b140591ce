"""The contract of KeyIndex, for every member, and what is particular to each."""

import sys

import pytest
import torch
from conftest import real_rows

from dbattn import AttentionDB, RetrievalConfig, recall_at_k
from dbattn.config import INDEX_TRAITS
from dbattn.index import index_class, make_index
from dbattn.store import KVStore
from index_kernels import top_k

INDEXES = sorted(INDEX_TRAITS)


def stored(keys):
    store = KVStore(keys.shape[1], keys.shape[3], keys.shape[3])
    # A copy: an index may move rows of its store.
    store.append(keys, keys)
    return store


def built(index, keys, lo=0, **options):
    """An index over all whole blocks of the keys, and its store."""
    engine = make_index(RetrievalConfig(index=index, window=1, **options))
    store = stored(torch.cat([keys, keys[:, :, :1]], dim=2))
    engine.extend(store, torch.full((keys.shape[0],), lo))
    return engine, store


def scores_of(query, keys, ids):
    batch, heads, m, dim = query.shape
    logits = (query.reshape(batch, keys.shape[1], -1, dim) @ keys.transpose(2, 3)).view(batch, heads, m, -1)
    return logits.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf"))


@pytest.mark.parametrize("index", INDEXES)
def test_contract(index):
    keys = torch.randn(2, 3, 1500, 16)
    query = 2 * torch.randn(2, 6, 2, 16)
    lo = torch.tensor([0, 100])
    config = RetrievalConfig(index=index)
    engine = make_index(config)
    assert len(engine) == engine.nbytes == 0
    store = stored(keys)
    engine.extend(store, lo)
    assert 1024 <= len(engine) <= 1500
    assert engine.describe()["index"] == engine.name == index
    assert engine.nbytes == pytest.approx(2 * 3 * engine.bytes_for(config, len(engine), 16), rel=0.1)
    assert (engine.nbytes > 0) == (index != "flat")

    stop = len(engine)
    found = engine.search(query, store, 50, lo, stop)
    assert found.ids.shape == (2, 6, 2, 50)
    assert found.ids.dtype == torch.int64
    assert found.bytes_read > 0
    at = engine.positions(found.ids)
    assert (at < stop).all()
    for b, first in enumerate(lo.tolist()):
        assert (at[b][at[b] >= 0] >= first).all()
    torch.testing.assert_close(store.scores(query, found.ids, 1.0), scores_of(query, keys, at))
    _, exact = top_k(query, keys[:, :, :stop], 50, scale=1.0, start=lo)
    assert recall_at_k(scores_of(query, keys, at), exact).mean() > (0.999 if index == "flat" else 0.8)
    for row in at.view(-1, 50).tolist():
        real = [i for i in row if i >= 0]
        assert len(set(real)) == len(real)

    batch = torch.tensor([1, 1, 0])
    engine.select(batch)
    store.select(batch)
    assert torch.equal(engine.search(query[batch], store, 50, lo[batch], stop).ids, found.ids[batch])

    engine.truncate(store, 600, lo[batch])
    store.truncate(600)
    assert len(engine) <= 600
    slots = torch.arange(600).expand(3, 6, 1, -1)
    in_order = scores_of(query[batch, :, :1], keys[batch][:, :, :600], engine.positions(slots))
    torch.testing.assert_close(store.scores(query[batch, :, :1], slots, 1.0), in_order)
    engine.extend(store, lo[batch])
    assert len(engine) <= 600


@pytest.mark.parametrize("index", INDEXES)
def test_fewer_rows_than_asked_give_missing_ids(index):
    engine, store = built(index, torch.randn(1, 1, 1100, 8))
    query, stop = torch.randn(1, 1, 1, 8), 30
    ids = engine.search(query, store, 40, torch.tensor([0]), stop).ids
    assert ids.shape[-1] == 40
    assert (ids >= 0).sum() <= stop
    assert engine.positions(ids).max() < stop


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("layer", [8, 22])
def test_recall_on_real_keys(index, layer):
    """Keys and queries of SmolLM2-135M over 3840 tokens of prose, one KV head a layer: recall@100 at the defaults."""
    query, keys, _ = real_rows(layer)
    engine, store = built(index, keys, lo=4)
    stop = min(len(engine), keys.shape[2])
    found = engine.positions(engine.search(query, store, 100, torch.tensor([4]), stop).ids)
    _, exact = top_k(query, keys[:, :, :stop], 100, scale=1.0, start=torch.tensor([4]))
    recall = float(recall_at_k(scores_of(query, keys, found), exact).mean())
    print(f"{index}, layer {layer}: recall@100 {recall:.3f} of {stop} rows")
    assert recall == 1.0 if index == "flat" else recall >= 0.90


def test_ivf_is_exact_until_it_trains_and_trains_again_as_rows_double():
    db = AttentionDB(1, 8, config=RetrievalConfig(index="ivf", k=16, dense_below=0, window=8))
    seen = []
    for _ in range(20):
        db.insert(torch.randn(1, 1, 256, 8), torch.randn(1, 1, 256, 8))
        seen.append(db.index.describe().get("trained on rows", 0))
        plan = db.explain(torch.randn(1, 1, 1, 8))
        assert plan.is_dense == (len(db) < 1024 + 256)
    assert seen[:4] == [0, 0, 0, 0]
    assert sorted(set(seen)) == [0, 1020, 1024, 2048, 4096]
    assert db.index.describe()["lists"] == round(8 * 4096**0.5)


@pytest.mark.parametrize("growth", [1.02, 3.0, 100.0])
def test_hnsw_stays_right_when_later_keys_are_longer_than_m(growth):
    early, late = torch.randn(1, 1, 1024, 16), growth * torch.randn(1, 1, 512, 16)
    keys = torch.cat([early, late, early + 0.1], dim=2)
    engine, store = built("hnsw", keys)
    assert (engine.describe()["graphs"] > 1) == (growth > 2)
    query = torch.randn(1, 8, 4, 16)
    found = engine.search(query, store, 50, torch.tensor([0]), len(engine)).ids
    _, exact = top_k(query, keys[:, :, : len(engine)], 50, scale=1.0)
    assert recall_at_k(scores_of(query, keys, found), exact).mean() > 0.98


@pytest.mark.parametrize("place", [3, 500, 3000])
@pytest.mark.parametrize("length", [1e2, 1e4])
def test_one_very_long_key_does_not_spoil_the_graph_of_the_others(place, length):
    keys = torch.randn(1, 1, 3584, 16)
    keys[0, 0, place] *= length
    engine, store = built("hnsw", keys)
    query = torch.randn(1, 8, 4, 16)
    found = engine.search(query, store, 50, torch.tensor([0]), len(engine)).ids
    _, exact = top_k(query, keys[:, :, : len(engine)], 50, scale=1.0)
    assert recall_at_k(scores_of(query, keys, found), exact, epsilon=0.0).mean() > 0.9


def test_hnsw_builds_the_same_graph_every_time():
    keys = torch.randn(1, 2, 2048, 16)
    query = torch.randn(1, 4, 8, 16)
    results = []
    for _ in range(3):
        engine, store = built("hnsw", keys, ef_search=16)
        results.append(engine.search(query, store, 50, torch.tensor([0]), 2048).ids)
    assert all(torch.equal(results[0], other) for other in results)


def test_more_effort_finds_more():
    keys = torch.randn(1, 1, 4096, 32)
    query = torch.randn(1, 4, 8, 32)
    _, exact = top_k(query, keys, 50, scale=1.0)
    for index, option, efforts in (("ivf", "nprobe", (4, 64, 10**6)), ("hnsw", "ef_search", (16, 128, 2048))):
        recalls, scored = [], []
        for effort in efforts:
            engine, store = built(index, keys, **{option: effort})
            found = engine.search(query, store, 50, torch.tensor([0]), 4096)
            recalls.append(float(recall_at_k(scores_of(query, keys, found.ids), exact).mean()))
            scored.append(found.bytes_read)
        assert recalls == sorted(recalls)
        assert scored == sorted(scored)
        assert recalls[-1] > 0.99


def test_flat_holds_nothing_and_faiss_counts_its_rows():
    keys = torch.randn(1, 2, 2048, 16)
    assert built("flat", keys)[0].nbytes == 0
    for index in ("ivf", "hnsw"):
        assert built(index, keys)[0].nbytes > keys.numel() * 4
    assert type(make_index(RetrievalConfig())) is index_class("segmented")
    engines = {type(make_index(RetrievalConfig(index=name))) for name in INDEXES}
    assert {engine.__name__ for engine in engines} == {"FlatIndex", "IvfIndex", "HnswIndex", "SegmentedIndex"}


def test_segmented_costs_under_a_fifth_of_the_rows():
    keys = torch.randn(1, 2, 8192, 64)
    engine, _ = built("segmented", keys)
    rows = 2 * keys.numel() * keys.element_size()
    assert 0.03 * rows < engine.nbytes < 0.2 * rows


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_indexes_leave_torchs_thread_count_alone(index):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        keys = torch.randn(1, 2, 1024, 8)
        engine, store = built(index, keys)
        engine.search(torch.randn(1, 2, 1, 8), store, 4, torch.tensor([0]), 1024)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_missing_faiss_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"dbattn\[cpu\]"):
        make_index(RetrievalConfig(index="ivf"))
    assert len(make_index(RetrievalConfig(index="flat"))) == 0
