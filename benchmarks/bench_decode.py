"""One decode step of one layer: torch SDPA, dense_decode and every index, on captured rows.

All sides answer the same queries over the same rows (3 KV heads x 3 query heads, D = 64, float32), in turn within one
run, from cold caches: a batch passes over several stores once, as a model passes over its layers. "SDPA" is the faster
of its two forms here: enable_gqa, or a group's query heads passed as query positions. Errors are against dense, over
32 decode steps per layer (layers 8 and 22, beyond 32K layer 8 alone). Exact sides that are not exact are refused. Of 13
budgets k that are audited, those are timed which are the smallest within a mean error, and the default.

  python -m benchmarks.bench_decode --sizes 8K 32K --json decode.json
  python -m benchmarks.bench_decode --quick               a minute or two; the figures wobble
  python -m benchmarks.bench_decode --all                 FAISS indexes beyond 131K too: they take long to build

JSON: results.sizes[] = {tokens, rows, layers, bandwidth, sides[]}; a side = {side, kind, k, ms, ms_p10, ms_p90, calls,
quiet, x_sdpa, x_dense_decode, error, error_p95, recall, attention_mass, bytes_read, bandwidth_share, build_s}; ms in
milliseconds, bandwidth in bytes/s. results.exponent = {value, points[] = {rows, side, ms, ms_p10, ms_p90, error}}.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dbattn import AttentionDB
from index_kernels import dense_decode, read_bandwidth

from ._common import (
    SIZES,
    Side,
    Timing,
    check_exact,
    console,
    fit_exponent,
    parser,
    print_table,
    time_sides,
    write_json,
)
from ._stores import STEPS_FROM, STEPS_TO, Quality, build, config_of, decode_and_audit, query_at, with_config
from .capture import Rows, load_rows

ERROR_BOUND = 0.05
# Mean errors of which the smallest budget within is timed.
BOUNDS, QUICK_BOUNDS = (0.05, 0.03, 0.02, 0.01, 0.005), (0.05, 0.02)
SWEPT = 13
RECALL_K = 100
FAISS_TOKENS = SIZES["131K"]
TWO_LAYERS_TOKENS = SIZES["32K"]


@dataclass(frozen=True)
class Contender:
    """A side before it is timed: ``kind`` is sdpa, dense_decode or the index; quality is None where exact."""

    side: Side
    kind: str
    k: int | None = None
    quality: Quality | None = None
    build_s: float | None = None


def sweep(tokens: int) -> list[int]:
    """Budgets k of the segmented index to audit, each 1.25 times the one before, up to ``540 (T / 8192)^0.65``."""
    largest = 540 * (tokens / 8192) ** 0.65
    return [round(largest * 1.25**-i) for i in reversed(range(SWEPT))]


def smallest_within(errors: Mapping[int, float], bounds: Sequence[float]) -> list[int]:
    """Of the mean ``errors`` by budget, the smallest budget within each bound that any keeps, in rising order."""
    within = [[k for k, error in errors.items() if error <= bound] for bound in bounds]
    return sorted({min(budgets) for budgets in within if budgets})


def sdpa_gqa(db: AttentionDB, query: Tensor) -> Tensor:
    """torch's attention with enable_gqa."""
    return F.scaled_dot_product_attention(query, db.store.keys, db.store.values, enable_gqa=True)


def sdpa_grouped(db: AttentionDB, query: Tensor) -> Tensor:
    """torch's attention with the query heads of a group as query positions: each row is read once for all of them."""
    heads, kv_heads = query.shape[1], db.store.keys.shape[1]
    grouped = query.view(1, kv_heads, heads // kv_heads, query.shape[3])
    return F.scaled_dot_product_attention(grouped, db.store.keys, db.store.values)


def scan(db: AttentionDB, query: Tensor) -> tuple[Tensor, Tensor]:
    """Our own exact scan."""
    return dense_decode(query, db.store.keys, db.store.values)


def attend(db: AttentionDB, query: Tensor) -> Any:
    """The library's answer."""
    return db.attend(query)


def dense_contenders(stores: Sequence[AttentionDB]) -> list[Contender]:
    """The three exact sides, over the rows that the stores hold."""
    named = (("SDPA, enable_gqa", "sdpa", sdpa_gqa), ("SDPA, grouped", "sdpa", sdpa_grouped))
    return [
        Contender(Side(name, stores, run), kind) for name, kind, run in (*named, ("dense_decode", "dense_decode", scan))
    ]


def segmented_contenders(
    captures: Sequence[Rows], budgets: Sequence[int], copies: int, bounds: Sequence[float]
) -> list[Contender]:
    """The segmented index at its own budget, and at the smallest of ``budgets`` within each mean error of ``bounds``.

    Over ``copies`` stores that cycle through the captured layers.
    """
    config = config_of("segmented", None)
    reports: dict[int | None, list[Any]] = {k: [] for k in (None, *budgets)}
    stores, built = [], []
    for i in range(copies):
        rows = captures[i % len(captures)]
        began = time.perf_counter()
        audited = i < len(captures)
        stores.append(build(rows, config, len(rows) - (STEPS_FROM if audited else STEPS_TO)))
        built.append(time.perf_counter() - began)
        if audited:
            for k, found in decode_and_audit(stores[-1], rows, list(reports)).items():
                reports[k] += found
    contenders = []
    quality = {k: Quality.of(found) for k, found in reports.items()}
    for k in (None, *smallest_within({k: quality[k].error for k in budgets}, bounds)):
        side = Side("segmented" if k is None else f"segmented, k={k}", [with_config(s, k=k) for s in stores], attend)
        # The first build may have compiled kernels.
        contenders.append(Contender(side, "segmented", k, quality[k], min(built)))
    return contenders


def stock_contender(index: str, captures: Sequence[Rows]) -> Contender:
    """flat, ivf or hnsw at k = 100, one store per captured layer."""
    stores, reports, built = [], [], 0.0
    for rows in captures:
        began = time.perf_counter()
        stores.append(build(rows, config_of(index, RECALL_K), len(rows) - STEPS_FROM))
        built += (time.perf_counter() - began) / len(captures)
        reports += decode_and_audit(stores[-1], rows, [RECALL_K])[RECALL_K]
    side = Side(f"{index}, k={RECALL_K}", stores, attend)
    return Contender(side, index, RECALL_K, Quality.of(reports), built)


def bench_size(captures: Sequence[Rows], tokens: int, *, stock: Sequence[str], quick: bool) -> dict[str, Any]:
    """Build, check, audit and time all sides at one size; the entry of ``results.sizes``."""
    row_bytes = 2 * captures[0].keys.shape[1] * captures[0].keys.shape[3] * captures[0].keys.element_size()
    copies = min(10, max(3, (400 << 20) // (len(captures[0]) * row_bytes)))
    with console.status(f"{tokens:,} tokens: sealing and auditing {copies} segmented stores"):
        segmented = segmented_contenders(captures, sweep(tokens), copies, QUICK_BOUNDS if quick else BOUNDS)
    contenders = dense_contenders(segmented[0].side.stores) + segmented
    for index in stock:
        with console.status(f"{tokens:,} tokens: building and auditing {index}"):
            contenders.append(stock_contender(index, captures))

    queries = [query_at(rows, len(rows) - STEPS_TO + i) for rows in captures for i in range(0, STEPS_TO, 5)]
    first: AttentionDB = segmented[0].side.stores[0]
    exact = [c.side for c in contenders if c.quality is None]
    rounding = check_exact(exact, queries[0], first.store.keys, first.store.values)
    bandwidth = read_bandwidth()
    timings = time_sides(
        [c.side for c in contenders], queries, rounds=4 if quick else 20, seconds=8 if quick else 60,
        label=f"{tokens:,} tokens: timing {len(contenders)} sides",
    )  # fmt: skip
    # What the machine can do: the better of two moments, other load lowers it.
    bandwidth = max(bandwidth, read_bandwidth())
    return {
        "tokens": tokens,
        "rows": len(first),
        "layers": len(captures),
        "bandwidth": bandwidth,
        "sides": _entries(contenders, timings, rounding, len(first) * row_bytes, bandwidth),
    }


def _entries(
    contenders: Sequence[Contender],
    timings: dict[str, Timing],
    rounding: dict[str, float],
    bytes_dense: int,
    bandwidth: float,
) -> list[dict[str, Any]]:
    median = {c.side.name: timings[c.side.name].median for c in contenders}
    sdpa = min(median[c.side.name] for c in contenders if c.kind == "sdpa")
    own = next(median[c.side.name] for c in contenders if c.kind == "dense_decode")
    entries = []
    for c in contenders:
        timing, seconds, q = timings[c.side.name], median[c.side.name], c.quality
        read = bytes_dense if q is None else q.bytes_read
        entries.append(
            {
                "side": c.side.name,
                "kind": c.kind,
                "k": c.k,
                "ms": 1e3 * seconds,
                "ms_p10": 1e3 * timing.p10,
                "ms_p90": 1e3 * timing.p90,
                "calls": len(timing.times),
                "quiet": timing.quiet,
                "x_sdpa": sdpa / seconds,
                "x_dense_decode": own / seconds,
                "error": rounding[c.side.name] if q is None else q.error,
                "error_p95": None if q is None else q.error_p95,
                "recall": None if q is None else q.recall,
                "attention_mass": 1.0 if q is None else q.attention_mass,
                "bytes_read": read,
                "bandwidth_share": read / seconds / bandwidth,
                "build_s": c.build_s,
            }
        )
    return entries


def fastest_within(size: dict[str, Any], bound: float = ERROR_BOUND) -> dict[str, Any] | None:
    """The fastest segmented setting whose mean error is within the bound, None where there is none."""
    within = [s for s in size["sides"] if s["kind"] == "segmented" and s["error"] <= bound]
    return min(within, key=lambda s: s["ms"], default=None)


def exponent(sizes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the time at equal error grows with T: ``{value, points}``; value is None below two sizes."""
    points = []
    for size in sizes:
        best = fastest_within(size)
        if best is not None:
            points.append(
                {"rows": size["rows"], **{name: best[name] for name in ("side", "ms", "ms_p10", "ms_p90", "error")}}
            )
    value = fit_exponent([p["rows"] for p in points], [p["ms"] for p in points]) if len(points) > 1 else None
    return {"value": value, "points": points}


def _print_size(size: dict[str, Any], skipped: Sequence[str]) -> None:
    names = ("side", "ms", "p10", "x SDPA", "x dense_decode", "error", "p95", "recall@k", "mass", "MB read")
    rows = [
        [
            s["side"], s["ms"], s["ms_p10"], s["x_sdpa"], s["x_dense_decode"], s["error"], s["error_p95"], s["recall"],
            s["attention_mass"], s["bytes_read"] / 1e6, s["bandwidth_share"], s["build_s"], f"{s['quiet']:.0%}",
        ]
        for s in size["sides"]
    ]  # fmt: skip
    title = f"{size['rows']:,} rows, {size['layers']} layer(s), read bandwidth {size['bandwidth'] / 1e9:.1f} GB/s"
    print_table(title, [*names, "of bandwidth", "build s", "quiet"], rows)
    if skipped:
        print(f"{' and '.join(skipped)} were not built here: it takes minutes; --all builds them at every size")


def run(names: Sequence[str], *, quick: bool = False, build_all: bool = False) -> dict[str, Any]:
    """Run the sizes, print their tables and the exponent; returns the results."""
    sizes = []
    for tokens in (SIZES[name] for name in names):
        captures = [load_rows(tokens, layer) for layer in ((8, 22) if tokens <= TWO_LAYERS_TOKENS else (8,))]
        stock = ["flat", "ivf", "hnsw"] if build_all or tokens <= FAISS_TOKENS else ["flat"]
        if quick and not build_all:
            stock = ["flat"]
        sizes.append(bench_size(captures, tokens, stock=stock, quick=quick))
        _print_size(sizes[-1], [index for index in ("ivf", "hnsw") if index not in stock])
    fit = exponent(sizes)
    if fit["value"] is not None:
        print(f"time of segmented at error <= {ERROR_BOUND} grows as T^{fit['value']:.2f}")
    return {"sizes": sizes, "exponent": fit}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser(__doc__, ["8K", "32K", "131K", "524K"], ["8K", "32K", "131K", "524K"])
    options.add_argument("--all", action="store_true", help="build the FAISS indexes at every size")
    args = options.parse_args(argv)
    settings = {"sizes": args.sizes, "quick": args.quick, "all": args.all}
    write_json(args.json, "decode", settings, run(args.sizes, quick=args.quick, build_all=args.all))


if __name__ == "__main__":
    main()
