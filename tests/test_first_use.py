"""Processes forked from one that uses the kernels, and what first use says."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

FORKS = """
import os, signal, sys
import torch
import dbattn

def database():
    db = dbattn.AttentionDB(2, 16, config=dbattn.RetrievalConfig(index="segmented", k=64, dense_below=0))
    db.insert(torch.randn(1, 2, 1200, 16), torch.randn(1, 2, 1200, 16))
    return db

def in_child(run):
    child = os.fork()
    if not child:
        signal.alarm(250)
        try:
            run()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

query = torch.randn(1, 4, 1, 16)
before = in_child(lambda: database().attend(query))
db = database()
db.attend(query)

def refused():
    for call in (
        lambda: db.attend(query),
        lambda: db.audit(query),
        lambda: db.truncate(100),
        lambda: db.insert(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)),
        database,
    ):
        try:
            call()
        except RuntimeError as error:
            assert "spawn" in str(error), error
        else:
            raise AssertionError("was not refused")
    assert len(db) == 1200

print(before, in_child(refused))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_after_the_first_call_is_refused_and_one_forked_before_works():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=280)
    assert done.stdout == "0 0\n", done.stderr


def test_compiling_is_announced_once_and_kernels_that_are_there_say_nothing(monkeypatch, caplog):
    from numba import njit, prange

    from index_kernels import _cpu_start

    def kernel(x):
        for i in prange(x.size):
            x[i] += 1

    kernel.__module__ = "index_kernels.kernel"
    monkeypatch.setattr(_cpu_start.Notice, "told", False)
    compiled, x = njit(parallel=True)(kernel), np.zeros(3, np.float32)
    with caplog.at_level(logging.INFO, "dbattn"):
        compiled(x)
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        assert "compiling CPU kernels for this machine" in caplog.messages[0]
        assert caplog.messages[1] == "dbattn: compiling kernel"
        compiled(x)
        njit(parallel=False)(lambda x: x)(3)
        assert len(caplog.records) == 2
        compiled(x.astype(np.int32))
        assert [record.levelname for record in caplog.records[2:]] == ["INFO"]
    assert x.tolist() == [2, 2, 2]


def test_a_kernel_of_someone_else_compiles_beside_ours_wherever_it_comes_from():
    numba = pytest.importorskip("numba")
    pytest.importorskip("index_kernels._cpu_start")
    made = {}
    exec("def one(): return 1", made)  # of no module, as in a notebook's cell
    assert numba.njit(made["one"])() == 1
