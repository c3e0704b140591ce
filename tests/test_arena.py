"""Every operator of the arena against its paper's definition: a limit where it is dense, or a case worked by hand."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import real_rows
from safetensors.torch import save_file

pytest.importorskip("matplotlib")
pytest.importorskip("faiss")
pytest.importorskip("numba")

from benchmarks.arena import DEFAULT, OPERATORS, Entry, _measure
from benchmarks.arena import __main__ as arena
from benchmarks.arena._contract import SINKS, WINDOW, distinct, ids_of
from benchmarks.arena._lists import Lists, kmeans
from benchmarks.arena._report import share_for_error, table, verdicts
from benchmarks.arena._sampling import priority_sample
from benchmarks.arena.database import Database
from benchmarks.arena.exact import Dense, DenseKernel, Tiled, pool_heads
from benchmarks.arena.exact_search import SoftmaxLift, TopK, VAttention
from benchmarks.arena.fixed import BigBird, Longformer, StreamingLLM
from benchmarks.arena.hashing import Reformer, RoutingTransformer, bucket_of
from benchmarks.arena.linear import LinearAttention, Linformer, Performer, log_features, orthogonal_features
from benchmarks.arena.magicpig import MagicPIG, chance
from benchmarks.arena.pages import InfLLM, Quest
from benchmarks.arena.retroinfer import RetroInfer
from benchmarks.arena.three_stages import ThreeStages, four_bits
from benchmarks.capture import Rows, rows_of_file
from dbattn import AttentionDB, dense_attention

ROWS, KV_HEADS, GROUP, DIM, VALUE_DIM = 700, 2, 2, 24, 8
RENAMED = {"key": "keys", "value": "values", "query": "query"}
ROW_BYTES, HOT = 4 * (DIM + VALUE_DIM), SINKS + WINDOW


def random_rows(rows=ROWS, kv_heads=KV_HEADS, group=GROUP, spread=2.0):
    keys = torch.randn(1, kv_heads, rows, DIM) + 3 * torch.randn(1, kv_heads, 1, DIM)
    return spread * torch.randn(1, kv_heads * group, 1, DIM), keys, torch.randn(1, kv_heads, rows, VALUE_DIM)


def fitted(operator, keys, values, chunks=(1.0,)):
    at = 0
    for chunk in [*chunks[:-1], 1.0]:
        stop = round(chunk * keys.shape[2])
        operator.fit(keys[:, :, at:stop], values[:, :, at:stop])
        at = stop
    return operator


def error(out, reference):
    return float((out - reference).norm() / reference.norm())


def attention_over(query, keys, values, ids):
    return dense_attention(query, keys[:, :, ids], values[:, :, ids])


@pytest.fixture(scope="module")
def capture():
    return real_rows(8)


@pytest.mark.parametrize("entry", OPERATORS.values(), ids=list(OPERATORS))
def test_every_operator_keeps_the_contract_on_real_rows(entry, capture):
    queries, keys, values = capture
    query, first, length = queries[:, :, -1:].contiguous(), 1700, 1733
    # The query's own row is the newest, as in decoding.
    keys, values = keys[:, :, -length:], values[:, :, -length:]
    operator = entry.make()
    operator.fit(keys[:, :, :first], values[:, :, :first])
    for at in range(first, length, 11):
        operator.fit(keys[:, :, at : at + 11], values[:, :, at : at + 11])
    assert len(operator) == length
    spent = []
    for budget in (0.05, 0.2, 0.6):
        answer = operator.attend(query, budget)
        assert answer.out.shape == (1, 3, 1, 64)
        assert answer.out.dtype == torch.float32
        assert torch.isfinite(answer.out).all()
        assert answer.bytes_charged <= answer.bytes_read
        spent.append(answer.bytes_read)
        if answer.ids is not None:
            ids = answer.ids[0, :, 0]
            assert ids.max() == length - 1, "the newest row, its own, is read, and there is none after it"
            for head in ids:
                read = head[head >= 0]
                assert len(read.unique()) == len(read)
    assert 0 < spent[0] <= spent[1] <= spent[2]


def test_every_operator_says_where_it_comes_from():
    for name, entry in OPERATORS.items():
        operator = entry.make()
        assert entry.name == name
        assert entry.family in ("exact", "fixed", "hashing", "linear", "selection", "dbattn")
        assert len(operator.paper) > 10
        assert operator.implementation in ("torch", "kernel")


LIMITS = {
    "tiled": Tiled,
    "MHA": lambda: Dense("mha"),
    "kernel": DenseKernel,
    "StreamingLLM": StreamingLLM,
    "Longformer": Longformer,
    "BigBird": BigBird,
    "Reformer, one bucket": lambda: Reformer(buckets=1),
    "Routing Transformer": RoutingTransformer,
    "Linformer, identity": Linformer,
    "top-k": TopK,
    "vAttention": VAttention,
    "SoftmaxLift": SoftmaxLift,
    "Quest": Quest,
    "InfLLM": InfLLM,
    "RetroInfer": RetroInfer,
    "three stages": ThreeStages,
    "dbattn": lambda: Database("segmented", "centroid"),
    "dbattn flat, sample": lambda: Database("flat", "sample"),
}


@pytest.mark.parametrize("make", LIMITS.values(), ids=list(LIMITS))
def test_with_everything_read_an_operator_is_dense(make):
    query, keys, values = random_rows()
    operator = fitted(make(), keys, values, chunks=(0.9, 1.0))
    answer = operator.answer(query, operator.most)
    assert error(answer.out, dense_attention(query, keys, values)) < 1e-5


INCREMENTAL = {
    "linear attention": (LinearAttention, 1),
    "Linformer": (Linformer, 30),
    "Quest": (Quest, 5),
    "top-k": (TopK, 50),
    "SoftmaxLift": (SoftmaxLift, 50),
    "StreamingLLM": (StreamingLLM, 50),
    "dbattn": (lambda: Database("segmented", "centroid"), 100),
}


@pytest.mark.parametrize(("make", "setting"), INCREMENTAL.values(), ids=list(INCREMENTAL))
def test_rows_may_come_in_any_pieces(make, setting):
    query, keys, values = random_rows()
    whole = fitted(make(), keys, values).answer(query, setting)
    pieces = fitted(make(), keys, values, chunks=(0.003, 0.01, 0.5, 0.501, 1.0)).answer(query, setting)
    assert error(pieces.out, whole.out) < 1e-5
    assert pieces.bytes_read == whole.bytes_read


def test_a_budget_is_spent_but_not_overspent():
    query, keys, values = random_rows()
    for make in (StreamingLLM, TopK, RetroInfer, SoftmaxLift, MagicPIG):
        operator = fitted(make(), keys, values)
        answer = operator.attend(query, 0.4)
        assert 0.3 * operator.bytes_dense < answer.bytes_charged <= 0.4 * operator.bytes_dense
        # What cannot be had for so little is answered at the least.
        assert operator.attend(query, 1e-6).bytes_charged == operator.answer(query, 1).bytes_charged


def test_a_row_is_counted_once_per_group():
    chosen = torch.tensor([[[5, 7, -1], [7, 9, 5]], [[1, -1, -1], [2, 1, 3]]])
    assert distinct(chosen, 10) == 3 + 3
    assert distinct(torch.tensor([[4, -1], [4, 6]]), 10) == 3
    assert ids_of(torch.tensor([[False, True, True], [True, False, False]]), 4).tolist() == [[5, 6], [4, -1]]


@pytest.mark.parametrize("tile", [1, 7, 300, 1000])
def test_tiles_of_any_size_give_the_same_softmax(tile):
    query, keys, values = random_rows(spread=20.0)
    answer = fitted(Tiled(tile=tile), keys, values).answer(query, 1)
    assert error(answer.out, dense_attention(query, keys, values)) < 1e-5


def test_pooled_heads_are_means_and_save_their_share_of_bytes():
    rows = torch.arange(8.0).view(1, 4, 1, 2)
    assert pool_heads(rows, 2).flatten().tolist() == [1, 2, 5, 6]
    with pytest.raises(ValueError, match="4 KV heads do not pool to 3"):
        pool_heads(rows, 3)
    query, keys, values = random_rows()
    answers = {share: fitted(Dense(share), keys, values).answer(query, 1) for share in ("mha", "gqa", "mqa")}
    pooled = dense_attention(query, keys.mean(dim=1, keepdim=True), values.mean(dim=1, keepdim=True))
    assert error(answers["mqa"].out, pooled) < 1e-5
    assert answers["gqa"].bytes_read == KV_HEADS * ROWS * ROW_BYTES
    assert answers["mha"].bytes_read == GROUP * answers["gqa"].bytes_read
    assert answers["mqa"].bytes_read == answers["gqa"].bytes_read / KV_HEADS


def test_fixed_patterns_by_hand():
    query, keys, values = random_rows(rows=600)
    streaming = fitted(StreamingLLM(), keys, values)
    answer = streaming.answer(query, 3)
    read = [0, 1, 2, 3, *range(600 - WINDOW - 3, 600)]
    assert sorted(answer.ids[0, 0, 0].tolist()) == read
    assert error(answer.out, attention_over(query, keys, values, read)) < 1e-5
    assert answer.bytes_read == KV_HEADS * (HOT + 3) * ROW_BYTES
    # One global row in 512 after the sinks, and every fourth row before the window.
    dilated = fitted(Longformer(dilation=4), keys, values)
    assert dilated.pattern(6).tolist() == [4, 516, 523, 527, 531, 535]
    assert fitted(Longformer(), keys, values).pattern(4).tolist() == [4, 516, 534, 535]
    # 200 rows beside a window of 64: (200 + 64) / 2 random ones, the others widen the window.
    ids = fitted(BigBird(), keys, values).pattern(200)
    assert ids.tolist()[-68:] == list(range(468, 536))
    drawn = ids[:-68]
    assert len(drawn.unique()) == len(drawn) == 132
    blocks = ((drawn - SINKS) // BigBird.BLOCK).unique(return_counts=True)[1]
    assert sorted(blocks.tolist(), reverse=True)[:2] == [64, 64]


def test_a_bucket_is_the_signed_axis_nearest_to_the_row():
    rows = torch.tensor([[3.0, -1.0], [-1.0, -2.0], [-5.0, 1.0], [0.5, 2.0]])
    assert bucket_of(rows, torch.eye(2)).tolist() == [0, 3, 2, 1]


def test_reformer_reads_the_rows_of_the_querys_bucket_and_their_ids():
    query, keys, values = random_rows(kv_heads=1, group=1)
    operator = fitted(Reformer(buckets=8), keys, values)
    answer = operator.answer(query, 1)
    rotation = torch.randn(DIM, 4, generator=torch.Generator().manual_seed(0))
    codes = bucket_of(keys[0, 0] - keys[0, 0].mean(dim=0), rotation)
    bucket = (codes[SINKS : ROWS - WINDOW] == bucket_of(query[0, 0], rotation)).nonzero()[:, 0] + SINKS
    read = [*range(SINKS), *bucket.tolist(), *range(ROWS - WINDOW, ROWS)]
    assert 0 < len(bucket) < ROWS - HOT
    assert error(answer.out, attention_over(query, keys, values, read)) < 1e-5
    assert answer.bytes_read == len(read) * ROW_BYTES + 4 * len(bucket)


def test_k_means_finds_separate_groups_and_lists_partition_the_rows():
    centres = 10 * torch.eye(4, 8)
    home = torch.randint(4, (2, 400))
    rows = centres[home] + 0.1 * torch.randn(2, 400, 8)
    found = kmeans(rows, 4)
    for head in range(2):
        assert len(set(zip(home[head].tolist(), found[head].tolist(), strict=True))) == 4
    lists = Lists(rows_per_list=16, segment_rows=160)
    assert lists.extend(rows, rows, 4, 400) == 320, "two segments of 160; the 76 rows left wait for more"
    every = torch.arange(lists.size.shape[1]).expand(2, -1)
    for head in lists.members(every):
        assert sorted(head[head >= 0].tolist()) == list(range(4, 324))
    one = lists.members(every[:, 3:4])[0]
    own = (lists.home[0] == 3).nonzero()[:, 0] + 4
    assert sorted(one[one >= 0].tolist()) == own.tolist()
    assert torch.allclose(lists.key[0, 3], rows[0, own].mean(dim=0), atol=0.01)


def test_routing_reads_the_cluster_that_lies_in_the_querys_direction():
    # 25 clusters are made of 4 groups, so each cluster lies within one of them.
    group = torch.arange(ROWS) % 4
    keys = (10 * torch.eye(4, DIM)[group] + 0.1 * torch.randn(ROWS, DIM))[None, None]
    values = torch.randn(1, 1, ROWS, VALUE_DIM)
    operator = fitted(RoutingTransformer(), keys, values)
    answer = operator.answer(10 * torch.eye(4, DIM)[None, 2:3, None], 1)
    chosen = answer.ids[0, 0, 0]
    chosen = chosen[(chosen >= SINKS) & (chosen < operator.hot)]
    assert len(chosen) > 0
    assert set(group[chosen].tolist()) == {2}


def test_random_features_approach_the_softmax_kernel():
    x, y = torch.nn.functional.normalize(torch.randn(2, 50, DIM, dtype=torch.float64), dim=-1)
    exact = torch.exp((x * y).sum(dim=-1))
    errors = {}
    for features in (64, 8192):
        omega = orthogonal_features(features, DIM, seed=0)
        product = torch.exp(log_features(x, omega) + log_features(y, omega)).mean(dim=-1)
        errors[features] = float(((product - exact) / exact).abs().mean())
    assert errors[8192] < 0.05
    assert errors[64] > 5 * errors[8192]
    block = orthogonal_features(2 * DIM, DIM, seed=1)[:DIM]
    assert torch.allclose(block @ block.T, torch.diag((block @ block.T).diag()), atol=1e-9)


def test_performer_approaches_dense_where_logits_are_small():
    query, keys, values = random_rows(spread=0.3)
    # Values with a mean, so that the output is not itself mostly noise.
    values = values + 1
    operator = fitted(Performer(), keys, values, chunks=(0.8, 1.0))
    answer = operator.answer(query, 2048)
    assert error(answer.out, dense_attention(query, keys, values)) < 0.02
    assert answer.bytes_read == KV_HEADS * (HOT * ROW_BYTES + 2048 * (VALUE_DIM + 1) * 4) == operator.cost(query, 2048)


def test_linformer_attends_to_means_of_neighbours():
    query, keys, values = random_rows(rows=HOT + 9)
    operator = fitted(Linformer(), keys, values)
    answer = operator.answer(query, 64)  # four rows become one; one of the nine is left
    pooled = [
        torch.cat(
            [x[:, :, :SINKS], x[:, :, SINKS : SINKS + 8].unflatten(2, (2, 4)).mean(dim=3), x[:, :, SINKS + 8 :]], dim=2
        )
        for x in (keys, values)
    ]
    assert error(answer.out, dense_attention(query, *pooled)) < 1e-3  # pooled rows are kept in half precision
    assert answer.bytes_read == KV_HEADS * ((HOT + 1) * ROW_BYTES + 2 * (DIM + VALUE_DIM) * 2)


def test_linear_attention_by_brute_force():
    query, keys, values = random_rows()
    answer = fitted(LinearAttention(), keys, values).answer(query, 1)

    def phi(x):
        return torch.where(x > 0, x + 1, x.exp())

    for head in range(KV_HEADS * GROUP):
        weights = phi(keys[0, head // GROUP]) @ phi(query[0, head, 0])
        expected = (weights / weights.sum()) @ values[0, head // GROUP]
        assert error(answer.out[0, head, 0], expected) < 1e-5
    assert answer.bytes_read == KV_HEADS * DIM * (VALUE_DIM + 1) * 4


def test_the_oracle_reads_the_best_rows_and_is_charged_for_every_key():
    query, keys, values = random_rows(kv_heads=1, group=1)
    answer = fitted(TopK(), keys, values).answer(query, 20)
    best = (keys[0, 0, SINKS:-WINDOW] @ query[0, 0, 0]).topk(20).indices + SINKS
    read = [*range(SINKS), *best.tolist(), *range(ROWS - WINDOW, ROWS)]
    assert sorted(answer.ids.flatten().tolist()) == sorted(read)
    assert error(answer.out, attention_over(query, keys, values, read)) < 1e-5
    assert answer.bytes_if_free == (HOT + 20) * ROW_BYTES
    assert answer.bytes_read == ROWS * 4 * DIM + (HOT + 20) * 4 * VALUE_DIM


def test_heads_of_a_group_share_rows_by_what_each_has_to_gain():
    # Head 0 has all its mass on the newest row, so the rows that head 1 wants are the ones to read.
    keys = torch.zeros(1, 1, 200, 2)
    keys[0, 0, 199, 0], keys[0, 0, 50, 0], keys[0, 0, 60, 1] = 100, 50, 30
    operator = fitted(TopK(), keys, keys)
    answer = operator.answer(torch.eye(2).view(1, 2, 1, 2), 1)
    assert 60 in answer.ids[0, 0, 0]
    assert 50 not in answer.ids[0, 1, 0]


def test_priority_samples_are_unbiased():
    sizes, draws, k = torch.rand(30).square() + 0.01, 20000, 6
    noise = -torch.log(1 - torch.rand(draws, 30))
    places, log_weights = priority_sample(sizes.log().expand(draws, -1), noise, k)
    values = torch.randn(30) + 1
    estimates = (log_weights.exp() * (sizes * values)[places]).sum(dim=1)
    assert abs(estimates.mean() - (sizes * values).sum()) < 4 * estimates.std() / draws**0.5
    places, log_weights = priority_sample(torch.tensor([0.0, float("-inf")]), torch.ones(2), 5)
    assert places.tolist() == [0, -1]
    assert log_weights.tolist() == [0, 0]


def test_vattention_keeps_the_top_and_weighs_the_sample_without_bias():
    query, keys, values = random_rows(kv_heads=1, group=1)
    operator = fitted(VAttention(), keys, values)
    logits = operator.logits(query, operator.keys[:, SINKS : operator.hot])
    exact, draws = logits.exp().sum(), 3000
    estimates = []
    for _ in range(draws):
        chosen, log_weights = operator.choose(query, logits, 60)
        estimates.append((logits[0, 0, chosen[0]] + log_weights[0]).exp().sum())
    assert set(logits[0, 0].topk(30).indices.tolist()) == set(chosen[0, :30].tolist())
    assert log_weights[0, 30:].exp().tolist() == pytest.approx([(ROWS - HOT - 30) / 30] * 30)
    estimates = torch.stack(estimates)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / draws**0.5


def test_softmaxlift_is_a_priority_sample_whose_noise_stays_with_the_row():
    query, keys, values = random_rows(kv_heads=1, group=1)
    operator = fitted(SoftmaxLift(), keys, values, chunks=(0.4, 1.0))
    logits = operator.logits(query, operator.keys[:, SINKS : operator.hot])
    chosen, log_weights = operator.choose(query, logits, 40)
    lifted = logits + operator._noise[:, None, SINKS : operator.hot]
    order = lifted[0, 0].sort(descending=True)
    assert chosen[0, 0].tolist() == order.indices[:40].tolist()
    expected = (order.values[40] - logits[0, 0, order.indices[:40]]).clamp(min=0)
    assert torch.allclose(log_weights[0, 0], expected)


def test_magicpig_reads_a_row_as_often_as_its_weight_says():
    class Small(MagicPIG):
        BITS, TABLES = 3, 10

    assert float(chance(torch.tensor(0.0), 1, 3)) == pytest.approx(0.5)  # two or three of three fair coins
    assert float(chance(torch.tensor(1.0), 10, 150)) == pytest.approx(1.0)
    query, keys, values = random_rows(rows=HOT + 40, kv_heads=1, group=1)
    seeds, counts = 400, torch.zeros(HOT + 40)
    for seed in range(seeds):
        ids = fitted(Small(seed), keys, values).answer(query, 10).ids.flatten()
        counts[ids[ids >= 0]] += 1
    centred = keys[0, 0] - keys[0, 0].mean(dim=0)
    expected = chance(torch.cosine_similarity(query[0, 0], centred, dim=-1), 3, 10)[SINKS:-WINDOW]
    deviation = (counts[SINKS:-WINDOW] / seeds - expected).abs() / (expected * (1 - expected) / seeds).sqrt()
    assert deviation.max() < 4.5
    assert 0.05 < expected.mean() < 0.95


def test_quests_bounds_hold_for_every_row_of_a_page(capture):
    queries, keys, values = capture
    operator = fitted(Quest(), keys, values)
    scores = operator.scores(queries[:, :, -1:], operator._kept)
    pages = keys[0, :, SINKS : operator.hot].unflatten(1, (-1, 16))
    logits = torch.einsum("gd,prd->gpr", queries[0, :, -1], pages[0]) / 8
    assert (scores[0] >= logits.amax(dim=-1) - 0.05).all(), "but for half precision"
    # q = (1, -2): the largest first channel, the least second.
    lone = torch.tensor([[3.0, 5.0], [1.0, 7.0]]).repeat(8, 1)
    lone = torch.cat([torch.zeros(SINKS, 2), lone, torch.zeros(WINDOW, 2)])[None, None]
    operator = fitted(Quest(), lone, lone)
    bound = operator.scores(torch.tensor([1.0, -2.0]).view(1, 1, 1, 2), operator._kept)
    assert float(bound) == pytest.approx((3 - 2 * 5) * 2**-0.5)


def test_pages_cost_their_rows_and_every_summary():
    query, keys, values = random_rows()
    for make, per_page in ((Quest, 2), (InfLLM, 4)):
        operator = fitted(make(), keys, values)
        answer = operator.answer(query, 2)
        pages = (ROWS - HOT) // operator.page_rows
        rows = KV_HEADS * (ROWS - pages * operator.page_rows + 2 * operator.page_rows)
        assert answer.bytes_read == rows * ROW_BYTES + KV_HEADS * pages * per_page * DIM * 2
        assert answer.rows_read == rows / KV_HEADS


def test_infllm_represents_a_block_by_keys_of_its_own():
    query, keys, values = random_rows()
    operator = fitted(InfLLM(), keys, values)
    block = keys[0, 1, SINKS : SINKS + 128].half().float()
    for representative in operator._kept[1, 0]:
        assert (block == representative).all(dim=-1).any()
    by_hand = (operator._kept[1, 0] @ query[0, GROUP + 1, 0]).mean() / DIM**0.5
    assert float(operator.scores(query, operator._kept)[1, 1, 0]) == pytest.approx(float(by_hand), rel=1e-4)


def test_retroinfer_estimates_the_next_lists_and_drops_the_rest():
    query, keys, values = random_rows(kv_heads=1, group=1)
    operator = fitted(RetroInfer(), keys, values)
    lists, q = operator.lists, query[0, 0, 0] / DIM**0.5
    answer = operator.answer(query, 3)
    order = (lists.key[0] @ q).masked_fill(lists.size[0] == 0, float("-inf")).argsort(descending=True)
    read, estimated = order[:3], order[3 : 3 + round(0.232 * len(order))]
    rows = lists.members(read[None])[0]
    rows = torch.cat([torch.arange(SINKS), rows[rows >= 0], torch.arange(operator.hot, ROWS)])
    weights = (keys[0, 0, rows] @ q).exp()
    tail = lists.size[0, estimated] * (lists.key[0, estimated] @ q).exp()
    total = weights.sum() + tail.sum()
    expected = (weights @ values[0, 0, rows] + tail @ lists.value[0, estimated]) / total
    assert error(answer.out[0, 0, 0], expected) < 1e-4
    summaries = len(order) * DIM * 2 + len(estimated) * (VALUE_DIM * 2 + 4)
    assert answer.bytes_read == len(rows) * ROW_BYTES + summaries


def test_codes_of_four_bits_are_within_half_a_step():
    rows = torch.randn(50, DIM)
    step = rows.abs().amax(dim=-1, keepdim=True) / 7
    assert ((four_bits(rows, 7) - rows).abs() <= 0.51 * step).all()
    assert four_bits(torch.zeros(2, 4), 7).tolist() == [[0] * 4] * 2


def test_three_stages_average_to_dense_where_every_list_is_probed():
    query, keys, values = random_rows(kv_heads=1, group=2, spread=1.0)
    operator = fitted(ThreeStages(), keys, values)
    reference = dense_attention(query, keys, values)
    setting = -(-(operator.lists.stop - SINKS) // operator.CODED_PER_READ)
    answers = torch.stack([operator.answer(query, setting).out for _ in range(300)])
    one = float(torch.stack([(a - reference).norm() for a in answers]).mean() / reference.norm())
    assert error(answers.mean(dim=0), reference) < 0.25 * one, "errors of single draws cancel"
    probed, count = operator.lists.size.shape[1], operator.lists.stop - SINKS
    answer = operator.answer(query, setting)
    codes = count * (DIM / 2 + 2) + probed * (DIM * 2 + 4)
    assert answer.bytes_read == (ROWS - count + setting) * ROW_BYTES + codes


def test_dbattn_answers_and_counts_as_its_own_database_does():
    query, keys, values = random_rows(rows=1500)
    for index, tail in (("segmented", "centroid"), ("flat", "none")):
        operator = fitted(Database(index, tail), keys, values)
        db = AttentionDB(KV_HEADS, DIM, value_dim=VALUE_DIM, config=replace(operator._config, k=90))
        db.insert(keys, values)
        answer = operator.answer(query, 90)
        assert torch.equal(answer.out, db.attend(query))
        assert answer.bytes_read == db.explain(query).bytes_read
        assert answer.rows_read == pytest.approx(db.audit(query).rows_read)
        read = answer.ids[0, :, 0]
        mass = torch.stack(
            [row[ids[ids >= 0]].sum() for row, ids in zip(dense_weights(query, keys), read, strict=True)]
        )
        assert float(mass.mean()) == pytest.approx(db.audit(query).attention_mass, abs=1e-4)


def dense_weights(query, keys):
    grouped = query[0, :, 0].view(KV_HEADS, GROUP, DIM)
    return torch.softmax(grouped @ keys[0].transpose(1, 2) / DIM**0.5, dim=-1).flatten(0, 1)


@pytest.fixture
def synthetic(monkeypatch):
    """Captures of 900 random rows in place of the model's."""
    torch.manual_seed(1)
    rows = Rows(torch.randn(1, 2, 900, 16), torch.randn(1, 2, 900, 16), 2 * torch.randn(1, 4, 512, 16))
    monkeypatch.setattr(arena, "smollm2", lambda tokens, layers: dict.fromkeys(layers, rows))
    monkeypatch.setattr(arena, "TIMED_ROWS", (256, 1024))
    monkeypatch.setattr(_measure, "RECALL_K", 20)
    return rows


def test_a_run_writes_the_table_the_plots_and_one_page(synthetic, tmp_path, capsys):
    names = ["dense", "StreamingLLM", "exact top-k", "linear attention", DEFAULT]
    arena.main(["--layers", "3", "5", "--budgets", "0.2", "0.4", "--operators", *names, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "arena.json").read_text())
    (result,) = record["results"]
    assert result["layers"] == [3, 5]
    assert [operator["name"] for operator in result["operators"]] == names
    points = {operator["name"]: operator["points"] for operator in result["operators"]}
    assert points["dense"][0]["error"] < 1e-5
    assert points["dense"][0]["share"] == points["dense"][0]["recall"] == 1.0
    assert points["StreamingLLM"][0]["share"] <= 0.2
    assert points["exact top-k"][1]["error"] < points["StreamingLLM"][1]["error"]
    assert points["linear attention"][0]["recall"] is None
    assert [point["budget"] for point in points[DEFAULT]] == [0.2, 0.4, None]
    heads = points["StreamingLLM"][0]["error_by_layer_and_head"]
    assert (len(heads), len(heads[0])) == (2, 4)
    assert sum(map(sum, heads)) / 8 == pytest.approx(points["StreamingLLM"][0]["error"], rel=1e-5)
    page = (tmp_path / "arena.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("https://", "http://").split("<h2>The operators")[0]
    assert "arXiv:2309.17453" in page
    assert "StreamingLLM" in capsys.readouterr().out


def test_rows_of_another_model_come_from_a_file_and_dbattn_learns_from_its_earlier_queries(
    synthetic, tmp_path, monkeypatch
):
    """The steps are asked over the later half only."""
    learnt = []
    monkeypatch.setattr(Database, "learn", lambda self, queries: learnt.append((len(self), queries)))
    file = tmp_path / "other model.safetensors"
    save_file({f"7.{n}": getattr(synthetic, m)[0] for n, m in RENAMED.items()}, file)
    asked = ["--layers", "3", "--budgets", "0.4", "--operators", DEFAULT, "--out", str(tmp_path), "--quick"]
    arena.main([*asked, "--files", str(file)])
    first, second = json.loads((tmp_path / "arena.json").read_text())["results"]
    assert (first["model"], first["layers"]) == ("SmolLM2-135M", [3])
    assert (second["model"], second["layers"], second["rows"]) == ("other model", [7], 900 - 64)
    points = [result["operators"][0]["points"] for result in (first, second)]
    assert points[0][0]["error"] == points[1][0]["error"]
    for rows, queries in learnt:
        assert rows == 900 - 256
        torch.testing.assert_close(queries, synthetic.query[:, :, :256])
    # A run of one model leaves the figures of another in the record, where both were asked at the same budgets.
    for budget, models in (("0.4", ["SmolLM2-135M", "other model"]), ("0.5", ["SmolLM2-135M"])):
        arena.main([*asked, "--budgets", budget])
        held = json.loads((tmp_path / "arena.json").read_text())["results"]
        assert [result["model"] for result in held] == models


def test_a_file_that_holds_no_layers_is_named(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights.safetensors holds \['weight'\]"):
        rows_of_file(tmp_path / "weights.safetensors", 100)
    save_file({"3.key": torch.zeros(1, 2, 4)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"lacks 3\.value, 3\.query"):
        rows_of_file(tmp_path / "half.safetensors", 100)


def test_the_figure_of_merit_lies_between_the_budgets_around_the_error():
    points = [{"budget": s, "share": s, "error": e} for s, e in ((0.01, 0.4), (0.04, 0.1), (0.16, 0.025))]
    assert share_for_error(points, 0.05) == pytest.approx(0.08)
    assert share_for_error(points, 0.4) == 0.01
    assert share_for_error(points, 0.01) is None


def test_ctrl_c_keeps_what_was_measured(synthetic, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    entries = {"StreamingLLM": OPERATORS["StreamingLLM"], "late": Entry("late", "fixed", interrupt, "never")}
    monkeypatch.setattr(arena, "OPERATORS", entries)
    arena.main(["--budgets", "0.1", "--layers", "3", "--out", str(tmp_path)])
    (result,) = json.loads((tmp_path / "arena.json").read_text())["results"]
    assert [operator["name"] for operator in result["operators"]] == ["StreamingLLM"]
    assert "StreamingLLM" in (tmp_path / "arena.html").read_text()


def test_verdicts_compare_only_what_keeps_the_budget_without_training():
    def operator(name, error, share, **facts):
        point = {
            "budget": 0.05,
            "error": error,
            "share": share,
            "recall": 0.5,
            "mass": 0.5,
            "rows": 1,
            "bytes": 1,
            "ms": 1,
        }
        return {"name": name, "family": "selection", "needs_training": False, "points": [point], **facts}

    ours = operator(DEFAULT, 0.03, 0.05, family="dbattn", exponent=None, implementation="kernel")
    others = [
        operator("exact top-k", 0.01, 0.52),
        operator("Routing Transformer", 0.02, 0.05, needs_training=True),
        operator("Quest", 0.04, 0.05),
    ]
    (note,) = verdicts({"operators": [ours, *others]})
    assert note == "5%: dbattn's default has the lowest error, 0.030; next Quest 0.040."
    ours["points"][0]["share"] = 0.06
    (note,) = verdicts({"operators": [ours, *others]})
    assert "Quest has the lowest error, 0.040" in note
    assert "6.0% of dense's bytes" in note
    assert table({"operators": [ours]}, [0.05], 0.05)[0][1] == "0.030 @ 6.0 %"


def test_help_teaches_with_an_example_and_bad_options_are_named(capsys):
    with pytest.raises(SystemExit) as stop:
        arena.main(["--help"])
    assert stop.value.code == 0
    assert "  python -m benchmarks.arena" in capsys.readouterr().out
    for options, message in ((["--tokens", "100"], "--tokens is 100"), (["--budgets", "0"], "--budgets are")):
        with pytest.raises(SystemExit):
            arena.main(options)
        assert message in capsys.readouterr().err
