"""The folder under a snapshot: one writer at a time, files that appear whole or not at all, files that are checked."""

import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..files import disk_errors

MANIFEST = "manifest.json"
# What a writer may remove when no manifest names it; nothing else in the folder is ever touched.
DATA_FILE = re.compile(r"(rows|segment|index|tokens|queries)-\d{9,}-\d{9,}-[0-9a-f]{16}\.safetensors")
ASIDE = ".writing"
# Far above what any snapshot has: a header names a few tensors a layer.
HEADER_LIMIT = 16 << 20


class SnapshotError(ValueError):
    """A snapshot that is refused, or cannot be written; names the folder or file and what was expected."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder's write lock, making the folder if need be; its parent must exist.

    An advisory ``flock`` on the folder itself (POSIX): it leaves no file behind and ends with the process.

    Raises:
        SnapshotError: another writer holds it.
        NotADirectoryError: the path is a file.
    """
    if not path.exists():
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnapshotError(f"{path} is being written by another writer: wait until it is done") from None
        yield
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the folder's present entries survive a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A path to write a file to before ``publish``; what is still there at the end is removed.

    It lies in a folder of its own, for what other libraries write beside it before they give it its name.
    """
    aside = folder / ASIDE
    with disk_errors(folder):
        aside.mkdir()
        try:
            yield aside / "file"
        finally:
            shutil.rmtree(aside)


def publish(aside: Path, target: Path) -> None:
    """Make a file durable, and only then give it its name."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, target)


def remove_leftovers(folder: Path, keep: set[str]) -> None:
    """Delete data files that are not in ``keep``, and what a killed writer left half written."""
    for entry in folder.iterdir():
        if entry.name == ASIDE and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name == ASIDE or (DATA_FILE.fullmatch(entry.name) and entry.name not in keep):
            entry.unlink()


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of an ordinary file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        SnapshotError: a link, a folder, a device, or a larger file.
    """
    size = _size_of_ordinary(path)
    if size > limit:
        raise SnapshotError(f"{path} has {size} bytes, expected at most {limit}")
    with path.open("rb") as file:
        return file.read(limit)


def check_content(path: Path, size: int, sha256: str) -> None:
    """Raise SnapshotError unless the file is an ordinary one with these many bytes and this SHA-256."""
    found = _size_of_ordinary(path)
    if found != size:
        raise SnapshotError(f"{path} is damaged: it has {found} bytes, expected {size}")
    if digest_of(path) != sha256:
        raise SnapshotError(f"{path} is damaged: its bytes are not those that were saved (SHA-256 differs)")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from disk: pages are read when they are touched, and never written.

    Raises:
        SnapshotError: not a safetensors file, or one whose header claims what it cannot.
    """
    from safetensors import safe_open

    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    # Before the library takes memory for it.
    if header > min(HEADER_LIMIT, path.stat().st_size - 8):
        raise SnapshotError(f"{path} is not a safetensors file: its header would have {header} bytes")
    try:
        # Ordinary tensors even under inference_mode, whose tensors could not be used outside it.
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
    except FileNotFoundError:
        raise
    except Exception as error:
        raise SnapshotError(f"{path} is not a safetensors file: {error}") from error


def _size_of_ordinary(path: Path) -> int:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise SnapshotError(f"{path} is not an ordinary file (a link, a folder or a device is not followed)")
    return found.st_size
