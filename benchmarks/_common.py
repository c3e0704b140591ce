"""What the benchmarks share: interleaved timing, the guard against other load, tables, JSON, command lines."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from dbattn import files
from dbattn.origin import origin

RESULTS = Path(__file__).parent / "results"
SIZES = {"4K": 4096, "8K": 8192, "32K": 32768, "131K": 131072, "524K": 524288}
SMOLLM2 = "SmolLM2-135M"
OUT_HELP = (
    "default benchmarks/results, whose records the repository keeps; with --quick a folder in it that it does not"
)
# Read between batches of timed calls, so that each starts with cold rows: twice the largest cache of common machines.
FLUSH_BYTES = 64 << 20

console = Console(stderr=True)


@dataclass(frozen=True)
class Side:
    """One contender: ``run(store, query)`` over stores of equal size, so that consecutive calls read cold rows."""

    name: str
    stores: Sequence[Any]
    run: Callable[[Any, Tensor], Any]


@dataclass(frozen=True)
class Timing:
    """Time of each call, in the caller's unit; ``quiet`` is the share of batches that had both cores to themselves."""

    times: list[float]
    quiet: float

    @property
    def median(self) -> float:
        """Median of the calls."""
        return statistics.median(self.times)

    @property
    def p10(self) -> float:
        """10th percentile: what an undisturbed call takes."""
        return float(torch.tensor(self.times).quantile(0.1))

    @property
    def p90(self) -> float:
        """90th percentile: what a disturbed call takes."""
        return float(torch.tensor(self.times).quantile(0.9))


class QuietGuard:
    """Tells whether a batch had the cores to itself: other processes used little CPU, and both cores are free after it.

    Without ``/proc/stat``, or for batches shorter than its clock, only the latter: a fixed computation in cache takes
    about its best time.
    """

    def __init__(self, slack: float = 1.2) -> None:
        self._x, self._y = torch.linspace(-3, 3, 1 << 17), torch.empty(1 << 17)
        self._slack = slack
        self._best = min(self._probe() for _ in range(40))
        self._mark = self._clocks()

    def wait(self, seconds: float = 1.0) -> None:
        """Return when it is quiet, or after ``seconds``: a batch begins."""
        end = time.perf_counter() + seconds
        while not self._is_free() and time.perf_counter() < end:
            time.sleep(0.01)
        self._mark = self._clocks()

    def was_quiet(self) -> bool:
        """Whether nothing else ran to speak of since the latest ``wait``."""
        elapsed, others = (now - then for now, then in zip(self._clocks(), self._mark, strict=True))
        # The kernel counts in hundredths of a second.
        return others < 0.03 + 0.1 * elapsed and self._is_free()

    def _clocks(self) -> tuple[float, float]:
        """Now, and the CPU seconds that other processes have used on this machine."""
        cpu, own = psutil.cpu_times(), os.times()
        busy = sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0.0)
        return time.perf_counter(), busy - own.user - own.system

    def _is_free(self) -> bool:
        took = self._probe()
        self._best = min(self._best, took)
        return took < self._slack * self._best

    def _probe(self) -> float:
        # Once uncounted: the batch before may have pushed the operands out of the caches.
        torch.sin(self._x, out=self._y)
        began = time.perf_counter()
        for _ in range(3):
            torch.sin(self._x, out=self._y)
        return time.perf_counter() - began


def time_sides(
    sides: Sequence[Side], queries: Sequence[Tensor], *, rounds: int, seconds: float, label: str = "timing"
) -> dict[str, Timing]:
    """Time every side in turn, round after round, until ``rounds`` are done or ``seconds`` have passed (3 at least).

    A batch is one pass over a side's stores with caches flushed before it; its first call warms up code and threads
    and is not counted. A side with fewer than three stores has its caches flushed before every counted call instead.
    ``timings_of`` says what happens to batches that other load disturbed.
    """
    guard, flush = QuietGuard(), torch.ones(FLUSH_BYTES // 4)
    batches: dict[str, list[tuple[bool, list[float]]]] = {side.name: [] for side in sides}
    end, at = time.perf_counter() + seconds, 0
    with progress(label, rounds) as advance:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() > end:
                break
            for side in sides:
                few = len(side.stores) < 3
                guard.wait()
                flush.sum()
                took = []
                for i, store in enumerate([side.stores[0], *side.stores] if few else side.stores):
                    query, at = queries[at % len(queries)], at + 1
                    if few:
                        flush.sum()
                    began = time.perf_counter()
                    side.run(store, query)
                    if i > 0:
                        took.append(time.perf_counter() - began)
                batches[side.name].append((guard.was_quiet(), took))
            advance()
    return timings_of(batches)


def timings_of(batches: dict[str, list[tuple[bool, list[float]]]]) -> dict[str, Timing]:
    """Timings from each side's batches (whether it was quiet, times of its calls).

    Disturbed batches are left out if every side has three others. Otherwise all are kept on all sides: long batches
    are disturbed more often than short ones, so leaving them out on some sides only would favour the fast ones.
    """
    choose = all(sum(ok for ok, _ in each) >= 3 for each in batches.values())
    timings = {}
    for name, each in batches.items():
        kept = [times for ok, times in each if ok or not choose]
        timings[name] = Timing([t for times in kept for t in times], sum(ok for ok, _ in each) / len(each))
    if not choose:
        console.print("[yellow]other load disturbed this measurement: repeat it on a quiet machine[/yellow]")
    return timings


def check_exact(sides: Sequence[Side], query: Tensor, keys: Tensor, values: Tensor) -> dict[str, float]:
    """Refuse to time a side whose answer on its first store is not attention over ``keys`` and ``values``.

    ``query [1, Hq, 1, D]``, keys and values ``[1, Hkv, T, D]`` in any order of rows. Each ``run`` may return the output
    or ``(output, lse)``, shaped so that it flattens to ``[Hq * D]``.

    Returns:
        Each side's relative error against the same sum in float64.

    Raises:
        ValueError: an error above 1e-5, or above what float32 sums of so many rows round to; names the side.
    """
    group = query.shape[1] // keys.shape[1]
    grouped = query[0, :, 0].view(keys.shape[1], group, -1).double()
    weights = torch.softmax(grouped @ keys[0].double().transpose(1, 2) * query.shape[-1] ** -0.5, dim=-1)
    reference = (weights @ values[0].double()).flatten()
    # Means over very many rows are small against their terms: measured, torch's own error grows like T beyond 8K rows.
    tolerance = 1e-5 * max(1.0, keys.shape[2] / 8192)
    errors = {}
    for side in sides:
        answer = side.run(side.stores[0], query)
        out = (answer[0] if isinstance(answer, tuple) else answer).double().flatten()
        errors[side.name] = float((out - reference).norm() / reference.norm())
        if not errors[side.name] <= tolerance:
            error = f"relative error {errors[side.name]:.2e} > {tolerance:.0e}"
            raise ValueError(f"{side.name} is wrong, so it is not timed: {error}")
    return errors


def fit_exponent(rows: Sequence[float], seconds: Sequence[float]) -> float:
    """The e of ``seconds ~ rows ** e``, least squares on log-log scales; at least two sizes."""
    x, y = (torch.tensor(list(each), dtype=torch.float64).log() for each in (rows, seconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar with the time left; yields the function that advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, width: int = 150) -> None:
    """Print a table, piped at this width: first a column of text, numbers to three figures, None as a dash."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(show(cell) for cell in row))
    output = Console()
    # Piped output has no width of its own; a table cut to 80 columns would be unreadable there.
    (output if output.is_terminal else Console(width=width)).print(table)


def show(value: Any) -> str:
    """A cell: text as it is, None as a dash, a number to three figures."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def results_folder(quick: bool) -> Path:
    """Where records go: rough ones not where the repository keeps the others."""
    return RESULTS / "quick" if quick else RESULTS


def write_json(path: Path | None, benchmark: str, settings: dict[str, Any], results: Any) -> dict[str, Any]:
    """The record of a run: benchmark, date, commit, machine, settings, results; written whole where a path is given."""
    record = {"benchmark": benchmark, **origin(), "settings": settings, "results": results}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, record)
    return record


def with_earlier(
    path: Path | None, found: Sequence[dict[str, Any]], same: Sequence[str], settings: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """What a record holds, and ``found`` in place of entries that are the same in the fields ``same``; in their order.

    For benchmarks that a run takes to one model or text at a time. Where ``settings`` are given, a record of others is
    replaced.
    """

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(one[name] for name in same)

    record = {} if path is None or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
    earlier = record.get("results", []) if settings is None or record.get("settings") == settings else []
    new = {key(one) for one in found}
    return sorted([*(one for one in earlier if key(one) not in new), *found], key=key)


def parser(doc: str | None, sizes: Sequence[str], allowed: Sequence[str]) -> argparse.ArgumentParser:
    """The options every benchmark has: ``--sizes``, ``--quick``, ``--json``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--sizes", nargs="+", default=list(sizes), choices=allowed, metavar="T",
        help=f"rows per store, of {', '.join(allowed)} (default {' '.join(sizes)})",
    )  # fmt: skip
    made.add_argument(
        "--quick", action="store_true", help="fewer repetitions: rougher figures in a fraction of the time"
    )
    made.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")
    return made
