"""RetrievalConfig: every choice a user can make about retrieval, checked when it is made."""

import math
from dataclasses import dataclass, fields
from typing import Any

# The options that belong to one index only, with their defaults.
INDEX_OPTIONS: dict[str, dict[str, int]] = {
    "flat": {},
    "ivf": {"nprobe": 128},
    "hnsw": {"ef_search": 256, "neighbors": 32},
}
AUTO_INDEX = "ivf"


@dataclass(frozen=True)
class RetrievalConfig:
    """What a query reads.

    Attributes:
        index: "auto", "flat" (exact), "ivf" or "hnsw" (both FAISS).
        k: rows retrieved per query and KV head; k >= the rows in the store reads all of them.
        n_sink: first rows that every query reads.
        window: newest rows that every query reads, its own row included.
        dense_below: a store with fewer rows than this is scanned densely.
        max_queries: a call with more new positions than this (a prefill chunk) is answered densely.
        audit_rate: share of retrieving calls that are also answered densely and compared, 0 to 1.
        nprobe: lists probed per query ("ivf" only, default 128).
        ef_search: candidates kept while walking the graph ("hnsw" only, default 256).
        neighbors: links per node of the graph ("hnsw" only, default 32).

    Raises:
        ValueError: an option out of range, or one that belongs to another index.
    """

    index: str = "auto"
    k: int = 128
    n_sink: int = 4
    window: int = 64
    dense_below: int = 1024
    max_queries: int = 1
    audit_rate: float = 0.02
    nprobe: int | None = None
    ef_search: int | None = None
    neighbors: int | None = None

    def __post_init__(self) -> None:
        if self.index != "auto" and self.index not in INDEX_OPTIONS:
            raise ValueError(f"index is {self.index!r}, expected one of auto, {', '.join(INDEX_OPTIONS)}")
        for name, least in (("k", 1), ("n_sink", 0), ("window", 1), ("dense_below", 0), ("max_queries", 1)):
            _check_integer(name, getattr(self, name), least)
        rate = self.audit_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate) or not 0 <= rate <= 1:
            raise ValueError(f"audit_rate is {rate!r}, expected a number from 0 to 1")
        for owner, options in INDEX_OPTIONS.items():
            for name in options:
                value = getattr(self, name)
                if value is None:
                    continue
                if owner != self.index:
                    raise ValueError(f"{name}={value!r} is an option of index={owner!r}, but index is {self.index!r}")
                _check_integer(name, value, 2 if name == "neighbors" else 1)

    @property
    def index_name(self) -> str:
        """The index that will be built: "auto" resolved."""
        return AUTO_INDEX if self.index == "auto" else self.index

    @property
    def index_options(self) -> dict[str, int]:
        """The options of the chosen index, defaults filled in."""
        defaults = INDEX_OPTIONS[self.index_name]
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, for logs and files."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
