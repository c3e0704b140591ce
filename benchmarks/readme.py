"""benchmarks/README.md, written from the records in benchmarks/results: no figure in it is copied by hand.

Every benchmark that writes its record there also writes the page anew; this command does it alone.

  python -m benchmarks.readme
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dbattn.origin import origin_line

from ._common import RESULTS, show
from ._targets import targets

PAGE = "README.md"
Record = dict[str, Any]

_INTRO = """# Figures, and how to get them

`python -m benchmarks.readme` writes this page from the records in `benchmarks/results/`, as every benchmark does when
it is done. Each record holds its machine, date, commit and settings. The machines are shared: both sides of a ratio are
medians of calls in turn within one run, and times stand with their 10th and 90th percentile.

| command | what it measures | time |
|---|---|---|
| `make bench` | speed, quality and memory against what must be reached | 20 minutes, captures once 10 more |
| `python -m benchmarks --only decode insert` | some of them; `--quick` takes smaller sizes | minutes |
| `make arena` | every attention operator on the same rows, at the same bytes | 15 minutes |
| `make tasks` | RULER's tasks: the score of retrieval beside dense's | 30 minutes |
| `python -m benchmarks.families` | which model types are served | 10 minutes |
| `python -m benchmarks.bench_layers FILE ...` | error, bytes and bounds in layers of any model | minutes |
| `python -m benchmarks.bench_fidelity --model FOLDER_OR_GGUF` | logits of any model, on prose or code | minutes |
| `python -m benchmarks.bench_prefill` | prompts through lists: time, error, logits afterwards, needles | 15 minutes |
| `python -m benchmarks.bench_windows` | needles in texts longer than the model's range | 20 minutes |
| `python -m benchmarks.bench_exact` | exact=True: are the tokens dense's, and how fast do they come | 20 minutes |
| `python -m benchmarks.bench_open` | opening a context, and the caches that begin with it: time and memory | a minute |
| `python -m benchmarks.bench_serve` | the server: first token and tokens per second, 1 to 32 clients | 10 minutes |
| `python -m benchmarks.bench_shards --captured FILE ...` | rows over 2 and 4 processes against one store | minutes |
| `python -m benchmarks.bench_cost` | the cost model against the clock | minutes |

The model is SmolLM2-135M-Instruct in float32. Its rows are captured over real prose (`benchmarks/capture.py`); beyond
its context of 8,192 tokens windows are concatenated. Error is of a layer's attention output against dense's, over the
norm of dense's, with the same query and rows. On a GPU, decode steps, sealing and rows
in host memory are measured: `python -m benchmarks.gpu`."""


def write(folder: Path = RESULTS) -> None:
    """Write the page beside the results folder; records kept in another folder than the repository's write none."""
    if folder == RESULTS:
        (folder.parent / PAGE).write_text(page(records_in(folder)), encoding="utf-8")


def records_in(folder: Path, *, quick: bool = False) -> dict[str, Record]:
    """The records of a results folder by benchmark; those of ``--quick`` runs are rough, and left out unless asked."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: record for name, record in found.items() if quick or not record["settings"].get("quick")}


def page(records: dict[str, Record]) -> str:
    """The whole page; a benchmark without a record is named as not measured."""
    parts = [_INTRO, *_targets({name: record["results"] for name, record in records.items()})]
    for name, (title, section) in _SECTIONS.items():
        lines = ["", f"## {title}", ""]
        if name in records:
            lines += section(records[name]["results"])
            lines += ["", f"<sub>`{_COMMANDS[name]}`, {origin_line(records[name])}</sub>"]
        else:
            lines.append(f"Not measured: `{_COMMANDS[name]}` has left no record.")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join("" if cell is None else show(cell) for cell in row) + " |" for row in rows]


def _spread(side: Record) -> str:
    """A median with its 10th and 90th percentile, as far as they were recorded."""
    ends = [show(side[name]) for name in ("ms_p10", "ms_p90") if side.get(name) is not None]
    return f"{show(side['ms'])} ({' to '.join(ends)})" if ends else show(side["ms"])


def _errors(side: Record) -> str:
    return show(side["error"]) + ("" if side.get("error_p95") is None else f" / {show(side['error_p95'])}")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _targets(results: Record) -> list[str]:
    rows = []
    for target in targets(results):
        measured = None if target.measured is None else show(target.measured) + target.unit
        bounds = [None if bound is None else show(bound) + target.unit for bound in (target.must, target.aim)]
        verdict = {"must": "", "aim": "aim reached"}.get(target.verdict, f"**{target.verdict}**")
        rows.append([target.what, *bounds, measured, verdict, target.note])
    return [
        "",
        "## Against what must be reached",
        "",
        "Each figure is of the record in its own section below, which names its command, machine and commit.",
        "",
        *_table(("figure", "must", "aim", "measured", "", "setting"), rows),
    ]


def _decode(results: Record) -> list[str]:
    lines = [
        "One query position of one layer, 3 KV heads x 3 query heads, D 64, from cold caches. SDPA is torch's, with",
        "enable_gqa or with the query heads of a group passed as query positions (grouped), whichever is faster. What",
        "bounds a scan is memory: its share of the read bandwidth stands in the last column.",
    ]
    for size in results["sizes"]:
        lines += ["", f"**{size['rows']:,} rows**, read bandwidth {size['bandwidth'] / 1e9:.0f} GB/s", ""]
        rows = [
            [
                side["side"], _spread(side), side["x_sdpa"], _errors(side), side["recall"], side["bytes_read"] / 1e6,
                _percent(side["bandwidth_share"]),
            ]
            for side in size["sides"]
        ]  # fmt: skip
        head = ("side", "ms (p10 to p90)", "x SDPA", "error, mean / p95", "recall@k", "MB read", "of bandwidth")
        lines += _table(head, rows)
    value = results["exponent"]["value"]
    if value is not None:
        lines += ["", f"At equal error (<= 0.05) the time of `segmented` grows as T^{value:.2f}.", ""]
        lines.append("![time of one decode step against rows](results/summary.png)")
    return lines


def _model(results: Record) -> list[str]:
    f, p = results["fidelity"], results["prefill"]
    rows = []
    for size in results["sizes"]:
        if "skipped" in size:
            rows.append([f"{size['rows']:,}: skipped, {size['skipped']}", *[None] * 4])
            continue
        for name, side in size["sides"].items():
            times = size["sides"]["unwrapped"]["ms"] / side["ms"]
            rows.append([f"{size['rows']:,}, {name}", _spread(side), times, side["peak_bytes"] / 1e9, side["quiet"]])
    return [
        f"Teacher-forced over {f['tokens']} tokens after {f['context']:,}, all layers retrieving, against dense:",
        f"logits relative L2 {f['logits_l2']:.4f}, KL {f['kl']:.5f}, top-1 agreement {f['top1']:.3f}. The prompt took "
        f"{p['ms_per_token']:.1f} ms per token.",
        "",
        *_table(
            ("rows per layer, side", "ms per token (p10)", "x unwrapped", "peak GB", "share of steps undisturbed"), rows
        ),
    ]


def _insert(results: Record) -> list[str]:
    p = results["prefill"]
    rows = [
        [size["rows"], way["chunk"], way["us_per_token"], way["us_sealing"], way["worst_call_ms"],
         _percent(size["overhead"])]
        for size in results["sizes"]
        for way in size["ways"]
    ]  # fmt: skip
    head = ("rows", "chunk", "µs per token", "of it sealing", "longest call, ms", "index / rows, bytes")
    return [
        f"Sealing and merging in all layers take {p['sealing_s']:.2f} s of a prefill of {p['tokens']:,} tokens in "
        f"{p['s']:.1f} s: {_percent(p['share'])}; learning from its queries takes {p['learning_s']:.2f} s: "
        f"{_percent(p['learning_share'])}.",
        "",
        *_table(head, rows),
    ]


def _plan(results: Record) -> list[str]:
    worst = max(results["choices"], key=lambda choice: choice["regret"])
    rows = [
        [f"{b['tokens']:,}", str(b["max_error"]), _percent(b["within"]), b["error"], _percent(b["bytes_of_dense"])]
        for b in results["bounds"]
    ]
    return [
        f"Over {len(results['choices'])} combinations of rows, heads and k, {_percent(results['within_20'])} of the "
        f"planner's choices take at most",
        f"1.2 times the faster plan's time; the worst takes {worst['regret']:.2f} times ({worst['rows']:,} rows, "
        f"{worst['heads']}/{worst['kv_heads']} heads, k {worst['k']}).",
        "",
        "`max_error`: one answer is one query head at one decode step; layers 8 and 22, the default `audit_rate`.",
        "",
        *_table(("tokens", "`max_error=`", "answers within", "mean error", "bytes of dense"), rows),
    ]


LAYERS_HEAD = (
    "model, layer", "rows", "error, mean / p95", "expected", "bytes of dense", "int8 adds", "int8 at 4 %",
    "learning, ms", "within `max_error=0.05`", "bytes for it",
)  # fmt: skip


def layer_rows(results: Sequence[Record]) -> list[list[Any]]:
    """Rows under LAYERS_HEAD."""
    return [
        [f"{one['model']}, {one['layer']}", one["rows"], f"{one['error']:.4f} / {one['p95']:.3f}",
         None if one["expected"] is None else f"{one['expected']:.3f}", _percent(one["bytes_of_dense"]),
         f"{one['error_int8'] - one['error']:+.4f}", f"{one['few_error']:.4f} ({_percent(one['few_bytes'])})",
         one["learning_ms"], _percent(one["within"]),
         _percent(one["bound_bytes"])]
        for one in results
    ]  # fmt: skip


def _layers(results: Sequence[Record]) -> list[str]:
    count = len(results)
    errors, read, bound = ([one[name] for one in results] for name in ("error", "bytes_of_dense", "bound_bytes"))
    return [
        "The default config after `analyze` on the earlier half of the captured queries; 24 of the later half ask",
        f"(60 with `max_error`). Means of {count} layers: error {sum(errors) / count:.4f}, bytes "
        f"{_percent(sum(read) / count)}; with `max_error=0.05` {_percent(sum(bound) / count)}. Expected is what",
        "audits of the earlier queries said; these are few neighbours here, so that later ones may ask for more.",
        "int8 at 4 %: with int8 rows and a budget of about 4 % of float32's bytes. An int8 row takes "
        f"{_percent(max(one['kept_int8'] for one in results))} of a float32 row's bytes at most, its code and its part "
        "of the index included.",
        "",
        *_table(LAYERS_HEAD, layer_rows(results)),
    ]


FIDELITY_HEAD = ("model, text", "tokens, after", "layers retrieving", "logits, relative L2", "KL", "top-1")


def fidelity_rows(results: Sequence[Record]) -> list[list[Any]]:
    """Rows under FIDELITY_HEAD."""
    return [
        [f"{one['model']}, {one['text']}", f"{one['tokens']:,}, {one['context']:,}",
         f"{one['retrieving']} of {one['layers']}", f"{one['logits_l2']:.4f}",
         f"{one['kl']:.5f}", f"{one['top1']:.3f}"]
        for one in results
    ]  # fmt: skip


def _fidelity(results: Sequence[Record]) -> list[str]:
    return [
        "Teacher-forced after a text that was read densely, against the unwrapped model. Every layer may retrieve;",
        "where audits of the prompt's queries find no budget for `target_error`, it is scanned.",
        "",
        *_table(FIDELITY_HEAD, fidelity_rows(results)),
    ]


def _prefill(results: Record) -> list[str]:
    rows = [
        [f"{s['rows']:,}", s["s"], s["sdpa_s"], f"{show(s['speedup'])}x", _percent(s["sealing_share"]), s["rows_read"],
         _errors(s)]
        for s in results["sizes"]
    ]  # fmt: skip
    lines = []
    if rows:
        power = "" if results["exponent"] is None else f"; time grows as rows to the power of {results['exponent']:.2f}"
        head = ["rows", "through lists, s", "SDPA, s", "speedup", "sealing", "rows read", "error"]
        lines = [
            f"One layer, asked in calls of {results['call']:,} positions, on {results['threads']} threads{power}.",
            "Sealing is part of the time.",
            "",
            *_table(head, rows),
        ]
    models = [
        [m["model"], f"{m['tokens']:,} of {m['text']}", m["threads"], m["dense_s"], f"{show(m['speedup'])}x",
         _percent(m["sealing_share"]), m["logits_l2"], m["kl"], m["top1"]]
        for m in results["models"]
    ]  # fmt: skip
    if models:
        head = ["whole model", "tokens", "threads", "SDPA, s", "speedup", "sealing", "logits L2", "KL", "top-1"]
        lines += [
            "",
            f"One call of the model, unwrapped, and wrapped, where it goes through in chunks of {results['chunk']:,}.",
            "Logits are those of the next 256 tokens, read densely. The model is float32; rows of lists are multiplied",
            "as bfloat16 where a processor does that faster (AVX512-BF16).",
            "",
            *_table(head, models),
        ]
    for n in results["needles"]:
        found = f"of {n['asked']} needles {n['dense']} are found after dense reading, {n['both']} of them after lists"
        lines += ["", f"{n['model']}, {n['tokens']:,} tokens, asked densely: {found}."]
    return lines


def _windows(results: Sequence[Record]) -> list[str]:
    rows = [
        [r["model"], r["way"], f"{r['tokens']:,}", r["windows"], r["s"], r["cpu_s"],
         f"{r['found']} of {len(r['found_by_depth'])}", r["nll"], r["question_s"], r["rows_read"], r["ms_per_token"],
         r["cpu_ms_per_token"], r.get("bytes_per_token"), r["passages"], r["passages_alone"],
         r["all"] and r["all"]["found"]]
        for r in results
    ]  # fmt: skip
    head = [
        "model", "read", "tokens", "windows", "reading, s", "of the processor, s", "needles", "nll", "question, s",
        "rows read", "ms a token", "of the processor", "bytes a token", "passages", "without the text",
        "needles, all windows read",
    ]  # fmt: skip
    return [
        "Ten needles, evenly spread; nll is the negative log-likelihood per token of their numbers. Passages: that of",
        "96 tokens that the text has said, after the 32 before them. The question's seconds include choosing windows.",
        "",
        *_table(head, rows),
    ]


def _open(results: Sequence[Record]) -> list[str]:
    rows = [[r["step"], r["ms"], r["own_mb"], r["shared_mb"]] for r in results]
    return [
        "Memory is the process's own that no file holds, for each cache; and what pages hold that caches share.",
        "",
        *_table(["step", "ms", "own MB", "shared MB"], rows),
    ]


def _frontier(results: Sequence[Record]) -> list[str]:
    lines = [
        "Each index with each tail, layers 8 and 22; k is of rows per query and KV head. Bytes are all that is read."
    ]
    for size in results:
        rows = [
            [f"`{curve['index']}`, {curve['tail']}", point["k"], point["recall"], point["attention_mass"],
             _errors(point), _percent(point["bytes_read"] / point["bytes_dense"])]
            for curve in size["curves"]
            for point in curve["points"]
            if point["k"] in (128, 512)
        ]  # fmt: skip
        head = ("index, tail", "k", "recall@k", "mass", "error, mean / p95", "bytes of dense")
        lines += ["", f"**{size['rows']:,} rows**", "", *_table(head, rows)]
        rows = [
            [f"`{kept['storage']}`", kept["row_bytes"], kept["error_dense"], kept["error"], kept["bytes_read"] / 1e6]
            for kept in size["storages"]
        ]
        columns = ("rows kept as", "bytes of a row", "error of a scan", "error of `segmented`", "MB read by it")
        lines += ["", "Against dense over the rows as captured:", "", *_table(columns, rows)]
    return lines


def _arena(results: Sequence[Record]) -> list[str]:
    lines = [
        "What the field argues about, on the same captured rows, at the same share of dense's bytes: mean error, and",
        "with `@` the real share where it is another. How bytes are counted: `benchmarks/arena/_contract.py`.",
        "Operators marked † choose by scoring every key or search per query head, and read more than the budget; those",
        "marked ‡ are made to be trained and run untrained. The last column is what mean error 0.05 costs.",
    ]
    budgets = (0.02, 0.05, 0.1)
    for size in results:
        rows = []
        for operator in size["operators"]:
            points = {point["budget"]: point for point in operator["points"]}
            dear = any(point["share"] > 1.5 * _chosen(point) for point in points.values())
            name = operator["name"] + (" †" if dear else "") + (" ‡" if operator["needs_training"] else "")
            needed = operator["share_for_error"]
            merit = None if needed is None else _percent(needed)
            rows.append([name, *(_at(points.get(budget)) for budget in budgets), merit])
        layers = ", ".join(map(str, size["layers"]))
        lines += ["", f"**{size['model']}, {size['rows']:,} rows**, layers {layers}", ""]
        lines += _table(("operator", *map(_percent, budgets), "bytes for 0.05"), rows)
        lines += ["", *(f"- {verdict}" for verdict in size["verdicts"])]
    return [*lines, "", f"![error against bytes read](results/{results[0]['plots'][0]})"]


def _chosen(point: Record) -> float:
    """The share of dense's bytes that a point read, were its choice of rows free where it scores all of them."""
    free = point["share_if_free"]
    return float(point["share"] if free is None else free)


def _at(point: Record | None) -> str | None:
    if point is None:
        return None
    share = _chosen(point)
    off = abs(share / point["budget"] - 1) > 0.05
    return show(point["error"]) + (f" @ {_percent(share)}" if off else "")


def _tasks(results: Sequence[Record]) -> list[str]:
    rows = []
    for size in results:
        for name, found in size["operators"].items():
            error = found["standard_error"]
            difference = f"{found['difference']:+.1f}" + ("" if error is None else f" ± {error:.1f}")
            asked = [f"{size['model']}, {size['tokens']:,}", len(size["samples"]), name, f"{found['average']:.1f}"]
            same = None if name == "dense" else _percent(found["same_answers"])
            rows.append([*asked, None if same is None else difference, same])
    head = ("model, tokens", "contexts", "operator", "score", "points from dense ± standard error", "same answers")
    return [
        "RULER's tasks: the context is read densely, question and answer go through the operator. The models are",
        "small: dense itself fails many of these tasks.",
        "",
        *_table(head, rows),
    ]


def _families(results: Sequence[Record]) -> list[str]:
    counted: dict[str, int] = {}
    for family in results:
        counted[family["outcome"]] = counted.get(family["outcome"], 0) + 1
    words = ", ".join(f"{count} {outcome}" for outcome, count in counted.items())
    inexact = [family["type"] for family in results if family["exact"] is False]
    wrong = f"inexact where `k` covers the rows: {', '.join(inexact)}" if inexact else "none is inexact"
    return [
        f"Of {len(results)} causal types of transformers, as tiny models of random weights: {words}; {wrong}.",
        "Each type: [results/families.md](results/families.md).",
    ]


def _serve(results: Sequence[Record]) -> list[str]:
    same = ("weights", "context", "clients")
    dense = {tuple(one[name] for name in same): one for one in results if one["side"] == "dense"}
    rows = []
    for one in results:
        if one["side"] != "server":
            continue
        other = dense.get(tuple(one[name] for name in same))
        rows.append(
            [
                *(f"{one[name]:,}" for name in ("context", "clients")),
                one["weights"],
                one["tokens_per_s"],
                None if other is None else other["tokens_per_s"],
                None if other is None else one["tokens_per_s"] / other["tokens_per_s"],
                *(f"{show(side['first_p50'])} / {show(side['first_p95'])}" if side else "" for side in (one, other)),
                f"{show(again['first_p50'])} ({show(again['read'])})" if (again := one.get("next_turn")) else "",
                " / ".join(str(side["cut"]) if side else "" for side in (one, other)).strip(" /"),
            ]
        )
    head = (
        "context", "clients at once", "weights", "tokens/s", "dense generate", "times",
        "first token, s, p50 / p95", "of dense generate", "next turn, s (tokens read)", "cut",
    )  # fmt: skip
    return [
        "SmolLM2-135M: each client asks another question about the context, all at the same moment; the server answers",
        "them together, the unwrapped model's `generate` one after the other, from a cache with the same context",
        "(empty: not measured). A number of clients on one side is given some minutes; answers that had not come to",
        "their end by then were cut (server / dense).",
        "",
        *_table(head, rows),
        *_forks([one for one in results if one["side"] == "forks"]),
    ]


def _forks(results: Sequence[Record]) -> list[str]:
    if not results:
        return []
    rows = [
        [
            f"{one['context']:,}",
            str(one["clients"]),
            f"{one['scanning']} of {one['layers']}",
            *(one[f"{name}_ms"] for name in ("together", "each", "scans")),
            one["each_ms"] / one["together_ms"],
            one["scans_ms"] / one["together_ms"],
        ]
        for one in results
    ]
    head = (
        "rows shared", "forks", "layers whose plan scans", "together, ms", "each by its plan, ms", "each scanning, ms",
        "times as fast as by plan", "as scanning",
    )  # fmt: skip
    return ["", "One query to each of several forks of a layer (median of two layers):", "", *_table(head, rows)]


def _exact(results: Sequence[Record]) -> list[str]:
    tokens = [one for one in results if one["what"] == "tokens"]
    drafted, accepted = (sum(one[name] for one in tokens) for name in ("drafted", "accepted"))
    lines = []
    if tokens:
        lines = [
            f"`exact=True` continues {sum(one['same'] for one in tokens)} of {len(tokens)} prompts of "
            f"{tokens[0]['rows']:,} tokens by the same {tokens[0]['written']} tokens as the unwrapped model, with "
            f"`k=64` for drafts, of which {accepted:,} of {drafted:,} were accepted.",
            "",
        ]
    rows = [
        [
            f"{one['rows']:,}",
            one["weights"],
            one["drafts"],
            *(one[name] for name in ("dense_ms", "exact_ms", "speedup", "a_pass")),
            f"{one['acceptance']:.0%}",
            "yes" if one["same"] else "no",
        ]
        for one in results
        if one["what"] == "time"
    ]
    head = (
        "rows per layer", "weights", "of drafts", "dense, ms a token", "exact", "times as fast", "drafted a pass",
        "accepted", "same tokens",
    )  # fmt: skip
    return [*lines, *_table(head, rows)] if rows else lines[:-1]


SHARDS_HEAD = (
    "model, layer", "ranks", "k of all", "error, one store", "shards", "ratio", "rows read, one store", "shards",
    "parts of k", "error where all is read",
)  # fmt: skip


def shard_rows(layers: Sequence[Record]) -> list[list[Any]]:
    """The rows of the table of shards."""
    return [
        [
            f"{one['model']}, {one['layer']}",
            one["ranks"],
            one["k"],
            one["one_error"],
            one["error"],
            f"{one['ratio']:.2f}",
            f"{one['one_rows']:.0f}",
            f"{one['rows_read']:.0f}",
            " + ".join(map(str, one["parts"])),
            f"{one['exact']:.1e}",
        ]
        for one in layers
    ]


def _shards(results: Record) -> list[str]:
    model, points = results["model"], results["model"]["points"]
    ranks = list(dict.fromkeys(point["ranks"] for point in points))
    given = "given" if model["weights_given"] else "measured"
    by_length: dict[int, list[Record]] = {}
    for point in points:
        by_length.setdefault(point["rows"], []).append(point)
    speeds = [[f"{rows:,}", *(show(point["tokens_per_s"]) for point in each)] for rows, each in by_length.items()]
    steps = ", ".join(f"{show(step['ms'])} ms over {step['rows']:,}" for step in results["steps"])
    sent = "; ".join(
        f"{one['bytes']:,} bytes a rank, layer and token, {one['us']:.0f} µs among {one['ranks']} on "
        f"{one['cores']} core{'s' * (one['cores'] > 1)}"
        for one in results["exchange"]
    )
    return [
        "Rows of a layer dealt over processes of this machine (gloo, one thread each), against one store of the same",
        "rows with the same budget k; rows read have sinks and hot rows in them, of which each shard has its own.",
        "",
        *_table(SHARDS_HEAD, shard_rows(results["layers"])),
        "",
        f"What is exchanged, one all-gather a layer: {sent}. (More processes than cores wait for each other.)",
        "",
        "**Larger clusters: a model, not a measurement.** Tokens/s of SmolLM2-135M in float32, one thread a rank, each",
        "rank on a machine of its own: `1000 / (weights + layers · (step(rows / ranks) + (ranks - 1) · hop))` ms, with",
        f"weights = {show(model['weights_ms'])} ms (without attention, {given}), layers = 30, hop = "
        f"{show(model['hop_us'])} µs (what one more",
        "rank adds to a gather where each has a core, or what is assumed of a network, whichever is more), and a step",
        f"of a layer in one process measured as {steps} rows, beyond that as it grows between the last two. Each rank",
        "reads what one store of its rows would.",
        "",
        *_table(("rows of the context", *(f"{count} rank{'s' * (count > 1)}" for count in ranks)), speeds),
    ]


_SECTIONS: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "decode": ("One decode step", _decode),
    "model": ("The whole model", _model),
    "prefill": ("Prompts through lists", _prefill),
    "windows": ("Texts longer than the model's range", _windows),
    "open": ("Opening a context", _open),
    "insert": ("Inserting", _insert),
    "plan": ("Plans and bounds", _plan),
    "layers": ("Layers of several models", _layers),
    "fidelity": ("Logits of several models", _fidelity),
    "frontier": ("Recall, error and bytes", _frontier),
    "exact": ("Exact answers by drafts", _exact),
    "serve": ("The server", _serve),
    "shards": ("Rows over several processes", _shards),
    "arena": ("The arena", _arena),
    "tasks": ("Tasks", _tasks),
    "families": ("Model families", _families),
}
_COMMANDS = {
    **dict.fromkeys(("decode", "model", "insert", "plan", "frontier"), "make bench"),
    "layers": "python -m benchmarks.bench_layers",
    "fidelity": "python -m benchmarks.bench_fidelity",
    "prefill": "python -m benchmarks.bench_prefill",
    "exact": "python -m benchmarks.bench_exact",
    "serve": "python -m benchmarks.bench_serve",
    "shards": "python -m benchmarks.bench_shards",
    "windows": "python -m benchmarks.bench_windows",
    "open": "python -m benchmarks.bench_open",
    "arena": "make arena",
    "tasks": "make tasks",
    "families": "python -m benchmarks.families",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    write()
    print(RESULTS.parent / PAGE)


if __name__ == "__main__":
    main()
