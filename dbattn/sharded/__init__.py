"""Databases whose rows are dealt over the ranks of a process group; ``AttentionDB(..., group=...)`` makes one."""

from .budget import Budget, Told
from .database import ShardedDB, check_config, open_shard

__all__ = ["Budget", "ShardedDB", "Told", "check_config", "open_shard"]
