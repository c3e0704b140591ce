"""Every operator: each backend against the reference, and the reference against the formulas."""

import pytest
import torch
from conftest import BACKENDS, TRITON
from hypothesis import given, settings
from hypothesis import strategies as st

from index_kernels import attend_rows, dense_decode, merge_states, resolve_backend, top_k

# The bound of every dtype: backends read the same rounded rows, and all arithmetic and all results are float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(heads, length, dim, dtype=torch.float32, batch=2, seed=0):
    """Rows as a store holds them: a view of a longer and wider buffer, so only the last dimension is contiguous."""
    buffer = torch.full((batch, heads + 1, length + 5, dim + 3), float("nan"), dtype=dtype)
    view = buffer[:, 1:, 2 : length + 2, :dim]
    view.copy_(torch.randn(view.shape, generator=rng(seed)))
    return view


def integers(*shape, seed=0):
    """Small integers as floats: their dot products are exact in any order, so ties are ties on every backend."""
    return torch.randint(-2, 3, shape, generator=rng(seed)).float()


def random_ids(batch, heads, m, length, n):
    """Distinct rows per query, about one in five of them missing."""
    ids = torch.rand(batch, heads, m, length, generator=rng(1)).argsort(dim=-1)[..., :n]
    return ids.masked_fill(torch.rand(ids.shape, generator=rng(2)) < 0.2, -1)


def assert_close(got, wanted, dtype=torch.float32):
    """Equal non-finite entries, and a relative RMS of the finite ones within the tolerance."""
    assert got.dtype == torch.float32
    finite = wanted.isfinite()
    assert torch.equal(got[~finite], wanted[~finite])
    assert got[finite].isfinite().all()
    error = (got - wanted)[finite].norm() / wanted[finite].norm().clamp(min=1e-30)
    assert error <= TOLERANCE[dtype], f"relative RMS {error:.2e} over {TOLERANCE[dtype]:.0e}"


def assert_same_state(got, wanted, dtype=torch.float32):
    assert_close(got[0], wanted[0], dtype)
    assert_close(got[1], wanted[1], dtype)


# batch, query heads, KV heads, m, rows, D, Dv, dtype
SHAPES = [
    (1, 1, 1, 1, 1, 64, 64, torch.float32),
    (2, 3, 1, 1, 7, 13, 5, torch.float32),
    (1, 4, 1, 2, 300, 13, 64, torch.float16),
    (2, 4, 4, 1, 200, 80, 48, torch.bfloat16),
    (1, 6, 2, 3, 200, 128, 128, torch.float32),
    (1, 1, 1, 1, 1100, 64, 64, torch.float32),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weighted", "softcap"), [(False, None), (True, 5.0)])
@pytest.mark.parametrize("source", ["ids", "ranges"])
def test_attend_rows_equals_the_reference(run, backend, shape, weighted, softcap, source):
    batch, heads, kv_heads, m, length, dim, value_dim, dtype = shape
    query = torch.randn(batch, heads, m, dim, generator=rng(3)).to(dtype)
    keys, values = (
        rows_of(kv_heads, length, dim, dtype, batch),
        rows_of(kv_heads, length, value_dim, dtype, batch, seed=4),
    )
    if source == "ids":
        rows = {"ids": random_ids(batch, heads, m, length, max(1, length * 2 // 3))}
    else:
        cuts = torch.tensor([0, 0.1, 0.1, 0.5, 0.6, 0.9]).mul(length).long()
        stops = torch.tensor([0.1, 0.1, 0.3, 0.55, 0.4, 1]).mul(length).long()
        shift = torch.arange(m)[:, None] % 2
        rows = {"ranges": torch.stack([cuts + shift, stops.expand(m, 6)], dim=-1).expand(batch, heads, m, 6, 2)}
    log_weights = torch.randn(next(iter(rows.values())).shape[:4], generator=rng(5)) if weighted else None
    options = {**rows, "log_weights": log_weights, "softcap": softcap}
    assert_same_state(
        run(backend, "attend_rows", query, keys, values, **options),
        attend_rows(query, keys, values, **options, backend="reference"),
        dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows",
    [
        {"ids": torch.empty(1, 4, 2, 0, dtype=torch.int64)},
        {"ids": torch.tensor(-1).expand(1, 4, 2, 9)},
        {"ranges": torch.empty(1, 4, 2, 0, 2, dtype=torch.int64)},
        {"ranges": torch.tensor([[3, 3], [9, 2]]).expand(1, 4, 2, 2, 2)},
    ],
    ids=["no ids", "all ids missing", "no ranges", "empty ranges"],
)
def test_no_rows_give_the_neutral_state(run, backend, rows):
    query, keys = torch.randn(1, 4, 2, 16), rows_of(2, 20, 16, batch=1)
    for name in (backend, "reference"):
        out, lse = run(name, "attend_rows", query, keys, keys, **rows)
        assert torch.equal(out, torch.zeros(1, 4, 2, 16))
        assert torch.equal(lse, torch.full((1, 4, 2), float("-inf")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_arguments_are_read_with_their_strides(run, backend):
    query = torch.randn(1, 2, 4, 16).transpose(1, 2)
    keys = torch.randn(1, 2, 40, 16)
    ids, weights = torch.arange(40).expand(1, 4, 2, 40)[..., ::3], torch.randn(4, 1, 1).expand(1, 4, 2, 14)
    wanted = attend_rows(query, keys, keys, ids=ids.contiguous(), log_weights=weights.contiguous(), backend="reference")
    assert_same_state(run(backend, "attend_rows", query, keys, keys, ids=ids, log_weights=weights), wanted)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "m", "length", "dim", "k", "start", "stop"),
    [
        (1, 1, 1, 1, 13, 1, None, None),
        (2, 1, 2, 7, 64, 10, [4, 0], [3, 7]),
        (4, 2, 1, 300, 13, 600, [250, 0], [299]),
        (2, 2, 1, 200, 80, 7, [190, 20], [195]),
        (1, 1, 1, 1100, 16, 40, None, None),
        (1, 1, 2, 5000, 4, 4096, [3, 9], [4500, 5000]),
        (1, 1, 1, 0, 8, 3, None, None),
    ],
)
def test_top_k_ids_are_exact_with_many_ties(run, backend, heads, kv_heads, m, length, dim, k, start, stop):
    query, keys = integers(2, heads, m, dim, seed=6), integers(2, kv_heads, length, dim, seed=7)
    bounds = {"start": start and torch.tensor(start), "stop": stop and torch.tensor(stop), "scale": 0.5}
    ids, scores = run(backend, "top_k", query, keys, k, **bounds)
    wanted_ids, wanted_scores = top_k(query, keys, k, **bounds, backend="reference")
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(scores, wanted_scores)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_top_k_scores_equal_the_reference(run, backend, dtype):
    query, keys = torch.randn(1, 2, 1, 80, generator=rng(8)).to(dtype), rows_of(1, 300, 80, dtype, batch=1)
    ids, scores = run(backend, "top_k", query, keys, 50)
    wanted_ids, wanted_scores = top_k(query, keys, 50, backend="reference")
    assert_close(scores, wanted_scores, dtype)
    assert torch.equal(ids, wanted_ids), "the scores of this seed are further apart than rounding"


@pytest.mark.parametrize("backend", TRITON)
def test_minus_zero_ties_with_zero(run, backend):
    keys = torch.tensor([-1e-30, 1e-30, -1.0, -1e-30, 1.0])[None, None, :, None]
    for name in (backend, "reference"):
        # Only a product that underflows still has its sign: a sum that starts from 0.0 is never -0.0.
        ids, _ = run(name, "top_k", torch.ones(1, 1, 1, 1), keys, 5, scale=1e-30)
        assert ids.flatten().tolist() == [4, 0, 1, 3, 2]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(("states", "value_dim"), [(1, 7), (2, 64), (5, 80), (33, 13)])
def test_merge_states_equals_the_reference(run, backend, states, value_dim):
    outs, lses = torch.randn(states, 2, 3, 2, value_dim), torch.randn(states, 2, 3, 2) * 20
    lses[0, 0] = float("-inf")
    lses[:, 1, 1] = float("-inf")
    outs[lses == float("-inf")] = 0
    assert_same_state(run(backend, "merge_states", outs, lses), merge_states(outs, lses, backend="reference"))


def naive_state(query, keys, values, weights, softcap=None):
    """The formula in float64: softmax of the logits plus log-weights over all rows, keys repeated per query head."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    logits = query.double() @ keys.mT / query.shape[-1] ** 0.5
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) + weights.double()
    return (logits.softmax(dim=-1) @ values).float(), logits.logsumexp(dim=-1).float()


@pytest.mark.parametrize("heads", [2, 6, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_reference_is_weighted_softmax_attention(heads, softcap):
    query, keys, values = torch.randn(2, heads, 3, 13), rows_of(2, 30, 13), rows_of(2, 30, 7, seed=1)
    row_weights, range_weights = torch.randn(2, heads, 3, 30), torch.randn(2, heads, 3, 3)
    every = torch.stack([torch.randperm(30) for _ in range(2 * heads * 3)]).view(2, heads, 3, 30)
    ranges = torch.tensor([[20, 30], [0, 1], [1, 20]])
    by_id = {"ids": every, "log_weights": row_weights.gather(-1, every)}
    by_range = {"ranges": ranges.expand(2, heads, 3, 3, 2), "log_weights": range_weights}
    spread = range_weights[..., [1]], range_weights[..., [2]], range_weights[..., [0]]
    per_row = torch.cat([w.expand(2, heads, 3, n) for w, n in zip(spread, (1, 19, 10), strict=True)], dim=-1)
    for rows, weights in ((by_id, row_weights), (by_range, per_row)):
        state = attend_rows(query, keys, values, **rows, softcap=softcap, backend="reference")
        assert_same_state(state, naive_state(query, keys, values, weights, softcap))


def test_the_reference_top_k_is_a_sort_of_the_visible_rows():
    query, keys = integers(2, 4, 3, 5), integers(2, 2, 40, 5, seed=1)
    start, stop = torch.tensor([0, 11]), torch.tensor([10, 25, 40])
    ids, scores = top_k(query, keys, 12, scale=1.0, start=start, stop=stop, backend="reference")
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(3)).tolist():
        logits = (keys[b, h // 2] @ query[b, h, i]).tolist()
        wanted = sorted(range(int(start[b]), int(stop[i])), key=lambda row, logits=logits: (-logits[row], row))[:12]
        missing = 12 - len(wanted)
        assert ids[b, h, i].tolist() == wanted + [-1] * missing
        assert scores[b, h, i].tolist() == [logits[row] for row in wanted] + [float("-inf")] * missing


@settings(deadline=None, max_examples=50)
@given(parts=st.lists(st.integers(0, 5), min_size=1, max_size=24), seed=st.integers(0, 2**16))
def test_merging_any_partition_gives_the_whole(parts, seed):
    query, rows = (torch.randn(1, 2, n, 16, generator=rng(seed + n)) * 2 for n in (1, len(parts)))
    ids = torch.arange(len(parts)).expand(1, 2, 1, -1)
    states = [attend_rows(query, rows, rows, ids=ids.masked_fill(torch.tensor(parts) != p, -1)) for p in range(6)]
    merged = merge_states(torch.stack([s[0] for s in states]), torch.stack([s[1] for s in states]))
    assert_same_state(merged, attend_rows(query, rows, rows, ids=ids))


@settings(deadline=None, max_examples=50)
@given(lses=st.lists(st.floats(-80, 80) | st.just(float("-inf")), min_size=3, max_size=3), seed=st.integers(0, 2**16))
def test_merging_is_commutative_and_associative(lses, seed):
    def merge(*states):
        return merge_states(torch.stack([s[0] for s in states]), torch.stack([s[1] for s in states]))

    outs = torch.randn(3, 1, 1, 1, 4, generator=rng(seed))
    a, b, c = zip(outs, torch.tensor(lses)[:, None, None, None], strict=True)
    whole = merge(a, b, c)
    for other in (merge(c, a, b), merge(merge(a, b), c), merge(a, merge(b, c))):
        assert_same_state(other, whole)


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def i(*shape):
    return f(*shape, dtype=torch.int64)


Q, K = f(1, 4, 2, 8), f(1, 2, 9, 8)
DOOR = [
    (top_k, (f(4, 2, 8), K, 3), {}, r"query \[4, 2, 8\]"),
    (top_k, (Q, f(2, 9, 8), 3), {}, r"keys \[2, 9, 8\]"),
    (top_k, (Q, f(1, 3, 9, 8), 3), {}, "4 query heads .* 3 KV heads"),
    (top_k, (Q, f(1, 2, 9, 7), 3), {}, r"\[1, 2, 9, 7\] differ"),
    (top_k, (Q, K.double(), 3), {}, "keys has dtype torch.float64"),
    (top_k, (Q.int(), K, 3), {}, "query has dtype torch.int32"),
    (top_k, (Q, K, 0), {}, "k is 0"),
    (attend_rows, (Q, K, K.int()), {"ids": i(1, 4, 2, 3)}, "values have dtype torch.int32"),
    (
        attend_rows,
        (Q, K, K),
        {"ids": i(1, 4, 2, 3), "log_weights": i(1, 4, 2, 3)},
        "log_weights have dtype torch.int64",
    ),
    (top_k, (Q, K, 2.5), {}, "k is 2.5"),
    (top_k, (Q, K, 3), {"start": i(2)}, r"start is torch.int64 \[2\], expected torch.int64 \[1\]"),
    (top_k, (Q, K, 3), {"stop": f(2)}, r"stop is torch.float32 \[2\]"),
    (top_k, (Q, K, 3), {"backend": "cuda"}, "backend is 'cuda'"),
    (attend_rows, (Q, K, K), {}, "both are missing"),
    (attend_rows, (Q, K, K), {"ids": i(1, 4, 2, 3), "ranges": i(1, 4, 2, 3, 2)}, "both were given"),
    (attend_rows, (Q, K, f(1, 2, 8, 8)), {"ids": i(1, 4, 2, 3)}, r"values have shape \[1, 2, 8, 8\]"),
    (attend_rows, (Q, K, K), {"ids": i(1, 2, 2, 3)}, r"ids have shape \[1, 2, 2, 3\]"),
    (attend_rows, (Q, K, K), {"ids": i(1, 4, 2, 3).int()}, "ids have dtype torch.int32"),
    (attend_rows, (Q, K, K), {"ranges": i(1, 4, 2, 3, 3)}, r"ranges have shape \[1, 4, 2, 3, 3\]"),
    (
        attend_rows,
        (Q, K, K),
        {"ids": i(1, 4, 2, 3), "log_weights": f(1, 4, 2, 2)},
        r"log_weights have .*\[1, 4, 2, 2\]",
    ),
    (attend_rows, (Q, K, K), {"ids": i(1, 4, 2, 3), "softcap": 0.0}, "softcap is 0.0"),
    (merge_states, (f(2, 1, 4, 2, 8), f(3, 1, 4, 2)), {}, r"lses \[3, 1, 4, 2\]"),
    (merge_states, (f(0, 1, 4, 2, 8), f(0, 1, 4, 2)), {}, r"outs \[0, 1, 4, 2, 8\]"),
]


@pytest.mark.parametrize(("op", "args", "options", "message"), DOOR, ids=[f"{d[0].__name__}: {d[3]}" for d in DOOR])
def test_bad_input_raises_at_the_door_and_says_what_came(op, args, options, message):
    with pytest.raises(ValueError, match=message):
        op(*args, **options)


def test_triton_refuses_cpu_tensors_without_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        top_k(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 5, 4), 2, backend="triton")
    with pytest.raises(ValueError, match="'numba' needs CPU tensors, got meta"):
        resolve_backend(torch.ones(1, device="meta"), "numba")
    assert resolve_backend(torch.ones(1)) == "numba"
    assert resolve_backend(torch.ones(1), "reference") == "reference"


def test_a_backend_that_has_no_such_operator_raises():
    with pytest.raises(ValueError, match="'numba' has no top_k, expected auto, triton, reference"):
        top_k(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 5, 4), 2, backend="numba")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "m", "length", "dim", "value_dim", "dtype"),
    [
        (3, 1, 1, 700, 64, 64, torch.float32),
        (7, 1, 1, 300, 12, 20, torch.float32),
        (4, 2, 1, 33, 13, 5, torch.float32),
        (4, 2, 1, 33, 16, 8, torch.float16),
        (4, 2, 1, 300, 16, 8, torch.bfloat16),
        (3, 1, 5, 130, 64, 64, torch.float32),
        (4, 2, 3, 33, 13, 5, torch.float32),
        (4, 2, 2, 100, 16, 8, torch.bfloat16),
        (3, 1, 9, 9, 16, 8, torch.bfloat16),
    ],
)
def test_dense_decode_equals_the_reference(run, backend, softcap, heads, kv_heads, m, length, dim, value_dim, dtype):
    query = torch.randn(2, heads, m, dim, generator=rng(5)).to(dtype)
    keys, values = rows_of(kv_heads, length, dim, dtype), rows_of(kv_heads, length, value_dim, dtype, seed=1)
    for start in (None, torch.tensor([0, length - 1]), torch.tensor([length, 3])):
        wanted = dense_decode(query, keys, values, start=start, softcap=softcap, backend="reference")
        got = run(backend, "dense_decode", query, keys, values, start=start, softcap=softcap)
        assert_same_state(got, wanted)
    if m > 1:
        wanted = [dense_decode(one, keys, values, backend="reference") for one in query.split(1, dim=2)]
        got = run(backend, "dense_decode", query, keys, values, causal=False)
        assert_same_state(got, [torch.cat(parts, dim=2) for parts in zip(*wanted, strict=True)])


def test_dense_decode_refuses_more_positions_than_rows():
    rows = torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="has 4 positions, expected 1 to 3: the newest rows"):
        dense_decode(torch.randn(1, 2, 4, 8), rows, rows)
