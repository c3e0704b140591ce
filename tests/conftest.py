import os

# Both torch and FAISS bring a thread pool; with several pytest workers on few cores, one thread each is fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("dbattn", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dbattn")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    """The planner's choices must not depend on how busy the machine is."""
    from dbattn.machine import BUILT_IN

    monkeypatch.setattr("dbattn.plan.rates", lambda engine, threads: BUILT_IN[engine])
