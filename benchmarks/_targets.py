"""What the engine must reach and aims at, and the verdict on measured results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._common import SIZES, print_table, show
from .arena._report import CLAIMED, SLACK, ours_at, rivals


@dataclass(frozen=True)
class Target:
    """One figure. ``more`` tells whether more is better; ``must`` is None where there is only an aim.

    ``measured`` is None where the benchmark did not run, or where no setting qualified: then ``note`` says so.
    Otherwise ``note`` names the setting that was measured.
    """

    what: str
    must: float | None
    aim: float
    measured: float | None
    more: bool
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """The best bound that holds, "aim" or "must", or "missed"; "not measured" where its benchmark did not run."""
        if self.measured is None:
            return "missed" if self.note else "not measured"
        for name, bound in (("aim", self.aim), ("must", self.must)):
            if bound is not None and (self.measured >= bound if self.more else self.measured <= bound):
                return name
        return "missed" if self.must is not None else "below aim"

    def to_dict(self) -> dict[str, Any]:
        """The figure as plain data."""
        names = ("what", "must", "aim", "measured", "unit", "note", "verdict")
        return {name: getattr(self, name) for name in names}


def disturbed(sides: Sequence[dict[str, Any]]) -> str:
    """A remark where other load disturbed most batches of a side that a figure rests on, else nothing."""
    return " (disturbed)" if min(side.get("quiet", 1.0) for side in sides) < 0.5 else ""


def targets(results: dict[str, Any]) -> list[Target]:
    """All targets, from the results of the benchmarks that ran: ``{name: results}``."""
    return [*_engine(results), *_any_model(results)]


def _any_model(results: dict[str, Any]) -> list[Target]:
    """What must hold on every model and layer that was captured, after its queries were analysed."""
    layers = results.get("layers", [])
    found: list[Target] = []

    def of_layers(what: str, must: float, aim: float, values: Sequence[float | None], *, mean: bool = False) -> None:
        known = [value for value in values if value is not None]
        measured = None if not known else sum(known) / len(known) if mean else max(known)
        found.append(Target(what, must, aim, measured, False, "", f"{len(known)} layers" if known else ""))

    def all_of(name: str) -> list[float]:
        return [layer[name] for layer in layers]

    of_layers("mean error of a layer, the worst", 0.035, 0.02, all_of("error"))
    of_layers("95th percentile of a layer's errors, the worst", 0.11, 0.06, all_of("p95"))
    of_layers("share of dense's bytes, mean over layers", 0.07, 0.05, all_of("bytes_of_dense"), mean=True)
    of_layers("the same, the most of any layer", 0.12, 0.09, all_of("bytes_of_dense"))
    off = [_times_off(layer["expected"], layer["error"]) for layer in layers]
    of_layers("error audited and expected, times apart, the worst", 1.5, 1.2, off)
    of_layers("error that int8 rows add, the most", 0.025, 0.012, [x["error_int8"] - x["error"] for x in layers])
    of_layers("int8 rows: mean error of a layer at 4 % of float32 bytes, the worst", 0.04, 0.025, all_of("few_error"))
    of_layers("int8 rows: bytes kept, code and index included, of float32's", 0.33, 0.30, all_of("kept_int8"))
    within = min(all_of("within"), default=None)
    found.append(Target("max_error=0.05: answers within, the least of any layer", 0.95, 0.98, within, True))
    of_layers("max_error=0.05: share of dense's bytes, mean", 0.15, 0.08, all_of("bound_bytes"), mean=True)
    of_layers("the same, the most of any layer", 0.6, 0.25, all_of("bound_bytes"))
    for size, must, aim in (("8K", 5.0, 10.0), ("32K", 15.0, 25.0), ("131K", 40.0, 80.0)):
        sides = next(
            (s["sides"] for s in results.get("decode", {}).get("sizes", []) if s["tokens"] == SIZES[size]), None
        )
        fastest, note = None, ""
        if sides is not None:
            fit = [s for s in sides if s["kind"] == "segmented" and s["error"] <= 0.03]
            best = max(fit, key=lambda s: s["x_sdpa"], default=None)
            fastest = None if best is None else best["x_sdpa"]
            note = "no setting within the error" if best is None else best["side"] + disturbed([best])
        found.append(
            Target(f"segmented, times faster than SDPA, error <= 0.03, {size}", must, aim, fastest, True, "x", note)
        )
    for one in results.get("fidelity", []):
        where = f"{one['model']}, {one['text']}, {one['context']:,} tokens"
        for what, key, must, aim, more in (
            ("logits, relative L2", "logits_l2", 0.02, 0.01, False), ("KL to dense", "kl", 0.001, 0.0005, False),
            ("top-1 agreement", "top1", 0.98, 0.99, True),
        ):  # fmt: skip
            found.append(Target(f"{what}: {where}", must, aim, one[key], more))
    for size in results.get("arena", []):
        for budget in CLAIMED:
            lead, note = _lead(size["operators"], budget)
            what = f"arena, {size['model']}, {budget:.0%}: the best other's error over dbattn's"
            found.append(Target(what, 1, 2, lead, True, "x", note))
    return found


def _times_off(expected: float | None, audited: float) -> float | None:
    return None if not expected or not audited else max(audited / expected, expected / audited)


def _lead(operators: Sequence[dict[str, Any]], budget: float) -> tuple[float | None, str]:
    """Error of the best other operator that keeps a budget without training, over dbattn's; and who that is."""
    ours, fair = ours_at(operators, budget), rivals(operators, budget)
    if ours is None or not fair:
        return None, ""
    error, name = min(fair)
    note = f"{name} {error:.3f}, dbattn {ours['error']:.3f}"
    if ours["share"] > SLACK * budget:
        note += f" at {ours['share']:.1%}, the least it can read"
    return error / ours["error"], note


def _engine(results: dict[str, Any]) -> list[Target]:
    """Speed, memory and bounds of the engine on SmolLM2's rows."""
    sizes = {size["tokens"]: size for size in results.get("decode", {}).get("sizes", [])}
    best = {p["rows"]: p for p in results.get("decode", {}).get("exponent", {}).get("points", [])}
    found: list[Target] = []
    must: float | None
    aim: float

    def side(tokens: int, name: str, ok: Callable[[dict[str, Any]], bool]) -> tuple[float | None, str]:
        size = sizes.get(tokens)
        if size is None:
            return None, ""
        matching = [s for s in size["sides"] if ok(s)]
        if not matching:
            return None, "no setting within the error"
        exact = [s for s in size["sides"] if s["kind"] in ("sdpa", "dense_decode")]
        return matching[0][name], matching[0]["side"] + disturbed([*exact, matching[0]])

    def within_bound(tokens: int) -> Callable[[dict[str, Any]], bool]:
        point = best.get(sizes[tokens]["rows"]) if tokens in sizes else None
        return lambda s: point is not None and s["side"] == point["side"]

    def own(s: dict[str, Any]) -> bool:
        return bool(s["kind"] == "dense_decode")

    at = SIZES["131K"]
    faster, note = side(at, "x_sdpa", own)
    found.append(Target("dense_decode, times faster than SDPA, 131K", 2.5, 4, faster, True, "x", note))
    share, _ = side(at, "bandwidth_share", own)
    found.append(Target("dense_decode, share of read bandwidth, 131K", None, 0.8, share, True))
    for against, name, wanted in (
        ("SDPA", "x_sdpa", (("8K", 6, 10), ("32K", 15, 30), ("131K", 30, 60), ("524K", 50, 120))),
        ("dense_decode", "x_dense_decode", (("32K", 5, 10), ("131K", 12, 25))),
    ):
        for size, must, aim in wanted:
            measured, setting = side(SIZES[size], name, within_bound(SIZES[size]))
            what = f"segmented, times faster than {against}, error <= 0.05, {size}"
            found.append(Target(what, must, aim, measured, True, "x", setting))
    exponent = results.get("decode", {}).get("exponent", {})
    # The target is about this range; a fit over fewer sizes is another figure.
    whole = len(exponent.get("points", [])) == 4
    value = exponent.get("value") if whole else None
    found.append(Target("exponent of time in T, 8K to 524K, error <= 0.05", 0.75, 0.5, value, False))

    insert = results.get("insert", {})
    share = insert.get("prefill", {}).get("share")
    found.append(Target("sealing and merging, share of the model's prefill at 8K", 0.10, 0.03, share, False))
    share = insert.get("prefill", {}).get("learning_share")
    found.append(Target("learning from queries, share of the model's prefill at 8K", 0.04, 0.02, share, False))
    overheads = [size["overhead"] for size in insert.get("sizes", [])]
    found.append(Target("memory above one copy of K and V", 0.20, 0.10, max(overheads, default=None), False))

    model = results.get("model", {})
    fidelity = model.get("fidelity", {})
    if fidelity.get("context", 0) < 7900:
        fidelity = {}
    for what, key, must, aim, more in (
        ("logits, relative L2, all layers retrieving, 8K", "logits_l2", 0.08, 0.03, False),
        ("KL to dense, the same run", "kl", 0.01, 0.001, False),
        ("top-1 agreement, the same run", "top1", 0.95, 0.99, True),
    ):
        found.append(Target(what, must, aim, fidelity.get(key), more))
    plan = results.get("plan", {})
    found.append(Target("plans chosen that take <= 1.2x the faster one's time", 1.0, 1.0, plan.get("within_20"), True))
    for bound in plan.get("bounds", []):
        what = f"answers within max_error={bound['max_error']}, {bound['tokens'] // 1024}K"
        must = 0.95 if bound["max_error"] == 0.05 else None
        found.append(
            Target(what, must, 0.95, bound["within"], True, "", f"{bound['bytes_of_dense']:.1%} of dense's bytes")
        )
    by_rows = {size["rows"]: size for size in model.get("sizes", [])}
    for what, rows, must, aim in (
        ("SmolLM2 end to end, times faster than unwrapped, 8K", "8K", 2, 4),
        ("the same at 4K: no slower", "4K", 1, 1),
    ):
        size = by_rows.get(SIZES[rows], {})
        note = disturbed([size["sides"][name] for name in ("unwrapped", "retrieval")]) if "sides" in size else ""
        found.append(Target(what, must, aim, size.get("speedup"), True, "x", note.strip()))
    return found


def print_targets(found: Sequence[Target]) -> None:
    """The table of musts and aims."""
    rows = []
    for t in found:
        sign = ">=" if t.more else "<="
        must, aim = (None if bound is None else f"{sign} {show(bound)}{t.unit}" for bound in (t.must, t.aim))
        measured = None if t.measured is None else f"{show(t.measured)}{t.unit}"
        rows.append([t.what, must, aim, measured, t.verdict, t.note])
    print_table("What the engine must reach", ("figure", "must", "aim", "measured", "verdict", "setting"), rows)
