"""SharedContext: the rows of a snapshot once, for all caches that begin with them."""

import threading
from collections.abc import Sequence

import torch

from ..attention import AttentionDB
from ..config import RetrievalConfig
from ..sharded import ShardedDB
from ..shards import Shards
from ..snapshot import LayerState, Parts, Snapshot


class SharedContext:
    """The layers of a snapshot as databases, read when a cache first asks for them; all caches hold forks of them.

    Rows that were read by windows stay in their files, where caches find those that they read. ``of_rows``: the device
    of each database's rows, ``of_layers``: of what each layer of the model holds beside. ``parts``: what the snapshot
    is one rank's part of.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        config: RetrievalConfig,
        of_rows: Sequence[torch.device],
        of_layers: Sequence[torch.device],
        shards: Shards | None = None,
        parts: Parts | None = None,
    ) -> None:
        self._snapshot: Snapshot | None = snapshot
        self._shards, self._parts = shards, parts
        self._config, self._of_rows, self._of_layers = config, of_rows, of_layers
        self._reading = threading.Lock()
        self._layers: list[AttentionDB] = []
        # What layers hold that are no databases; read with them.
        self.states: tuple[LayerState, ...] = ()

    @property
    def layers(self) -> list[AttentionDB]:
        """A database for each layer, to be forked and not changed.

        Raises:
            SnapshotError: a file is damaged, or holds something else than what the manifest says; names the file.
        """
        with self._reading:
            if self._snapshot is not None:
                snapshot, made = self._snapshot, []
                if self._shards is None:
                    made = self._read(snapshot)
                else:
                    # Damage that one rank finds stops all of them.
                    self._shards.agreed(lambda: made.extend(self._read(snapshot)))
                self._layers = made
                self._snapshot = None  # its files are let go
        return self._layers

    def _read(self, snapshot: Snapshot) -> list[AttentionDB]:
        layers, self.states = [], snapshot.states(self._of_layers)
        for number, device in enumerate(self._of_rows):
            db = AttentionDB.of_snapshot(snapshot, number, self._config, device, self._shards)
            if isinstance(db, ShardedDB) and self._parts is not None:
                db.begin_with(self._parts.rows, torch.tensor(self._parts.start))
            if snapshot.info.windows is None:
                db.fork()  # moves the rows to where forks share them
            else:
                db.release()
                db.store.freeze()
            layers.append(db)
        return layers
