"""RetrievalConfig: every choice a user can make about retrieval, checked when it is made."""

import math
from dataclasses import dataclass, fields
from typing import Any

# The options that belong to one index only, with their defaults.
INDEX_OPTIONS: dict[str, dict[str, int]] = {
    "flat": {},
    "ivf": {"nprobe": 128},
    "hnsw": {"ef_search": 256, "neighbors": 32},
    "segmented": {},
}
AUTO_INDEX = "segmented"
# How rows that were not retrieved are answered for, per index; the first is the default.
TAILS = {
    "flat": ("none", "sample"),
    "ivf": ("none", "sample"),
    "hnsw": ("none", "sample"),
    "segmented": ("centroid", "none"),
}
# Rows under which a dense scan takes less time than the index does.
DENSE_BELOW = {"flat": 1024, "ivf": 1024, "hnsw": 1024, "segmented": 2048}
DEFAULT_K = 128


@dataclass(frozen=True)
class RetrievalConfig:
    """What a query reads.

    Attributes:
        index: "segmented" (which "auto" is), "flat" (exact), "ivf" or "hnsw" (both FAISS).
        k: rows retrieved per query and KV head; k >= the rows in the store reads all of them. Default: 128, and for
            "segmented" a budget that grows slower than the store (heads share it by need).
        tail: what answers for rows that were not retrieved. "centroid": each unread list's summary ("segmented", its
            default). "sample": retrieval becomes a weighted sample of the rows, unbiased (the others). "none".
        n_sink: first rows that every query reads.
        window: newest rows that every query reads, its own row included.
        dense_below: a store with fewer rows than this is scanned densely. Default: where the index gets faster.
        max_queries: a call with more new positions than this (a prefill chunk) is answered densely.
        audit_rate: share of retrieving calls that are also answered densely and compared, 0 to 1.
        nprobe: lists probed per query ("ivf" only, default 128).
        ef_search: candidates kept while walking the graph ("hnsw" only, default 256).
        neighbors: links per node of the graph ("hnsw" only, default 32).

    Raises:
        ValueError: an option out of range, or one that belongs to another index.
    """

    index: str = "auto"
    k: int | None = None
    tail: str | None = None
    n_sink: int = 4
    window: int = 64
    dense_below: int | None = None
    max_queries: int = 1
    audit_rate: float = 0.02
    nprobe: int | None = None
    ef_search: int | None = None
    neighbors: int | None = None

    def __post_init__(self) -> None:
        if self.index != "auto" and self.index not in INDEX_OPTIONS:
            raise ValueError(f"index is {self.index!r}, expected one of auto, {', '.join(INDEX_OPTIONS)}")
        for name, least in (("k", 1), ("n_sink", 0), ("window", 1), ("dense_below", 0), ("max_queries", 1)):
            if getattr(self, name) is not None or name not in ("k", "dense_below"):
                _check_integer(name, getattr(self, name), least)
        if self.tail is not None and self.tail not in TAILS[self.index_name]:
            allowed = " or ".join(repr(tail) for tail in TAILS[self.index_name])
            raise ValueError(f"tail is {self.tail!r}, expected {allowed} with index={self.index!r}")
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
    def tail_name(self) -> str:
        """The tail in force: the index's default filled in."""
        return self.tail or TAILS[self.index_name][0]

    @property
    def rows_retrieved(self) -> int:
        """k, default filled in; for an index without a budget of its own."""
        return DEFAULT_K if self.k is None else self.k

    @property
    def least_rows(self) -> int:
        """dense_below, default filled in."""
        return DENSE_BELOW[self.index_name] if self.dense_below is None else self.dense_below

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
