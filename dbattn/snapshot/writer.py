"""Writing a snapshot: only files that are new, then the manifest, whose renaming is the instant of the save."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..config import RetrievalConfig
from ..index import KeyIndex
from ..store import KVStore
from ..windows import Windows
from .folder import (
    ASIDE,
    DATA_FILE,
    MANIFEST,
    SnapshotError,
    digest_of,
    locked,
    publish,
    read_small,
    remove_leftovers,
    sync_folder,
    written_aside,
)
from .manifest import MANIFEST_LIMIT, FileInfo, LayerInfo, ModelInfo, SnapshotInfo
from .states import LayerState

# Rows of a file, where no index has moved them.
ROWS_PER_FILE = 4096
# Layers share a file up to this size: few files, but never all layers of a large segment in memory at once.
BYTES_PER_FILE = 256 << 20

Layer = tuple[KVStore, KeyIndex]


@dataclass(frozen=True)
class SaveReport:
    """What a save did: files and bytes written, and files kept from the save before."""

    files_written: int
    bytes_written: int
    files_kept: int


class SnapshotWriter:
    """The one writer of a snapshot folder, which stays locked until ``close``; for many saves in a row.

    The folder is made if need be (its parent must exist); what a killed writer left in it is removed. Pass the writer
    to ``AttentionDB.save`` or ``Handle.save`` in place of a path. The lock is an advisory ``flock``: POSIX only.

    Raises:
        SnapshotError: another writer holds the folder, or it holds something else than a snapshot.
        OSError: the folder cannot be made, or is a file.

    Example:
        >>> with SnapshotWriter("book.dbattn") as writer:
        ...     db.insert(keys, values)
        ...     db.save(writer)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            self._saved = self._find_saved()
            remove_leftovers(self.path, {file.name for file in self._saved.files} if self._saved else set())
            self._lock: ExitStack | None = stack.pop_all()

    @property
    def exists(self) -> bool:
        """Whether the folder holds a snapshot by now."""
        return self._saved is not None

    def save(
        self,
        layers: Sequence[Layer],
        config: RetrievalConfig,
        *,
        model: ModelInfo | None = None,
        token_ids: Tensor | None = None,
        windows: Windows | None = None,
        states: Sequence[LayerState] = (),
    ) -> SaveReport:
        """Make the folder hold these layers; a crash at any instant leaves what it held before, or them.

        Args:
            layers: store and index of each layer, all with the same number of rows and batch rows.
            config: of all indexes.
            model: whose rows they are.
            token_ids: int64 ``[B, n]``, one for each row.
            windows: how the first rows were read, where that was by windows.
            states: what layers of the model hold that are no databases, in their order.

        Raises:
            ValueError: layers of different length, or token ids of another shape. Nothing is written then.
            SnapshotError: the writer is closed.
        """
        if self._lock is None:
            raise SnapshotError(f"the writer of {self.path} is closed")
        rows, batch = len(layers[0][0]), len(layers[0][0].start)
        for number, (store, _) in enumerate(layers):
            if len(store) != rows or len(store.start) != batch:
                raise ValueError(
                    f"layer {number} has {len(store)} rows in {len(store.start)} batch rows, layer 0 has {rows} in "
                    f"{batch}: was a call interrupted? Crop the cache to the shortest layer"
                )
        if token_ids is not None and token_ids.shape != (batch, rows):
            raise ValueError(f"token_ids have shape {list(token_ids.shape)}, expected [{batch}, {rows}]")
        files = []
        for run in _runs(layers):
            reused = self._still_good(run, layers)
            parts = _parts(run, {number for file in reused for number in file.layers}, layers)
            files += [*reused, *(self._write(part, tensors) for part in parts if (tensors := _tensors(part, layers)))]
        if token_ids is not None and rows:
            tokens = FileInfo("tokens", 0, rows, tuple(range(len(layers))), 0, "")
            files.append(self._write(tokens, {"token_ids": token_ids.detach().cpu().long().contiguous()}))
        sampled = tuple(number for number, (store, _) in enumerate(layers) if store.sample is not None)
        if sampled:
            queries = FileInfo("queries", 0, rows, sampled, 0, "")
            files.append(self._write(queries, _tensors(queries, layers)))
        if held := [state for state in states if state.tensors]:
            tensors = {
                f"layer.{state.layer}.{name}": tensor.detach().cpu().contiguous()
                for state in held
                for name, tensor in state.tensors.items()
            }
            files.append(self._write(FileInfo("states", 0, rows, tuple(s.layer for s in held), 0, ""), tensors))
        facts = tuple(_facts(store, index) for store, index in layers)
        described = tuple(state.info for state in states)
        info = SnapshotInfo(self.path, rows, config, facts, model, tuple(files), windows, described)
        before = {file.name for file in self._saved.files} if self._saved else set()
        if self._saved is None or info.digest != self._saved.digest:
            # The data must be there before the manifest that names it is.
            sync_folder(self.path)
            with written_aside(self.path) as aside:
                aside.write_bytes(info.to_bytes())
                publish(aside, self.path / MANIFEST)
            sync_folder(self.path)
        self._saved = info
        for store, _ in layers:
            store.mark_saved(info.digest)
        remove_leftovers(self.path, {file.name for file in info.files})
        sizes = [file.bytes for file in files if file.name not in before]
        return SaveReport(len(sizes), sum(sizes), len(files) - len(sizes))

    def close(self) -> None:
        """Let other writers in. Calling it again does nothing."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _find_saved(self) -> SnapshotInfo | None:
        try:
            raw = read_small(self.path / MANIFEST, MANIFEST_LIMIT)
        except FileNotFoundError:
            others = sorted(entry.name for entry in self.path.iterdir() if not _is_ours(entry.name))
            if others:
                raise SnapshotError(
                    f"{self.path} is no snapshot and not empty (it has {others[0]}): save to a new folder"
                ) from None
            return None
        # A damaged snapshot is not overwritten: whoever saves here decides what becomes of it.
        return SnapshotInfo.from_bytes(self.path, raw)

    def _still_good(self, run: FileInfo, layers: Sequence[Layer]) -> list[FileInfo]:
        """The files of the latest save that hold this run of some of its layers as it is now."""
        if self._saved is None:
            return []
        digest = self._saved.digest
        return [
            file
            for file in self._saved.files
            if (file.kind, file.first, file.stop) == (run.kind, run.first, run.stop)
            and set(file.layers) <= set(run.layers)
            and all(layers[number][0].rows_saved(digest) >= run.stop for number in file.layers)
            and _has_size(self.path / file.name, file.bytes)
        ]

    def _write(self, file: FileInfo, tensors: dict[str, Tensor]) -> FileInfo:
        from safetensors.torch import save_file

        with written_aside(self.path) as aside:
            save_file(tensors, aside)
            file = replace(file, bytes=aside.stat().st_size, sha256=digest_of(aside))
            target = self.path / file.name
            if not (_has_size(target, file.bytes) and digest_of(target) == file.sha256):
                publish(aside, target)
        return file


def save(
    target: "str | os.PathLike[str] | SnapshotWriter",
    layers: Sequence[Layer],
    config: RetrievalConfig,
    *,
    model: ModelInfo | None = None,
    token_ids: Tensor | None = None,
    windows: Windows | None = None,
    states: Sequence[LayerState] = (),
) -> SaveReport:
    """``SnapshotWriter.save`` to a path, locked meanwhile, or to a writer."""
    with nullcontext(target) if isinstance(target, SnapshotWriter) else SnapshotWriter(target) as writer:
        return writer.save(layers, config, model=model, token_ids=token_ids, windows=windows, states=states)


def _runs(layers: Sequence[Layer]) -> list[FileInfo]:
    """The runs of rows that are saved together, each with the layers that have it; sizes are not known yet."""
    wanted: dict[tuple[str, int, int], list[int]] = {}
    for number, (store, index) in enumerate(layers):
        rows, bounds = len(store), index.bounds
        if index.moves_rows:
            runs = [("segment", *run) for run in pairwise(bounds)]
            if rows > bounds[-1]:
                runs += [("rows", *run) for run in pairwise([*range(bounds[-1], rows, ROWS_PER_FILE), rows])]
        else:
            runs = [("rows", *run) for run in pairwise([*range(0, rows, ROWS_PER_FILE), rows])]
            runs += [("index", *run) for run in pairwise(bounds)]
        for run in runs:
            wanted.setdefault(run, []).append(number)
    return [FileInfo(*run, tuple(numbers), 0, "") for run, numbers in wanted.items()]


def _parts(run: FileInfo, done: set[int], layers: Sequence[Layer]) -> Iterator[FileInfo]:
    """The run cut into files: those of its layers that are not done, as many together as a file may hold."""
    part: list[int] = []
    room = BYTES_PER_FILE
    for number in run.layers:
        if number in done:
            continue
        store = layers[number][0]
        size = (run.stop - run.first) * store.row_bytes * store.num_kv_heads * len(store.start)
        if part and size > room:
            yield replace(run, layers=tuple(part))
            part, room = [], BYTES_PER_FILE
        part.append(number)
        room -= size
    if part:
        yield replace(run, layers=tuple(part))


def _tensors(file: FileInfo, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """What the file holds, by name: ``layer.3.keys``."""
    tensors = {}
    for number in file.layers:
        store, index = layers[number]
        if file.kind == "queries":
            assert store.sample is not None
            for name, part in store.sample.state().items():
                tensors[f"layer.{number}.{name}"] = part.cpu().contiguous()
            continue
        if file.kind != "index":
            for name, rows in zip(("keys", "values"), store.between(file.first, file.stop), strict=True):
                tensors[f"layer.{number}.{name}"] = rows.detach().cpu().contiguous()
        if file.kind != "rows":
            for name, array in index.state(file.first, file.stop).items():
                tensors[f"layer.{number}.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
    return tensors


def _facts(store: KVStore, index: KeyIndex) -> LayerInfo:
    dtype = None if store.is_empty else str(store.kept_dtype).removeprefix("torch.")
    start = () if store.is_empty else tuple(store.start.tolist())
    rotated = store.rotated and not store.is_empty
    return LayerInfo(
        store.num_kv_heads, store.head_dim, store.value_dim, dtype, start, store.settled, len(index), rotated
    )


def _is_ours(name: str) -> bool:
    return name == ASIDE or DATA_FILE.fullmatch(name) is not None


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.lstat().st_size == size
    except FileNotFoundError:
        return False
