"""Indexes over keys: one contract (KeyIndex), one file per engine."""

from ..config import RetrievalConfig
from .base import BLOCK, Candidates, KeyIndex
from .flat import FlatIndex
from .hnsw import HnswIndex
from .ivf import IvfIndex

__all__ = ["BLOCK", "Candidates", "FlatIndex", "HnswIndex", "IvfIndex", "KeyIndex", "make_index"]

_ENGINES: dict[str, type[KeyIndex]] = {"flat": FlatIndex, "ivf": IvfIndex, "hnsw": HnswIndex}


def make_index(config: RetrievalConfig) -> KeyIndex:
    """The empty index that the config asks for.

    Raises:
        ImportError: FAISS is missing for an index that needs it; names the extra.
    """
    return _ENGINES[config.index_name](**config.index_options)
