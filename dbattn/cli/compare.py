"""dbattn compare: queries that a model really asked, answered by several indexes and budgets, beside dense."""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..attention import AttentionDB
from ..config import RetrievalConfig
from ..files import check_output, write_json
from ..hf.layer_report import counted
from ..origin import origin
from ..query.audit import figure
from ..snapshot.folder import map_tensors
from ..text.prompt import answer_tokens
from ._console import long_work, table_console
from ._opened import opened


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer in the order of their positions, and the queries of the newest of them.

    keys ``[1, Hkv, T, D]``, values ``[1, Hkv, T, Dv]``, query ``[1, Hq, m, D]``; scale and softcap as the model's.
    """

    keys: Tensor
    values: Tensor
    query: Tensor
    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Figures:
    """One way to answer. Means over layers, heads and queries; bytes and ms are of one token in all layers together.

    ``dense``: why calls were answered densely, with how often; they are part of the means. ``calls``: how many in all.
    ``spread`` holds the 10th and 90th percentile of error, recall and ms.
    """

    index: str
    k: int | None
    recall: float
    attention_mass: float
    relative_error: float
    rows_read: float
    bytes_read: float
    ms: float
    spread: dict[str, list[float]]
    calls: int
    dense: dict[str, int]


def run_compare(
    *,
    context: Path | None,
    question: str | None,
    capture: Path | None,
    model: Path | None,
    weights: str,
    index: list[str],
    k: list[int],
    layers: list[int] | None,
    queries: int,
    json_path: Path | TextIO | None,
    png_path: Path | None,
    quiet: bool,
) -> list[Figures]:
    """Print what each index and budget makes of the queries; dense comes first.

    Raises:
        FileNotFoundError, ValueError: input that is missing, or cannot be compared.
        ImportError: a plot without matplotlib.
    """
    configs = [RetrievalConfig(index=name, k=budget, audit_rate=0.0, dense_below=0) for name in index for budget in k]
    if queries < 1:
        raise ValueError(f"--queries is {queries}, expected at least 1")
    check_output("--json", json_path)
    check_output("--png", png_path)
    if png_path is not None and find_spec("matplotlib") is None:
        raise ImportError('--png needs matplotlib: pip install "dbattn[dev]"')
    console = Console(stderr=True, quiet=quiet)
    if capture is not None and context is None:
        rows = _captured(capture, layers, queries)
    elif capture is None and context is not None and question is not None:
        rows = _asked(context, question, model, weights, layers, queries, console)
    else:
        raise ValueError('expected CONTEXT and QUESTION (dbattn compare book.dbattn "What ...?"), or --capture FILE')
    ways: list[RetrievalConfig | None] = [None, *configs]
    with long_work(console, "comparing", len(ways) * len(rows), "layers") as advance:
        results = [_measure(way, list(rows.values()), advance) for way in ways]
    length = next(iter(rows.values())).keys.shape[2]
    table_console().print(_table(results, f"{len(rows)} layers of {length} rows, {queries} queries each"))
    for way, found in zip(configs, results[1:], strict=True):
        if found.dense:
            print(
                f"{way.index_name}, k={way.k}: {sum(found.dense.values())} of {found.calls} calls were answered "
                f"densely, and count as such: {counted(found.dense)}"
            )
    source = str(capture or context)
    measured = origin()
    data = {
        **measured,
        "source": source,
        "question": question,
        "rows": length,
        "layers": list(rows),
        "queries": queries,
    }
    write_json(json_path, {**data, "results": [asdict(result) for result in results]})
    if png_path is not None:
        from ._plot import plot_comparison

        title = f"{source}: {length} rows"
        plot_comparison([asdict(result) for result in results], title, measured, png_path)
    return results


def _asked(
    context: Path,
    question: str,
    model: Path | None,
    weights: str,
    layers: list[int] | None,
    queries: int,
    console: Console,
) -> dict[int, LayerRows]:
    """Rows of a context, and the queries of a dense answer's first steps."""
    asked: dict[int, list[Tensor]] = defaultdict(list)
    terms: dict[int, tuple[float, float | None]] = {}

    def collect(number: int, db: AttentionDB, query: Tensor, scale: float, softcap: float | None) -> None:
        if query.shape[2] == 1:
            asked[number].append(query.clone())
            terms[number] = scale, softcap

    with opened(context, model, weights, None, console) as about:
        wanted = _known(layers, about.databases)
        with about.handle.dense(), about.handle.watch(collect):
            # The prompt's own call gives the first token; each later token is a query.
            list(answer_tokens(about.model, about.asked(question, queries + 1), about.cache, None, queries + 1))
        found = {}
        for number in wanted:
            db = about.cache.layers[number].db
            query = torch.cat(asked[number][-queries:], dim=2)
            found[number] = LayerRows(db.keys, db.values, query, *terms[number])
        return found


def _captured(path: Path, layers: list[int] | None, queries: int) -> dict[int, LayerRows]:
    """Rows and queries from a file of benchmarks/capture.py."""
    if not path.is_file():
        raise FileNotFoundError(f"--capture {path} is not a file")
    tensors = map_tensors(path)
    there = sorted(int(name.split(".")[0]) for name in tensors if name.endswith(".query") and name[:-6].isdecimal())
    if not there:
        raise ValueError(f"--capture {path} has no tensor named like '8.query', with '8.key' and '8.value'")
    found = {}
    for layer in _known(layers, there):
        try:
            keys, values, query = (tensors[f"{layer}.{name}"].float() for name in ("key", "value", "query"))
        except KeyError as error:
            raise ValueError(f"--capture {path} has no tensor {error}") from None
        if not 0 < queries <= query.shape[2]:
            raise ValueError(f"--queries is {queries}, expected at most {query.shape[2]}: {path} has no more")
        found[layer] = LayerRows(keys, values, query[:, :, -queries:])
    return found


def _known(layers: list[int] | None, there: Any) -> list[int]:
    for layer in layers or ():
        if layer not in there:
            raise ValueError(f"--layers names {layer}, expected some of {', '.join(map(str, there))}")
    return list(layers or there)


@torch.inference_mode()
def _measure(config: RetrievalConfig | None, layers: list[LayerRows], advance: Callable[[int], None]) -> Figures:
    """Answer the queries one after the other, as decoding does; None: densely."""
    reports, times = [], []
    dense: Counter[str] = Counter()
    for rows in layers:
        db = AttentionDB(
            rows.keys.shape[1],
            rows.keys.shape[3],
            value_dim=rows.values.shape[3],
            config=config or RetrievalConfig(index="flat", dense_below=2**62, audit_rate=0.0),
        )
        m, length = rows.query.shape[2], rows.keys.shape[2]
        db.insert(rows.keys[:, :, : length - m], rows.values[:, :, : length - m])
        took = []
        for i in range(m):
            at = slice(length - m + i, length - m + i + 1)
            db.insert(rows.keys[:, :, at], rows.values[:, :, at])
            query = rows.query[:, :, i : i + 1]
            reports.append(db.audit(query, scale=rows.scale, softcap=rows.softcap))
            began = time.perf_counter()
            db.attend(query, scale=rows.scale, softcap=rows.softcap)
            took.append(time.perf_counter() - began)
        times.append(1000 * torch.tensor(took))
        dense.update(db.stats.dense_reasons)
        advance(1)

    def mean(name: str) -> float:
        return statistics.fmean(float(getattr(report, name)) for report in reports)

    return Figures(
        "dense" if config is None else config.index_name,
        None if config is None else config.k,
        mean("recall"),
        mean("attention_mass"),
        mean("relative_error"),
        mean("rows_read"),
        mean("bytes_read") * len(layers),
        sum(float(took.quantile(0.5)) for took in times),
        {
            "relative_error": _percentiles(torch.cat([r.relative_error_by_query.flatten().float() for r in reports])),
            "recall": _percentiles(torch.cat([r.recall_by_query.flatten().float() for r in reports])),
            "ms": [sum(ends) for ends in zip(*map(_percentiles, times), strict=True)],
        },
        len(reports),
        {} if config is None else dict(dense),
    )


def _percentiles(figures: Tensor) -> list[float]:
    found: list[float] = figures.nanquantile(torch.tensor([0.1, 0.9])).tolist()
    return found


def _table(results: list[Figures], title: str) -> Table:
    table = Table(title=title)
    table.add_column("index")
    for name in ("k", "recall@k", "mass", "rel. error", "rows read", "MB read", "ms"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            row.index,
            "-" if row.k is None else str(row.k),
            *(figure(value, row.calls) for value in (row.recall, row.attention_mass, row.relative_error)),
            f"{row.rows_read:.0f}",
            f"{row.bytes_read / 1e6:.2f}",
            f"{row.ms:.2f}",
        )
    return table
