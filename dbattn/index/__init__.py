"""Indexes over keys: one contract (KeyIndex), one file per engine."""

from ..config import RetrievalConfig
from .base import BLOCK, Candidates, KeyIndex
from .flat import FlatIndex
from .hnsw import HnswIndex
from .ivf import IvfIndex
from .segmented import SegmentedIndex

__all__ = ["BLOCK", "Candidates", "FlatIndex", "HnswIndex", "IvfIndex", "KeyIndex", "SegmentedIndex", "make_index"]


def make_index(config: RetrievalConfig) -> KeyIndex:
    """The empty index that the config asks for.

    Raises:
        ImportError: FAISS or Numba is missing for an index that needs it; names the extra.
    """
    name, options = config.index_name, config.index_options
    if name == "flat":
        return FlatIndex()
    if name == "segmented":
        return SegmentedIndex(config.window)
    engine = IvfIndex if name == "ivf" else HnswIndex
    return engine(config.window, **options, sample=config.samples)
