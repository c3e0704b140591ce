"""The arena: every operator the field argues about, side by side on real keys, at the same bytes read.

One small file per operator or family, one contract (``_contract.Operator``: ``fit`` rows, ``attend`` at a budget), one
rule for counting bytes. ``OPERATORS`` lists them all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ._contract import Answer, Operator
from .database import Database
from .exact import Dense, DenseKernel, Tiled
from .exact_search import SoftmaxLift, TopK, VAttention
from .fixed import BigBird, Longformer, StreamingLLM
from .hashing import Reformer, RoutingTransformer
from .linear import LinearAttention, Linformer, Performer
from .magicpig import MagicPIG
from .pages import InfLLM, Quest
from .retroinfer import RetroInfer
from .three_stages import ThreeStages

DEFAULT = "dbattn"

__all__ = ["DEFAULT", "OPERATORS", "Answer", "Entry", "Operator"]


@dataclass(frozen=True)
class Entry:
    """An operator of the arena: its name, its family, how to make one, and what it does in a line."""

    name: str
    family: str
    make: Callable[[], Operator]
    about: str


_ENTRIES = (
    Entry("dense", "exact", Dense, "all rows; 9 query heads share 3 KV heads, as the model was trained (GQA)"),
    Entry("dense, MHA", "exact", partial(Dense, "mha"), "the same with a copy of K and V per query head"),
    Entry("dense, MQA", "exact", partial(Dense, "mqa"), "K and V pooled to one head by their mean"),
    Entry("tiled", "exact", Tiled, "all rows, tile by tile with an online softmax"),
    Entry("tiled, MHA", "exact", partial(Tiled, "mha"), "the same with a copy of K and V per query head"),
    Entry("tiled, MQA", "exact", partial(Tiled, "mqa"), "the same with K and V pooled to one head"),
    Entry("dense kernel", "exact", DenseKernel, "all rows by dbattn's split-K kernel"),
    Entry("StreamingLLM", "fixed", StreamingLLM, "sinks and a window"),
    Entry("Longformer", "fixed", Longformer, "window, and one global row in 512"),
    Entry("Longformer, dilated", "fixed", partial(Longformer, 4), "every fourth row of a window four times as long"),
    Entry("BigBird", "fixed", BigBird, "window, global rows and random blocks"),
    Entry("Reformer", "hashing", Reformer, "the query's LSH buckets in 8 rounds"),
    Entry("Routing Transformer", "hashing", RoutingTransformer, "the nearest of sqrt(T) k-means clusters"),
    Entry("Performer", "linear", Performer, "positive random features (FAVOR+) for the rows between sinks and window"),
    Entry("Linformer", "linear", Linformer, "runs of rows pooled to their mean"),
    Entry("linear attention", "linear", LinearAttention, "elu + 1 in place of exp, one state for all rows"),
    Entry("exact top-k", "selection", TopK, "the rows with the largest logits, all keys scored: the oracle"),
    Entry("Quest", "selection", Quest, "pages of 16 by upper bounds of their logits"),
    Entry("MagicPIG", "selection", MagicPIG, "rows sampled by LSH collisions, weighted"),
    Entry("vAttention", "selection", VAttention, "exact top-k and a uniform sample of the rest, all keys scored"),
    Entry("SoftmaxLift", "selection", SoftmaxLift, "top-k of noise-lifted logits: a priority sample, all keys scored"),
    Entry("InfLLM", "selection", InfLLM, "blocks of 128 by 4 representative keys"),
    Entry("RetroInfer", "selection", RetroInfer, "lists of 16 read, the next 23 % by their summaries"),
    Entry("three stages", "selection", ThreeStages, "lists, 4-bit codes, an exact weighted sample; summaries"),
    Entry(DEFAULT, "dbattn", partial(Database, "segmented", "centroid"), "segmented, centroid tail: the default"),
    Entry(
        "dbattn, int8 rows", "dbattn", partial(Database, "segmented", "centroid", "int8"), "the default, rows in 8 bits"
    ),
    Entry("dbattn segmented, none", "dbattn", partial(Database, "segmented", "none"), "the same without its tail"),
    *(
        Entry(f"dbattn {index}, {tail}", "dbattn", partial(Database, index, tail), f"{what}; {rest}")
        for index, what in (("flat", "exact search"), ("ivf", "FAISS inverted lists"), ("hnsw", "FAISS HNSW"))
        for tail, rest in (("none", "top-k, the rest dropped"), ("sample", "a priority sample"))
    ),
)
OPERATORS = {entry.name: entry for entry in _ENTRIES}
