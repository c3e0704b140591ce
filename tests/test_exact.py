"""wrap(model, exact=True): retrieval drafts, dense decides, and what is written is dense's own."""

import copy

import pytest
import torch
import transformers
from test_hf import RETRIEVING as FEW
from test_hf import generate, prompt, tiny

from benchmarks.families import tiny_model
from dbattn import AttentionDB, RetrievalConfig
from dbattn.hf import UnsupportedModelError, pace, weights, wrap
from dbattn.hf.pace import MOST, RETRY, TIMED, TRIALS, Chance, Drafts, Pace

ALMOST_ALL = RetrievalConfig(index="flat", k=60, window=8, n_sink=2, dense_below=0, audit_rate=0.0)
LISTS = RetrievalConfig(index="segmented", k=16, window=8, dense_below=0)
ONE = {"batch": 1, "padding": ()}


@pytest.fixture(autouse=True)
def _drafting_pays(monkeypatch):
    """On tiny models a drafted token takes as long as a dense one."""
    monkeypatch.setattr(Pace, "choose", lambda self: 0 if len(self._passes.get(0, ())) < TIMED else 4)


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", FEW), ("llama", LISTS), ("gemma3", FEW), ("gpt_oss", ALMOST_ALL)],
    ids=["llama", "llama through lists", "gemma3", "gpt_oss"],
)
def test_greedy_tokens_are_dense_s_whatever_is_drafted(family, config):
    model, inputs = tiny(family, initializer_range=0.2), prompt(**ONE, length=150)
    expected = generate(model, inputs, max_new_tokens=40)
    with wrap(model, config, exact=True) as handle:
        for _ in range(2):
            got = generate(model, inputs, max_new_tokens=40)
            assert torch.equal(got.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-3)
        report = handle.report()
        drafts = handle.drafts
        assert not any(stats.audits for stats in handle.stats)  # dense passes check drafts already
    assert 2 * TIMED < drafts.passes < drafts.tokens == 78
    assert 0 < drafts.accepted <= drafts.drafted
    assert drafts.accepted < drafts.drafted or (family, config) != ("llama", FEW)
    assert report.summary.retrieving > 0
    assert f"Exact: 78 tokens in {drafts.passes} dense passes, {drafts.accepted} of {drafts.drafted}" in str(report)
    assert "generate" not in vars(model)
    assert torch.equal(generate(model, inputs, max_new_tokens=40).sequences, expected.sequences)


def test_drafts_keep_no_bound_and_read_no_more_than_their_number_asks_for(monkeypatch):
    model, inputs, read = tiny(initializer_range=0.2), prompt(**ONE, length=900), []
    attend = AttentionDB.attend

    def spy(db, query, **options):
        read.append((db.config.target_error, db.config.max_error, options["retrieve"]))
        return attend(db, query, **options)

    monkeypatch.setattr(AttentionDB, "attend", spy)
    config = RetrievalConfig(window=8, dense_below=0, max_error=1e-4)
    expected = generate(model, inputs, max_new_tokens=20).sequences
    with wrap(model, config, exact=True) as handle:
        assert torch.equal(generate(model, inputs, max_new_tokens=20).sequences, expected)
        layers = handle.report().layers
        assert handle.drafts.drafted
    drafts = [bounds for *bounds, retrieve in read if retrieve]
    assert len(drafts) == handle.drafts.drafted * len(layers)
    assert all(bounds == [None, None] for bounds in drafts)


def test_drafts_by_int8_weights_leave_the_tokens_dense_s_and_the_model_as_it_was(monkeypatch):
    model, inputs, rounded = tiny(initializer_range=0.2), prompt(**ONE, length=150), []
    expected = generate(model, inputs, max_new_tokens=40).sequences
    packed = weights.int8_linear
    monkeypatch.setattr(weights, "int8_linear", lambda x, weight: rounded.append(x) or packed(x, weight))
    with wrap(model, ALMOST_ALL, exact=True, draft_weights="int8") as handle:
        assert torch.equal(generate(model, inputs, max_new_tokens=40).sequences, expected)
        layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
        assert len(rounded) == handle.drafts.drafted * len(layers) > 0
        assert handle.drafts.accepted > handle.drafts.drafted / 2
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exact": False, "draft_weights": "int8"},
            'draft_weights="int8" with exact=False on cpu: expected exact=True',
        ),
        ({"exact": True, "draft_weights": "int4"}, "weights is 'int4', expected one of float32, int8"),
    ],
)
def test_draft_weights_that_do_not_serve_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wrap(tiny(), FEW, **options)


def test_it_goes_on_in_a_context_and_leaves_a_cache_that_can_be_saved_and_cropped(tmp_path):
    model, ids = tiny("gemma3", initializer_range=0.2), prompt(**ONE, length=150)["input_ids"]
    question = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        with wrap(model, FEW) as handle:
            model(ids, past_key_values=handle.new_cache())
            handle.save(tmp_path / "a")
        whole = torch.cat([ids, question], dim=1)
        expected = generate(model, {"input_ids": whole}).sequences
        with wrap(model, context=tmp_path / "a", exact=True) as handle:
            cache = handle.new_cache()
            for _ in range(2):
                assert torch.equal(generate(model, {"input_ids": whole}, past_key_values=cache).sequences, expected)
                handle.save(tmp_path / "b", cache)
                cache.crop(150 - cache.get_seq_length())
            assert handle.drafts.drafted
            new = {"input_ids": question, "attention_mask": torch.ones(1, 153, dtype=torch.int64)}
            assert torch.equal(generate(model, new, past_key_values=cache).sequences, expected[:, 150:])
            assert "no drafts: of what the cache holds, the tokens were not given" in str(handle.report())
        with wrap(model, context=tmp_path / "b") as handle:
            assert torch.equal(handle.context, expected[:, :-1])


def test_an_end_token_in_a_draft_ends_the_answer():
    model, inputs = tiny(initializer_range=0.2), prompt(**ONE, length=150)
    free = generate(model, inputs, max_new_tokens=20).sequences[0, 150:].tolist()
    ends = next(token for i, token in enumerate(free) if i >= 6 and token not in free[:i])
    expected = generate(model, inputs, max_new_tokens=20, eos_token_id=ends, pad_token_id=0).sequences
    with wrap(model, ALMOST_ALL, exact=True):
        got = generate(model, inputs, max_new_tokens=20, eos_token_id=ends, pad_token_id=0).sequences
    assert torch.equal(got, expected)
    assert expected[0, -1] == ends


def test_samples_are_accepted_by_dense_s_chances_and_those_they_were_drafted_with(monkeypatch):
    """What Leviathan et al. need for dense's distribution; the acceptance itself is transformers'."""
    model, inputs = tiny(initializer_range=0.1), prompt(**ONE, length=100)
    seen, accept = [], transformers.generation.utils._speculative_sampling

    def spy(ids, drafted, length, dense, **options):
        found = accept(ids, drafted, length, dense, **options)
        seen.append((ids, drafted.clone(), length, dense.clone(), int(found[1])))
        return found

    monkeypatch.setattr(transformers.generation.utils, "_speculative_sampling", spy)
    with wrap(model, FEW, exact=True) as handle:
        for _ in range(3):
            generate(model, inputs, do_sample=True, top_k=5, temperature=2.0, max_new_tokens=16)
        drafts = handle.drafts
    assert 0 < sum(n for *_, n in seen) == drafts.accepted < drafts.drafted
    for ids, drafted, length, dense, _ in seen:
        with torch.no_grad():
            logits = model(ids).logits[:, -length - 1 :] / 2.0
        expected = logits.masked_fill(logits < logits.topk(5).values[..., -1:], float("-inf"))
        torch.testing.assert_close(dense, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(drafted.softmax(dim=-1), dense[:, :-1].softmax(dim=-1), atol=1e-4)
        assert drafted.gather(2, ids[:, -length:, None]).isfinite().all()


def test_batches_beams_and_padding_are_written_densely_and_the_report_says_so():
    model = tiny()
    for inputs, options, why in (
        (prompt(padding=()), {}, "a batch of 2"),
        (prompt(**ONE), {"num_beams": 3}, "generate in the mode beam_search"),
        (prompt(batch=1), {}, "a prompt with padding"),
        (prompt(**ONE), {"prompt_lookup_num_tokens": 3}, "generate in the mode assisted_generation"),
    ):
        expected = generate(model, inputs, **options).sequences
        with wrap(model, FEW, exact=True) as handle:
            assert torch.equal(generate(model, inputs, **options).sequences, expected)
            assert f"no drafts: {why}" in str(handle.report())
            assert handle.report().summary.retrieving == 0


def test_plain_calls_are_dense_and_a_copy_of_the_model_refuses_to_run():
    model, inputs = tiny(), prompt(**ONE)
    expected = generate(model, inputs).sequences
    with torch.inference_mode(), wrap(model, FEW, exact=True) as handle:
        cache = handle.new_cache()
        model(**inputs, past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
        assert handle.report().summary.retrieving == 0
        with pytest.raises(RuntimeError, match="is a copy of a wrapped model"):
            generate(copy.deepcopy(model), inputs)

        class Streamer:
            tokens = ()

            def put(self, ids):
                self.tokens += tuple(ids.flatten().tolist())

            def end(self):
                self.tokens = torch.tensor([self.tokens])

        with handle.dense():
            assert torch.equal(generate(model, inputs).sequences, expected)
        assert "no drafts: dense answers were asked for" in str(handle.report())
        streamer = Streamer()
        generate(model, inputs, streamer=streamer)
        assert torch.equal(streamer.tokens, expected)
        handle.restart_report()
        assert handle.drafts == Drafts()


def test_what_cannot_go_back_over_rejected_tokens_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"cannot be exact: layer 0 \(LinearAttentionLayer\) keeps a state"):
        wrap(tiny_model("qwen3_next"), exact=True)
    with pytest.raises(UnsupportedModelError, match="has no generate"):
        wrap(tiny().model, exact=True)


def paced(draft, dense, slope, accepted, rounds=400):
    """A Pace that sees such times and so many of a draft accepted (a function of the round), in seconds; what it chose
    in each round."""
    found, pace_ = [], Pace()
    for number in range(rounds):
        drafted = CHOOSE(pace_)
        for _ in range(drafted):
            pace_.note_draft(draft)
        taken = accepted(number) if callable(accepted) else accepted
        pace_.note_pass(drafted, min(drafted, taken), dense + slope * drafted)
        found.append(drafted)
    return found, pace_


CHOOSE = pace.Pace.choose


def test_the_length_of_drafts_follows_what_is_accepted_and_what_time_they_take():
    cheap, _ = paced(0.05, 0.5, 0.02, accepted=MOST)
    assert cheap[:TIMED] == [0] * TIMED
    assert cheap[TIMED : TIMED + len(TRIALS)] == list(TRIALS)
    assert set(cheap[-50:]) == {MOST}
    rejected, _ = paced(0.05, 0.5, 0.02, accepted=1)
    assert 1 <= max(rejected[-50:]) <= 3
    useless, told = paced(0.05, 0.06, 0.02, accepted=1)
    later = useless[TIMED + len(TRIALS) :]
    assert set(later) == {0, TRIALS[0]}
    assert all(i % RETRY == 0 for i, drafted in enumerate(later, 1) if drafted)
    assert "a drafted token takes 50 ms, a dense step 60 ms" in told.why_none
    assert "as fast" in told.why_none


def test_one_slow_draft_does_not_end_drafting_and_passes_over_drafts_need_not_begin_where_others_end():
    pace_ = Pace()
    for _ in range(TIMED):
        pace_.note_pass(0, 0, 0.25)
    # Over two tokens a pass takes a step, over more hardly more.
    for drafted, slow in zip(TRIALS, (0.3, 0.0, 0.0), strict=True):
        assert CHOOSE(pace_) == drafted
        for _ in range(drafted):
            pace_.note_draft(0.05 + slow)
        pace_.note_pass(drafted, drafted, 0.4 + 0.01 * drafted)
    assert CHOOSE(pace_) > TRIALS[-1]


def test_drafts_that_are_no_longer_taken_end_before_they_lose_much():
    rounds, _ = paced(0.11, 0.29, 0.03, lambda number: MOST if number < 40 else 0, rounds=40 + RETRY)
    assert rounds[39] == MOST
    assert [drafted for drafted in rounds[40:] if drafted] == [MOST]


def test_what_was_accepted_is_known_to_the_next_call():
    chance = Chance()
    first = Pace(chance)
    for _ in range(3):
        first.note_pass(4, 0, 1.0)
    assert Pace(chance).acceptance == first.acceptance < Pace().acceptance


def test_a_call_goes_on_from_the_times_that_one_over_about_as_many_rows_found(monkeypatch):
    model, chosen, choose = tiny(), [], Pace.choose
    monkeypatch.setattr(Pace, "choose", lambda self: chosen.append(choose(self)) or chosen[-1])
    with wrap(model, FEW, exact=True):
        for length, found_out in ((150, TIMED), (160, TIMED), (600, 2 * TIMED)):
            generate(model, prompt(**ONE, length=length), max_new_tokens=12)
            assert chosen.count(0) == found_out
