"""RULER's tasks (arXiv:2404.06654) asked of a model: what retrieval does to answers, beside dense's.

Every context is read once, densely. Then its questions and answers go through each operator in all layers: the model's
own dense attention, the wrapped model (dbattn at its default budget, or with another index or tail), operators of the
arena at a share of dense's bytes. The models are small, so dense itself fails some tasks. What differs from the paper's
templates stands in _ruler.py. Ctrl-C stops asking; what is done by then is reported.

  python -m benchmarks.tasks                                          2K, 4K, 8K, two samples of each task (8K: one)
  python -m benchmarks.tasks --quick                                  one sample of each task at 2K
  python -m benchmarks.tasks --samples 20 --tokens 8192 --json tasks.json
  python -m benchmarks.tasks --operators dbattn Quest "exact top-k" --tasks niah_single niah_multikey
  python -m benchmarks.tasks --model qwen.gguf --name Qwen2.5-Coder-0.5B --tokens 4096 --samples 4
  python -m benchmarks.tasks --device cuda --dtype bfloat16           model and rows on a GPU

JSON: results[] = {model, tokens, device, dtype, operators, samples[]}; device is "cpu" or the card's name;
operators{name} = {tasks{task: score}, average, difference, standard_error, same_answers, rows_read, rows_stored,
dense_calls}; a sample = {task, context_tokens, questions[] = {question, references, answers{name}}, servers{name}}.
Scores and differences are percent and points. A run replaces what the file holds of its model and sizes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dbattn.hf import load_model
from dbattn.text.haystack import read_haystack

from .. import readme
from .._common import SMOLLM2, console, print_table, progress, with_earlier, write_json
from ..arena import DEFAULT
from ._operators import DENSE, make_server, server_names
from ._ruler import TASKS, make_sample
from ._run import Record, ask, pieces, summarise

TOKENS, QUICK_TOKENS = (2048, 4096, 8192), (2048,)
# Contexts per task: up to LONG tokens, and beyond, where reading one takes half a minute.
SAMPLES, LONG_SAMPLES, LONG = 2, 1, 4096
BUDGET = 0.05
DEVICES, DTYPES = ("cpu", "cuda"), ("float32", "bfloat16")


def run(
    model: Any,
    tokenizer: Any,
    haystack: str,
    *,
    name: str = SMOLLM2,
    tokens: Sequence[int],
    samples: Mapping[int, int],
    tasks: Sequence[str],
    operators: Sequence[str],
    budget: float,
) -> list[dict[str, Any]]:
    """Ask ``samples[size]`` samples of all tasks at each size; the results, of what was asked before a Ctrl-C.

    Raises:
        ValueError: a size beyond the model's context, or too small for a task.
    """
    limit = model.config.get_text_config().max_position_embeddings
    if max(tokens) > limit:
        raise ValueError(f"tokens is {max(tokens)}, expected at most the model's context, {limit}")
    servers = [make_server(name, budget) for name in dict.fromkeys([DENSE, *operators])]
    names = [server.name for server in servers]
    # Samples come last in the order of sizes and tasks, so that an interrupted run is a smaller run.
    rounds = range(max(samples.values()))
    plan = [(i, size, TASKS[task]) for i in rounds for size in tokens if i < samples[size] for task in tasks]
    drawn = [(size, task, make_sample(task, size, i, tokenizer, haystack)) for i, size, task in plan]
    records: dict[int, list[Record]] = {size: [] for size in tokens}
    try:
        with progress("pieces of contexts", sum(pieces(size) for size, _, _ in drawn)) as tick:
            for size, task, sample in drawn:
                records[size].append(ask(model, tokenizer, task, sample, servers, tick))
                # A context is shorter than its size, sometimes by a piece.
                for _ in range(pieces(size) - pieces(records[size][-1]["context_tokens"] - 1)):
                    tick()
    except KeyboardInterrupt:
        done = sum(len(each) for each in records.values())
        console.print(f"[yellow]interrupted: {done} of {len(drawn)} samples were asked[/yellow]")
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    on = {"device": device, "dtype": str(model.dtype).removeprefix("torch.")}
    return [
        {"model": name, "tokens": size, **on, "operators": summarise(asked, names), "samples": asked}
        for size, asked in records.items()
        if asked
    ]


def report(results: Sequence[dict[str, Any]]) -> None:
    """A table per size, and what dense and the default scored in words."""
    for result in results:
        operators = result["operators"]
        tasks = list(operators[DENSE]["tasks"])
        rows = []
        for name, found in operators.items():
            row = [name, *(found["tasks"][task] for task in tasks), found["average"], None, None, None]
            if name != DENSE:
                error = found["standard_error"]
                row[-3] = f"{found['difference']:+.1f}" + ("" if error is None else f" ± {error:.1f}")
                row[-2], row[-1] = f"{found['same_answers']:.0%}", f"{found['dense_calls']:.0%}"
            rows.append([*row, f"{found['rows_read']:,.0f} of {found['rows_stored']:,.0f}"])
        columns = ("operator", *(task.replace("_", " ") for task in tasks), "average", "points from dense")
        counted = f"{result['tokens']:,} tokens, {len(result['samples'])} samples"
        on = "" if result["device"] == "cpu" else f", {result['device']}, {result['dtype']}"
        title = f"RULER's tasks, {result['model']}{on}, {counted}: scores in percent"
        print_table(title, (*columns, "same answers", "dense calls", "rows read"), rows, width=190)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, metavar="FOLDER_OR_GGUF", help="default: SmolLM2-135M-Instruct")
    options.add_argument("--name", help="what the record calls the model (default: the file's name)")
    options.add_argument("--tokens", type=int, nargs="+", help="lengths, answers included (default 2048 4096 8192)")
    options.add_argument(
        "--samples", type=int,
        help=f"contexts per task and length (default {SAMPLES}, beyond {LONG} tokens {LONG_SAMPLES})",
    )  # fmt: skip
    options.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK",
                         help=f"of {', '.join(TASKS)} (default: all)")  # fmt: skip
    options.add_argument("--operators", nargs="+", choices=server_names(), default=[DEFAULT], metavar="NAME",
                         help=f"beside dense, of {'; '.join(server_names())} (default: {DEFAULT})")  # fmt: skip
    options.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SHARE",
        help=f"of dense's bytes, for operators of the arena (default {BUDGET}); {DEFAULT} takes its own",
    )  # fmt: skip
    options.add_argument("--device", choices=DEVICES, default="cpu", help="where the model and its rows are")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model and its rows")
    options.add_argument("--quick", action="store_true", help="one sample of each task, at 2048 tokens")
    options.add_argument("--json", type=Path, metavar="OUT", help="also write figures and answers to this file")
    args = options.parse_args(argv)
    tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    if args.samples is not None and args.samples < 1:
        options.error(f"--samples is {args.samples}, expected at least 1")
    fixed = args.samples or (1 if args.quick else None)
    samples = {size: fixed or (LONG_SAMPLES if size > LONG else SAMPLES) for size in tokens}
    if not 0 < args.budget <= 1:
        options.error(f"--budget is {args.budget}, expected a share above 0 and up to 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device is cuda, but torch sees no CUDA device here")
    with console.status("loading the model"):
        model, tokenizer = load_model(args.model)
        model.to(args.device, getattr(torch, args.dtype))
    choice = {"tokens": list(tokens), "samples": samples, "tasks": args.tasks, "operators": args.operators}
    choice["budget"] = args.budget
    on = {"device": args.device, "dtype": args.dtype}
    name = args.name or (SMOLLM2 if args.model is None else args.model.stem)
    try:
        results = run(model, tokenizer, read_haystack(), name=name, **choice)
    except ValueError as error:
        options.error(str(error))
    report(results)
    if results:
        held = with_earlier(args.json, results, ("model", "tokens"))
        write_json(args.json, "tasks", {"model": name, **on, **choice}, held)
        if args.json:
            readme.write(args.json.parent.resolve())


if __name__ == "__main__":
    main()
