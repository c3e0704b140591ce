"""dbattn explain: what the first step of an answer reads."""

from pathlib import Path
from typing import TextIO

from rich.console import Console
from torch import Tensor

from ..attention import AttentionDB
from ..files import check_output, write_json
from ..query.plan import QueryPlan, sum_plans
from ..text.prompt import answer_tokens
from ._opened import opened


def run_explain(
    *,
    context: Path,
    question: str,
    model: Path | None,
    weights: str,
    k: int | None,
    windows: int | None,
    layer: int | None,
    json_path: Path | TextIO | None,
    quiet: bool,
) -> None:
    """Print the plan of one decode step after a question, with what it read.

    Raises:
        FileNotFoundError, ValueError: see ``opened``, and a layer that is not there.
    """
    check_output("--json", json_path)
    plans: dict[int, QueryPlan] = {}

    def explain(number: int, db: AttentionDB, query: Tensor, scale: float, softcap: float | None) -> None:
        plans[number] = db.explain(query, scale=scale, softcap=softcap)

    with opened(context, model, weights, k, Console(stderr=True, quiet=quiet), windows) as about:
        there = about.databases
        if layer is not None and layer not in there:
            expected = f"0 to {there[-1]}" if len(there) > there[-1] else f"one of {', '.join(map(str, there))}"
            raise ValueError(f"--layer is {layer}, expected {expected}")
        step = answer_tokens(about.model, about.asked(question, 2), about.cache, None, 2)
        next(step)
        with about.handle.watch(explain):
            next(step)
    plan = sum_plans(list(plans.values())) if layer is None else plans[layer]
    if (reading := about.handle.reading(about.cache)) is not None:
        print(f"rows: {reading}")
    print(plan)
    write_json(json_path, plan.to_dict())
