"""Layers of any model: error, bytes and bounds of the default config, on captured rows.

A store of each layer learns from the earlier half of its captured queries (``analyze``), then decodes over the later
half: every query is audited under the default config, with int8 rows, and answered with max_error=0.05.

  python -m benchmarks.bench_layers                                  SmolLM2, 32K rows, layers 8 and 22
  python -m benchmarks.bench_layers qwen.safetensors gemma.safetensors --rows 16384

Files hold ``{layer}.key``, ``{layer}.value`` [Hkv, T, D] and ``{layer}.query`` [Hq, m, D] of the last m positions, with
or without a batch dimension, as benchmarks/capture.py writes them; ``--rows`` keeps the first 8 rows and the newest.

JSON: results[] = {model, layer, rows, error, p95, expected, bytes_of_dense, error_int8, learning_ms, few_error,
few_bytes, kept_int8, within, bound_error, bound_bytes}; learning_ms is of clustering all rows anew, sampling and
audits; expected is None where nothing was audited. few_error and few_bytes: with int8 rows and a budget k of about 4 %
of float32 bytes; kept_int8: bytes of a row, its code and its part of the index, of those of a float32 row.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbattn import AttentionDB, RetrievalConfig, dense_attention
from dbattn.metrics import relative_error
from dbattn.query.audit import AuditReport

from . import readme
from ._common import RESULTS, SMOLLM2, print_table, progress, write_json
from ._stores import Quality, with_config
from .capture import Rows, load_rows, rows_of_file

LAYERS = (8, 22)
AUDITED, BOUNDED, BOUND = 24, 60, 0.05
# Share of float32 bytes that int8 rows are also read with.
FEW = 0.04


def layers_of(paths: Sequence[Path], rows: int) -> Iterator[tuple[str, int, Rows]]:
    """Model (a file's stem), layer and rows of each captured layer."""
    if not paths:
        yield from ((SMOLLM2, layer, load_rows(rows, layer)) for layer in LAYERS)
    for path in paths:
        yield from ((path.stem, layer, captured) for layer, captured in rows_of_file(path, rows).items())


def measure(rows: Rows) -> dict[str, Any]:
    """All figures of one layer."""
    half = rows.query.shape[2] // 2
    found: dict[str, Any] = {"rows": len(rows) - half}
    db, found["learning_ms"] = _learnt(rows, half, RetrievalConfig(dense_below=0, audit_rate=0.0))
    reports: list[AuditReport] = []
    for query, _ in _decode(db, rows, half, AUDITED):
        reports.append(db.audit(query))
    quality = Quality.of(reports)
    needs = db.index.needs
    found |= {
        "error": quality.error, "p95": quality.error_p95, "expected": None if needs is None else needs.error,
        "bytes_of_dense": quality.bytes_read / quality.bytes_dense,
    }  # fmt: skip
    small, _ = _learnt(rows, half, RetrievalConfig(dense_below=0, audit_rate=0.0, storage="int8"))
    whole = sum(part[:, :, 0].numel() for part in (rows.keys, rows.values)) * torch.float32.itemsize
    few = with_config(small, k=_budget_of(small, rows.query[:, :, half - 1 : half], FEW * whole * len(small)))
    errors, few_errors = [], []
    for query, stop in _decode(small, rows, half, AUDITED):
        errors.append(_error(small, query, rows, stop))
        few_errors.append(_error(few, query, rows, stop))
    found |= {
        "error_int8": float(torch.cat(errors).mean()), "few_error": float(torch.cat(few_errors).mean()),
        "few_bytes": few.audit(query).bytes_read / (whole * len(small)),
        "kept_int8": (small.store.row_bytes * small.store.num_kv_heads + small.index.nbytes / len(small)) / whole,
    }  # fmt: skip
    bound, _ = _learnt(rows, half, RetrievalConfig(dense_below=0, max_error=BOUND))
    errors = [_error(bound, query, rows, stop) for query, stop in _decode(bound, rows, half, BOUNDED)]
    kept = torch.cat(errors)
    return found | {
        "within": float((kept <= BOUND).float().mean()), "bound_error": float(kept.mean()),
        "bound_bytes": bound.stats.bytes_read / bound.stats.bytes_dense,
    }  # fmt: skip


def _budget_of(db: AttentionDB, query: Tensor, size: float) -> int:
    """The budget k with which ``query`` reads about ``size`` bytes: they grow with it by the same for each row."""
    low, high = (with_config(db, k=k).audit(query).bytes_read for k in (64, 192))
    return max(1, round(64 + 128 * (size - low) / max(1, high - low)))


def _learnt(rows: Rows, half: int, config: RetrievalConfig) -> tuple[AttentionDB, float]:
    """A store of all rows but the latest ``half``, and the milliseconds that analysis and the first call took more."""
    stop = len(rows) - half
    db = AttentionDB(rows.keys.shape[1], rows.keys.shape[3], config=config)
    db.insert(rows.keys[:, :, :stop], rows.values[:, :, :stop])
    query = rows.query[:, :, half - 1 : half]
    db.attend(query)  # compiles
    began = time.perf_counter()
    db.analyze(rows.query[:, :, :half])
    db.attend(query)
    return db, 1e3 * (time.perf_counter() - began)


def _decode(db: AttentionDB, rows: Rows, half: int, steps: int) -> Iterator[tuple[Tensor, int]]:
    """Queries evenly spread over the latest ``half``, with the rows before each inserted, and how many those are."""
    first = len(rows) - half
    for i in range(1, steps + 1):
        stop = first + i * half // steps
        db.insert(rows.keys[:, :, len(db) : stop], rows.values[:, :, len(db) : stop])
        at = stop - len(rows) + rows.query.shape[2]
        yield rows.query[:, :, at - 1 : at], stop


def _error(db: AttentionDB, query: Tensor, rows: Rows, stop: int) -> Tensor:
    """Relative errors ``[Hq]`` of an answer, against dense over the rows as captured."""
    out = db.attend(query)
    assert isinstance(out, Tensor)
    dense = dense_attention(query, rows.keys[:, :, :stop], rows.values[:, :, :stop])
    assert isinstance(dense, Tensor)
    return relative_error(out, dense).flatten()


def run(paths: Sequence[Path], rows: int) -> list[dict[str, Any]]:
    """Measure each layer; print and return the figures."""
    layers = list(layers_of(paths, rows))
    found = []
    with progress("layers", len(layers)) as advance:
        for model, layer, captured in layers:
            found.append({"model": model, "layer": layer, **measure(captured)})
            advance()
    print_table("Layers of models, default config", readme.LAYERS_HEAD, readme.layer_rows(found))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="*", type=Path, metavar="FILE", help="captured rows; default: SmolLM2's")
    options.add_argument("--rows", type=int, default=32768, metavar="N", help="rows of each layer (default: 32768)")
    options.add_argument("--json", type=Path, metavar="OUT", default=RESULTS / "layers.json", help="the record")
    args = options.parse_args(argv)
    settings = {"files": [file.name for file in args.files], "rows": args.rows}
    write_json(args.json, "layers", settings, run(args.files, args.rows))
    readme.write(args.json.parent)


if __name__ == "__main__":
    main()
