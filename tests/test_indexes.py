"""The contract of KeyIndex, for every member, and what is particular to each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dbattn import AttentionDB, RetrievalConfig, recall_at_k
from dbattn.config import INDEX_OPTIONS
from dbattn.index import BLOCK, FlatIndex, HnswIndex, IvfIndex, make_index
from index_kernels import top_k

INDEXES = sorted(INDEX_OPTIONS)
CAPTURE = Path(__file__).parent / "data" / "smollm2_4k.safetensors"


def built(index, keys, lo=0, **options):
    engine = make_index(RetrievalConfig(index=index, **options))
    engine.extend(keys, torch.full((keys.shape[0],), lo))
    return engine


def scores_of(query, keys, ids):
    batch, heads, m, dim = query.shape
    logits = (query.reshape(batch, keys.shape[1], -1, dim) @ keys.transpose(2, 3)).view(batch, heads, m, -1)
    return logits.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf"))


@pytest.mark.parametrize("index", INDEXES)
def test_contract(index):
    keys = torch.randn(2, 3, 1500, 16)
    query = 2 * torch.randn(2, 6, 2, 16)
    lo = torch.tensor([0, 100])
    engine = make_index(RetrievalConfig(index=index))
    assert len(engine) == 0
    engine.extend(keys, lo)
    assert 1500 - BLOCK < len(engine) <= 1500
    assert engine.describe()["index"] == engine.name == index
    assert engine.nbytes >= 0

    stop = len(engine) - 200
    found = engine.search(query, keys, 50, lo, stop)
    assert found.ids.shape == (2, 6, 2, 50)
    assert found.ids.dtype == torch.int64
    assert found.bytes_read > 0
    valid = found.ids >= 0
    assert (found.ids < stop).all()
    assert (found.ids[0][valid[0]] >= 0).all()
    assert (found.ids[1][valid[1]] >= 100).all()
    _, exact = top_k(query, keys[:, :, :stop], 50, scale=1.0, start=lo)
    assert recall_at_k(scores_of(query, keys, found.ids), exact).mean() > (0.999 if index == "flat" else 0.8)
    for row in found.ids.view(-1, 50).tolist():
        real = [i for i in row if i >= 0]
        assert len(set(real)) == len(real)

    engine.select(torch.tensor([1, 1, 0]))
    again = engine.search(query[[1, 1, 0]], keys[[1, 1, 0]], 50, lo[[1, 1, 0]], stop).ids
    assert torch.equal(again, found.ids[[1, 1, 0]])

    engine.truncate(600)
    assert len(engine) <= 600
    engine.extend(keys[[1, 1, 0]][:, :, :700], lo[[1, 1, 0]])
    assert len(engine) <= 700


@pytest.mark.parametrize("index", INDEXES)
def test_fewer_rows_than_asked_give_missing_ids(index):
    keys = torch.randn(1, 1, 1100, 8)
    engine = built(index, keys, nprobe=10**6) if index == "ivf" else built(index, keys)
    stop = 30
    ids = engine.search(torch.randn(1, 1, 1, 8), keys, 40, torch.tensor([0]), stop).ids[0, 0, 0]
    assert (ids[:20] >= 0).all() or index == "hnsw"
    assert (ids >= 0).sum() <= stop
    assert ids.max() < stop


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("layer", [8, 22])
def test_recall_on_real_keys(index, layer):
    """Keys and queries of SmolLM2-135M over 4096 tokens of prose, one KV head a layer: recall@100 at the defaults."""
    data = load_file(CAPTURE)
    keys, query = data[f"{layer}.key"].float(), data[f"{layer}.query"].float()
    engine = built(index, keys, lo=4)
    stop = len(engine)
    found = engine.search(query, keys, 100, torch.tensor([4]), stop).ids
    _, exact = top_k(query, keys[:, :, :stop], 100, scale=1.0, start=torch.tensor([4]))
    recall = recall_at_k(scores_of(query, keys, found), exact).mean()
    assert recall == 1.0 if index == "flat" else recall >= 0.90


def test_ivf_is_exact_until_it_trains_and_trains_again_as_rows_double():
    db = AttentionDB(1, 8, config=RetrievalConfig(index="ivf", k=16, dense_below=0, window=8))
    seen = []
    for _ in range(20):
        db.insert(torch.randn(1, 1, 256, 8), torch.randn(1, 1, 256, 8))
        seen.append(db.index.describe().get("trained on rows", 0))
        plan = db.explain(torch.randn(1, 1, 1, 8))
        assert plan.is_dense == (len(db) < 1024)
    assert seen[:3] == [0, 0, 0]
    assert sorted(set(seen)) == [0, 1020, 1024, 2048, 4096]
    assert db.index.describe()["lists"] == round(8 * 4096**0.5)


@pytest.mark.parametrize("growth", [1.05, 3.0, 100.0])
def test_hnsw_stays_right_when_a_later_key_is_longer_than_m(growth):
    torch.manual_seed(0)
    early, late = torch.randn(1, 1, 1024, 16), growth * torch.randn(1, 1, 512, 16)
    keys = torch.cat([early, late, early + 0.1], dim=2)
    engine = built("hnsw", keys)
    assert engine.describe()["graphs"] == (
        1 if growth < 1.1 and late.norm(dim=-1).max() < 1.1 * early.norm(dim=-1).max() else 2
    )
    query = torch.randn(1, 8, 4, 16)
    found = engine.search(query, keys, 50, torch.tensor([0]), len(engine)).ids
    _, exact = top_k(query, keys[:, :, : len(engine)], 50, scale=1.0)
    assert recall_at_k(scores_of(query, keys, found), exact).mean() > 0.98


def test_hnsw_builds_the_same_graph_every_time():
    keys = torch.randn(1, 2, 2048, 16)
    query = torch.randn(1, 4, 8, 16)
    results = [built("hnsw", keys, ef_search=16).search(query, keys, 50, torch.tensor([0]), 2048).ids for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)


def test_more_effort_finds_more():
    keys = torch.randn(1, 1, 4096, 32)
    query = torch.randn(1, 4, 8, 32)
    _, exact = top_k(query, keys, 50, scale=1.0)
    for index, option, efforts in (("ivf", "nprobe", (4, 64, 10**6)), ("hnsw", "ef_search", (16, 128, 2048))):
        recalls, scored = [], []
        for effort in efforts:
            found = built(index, keys, **{option: effort}).search(query, keys, 50, torch.tensor([0]), 4096)
            recalls.append(float(recall_at_k(scores_of(query, keys, found.ids), exact).mean()))
            scored.append(found.bytes_read)
        assert recalls == sorted(recalls)
        assert scored == sorted(scored)
        assert recalls[-1] > 0.99


def test_flat_holds_nothing_and_faiss_counts_its_rows():
    keys = torch.randn(1, 2, 2048, 16)
    assert built("flat", keys).nbytes == 0
    for index in ("ivf", "hnsw"):
        assert built(index, keys).nbytes > keys.numel() * 4
    assert isinstance(make_index(RetrievalConfig()), IvfIndex)
    assert {type(make_index(RetrievalConfig(index=name))) for name in INDEXES} == {FlatIndex, IvfIndex, HnswIndex}


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_indexes_leave_torchs_thread_count_alone(index):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        keys = torch.randn(1, 2, 1024, 8)
        built(index, keys).search(torch.randn(1, 2, 1, 8), keys, 4, torch.tensor([0]), 1024)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_missing_faiss_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"dbattn\[cpu\]"):
        make_index(RetrievalConfig(index="ivf"))
    assert np.isfinite(len(make_index(RetrievalConfig(index="flat"))))
