"""Baselines of the arena against packages that others maintain, with the same rows and random matrices in both.

What a baseline reads beside its paper's definition (the first 4 rows, the newest 64) is put into the package too where
it allows that, and has no weight where it does not.
"""

import math
from functools import partial

import pytest
import torch
from linformer import LinformerSelfAttention
from local_attention import LocalAttention
from performer_pytorch import performer_pytorch as performer
from reformer_pytorch import LSHAttention
from torch.nn.functional import normalize

from benchmarks.arena._contract import SINKS, WINDOW
from benchmarks.arena.fixed import Longformer, StreamingLLM
from benchmarks.arena.hashing import Reformer, bucket_of
from benchmarks.arena.linear import LinearAttention, Linformer, Performer, log_features, orthogonal_features

KV_HEADS, GROUP, DIM = 2, 3, 16
TOLERANCE = 1e-5


def fitted(operator, keys, values):
    operator.fit(keys, values)
    return operator


def error(out, reference):
    return float((out - reference).norm() / reference.norm())


def per_query_head(rows):
    return rows.repeat_interleave(GROUP, dim=1)


def test_random_directions_are_the_packages_but_for_their_signs(monkeypatch):
    monkeypatch.setattr(torch, "randn", partial(torch.randn, dtype=torch.float64))
    torch.manual_seed(7)
    theirs = performer.gaussian_orthogonal_random_matrix(DIM, DIM)
    ours = orthogonal_features(DIM, DIM, seed=7)
    assert error(ours.abs(), theirs.abs()) < TOLERANCE
    assert error((ours * theirs).sum(dim=1).abs(), theirs.square().sum(dim=1)) < TOLERANCE, "one sign for each row"


def favor(rows, directions, is_query):
    """The package's features of rows ``[1, H, n, D]`` without the constant that it adds to each of them."""
    return performer.softmax_kernel(rows.double(), projection_matrix=directions, is_query=is_query, eps=0.0)


@pytest.mark.parametrize("is_query", [True, False])
def test_positive_features_are_the_packages(is_query):
    directions, rows = orthogonal_features(40, DIM, seed=3), 2 * torch.randn(1, 1, 30, DIM).double()
    theirs = favor(rows, directions, is_query)
    ours = log_features(rows * DIM**-0.25, directions).exp()
    # The package divides by its largest exponential: one for all keys, one for each query.
    over = -1 if is_query else (-1, -2)
    assert error(ours / ours.sum(dim=over, keepdim=True), theirs / theirs.sum(dim=over, keepdim=True)) < TOLERANCE


def test_performer_sums_features_as_the_packages_causal_attention_does():
    # Keys grow, so that the sums so far are scaled down at every step.
    length, features = 400, 48
    keys = torch.randn(1, KV_HEADS, length, DIM) * torch.linspace(0.2, 3, length)[:, None]
    queries, values = torch.randn(1, KV_HEADS * GROUP, length, DIM), torch.randn(1, KV_HEADS, length, 24)
    directions, mean = orthogonal_features(features, DIM, seed=0), keys[:, :, :150].mean(dim=2, keepdim=True)
    phi = favor(queries[:, :, SINKS:], directions, True), favor((keys - mean)[:, :, SINKS:], directions, False)
    theirs = performer.causal_linear_attention_noncuda(
        phi[0], per_query_head(phi[1]), per_query_head(values[:, :, SINKS:].double()), eps=0.0
    )
    operator, at = Performer(), 0
    for stop in (150, 157, 260, length):
        operator.fit(keys[:, :, at:stop], values[:, :, at:stop])
        newest, at = stop - WINDOW - 1, stop
        out, _ = operator._middle(queries[:, :, newest : newest + 1], features)
        assert error(out.flatten(0, 1), theirs[0, :, newest - SINKS]) < TOLERANCE


def test_performer_weighs_its_estimate_against_exact_rows_by_the_packages_features():
    length, features, root = 200, 48, DIM**-0.25
    query, keys = torch.randn(1, KV_HEADS * GROUP, 1, DIM), torch.randn(1, KV_HEADS, length, DIM) + 1
    values, directions = torch.randn(1, KV_HEADS, length, 24), orthogonal_features(features, DIM, seed=0)
    answer = fitted(Performer(), keys, values).answer(query, features)
    q, k, v = query.double(), per_query_head(keys.double()), per_query_head(values.double())
    weights = (q @ k.transpose(2, 3) * root**2).exp()
    mean, middle = k.mean(dim=2, keepdim=True), slice(SINKS, length - WINDOW)
    centred = (k - mean)[:, :, middle]
    # Undone: what the package divides by, and the centring.
    peaks = [(x @ directions.T * root).amax(dim=(2, 3), keepdim=True) for x in (q, centred)]
    scale = (peaks[0] + peaks[1] + q @ mean.transpose(2, 3) * root**2).exp()
    product = favor(q, directions, True) @ favor(centred, directions, False).transpose(2, 3)
    exact, weights[..., middle] = weights.clone(), product * scale
    assert error(weights, exact) > 0.1
    assert error(answer.out, weights @ v / weights.sum(dim=-1, keepdim=True)) < TOLERANCE


def test_linear_attention_is_the_packages_with_elu():
    query, keys = torch.randn(1, KV_HEADS * GROUP, 1, DIM), torch.randn(1, KV_HEADS, 100, DIM)
    values = torch.randn(1, KV_HEADS, 100, 24)
    phi = partial(
        performer.generalized_kernel,
        projection_matrix=None,
        kernel_fn=torch.nn.ELU(),
        kernel_epsilon=1.0,
        normalize_data=False,
    )
    theirs = performer.linear_attention(phi(query), per_query_head(phi(keys)), per_query_head(values))
    assert error(fitted(LinearAttention(), keys, values).answer(query, 1).out, theirs) < TOLERANCE


@pytest.mark.parametrize(("setting", "p"), [(128, 2), (64, 4), (16, 16)])
@torch.no_grad()
def test_linformer_is_the_packages_with_means_as_projection(setting, p):
    # Multiples of 1/8, whose means have no more digits than half precision keeps.
    length, width = SINKS + 10 * p + 1 + WINDOW, KV_HEADS * DIM
    query = torch.randn(1, KV_HEADS, 1, DIM)
    keys, values = torch.randint(-16, 17, (2, 1, KV_HEADS, length, DIM)) / 8
    runs = torch.block_diag(*[torch.full((p, 1), 1 / p)] * 10)
    pooled = torch.block_diag(torch.eye(SINKS), runs, torch.eye(1 + WINDOW))
    # Keys are the first half of what the package projects, values the second.
    package = LinformerSelfAttention(2 * width, length, k=pooled.shape[1], heads=KV_HEADS, dim_head=DIM)
    first, second = torch.eye(2 * width).split(width)
    for layer, weight in (("to_q", first), ("to_k", first), ("to_v", second), ("to_out", first.T)):
        getattr(package, layer).weight.copy_(weight)
    package.to_out.bias.zero_()
    package.proj_k.copy_(pooled)
    package.proj_v.copy_(pooled)
    flat = [x[0].transpose(0, 1).flatten(1) for x in (query, keys, values)]
    x = torch.cat([flat[0], torch.zeros(1, width)], dim=1)
    theirs = package(x[None], context=torch.cat(flat[1:], dim=1)[None])[0, 0, :width].view(KV_HEADS, DIM)
    assert error(fitted(Linformer(), keys, values).answer(query, setting).out[0, :, 0], theirs) < TOLERANCE


# Longformer's global row, the one after the sinks, is one of those that it reads.
@pytest.mark.parametrize(("make", "outside"), [(StreamingLLM, SINKS), (Longformer, SINKS + 1)])
@pytest.mark.parametrize("count", [2, 40])
def test_a_window_is_the_packages_local_attention_at_every_length(make, outside, count):
    length, rows = 300, WINDOW + count - (outside - SINKS)
    queries, keys = 2 * torch.randn(1, KV_HEADS * GROUP, length, DIM), torch.randn(1, KV_HEADS, length, DIM)
    values = torch.randn(1, KV_HEADS, length, 24)
    # Rows that only the operator reads get no weight.
    queries[..., 0], keys[:, :, :outside, 0] = 4, -1000
    # The package's window counts the rows before the query's own.
    package = LocalAttention(rows - 1, causal=True, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True)
    theirs = package(queries, per_query_head(keys), per_query_head(values))
    operator, at = make(), 0
    for stop in range(SINKS + WINDOW + 1, length + 1, 9):
        operator.fit(keys[:, :, at:stop], values[:, :, at:stop])
        at = stop
        answer = operator.answer(queries[:, :, stop - 1 : stop], count)
        assert error(answer.out[:, :, 0], theirs[:, :, stop - 1]) < TOLERANCE


def test_buckets_are_the_packages():
    rows, buckets, rounds = torch.randn(3, 500, DIM), 32, 4
    torch.manual_seed(5)
    theirs = LSHAttention(n_hashes=rounds).hash_vectors(buckets, rows).view(3, rounds, -1)
    torch.manual_seed(5)
    rotations = torch.randn(DIM, rounds, buckets // 2)
    for i in range(rounds):
        assert torch.equal(bucket_of(rows, rotations[:, i]), theirs[:, i] - i * buckets)


@pytest.mark.parametrize("rounds", [1, 4])
def test_reformer_answers_as_the_packages_lsh_attention_within_buckets(rounds):
    # The package shares queries and keys, normalises keys, and keeps a row from attending to itself.
    heads, length, buckets = 6, 512, 8
    shared, values = torch.randn(2, heads, length, DIM)
    query = 16 * math.sqrt(DIM) * normalize(shared[:, -1:], dim=-1)
    # Rows that the operator reads in any case are opposite to the query: without weight, and never in its bucket.
    shared[:, : length // 2], shared[:, -1 - WINDOW :], shared[:, -1:] = -query, -query, query
    torch.manual_seed(5)
    package = LSHAttention(
        bucket_size=length // buckets,
        n_hashes=rounds,
        causal=True,
        attend_across_buckets=False,
        allow_duplicate_attention=False,
    )
    theirs, _, codes = package(shared, values)
    # It also cuts buckets into chunks, but the newest row sees at least a chunk's length of rows before it.
    codes = codes.view(heads, rounds, length)
    sizes = (codes == codes[..., -1:]).sum(dim=-1)
    assert 1 < sizes.min() <= sizes.max() <= length // buckets + 1
    torch.manual_seed(5)
    rotations = torch.randn(DIM, rounds, buckets // 2)
    operator = fitted(Reformer(buckets), normalize(shared, dim=-1)[None, :, :-1], values[None, :, :-1])
    operator._mean = torch.zeros(heads, 1, DIM)
    operator._rounds = [(rotations[:, i], torch.zeros(heads, 0).long()) for i in range(rounds)]
    answer = operator.answer(query[None], rounds)
    assert error(answer.out[0, :, 0], theirs[:, -1]) < TOLERANCE
