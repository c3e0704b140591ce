"""Files that are whole or absent, and where what is kept between runs lies."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where rates, captures and converted models are kept: ``DBATTN_CACHE``, or a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DBATTN_CACHE") or Path(base) / "dbattn")


def check_output(option: str, path: Path | None) -> None:
    """Raise before the work starts if a file cannot be written there."""
    if path is not None and path.is_dir():
        raise ValueError(f"{option} {path} is a folder, expected a file")
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: the folder {path.parent} does not exist")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, this process's own; it becomes ``path`` at the end of the block."""
    aside = path.with_name(f".writing-{os.getpid()}.{path.name}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write ``data`` if there is a path."""
    if path is not None:
        with written_whole(path) as aside:
            aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
