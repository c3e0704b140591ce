"""Snapshots: a store, or a whole model's cache, on disk. Prefill once, ask for ever.

A snapshot is a folder: ``manifest.json`` and immutable safetensors files named by their content, each with one run of
rows of several layers. It is written so that a crash at any instant leaves the old snapshot or the new one, and read
so that a damaged or forged file is refused by name. Use it through ``AttentionDB.save`` and ``open``, ``Handle.save``
and ``wrap(model, context=path)``; a :class:`SnapshotWriter` keeps a folder locked over many saves.
"""

from .folder import SnapshotError
from .manifest import FileInfo, LayerInfo, ModelInfo, SnapshotInfo, StateInfo
from .parts import Parts, ShardWriter, open_parts, read_parts
from .reader import Snapshot, describe
from .states import LayerState
from .writer import SaveReport, SnapshotWriter, save

__all__ = [
    "FileInfo",
    "LayerInfo",
    "LayerState",
    "ModelInfo",
    "Parts",
    "SaveReport",
    "ShardWriter",
    "Snapshot",
    "SnapshotError",
    "SnapshotInfo",
    "SnapshotWriter",
    "StateInfo",
    "describe",
    "open_parts",
    "read_parts",
    "save",
]
