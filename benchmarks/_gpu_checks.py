"""A stage of benchmarks.gpu before all that is timed: are the answers right, and do the kernels race?

As a program of its own the small steps that compute-sanitizer watches.
"""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dbattn import AttentionDB, RetrievalConfig

TESTS = Path(__file__).parent.parent / "tests"
SECONDS = 240
TOOLS = ("memcheck", "racecheck")


def checks() -> list[dict[str, Any]]:
    """The tests that a GPU runs (kernels against the specification, stores against the CPU's), and what
    compute-sanitizer finds in small steps.
    """
    python, found = sys.executable, []
    tests = python, "-m", "pytest", "-q", "-n", "auto", "-k", "cuda", "-p", "no:cacheprovider", str(TESTS)
    found.append(checked("tests", r"\d+ passed.*", *tests))
    for tool in TOOLS:
        watched = "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", python, "-m", __name__
        found.append(checked(tool, "SUMMARY: 0 (errors|hazards).*", *watched))
    return found


def checked(check: str, summary: str, *command: str) -> dict[str, Any]:
    """What a command ``says`` at its end, as the pattern ``summary`` has it; how it ``failed`` where it does not."""
    try:
        ended = subprocess.run(
            command, cwd=TESTS.parent, timeout=SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        said, well = ended.stdout, ended.returncode == 0
    except subprocess.TimeoutExpired as error:
        said, well = (error.stdout or b"") + f"stopped after {SECONDS} seconds".encode(), False
    except FileNotFoundError as error:
        said, well = str(error).encode(), False
    text = said.decode(errors="replace")
    found = re.search(summary, text)
    return {"check": check, "says": found[0]} if well and found else {"check": check, "failed": text[-2000:]}


def small_steps() -> None:
    """Decode steps over 1,500 rows, in device and in host memory, with one level of lists and with two."""
    kernels: Any = import_module("index_kernels._triton_segmented")
    for many in (kernels.MANY_ROWS, 0):
        kernels.MANY_ROWS = many
        for where in ("device", "host"):
            db = AttentionDB(2, 64, config=RetrievalConfig(k=64, dense_below=0, audit_rate=0.0, rows=where))
            rows = (torch.randn(1, 2, 1500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            db.insert(*rows)
            db.attend(torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()


if __name__ == "__main__":
    small_steps()
