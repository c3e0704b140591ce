"""Steps: whatever answers a part of a query is one, shown by EXPLAIN, counted by audits, merged like the others."""

import pytest
import torch
from conftest import database, random_rows

from dbattn import AttentionDB, RetrievalConfig, RowSource, StateSource, dense_attention, relative_error
from dbattn.config import INDEX_TRAITS, IndexTraits
from dbattn.index import register_index
from dbattn.index.flat import FlatIndex


class EverySecond(FlatIndex):
    """A fifth index: finds rows at even positions only."""

    name = "every-second"

    def search(self, query, store, k, lo, stop, lift=None):
        found = super().search(query, store, 2 * k, lo, stop, lift)
        even = torch.where(found.ids % 2 == 0, found.ids, -1)
        order = (even < 0).int().argsort(dim=-1, stable=True)
        return type(found)(even.gather(-1, order)[..., :k], found.bytes_read)


@pytest.fixture
def fifth(monkeypatch):
    monkeypatch.setattr("dbattn.config.INDEX_TRAITS", INDEX_TRAITS)
    register_index(EverySecond, IndexTraits(f"{__name__}:EverySecond"))
    yield EverySecond.name
    del INDEX_TRAITS[EverySecond.name]


def filled(n=3000, **options):
    """A database, its keys and values, and a query: the same for an ``n``."""
    torch.manual_seed(0)
    keys, values = random_rows(n)
    return database(keys, values, **options), keys, values, torch.randn(1, 4, 1, 16)


def test_an_index_of_ones_own_is_planned_explained_bounded_audited_and_saved(fifth, tmp_path):
    db, keys, values, query = filled(index=fifth, k=50)
    plan = db.explain(query)
    assert [source.kind for source in plan.sources] == ["sinks + hot rows", "index scan"]
    assert "every-second, k=50" in str(plan)
    assert 0 < db.audit(query).recall < 1
    assert (db.search(query, 5).ids % 2 == 0).sum() >= 15
    db.save(tmp_path / "x")
    assert torch.equal(AttentionDB.open(tmp_path / "x").attend(query), db.attend(query))
    bounded, *_ = filled(index=fifth, k=50, max_error=0.01, audit_rate=1.0)
    exact = dense_attention(query, keys, values)
    assert relative_error(bounded.attend(query), exact).max() < 0.05
    assert sum(bounded.stats.rungs.values()) == 1


def test_an_index_is_registered_once_whole_and_with_known_options(fifth):
    with pytest.raises(ValueError, match="there is an index 'every-second' already"):
        register_index(EverySecond, IndexTraits(f"{__name__}:EverySecond"))

    class Sixth(EverySecond):
        name = "sixth"

    with pytest.raises(ValueError, match=r"options are \['width'\], expected fields of RetrievalConfig"):
        register_index(Sixth, IndexTraits(f"{__name__}:Sixth", options={"width": 3}))
    with pytest.raises(ValueError, match="which is not"):
        register_index(Sixth, IndexTraits(f"{__name__}:EverySecond"))
    assert "sixth" not in INDEX_TRAITS
    assert RetrievalConfig(index="flat").index_name == "flat"


@pytest.mark.parametrize("index", ["flat", "segmented"])
def test_a_state_made_elsewhere_answers_like_its_rows(index):
    """What a shard sends: the merge of two stores' states is the answer over both."""
    here, keys, values, query = filled(index=index, k=3000)
    far_keys, far_values = random_rows(500)
    there = database(far_keys, far_values, dense_below=None)
    state = StateSource(*there.attend(query, return_lse=True), detail="a shard", rows=500, bytes=500 * 2 * 2 * 64)
    both = torch.cat([far_keys, keys], dim=2), torch.cat([far_values, values], dim=2)
    assert relative_error(here.attend(query, extra=state), dense_attention(query, *both)).max() < 1e-5
    few = database(keys, values, index=index, k=100)
    by_rows = few.attend(query, extra=RowSource(far_keys, far_values), return_lse=True)
    for ours, theirs in zip(few.attend(query, extra=state, return_lse=True), by_rows, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"index": "flat"}, {"index": "segmented"}, {"retrieve": False}])
def test_explain_shows_what_a_call_brings_along_and_audits_measure_it(options):
    db, *_, query = filled(index=options.get("index", "flat"), k=4000 if "retrieve" in options else 100)
    rows = RowSource(*random_rows(20))
    brought = {"extra": rows, "sink_logits": torch.full((4,), 6.0)}
    plan = db.explain(query, **brought)
    assert [source.kind for source in plan.sources][-2:] == ["extra rows", "sink logits"]
    assert sum(source.mass for source in plan.sources) == pytest.approx(1, abs=1e-4)
    assert plan.sources[-1].mass > 0.05
    assert plan.sources[-2].actual.rows == 20
    # The sink is part of what the error is measured against, so it damps it.
    with_sink, without = (db.audit(query, **given).relative_error for given in (brought, {}))
    assert with_sink == 0 if plan.is_dense else with_sink != without


def test_a_state_that_does_not_fit_is_refused():
    db, *_, query = filled(300)
    with pytest.raises(
        ValueError, match=r"out \[1, 4, 1, 8\] and lse \[1, 4, 1\] do not fit: expected \[1, 4, 1, 16\]"
    ):
        db.attend(query, extra=StateSource(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1)))
    with pytest.raises(ValueError, match="lse holds NaN"):
        db.attend(query, extra=StateSource(torch.zeros(1, 4, 1, 16), torch.full((1, 4, 1), float("nan"))))
