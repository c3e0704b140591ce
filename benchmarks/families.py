"""Which families of causal models dbattn serves: every type that transformers has, as a tiny model of random weights.

Each one reads a batch of two prompts, one padded, and writes a few tokens: unwrapped; wrapped at a k that covers all
rows; and with retrieval running at a k that covers all rows of the padded prompt and all but one of the other. The
first two must agree, and the padded prompt's logits under retrieval must be those of the unwrapped model.

  python -m benchmarks.families                       all types: families.md and families.json in the results folder
  python -m benchmarks.families llama falcon_h1       these types, printed

JSON: results[] = {type, model, outcome, exact, retrieving, dense, layers, reason}; outcome is one of "retrieves",
"wraps, never retrieves", "refused", "not built" (no tiny model of it could be made and run here).
"""

import argparse
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dbattn import RetrievalConfig
from dbattn.hf import UnsupportedModelError, wrap
from dbattn.hf.fingerprint import difference, fingerprint

from . import readme
from ._common import RESULTS, console, write_json

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Tokens of the prompts, and how many of the first one's are padding; tokens written.
PROMPT, PADDING, WRITTEN = 60, 13, 4
WINDOW, SINKS = 8, 2
EVERYTHING = RetrievalConfig(index="flat", k=10**6, window=WINDOW, n_sink=SINKS, dense_below=0)
# At the first token written, the longer prompt has one row more than this between its sinks and its window.
ALL_BUT_ONE = RetrievalConfig(
    index="flat", k=PROMPT + 1 - WINDOW - SINKS - 1, window=WINDOW, n_sink=SINKS, dense_below=0, audit_rate=0.0
)
TOLERANCE = 1e-4

# The first pattern that a setting's whole name matches gives its value in a tiny model.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?", 128),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"(eos|sep)_token_id", 2),
    (r".*token_(id|index)", 126),
    (r"n_layers?|(num_)?(hidden_|decoder_|encoder_)?layers|num_hidden_layers", 6),
    (r"(linear_num_key|num_key_value|num_kv|.*_key_value|.*_kv)_heads?|num_key_value_heads|n_head_kv", 2),
    (r"(mamba_(n|num)|mamba_num|n_mamba)_heads", 8),
    (r"n_heads?|(.*_)?num_(attention_)?heads|(.*_)?attention_heads|.*num_value_heads|index_n_heads", 4),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r".*head_dim|mamba_d_head|d_kv|kv_channels|v_head_dim|attention_head_size", 16),
    (r"mamba_d_ssm|mamba_intermediate_size", 128),
    (r".*intermediate_size.*|(.*_)?ffn_(hidden_)?(dim|size)|d_ff|n_inner|dim_ff|.*mlp_hidden.*", 64),
    (r"(.*_)?hidden_size(_per_layer_input)?|d_model|n_embd|dim|embedding_size|d_embed|(.*_)?embed_dim", 64),
    (r"n_positions|max_position_embeddings|n_ctx|max_.*seq.*len.*|seq_length|original_max_position_embeddings", 512),
    (r"(.*_)?(num|n)_(local_|routed_|moe_|real_)?experts|moe_num_experts|num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|num_experts_per_token|num_selected_experts|moe_k", 2),
    (r"n_group|num_group|topk_group|n_shared_experts|num_shared_experts|zero_expert_num", 1),
    (r".*_rank", 16),
    (r"sliding_window|attention_chunk_size|.*local_attention.*|attention_window_size", 16),
    (r"(ssm_|mamba_)?state_size|mamba_d_state|ssm_state_size", 8),
    (r"(mamba_)?chunk_size", 16),
    (r"index_topk", 8),
)
# What sizes alone do not settle.
MIXED = ["linear_attention", "full_attention"] * 3
OPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 4]},
    "bailing_hybrid": {"num_key_value_heads": 4},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 16},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": MIXED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "longcat_flash": {"num_layers": 3, "head_dim": 8, "qk_head_dim": 24},
    "mistral": {"sliding_window": None},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32)},
}


@dataclass(frozen=True)
class Family:
    """What became of one type.

    Attributes:
        type, model: names of the type and of its class, as transformers has them.
        outcome: "retrieves", "wraps, never retrieves", "refused" or "not built".
        exact: whether both wrapped runs gave the unwrapped model's logits; None where none was made.
        retrieving, dense: cache layers that retrieved, and that transformers kept.
        layers: cache layers.
        reason: why it was refused, not built, or never retrieved; or what is wrong.
    """

    type: str
    model: str
    outcome: str
    exact: bool | None = None
    retrieving: int = 0
    dense: int = 0
    layers: int = 0
    reason: str = ""


def tiny_config(config_class: type[Any], *, fill: bool = False, **options: Any) -> Any:
    """A configuration of a few thousand weights, whatever the class: sizes by name, layers by its own rules.

    ``fill``: also give sizes that the class leaves open.
    """
    whole = config_class()
    given: dict[str, Any] = {}
    for name, value in whole.to_dict().items():
        if name in config_class.sub_configs and isinstance(value, dict):
            given[name] = tiny_config(type(getattr(whole, name)), fill=fill).to_dict()
        elif (isinstance(value, int) and not isinstance(value, bool)) or (fill and value is None):
            found = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if found is not None and not (name.endswith(("_id", "_index")) and (value is None or value < found)):
                given[name] = found
    if "qk_rope_head_dim" in given:
        # Multi-head latent attention: what positions rotate, and a key and a value for every head.
        given |= {name: size for name, size in (("head_dim", 8), ("num_key_value_heads", 4)) if name in given}
    given |= {"is_decoder": True} if hasattr(whole, "is_decoder") else {}
    given |= {"eos_token_id": 2} if isinstance(getattr(whole, "eos_token_id", None), list) else {}
    config = config_class(**{**given, **options})
    text = config.get_text_config(decoder=True)
    for name, value in list(vars(text).items()):
        if "layer" in name and isinstance(value, list) and len(value) > getattr(text, "num_hidden_layers", len(value)):
            setattr(text, name, value[: text.num_hidden_layers])
    return config


def tiny_model(name: str) -> Any:
    """A model of that type with random weights.

    Raises:
        Exception: whatever the type makes of sizes that do not suit it.
    """
    options = OPTIONS.get(name, {})
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    torch.manual_seed(0)
    try:
        return kind(tiny_config(transformers.CONFIG_MAPPING[name], **options)).eval()
    except Exception:  # some classes compute the sizes that are left open, others need them
        return kind(tiny_config(transformers.CONFIG_MAPPING[name], fill=True, **options)).eval()


def check(name: str) -> Family:
    """Build a type, wrap it, and compare."""
    model_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    torch.manual_seed(1)
    ids = torch.randint(3, 120, (2, PROMPT))
    mask = torch.ones_like(ids)
    ids[0, :PADDING], mask[0, :PADDING] = 0, 0
    try:
        model = tiny_model(name)
    except Exception as error:  # whatever a type asks for that no rule above gives
        return Family(name, model_name, "not built", reason=_line(error))
    try:
        expected = _logits(model, ids, mask)
    except Exception as error:
        expected, failure = None, error
    decoder = model.base_model
    try:
        before = fingerprint(decoder)
        with wrap(model, EVERYTHING) as handle:
            if expected is None:
                return Family(name, model_name, "not built", reason=f"does not generate unwrapped: {_line(failure)}")
            covered = _logits(model, ids, mask)
        with wrap(model, ALL_BUT_ONE) as handle:
            retrieved = _logits(model, ids, mask)
            report = handle.report()
    except UnsupportedModelError as error:
        return Family(name, model_name, "refused", reason=str(error).removeprefix(f"{model_name} cannot be wrapped: "))
    except NotImplementedError as error:
        return Family(name, model_name, "refused", reason=f"when called: {error}")
    except Exception as error:
        return Family(name, model_name, "wraps, never retrieves", exact=False, reason=_line(error))
    assert expected is not None
    exact = _error(covered, expected) < TOLERANCE and _error(retrieved[:, 0], expected[:, 0]) < TOLERANCE
    differs = difference(before, fingerprint(decoder))
    retrieving = sum(layer.retrieving > 0 for layer in report.layers)
    left = [layer for layer in report.layers if any("left to" in reason for reason in layer.dense)]
    reasons = Counter(
        reason for layer in report.layers if not layer.retrieving for reason in layer.dense or ["bypassed"]
    )
    reason = "" if exact else f"errors {_error(covered, expected):.1e}, {_error(retrieved[:, 0], expected[:, 0]):.1e}"
    if differs is not None:
        exact, reason = False, f"reading changes its fingerprint: {differs}"
    if not retrieving or len(left) + retrieving < len(report.layers):
        reason = "; ".join([*([reason] if reason else []), *(f"{n} layers: {why}" for why, n in reasons.items())])
    outcome = "retrieves" if retrieving else "wraps, never retrieves"
    return Family(name, model_name, outcome, exact, retrieving, len(left), len(report.layers), reason)


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits ``[WRITTEN, 2, V]`` of tokens fed one by one after the prompt: the same ones whatever the model says."""
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=WRITTEN, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True, logits_processor=[_Forced()], use_cache=True,
        )  # fmt: skip
    return torch.stack(out.logits)


class _Forced(transformers.LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, 3 + input_ids.shape[1] % 100] = 0.0
        return forced


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text[:160]}".rstrip(": ")


class _TooLong(BaseException):
    """Passes by what catches errors."""


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def table(families: Sequence[Family]) -> str:
    """Markdown: the counts, then a row for each type."""
    counts = Counter(family.outcome for family in families)
    inexact = [family.type for family in families if family.exact is False]
    lines = [
        f"{len(families)} causal-LM types of transformers {transformers.__version__}, tiny models of random weights: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        + f"; not exact: {', '.join(inexact) or 'none'} (`python -m benchmarks.families`).",
        "",
        "| type | outcome | exact | layers that retrieve | layers left to transformers | remark |",
        "|---|---|---|---|---|---|",
    ]
    for family in families:
        exact = {None: "", True: "yes", False: "**no**"}[family.exact]
        layers = f"{family.retrieving} of {family.layers} | {family.dense}" if family.layers else " | "
        reason = family.reason.replace("|", "/")
        lines.append(f"| {family.type} | {family.outcome} | {exact} | {layers} | {reason} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("types", nargs="*", metavar="TYPE", help="default: all of them")
    args = options.parse_args(argv)
    if unknown := sorted(set(args.types) - set(TYPES)):
        options.error(f"unknown types: {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    families = []
    for name in args.types or TYPES:
        try:
            with _limit(120):
                families.append(check(name))
        except _TooLong as error:
            families.append(Family(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], "not built", reason=str(error)))
        console.print(f"{name}: {families[-1].outcome} {families[-1].reason}", markup=False, highlight=False)
    text = table(families)
    if args.types:
        print(text)
        return
    (RESULTS / "families.md").write_text(text, encoding="utf-8")
    write_json(RESULTS / "families.json", "families", {}, [asdict(family) for family in families])
    readme.write()
    print(text.splitlines()[0])


if __name__ == "__main__":
    main()
