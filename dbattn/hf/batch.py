"""BatchCache: several caches of one wrapped model as one, so that a decode step of all reads the weights once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from ..together import attend_together
from .cache import DatabaseLayer

# What a layer of a batch leaves on the keys, for the attention function: keys and values of each cache.
EACH = "_dbattn_each"


class BatchCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """The rows of ``caches``, of any lengths, for one new token of each: ``model(tokens [B, 1], past_key_values=...)``.

    Each cache keeps its own rows, and has one more of them afterwards. Linear layers see the batch; attention goes
    through the databases one after the other.
    """

    def __init__(self, caches: Sequence[DynamicCache]) -> None:
        self.caches = tuple(caches)
        super().__init__(layers=[BatchLayer(layers) for layers in zip(*(c.layers for c in caches), strict=True)])

    @staticmethod
    def takes(cache: DynamicCache) -> bool:
        """Whether a cache can be part of a batch: all layers are databases, with no other state and no windows."""
        return all(type(layer) is DatabaseLayer and layer.base is None for layer in cache.layers)


class BatchLayer(CacheLayerMixin):  # type: ignore[misc]  # as above
    """The same layer of several caches."""

    is_sliding = False

    def __init__(self, layers: Sequence[DatabaseLayer]) -> None:
        super().__init__()
        self.layers, self.is_initialized = layers, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The layers do it themselves."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one row ``[Hkv, 1, D]`` to each; the rows of all ride along with what is returned."""
        parts = zip(self.layers, key_states.split(1), value_states.split(1), strict=True)
        setattr(key_states, EACH, [layer.update(key, value) for layer, key, value in parts])
        return key_states, value_states

    def get_seq_length(self) -> int:
        """None of its own: where tokens stand is said by position ids."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One new token each, which sees every row: no mask."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def attend_each(attend: Any, module: Any, query: Tensor, key: Tensor, **kwargs: Any) -> Tensor:
    """``attend`` for the one query of each cache of a batch; ``[B, 1, Hq, Dv]``."""
    each = getattr(key, EACH)
    if (found := _together(query, [keys._dbattn for keys, _ in each], **kwargs)) is not None:
        return found.transpose(1, 2).contiguous()
    return torch.cat(
        [attend(module, one, *rows, None, **kwargs)[0] for one, rows in zip(query.split(1), each, strict=True)]
    )


def _together(
    query: Tensor, layers: Sequence[DatabaseLayer], scaling: float | None, softcap: float | None, s_aux: Any, **_: Any
) -> Tensor | None:
    """The same where rows that all share are scanned once; None where that does not serve, or does not pay."""
    switches, dbs = layers[0].session.switches, [layer.db for layer in layers]
    if softcap is not None or s_aux is not None or switches.audits is not None or switches.watcher is not None:
        return None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (found := attend_together([db for db in dbs if db is not None], query, scale=scale)) is None:
        return None
    for db, one in zip(dbs, query.split(1), strict=True):
        assert db is not None
        db.store.note_queries(one, len(db) - 1)
        if switches.sync:
            db.sync()
    return found
