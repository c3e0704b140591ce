"""A model's context on disk: what a cache is saved as, and what a wrapped model goes on from."""

import os

from torch import Tensor, nn
from transformers import DynamicCache

from ..snapshot import SaveReport, Snapshot, SnapshotError, SnapshotWriter, save
from .cache import DatabaseLayer, HybridDatabaseLayer
from .fingerprint import difference, fingerprint
from .session import Session


def open_context(context: str | os.PathLike[str], decoder: nn.Module, layers: int) -> Snapshot:
    """A snapshot that a decoder with so many layers can go on from.

    Raises:
        SnapshotError (a ValueError): it is of another model, or of none; says what differs.
    """
    snapshot = Snapshot.open(context)
    if snapshot.info.model is None:
        raise SnapshotError(f"{context} is not a model's context: AttentionDB.save wrote it")
    differs = difference(snapshot.info.model, fingerprint(decoder))
    if differs is None and len(snapshot.info.layers) != layers:
        differs = f"it has {len(snapshot.info.layers)} layers, this one {layers}"
    if differs is not None:
        raise SnapshotError(f"{context} is the context of another model: {differs}")
    return snapshot


def save_context(
    target: str | os.PathLike[str] | SnapshotWriter,
    cache: DynamicCache,
    session: Session,
    decoder: nn.Module,
    token_ids: Tensor | None,
) -> SaveReport:
    """Write a cache's rows, and the token ids ``[B, n]`` that they were made of; see ``Handle.save``."""
    databases = []
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, DatabaseLayer):
            raise ValueError(
                f"layer {number} is a {type(layer).__name__} of transformers, which cannot be saved: "
                "expected only layers that attend to all rows"
            )
        if isinstance(layer, HybridDatabaseLayer):
            raise ValueError(
                f"layer {number} keeps a state of linear attention beside its rows, which cannot be saved: "
                "expected only layers that attend to all rows"
            )
        if not layer.get_seq_length():
            raise ValueError(f"layer {number} of the cache has no rows: nothing to save")
        databases.append(layer.whole())
    if token_ids is None:
        token_ids, rows = session.tokens_of(cache), len(databases[0][0])
        if token_ids is None or token_ids.shape[1] < rows:
            raise ValueError(f"the token ids of the cache's {rows} rows are not known: pass token_ids")
        token_ids = token_ids[:, :rows]
    session.check_adapters(cache)
    return save(
        target,
        databases,
        session.config,
        model=fingerprint(decoder),
        token_ids=token_ids,
        windows=session.windows_of(cache),
    )
