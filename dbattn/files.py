"""Files that are whole or absent, standard streams in a file's place, and what a disk refuses, said in one way."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from index_kernels.folders import cache_folder

__all__ = ["cache_folder", "check_output", "disk_errors", "name_of", "write_json", "written_whole"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def name_of(place: Path | TextIO) -> str:
    """How messages call a file, or a standard stream in its place."""
    return str(place) if isinstance(place, Path) else "standard input"


def check_output(option: str, path: Path | TextIO | None) -> None:
    """Raise before the work starts if a file cannot be written there."""
    if not isinstance(path, Path):
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder, expected a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: the folder {path.parent} does not exist")
    written = path if _is_stream(path) else path.parent
    if not os.access(written, os.W_OK):
        raise PermissionError(f"{option} {path}: {written} cannot be written")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Whatever is raised inside the block because the disk refused becomes an OSError that names ``path``.

    safetensors and tokenizers have errors of their own that end in "(os error 28)"; Python's own name no file where
    it is the writing that failed.
    """
    cause: Exception
    try:
        yield
        return
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.errno not in _FULL):
            raise
        code, cause = error.errno, error
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        code, cause = int(found[1]), error
    advice = " (make room and do it again: what was there before is whole)" if code in _FULL else ""
    raise OSError(code, os.strerror(code) + advice, str(path)) from cause


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, this process's own; it becomes ``path`` at the end of the block.

    A pipe or a device is written to as it is.
    """
    if _is_stream(path):
        with disk_errors(path):
            yield path
        return
    aside = path.with_name(f".writing-{os.getpid()}.{path.name}")
    try:
        with disk_errors(path):
            yield aside
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path | TextIO | None, data: dict[str, Any]) -> None:
    """Write ``data`` to a file or a stream, if there is one."""
    text = json.dumps(data, indent=2) + "\n"
    if isinstance(path, Path):
        with written_whole(path) as aside:
            aside.write_text(text, encoding="utf-8")
    elif path is not None:
        print(text, end="", file=path, flush=True)


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()
