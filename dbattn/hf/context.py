"""A model's context on disk: what a cache is saved as, and what a wrapped model goes on from."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from ..snapshot import Parts, SaveReport, ShardWriter, Snapshot, SnapshotError, SnapshotWriter, save
from .cache import SERVED, DatabaseLayer
from .fingerprint import difference, fingerprint
from .layer_states import KEPT, Mark, check_states, kind_of
from .session import Session


def open_context(
    context: str | os.PathLike[str], decoder: nn.Module, layers: Sequence[Any], parts: Parts | None = None
) -> Snapshot:
    """A snapshot that a decoder can go on from, whose fresh cache has such layers.

    ``parts``: what it is one rank's part of.

    Raises:
        SnapshotError (a ValueError): it is of another model, or of none; says what differs.
    """
    snapshot = Snapshot.open(context)
    if snapshot.info.model is None:
        raise SnapshotError(f"{context} is not a model's context: AttentionDB.save wrote it")
    info, databases = snapshot.info, sum(type(layer) in SERVED for layer in layers)
    differs = difference(snapshot.info.model, fingerprint(decoder))
    if differs is None and len(info.layers) != databases:
        differs = f"it has {len(info.layers)} layers, this one {databases}"
    if differs is None:
        try:
            check_states(info.states, layers, info.rows if parts is None else parts.rows, info.batch)
        except ValueError as error:
            differs = str(error)
    if differs is None and info.windows is not None:
        limit = getattr(decoder.config, "max_position_embeddings", None)
        if info.states:
            differs = "it was read by windows, and has layers that cannot be"
        elif limit is not None and info.windows.span > limit:
            differs = f"its windows have {info.windows.span} positions, the model was made for {limit}"
    if differs is not None:
        raise SnapshotError(f"{context} is the context of another model: {differs}")
    return snapshot


def save_context(
    target: str | os.PathLike[str] | SnapshotWriter | ShardWriter,
    cache: DynamicCache,
    session: Session,
    decoder: nn.Module,
    token_ids: Tensor | None,
) -> SaveReport:
    """Write a cache's rows, and the token ids ``[B, n]`` that they were made of; see ``Handle.save``."""
    databases, own = [], DynamicCache(config=decoder.config).layers
    for number, layer in enumerate(cache.layers):
        if number >= len(own) or kind_of(layer) != kind_of(own[number]):
            raise ValueError(
                f"layer {number} of the cache is a {kind_of(layer)}, expected the model's own "
                f"{kind_of(own[number]) if number < len(own) else 'number of layers'}: make it with handle.new_cache()"
            )
        if not isinstance(layer, DatabaseLayer):
            if kind_of(layer) not in KEPT and kind_of(layer) != "DummyLayer":
                raise ValueError(f"layer {number} is a {kind_of(layer)} of transformers, which cannot be saved")
            continue
        if not layer.get_seq_length():
            raise ValueError(f"layer {number} of the cache has no rows: nothing to save")
        databases.append(layer.whole())
    rows, mark, shards = cache.get_seq_length(), Mark.of(cache), session.shards
    if mark.states and session.was_interrupted(cache):
        raise ValueError("a call on this cache was interrupted: states that not all layers went on to cannot be saved")
    try:
        check_states([state.info for state in mark.states], own, rows, len(databases[0][0].start))
    except ValueError as error:
        raise ValueError(f"{error}: was a call interrupted?") from None
    if token_ids is None:
        token_ids = session.tokens_of(cache)
        if token_ids is None or token_ids.shape[1] < rows:
            raise ValueError(f"the token ids of the cache's {rows} rows are not known: pass token_ids")
        token_ids = token_ids[:, :rows]
    session.check_adapters(cache)
    given: dict[str, Any] = {"model": fingerprint(decoder), "token_ids": token_ids}
    given |= {"windows": session.windows_of(cache), "states": mark.states}
    if shards is None:
        if isinstance(target, ShardWriter):
            raise ValueError("a ShardWriter writes what several ranks have: wrap the model with group, or pass a path")
        return save(target, databases, session.config, **given)
    if isinstance(target, SnapshotWriter):
        raise ValueError("a SnapshotWriter writes what one process has: pass a path, or a ShardWriter")
    start = next(layer.db.start for layer in cache.layers if isinstance(layer, DatabaseLayer) and layer.db is not None)
    with nullcontext(target) if isinstance(target, ShardWriter) else ShardWriter(target, shards) as writer:
        return writer.save(databases, session.config, rows=rows, start=start, **given)
