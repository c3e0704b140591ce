"""Rows kept as int8, float16 or bfloat16: read as they are, and as exact as the type allows."""

import copy
from functools import partial

import conftest
import pytest
import torch
from conftest import BACKENDS, TRITON, real_rows
from test_snapshot import forge, sign
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbattn import AttentionDB, RetrievalConfig, RowSource, StateSource, dense_attention, relative_error
from dbattn.config import INDEX_TRAITS, STORAGES
from dbattn.snapshot import SnapshotError, describe
from dbattn.store import KVStore
from dbattn.store.storage import LARGEST, check_finite
from index_kernels import floats, pack_rows, rotate, top_k
from index_kernels.packed import rotated, scales

INDEXES = sorted(INDEX_TRAITS)
rows = conftest.random_rows
database = partial(conftest.database, window=8, n_sink=2, storage="int8")
# rows, D, Dv, query heads per KV head; the first are aligned to nothing
SHAPES = [(7, 13, 5, 3), (301, 64, 64, 3)]


def packed(rows, dim, seed=0):
    """Packed rows as a store holds them, a view of a longer buffer, rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(2, 3, rows + 5, 1, generator=generator) - 3)
    return pack_rows(torch.randn(2, 3, rows + 5, dim, generator=generator) * sizes)[:, 1:, 2 : rows + 2]


def kept(keys, values, storage="int8"):
    """The rows in float32 as a store keeps them, in the order of their positions."""
    store = KVStore(keys.shape[1], keys.shape[3], values.shape[3], storage)
    store.append(keys, values)
    return store.keys.float(), store.values.float()


def unrotated(keys, values, **options):
    """An int8 database as it was before rows were rotated."""
    db = database(keys[:, :, :0], values[:, :, :0], **options)
    db.store.rotated = False
    db.insert(keys, values)
    return db


class LargestMade(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes: views, and what Numba reads in place, do not count."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if type(t) is torch.Tensor}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


def assert_same_state(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert (a - b)[b.isfinite()].norm() <= 1e-5 * b[b.isfinite()].norm()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_kernels_read_packed_rows_as_the_reference_reads_their_floats(run, backend, shape, softcap):
    n, dim, value_dim, group = shape
    keys, values = packed(n, dim), packed(n, value_dim, seed=1)
    query = torch.randn(2, 2 * group, 1, dim)
    ids = torch.stack([torch.randperm(n) for _ in range(4 * group)]).view(2, 2 * group, 1, n)[..., : n * 2 // 3]
    ids = ids.masked_fill(torch.rand(ids.shape) < 0.2, -1)
    ranges = torch.tensor([[0, n // 3], [n // 2, n]]).expand(2, 2 * group, 1, 2, 2)
    start = torch.tensor([0, n])
    for op, options in (
        ("attend_rows", {"ids": ids, "log_weights": torch.randn(ids.shape)}),
        ("attend_rows", {"ranges": ranges}),
        ("dense_decode", {"start": start}),
        ("dense_decode", {"start": start, "query": torch.randn(2, 2 * group, min(4, n), dim)}),
    ):
        given = {"query": query, "softcap": softcap, **options}
        got = run(backend, op, keys=keys, values=values, **given)
        assert_same_state(got, run("reference", op, keys=floats(keys), values=floats(values), **given))


@pytest.mark.parametrize("backend", ["reference", *TRITON])
def test_exact_search_in_packed_rows_is_that_in_their_floats(run, backend, monkeypatch):
    monkeypatch.setattr("index_kernels.reference.BLOCK", 64)
    keys, query = packed(300, 13), torch.randn(2, 4, 2, 13)
    ids, scores = run(backend, "top_k", query, keys, 40, start=torch.tensor([3, 100]))
    wanted_ids, wanted = top_k(query, floats(keys), 40, start=torch.tensor([3, 100]))
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(scores, wanted)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dense_attention_reads_packed_rows(m, softcap):
    keys, values, query = packed(300, 16), packed(300, 16, seed=1), torch.randn(2, 4, m, 16)
    for start in (None, torch.tensor([0, 120])):
        out = dense_attention(query, keys, values, start=start, softcap=softcap)
        exact = dense_attention(query, floats(keys), floats(values), start=start, softcap=softcap)
        assert relative_error(out, exact).max() < 1e-5


@pytest.mark.parametrize("index", INDEXES)
def test_packed_rows_are_kept_and_read_where_they_lie(index, device, tmp_path):
    keys, values = (part.to(device) for part in rows(2600))
    tolerance = 1e-4 if device == "cpu" else 1e-2
    for k in (2600, 60):
        db = database(keys, values, index=index, k=k)
        db.insert(*(part.to(device) for part in rows(1)))
        assert db.store.rows[0].dtype == torch.int8
        assert db.keys.device.type == device
        for m in (1, 3, 70):
            query = torch.randn(1, 4, m, 16, device=device)
            exact = dense_attention(query, db.keys, db.values)
            if k == 2600 or m == 70:
                assert relative_error(db.attend(query), exact).max() < tolerance
            elif m == 1:
                assert db.audit(query).rows_read < 600
    db.save(tmp_path / "rows")
    again = AttentionDB.open(tmp_path / "rows", config=db.config, device=device)
    assert torch.equal(again.attend(query[:, :, :1]), db.attend(query[:, :, :1]))


@pytest.mark.parametrize("dim", [1, 6, 64, 81])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 3.3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_off_by_half_a_scale_at_most(dim, size, dtype):
    given = (size * (2 * torch.rand(2, 3, 50, dim) - 1)).to(dtype)
    given[0, 0, 0] = size
    given[0, 0, 1] = 0
    # Heads and positions swapped in memory, as a model hands rows over.
    there = pack_rows(given.transpose(1, 2).contiguous().transpose(1, 2))
    assert there.shape == (2, 3, 50, dim + 4)
    check_finite("rows", there)
    error = (floats(there).double() - given.double()).abs()
    assert (error <= 0.5001 * scales(there).double()[..., None]).all()
    assert floats(there).isfinite().all()
    assert (floats(there)[0, 0, 1] == 0).all()


def test_the_largest_float_survives_packing():
    largest = torch.full((1, 1, 1, 8), torch.finfo(torch.float32).max)
    assert floats(pack_rows(largest)).isfinite().all()


def test_a_number_that_the_type_cannot_hold_is_refused_by_name():
    keys, values = rows(20)
    values[0, 1, 7, 3] = 7e4
    for storage in ("bfloat16", "int8"):
        database(keys, values, storage=storage)
    with pytest.raises(ValueError, match=r"values hold 70000\.0 at \[0, 1, 7, 3\]: storage='float16' ends at 65504"):
        database(keys, values, storage="float16")
    with pytest.raises(ValueError, match="storage is 'int4', expected one of float32"):
        RetrievalConfig(storage="int4")


@pytest.mark.parametrize(("storage", "size"), [(None, 4), ("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)])
def test_memory_is_that_of_the_type(storage, size):
    keys, values = rows(3000, dim=64, value_dim=64)
    db = database(keys, values, storage=storage, index="flat")
    assert db.nbytes == 2 * 3000 * 2 * (64 * size + 4 * (storage == "int8"))


def test_bytes_are_counted_as_stored():
    db = database(*rows(3000), index="flat", k=64)
    key, value = 16 + 4, 16 + 4
    report, plan = db.audit(torch.randn(1, 4, 1, 16)), db.explain(torch.randn(1, 4, 1, 16))
    assert report.bytes_dense == 2 * 3000 * (key + value)
    # The keys of both heads but sinks and hot rows are scored; each query head reads its own rows.
    assert report.bytes_read == 2 * (3000 - 10) * key + (2 * 10 + 4 * 64) * (key + value)
    assert plan.sources[0].estimated.bytes == plan.sources[0].actual.bytes == 2 * 10 * (key + value)


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
def test_rows_of_any_float_type_go_into_any_storage(given, storage):
    keys, values = (x.to(given) for x in rows(300))
    db = database(keys, values, storage=storage)
    db.insert(*(x.float() for x in rows(3)))
    dtype = torch.float32 if storage == "int8" else getattr(torch, storage)
    assert db.store.keys.dtype == db.store.values.dtype == dtype
    for m in (1, 4):
        query = torch.randn(1, 4, m, 16).to(given)
        out = db.attend(query, retrieve=False)
        assert out.dtype == given
        exact = dense_attention(query.float(), db.store.keys.float(), db.store.values.float())
        assert relative_error(out.float(), exact).max() < {4: 1e-5, 2: 1e-2}[given.itemsize]


@pytest.mark.parametrize("index", INDEXES)
def test_reading_every_row_equals_dense_over_the_rows_as_kept(index):
    keys, values = rows(1500, batch=2)
    start = torch.tensor([0, 130])
    db = database(keys, values, start, index=index, k=1500, max_queries=8)
    for m in (1, 3):
        query = torch.randn(2, 4, m, 16)
        exact = dense_attention(query, *kept(keys, values), start=start)
        assert relative_error(db.attend(query), exact).max() < 1e-5
        assert 1e-4 < relative_error(exact, dense_attention(query, keys, values, start=start)).mean() < 0.02


@pytest.mark.parametrize("index", INDEXES)
def test_what_happens_to_rows_happens_to_their_scales(index):
    keys, values = rows(2600, batch=2)
    keys *= 10 ** torch.randn(2, 2, 2600, 1).clamp(-1, 0.3)
    at_once = database(keys, values, index=index, k=64)
    pieces = database(keys[:, :, :700], values[:, :, :700], index=index, k=64)
    for lo, hi in ((700, 701), (701, 2000), (2000, 2900)):
        more = [torch.cat([x, x], dim=2)[:, :, lo:hi] for x in (keys, values)]
        pieces.insert(*more)
    pieces.truncate(2600)
    query = torch.randn(2, 4, 1, 16)
    assert all(map(torch.equal, at_once.store.rows, pieces.store.rows))
    assert torch.equal(at_once.attend(query), pieces.attend(query))
    assert at_once.audit(query).relative_error < 1.5

    batch = torch.tensor([1, 0, 1])
    changed = copy.deepcopy(at_once)
    changed.select(batch)
    assert torch.equal(changed.attend(query[batch]), at_once.attend(query)[batch]) or index == "segmented"
    # Back in order, rows are what they would be if they had never been moved.
    changed.release()
    exact = kept(keys, values)
    assert torch.equal(changed.store.keys, exact[0][batch])
    assert torch.equal(changed.store.values, exact[1][batch])


@pytest.mark.parametrize("index", [*INDEXES, "dense"])
def test_a_decode_step_makes_no_floats_of_all_rows(index, monkeypatch):
    monkeypatch.setattr("index_kernels.reference.BLOCK", 1024)
    keys, values = rows(6000)
    options = {"index": "segmented", "dense_below": 10**6} if index == "dense" else {"index": index, "k": 64}
    db = database(keys, values, **options)
    query = torch.randn(1, 4, 1, 16)
    with LargestMade() as made:
        db.attend(query)
    # Exact search sorts a logit for each head and row; the keys become floats block by block.
    assert made.nbytes < (250_000 if index == "flat" else 100_000)
    with LargestMade() as made:
        floats(db.store.rows[0])
    assert made.nbytes == 6000 * 2 * 16 * 4


@pytest.mark.parametrize("index", INDEXES)
def test_a_snapshot_keeps_packed_rows_bit_for_bit(index, tmp_path):
    keys, values = rows(2600)
    db = database(keys, values, index=index, k=64)
    db.save(tmp_path / "a")
    opened = AttentionDB.open(tmp_path / "a")
    query = torch.randn(1, 4, 1, 16)
    assert opened.store.rows[0].dtype == torch.int8
    assert all(map(torch.equal, opened.store.rows, db.store.rows))
    assert torch.equal(opened.attend(query), db.attend(query))
    for each in (db, opened):
        each.insert(keys[:, :, :500], values[:, :, :500])
    assert torch.equal(opened.attend(query), db.attend(query))
    with pytest.raises(SnapshotError, match="saved with storage='int8', asked for is None"):
        AttentionDB.open(tmp_path / "a", config=RetrievalConfig(**{**db.config.to_dict(), "storage": None}))


def test_a_snapshot_whose_rows_are_not_what_it_says_is_refused(tmp_path):
    db = database(*rows(100), index="flat")
    for name, there in (("a", None), ("b", "float32")):
        db.save(tmp_path / name)
        sign(tmp_path / name, lambda data, there=there: data["config"].update(storage=there))
        with pytest.raises(SnapshotError, match=f"layer 0 has dtype int8 under storage={there!r}"):
            AttentionDB.open(tmp_path / name)
    db.save(tmp_path / "c")
    nan = torch.tensor([float("nan")]).view(torch.int8)
    forged = forge(tmp_path / "c", "rows", lambda tensors: tensors["layer.0.keys"][0, 1, 7, 16:].copy_(nan))
    with pytest.raises(SnapshotError, match=rf"{forged} is refused: keys hold the scale nan at \[0, 1, 7\]"):
        AttentionDB.open(tmp_path / "c")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 3e38])
def test_a_scale_that_is_none_is_refused(scale):
    there = pack_rows(torch.randn(1, 2, 9, 13))
    there[0, 1, 4, 13:] = torch.tensor([scale]).view(torch.int8)
    with pytest.raises(ValueError, match=r"keys hold the scale .* at \[0, 1, 4\]"):
        check_finite("keys", there)


@pytest.mark.parametrize(("storage", "mean"), [("int8", 0.01), ("bfloat16", 0.005), ("float16", 1e-6)])
@pytest.mark.parametrize("layer", [8, 22])
def test_what_a_storage_adds_to_the_error_on_real_rows(storage, mean, layer):
    """The rows were captured as float16, so that type adds nothing here."""
    query, keys, values = real_rows(layer)
    errors = relative_error(dense_attention(query, *kept(keys, values, storage)), dense_attention(query, keys, values))
    print(f"layer {layer}, {storage}: relative error {errors.mean():.5f}, largest {errors.max():.5f}")
    assert errors.mean() < mean
    assert errors.max() < 4 * mean


@pytest.mark.parametrize("layer", [8, 22])
def test_retrieval_from_packed_rows_errs_like_that_from_floats(layer):
    query, keys, values = real_rows(layer)
    query = query[:, :, -1:]
    exact = dense_attention(query, keys, values)
    errors = {
        storage: relative_error(database(keys, values, k=320, storage=storage).attend(query), exact).mean()
        for storage in ("float32", "int8")
    }
    print(f"layer {layer}: {errors}")
    assert errors["int8"] < errors["float32"] + 0.03


@pytest.mark.parametrize("dim", [1, 6, 13, 64, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_rotation_is_hadamards_matrix_in_blocks_and_undoes_itself(dim, dtype):
    block = next(size for size in (256, 64, 32, 2, 1) if dim % size == 0)
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    given = torch.randn(2, 7, 3, dim).to(dtype).transpose(1, 2)
    before, turned = given.clone(), rotate(given)
    expected = given.float() @ torch.block_diag(*[matrix / block**0.5] * (dim // block))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(turned), given.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(given, before)
    # Rows are what they are however many come at once, and whichever kernel turns them.
    assert torch.equal(rotate(given[:, 1:2, 4:5]), turned[:, 1:2, 4:5])
    assert torch.equal(rotated(given), turned)
    assert rotate(given[:, :, :0]).shape == (2, 3, 0, dim)


@pytest.mark.parametrize("dim", [6, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", TRITON)
def test_a_gpu_turns_and_packs_rows_as_the_specification_does(run, backend, dtype, dim):
    given = torch.randn(2, 7, 3, dim).to(dtype).transpose(1, 2)
    given[0, 1, 2] = 0
    turned, there = run(backend, "rotate", given), run(backend, "pack_rotated", given)
    torch.testing.assert_close(turned, rotated(given), atol=2e-5, rtol=2e-5)
    wanted = pack_rows(rotated(given))
    torch.testing.assert_close(scales(there), scales(wanted), atol=0, rtol=1e-4)
    off = (there - wanted)[..., :dim].abs()
    assert off.max() <= 1, "a number half way between two may become either"
    assert off.float().mean() < 0.01
    assert not there[0, 1, 2, :dim].any()
    given[1, 2, 5, 3] = float("nan")
    with pytest.raises(ValueError, match=r"rows hold the scale nan at \[1, 2, 5\]"):
        check_finite("rows", run(backend, "pack_rotated", given))
    assert run(backend, "pack_rotated", given[:, :, :0]).shape == (2, 3, 0, dim + 4)


@pytest.mark.parametrize("index", INDEXES)
def test_a_few_large_channels_do_not_cost_the_others_their_precision(index):
    """As keys of Gemma and Qwen have them: one scale for all numbers of a row would round the others away."""
    keys, values = conftest.random_rows(1200, dim=64)
    keys[..., 5] += 40
    values[..., 7] += 20
    query = torch.randn(1, 6, 1, 64)
    query[..., 5] = 0
    exact = dense_attention(query, keys, values)
    errors = [
        float(relative_error(make(keys, values, index=index, k=1200).attend(query), exact).mean())
        for make in (database, unrotated)
    ]
    print(errors)
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("retrieve", [True, False])
def test_what_comes_with_a_call_meets_rows_as_kept(index, m, retrieve):
    keys, values = rows(1500, batch=2)
    db = database(keys, values, index=index, k=1500, max_queries=8)
    far, query, sink = rows(40, batch=2), torch.randn(2, 4, m, 16), torch.randn(4)
    here = [torch.cat(parts, dim=2) for parts in zip(far, kept(keys, values), strict=True)]
    options = {"softcap": 4.0, "return_lse": True}
    wanted = dense_attention(query, *here, **options)
    for extra in (RowSource(*far), RowSource(*(x.half() for x in far)), RowSource(*(pack_rows(x) for x in far))):
        for got, exact in zip(db.attend(query, extra=extra, retrieve=retrieve, **options), wanted, strict=True):
            torch.testing.assert_close(got, exact, atol=5e-3, rtol=5e-3)
    # A state over the same rows says the same, to float32's rounding.
    log_weights = torch.zeros(m, 40)
    by_rows = db.attend(query, extra=RowSource(*far, log_weights), sink_logits=sink, retrieve=retrieve, **options)
    state = StateSource(*RowSource(*far, log_weights).state(query, scale=0.25, softcap=4.0))
    by_state = db.attend(query, extra=state, sink_logits=sink, retrieve=retrieve, **options)
    for one, other in zip(by_rows, by_state, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", INDEXES)
def test_search_and_weights_are_those_of_the_rows_as_kept(index):
    keys, values = rows(900)
    db = database(keys, values, index=index, k=900)
    query = torch.randn(1, 4, 1, 16)
    grouped = db.keys.repeat_interleave(2, dim=1)
    logits = (query @ grouped.transpose(2, 3)) / 4
    torch.testing.assert_close(db.search(query, 5).scores, logits.topk(5).values)
    torch.testing.assert_close(db.weights(query), logits.softmax(dim=-1)[:, :, 0])


@pytest.mark.parametrize("index", ["segmented", "ivf", "hnsw"])
def test_what_queries_teach_is_the_same_whatever_rows_are_kept_as(index):
    keys, values = rows(2400)
    # Along four numbers queries are large: only there must lists tell keys apart.
    queries = torch.randn(1, 4, 2400, 16) * torch.tensor([4.0] * 4 + [0.2] * 12)
    metrics, masses = [], []
    for storage in ("float32", "int8"):
        config = RetrievalConfig(index=index, k=64, dense_below=0, n_sink=2, window=8, storage=storage)
        db = AttentionDB(2, 16, config=config)
        db.insert(keys, values, queries)
        metrics.append(db.store.sample.metric(1024, db.store.start, 2)[0])
        masses.append(sum(db.audit(queries[:, :, i : i + 1]).attention_mass for i in range(8)) / 8)
    torch.testing.assert_close(rotate(rotate(metrics[1]).transpose(2, 3)), metrics[0], atol=1e-4, rtol=1e-4)
    assert abs(masses[1] - masses[0]) < 0.03


@pytest.mark.parametrize("index", INDEXES)
def test_a_snapshot_from_before_rows_were_rotated_answers_as_it_did(index, tmp_path):
    keys, values = rows(2600)
    old, new = (make(keys, values, index=index, k=64) for make in (unrotated, database))
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    marks = [describe(tmp_path / name).layers[0].to_dict().get("rotated") for name in ("old", "new")]
    assert marks == [None, True]
    opened = AttentionDB.open(tmp_path / "old")
    query = torch.randn(1, 4, 1, 16)
    assert torch.equal(opened.attend(query), old.attend(query))
    assert torch.equal(opened.keys, old.keys)
    for db in (old, opened):
        db.insert(keys[:, :, :500], values[:, :, :500])
    assert torch.equal(opened.attend(query), old.attend(query))
    assert relative_error(opened.keys[:, :, 2600:], keys[:, :, :500]).max() < 0.02
    opened.save(tmp_path / "old")
    assert "rotated" not in (tmp_path / "old" / "manifest.json").read_text()
    assert "kept as int8\n" in str(opened.explain(query))
    assert "rows kept as int8, rotated\n" in str(AttentionDB.open(tmp_path / "new").explain(query))
    # Emptied, it is as new.
    opened.truncate(0)
    opened.insert(keys, values)
    assert torch.equal(opened.attend(query), new.attend(query))


def test_a_manifest_that_says_of_other_rows_that_they_are_rotated_is_refused(tmp_path):
    for name, storage, mark in (("a", "int8", False), ("b", "int8", 1), ("c", "float16", True), ("d", None, True)):
        database(*rows(50), index="flat", storage=storage).save(tmp_path / name)
        sign(tmp_path / name, lambda data, mark=mark: data["layers"][0].update(rotated=mark))
        with pytest.raises(SnapshotError, match=r"layers\[0\].rotated is .*, expected true with int8"):
            AttentionDB.open(tmp_path / name)


@pytest.mark.parametrize("index", INDEXES)
def test_rows_as_large_as_they_may_be_survive_a_snapshot(index, tmp_path):
    """All numbers alike are one number once rotated, four times as large."""
    keys, values = (torch.full((1, 2, 300, 16), LARGEST) for _ in range(2))
    keys[:, :, :, 3:] *= -1
    keys[:, :, 1::2] *= 0.5
    db = database(keys, values, index=index, k=16)
    db.save(tmp_path / "a")
    answer = AttentionDB.open(tmp_path / "a").attend(torch.zeros(1, 4, 1, 16))
    assert relative_error(answer, values[:, :, :1].repeat_interleave(2, dim=1)).max() < 0.01
    larger = torch.tensor([2 * LARGEST / 127]).view(torch.int8)

    def forged(tensors):
        tensors["layer.0.keys"][0, 1, 7] = 127
        tensors["layer.0.keys"][0, 1, 7, 16:] = larger

    forge(tmp_path / "a", "segment" if index == "segmented" else "rows", forged)
    with pytest.raises(SnapshotError, match=r"keys hold 1\..*e\+08 at \[0, 1, 7, 0\], expected at most 1e\+08"):
        AttentionDB.open(tmp_path / "a")


def test_buffers_hold_an_eighth_more_than_the_rows_at_most():
    keys, values = torch.randn(2, 1, 2, 3000, 16).unbind()
    store = KVStore(2, 16, 16)
    at = 0
    for chunk in (1, 700, 1, 64, 1500, 1, 733):
        store.append(keys[:, :, at : at + chunk], values[:, :, at : at + chunk])
        at += chunk
        held = store.nbytes // store.row_bytes // 2
        assert at <= held <= at + max(at // 8, 64)
    torch.testing.assert_close(store.keys, keys)
