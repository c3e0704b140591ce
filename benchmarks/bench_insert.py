"""What inserting costs: microseconds per token, sealing and merging included, and memory above the raw rows.

Captured rows of layer 8 go into a segmented store in chunks of 512 (a prefill) and one by one (decoding). The same
inserts into a flat store, which builds nothing, show what storing alone costs; the difference is sealing and merging.
Its share of the model's prefill multiplies it by 30 layers and divides by the prefill's own time, measured here by
reading the same number of tokens in chunks of 512 (--quick reads 1,024 and multiplies, which flatters nobody: later
tokens cost more). Learning is what inserting the rows with queries, and the first call, which audits some of them, take
more than inserting rows alone and another call.

  python -m benchmarks.bench_insert --sizes 8K --json insert.json

JSON: results.sizes[] = {tokens, rows, ways[] = {chunk, us_per_token, us_sealing, worst_call_ms}, us_learning,
raw_bytes, index_bytes, spare_bytes, overhead}; overhead = index_bytes / raw_bytes, spare capacity of the buffers apart;
results.prefill = {tokens, measured_tokens, s, sealing_s, share, learning_s, learning_share}.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dbattn import AttentionDB
from dbattn.hf import load_model

from ._common import SIZES, QuietGuard, console, parser, print_table, progress, write_json
from ._model import prefill
from ._stores import build, config_of
from .capture import Rows, load_rows, prose_ids

CHUNK = 512
PREFILL_TOKENS = SIZES["8K"]


def insert_all(rows: Rows, index: str, chunk: int, queries: Tensor | None = None) -> tuple[AttentionDB, list[float]]:
    """Insert all rows, ``chunk`` at a time, with ``queries`` of all of them; the store, and each call's seconds."""
    db, seconds = AttentionDB(rows.keys.shape[1], rows.keys.shape[3], config=config_of(index, None)), []
    for at in range(0, len(rows), chunk):
        keys, values = rows.keys[:, :, at : at + chunk], rows.values[:, :, at : at + chunk]
        asked = None if queries is None else queries[:, :, at : at + chunk]
        began = time.perf_counter()
        db.insert(keys, values, asked)
        seconds.append(time.perf_counter() - began)
    return db, seconds


def seconds_learning(rows: Rows) -> float:
    """What learning takes more than inserting alone; the captured queries stand in for those of all positions."""
    queries = rows.query.repeat(1, 1, -(-len(rows) // rows.query.shape[2]), 1)[:, :, : len(rows)]
    spent = []
    for asked in (None, queries):
        db, seconds = insert_all(rows, "segmented", CHUNK, asked)
        calls = []
        for _ in range(2):
            began = time.perf_counter()
            db.attend(rows.query[:, :, -1:])
            calls.append(time.perf_counter() - began)
        spent.append(sum(seconds) + calls[0] - calls[1])
    return spent[1] - spent[0]


def memory_of(db: AttentionDB) -> dict[str, float]:
    """Bytes of the rows in use, of the index beside them, and of buffer space not used yet."""
    raw = db.store.keys.nbytes + db.store.values.nbytes
    index = db.nbytes - db.store.nbytes
    return {
        "raw_bytes": raw,
        "index_bytes": index,
        "spare_bytes": db.store.nbytes - raw,
        "overhead": index / raw,
    }


def bench_size(rows: Rows, tokens: int, *, repeats: int) -> dict[str, Any]:
    """Both ways of inserting at one size: an entry of ``results.sizes``."""
    build(rows, config_of("segmented", None), min(len(rows), 2048))  # compiles what a first insert compiles
    guard, ways, db = QuietGuard(), [], None
    seconds_learning(rows)  # compiles, too
    learning = statistics.median(seconds_learning(rows) for _ in range(repeats))
    with progress(f"{tokens:,} tokens: inserting", 2 * repeats) as tick:
        for chunk in (CHUNK, 1):
            totals: dict[str, list[float]] = {"segmented": [], "flat": []}
            worst = []
            for _ in range(repeats):
                for index, spent in totals.items():
                    guard.wait(2.0)
                    filled, seconds = insert_all(rows, index, chunk)
                    spent.append(sum(seconds))
                    if index == "segmented":
                        db = filled
                        worst.append(max(seconds))
                tick()
            total, stored = (1e6 * statistics.median(totals[i]) / len(rows) for i in ("segmented", "flat"))
            ways.append(
                {
                    "chunk": chunk,
                    "us_per_token": total,
                    "us_sealing": total - stored,
                    "worst_call_ms": 1e3 * statistics.median(worst),
                }
            )
    assert db is not None
    us_learning = 1e6 * learning / len(rows)
    return {"tokens": tokens, "rows": len(rows), "ways": ways, "us_learning": us_learning, **memory_of(db)}


def prefill_share(us_sealing: float, us_learning: float, *, quick: bool) -> dict[str, float]:
    """Sealing and learning of all layers over the prefill of 8K tokens, which is measured now."""
    measured = 1024 if quick else PREFILL_TOKENS
    with console.status("loading the model"):
        model, tokenizer = load_model()
        ids = prose_ids(tokenizer, measured)[None]
    _, seconds = prefill(model, ids)
    seconds *= PREFILL_TOKENS / measured
    sealing, learning = (
        1e-6 * us * PREFILL_TOKENS * model.config.num_hidden_layers for us in (us_sealing, us_learning)
    )
    return {
        "tokens": PREFILL_TOKENS,
        "measured_tokens": measured,
        "s": seconds,
        "sealing_s": sealing,
        "share": sealing / seconds,
        "learning_s": learning,
        "learning_share": learning / seconds,
    }


def _print(results: dict[str, Any]) -> None:
    columns = ("rows", "chunk", "us per token", "of it sealing", "worst call ms", "index / rows", "spare / rows")
    rows = [
        [
            f"{s['rows']:,}", way["chunk"], way["us_per_token"], way["us_sealing"], way["worst_call_ms"],
            f"{s['overhead']:.1%}", f"{s['spare_bytes'] / s['raw_bytes']:.1%}",
        ]
        for s in results["sizes"]
        for way in s["ways"]
    ]  # fmt: skip
    print_table("inserting into one layer's segmented store", columns, rows)
    p = results["prefill"]
    print(
        f"prefill of {p['tokens']:,} tokens: {p['s']:.1f} s (measured over {p['measured_tokens']:,}); sealing and "
        f"merging in 30 layers: {p['sealing_s']:.2f} s, {p['share']:.1%} of it, learning from queries "
        f"{p['learning_s']:.2f} s, {p['learning_share']:.1%}"
    )


def run(names: Sequence[str], *, quick: bool = False) -> dict[str, Any]:
    """Run the sizes and the prefill; prints and returns the results."""
    sizes = [bench_size(load_rows(SIZES[n], 8), SIZES[n], repeats=1 if quick else 3) for n in names]
    # The share is of a prefill of 8K, so the figure of the smallest store is the one that belongs to it.
    smallest = min(sizes, key=lambda size: size["tokens"])
    share = prefill_share(smallest["ways"][0]["us_sealing"], smallest["us_learning"], quick=quick)
    results = {"sizes": sizes, "prefill": share}
    _print(results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parser(__doc__, ["8K", "32K"], ["8K", "32K", "131K"]).parse_args(argv)
    results = run(args.sizes, quick=args.quick)
    write_json(args.json, "insert", {"sizes": args.sizes, "quick": args.quick}, results)


if __name__ == "__main__":
    main()
