"""Forks: a database and its forks hold one copy of their rows, and never see what is done to another."""

import copy
import gc
import os
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.bench_open import bench, make_context
from dbattn import AttentionDB, RetrievalConfig
from dbattn.index import segmented
from dbattn.index._calibration import calibrate
from dbattn.store import pages

OPTIONS = {"flat": {}, "ivf": {"nprobe": 8}, "hnsw": {"ef_search": 32, "neighbors": 8}, "segmented": {}}
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")


def rows(n, batch=1):
    return torch.randn(batch, 2, n, 16)


def database(index="segmented", n=3000, batch=1, learning=True, **options):
    config = RetrievalConfig(
        index=index, **{"k": 64, "dense_below": 0, "window": 16, "audit_rate": 0.0, **OPTIONS[index], **options}
    )
    db = AttentionDB(2, 16, config=config)
    grow(db, n, batch, learning=learning)
    return db


def grow(db, n, batch=1, *, learning=True):
    """Insert random rows, with queries: a function of torch's seed."""
    if n:
        db.insert(rows(n, batch), rows(n, batch), torch.randn(batch, 4, n, 16) if learning else None)


def assert_alike(one, other):
    """The two hold the same rows and answer bit for bit alike."""
    assert len(one) == len(other)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)
    query = torch.randn(len(one.store.start), 4, 1, 16)
    for options in ({}, {"retrieve": False}):
        for a, b in zip(*(db.attend(query, return_lse=True, **options) for db in (one, other)), strict=True):
            assert torch.equal(a, b)
    a, b = one.search(query, 9), other.search(query, 9)
    assert torch.equal(a.ids, b.ids)


CHANGES = {
    "insert": lambda db: grow(db, 40),
    "seal": lambda db: grow(db, 200),
    "merge": lambda db: grow(db, 1200),
    "truncate": lambda db: db.truncate(1700),
    "truncate and go on": lambda db: (db.truncate(1700), grow(db, 700)),
    "empty": lambda db: (db.truncate(0), grow(db, 300)),
    "put back": lambda db: db.release(),
    "outgrow": lambda db: grow(db, 6000),
    "select": lambda db: db.select(torch.tensor([0, 0])),
    "analyze": lambda db: db.analyze(torch.randn(1, 4, 500, 16)),
}


@pytest.mark.parametrize("index", sorted(OPTIONS))
@pytest.mark.parametrize("whose", ["fork", "origin"])
def test_a_fork_and_its_origin_never_see_what_is_done_to_the_other(index, whose):
    torch.manual_seed(0)
    db = database(index)
    kept = copy.deepcopy(db)
    # Indexes of FAISS take long to build, and share what they share as copies do.
    names = CHANGES if index in ("flat", "segmented") else ("insert", "truncate and go on")
    for change in (CHANGES[name] for name in names):
        origin, by_copy = db.fork(), copy.deepcopy(kept)
        twin = origin.fork()
        changed, other = (twin, origin) if whose == "fork" else (origin, twin)
        for each in (changed, by_copy):
            torch.manual_seed(1)
            change(each)
        assert_alike(other, kept)
        assert_alike(changed, by_copy)
        # What was changed is forked, and changed, in turn.
        again = changed.fork()
        batch = len(again.store.start)
        for each in (again, by_copy):
            torch.manual_seed(2)
            grow(each, 300, batch)
        assert_alike(again, by_copy)
    assert_alike(db, kept)


def test_a_fork_is_saved_and_opened_like_any_other(tmp_path):
    torch.manual_seed(0)
    for heads in (1, 2):
        db = AttentionDB(heads, 16, config=RetrievalConfig(index="flat", audit_rate=0.0))
        db.insert(*(torch.randn(1, heads, 9000, 16) for _ in range(3)))
        twin = db.fork()
        twin.save(tmp_path / f"{heads}")
        opened = AttentionDB.open(tmp_path / f"{heads}")
        for each in (opened, opened.fork()):
            assert torch.equal(each.keys, db.keys)
            assert torch.equal(each.values, db.values)
            assert torch.equal(each.store.sample.state()["queries"], db.store.sample.state()["queries"])
        before = (tmp_path / f"{heads}" / "manifest.json").read_bytes()
        assert opened.fork().save(tmp_path / f"{heads}").files_written == 0
        assert (tmp_path / f"{heads}" / "manifest.json").read_bytes() == before


def test_batches_packed_rows_and_few_rows_are_forked_alike():
    torch.manual_seed(0)
    for n in (0, 1, 70):
        db = database(n=n)
        twin = db.fork()
        grow(twin, 600)
        assert len(db) == n
        assert len(twin) == n + 600
    for storage in ("int8", "float16"):
        db = database("flat", n=1500, batch=2, storage=storage)
        twin, other = db.fork(), copy.deepcopy(db)
        for each in (twin, other):
            torch.manual_seed(3)
            grow(each, 700, 2)
        assert_alike(twin, other)
        assert len(db) == 1500


def test_a_fork_survives_its_origin_and_the_origin_its_forks():
    torch.manual_seed(0)
    db = database()
    kept, twin = copy.deepcopy(db), db.fork()
    for _ in range(3):
        db.fork()
    gc.collect()
    assert_alike(db, kept)
    del db
    gc.collect()
    assert_alike(twin, kept)
    grow(twin, 300)
    assert len(twin) == 3300


def test_a_copy_and_a_pickle_of_a_fork_are_their_own():
    torch.manual_seed(0)
    db = database()
    twin = db.fork()
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        grow(other, 300)
        assert_alike(twin, db)
        torch.manual_seed(4)
        grown, again = other.fork(), other.fork()
        assert_alike(grown, again)


def own_bytes():
    """Memory of this process that no file holds; pages copied on write included."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def test_what_audits_find_of_common_rows_is_found_once_and_of_others_by_each(monkeypatch):
    audited = []

    def noted(call, asked, table):
        audited.append(asked.rows)
        return calibrate(call, asked, table)

    monkeypatch.setattr(segmented, "calibrate", noted)
    torch.manual_seed(0)
    db = database(n=1100, k=None)
    query = torch.randn(1, 4, 1, 16)
    twins = [db.fork() for _ in range(3)]
    for each in (*twins, db, db.fork(), twins[0].fork()):
        each.attend(query)
    assert audited == [1024]
    kept = copy.deepcopy(db)
    for twin in twins:
        grow(twin, 600)
        twin.attend(query)
    assert audited == [1024, 1536, 1536, 1536]
    assert len({(twin.index.needs.read, twin.index.needs.error) for twin in twins}) > 1
    assert_alike(db, kept)


@ON_LINUX
def test_a_thousand_forks_hold_one_copy_of_the_rows():
    torch.manual_seed(0)
    db = database(n=16500, learning=False)
    query = torch.randn(1, 4, 1, 16)
    expected = db.attend(query)
    db.fork().attend(query)
    before = own_bytes()
    forks = [db.fork() for _ in range(1000)]
    answers = [fork.attend(query) for fork in forks[::100]]
    taken = own_bytes() - before
    assert all(torch.equal(answer, expected) for answer in answers)
    assert db.nbytes > 4e6
    assert taken < 1000 * 20e3
    # A new row costs each head's page, of keys and of values.
    for fork in forks[:100]:
        grow(fork, 1, learning=False)
    assert own_bytes() - before - taken < 100 * 40e3


@ON_LINUX
def test_the_benchmark_of_opening_measures_caches_that_share_a_context(tmp_path):
    make_context(tmp_path / "a", None, 1500, None)
    steps = {result["step"]: result for result in bench(tmp_path / "a", None)}
    assert steps["first cache"]["shared_mb"] > 1
    assert steps["hundredth cache"]["own_mb"] < 0.3
    assert steps["hundredth cache"]["shared_mb"] == 0


@ON_LINUX
def test_the_files_of_pages_are_closed_with_the_last_who_shares_them():
    torch.manual_seed(0)
    db = database(n=1500)

    def files():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = files()
    twin = db.fork()
    assert before < files() <= before + 3
    del db
    assert files() > before
    del twin
    assert files() == before


@pytest.mark.parametrize("broken", ["memory files", "any files"])
def test_where_the_system_has_no_memory_files_forks_are_as_right(broken, monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    if broken == "any files":

        def refuse():
            raise OSError("no files here")

        monkeypatch.setattr(pages, "_memory_file", refuse)
    torch.manual_seed(0)
    db = database(n=1500)
    kept, twin = copy.deepcopy(db), db.fork()
    grow(twin, 700)
    assert_alike(db, kept)
    assert len(twin) == 2200


def test_threads_ask_forks_of_one_database_at_the_same_time():
    torch.manual_seed(0)
    db = database(learning=False)
    added = [(rows(300), rows(300)) for _ in range(4)]
    query = torch.randn(1, 4, 1, 16)
    expected = []
    for keys, values in added:
        other = copy.deepcopy(db)
        other.insert(keys, values)
        expected.append(other.attend(query))
    failed = []

    def ask(number):
        for _ in range(5):
            fork = db.fork()
            fork.insert(*added[number])
            if not torch.equal(fork.attend(query), expected[number]):
                failed.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process")
def test_a_forked_process_may_fork_what_it_inherits():
    db = database("flat", n=1500)
    db.fork()
    if (child := os.fork()) == 0:
        try:
            twin = db.fork()
            os._exit(0 if torch.equal(twin.store.keys, db.store.keys) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_what_a_fork_holds_alone_is_what_came_or_was_moved_since():
    db = database(n=3000)
    fork = db.fork()
    assert fork.own_nbytes == 0 < fork.nbytes
    grow(fork, 10)
    assert fork.own_nbytes == 10 * 2 * 2 * 16 * 4  # keys and values of two heads, float32
    grow(fork, 1200)
    assert fork.own_nbytes > 1210 * 2 * 2 * 16 * 4  # segments merged: rows were moved, and there are other lists
    assert (db.own_nbytes, db.fork().own_nbytes) == (0, 0)
    alone = database("flat", n=300, learning=False)
    assert alone.own_nbytes == alone.nbytes


def test_rows_that_forks_share_are_scanned_once_for_all_that_ask_and_each_reads_its_own(monkeypatch):
    from dbattn import together

    torch.manual_seed(0)
    origin = AttentionDB(2, 16, config=RetrievalConfig(index="segmented", k=64, window=16, audit_rate=0.0))
    grow(origin, 3000)
    forks = [origin.fork() for _ in range(3)]
    for number, db in enumerate(forks):
        grow(db, 1 + 30 * number)
    query, read = torch.randn(3, 4, 1, 16), []
    expected = torch.cat([db.attend(q, retrieve=False) for db, q in zip(forks, query.split(1), strict=True)])
    scan = together.dense_decode
    monkeypatch.setattr(
        together, "dense_decode", lambda q, keys, *rest, **more: read.append(keys) or scan(q, keys, *rest, **more)
    )
    monkeypatch.setattr(together, "_pays", lambda *_: True)
    found = together.attend_together(forks, query, scale=0.25)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [keys.shape[2] for keys in read] == [3000, 1, 31, 61]
    # Not where nothing is shared, or retrieval was asked for whatever it takes.
    assert together.attend_together([forks[0], copy.deepcopy(forks[1])], query[:2], scale=0.25) is None
    named = database()
    assert together.attend_together([named.fork(), named.fork()], query[:2], scale=0.25) is None


def test_forks_are_read_together_where_each_would_scan_which_is_asked_once_for_many_steps(monkeypatch):
    from dbattn import together

    torch.manual_seed(0)
    origin = AttentionDB(2, 16, config=RetrievalConfig(index="segmented", window=16, audit_rate=0.0))
    grow(origin, 1500)
    forks, asked, scans = [origin.fork(), origin.fork()], [], True

    def plan_of(db, query, *, scale):
        asked.append(len(db))
        return SimpleNamespace(is_dense=scans)

    monkeypatch.setattr(AttentionDB, "plan_of", plan_of)
    assert together.attend_together(forks, torch.randn(2, 4, 1, 16), scale=0.25) is None  # they are few
    monkeypatch.setattr(together, "LEAST_BYTES", 2 * 1500 * 2 * 2 * 16 * 4)
    for _ in range(40):
        assert together.attend_together(forks, torch.randn(2, 4, 1, 16), scale=0.25) is not None
        for db in forks:
            grow(db, 1)
    assert asked == [1500, 1536]
    scans = False
    assert together.attend_together([origin.fork(), forks[1]], torch.randn(2, 4, 1, 16), scale=0.25) is None
