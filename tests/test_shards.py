"""A context's rows over the ranks of a process group: exact, within the budget, in step, saved whole."""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbattn import AttentionDB
from dbattn.sharded import Budget, Told
from dbattn.shards import BLOCK, Shards

RANKS = 2


def free_ports(n):
    """Ports that nobody listens at, none of those that a system gives to whoever asks for any."""
    found = []
    with ExitStack() as stack:
        for port in random.sample(range(20000, 32000), 200):
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == n:
                break
    return found


def run_ranks(folder, model):
    """What each of two processes found; the second one kills itself in the end."""
    ports = ",".join(map(str, free_ports(8)))
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "PORTS": ports, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("shards_rank.py")), str(folder), str(model)]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found = [folder / f"rank-{rank}.json" for rank in range(RANKS)]
    assert all(path.is_file() for path in found), "\n".join(errors)
    assert [rank.returncode for rank in ranks] == [0, -9], "\n".join(errors)
    ranks = [json.loads(path.read_text()) for path in found]
    assert not any("raised" in each for each in ranks), "\n".join(each.get("raised", "") for each in ranks)
    return ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("shards")
    return folder, run_ranks(folder, model_folder)


@pytest.fixture
def both(ranks):
    return ranks[1]


@pytest.fixture
def first(both):
    return both[0]


def one_of(ranks, rank):
    shards = object.__new__(Shards)
    shards.rank, shards.ranks = rank, ranks
    return shards


@given(st.integers(1, 5), st.integers(0, 9 * BLOCK), st.integers(0, 5 * BLOCK))
def test_every_row_is_one_ranks_and_its_place_follows_from_its_position(ranks, first, more):
    positions = torch.arange(first, first + more)
    held = []
    for rank in range(ranks):
        shards = one_of(ranks, rank)
        ours = shards.ours(positions[None], first, dim=1)[0]
        held.append(ours)
        assert shards.before(first + more) - shards.before(first) == len(ours)
        assert torch.equal(shards.position_of(shards.before_each(ours)), ours)
        assert shards.before(first) == shards.held_by_each(first)[rank] == int(shards.before_each(torch.tensor(first)))
    assert torch.equal(torch.cat(held).sort().values, positions)


def told(retrieves=1.0):
    return Told(0, 0, retrieves, 0, 0, 0, 0, 0, 0, 0, 1.0)


def test_a_shard_that_leaves_more_unread_gets_more_of_the_budget_and_none_gets_nothing():
    budget = Budget(3)
    assert budget.parts(300, [4096, 4096, 4096]) == [100, 100, 100]
    for _ in range(20):
        parts = budget.parts(300, [4096] * 3)
        budget.note(parts, [0.2, 0.02, 0.0001], [told()] * 3)
    assert parts[0] > 2 * parts[1] > parts[2] >= 12
    assert sum(parts) == pytest.approx(300, abs=6)
    assert budget.parts(300, [4096, 0, 0]) == [300, 1, 1]
    # Of a call that is known to want another one.
    assert budget.parts(300, [4096] * 3, [0.001, 0.1, 0.9])[2] > 200 > 2 * parts[2]


def test_answers_over_all_ranks_are_exact_where_all_rows_are_read(first):
    exact = {name: error for name, error in first.items() if name.startswith(("exact", "cut", "fork"))}
    assert len(exact) == 8
    assert max(exact.values()) < 1e-5, exact
    assert first["search"]


def test_each_rank_holds_its_own_rows_alone(both):
    assert [found["rows held"] for found in both] == [[2600, 1536], [2600, 1064]]


def test_retrieval_from_shards_errs_about_as_little_as_from_one_store_with_the_same_budget(first):
    errors = first["errors"]
    assert first["retrieving"] == 24
    assert 0 < errors["shards"] < 1.35 * errors["one"] < 0.02, errors


def test_the_rank_whose_rows_are_asked_for_gets_more_of_the_budget(both):
    assert both[0]["parts"] == both[1]["parts"]
    assert both[0]["parts"][1] > 2 * both[0]["parts"][0]


def test_explain_has_a_source_for_each_shard_and_is_the_same_on_all(both):
    assert both[0]["explain"] == both[1]["explain"]
    sources = both[0]["sources"]
    assert [kind for kind, *_ in sources] == ["shard 0", "shard 1"]
    assert all(nbytes > 0 and rows > 64 for _, nbytes, rows, _ in sources)
    assert sum(mass for *_, mass in sources) == pytest.approx(1.0, abs=1e-3)


def test_audits_compare_with_dense_over_all_ranks(both):
    recall, mass, error, rows = both[0]["audit"]
    assert both[0]["audit"] == both[1]["audit"]
    assert error == pytest.approx(both[0]["audit by hand"], rel=0.5)
    assert 0.2 < recall <= 1
    assert 0.5 < mass <= 1
    assert rows == 5000


def test_several_positions_retrieve_each_for_itself(first):
    error, of_one, retrieving = first["several positions"]
    assert 0 < error < 1.3 * of_one
    assert retrieving == 1


def test_max_error_is_kept_by_decisions_that_all_ranks_make_alike(both):
    assert both[0]["rungs"] == both[1]["rungs"]
    assert both[0]["within"] >= 0.8
    assert both[0]["bytes of dense"] < 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refused host", "rows='host' does not go with group"),
        ("refused prefill", "prefill='lists' does not go with group"),
        ("refused weights", "dealt over 2 ranks"),
        ("refused exact", "exact=True does not go with group"),
        ("out of step", "all ranks must make the same calls"),
        ("other tokens", "was given other tokens"),
        ("alone", "torchrun"),
        ("of one process", "is opened by one process"),
        ("lacking", "shard-1 is missing"),
        ("of three", "holds the shards of 3 ranks, this group has 2"),
        ("refused save", "No space left"),
    ],
)
def test_what_cannot_be_served_is_refused_on_every_rank(both, name, words):
    for found in both:
        assert words in found[name]


def test_rows_that_one_rank_must_refuse_are_refused_by_all(both):
    for found in both:
        text, rows = found["refused rows"]
        assert "nan" in text
        assert rows == 600


def test_a_saved_shard_answers_to_the_bit_and_grows(both):
    for found in both:
        assert found["opened"] == [True, 2600]
        kept, rows, entries = found["saved again"]
        assert kept
        assert rows == 3300
        assert entries == ["save-000002", "shards.json"]


def test_a_save_that_ends_on_one_rank_leaves_what_there_was(both):
    assert all(found["after a refused save"] == 3300 for found in both)


def test_a_model_over_ranks_decodes_in_step(both):
    for found in both:
        assert found["greedy is dense's"]
        assert found["padded"]
        assert found["sampled"] == both[0]["sampled"]
        assert found["audits"] == 2
        assert found["given back"]
    assert "shard 1" in both[0]["explained"]


def test_a_models_context_in_shards_goes_on_as_if_it_had_never_stopped(both):
    for found in both:
        assert found["context"]
        assert found["after the context"] < 0.1
        assert found["cropped"] == 1300


def test_commands_under_torchrun_do_the_same_everywhere_and_rank_0_speaks(both):
    begun, grown, asked, sources, chat = both[0]["commands"]
    assert "700 tokens" in begun[1]
    assert "1200 tokens" in grown[1]
    assert "500 of them read" in grown[1]
    assert asked[1].endswith("\n")
    assert [each[0] for each in both[0]["commands"]] == [0, 0, 0, 2, 2]
    assert "dealt over several" in sources[2][0]
    assert "runs in one process" in chat[2][0]
    assert [each[0] for each in both[1]["commands"]] == [0, 0, 0, 2, 2]
    assert all(not printed for _, printed, _ in both[1]["commands"])


def test_a_rank_that_dies_stops_the_others_and_what_was_saved_is_whole(ranks):
    folder, (found, _) = ranks
    assert "What was saved is whole" in found["death"]
    assert "rank 0 of 2 got no answer" in found["death save"]
    assert found["death seconds"] < 30
    part = folder / "before the end" / "save-000001"
    assert [len(AttentionDB.open(part / f"shard-{rank}")) for rank in range(RANKS)] == [988, 512]
