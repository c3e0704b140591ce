"""A stage of benchmarks.gpu before all that is timed: are the answers right, and do the kernels race?

As a program of its own the small steps that compute-sanitizer watches.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dbattn import AttentionDB, RetrievalConfig

TESTS = Path(__file__).parent.parent / "tests"
SECONDS = 240
TOOLS = ("memcheck", "racecheck")


def checks() -> list[dict[str, Any]]:
    """The tests that a GPU runs, and what compute-sanitizer finds in small steps."""
    return [tested(), *(sanitized(tool) for tool in TOOLS)]


def tested() -> dict[str, Any]:
    """The tests of kernels against the specification, and of stores on a GPU."""
    options = "-q", "-n", "auto", "-k", "cuda", "-p", "no:cacheprovider"
    return _checked("tests", r"\d+ passed.*", sys.executable, "-m", "pytest", *options, str(TESTS))


def sanitized(tool: str) -> dict[str, Any]:
    """What a tool of compute-sanitizer finds in the steps of this module."""
    watched = "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", __name__
    # Each tensor in memory of its own, so that a step beyond its end is seen.
    return _checked(tool, "SUMMARY: 0 (errors|hazards).*", *watched, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _checked(check: str, summary: str, *command: str, **environment: str) -> dict[str, Any]:
    """What a command ``says`` at its end, as the pattern ``summary`` has it; how it ``failed`` where it does not."""
    environment = os.environ | environment
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command, cwd=TESTS.parent, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        except FileNotFoundError as error:
            return {"check": check, "failed": str(error)}
        try:
            ended = f"ended with {process.wait(SECONDS)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {SECONDS} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it began
        log.seek(0)
        text = log.read().decode(errors="replace")
    found = re.search(summary, text)
    if found and process.returncode == 0:
        return {"check": check, "says": found[0]}
    return {"check": check, "failed": f"{text[-2000:]}\n{ended}"}


def small_steps() -> None:
    """A prompt and decode steps over 1,500 rows and more, in device and in host memory, by one level of lists and two.

    Two levels are of more rows than a watched step has time for: what says so is lowered.
    """
    kernels: Any = import_module("index_kernels._triton_segmented")
    scan: Any = import_module("dbattn.index._list_scan")

    def random(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, 64, device="cuda", dtype=torch.bfloat16)

    for two_level in (False, True):
        if two_level:
            kernels.MANY_ROWS = scan.ONE_LEVEL = 0
            scan.budget.cache_clear()
        for where in ("device", "host"):
            config = RetrievalConfig(k=16, dense_below=0, audit_rate=0.0, rows=where, prefill="lists")
            db = AttentionDB(2, 64, config=config)
            db.store.append(random(2, 1500), random(2, 1500))
            db.attend(random(8, 1500))
            for _ in range(2):
                db.insert(random(2, 130), random(2, 130))
                db.attend(random(8, 1))
            index: Any = db.index
            assert any(getattr(of, "two_level", False) for of, _ in index.table._cache) == two_level
    torch.cuda.synchronize()


if __name__ == "__main__":
    small_steps()
