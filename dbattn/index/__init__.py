"""Indexes over keys: one contract (KeyIndex), one file per engine."""

from dataclasses import fields
from importlib import import_module

from ..config import INDEX_TRAITS, IndexTraits, RetrievalConfig
from .base import BLOCK, Candidates, KeyIndex

__all__ = ["BLOCK", "Candidates", "KeyIndex", "make_index", "register_index"]


def make_index(config: RetrievalConfig) -> KeyIndex:
    """The empty index that the config asks for.

    Raises:
        ImportError: FAISS or Numba is missing for an index that needs it; names the extra.
    """
    return index_class(config.index_name).of(config)


def index_class(name: str) -> type[KeyIndex]:
    """The class of an index."""
    module, found = INDEX_TRAITS[name].home.split(":")
    engine: type[KeyIndex] = getattr(import_module(module), found)
    return engine


def register_index(engine: type[KeyIndex], traits: IndexTraits) -> None:
    """Make an index of your own known under ``engine.name``: ``RetrievalConfig(index=name)`` then builds it.

    Raises:
        ValueError: the name is taken, an option is no field of RetrievalConfig, or ``traits.home`` is another class.
    """
    if engine.name in INDEX_TRAITS:
        raise ValueError(f"there is an index {engine.name!r} already")
    known = {field.name for field in fields(RetrievalConfig)}
    if unknown := sorted(traits.options.keys() - known):
        raise ValueError(f"options are {unknown}, expected fields of RetrievalConfig")
    INDEX_TRAITS[engine.name] = traits
    if index_class(engine.name) is not engine:
        del INDEX_TRAITS[engine.name]
        raise ValueError(f"home is {traits.home!r}, which is not {engine.__module__}:{engine.__qualname__}")
