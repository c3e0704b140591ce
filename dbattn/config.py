"""RetrievalConfig: every choice a user can make about retrieval, checked when it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class IndexTraits:
    """What a config must know of an index before it is built.

    Attributes:
        home: "module:class" of its KeyIndex.
        tails: how rows that were not retrieved are answered for; the first is the default.
        dense_below: rows under which a dense scan takes less time, where no estimate says it better.
        options: names and defaults of the options of RetrievalConfig that are its own.
    """

    home: str
    tails: tuple[str, ...] = ("none", "sample")
    dense_below: int = 1024
    options: Mapping[str, int] = field(default_factory=dict)


INDEX_TRAITS = {
    "flat": IndexTraits("dbattn.index.flat:FlatIndex"),
    "ivf": IndexTraits("dbattn.index.ivf:IvfIndex", options={"nprobe": 128}),
    "hnsw": IndexTraits("dbattn.index.hnsw:HnswIndex", options={"ef_search": 256, "neighbors": 32}),
    "segmented": IndexTraits("dbattn.index.segmented:SegmentedIndex", ("centroid", "none"), 2048),
}
AUTO_INDEX = "segmented"
DEFAULT_K = 128
# What an integer option may be at most. Counts of rows are compared with a store's and may be any size a machine knows;
# the others reach arrays or FAISS, where they are 32-bit.
MOST = 2**63 - 1
MOST_OF = {"n_sink": 2**31 - 1, "nprobe": 2**31 - 1, "ef_search": 2**31 - 1, "neighbors": 1024}
ROWS = ("device", "host")
STORAGES = ("float32", "float16", "bfloat16", "int8")
PREFILLS = ("auto", "dense", "lists")
# What load_model makes of a model's weights.
WEIGHTS = ("float32", "int8")


@dataclass(frozen=True)
class RetrievalConfig:
    """What a query reads.

    Attributes:
        index: "segmented" (which "auto" is), "flat" (exact), "ivf" or "hnsw" (both FAISS).
        k: rows retrieved per query and KV head; k >= the rows in the store reads all of them. Default: 128, and for
            "segmented" what ``target_error`` needs (heads share it by need).
        target_error: mean relative error of a layer's output for which it gets a budget of its own, found by audits of
            some of the queries that came with the rows and of answers ("segmented" without k). None, or no queries: a
            budget by size.
        tail: what answers for rows that were not retrieved. "centroid": their codes, and the summaries of lists that
            were not opened ("segmented", its default). "sample": retrieval becomes a weighted sample of the rows,
            unbiased (the others). "none".
        n_sink: first rows that every query reads.
        window: newest rows that every query reads, its own row included.
        dense_below: a store with fewer rows than this is scanned densely. "auto": wherever a dense scan is estimated to
            be faster on this machine. Default: "auto" for "segmented"; an index asked for by name is a wish, and used
            from 1024 rows on. On a GPU, where rates are of rows of 16 bits and packed ones, any ``index`` or ``k`` that
            is given is a wish, used from 1024 rows on ("segmented": 2048); without, other rows are scanned densely.
        max_queries: a call with more new positions than this reads a prompt, see ``prefill``.
        max_error: bound on the relative error of the output, 0 to 1. Queries whose estimated error breaks it are
            answered with more rows, in the end densely; audits keep the estimates right. Default: no bound.
        storage: what rows are kept as: "float32", "float16", "bfloat16", or "int8", a quarter of float32, each key and
            each value rotated by Hadamard's matrix and rounded with one scale. Audits compare with a dense scan of the
            rows as they are kept; what a narrower type itself adds to the error comes on top. Default: as they come.
        audit_rate: share of retrieving calls that are also answered densely and compared, 0 to 1; the first eight are
            where there is a ``target_error`` or ``max_error`` to keep, unless it is 0.
        nprobe: lists probed per query, at least on a GPU ("ivf" only, default 128).
        ef_search: candidates kept while walking the graph ("hnsw" only, default 256).
        neighbors: links per node of the graph ("hnsw" only, default 32).
        prefill: how prompts are read: "dense" (default), by "lists" ("segmented" only), chosen for blocks of 512
            positions, or "auto": block by block what is estimated to be faster on this CPU, densely where audits of the
            blocks before found a mean error above twice ``target_error``, with ``max_error``, for fewer than 64
            positions, where no more than 8,192 rows are stored, and on other devices. Each layer reads as many rows as
            these audits ask for, which aim at half of ``target_error`` (``audit_rate=0`` turns them off: rows by size
            then), and six times as many for the last 1,024 positions of a call of 4,096 or more. A wrapped model reads
            calls of more than 4,096 positions in chunks of 2,048, which changes no answer. What lists get wrong enters
            the rows themselves.
        rows: where rows on a GPU are kept: on the "device", or in pinned memory of the "host", from where the GPU reads
            those it needs ("segmented" only; summaries of lists are on the GPU, and copies of the rows that it read
            last, up to a quarter of all): contexts end where the host's memory does. It is a wish to retrieve, see
            ``dense_below``. Not part of a snapshot, which opens with either.
        n_windows: windows that a question reads of a text that was read by windows, in a wrapped model: the newest, and
            those that have most of the question's rarer tokens. None: all.

    Raises:
        ValueError: an option out of range, or one that belongs to another index.
    """

    index: str = "auto"
    k: int | None = None
    tail: str | None = None
    n_sink: int = 4
    window: int = 64
    dense_below: int | str | None = None
    max_queries: int = 1
    max_error: float | None = None
    target_error: float | None = 0.03
    storage: str | None = None
    audit_rate: float = 0.02
    nprobe: int | None = None
    ef_search: int | None = None
    neighbors: int | None = None
    prefill: str = "dense"
    rows: str = "device"
    n_windows: int | None = 3

    def __post_init__(self) -> None:
        if self.index != "auto" and self.index not in INDEX_TRAITS:
            raise ValueError(f"index is {self.index!r}, expected one of auto, {', '.join(INDEX_TRAITS)}")
        for name, least in (("k", 1), ("n_sink", 0), ("window", 1), ("max_queries", 1), ("n_windows", 1)):
            if getattr(self, name) is not None or name not in ("k", "n_windows"):
                check_integer(name, getattr(self, name), least)
        below = self.dense_below
        if below not in (None, "auto"):
            check_integer("dense_below", below, 0, ", or 'auto'")
        if self.tail is not None and self.tail not in self.traits.tails:
            allowed = " or ".join(repr(tail) for tail in self.traits.tails)
            raise ValueError(f"tail is {self.tail!r}, expected {allowed} with index={self.index!r}")
        if self.prefill not in PREFILLS:
            raise ValueError(f"prefill is {self.prefill!r}, expected one of {', '.join(PREFILLS)}")
        if self.prefill == "lists" and (self.index_name != AUTO_INDEX or self.max_error is not None):
            owner = f"index={self.index!r}" if self.max_error is None else "max_error, which bounds each answer"
            raise ValueError(f"prefill='lists' reads the lists of index='segmented' by a budget: not with {owner}")
        if self.storage is not None and self.storage not in STORAGES:
            raise ValueError(f"storage is {self.storage!r}, expected one of {', '.join(STORAGES)}, or None")
        if self.rows not in ROWS:
            raise ValueError(f"rows is {self.rows!r}, expected one of {', '.join(ROWS)}")
        if self.rows == "host" and self.index_name != AUTO_INDEX:
            raise ValueError(
                f"rows='host' are rows that a GPU reads by lists of index='segmented': not with index={self.index!r}"
            )
        if not _is_number(self.audit_rate) or not 0 <= self.audit_rate <= 1:
            raise ValueError(f"audit_rate is {self.audit_rate!r}, expected a number from 0 to 1")
        bound = self.max_error
        if bound is not None and (not _is_number(bound) or not 0 < bound < 1):
            raise ValueError(f"max_error is {bound!r}, expected a number between 0 and 1, or None")
        if bound is not None and self.tail_name == "none" and "sample" not in self.traits.tails:
            raise ValueError(
                "max_error needs tail='centroid' with lists: without a tail their errors are not estimated"
            )
        target = self.target_error
        if target is not None and (not _is_number(target) or not 0 < target < 1):
            raise ValueError(f"target_error is {target!r}, expected a number between 0 and 1, or None")
        for owner, traits in INDEX_TRAITS.items():
            for name in traits.options:
                value = getattr(self, name)
                if value is None:
                    continue
                if owner != self.index:
                    raise ValueError(f"{name}={value!r} is an option of index={owner!r}, but index is {self.index!r}")
                check_integer(name, value, 2 if name == "neighbors" else 1)

    @classmethod
    def checked(cls, config: "RetrievalConfig | None") -> "RetrievalConfig":
        """The config itself, or the default one for None; TypeError for anything else."""
        if config is None:
            return cls()
        if not isinstance(config, cls):
            raise TypeError(f"config is {config!r}, expected a RetrievalConfig, such as RetrievalConfig(k=128)")
        return config

    @property
    def index_name(self) -> str:
        """The index that will be built: "auto" resolved."""
        return AUTO_INDEX if self.index == "auto" else self.index

    @property
    def traits(self) -> IndexTraits:
        """What is known of the index that will be built."""
        return INDEX_TRAITS[self.index_name]

    @property
    def tail_name(self) -> str:
        """The tail in force: the index's default filled in."""
        return self.tail or self.traits.tails[0]

    @property
    def samples(self) -> bool:
        """Whether the index must be able to draw weighted samples."""
        return self.tail_name == "sample" or self.max_error is not None

    @property
    def rows_retrieved(self) -> int:
        """k, default filled in; for an index without a budget of its own."""
        return DEFAULT_K if self.k is None else self.k

    @property
    def finds_budget(self) -> bool:
        """Whether a budget is to be found for ``target_error``, by an index that can."""
        return self.k is None and self.target_error is not None

    @property
    def dense_below_rows(self) -> int | None:
        """dense_below, default filled in; None where estimates decide."""
        if isinstance(self.dense_below, int):
            return self.dense_below
        by_name = self.dense_below is None and self.index_name != AUTO_INDEX
        return self.traits.dense_below if by_name else None

    @property
    def wishes_retrieval(self) -> bool:
        """Whether something to retrieve by was asked for, and "auto" was not: used where estimates are missing.

        That is an index or a budget, or rows that a GPU has not got.
        """
        return self.dense_below is None and (self.index != "auto" or self.k is not None or self.rows == "host")

    @property
    def index_options(self) -> dict[str, int]:
        """The options of the chosen index, defaults filled in."""
        return {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in self.traits.options.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, for logs and files."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name: str, value: Any, least: int, otherwise: str = "") -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least`` and at most MOST_OF[name]."""
    from index_kernels.integer import is_integer  # here: it loads torch, which `dbattn --help` does without

    most = MOST_OF.get(name, MOST)
    if not is_integer(value, least, most):
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least} and at most {most}{otherwise}")
