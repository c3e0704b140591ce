"""The folder under a snapshot: one writer at a time, files that appear whole or not at all, files that are checked."""

import fcntl
import hashlib
import os
import re
import shutil
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import disk_errors

MANIFEST = "manifest.json"
# In its place where several ranks saved, each a part; see parts.py.
SHARDS = "shards.json"
# What a writer may remove when no manifest names it; nothing else in the folder is ever touched.
DATA_FILE = re.compile(r"(rows|segment|index|tokens|queries|states)-\d{9,}-\d{9,}-[0-9a-f]{16}\.safetensors")
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


class DataFile:
    """A safetensors file of a snapshot, held open: what becomes of its name later does not matter.

    It is mapped from disk: pages are read when they are touched, and never written. Whoever takes tensors calls
    ``check`` before.
    """

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        """Open the file and read its header, which nobody has checked yet.

        Raises:
            FileNotFoundError: there is no such file.
            SnapshotError: not an ordinary file of ``size`` bytes, or not a safetensors file.
        """
        found = _size_of_ordinary(path)
        if found != size:
            raise SnapshotError(f"{path} is damaged: it has {found} bytes, expected {size}")
        self.path = path
        self._sha256, self._checking = sha256, threading.Lock()
        self._fd = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._fd)
        self._tensors = _open_tensors(path)
        # Of its tensors.
        self.names: list[str] = list(self._tensors.keys())

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, mapped."""
        # An ordinary tensor even under inference_mode, whose tensors could not be used outside it.
        with torch.inference_mode(False):
            found: Tensor = self._tensors.get_tensor(name)
        return found

    def check(self) -> None:
        """Read every byte, the first time.

        Raises:
            SnapshotError: they have another SHA-256.
        """
        with self._checking:
            if not self._close.alive:
                return
            with os.fdopen(os.dup(self._fd), "rb") as file:
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() != self._sha256:
                    raise SnapshotError(
                        f"{self.path} is damaged: its bytes are not those that were saved (SHA-256 differs)"
                    )
            self._close()


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from disk: pages are read when they are touched, and never written.

    Raises:
        SnapshotError: not a safetensors file, or one whose header claims what it cannot.
    """
    with torch.inference_mode(False):
        file = _open_tensors(path)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict


def _open_tensors(path: Path) -> Any:
    from safetensors import safe_open

    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    # Before the library takes memory for it.
    if header > min(HEADER_LIMIT, path.stat().st_size - 8):
        raise SnapshotError(f"{path} is not a safetensors file: its header would have {header} bytes")
    try:
        with torch.inference_mode(False):
            return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise SnapshotError(f"{path} is not a safetensors file: {error}") from error


def _size_of_ordinary(path: Path) -> int:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise SnapshotError(f"{path} is not an ordinary file (a link, a folder or a device is not followed)")
    return found.st_size
