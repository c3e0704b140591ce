"""What a decode step asks of the host on a device: no wait, and few operations. Run as if on one: no GPU is needed."""

import pytest
import torch
from conftest import rows_as_if_on_a_device
from torch.utils._python_dispatch import TorchDispatchMode

import dbattn
from dbattn.query.choose import choose_plan
from dbattn.query.usage import Rates

# They launch nothing.
FREE = {
    "view",
    "slice",
    "select",
    "expand",
    "as_strided",
    "detach",
    "alias",
    "transpose",
    "unsqueeze",
    "empty",
    "split",
}
WAITS = {"_local_scalar_dense", "equal", "nonzero", "item", "masked_select"}


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def as_if_on_a_device(monkeypatch, gpu=None):
    rows_as_if_on_a_device(monkeypatch, gpu)
    monkeypatch.setattr("dbattn.dense._takes_flash", lambda query, keys, values: True)
    monkeypatch.setattr("dbattn.dense._flash", flash)


def flash(query, keys, values, scale):
    """One operation, as on a GPU."""
    return torch.zeros_like(query), query[..., 0]


@pytest.mark.parametrize(
    ("dtype", "gpu", "reason"),
    [
        (torch.float32, None, "no rates for cuda"),
        (torch.bfloat16, "a GPU", "a GPU scans so few rows as fast as it is asked to"),
        (torch.bfloat16, "a GPU without launches", "a dense scan is estimated to be faster"),
    ],
)
def test_a_dense_step_on_a_device_is_few_operations_and_waits_for_none(monkeypatch, dtype, gpu, reason):
    as_if_on_a_device(monkeypatch, gpu)
    monkeypatch.setattr("dbattn.query.choose.rates", lambda engine, gpu: Rates(1.0 if engine else 0.0, 0.0, 0.0, 0.0))
    if gpu == "a GPU without launches":
        monkeypatch.setattr("dbattn.query.choose.LEAST_BYTES", 0)
    choose_plan.cache_clear()
    db = dbattn.AttentionDB(2, 16)
    rows = torch.randn(1, 2, 3000, 16, dtype=dtype)
    db.insert(rows, rows)
    assert not len(db.index), "what no plan will read is not built"
    one, query = torch.randn(1, 2, 1, 16, dtype=dtype), torch.randn(1, 8, 1, 16, dtype=dtype)
    for _ in range(2):  # the first makes room
        db.insert(one, one)
        db.attend(query)
    with Dispatched() as step:
        db.insert(one, one)
        db.attend(query)
    launched = [name for name in step.names if name not in FREE]
    assert not [name for name in step.names if name in WAITS]
    assert len(launched) <= 8, launched
    assert db.explain(query).reason.startswith(reason)


def test_rows_are_indexed_on_a_device_once_retrieving_is_estimated_to_be_faster(monkeypatch):
    as_if_on_a_device(monkeypatch, "a GPU")
    scan = Rates(0.0, 0.0, 1e-8, 0.0)
    monkeypatch.setattr(
        "dbattn.query.choose.rates", lambda engine, gpu: Rates(0.003, 0.0, 0.0, 0.0) if engine else scan
    )
    monkeypatch.setattr("dbattn.query.choose.LEAST_BYTES", 0)
    choose_plan.cache_clear()
    db = dbattn.AttentionDB(2, 16, config=dbattn.RetrievalConfig(k=64, dense_below="auto"))
    rows = torch.randn(1, 2, 2000, 16, dtype=torch.bfloat16)
    db.insert(rows, rows)  # 256 KB: a scan takes 2.6 ms
    assert not len(db.index)
    db.insert(rows, rows)
    assert len(db.index) == 3840
    choose_plan.cache_clear()


def test_numbers_that_are_not_finite_are_found_out_later_on_a_device(monkeypatch):
    as_if_on_a_device(monkeypatch)
    choose_plan.cache_clear()
    for name, value in (("keys", float("nan")), ("values", 1e9)):
        db = dbattn.AttentionDB(2, 16)
        rows = torch.randn(1, 2, 30, 16)
        db.insert(rows, rows)
        for i in range(3):
            given = {"keys": torch.randn(1, 2, 1, 16), "values": torch.randn(1, 2, 1, 16)}
            given[name][0, 1, 0, 3] = value if i == 1 else 0.0
            db.insert(**given)
        with pytest.raises(ValueError, match=f"{name} stored one by one from row 30 on hold"):
            db.insert(rows, rows)
        assert len(db) == 33
