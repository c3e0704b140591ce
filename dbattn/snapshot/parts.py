"""Snapshots of shards: each rank's rows are a snapshot of their own, and one small file says which belong together.

::

    book.dbattn/shards.json             how many ranks and rows, and the digest of each part's manifest
    book.dbattn/save-000007/shard-0/    a snapshot: what rank 0 holds
    book.dbattn/save-000007/shard-1/

A save makes new parts beside the old ones, with links to files that stay, and when all ranks have theirs, rank 0 puts a
new ``shards.json`` in place of the old: that is the instant of the save. Whatever ends before it, the old parts are
there, whole. Ranks on machines without a common disk each have their parts; rank 0's machine has ``shards.json``.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from index_kernels.integer import is_integer

from ..config import RetrievalConfig
from ..shards import BLOCK, Shards
from ..windows import Windows
from .folder import ASIDE, SHARDS, SnapshotError, locked, publish, read_small, sync_folder, written_aside
from .manifest import MANIFEST_LIMIT, ModelInfo
from .reader import describe
from .states import LayerState
from .writer import Layer, SaveReport, SnapshotWriter

FORMAT, VERSION = "dbattn shards", 1
SAVE = re.compile(r"save-(\d{6,9})")


@dataclass(frozen=True)
class Parts:
    """What ``shards.json`` says.

    Attributes:
        block: positions dealt to a rank at a time.
        rows: of all parts together.
        start: first valid row of each batch row, among all rows.
        save: number of the save, which names the folder of the parts.
        digests: of each rank's manifest.
    """

    block: int
    rows: int
    start: tuple[int, ...]
    save: int
    digests: tuple[str, ...]

    def part(self, folder: Path, rank: int) -> Path:
        """A rank's snapshot."""
        return folder / f"save-{self.save:06}" / f"shard-{rank}"

    def to_bytes(self) -> bytes:
        """The file as it is written."""
        return (json.dumps({"format": FORMAT, "format_version": VERSION, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, path: Path, raw: bytes) -> "Parts":
        """Read a file that anyone may have written.

        Raises:
            SnapshotError: it is not one; says what is wrong.
        """
        try:
            data = json.loads(raw.decode("ascii"))
        except ValueError as error:
            raise SnapshotError(f"{path} is damaged: it is not JSON ({error})") from None
        names = ["format", "format_version", "block", "rows", "start", "save", "digests"]
        if not isinstance(data, dict) or list(data) != names or data["format"] != FORMAT:
            raise SnapshotError(f"{path} is damaged: it does not have the fields {', '.join(names)}")
        if data["format_version"] != VERSION or data["block"] != BLOCK:
            raise SnapshotError(
                f"{path} is of format_version {data['format_version']!r} with blocks of {data['block']!r}, "
                f"expected {VERSION} and {BLOCK}"
            )
        start, digests = data["start"], data["digests"]
        counts = all(is_integer(data[name], 1, 10**9) for name in ("rows", "save"))
        fits = counts and all(
            isinstance(each, list) and each and all(map(ok, each))
            for each, ok in ((start, lambda row: is_integer(row, 0, data["rows"])), (digests, _is_digest))
        )
        if not fits:
            raise SnapshotError(f"{path} is damaged: rows, start, save or digests are none")
        return cls(data["block"], data["rows"], tuple(start), data["save"], tuple(digests))


def read_parts(path: str | os.PathLike[str]) -> Parts | None:
    """What a folder's ``shards.json`` says; None where it has none.

    Raises:
        SnapshotError: it is damaged.
    """
    file = Path(path) / SHARDS
    try:
        return Parts.from_bytes(file, read_small(file, MANIFEST_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        return None


def open_parts(path: str | os.PathLike[str], shards: Shards) -> tuple[Parts, Path]:
    """What a folder holds, and this rank's snapshot in it.

    Raises:
        FileNotFoundError: there is no such folder.
        SnapshotError: it is of no shards, of another number of ranks, or some rank's part is missing or of another
            save; names the part. The same on all ranks.
    """
    folder = Path(path)
    parts = shards.agreed(lambda: _parts_of(folder) if shards.rank == 0 else None)[0]
    assert parts is not None
    if len(parts.digests) != shards.ranks:
        raise SnapshotError(
            f"{folder} holds the shards of {len(parts.digests)} ranks, this group has {shards.ranks}: start as many "
            f"(torchrun --nproc-per-node {len(parts.digests)})"
        )
    own = parts.part(folder, shards.rank)

    def check() -> None:
        if not own.is_dir():
            raise SnapshotError(f"{own} is missing: the folder lacks what rank {shards.rank} saved")
        info = describe(own)
        if info.digest != parts.digests[shards.rank] or info.rows != shards.before(parts.rows):
            raise SnapshotError(f"{own} is not the part that was saved with the others: its manifest is another one")

    shards.agreed(check)
    return parts, own


class ShardWriter:
    """As SnapshotWriter, by all ranks of a group together; each makes the same calls.

    Raises:
        SnapshotError: another writer holds the folder, or it holds something else than shards of as many ranks.
        OSError: the folder cannot be made, or is a file.
    """

    def __init__(self, path: str | os.PathLike[str], shards: Shards) -> None:
        self.path, self._shards = Path(path), shards
        self._lock = ExitStack()
        self._saved = shards.agreed(self._begin)[0]
        if self._saved is not None and len(self._saved.digests) != shards.ranks:
            self.close()
            open_parts(path, shards)  # says so
        # Together: a slow rank must not remove the folder that a fast one has made for its next part.
        shards.agreed(self._remove_others)

    @property
    def exists(self) -> bool:
        """Whether the folder holds shards by now."""
        return self._saved is not None

    def save(
        self,
        layers: Sequence[Layer],
        config: RetrievalConfig,
        *,
        rows: int,
        start: Tensor,
        model: ModelInfo | None = None,
        token_ids: Tensor | None = None,
        windows: Windows | None = None,
        states: Sequence[LayerState] = (),
    ) -> SaveReport:
        """Make the folder hold these layers, of which each rank has its own rows; see SnapshotWriter.

        Args:
            rows: of all ranks together.
            start: int64 ``[B]``, first valid row of each batch row, among all rows.
            token_ids: int64 ``[B, rows]``, of all rows.

        Raises:
            ValueError: as SnapshotWriter, on any rank; rows that are too few for each rank to have some.
        """
        shards = self._shards
        if windows is not None:
            raise ValueError("a text that was read by windows cannot be saved in shards")
        if not all(shards.held_by_each(rows)):
            raise ValueError(f"{rows} rows are too few to be saved in {shards.ranks} shards of blocks of {BLOCK}")
        number = 1 if self._saved is None else self._saved.save + 1
        wanted = Parts(BLOCK, rows, tuple(start.tolist()), number, ())
        own = wanted.part(self.path, shards.rank)

        def write() -> tuple[SaveReport, str]:
            shutil.rmtree(own, ignore_errors=True)  # of a save that another rank could not make
            own.parent.mkdir(parents=True, exist_ok=True)
            if self._saved is not None:
                # Files of rows never change: the new part shares them with the old one.
                shutil.copytree(self._saved.part(self.path, shards.rank), own, copy_function=os.link)
            with SnapshotWriter(own) as writer:
                ids = None if token_ids is None else shards.ours(token_ids, 0, dim=1)
                report = writer.save(layers, config, model=model, token_ids=ids, states=states)
            sync_folder(own.parent)
            return report, describe(own).digest

        done = shards.agreed(write)
        parts = Parts(BLOCK, rows, wanted.start, number, tuple(digest for _, digest in done))

        def commit() -> None:
            if shards.rank == 0:
                sync_folder(self.path)
                with written_aside(self.path) as aside:
                    aside.write_bytes(parts.to_bytes())
                    publish(aside, self.path / SHARDS)
                sync_folder(self.path)

        shards.agreed(commit)
        self._saved = parts
        shards.agreed(self._remove_others)
        reports = [report for report, _ in done]
        return SaveReport(*(sum(getattr(each, name) for each in reports) for name in SaveReport.__dataclass_fields__))

    def close(self) -> None:
        """Let other writers in. Calling it again does nothing."""
        self._lock.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()

    def _begin(self) -> Parts | None:
        self.path.mkdir(exist_ok=True)
        if self._shards.rank:
            return None
        self._lock.enter_context(locked(self.path))
        shutil.rmtree(self.path / ASIDE, ignore_errors=True)  # of a writer that was killed
        saved = read_parts(self.path)
        others = sorted(each.name for each in self.path.iterdir() if not _is_ours(each.name))
        if others:
            self._lock.close()
            raise SnapshotError(
                f"{self.path} holds something else than shards (it has {others[0]}): save to a new folder"
            )
        return saved

    def _remove_others(self) -> None:
        """Remove our parts of other saves, and folders of saves that are empty then."""
        kept = None if self._saved is None else self._saved.save
        for entry in self.path.iterdir():
            found = SAVE.fullmatch(entry.name)
            if found and int(found[1]) != kept:
                shutil.rmtree(entry / f"shard-{self._shards.rank}", ignore_errors=True)
                with suppress(OSError):  # another rank's part is still there
                    entry.rmdir()


def _parts_of(folder: Path) -> Parts:
    parts = read_parts(folder)
    if parts is None:
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; expected a snapshot, which is a folder")
        raise SnapshotError(
            f"{folder} holds no shards ({SHARDS} is missing): what one process saved is opened by one process"
        )
    return parts


def _is_ours(name: str) -> bool:
    return name in (SHARDS, ASIDE) or SAVE.fullmatch(name) is not None


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None
