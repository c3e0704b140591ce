"""dbattn itself, through its own AttentionDB and with its own accounting of bytes."""

import time
from dataclasses import replace

from torch import Tensor

from dbattn import AttentionDB

from .._stores import config_of, with_config
from ._contract import Answer, Operator, distinct, ids_of


class Database(Operator):
    """One index with one tail over rows of one type.

    The setting is the budget k, and 0 the one that dbattn takes where nobody chooses. flat, ivf and hnsw read far more
    to choose rows than the rows themselves, as exact search does, so a budget is compared with the rows alone, and what
    they really read is counted beside.
    """

    paper = "this project"
    implementation = "kernel"

    def __init__(self, index: str, tail: str, storage: str | None = None) -> None:
        super().__init__()
        self._config = replace(config_of(index, None, tail), storage=storage)
        self._db: AttentionDB | None = None
        self._segmented = index == "segmented"
        self.patience = 1.0 if self._segmented else 1.25

    def fit(self, keys: Tensor, values: Tensor) -> None:
        """See Operator; the rows are the database's."""
        if self._db is None:
            self._db = AttentionDB(keys.shape[1], keys.shape[3], value_dim=values.shape[3], config=self._config)
            self.rows = self._db.store
        self._db.insert(keys, values)

    def learn(self, queries: Tensor) -> None:
        """See Operator; as a wrapped model's prompt does."""
        assert self._db is not None
        self._db.analyze(queries)

    @property
    def most(self) -> int:
        """See Operator: k = T reads all rows."""
        return len(self)

    def cost(self, query: Tensor, setting: int) -> float:
        """See Operator; counted without answering."""
        db = self._at(setting)
        return db.explain(query).bytes_read if self._segmented else self._distinct_bytes(self._ids(db, query))

    def answer(self, query: Tensor, setting: int) -> Answer:
        """See Operator."""
        db = self._at(setting)
        began = time.perf_counter()
        out = db.attend(query)
        seconds = time.perf_counter() - began
        assert isinstance(out, Tensor)
        plan, ids = db.explain(query), self._ids(db, query)
        rows = sum(source.actual.rows for source in plan.sources if source.actual is not None)
        free = None if self._segmented else self._distinct_bytes(ids)
        return Answer(out, rows, plan.bytes_read, free, ids, seconds)

    def _at(self, setting: int) -> AttentionDB:
        assert self._db is not None
        return with_config(self._db, k=setting or None)

    def _ids(self, db: AttentionDB, query: Tensor) -> Tensor:
        """Rows that the answer reads, ``[1, Hq, 1, n]``."""
        return ids_of(db.row_weights(query).read[:, :, None] > 0)

    def _distinct_bytes(self, ids: Tensor) -> int:
        return distinct(ids[0, :, 0].unflatten(0, (len(self.keys), -1)), len(self)) * self.row_bytes
