"""SharedContext: the rows of a snapshot in memory once, for all caches that begin with them."""

import threading

import torch

from ..attention import AttentionDB
from ..config import RetrievalConfig
from ..snapshot import Snapshot


class SharedContext:
    """The layers of a snapshot as databases, read when a cache first asks for them, which all caches fork."""

    def __init__(self, snapshot: Snapshot, config: RetrievalConfig, device: torch.device) -> None:
        self._snapshot: Snapshot | None = snapshot
        self._config, self._device = config, device
        self._reading = threading.Lock()
        self._layers: list[AttentionDB] = []

    def forks(self) -> list[AttentionDB]:
        """A fork of each layer.

        Raises:
            SnapshotError: a file is damaged, or holds something else than what the manifest says; names the file.
        """
        with self._reading:
            if self._snapshot is not None:
                self._layers = self._read(self._snapshot)
                self._snapshot = None  # its files are let go
        return [db.fork() for db in self._layers]

    def _read(self, snapshot: Snapshot) -> list[AttentionDB]:
        layers = []
        for number in range(len(snapshot.info.layers)):
            db = AttentionDB.of_snapshot(snapshot, number, self._config, self._device)
            db.fork()  # moves the rows to where forks share them
            layers.append(db)
        return layers
