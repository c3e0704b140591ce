"""Bad input raises at the door, says what was received, and leaves nothing half-done."""

import pytest
import torch
from conftest import database, random_rows

from dbattn import AttentionDB, RetrievalConfig, dense_attention
from dbattn.config import INDEX_TRAITS
from dbattn.store.storage import LARGEST, check_finite


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def filled(n=100):
    return database(*random_rows(n, dim=8), index="flat")


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (rows(1, 2, 8), rows(1, 2, 8), r"keys have shape \[1, 2, 8\], expected \[1, 2, n, 8\]"),
        (rows(1, 3, 4, 8), rows(1, 3, 4, 8), r"keys have shape \[1, 3, 4, 8\]"),
        (rows(1, 2, 4, 9), rows(1, 2, 4, 8), r"keys have shape \[1, 2, 4, 9\]"),
        (rows(1, 2, 4, 8), rows(1, 2, 4, 9), r"values have shape \[1, 2, 4, 9\]"),
        (rows(2, 2, 4, 8), rows(2, 2, 4, 8), r"expected \[1, 2, n, 8\]"),
        (rows(1, 2, 4, 8), rows(1, 2, 5, 8), "differ in batch, heads or rows"),
        (rows(1, 2, 4, 8).int(), rows(1, 2, 4, 8), r"keys have dtype torch\.int32"),
        (rows(1, 2, 4, 8).half(), rows(1, 2, 4, 8).half(), r"the store holds torch\.float32"),
        (rows(1, 2, 4, 8, dtype=torch.float64), rows(1, 2, 4, 8, dtype=torch.float64), r"float64"),
        (rows(1, 2, 4, 8).to("meta"), rows(1, 2, 4, 8).to("meta"), "on meta"),
        (
            rows(1, 2, 4, 8).index_fill(2, torch.tensor([2]), float("nan")),
            rows(1, 2, 4, 8),
            r"keys hold nan at \[0, 0, 2, 0\]",
        ),
        (rows(1, 2, 4, 8), rows(1, 2, 4, 8).index_fill(2, torch.tensor([3]), float("inf")), "values hold inf"),
    ],
)
def test_insert_refuses_and_keeps_the_store(keys, values, message):
    db = filled()
    before = db.store.keys.clone()
    with pytest.raises(ValueError, match=message):
        db.insert(keys, values)
    assert len(db) == 100
    assert torch.equal(db.store.keys, before)


def test_a_sum_that_overflows_is_not_mistaken_for_infinity():
    check_finite("rows", torch.full((1, 1, 100, 4), 3e38))


@pytest.mark.parametrize("index", sorted(INDEX_TRAITS))
@pytest.mark.parametrize("size", [1e10, 1e19, 1e37])
def test_rows_too_large_for_products_in_float32_are_refused_and_the_store_is_as_before(index, size):
    keys, values, query = rows(1, 2, 1500, 16), rows(1, 2, 1500, 16), rows(1, 4, 1, 16)
    db = database(keys, values, index=index, k=16)
    before, indexed = db.attend(query), len(db.index)
    for name, given in (("keys", (keys * size, values)), ("values", (keys, values * size))):
        with pytest.raises(ValueError, match=rf"{name} hold .* at \[0, 0, .*\], expected at most 1e\+08 in size"):
            db.insert(*given)
        assert (len(db), len(db.index)) == (1500, indexed)
        assert torch.equal(db.attend(query), before)
    with pytest.raises(ValueError, match="query hold"):
        db.attend(query * size)


@pytest.mark.parametrize("index", sorted(INDEX_TRAITS))
def test_rows_as_large_as_they_may_be_are_answered_like_dense(index):
    keys = LARGEST * torch.nn.functional.normalize(rows(1, 2, 1500, 16), dim=-1)
    values = LARGEST * rows(1, 2, 1500, 16).clamp(-1, 1)
    db = database(keys, values, index=index, k=16, tail="none")
    query = keys[:, :, 700:701].repeat_interleave(2, dim=1)
    # One row takes all the weight: the one that the query points at.
    expected = values[:, :, 700:701].repeat_interleave(2, dim=1)
    answer = db.attend(query)
    assert answer.isfinite().all()
    if index != "segmented":  # whose one list of 16 rows is chosen by means and variances
        torch.testing.assert_close(answer, expected)
    assert db.search(query, 1).ids.flatten().tolist() == 4 * [700]
    torch.testing.assert_close(dense_attention(query, keys, values), expected)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (rows(1, 4, 8), r"query has shape \[1, 4, 8\], expected \[1, Hq, m, 8\]"),
        (rows(2, 4, 1, 8), r"expected \[1, Hq, m, 8\]"),
        (rows(1, 4, 1, 9), r"expected \[1, Hq, m, 8\]"),
        (rows(1, 3, 1, 8), "3 query heads do not divide into groups over 2 KV heads"),
        (rows(1, 4, 0, 8), "0 positions, expected 1 to 100"),
        (rows(1, 4, 101, 8), "101 positions, expected 1 to 100"),
        (rows(1, 4, 1, 8).double(), "float64"),
        (rows(1, 4, 1, 8).to("meta"), "meta"),
        (torch.full((1, 4, 1, 8), float("nan")), "query hold nan"),
    ],
)
def test_queries_that_do_not_fit(query, message):
    db = filled()
    for call in (db.attend, db.audit, db.explain, lambda q: db.search(q, 3)):
        with pytest.raises(ValueError, match=message):
            call(query)


def test_an_empty_store_says_so_and_inserting_nothing_is_fine():
    db = AttentionDB(2, 16)
    with pytest.raises(ValueError, match="the store is empty"):
        db.attend(rows(1, 4, 1, 16))
    db.insert(rows(1, 2, 0, 16), rows(1, 2, 0, 16))
    assert len(db) == 0
    with pytest.raises(ValueError, match=r"expected 1 to 0"):
        db.attend(rows(1, 4, 1, 16))
    db.truncate(0)
    db.insert(rows(1, 2, 3, 16), rows(1, 2, 3, 16))
    assert db.attend(rows(1, 4, 1, 16)).shape == (1, 4, 1, 16)


@pytest.mark.parametrize("k", [0, -3, 2.5, True, "8"])
def test_k_must_be_a_positive_integer(k):
    with pytest.raises(ValueError, match=r"k is .* expected an integer of at least 1"):
        RetrievalConfig(k=k)
    with pytest.raises(ValueError, match=r"k is .* expected an integer of at least 1"):
        filled().search(rows(1, 4, 1, 8), k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "annoy"}, "index is 'annoy', expected one of auto, flat, ivf, hnsw"),
        ({"index": "flat", "nprobe": 4}, "nprobe=4 is an option of index='ivf', but index is 'flat'"),
        ({"index": "ivf", "ef_search": 4}, "ef_search=4 is an option of index='hnsw'"),
        ({"nprobe": 4}, "nprobe=4 is an option of index='ivf', but index is 'auto'"),
        ({"index": "ivf", "nprobe": 0}, "nprobe is 0"),
        ({"index": "hnsw", "neighbors": 1}, "neighbors is 1, expected an integer of at least 2"),
        ({"window": 0}, "window is 0"),
        ({"n_sink": -1}, "n_sink is -1"),
        ({"audit_rate": 1.5}, "audit_rate is 1.5"),
        ({"audit_rate": float("nan")}, "audit_rate is nan"),
        ({"max_queries": 0}, "max_queries is 0"),
        ({"dense_below": -1}, "dense_below is -1"),
        ({"index": "hnsw", "ef_search": 2**31}, "ef_search is 2147483648, .* at least 1 and at most 2147483647"),
        ({"index": "ivf", "nprobe": 2**31}, "nprobe is 2147483648, .* at least 1 and at most 2147483647"),
        ({"index": "hnsw", "neighbors": 2**31}, "neighbors is 2147483648, .* at least 2 and at most 1024"),
        ({"n_sink": 2**31}, "n_sink is 2147483648, .* at least 0 and at most 2147483647"),
        ({"k": 2**63}, f"k is {2**63}, .* at most {2**63 - 1}"),
        ({"window": 2**63}, f"window is {2**63}"),
        ({"max_queries": 2**63}, f"max_queries is {2**63}"),
        ({"dense_below": 2**63}, f"dense_below is {2**63}, .* at most {2**63 - 1}, or 'auto'"),
    ],
)
def test_config_names_option_value_and_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"index": "hnsw", "ef_search": 2**31 - 1},
        {"index": "hnsw", "neighbors": 1024},
        {"index": "ivf", "nprobe": 2**31 - 1},
        *({"index": index, "k": 2**63 - 1} for index in sorted(INDEX_TRAITS)),
        {"n_sink": 2**31 - 1},
        {"window": 2**63 - 1, "max_queries": 2**63 - 1},
        {"dense_below": 2**63 - 1},
    ],
)
def test_options_as_large_as_they_may_be_are_served(options):
    keys, values, query = rows(1, 2, 1500, 16), rows(1, 2, 1500, 16), rows(1, 4, 1, 16)
    db = database(keys, values, torch.tensor([3]), **{"k": 16, **options})
    assert db.attend(query).isfinite().all()
    assert db.weights(query).sum().item() == pytest.approx(4.0, abs=1e-4)
    assert db.search(query, 2000).ids.shape == (1, 4, 1, 2000)
    with pytest.raises(ValueError, match=f"k is {2**63}"):
        db.search(query, 2**63)


@pytest.mark.parametrize(
    ("arguments", "name"), [((0, 8), "num_kv_heads"), ((2, -1), "head_dim"), ((2, 8.0), "head_dim")]
)
def test_sizes_must_be_positive_integers(arguments, name):
    with pytest.raises(ValueError, match=name):
        AttentionDB(*arguments)
    with pytest.raises(ValueError, match="value_dim"):
        AttentionDB(2, 8, value_dim=0)


@pytest.mark.parametrize("length", [-1, 601, 3.0, True, None])
def test_truncate_checks_its_length_before_anything_changes(length):
    db = filled(600)
    with pytest.raises(ValueError, match=f"length is {length}, expected an integer from 0 to 600"):
        db.truncate(length)
    assert len(db) == len(db.index) == 600


def test_start_is_checked_and_a_refused_insert_leaves_no_rows():
    db = AttentionDB(1, 4)
    for start in (
        torch.tensor([0]),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([[0, 1]]),
        torch.tensor([-1, 0]),
    ):
        with pytest.raises(ValueError, match="start is"):
            db.insert(rows(2, 1, 5, 4), rows(2, 1, 5, 4), start=start)
        assert len(db) == 0
    db.insert(rows(2, 1, 5, 4), rows(2, 1, 5, 4), start=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"differs from \[0, 2\] for rows that are stored"):
        db.insert(rows(2, 1, 5, 4), rows(2, 1, 5, 4), start=torch.tensor([0, 3]))
    assert len(db) == 5


def test_a_row_that_was_all_padding_may_start_later():
    db = AttentionDB(1, 16)
    db.insert(rows(2, 1, 5, 16), rows(2, 1, 5, 16), start=torch.tensor([0, 5]))
    assert db.attend(rows(2, 2, 1, 16))[1].eq(0).all()
    db.insert(rows(2, 1, 5, 16), rows(2, 1, 5, 16), start=torch.tensor([0, 8]))
    assert db.store.start.tolist() == [0, 8]
    with pytest.raises(ValueError, match="differs"):
        db.insert(rows(2, 1, 5, 16), rows(2, 1, 5, 16), start=torch.tensor([0, 9]))


@pytest.mark.parametrize("m", [1, 2])
def test_dense_attention_checks_its_input_whatever_the_number_of_queries(m):
    query, rows_8 = rows(1, 2, m, 8), rows(1, 2, 9, 8)
    for bad in (
        (query.double(), rows_8, rows_8),
        (query, rows_8, rows_8[:, :1]),
        (query, rows_8, rows_8[0]),
        (query, rows(1, 2, 9, 7), rows_8),
        (query[:, :1], rows_8, rows_8),
    ):
        with pytest.raises(ValueError, match=r"dtype|shape|differ|divide"):
            dense_attention(*bad)
    with pytest.raises(ValueError, match="start is"):
        dense_attention(query, rows_8, rows_8, start=torch.tensor([0.0]))


def test_running_out_of_memory_while_growing_leaves_keys_and_values_alike(monkeypatch):
    db = filled()
    grown, calls = db.store._grown, []

    def fails_for_values(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return grown(*args)

    monkeypatch.setattr(db.store, "_grown", fails_for_values)
    with pytest.raises(MemoryError):
        db.insert(rows(1, 2, 200, 8), rows(1, 2, 200, 8))
    monkeypatch.undo()
    more = rows(1, 2, 1, 8)
    db.insert(more, more)
    assert db.store.keys.shape == db.store.values.shape == (1, 2, 101, 8)
    assert torch.equal(db.store.values[:, :, -1:], more)


def test_dense_attention_needs_the_querys_own_rows():
    with pytest.raises(ValueError, match=r"expected m <= T"):
        dense_attention(rows(1, 2, 9, 8), rows(1, 2, 8, 8), rows(1, 2, 8, 8))
    with pytest.raises(ValueError, match="sink_logits have shape"):
        filled().attend(rows(1, 4, 1, 8), sink_logits=torch.zeros(3))
