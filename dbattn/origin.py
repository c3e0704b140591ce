"""Where figures come from: the machine, the date, the commit. Printed on every plot and kept in every record."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import __version__


def origin() -> dict[str, Any]:
    """``date`` (UTC), ``commit`` and ``machine`` of figures that are measured now."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(), "machine": machine()}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def origin_line(record: dict[str, Any]) -> str:
    """One line from ``origin()`` or a record that holds its keys: CPU, cores, torch, date, commit."""
    at = record["machine"]
    where = f"{at['cpu']}, {at['cores']} cores, {at['threads']} threads, torch {at['torch']}"
    return f"{where} · {record['date'][:10]} · {record.get('commit', 'commit not recorded')}"


def _commit() -> str:
    """``commit 1a2b3c4``, marked where files were changed since; without a clone, the version."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        words = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty= with changes"]
        try:
            found = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
            return f"commit {found.stdout.strip()}"
        except (OSError, subprocess.SubprocessError):
            pass
    return f"dbattn {__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
