"""Prompts that are read through lists: what is exact, what is told, what is left as it would have been."""

import copy

import pytest
import torch
from conftest import TRITON, random_rows

import dbattn
from dbattn import RetrievalConfig, dense_attention
from dbattn.metrics import relative_error
from dbattn.query.prompt import PromptLog
from index_kernels import BlockReading, _cpu_blocks, attend_block, dense_decode, multiplies_halves

OPTIONS = {"audit_rate": 0.0, "prefill": "lists"}


def topical(rows, heads=2, dim=16, batch=1):
    """Queries ``[batch, 2 * heads, rows, dim]``, keys, values: a text of a few topics, of which queries ask."""
    topics = 3 * torch.randn(12, dim)
    of_row = torch.randint(12, (batch, heads, rows))
    keys = topics[of_row] + 0.3 * torch.randn(batch, heads, rows, dim)
    values = topics.roll(1, 0)[of_row] + 0.3 * torch.randn(batch, heads, rows, dim)
    query = (topics[torch.randint(12, (batch, 2 * heads, rows))] + 0.3 * torch.randn(batch, 2 * heads, rows, dim)) / 2
    return query, keys, values


def reader(keys, values, start=None, **options):
    """A database whose rows came as a cache's do: stored, and not sealed before the prompt's queries ask."""
    config = dbattn.RetrievalConfig(**OPTIONS | options)
    db = dbattn.AttentionDB(keys.shape[1], keys.shape[3], value_dim=values.shape[3], config=config)
    append(db, keys, values, start)
    return db


def append(db, keys, values, start=None):
    db.store.append(keys, values)
    db.store.set_start(db.store.start if start is None else start)


def test_with_every_list_read_a_prompt_is_answered_as_by_a_dense_scan():
    query, keys, values = topical(3000)
    db = reader(keys, values, k=3000)
    out, lse = db.attend(query, return_lse=True)
    dense, dense_lse = dense_attention(query, keys, values, return_lse=True)
    assert db.stats.prompt.by_lists >= 1000
    assert relative_error(out, dense).max() < 1e-4
    torch.testing.assert_close(lse, dense_lse, atol=1e-4, rtol=1e-4)


def test_a_prompt_through_lists_reads_a_part_of_the_rows_and_is_close_to_dense():
    query, keys, values = topical(6000)
    db = reader(keys, values)
    error = relative_error(db.attend(query), dense_attention(query, keys, values))
    assert error.mean() < 0.02
    assert error[:, :, :1024].max() < 1e-4
    prompt = db.stats.prompt
    assert prompt.positions == 6000
    assert 0.6 * 6000 < prompt.by_lists < 6000
    assert prompt.rows_read / prompt.by_lists < 1600


def test_no_row_after_a_block_changes_its_answers():
    query, keys, values = topical(4000)
    later = keys.clone(), values.clone()
    for rows in later:
        rows[:, :, 3584:] = 50 * torch.randn_like(rows[:, :, 3584:])
    one, other = (reader(*rows).attend(query) for rows in ((keys, values), later))
    torch.testing.assert_close(one[:, :, :3584], other[:, :, :3584], atol=1e-5, rtol=1e-4)


def test_chunks_of_whole_blocks_give_the_answers_of_the_prompt_at_once():
    query, keys, values = topical(4608)
    whole = reader(keys, values).attend(query)
    db, parts = reader(keys[:, :, :512], values[:, :, :512]), []
    for at in range(0, 4608, 512):
        if at:
            append(db, keys[:, :, at : at + 512], values[:, :, at : at + 512])
        parts.append(db.attend(query[:, :, at : at + 512]))
        db.store.note_queries(query[:, :, at : at + 512], at)
        db.sync(reading=True)
    assert db.stats.prompt.by_lists == 4608 - 1024
    # The end of a long call reads more rows.
    found = torch.cat(parts, dim=2)
    torch.testing.assert_close(found[:, :, :3584], whole[:, :, :3584], atol=1e-4, rtol=1e-3)
    dense = dense_attention(query, keys, values)
    ends, same = (relative_error(out[:, :, 3584:], dense[:, :, 3584:]).mean() for out in (whole, found))
    assert ends < 0.7 * same


def test_what_a_prompt_left_in_pieces_becomes_what_it_would_have_been():
    query, keys, values = topical(4000)
    read, plain = reader(keys, values), reader(keys, values, prefill="dense")
    for db in (read, plain):
        db.store.note_queries(query, 0)
        db.attend(query)
        db.sync(reading=True)
    assert read.is_reading
    assert not plain.is_reading
    assert read.index.in_pieces
    for db in (read, plain):
        append(db, keys[:, :, :1], values[:, :, :1])
    token = query[:, :, :1]
    assert torch.equal(read.attend(token), plain.attend(token))
    assert read.index.bounds == plain.index.bounds
    assert torch.equal(read.keys, plain.keys)


def test_a_follow_up_prompt_goes_on_from_rows_that_were_sealed_before_it():
    query, keys, values = topical(5000)
    db = reader(keys[:, :, :3000], values[:, :, :3000])
    db.attend(query[:, :, :3000])
    db.sync()
    db.attend(query[:, :, 2999:3000])
    append(db, keys[:, :, 3000:], values[:, :, 3000:])
    out = db.attend(query[:, :, 3000:])
    db.sync()
    assert db.stats.prompt.by_lists > 3400
    assert relative_error(out, dense_attention(query[:, :, 3000:], keys, values)).mean() < 0.03
    assert torch.equal(db.keys, keys)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_left_padding_softcap_and_a_sink_are_honoured(softcap):
    start = torch.tensor([0, 900])
    query, keys, values = topical(3500, batch=2)
    sink = torch.randn(4)
    db = reader(keys, values, start, k=4000)
    out, lse = db.attend(query, softcap=softcap, sink_logits=sink, return_lse=True)
    state = dense_attention(query, keys, values, start=start, softcap=softcap, return_lse=True)
    dense, dense_lse = dbattn.dense.merge_sink(*state, sink)
    assert db.stats.prompt.by_lists >= 1000
    torch.testing.assert_close(lse[0], dense_lse[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[0], dense[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(out[1, :, 900:], dense[1, :, 900:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("softcap", "storage"), [(None, None), (20.0, "int8")])
def test_the_cpus_kernels_answer_as_the_specification(softcap, storage):
    query, keys, values = topical(3000, batch=2)
    db = reader(keys, values, torch.tensor([0, 700]), storage=storage)
    query = db.store.turn(query)
    db.index.seal_before(db.store, db.store.start + 4, 2560)
    how = BlockReading(len(db.index), 4, 2 * 256, 0.25, softcap, 0.38, 0.7, True)
    fast, slow = (
        attend_block(query[:, :, 2560:], *db.store.rows, db.index.table, how, start=db.store.start, backend=backend)
        for backend in ("numba", "reference")
    )
    assert fast.rows_read == slow.rows_read > 600
    assert fast.summaries_answering == slow.summaries_answering < fast.summaries_read - fast.lists_opened
    torch.testing.assert_close(fast.out, slow.out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.lse_by_source, slow.lse_by_source, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.lse, fast.lse_by_source.logsumexp(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dim", "value_dim", "softcap", "storage"),
    [(16, 16, None, None), (80, 24, 5.0, None), (64, 64, None, "bfloat16"), (32, 32, 20.0, "int8")],
)
def test_products_of_bfloat16_are_near_those_of_float32_and_only_where_rows_are_left(
    monkeypatch, dim, value_dim, softcap, storage
):
    monkeypatch.setattr(_cpu_blocks, "FASTER", True)  # without its instruction a processor does the same in several
    query, keys, values = topical(3000, dim=dim, batch=2)
    db = reader(keys, values[..., :value_dim], torch.tensor([0, 1500]), storage=storage)
    query = db.store.turn(query[:, :, 2560:])
    db.index.seal_before(db.store, db.store.start + 4, 2560)
    rows = db.index.table.lists.size.sum(axis=(1, 2))
    # All of the second's rows are read, and a part of the first's.
    assert rows[1] < rows[0] - 500
    how = BlockReading(len(db.index), 4, int(rows[1]), 1.5 * dim**-0.5, softcap, 0.38, 0.7, True)
    plain, halved = (
        attend_block(query, *db.store.rows, db.index.table, how._replace(halves=halves), start=db.store.start)
        for halves in (False, True)
    )
    assert plain[3:7] == halved[3:7], "the same rows are read"
    assert torch.equal(halved.lse_by_source[0], plain.lse_by_source[0]), "the newest rows are read as they stand"
    assert torch.equal(halved.out[1], plain.out[1])
    assert 1e-6 < relative_error(halved.out[0], plain.out[0]).mean() < 0.01
    torch.testing.assert_close(halved.lse_by_source, plain.lse_by_source, atol=0.1, rtol=0.01)


def test_lists_that_were_and_are_no_more_are_not_taken_for_rows_left_unread(monkeypatch):
    monkeypatch.setattr(_cpu_blocks, "FASTER", True)
    query, keys, values = topical(3000)
    db = reader(keys, values)
    db.index.seal_before(db.store, db.store.start + 4, 2560)
    db.sync()
    sizes = db.index.table.lists.size
    assert sizes.sum() > 2 * len(db.index), "shorter lists stood where longer ones, which are fewer, were written"
    how = BlockReading(len(db.index), 4, 2 * (len(db.index) - 4), 0.25, None, 0.38, 0.7, True)
    plain, halved = (
        attend_block(
            query[:, :, -64:], *db.store.rows, db.index.table, how._replace(halves=halves), start=db.store.start
        )
        for halves in (False, True)
    )
    assert plain.rows_read == how.rows_read
    assert torch.equal(plain.out, halved.out)


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim", "softcap"),
    [
        (torch.float32, 16, 16, None), (torch.float32, 80, 24, 5.0), (torch.bfloat16, 64, 64, None),
        (torch.float16, 128, 128, 30.0), (torch.bfloat16, 256, 256, None), (torch.int8, 80, 24, 5.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", TRITON)
def test_a_gpu_reads_a_block_as_the_specification_says(run, backend, dtype, dim, value_dim, softcap):
    if backend == "triton-interpreter" and dtype not in (torch.float32, torch.int8):
        pytest.skip("the interpreter multiplies in float32 whatever the type")
    packed = dtype == torch.int8
    query, keys, values = topical(2700, heads=1 + (dim == 16), batch=2, dim=dim)
    given = torch.float32 if packed else dtype
    query, keys, values = (rows.to(given) for rows in (query, keys, values[..., :value_dim]))
    db = reader(keys, values, torch.tensor([0, 700]), storage="int8" if packed else None)
    db.index.seal_before(db.store, db.store.start + 4, 2560)
    how = BlockReading(len(db.index), 4, 2 * 256, dim**-0.5, softcap, 0.38, 0.7, True)
    # Not contiguous: the numbers of a query stand apart.
    query = db.store.turn(query[:, :, 2560:]).mT.contiguous().mT
    call = "attend_block", query, *db.store.rows, db.index.table, how
    got, wanted = (run(name, *call, start=db.store.start) for name in (backend, "reference"))
    assert got[3:7] == wanted[3:7], "rows, lists and summaries are the same ones"
    tolerance = 1e-5 if dtype == torch.float32 or backend == "triton-interpreter" else 1e-2
    assert relative_error(got.out, wanted.out).mean() < tolerance
    torch.testing.assert_close(got.lse_by_source, wanted.lse_by_source, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_many_positions_are_scanned_as_the_specification_says(softcap):
    query, keys, values = torch.randn(2, 4, 260, 16), torch.randn(2, 2, 700, 16), torch.randn(2, 2, 700, 16)
    start = torch.tensor([30, 500])  # the first 60 positions of the second see nothing
    fast, slow = (
        dense_decode(query, keys, values, start=start, softcap=softcap, backend=backend)
        for backend in ("numba", "reference")
    )
    assert (fast[0][1, :, :60] == 0).all()
    for got, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1050, 1400])
def test_no_piece_of_a_prompt_stays_where_a_segment_ends_as_it_does(rows):
    query, keys, values = topical(rows)
    db, whole = reader(keys, values), reader(keys, values)
    db.attend(query)
    assert db.index.in_pieces
    db.sync()
    whole.sync()
    assert [len(index) for index in (db.index, whole.index)] == [len(whole.index)] * 2
    lists = [index.table.lists.used.ravel().tolist() for index in (db.index, whole.index)]
    assert lists[0] == pytest.approx(lists[1], rel=0.2), "lists of 32 rows, not of 8"
    first = 4 + int(db.store.start[0])
    assert db.index.table.codes[:, :, first : len(db.index)].any(axis=-1).all()


def test_a_block_whose_rows_stand_in_lists_is_refused():
    query, keys, values = topical(3000)
    db = reader(keys, values)
    db.sync()
    how = BlockReading(len(db.index), 4, 100, 0.25, None, 0.38, 0.7, True)
    with pytest.raises(ValueError, match=r"a block at rows 2500 to 3000 with 2\d\d\d rows in lists"):
        attend_block(query[:, :, 2500:], *db.store.rows, db.index.table, how, start=db.store.start)


def test_explain_and_audit_say_what_a_prompt_read_and_change_nothing():
    query, keys, values = topical(4000)
    db = reader(keys, values)
    twin = copy.deepcopy(db)
    plan = db.explain(query)
    assert [source.kind for source in plan.sources] == ["sinks + hot rows", "list scan", "summary scan"]
    assert "a prompt's positions 3584 to 3999" in plan.reason
    assert "the newest of" in plan.reason
    assert all(source.detail.endswith("as bfloat16") == multiplies_halves() for source in plan.sources[1:])
    assert sum(source.mass for source in plan.sources) == pytest.approx(1.0, abs=1e-3)
    assert all(source.actual is not None for source in plan.sources)
    report = db.audit(query)
    assert 0 < report.relative_error < 0.02
    assert 0.3 < report.attention_mass < 1
    assert report.rows_read < 1500
    assert torch.equal(db.attend(query), twin.attend(query))


@pytest.mark.parametrize(("noise", "target", "more"), [(2.0, 0.02, True), (0.0, 0.3, False)])
def test_a_layer_reads_more_rows_where_audits_find_errors_and_fewer_where_they_do_not(noise, target, more):
    query, keys, values = topical(5000)
    values = values + noise * torch.randn_like(values)
    fixed, audited = reader(keys, values), reader(keys, values, audit_rate=0.1, target_error=target)
    error, less = (
        relative_error(db.attend(query), dense_attention(query, keys, values)).mean() for db in (fixed, audited)
    )
    blocks = -(-fixed.stats.prompt.by_lists // 512) - 2  # those at the end are not audited
    assert (len(fixed.stats.prompt.errors), len(audited.stats.prompt.errors)) == (0, blocks)
    rows, wanted = (db.stats.prompt.rows_read for db in (fixed, audited))
    assert (wanted > rows, less < error) == (more, more)
    assert "for the errors of audits" in audited.explain(query).reason
    assert "for the errors of audits" not in fixed.explain(query).reason
    assert "times 4 for the end of a prompt" in fixed.explain(query).reason


def test_rows_grow_with_the_error_that_they_would_have_left_by_size():
    efforts = []
    for by_size in (0.01, 0.03, 0.06):
        log = PromptLog()
        for _ in range(40):
            log.add(by_size * log.effort**-0.5, RetrievalConfig(prefill="lists", target_error=0.02))
        efforts.append(log.effort)
    # Blocks aim at half the target, 0.01; one audit more, that counts as 1, is among nine.
    assert efforts == pytest.approx([1.0, (8 * 3 + 1) / 9, (8 * 6 + 1) / 9])


def test_auto_reads_short_prompts_few_positions_and_bounded_answers_densely(monkeypatch):
    monkeypatch.setattr("dbattn.query.prompt.LEAST_ROWS", 2048)
    query, keys, values = topical(4000)
    for length, asked, options in ((2048, 2048, {}), (4000, 40, {}), (4000, 4000, {"max_error": 0.05})):
        db = reader(keys[:, :, :length], values[:, :, :length], prefill="auto", **options)
        db.attend(query[:, :, length - asked : length])
        assert db.stats.prompt.positions == 0
        assert db.stats.prompt_reasons == {"more queries in one call than max_queries=1": 1}
    db = reader(keys, values, prefill="auto")
    db.attend(query)
    assert db.stats.prompt.by_lists > 1000


def test_auto_goes_on_densely_where_audits_find_lists_too_far_off(monkeypatch):
    monkeypatch.setattr("dbattn.query.prompt.LEAST_ROWS", 2048)
    keys, values = random_rows(6000)
    query = torch.randn(1, 4, 6000, 16)
    db = reader(keys, values, prefill="auto", audit_rate=0.02)
    out = db.attend(query)
    assert max(db.stats.prompt.errors) > 0.06
    assert db.stats.prompt.by_lists < 2000
    assert any("too far off" in reason for reason in db.stats.prompt_reasons)
    assert relative_error(out[:, :, -512:], dense_attention(query[:, :, -512:], keys, values)).max() < 1e-4
    insistent = reader(keys, values, audit_rate=0.02)
    insistent.attend(query)
    assert insistent.stats.prompt.by_lists > 4000


def test_a_config_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="prefill is 'fast', expected one of auto, dense, lists"):
        dbattn.RetrievalConfig(prefill="fast")
    with pytest.raises(ValueError, match="not with index='flat'"):
        dbattn.RetrievalConfig(prefill="lists", index="flat")
    with pytest.raises(ValueError, match="max_error"):
        dbattn.RetrievalConfig(prefill="lists", max_error=0.1)


def test_a_wrapped_model_reads_a_long_prompt_through_lists_says_so_and_goes_on(tmp_path):
    transformers = pytest.importorskip("transformers")
    from test_hf import assert_close, prompt, tiny

    from dbattn.hf import wrap

    model, inputs = tiny(max_position_embeddings=4096), prompt(length=3000, padding=(300, 0))
    ids = inputs["input_ids"]
    config = dbattn.RetrievalConfig(prefill="lists", k=10**6, dense_below=0, audit_rate=0.02)
    with torch.inference_mode():
        plain = transformers.DynamicCache(config=model.config)
        expected = model(**inputs, past_key_values=plain).logits
        token = expected[:, -1:].argmax(dim=-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        following = model(token, attention_mask=mask, past_key_values=plain).logits
        with wrap(model, config) as handle:
            cache = handle.new_cache()
            logits = [
                model(ids[:, at : at + 1500], attention_mask=inputs["attention_mask"][:, : at + 1500],
                      past_key_values=cache).logits
                for at in (0, 1500)
            ]  # fmt: skip
            logits = torch.cat(logits, dim=1)
            assert_close(logits[1], expected[1])
            assert_close(logits[0, 300:], expected[0, 300:])
            layers = handle.report().layers
            assert all(layer.by_lists >= 1000 for layer in layers)
            assert all(layer.by_lists_error < 1e-3 for layer in layers)
            assert "positions were read through lists in 2 of 2 layers" in str(handle.report())
            handle.save(tmp_path / "book", cache, token_ids=ids)
            assert_close(model(token, attention_mask=mask, past_key_values=cache).logits, following)
        with wrap(model, context=tmp_path / "book") as handle:
            reopened = model(token, attention_mask=mask, past_key_values=handle.new_cache()).logits
            assert_close(reopened, following)


def test_auto_waits_for_more_rows_than_8192():
    query, keys, values = topical(8704, heads=1)
    db = reader(keys[:, :, :8192], values[:, :, :8192], prefill="auto")
    db.attend(query[:, :, :8192])
    assert db.stats.prompt.positions == 0
    append(db, keys[:, :, 8192:], values[:, :, 8192:])
    db.attend(query[:, :, 8192:])
    assert db.stats.prompt.by_lists == 512
