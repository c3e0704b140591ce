"""rows="host": rows in memory of the host that a GPU reads. Without one, in memory that stands in for it."""

import pytest
import torch
from conftest import random_rows, stand_in_for_host_rows, tiny_llama

import dbattn
from dbattn import RetrievalConfig
from dbattn.store import KVStore

OPTIONS = {"k": 60, "dense_below": 0, "audit_rate": 0.0}


@pytest.fixture(params=["stand-in", "cuda"])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return "cuda"
    stand_in_for_host_rows(monkeypatch)
    return "cpu"


def database(rows, device, **options):
    keys, values = (part.to(device) for part in random_rows(700))
    db = dbattn.AttentionDB(2, 16, config=RetrievalConfig(rows=rows, **{**OPTIONS, **options}))
    db.insert(keys, values)
    return db


@pytest.mark.parametrize("storage", [None, "int8"])
def test_rows_in_host_memory_answer_as_those_on_the_device_do(device, storage):
    query, more = torch.randn(1, 4, 1, 16, device=device), torch.randn(1, 2, 400, 16, device=device)
    answers = []
    for rows in ("device", "host"):
        torch.manual_seed(1)
        db = database(rows, device, storage=storage)
        assert db.store.host == (rows == "host")
        by_lists = [db.attend(query)]
        exact = [db.attend(query, retrieve=False)]
        db.insert(more, more)  # buffers grow, segments merge
        by_lists.append(db.attend(query))
        exact.append(db.attend(torch.cat([query, -query], dim=2), retrieve=False))
        twin = db.fork()
        twin.select(torch.tensor([0, 0]))
        twin.truncate(900)
        by_lists.append(twin.attend(query.expand(2, -1, -1, -1)))
        exact.append(db.keys)
        answers.append((by_lists, exact))
    (by_lists, exact), (by_lists_too, exact_too) = answers
    for near, far in zip(exact, exact_too, strict=True):
        torch.testing.assert_close(far, near)
    for near, far in zip(by_lists, by_lists_too, strict=True):
        # A GPU reads whole lists of its own rows, and of others the best that lists have.
        assert (far - near).norm() <= (0.5 if device == "cuda" else 1e-5) * near.norm()


def test_explain_says_where_rows_are(device):
    assert "rows kept as they come, in host memory" in str(
        database("host", device).explain(torch.randn(1, 4, 1, 16, device=device))
    )
    assert "rows kept as int8, rotated, in host memory" in str(
        database("host", device, storage="int8").explain(torch.randn(1, 4, 1, 16, device=device))
    )
    assert "host memory" not in str(database("device", device).explain(torch.randn(1, 4, 1, 16, device=device)))


def test_rows_asked_for_in_host_memory_are_retrieved_without_rates():
    assert RetrievalConfig(rows="host").wishes_retrieval
    assert not RetrievalConfig().wishes_retrieval
    assert not RetrievalConfig(rows="host", dense_below="auto").wishes_retrieval


@pytest.mark.parametrize(("saved", "opened"), [("host", "device"), ("device", "host"), ("host", "host")])
def test_a_snapshot_opens_with_either(device, tmp_path, saved, opened):
    db, query = database(saved, device), torch.randn(1, 4, 1, 16, device=device)
    db.save(tmp_path / "rows")
    again = dbattn.AttentionDB.open(tmp_path / "rows", config=RetrievalConfig(rows=opened, **OPTIONS), device=device)
    assert again.store.host == (opened == "host")
    assert torch.equal(again.keys, db.keys)
    assert torch.equal(again.attend(query, retrieve=False), db.attend(query, retrieve=False))
    if device == "cpu" or saved == opened:  # a GPU chooses among rows of its own otherwise than among others
        assert torch.equal(again.attend(query), db.attend(query))
    assert dbattn.AttentionDB.open(tmp_path / "rows").config.rows == "device", "where they were kept is not saved"


def test_a_machine_without_a_gpu_is_told_at_the_door(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"rows='host' .* no CUDA device: use rows='device'"):
        dbattn.AttentionDB(2, 16, config=RetrievalConfig(rows="host"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match=r"rows='host' .* come on cpu: use rows='device'"):
        KVStore(2, 16, 16, host=True).append(*random_rows(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": "disk"}, "rows is 'disk', expected one of device, host"),
        ({"rows": "host", "index": "flat"}, "not with index='flat'"),
    ],
)
def test_what_does_not_go_with_rows_in_host_memory_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RetrievalConfig(**options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_may_keep_its_rows_in_host_memory():
    from dbattn.hf import wrap

    model, ids = tiny_llama().cuda(), torch.randint(0, 1000, (1, 300), device="cuda")
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    with wrap(model, RetrievalConfig(rows="host", k=10000)):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)
