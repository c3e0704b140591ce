"""Copies on a GPU of rows in the host's memory: they change what is fetched, and no bit of an answer.

Under Triton's interpreter, and on a GPU where there is one.
"""

import pytest
import torch
from conftest import TRITON, database, random_rows

pytest.importorskip("triton")

KV_HEADS, HEADS, DIM = 2, 4, 16
READ, CODED = 24, 96
# Rows that come, or go, before a query; 0: none, and the query before is asked again.
CHANGES = (0, 0, 3, 130, 0, 400, 0, -200, 1)


def answered(copies, device, storage=None, batch=1, softcap=None, read=READ):
    """What rows chosen by code answer to queries that follow each other: outputs, lses, rows read, those of copies."""
    from index_kernels import ListReading, attend_segmented

    with pytest.MonkeyPatch.context() as patch:
        programs = {"SCORING": 0, "READING": 0, "CHOOSING": 1}  # few: the interpreter runs one after the other
        for name, value in programs.items() | {("COPIES", copies)}:
            patch.setattr(f"index_kernels._triton_segmented.{name}", value)
        torch.manual_seed(0)

        def rows(count):
            return [part.to(device) for part in random_rows(count, batch=batch)]

        db, found = database(*rows(500), storage=storage), []
        query = torch.randn(batch, HEADS, 1, DIM, device=device)
        for change in CHANGES:
            if change > 0:
                db.insert(*rows(change))
            elif change < 0:
                db.truncate(len(db) + change)
            if change:
                query = query + 0.3 * torch.randn_like(query)
            how = ListReading(
                len(db.index), len(db), 4, KV_HEADS * read, KV_HEADS * CODED, KV_HEADS * len(db), 0.25, softcap, 0.4,
                0.7, True,
            )  # fmt: skip
            answer = attend_segmented(
                db.store.turn(query), *db.store.buffers, db.index.table, how, start=db.store.start, by_code=True,
                details=True, backend="triton",
            )  # fmt: skip
            found.append((answer.out.cpu(), answer.lse.cpu(), answer.rows_read, answer.copies_read))
        return found


@pytest.fixture(params=TRITON)
def ask(request):
    """``answered`` on a backend."""
    if request.param == "triton-interpreter":
        pool = request.getfixturevalue("interpreter")
        return lambda copies, **options: pool.submit(answered, copies, "cpu", **options).result()
    return lambda copies, **options: answered(copies, "cuda", **options)


@pytest.mark.parametrize(
    "options", [{}, {"storage": "int8", "softcap": 3.0}, {"batch": 2, "read": 40}], ids=["plain", "int8", "batch"]
)
def test_copies_change_no_bit_of_an_answer(ask, options):
    without, many = (ask(copies, **options) for copies in (0, 8))
    few = many if options else ask(1)  # in rings that overflow
    for found in (few, many):
        for (out, lse, read, _), (same_out, same_lse, same_read, _) in zip(found, without, strict=True):
            assert torch.equal(out, same_out)
            assert torch.equal(lse, same_lse)
            assert read == same_read
    assert not any(copied for *_, copied in without)
    first, again = many[0], many[1]
    assert first[3] == 0, "nothing was read before"
    assert again[3] > 0.6 * again[2], "the same rows are read again"
    assert any(copied for *_, copied in few)
