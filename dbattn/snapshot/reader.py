"""Opening a snapshot: files are mapped, and every byte of one is checked before any of them can reach an answer."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from index_kernels.packed import SCALE_BYTES

from ..config import RetrievalConfig
from ..index import KeyIndex
from ..store import KVStore, MappedRows, Part, QuerySample, check_range
from .folder import MANIFEST, SHARDS, DataFile, SnapshotError, read_small
from .manifest import MANIFEST_LIMIT, FileInfo, LayerInfo, SnapshotInfo
from .states import LayerState

# How often a writer may replace the snapshot while it is being opened.
RETRIES = 10


def describe(path: str | os.PathLike[str]) -> SnapshotInfo:
    """What a snapshot says it holds, from its manifest alone: the other files are neither read nor checked.

    Raises:
        FileNotFoundError: there is no such folder.
        SnapshotError: it is not a snapshot, or its manifest is damaged or of another format version.
    """
    folder = Path(path)
    return SnapshotInfo.from_bytes(folder, _read_manifest(folder))


@dataclass(frozen=True)
class Snapshot:
    """A snapshot whose files are open; ``restore`` fills a store and an index from them.

    Opening does not read the files. ``restore`` checks those that it takes lists or queries from; rows that no index
    has moved stay in their files, and each of these is checked when rows of it are first asked for.

    Attributes:
        info: what the manifest says.
        token_ids: int64 ``[B, n]``, None if they were not saved.
    """

    info: SnapshotInfo
    token_ids: Tensor | None
    _files: dict[FileInfo, DataFile]
    _checking: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Snapshot":
        """Check a snapshot's manifest and the sizes of its files, and map them; see ``check`` for the rest.

        A writer may replace the snapshot meanwhile: then the new one is opened. What is open stays as it is.

        Raises:
            FileNotFoundError: there is no such folder.
            SnapshotError: it is not a snapshot, is of another format version, or a file is missing, of another size or
                no file of tensors; names the file.
        """
        folder = Path(path)
        raw = _read_manifest(folder)
        for _ in range(RETRIES):
            info = SnapshotInfo.from_bytes(folder, raw)
            try:
                files = _open_files(info)
            except FileNotFoundError as error:
                before, raw = raw, _read_manifest(folder)
                if raw == before:
                    raise SnapshotError(f"{error.filename} is missing") from None
            else:
                return cls(info, _take_token_ids(info, files), files)
        raise SnapshotError(f"{folder} is replaced faster than it can be opened")

    def check(self) -> None:
        """Compare every byte of the files with what was saved, once.

        Raises:
            SnapshotError: a file is damaged; names it.
        """
        # hashlib releases the GIL; two files at a time keep a small machine's disk and cores busy.
        with self._checking, ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for done in [pool.submit(file.check) for file in self._files.values()]:
                done.result()

    def config(self, wanted: RetrievalConfig | None) -> RetrievalConfig:
        """The config to open it with: its own, or ``wanted`` where that differs only in how a query reads.

        Raises:
            SnapshotError: an option that what is stored depends on differs; names it.
        """
        own = self.info.config
        if wanted is None:
            return own
        wanted = RetrievalConfig.checked(wanted)
        given = _structure(wanted)
        for name, saved in _structure(own).items():
            if given.get(name) != saved:
                raise SnapshotError(
                    f"{self.info.path} was saved with {name}={saved!r}, asked for is {given.get(name)!r}: "
                    "what is stored depends on it"
                )
        return wanted

    def restore(self, number: int, store: KVStore, index: KeyIndex, device: torch.device) -> None:
        """Make an empty store and an empty index of the right kind what layer ``number`` was.

        Rows stay mapped until the store is asked for them; an index of FAISS asks at once. A file of rows that is
        damaged is refused then.

        Raises:
            SnapshotError: a file is damaged, or holds something else than what the manifest says; names the file.
        """
        if not self.info.rows:
            return
        layer, folder = self.info.layers[number], self.info.path
        own = {}
        for file, opened in sorted(self._files.items(), key=lambda item: item[0].first):
            if number in file.layers and file.kind not in ("tokens", "states"):
                if file.kind != "rows":
                    opened.check()
                if file.kind != "queries":
                    own[file] = _of_layer(number, opened)
        parts = [self._rows(file, layer, arrays) for file, arrays in own.items() if file.kind != "index"]
        start = torch.tensor(layer.start, dtype=torch.int64)
        store.restore(MappedRows(tuple(parts), device), start, layer.settled, rotated=layer.rotated)
        self._restore_queries(number, store, device)
        states = {file: arrays for file, arrays in own.items() if arrays or file.kind == "segment"}
        runs = [(file.name, file.first, file.stop, arrays) for file, arrays in states.items()]
        if not runs and layer.indexed:
            runs = [(MANIFEST, 0, layer.indexed, {})]
        for name, first, stop, arrays in runs:
            try:
                state = {key: array.numpy() for key, array in arrays.items()}
                index.load_state(store, store.start + self.info.config.n_sink, first, stop, state)
            except (ValueError, TypeError) as error:
                raise SnapshotError(f"{folder / name} is refused: layer {number}: {error}") from None
        if len(index) != layer.indexed:
            raise SnapshotError(
                f"{folder / MANIFEST} is refused: layer {number} has {layer.indexed} rows indexed, "
                f"its files {len(index)}"
            )
        store.mark_saved(self.info.digest)

    def states(self, devices: Sequence[torch.device]) -> tuple[LayerState, ...]:
        """What layers of the model held that are no databases, in their order; ``devices``: where each layer's goes.

        Raises:
            SnapshotError: a file is damaged, or holds something else than what the manifest says; names the file.
        """
        found = {file: opened for file, opened in self._files.items() if file.kind == "states"}
        for opened in found.values():
            opened.check()
        states = []
        for info in self.info.states:
            arrays = {name: array for opened in found.values() for name, array in _of_layer(info.layer, opened).items()}
            state = LayerState(info.layer, info.kind, info.numbers, arrays)
            if state.info != info:
                where = self.info.path / next((file.name for file in found), MANIFEST)
                raise SnapshotError(
                    f"{where} is refused: layer {info.layer} has {state.info.tensors}, expected {info.tensors}"
                )
            with torch.inference_mode(False):
                # Copies: the file is let go.
                tensors = {name: arrays[name].clone().to(devices[info.layer]) for name in info.tensors}
            states.append(replace(state, tensors=tensors))
        return tuple(states)

    def _restore_queries(self, number: int, store: KVStore, device: torch.device) -> None:
        layer = self.info.layers[number]
        for file, opened in self._files.items():
            if file.kind == "queries" and number in file.layers:
                state = _of_layer(number, opened)
                try:
                    sample = QuerySample.of_state(
                        state, self.info.rows, len(layer.start), layer.num_kv_heads, layer.head_dim, device
                    )
                except ValueError as error:
                    raise SnapshotError(f"{self.info.path / file.name} is refused: layer {number}: {error}") from None
                store.take_sample(sample)

    def _rows(self, file: FileInfo, layer: LayerInfo, arrays: dict[str, Tensor]) -> Part:
        """Take keys and values out of a file's arrays of one layer; their numbers are not looked at yet."""
        where = self.info.path / file.name
        both = {}
        for name, dim in (("keys", layer.head_dim), ("values", layer.value_dim)):
            rows = arrays.pop(name, None)
            width = dim + SCALE_BYTES * (layer.dtype == "int8")
            shape = [self.info.batch, layer.num_kv_heads, file.stop - file.first, width]
            if rows is None or list(rows.shape) != shape or str(rows.dtype) != f"torch.{layer.dtype}":
                found = "missing" if rows is None else f"{rows.dtype} {list(rows.shape)}"
                raise SnapshotError(f"{where} is refused: {name} are {found}, expected torch.{layer.dtype} {shape}")
            both[name] = rows
        return Part(both["keys"], both["values"], _RowsCheck(self._files[file], both))


class _RowsCheck:
    """Refuses rows of a file that are not what was saved, or out of range, before they are first read."""

    def __init__(self, file: DataFile, rows: dict[str, Tensor]) -> None:
        self._file: DataFile | None = file
        self._rows = rows

    def __call__(self) -> None:
        if (file := self._file) is None:
            return
        file.check()
        for name, rows in self._rows.items():
            try:
                check_range(name, rows)
            except ValueError as error:
                raise SnapshotError(f"{file.path} is refused: {error}") from None
        self._file = None


def _structure(config: RetrievalConfig) -> dict[str, int | str | None]:
    """The options that what is stored depends on; the others only say how a query reads it."""
    options = {name: config.index_options[name] for name in ("neighbors",) if name in config.index_options}
    # The indexes of FAISS keep the rows' noise where rows will be sampled.
    tail = {"tail": config.tail_name} if config.index_name in ("ivf", "hnsw") else {}
    own = {"index": config.index_name, "storage": config.storage}
    return {**own, "window": config.window, "n_sink": config.n_sink, **options, **tail}


def _read_manifest(folder: Path) -> bytes:
    try:
        return read_small(folder / MANIFEST, MANIFEST_LIMIT)
    except FileNotFoundError:
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; expected a snapshot, which is a folder") from None
        if (folder / SHARDS).exists():
            raise SnapshotError(
                f"{folder} holds shards of several ranks: open it by as many (torchrun, group=...)"
            ) from None
        raise SnapshotError(f"{folder} is not a snapshot: {MANIFEST} is missing") from None
    except NotADirectoryError:
        raise SnapshotError(f"{folder} is not a snapshot: it is a file, expected a folder") from None


def _open_files(info: SnapshotInfo) -> dict[FileInfo, DataFile]:
    files = {}
    for file in info.files:
        files[file] = opened = DataFile(info.path / file.name, file.bytes, file.sha256)
        known = {f"layer.{number}" for number in file.layers}
        for name in opened.names:
            if file.kind != "tokens" and ".".join(name.split(".")[:2]) not in known:
                raise SnapshotError(f"{opened.path} is refused: {name!r} is not a tensor of its layers")
    return files


def _of_layer(number: int, file: DataFile) -> dict[str, Tensor]:
    prefix = f"layer.{number}."
    return {name.removeprefix(prefix): file.tensor(name) for name in file.names if name.startswith(prefix)}


def _take_token_ids(info: SnapshotInfo, files: dict[FileInfo, DataFile]) -> Tensor | None:
    for file, opened in files.items():
        if file.kind == "tokens":
            opened.check()
            ids = opened.tensor("token_ids") if "token_ids" in opened.names else None
            wanted = [info.batch, info.rows]
            if ids is None or ids.dtype != torch.int64 or list(ids.shape) != wanted or bool((ids < 0).any()):
                raise SnapshotError(
                    f"{info.path / file.name} is refused: expected token_ids, torch.int64 {wanted}, none negative"
                )
            return ids.clone()
    return None
