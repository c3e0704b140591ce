"""Snapshots: what is opened answers like what was saved, and what is damaged, forged or torn is refused."""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hf import prompt, tiny

from dbattn import AttentionDB, RetrievalConfig
from dbattn.hf import wrap
from dbattn.snapshot import SnapshotError, SnapshotWriter, describe, reader
from dbattn.snapshot.manifest import VERSION

OPTIONS = {
    "flat": {},
    "ivf": {"nprobe": 8},
    "hnsw": {"ef_search": 32, "neighbors": 8},
    "segmented": {},
}
CHEAP = settings(max_examples=60)


def rows(n, batch=1, dim=16, dtype=torch.float32):
    return torch.randn(batch, 2, n, dim).to(dtype)


def database(index, n=2600, batch=1, dtype=torch.float32, start=None, **options):
    options = {"k": 32, "dense_below": 0, "window": 16, "audit_rate": 0.0, **OPTIONS[index], **options}
    db = AttentionDB(2, 16, config=RetrievalConfig(index=index, **options))
    if n:
        db.insert(rows(n, batch, dtype=dtype), rows(n, batch, dtype=dtype), start=start)
    return db


def assert_alike(one, other, m=1):
    """The two answer every kind of question bit for bit alike."""
    batch, dtype = len(one.store.start), one.store.keys.dtype
    query = rows(m, batch, dtype=dtype).repeat(1, 2, 1, 1)
    for options in ({}, {"retrieve": False}):
        for a, b in zip(*(db.attend(query, return_lse=True, **options) for db in (one, other)), strict=True):
            assert torch.equal(a, b)
    a, b = one.search(query, 9), other.search(query, 9)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.scores, b.scores)
    a, b = one.audit(query), other.audit(query)
    for name in ("recall_by_query", "attention_mass_by_query", "relative_error_by_query", "rows_read", "bytes_read"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=0, rtol=0, equal_nan=True)
    assert len(one.index) == len(other.index)


def files_of(folder):
    return {path.name: path.stat().st_ino for path in Path(folder).iterdir()}


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def saved(request, tmp_path_factory):
    """A folder with a snapshot, not to be changed, and the database it was made from."""
    torch.manual_seed(0)
    db = database(request.param)
    folder = tmp_path_factory.mktemp("saved") / request.param
    db.save(folder)
    return folder, db


@pytest.fixture
def snapshot(saved, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def sign(folder, change):
    """Change the manifest and make its checksum right again, as whoever forges one can."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    change(data)
    text = json.dumps(data, indent=1)
    path.write_text(json.dumps({**data, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n")


def replace_file(folder, kind, write):
    """Replace the first file of a kind by what ``write(old, new)`` makes, and name it in the manifest."""
    old = min(folder.glob(f"{kind}-*"))
    write(old, folder / "new")
    content = (folder / "new").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    name = old.name[:-28] + digest[:16] + ".safetensors"
    old.unlink()
    (folder / "new").rename(folder / name)

    def rename(data):
        entry = next(file for file in data["files"] if file["name"] == old.name)
        entry.update(name=name, bytes=len(content), sha256=digest)

    sign(folder, rename)
    return name


def forge(folder, kind, change):
    """Change the tensors of the first file of a kind; sizes and checksums stay right."""

    def write(old, new):
        tensors = {name: tensor.clone() for name, tensor in load_file(old).items()}
        change(tensors)
        save_file(tensors, new)

    return replace_file(folder, kind, write)


@pytest.mark.parametrize(
    ("index", "dtype"),
    [
        *((index, dtype) for index in sorted(OPTIONS) for dtype in (torch.float32, torch.float16)),
        ("flat", torch.bfloat16),
    ],
    ids=str,
)
def test_an_opened_snapshot_answers_bit_for_bit_and_goes_on_like_the_original(index, dtype, tmp_path):
    db = database(index, batch=2, dtype=dtype, start=torch.tensor([0, 700]))
    db.save(tmp_path / "a")
    opened = AttentionDB.open(tmp_path / "a")
    assert opened.config == db.config
    assert len(opened) == 2600
    assert_alike(db, opened)
    assert_alike(db, opened, m=3)
    for change in (700, -900, 40):
        if change > 0:
            keys, values = rows(change, 2, dtype=dtype), rows(change, 2, dtype=dtype)
        for each in (db, opened):
            each.insert(keys, values) if change > 0 else each.truncate(len(each) + change)
        assert_alike(db, opened)
    beams = torch.tensor([1, 1])
    db.select(beams)
    opened.select(beams)
    assert_alike(db, opened)
    opened.save(tmp_path / "a")
    assert_alike(db, AttentionDB.open(tmp_path / "a"))


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_a_sampled_tail_survives(index, tmp_path):
    db = database(index, tail="sample")
    db.save(tmp_path / "a")
    assert_alike(db, AttentionDB.open(tmp_path / "a"))


def test_a_graph_for_outliers_survives(tmp_path):
    db = database("hnsw", n=0)
    keys = rows(1500)
    keys[:, 0, 900] *= 100
    db.insert(keys, rows(1500))
    assert db.index.describe()["graphs"] > 1 or db.index._units[0][0].describe()["graphs"] > 1
    db.save(tmp_path / "a")
    assert_alike(db, AttentionDB.open(tmp_path / "a"))


def test_few_rows_and_none_survive(tmp_path):
    for n in (0, 1, 70):
        for index in OPTIONS:
            db = database(index, n=n)
            db.save(tmp_path / index)
            opened = AttentionDB.open(tmp_path / index)
            assert len(opened) == n
            assert len(opened.index) == len(db.index)
            keys, values = rows(600), rows(600)
            for each in (db, opened):
                each.insert(keys, values)
            assert_alike(db, opened)


@settings(max_examples=20)
@given(
    st.sampled_from(["flat", "segmented"]),
    st.lists(
        st.tuples(st.sampled_from(["insert", "truncate", "save", "open", "search"]), st.integers(1, 900)), max_size=12
    ),
)
def test_any_history_of_saves_ends_like_one_that_was_never_saved(tmp_path_factory, index, events):
    folder = tmp_path_factory.mktemp("history") / "a"
    torch.manual_seed(0)
    plain = database(index, 700)
    other = copy.deepcopy(plain)
    for event, amount in [*events, ("save", 0), ("open", 0)]:
        if event == "insert":
            keys, values = rows(amount), rows(amount)
            plain.insert(keys, values)
            other.insert(keys, values)
        elif event == "truncate":
            length = max(1, len(plain) - amount)
            plain.truncate(length)
            other.truncate(length)
        elif event == "search" and len(plain) > 4:
            # It may put sealed rows back in order for a moment.
            other.search(rows(4), 3)
        elif event == "save":
            other.save(folder)
        elif folder.exists() and len(AttentionDB.open(folder)) == len(other):
            other = AttentionDB.open(folder)
    assert_alike(plain, other)


def test_saving_again_writes_only_what_is_new(saved, snapshot):
    db = AttentionDB.open(snapshot)
    before = files_of(snapshot)
    report = db.save(snapshot)
    assert (report.files_written, report.bytes_written) == (0, 0)
    assert files_of(snapshot) == before
    db.insert(rows(900), rows(900))
    report = db.save(snapshot)
    after = files_of(snapshot)
    kept = {name for name in before if after.get(name) == before[name]}
    index = db.config.index
    # Rows that stay where they are make one run so far, which has grown; of the segments, 512 became 1024 rows.
    assert len(kept) == report.files_kept == (1 if index == "segmented" else 0)
    assert len(after) == 1 + report.files_written + report.files_kept
    db.insert(rows(4096), rows(4096))
    db.save(snapshot)
    before = files_of(snapshot)
    db.insert(rows(10), rows(10))
    report = db.save(snapshot)
    assert report.bytes_written < 0.8 * describe(snapshot).nbytes
    assert report.files_kept >= 1
    assert_alike(db, AttentionDB.open(snapshot))


def test_rows_that_were_replaced_are_written_though_their_number_is_the_same(saved, snapshot):
    db = AttentionDB.open(snapshot)
    db.truncate(1000)
    db.insert(rows(1600), rows(1600))
    db.save(snapshot)
    assert_alike(db, AttentionDB.open(snapshot))
    other = AttentionDB.open(snapshot)
    other.select(torch.tensor([0, 0]))
    other.save(snapshot)
    assert describe(snapshot).batch == 2
    assert_alike(other, AttentionDB.open(snapshot))


def test_a_snapshot_saved_elsewhere_since_is_replaced_whole(saved, snapshot):
    first, second = AttentionDB.open(snapshot), AttentionDB.open(snapshot)
    first.truncate(500)
    first.save(snapshot)
    second.insert(rows(1), rows(1))
    second.save(snapshot)
    assert_alike(second, AttentionDB.open(snapshot))


def test_what_is_opened_is_not_tied_to_the_folder(saved, snapshot):
    _, db = saved
    opened = AttentionDB.open(snapshot)
    shutil.rmtree(snapshot)
    assert_alike(db, opened)
    before = opened.store.keys.clone()
    opened.insert(rows(3), rows(3))
    assert torch.equal(opened.store.keys[:, :, :2048], before[:, :, :2048])


def test_damage_to_any_file_is_refused_by_name(saved, tmp_path):
    folder = saved[0]
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        middle = len(content) // 2
        flips = {0, 1, 7, 8, 9, 40, middle, len(content) - 2, len(content) - 1}
        damages = [
            content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :] for at in flips for bit in (0, 6)
        ]
        damages += [content[:n] for n in (0, 5, middle, len(content) - 1)] + [content + b"\0", content + b"\n", None]
        for damage in damages:
            damaged = Path(shutil.copytree(folder, tmp_path / "damaged", copy_function=os.link))
            (damaged / path.name).unlink()
            if damage is not None:
                (damaged / path.name).write_bytes(damage)
            with pytest.raises(ValueError, match=path.name):
                AttentionDB.open(damaged)
            shutil.rmtree(damaged)


def test_any_byte_of_the_manifest_counts(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    content = (folder / "manifest.json").read_bytes()
    for at in range(0, len(content), 3):
        (folder / "manifest.json").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(SnapshotError, match=r"manifest\.json"):
            describe(folder)


@CHEAP
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:0123456789-abc\\u', max_size=60).map(str.encode))
def test_no_bytes_in_the_manifest_do_more_than_be_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(SnapshotError, match=r"manifest\.json"):
        AttentionDB.open(folder)


def test_deep_nesting_and_huge_numbers_are_refused(tmp_path):
    for content in (
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 10_000,
        b"NaN",
        b'{"format": "dbattn snapshot"}',
        b"\xff",
    ):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(SnapshotError, match=r"manifest\.json"):
            AttentionDB.open(tmp_path)
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SnapshotError, match=f"{1 << 40} bytes"):
        AttentionDB.open(tmp_path)


JUNK = (
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.text(max_size=5) | st.just([]) | st.just({}) | st.floats()
)


@CHEAP
@given(st.data())
def test_a_signed_manifest_with_any_field_replaced_is_refused_or_harmless(saved, tmp_path_factory, data):
    folder = Path(shutil.copytree(saved[0], tmp_path_factory.mktemp("forged") / "a", copy_function=os.link))
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(content)

    def change(manifest):
        place = manifest
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                return
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
                place[key] = data.draw(JUNK)
                return
            place = place[key]

    sign(folder, change)
    with contextlib.suppress(SnapshotError):
        db = AttentionDB.open(folder)
        if len(db):
            db.attend(rows(1).repeat(1, 2, 1, 1))


@settings(max_examples=25)
@given(st.data())
def test_an_index_state_with_any_number_replaced_is_refused_or_harmless(saved, tmp_path_factory, data):
    """What SHA-256 cannot tell: a file made by someone else, with numbers that would lead out of an array."""
    kind = {"flat": "rows", "segmented": "segment"}.get(saved[1].config.index, "index")
    folder = Path(shutil.copytree(saved[0], tmp_path_factory.mktemp("forged") / "a"))

    def change(tensors):
        names = sorted(name for name, tensor in tensors.items() if tensor.dtype == torch.int32) or sorted(tensors)
        flat = tensors[data.draw(st.sampled_from(names))].flatten()
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(flat) - 1))
            flat[at] = data.draw(st.sampled_from([-(2**31), -2, -1, 0, 1, 3, 2599, 2600, 4096, 2**31 - 1]))

    forge(folder, kind, change)
    try:
        db = AttentionDB.open(folder)
    except SnapshotError:
        return
    for _ in range(3):
        db.attend(rows(1).repeat(1, 2, 1, 1))
        db.search(rows(2).repeat(1, 2, 1, 1), 5)
        db.insert(rows(600), rows(600))


def _set(name, value, at=0):
    def change(tensors):
        tensors[f"layer.0.{name}"].flatten()[at] = value

    return change


FORGERIES = {
    "positions twice": ("segmented", "segment", _set("positions", 99, at=98)),
    "a list too long": ("segmented", "segment", _set("list_rows", 2000)),
    "a list below nothing": ("segmented", "segment", _set("list_rows", -1)),
    "super-lists that end early": ("segmented", "segment", _set("super_lists", 1)),
    "a cell that is not there": ("ivf", "index", _set("0.0.nearest", 10**6)),
    "a link out of the graph": ("hnsw", "index", _set("0.0.links0", 10**6)),
    "a link to minus two": ("hnsw", "index", _set("0.0.links0", -2)),
    "an entry below the top": ("hnsw", "index", _set("0.0.entry0", 0)),
    "keys that are not numbers": ("flat", "rows", _set("keys", float("nan"))),
    "values that are infinite": ("segmented", "rows", _set("values", float("inf"))),
    "keys of another dtype": ("flat", "rows", lambda t: t.update({"layer.0.keys": t["layer.0.keys"].half()})),
    "keys of another shape": ("flat", "rows", lambda t: t.update({"layer.0.keys": t["layer.0.keys"][..., :8].clone()})),
    "no values": ("flat", "rows", lambda t: t.pop("layer.0.values")),
    "one tensor more": ("flat", "rows", lambda t: t.update({"layer.0.more": torch.zeros(1)})),
    "another layer": ("flat", "rows", lambda t: t.update({"layer.1.keys": torch.zeros(1)})),
    "no lists": ("segmented", "segment", lambda t: t.pop("layer.0.list_rows")),
    "too many lists": ("segmented", "segment", lambda t: _split_every_list(t)),
}


def _split_every_list(tensors):
    """One row a list: each is in bounds, but the arrays would not hold so many when the store grows."""
    n = int(tensors["layer.0.list_rows"].sum(dim=2)[0, 0])
    for name in [name for name in tensors if ".list_" in name]:
        old = tensors[name]
        tensors[name] = torch.zeros((1, 2, n, *old.shape[3:]), dtype=old.dtype)
    tensors["layer.0.list_rows"][:] = 1
    supers = tensors["layer.0.super_lists"]
    supers[:] = (supers > 0).int()
    supers[:, :, 0] += n - supers.sum(dim=2)


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_file_with_right_checksums_is_refused_by_name(forgery, tmp_path):
    index, kind, change = FORGERIES[forgery]
    database(index).save(tmp_path / "a")
    name = forge(tmp_path / "a", kind, change)
    with pytest.raises(SnapshotError, match=name):
        AttentionDB.open(tmp_path / "a")


def test_headers_are_measured_before_they_are_read(tmp_path):
    database("flat", n=100).save(tmp_path / "a")
    for header in (2**63, 2**40, 17 << 20, 10**6):
        claim = header.to_bytes(8, "little") + b"{}"
        name = replace_file(tmp_path / "a", "rows", lambda _, new, claim=claim: new.write_bytes(claim))
        with pytest.raises(SnapshotError, match=f"{name}.*header"):
            AttentionDB.open(tmp_path / "a")
    for content in (b"", b"\x02\0\0\0\0\0\0\0{}", b"\x08\0\0\0\0\0\0\0[[[[[[[["):
        name = replace_file(tmp_path / "a", "rows", lambda _, new, content=content: new.write_bytes(content))
        with pytest.raises(SnapshotError, match=name):
            AttentionDB.open(tmp_path / "a")
    sizes = {"layer.0.keys": {"dtype": "F32", "shape": [1, 2, 2**40, 16], "data_offsets": [0, 2**47]}}
    header = json.dumps(sizes).encode()
    content = len(header).to_bytes(8, "little") + header
    name = replace_file(tmp_path / "a", "rows", lambda _, new: new.write_bytes(content))
    with pytest.raises(SnapshotError, match=name):
        AttentionDB.open(tmp_path / "a")


@CHEAP
@given(st.binary(max_size=120))
def test_no_bytes_in_a_data_file_do_more_than_be_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz") / "a"
    database("flat", n=20).save(folder)
    name = replace_file(folder, "rows", lambda _, new: new.write_bytes(content))
    with pytest.raises(SnapshotError, match=name):
        AttentionDB.open(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b", "manifest.json", ".", "x\0y"])
def test_a_manifest_cannot_name_a_path(name, saved, snapshot):
    (snapshot.parent / "outside.safetensors").write_bytes(b"secret")
    sign(snapshot, lambda data: data["files"][0].update(name=name))
    with pytest.raises(SnapshotError, match=r"manifest\.json.*files\[0\]\.name"):
        AttentionDB.open(snapshot)


def test_links_and_pipes_are_not_followed(saved, snapshot, tmp_path):
    for path in sorted(snapshot.iterdir()):
        moved = path.rename(tmp_path / path.name)
        path.symlink_to(moved)
        with pytest.raises(SnapshotError, match=f"{path.name}.*ordinary"):
            AttentionDB.open(snapshot)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(SnapshotError, match=f"{path.name}.*ordinary"):
            AttentionDB.open(snapshot)
        path.unlink()
        moved.rename(path)
    AttentionDB.open(snapshot)


def test_files_that_do_not_cover_the_rows_once_are_refused(saved, snapshot):
    content = (snapshot / "manifest.json").read_bytes()
    for change in (
        lambda data: data["files"].pop(),
        lambda data: data["files"].append(data["files"][0]),
        lambda data: data.update(rows=2601),
        lambda data: data["layers"].append(data["layers"][0]),
        lambda data: data["layers"][0].update(indexed=5000),
        lambda data: data["layers"][0].update(start=[0, 0]),
        lambda data: data["layers"][0].update(start=[-1]),
        lambda data: data["layers"][0].update(settled=2601),
        lambda data: data["config"].update(index="nearest"),
        lambda data: data["config"].update(colour="red"),
        lambda data: data.update(layers=[]),
    ):
        (snapshot / "manifest.json").write_bytes(content)
        sign(snapshot, change)
        with pytest.raises(SnapshotError, match=str(snapshot)):
            AttentionDB.open(snapshot)


def test_another_format_version_dimension_or_config_is_refused_saying_which(saved, snapshot):
    config = saved[1].config
    for changed, match in (
        (RetrievalConfig(index="flat" if config.index != "flat" else "ivf"), "index="),
        (RetrievalConfig(**{**config.to_dict(), "window": 17}), "window=16"),
        (RetrievalConfig(**{**config.to_dict(), "n_sink": 2}), "n_sink=4"),
    ):
        with pytest.raises(SnapshotError, match=match):
            AttentionDB.open(snapshot, config=changed)
    assert AttentionDB.open(snapshot, config=RetrievalConfig(**{**config.to_dict(), "k": 7})).config.k == 7
    content = (snapshot / "manifest.json").read_bytes()
    sign(snapshot, lambda data: data.update(format_version=VERSION + 1))
    with pytest.raises(SnapshotError, match=f"format_version is {VERSION + 1}, expected {VERSION}"):
        AttentionDB.open(snapshot)
    (snapshot / "manifest.json").write_bytes(content)
    sign(snapshot, lambda data: data["layers"][0].update(head_dim=32))
    with pytest.raises(SnapshotError, match=r"keys are .*16\], expected .*32\]"):
        AttentionDB.open(snapshot)


def test_what_is_not_a_snapshot_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        AttentionDB.open(tmp_path / "none")
    with pytest.raises(SnapshotError, match=r"manifest\.json is missing"):
        AttentionDB.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="it is a file"):
        AttentionDB.open(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        database("flat", n=9).save(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        database("flat", n=9).save(tmp_path / "no" / "parent")


def test_a_folder_with_other_things_in_it_is_not_written_to(tmp_path, saved, snapshot):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("words")
    with pytest.raises(SnapshotError, match=r"chapter1\.txt"):
        database("flat", n=9).save(tmp_path / "thesis")
    (snapshot / "notes.txt").write_text("mine")
    database("flat", n=9).save(snapshot)
    assert (snapshot / "notes.txt").read_text() == "mine"
    (snapshot / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(SnapshotError, match=r"manifest\.json"):
        database("flat", n=9).save(snapshot)


def test_the_second_of_two_writers_is_refused(tmp_path):
    db = database("flat", n=9)
    with SnapshotWriter(tmp_path / "a") as writer:
        assert not writer.exists
        with pytest.raises(SnapshotError, match="another writer"):
            db.save(tmp_path / "a")
        db.save(writer)
        assert writer.exists
        with pytest.raises(SnapshotError, match="another writer"):
            SnapshotWriter(tmp_path / "a")
        assert len(AttentionDB.open(tmp_path / "a")) == 9
    with pytest.raises(SnapshotError, match="closed"):
        db.save(writer)
    db.save(tmp_path / "a")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("index", ["flat", "segmented"])
@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
def test_a_crash_at_any_instant_leaves_the_old_snapshot_or_the_new_one(index, first, tmp_path, monkeypatch):
    torch.manual_seed(0)
    old = database(index)
    if not first:
        old.save(tmp_path / "old")
    new = database(index, n=0)
    new.insert(rows(3300), rows(3300))
    calls = 0

    def crash_at(limit):
        """From the limit-th call on nothing happens any more: no cleaning up either."""
        steps = ((os, "fsync"), (os, "replace"), (Path, "write_bytes"), (Path, "mkdir"))
        for module, name in (*steps, (Path, "unlink"), (shutil, "rmtree")):
            real = getattr(module, name)

            def call(*args, real=real, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= limit:
                    raise Killed
                return real(*args, **kwargs)

            monkeypatch.setattr(module, name, call)

    outcomes = []
    for limit in range(1, 60):
        folder = tmp_path / f"crash{limit}"
        if not first:
            shutil.copytree(tmp_path / "old", folder)
        calls = 0
        crash_at(limit)
        try:
            new.save(folder)
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.undo()
        try:
            found = AttentionDB.open(folder)
        except (FileNotFoundError, SnapshotError):
            assert first
            assert not (folder / "manifest.json").exists()
            outcomes.append("none")
        else:
            outcomes.append("old" if len(found) == 2600 else "new")
            assert_alike(found, old if len(found) == 2600 else new)
        # The next writer is not disturbed by what is left, and removes it.
        new.save(folder)
        assert_alike(AttentionDB.open(folder), new)
        assert {path.name for path in folder.iterdir()} == {"manifest.json", *(f.name for f in describe(folder).files)}
    assert limit > 8
    assert set(outcomes) == {"none" if first else "old", "new"}
    assert outcomes == sorted(outcomes, key=["none", "old", "new"].index)


@pytest.mark.parametrize("saved_before", [True, False])
def test_what_a_killed_process_left_half_written_is_removed(saved_before, tmp_path, monkeypatch):
    """Whatever its name: libraries write beside the file they were asked for, and name it at the end."""
    db = database("flat")
    if saved_before:
        db.save(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)
    monkeypatch.setattr("safetensors.torch.save_file", lambda tensors, path: (path.parent / ".tmp1").write_bytes(b"1"))
    with pytest.raises(FileNotFoundError):
        database("flat", n=700).save(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / ".writing" / ".tmp1").exists()
    db.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *(f.name for f in describe(tmp_path).files)}


def test_an_opener_sees_the_snapshot_that_replaced_the_one_it_began_with(saved, snapshot, monkeypatch):
    new = database("flat", n=50)
    real, replaced = reader._open_files, []

    def replace_first(info):
        if not replaced:
            replaced.append(new.save(snapshot))
        return real(info)

    monkeypatch.setattr(reader, "_open_files", replace_first)
    assert len(AttentionDB.open(snapshot)) == 50


def test_layers_in_files_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr("dbattn.snapshot.writer.BYTES_PER_FILE", 1 << 16)
    model = tiny(num_hidden_layers=5)
    ids = prompt(1, 300, (0,))["input_ids"]
    with torch.inference_mode(), wrap(model, RetrievalConfig(index="flat")) as handle:
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        handle.save(tmp_path / "a")
    assert [file.layers for file in describe(tmp_path / "a").files if file.kind == "rows"] == [(i,) for i in range(5)]
    with wrap(model, context=tmp_path / "a") as handle:
        for a, b in zip(cache.layers, handle.new_cache().layers, strict=True):
            assert torch.equal(a.keys, b.keys)


RETRIEVING = {"k": 24, "window": 8, "n_sink": 2, "dense_below": 0}


@pytest.mark.parametrize("index", sorted(OPTIONS))
def test_a_model_goes_on_from_its_context_as_if_it_had_just_read_it(index, tmp_path):
    config = RetrievalConfig(index=index, **RETRIEVING, **OPTIONS[index])
    sizes = {"max_position_embeddings": 4096}
    ids, question = torch.randint(2, 126, (1, 1150)), torch.randint(2, 126, (1, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    model = tiny(**sizes)
    with torch.inference_mode(), wrap(model, config) as handle, SnapshotWriter(tmp_path / "a") as writer:
        cache = handle.new_cache()
        for chunk in ids.split(600, dim=1):
            model(chunk, past_key_values=cache)
            handle.save(writer)
        expected = model.generate(torch.cat([ids, question], dim=1), past_key_values=cache, **options)
    assert describe(tmp_path / "a").rows == 1150
    again = tiny(**sizes)
    with wrap(again, context=tmp_path / "a") as handle:
        assert handle.config == config
        assert torch.equal(handle.context, ids)
        with torch.inference_mode():
            for _ in range(2):
                cache = handle.new_cache()
                got = again.generate(torch.cat([handle.context, question], dim=1), past_key_values=cache, **options)
                assert torch.equal(got, expected)
        assert sum(layer.rows_retrieved for layer in handle.report().layers) > 0
        cache.crop(1150 - cache.get_seq_length())
        assert handle.save(tmp_path / "a", cache).bytes_written < 0.6 * describe(tmp_path / "a").nbytes
        assert handle.save(tmp_path / "a", cache).files_written == 0


@pytest.fixture
def context(tmp_path):
    """A tiny model and a folder with a context of it."""
    model = tiny()
    with torch.inference_mode(), wrap(model, RetrievalConfig(index="flat")) as handle:
        cache = handle.new_cache()
        model(torch.randint(2, 126, (1, 40)), past_key_values=cache)
        handle.save(tmp_path / "a", cache)
    return model, tmp_path / "a"


def test_wrapping_reads_no_rows_and_the_first_cache_refuses_what_is_damaged(context):
    model, folder = context
    path = next(folder.glob("rows-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with wrap(model, context=folder) as handle:
        for _ in range(2):
            with pytest.raises(SnapshotError, match=f"{path.name} is damaged"):
                handle.new_cache()
    path.write_bytes(content[:-1])
    with pytest.raises(SnapshotError, match=path.name):
        wrap(model, context=folder)
    path.unlink()
    with pytest.raises(SnapshotError, match=path.name):
        wrap(model, context=folder)
    wrap(model).unwrap()


def test_a_wrapped_context_is_not_tied_to_its_folder_from_the_first_moment(context):
    model, folder = context
    with wrap(model, context=folder) as handle:
        expected = handle.new_cache().layers[1].keys
    with wrap(model, context=folder) as handle:
        shutil.rmtree(folder)
        assert torch.equal(handle.new_cache().layers[1].keys, expected)


def test_new_caches_of_a_context_share_its_rows_and_not_what_comes_after(tmp_path):
    model = tiny(max_position_embeddings=1024)
    ids, step = torch.randint(2, 126, (1, 700)), torch.tensor([[5]])
    config = RetrievalConfig(index="segmented", window=8, dense_below=0, k=64, audit_rate=0.0)
    with torch.inference_mode():
        with wrap(model, config) as handle:
            model(ids, past_key_values=handle.new_cache())
            handle.save(tmp_path / "a")
        with wrap(model, context=tmp_path / "a") as handle:
            expected = model(step, past_key_values=handle.new_cache()).logits
            first, second = handle.new_cache(), handle.new_cache()
            shared = [cache.layers[0].db.store._shared.pages for cache in (first, second)]
            assert shared[0] is shared[1]
            model(ids[:, :200], past_key_values=first)
            assert torch.equal(model(step, past_key_values=second).logits, expected)
            first.crop(-200)
            assert (first.get_seq_length(), second.get_seq_length()) == (700, 701)
            assert torch.equal(model(step, past_key_values=first).logits, expected)


def test_a_padded_batch_keeps_its_padding(tmp_path):
    model, inputs = tiny(), prompt(2, 60, (13, 0))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], dim=1)
    config = RetrievalConfig(index="flat", **RETRIEVING)
    question = torch.randint(2, 126, (2, 3))
    ids = torch.cat([inputs["input_ids"], question], dim=1)
    with torch.inference_mode(), wrap(model, config) as handle:
        cache = handle.new_cache()
        model(**inputs, past_key_values=cache)
        handle.save(tmp_path / "a", cache)
        expected = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert describe(tmp_path / "a").layers[0].start == (13, 0)
    with torch.inference_mode(), wrap(model, context=tmp_path / "a") as handle:
        ids = torch.cat([handle.context, question], dim=1)
        got = model.generate(ids, attention_mask=mask, past_key_values=handle.new_cache(), **options)
    assert torch.equal(got, expected)


def test_token_ids_follow_the_cache(tmp_path):
    model = tiny()
    ids = torch.randint(2, 126, (2, 40))
    with torch.inference_mode(), wrap(model, RetrievalConfig(index="flat")) as handle:
        with pytest.raises(ValueError, match="no cache"):
            handle.save(tmp_path / "a")
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        cache.crop(-10)
        model(ids[:, :4], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        handle.save(tmp_path / "a")
        with pytest.raises(ValueError, match=r"token_ids have shape \[2, 40\], expected \[2, 34\]"):
            handle.save(tmp_path / "a", cache, token_ids=ids)
        model(inputs_embeds=torch.randn(2, 3, 64), past_key_values=cache)
        with pytest.raises(ValueError, match="37 rows are not known"):
            handle.save(tmp_path / "a")
        model(ids[:, :2], past_key_values=cache)
        with pytest.raises(ValueError, match="39 rows are not known"):
            handle.save(tmp_path / "a")
        with pytest.raises(ValueError, match="layer 0 of the cache has no rows"):
            handle.save(tmp_path / "a", handle.new_cache())
    with wrap(model, context=tmp_path / "a") as handle:
        assert torch.equal(handle.context, torch.cat([ids[:, :30], ids[:, :4]], dim=1)[[1, 1]])


def test_the_context_of_another_model_is_refused_saying_what_differs(tmp_path):
    model = tiny()
    with torch.inference_mode(), wrap(model) as handle:
        cache = handle.new_cache()
        model(torch.randint(2, 126, (1, 40)), past_key_values=cache)
        handle.save(tmp_path / "a", cache)
    trained = tiny()
    trained.model.layers[1].mlp.up_proj.weight.data[3:] += 1e-3
    for other, match in (
        (tiny("qwen2"), "LlamaModel, this is a Qwen2Model"),
        (tiny(num_hidden_layers=3), "num_hidden_layers=2"),
        (tiny(rms_norm_eps=1e-5), "rms_norm_eps"),
        (trained, "weights"),
        (tiny().half(), "weights"),
    ):
        with pytest.raises(SnapshotError, match=match):
            wrap(other, context=tmp_path / "a")
        wrap(other).unwrap()
    with pytest.raises(SnapshotError, match="window=64"):
        wrap(model, RetrievalConfig(window=32), context=tmp_path / "a")
    with pytest.raises(SnapshotError, match="2 layers of a model"):
        AttentionDB.open(tmp_path / "a")
    database("flat", n=9).save(tmp_path / "b")
    with pytest.raises(SnapshotError, match="not a model's context"):
        wrap(model, context=tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        wrap(model, context=tmp_path / "none")
    wrap(model).unwrap()


def test_an_interrupted_call_is_not_saved(tmp_path):
    model = tiny()
    with torch.inference_mode(), wrap(model) as handle:
        cache = handle.new_cache()
        model(torch.randint(2, 126, (1, 40)), past_key_values=cache)
        cache.layers[1].crop(-1)
        with pytest.raises(ValueError, match="layer 1 has 39 rows"):
            handle.save(tmp_path / "a", cache)


def test_opening_a_hundred_megabytes_takes_well_under_a_second(tmp_path):
    db = AttentionDB(3, 64, config=RetrievalConfig(index="flat"))
    db.insert(torch.randn(1, 3, 65536, 64), torch.randn(1, 3, 65536, 64))
    db.save(tmp_path / "a")
    assert describe(tmp_path / "a").nbytes > 100e6
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        opened = AttentionDB.open(tmp_path / "a")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.8
    assert opened.store._buffers is None
    assert torch.equal(opened.store.keys, db.store.keys)
