"""What serves the questions: the wrapped model under any config, or any operator of the arena in all of its layers."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from dbattn import RetrievalConfig
from dbattn.config import INDEX_TRAITS
from dbattn.hf import Handle, wrap
from dbattn.hf.cache import DatabaseLayer

from ..arena import DEFAULT, OPERATORS, Entry, Operator

NAME = "dbattn-tasks"
DENSE = "dense"
# No question is longer; the answer's tokens come one by one.
QUESTION_TOKENS = 256
# How far rows may outgrow the setting that was found for a budget: questions and answers are short beside the context.
PATIENCE = 1.25


@dataclass
class Usage:
    """What the calls of one serving read, summed over layers and calls; a call is the question, or a token after it."""

    calls: int = 0
    dense: int = 0
    rows_read: float = 0.0
    rows_stored: float = 0.0


class Server(ABC):
    """Serves attention to whoever runs the model while ``serving`` is open."""

    name: str

    @abstractmethod
    def serving(self, model: Any, cache: DynamicCache, last: Tensor) -> AbstractContextManager[Callable[[], Usage]]:
        """A context manager: reads the context's ``last`` token ``[1, 1]`` densely, then serves all that comes after.

        Yields the function that tells what has been read so far, as ``Usage``. The cache may be cropped back to the
        context between questions; it is as before when the block ends.
        """


class Wrapped(Server):
    """The wrapped model, retrieving under a config; or, without one, every row read: the yardstick."""

    def __init__(self, name: str, config: RetrievalConfig | None) -> None:
        self.name, self._dense = name, config is None
        self._config = config or RetrievalConfig(index="flat")

    @contextmanager
    def serving(self, model: Any, cache: DynamicCache, last: Tensor) -> Iterator[Callable[[], Usage]]:
        """See Server."""
        rows = cache.get_seq_length()
        with wrap(model, self._config) as handle:
            with handle.dense():
                # With it the rows enter the stores and the indexes are built.
                model(last, past_key_values=cache, logits_to_keep=1)
            before = _usage(handle)
            with handle.dense() if self._dense else nullcontext():
                yield lambda: _difference(_usage(handle), before)
        cache.crop(rows - cache.get_seq_length())
        # An index may have moved rows; whoever serves next counts on the order of their positions.
        for layer in cache.layers:
            if isinstance(layer, DatabaseLayer) and layer.db is not None:
                layer.db.release()


def _usage(handle: Handle) -> Usage:
    usage = Usage()
    for layer in handle.report().layers:
        dense = sum(layer.dense.values())
        usage.calls += dense + layer.retrieving
        usage.dense += dense
        usage.rows_read += dense * layer.rows_stored + layer.retrieving * layer.rows_read
        usage.rows_stored += (dense + layer.retrieving) * layer.rows_stored
    return usage


def _difference(now: Usage, before: Usage) -> Usage:
    return Usage(
        now.calls - before.calls,
        now.dense - before.dense,
        now.rows_read - before.rows_read,
        now.rows_stored - before.rows_stored,
    )


class InModel(Server):
    """An operator of the arena as the attention of every layer, at a budget; on the CPU in float32, as all are.

    Each layer has one of its own. It is fitted on the rows of the context, gets the question's and the answer's rows
    one by one, and answers the query of each before it gets the next.
    """

    def __init__(self, entry: Entry, budget: float) -> None:
        self.name, self._entry, self._budget = entry.name, entry, budget

    @contextmanager
    def serving(self, model: Any, cache: DynamicCache, last: Tensor) -> Iterator[Callable[[], Usage]]:
        """See Server."""
        rows = cache.get_seq_length()
        model(last, past_key_values=cache, logits_to_keep=1)
        fitted = []
        for layer in cache.layers:
            operator = self._entry.make()
            operator.patience = max(operator.patience, PATIENCE)
            operator.fit(layer.keys.cpu().float(), layer.values.cpu().float())
            fitted.append(operator)
        live: dict[int, Operator] = {}
        usage = Usage()

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
        ) -> tuple[Tensor, None]:
            """The attention function that transformers calls: q ``[1, Hq, m, D]``, k and v ``[1, Hkv, T, D]``."""
            _refuse(module, query, options)
            number, first = int(module.layer_idx), key.shape[2] - query.shape[2]
            asked, key, value = (part.cpu().float() for part in (query, key[:, :, first:], value[:, :, first:]))
            queries = [asked[:, :, i : i + 1].contiguous() for i in range(asked.shape[2])]
            if number not in live:
                # Finds the setting for the budget, once for all questions.
                fitted[number].attend(queries[0], self._budget)
            if number not in live or len(live[number]) > first:
                live[number] = copy.deepcopy(fitted[number])
            operator, outs = live[number], []
            usage.calls += 1
            for at, each in enumerate(queries):
                operator.fit(key[:, :, at : at + 1], value[:, :, at : at + 1])
                answer = operator.attend(each, self._budget)
                outs.append(answer.out.to(query))
                usage.rows_read += answer.rows_read / len(queries)
                usage.rows_stored += len(operator) / len(queries)
            return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None

        before = model.config._attn_implementation
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        model.set_attn_implementation(NAME)
        try:
            yield lambda: copy.copy(usage)
        finally:
            model.set_attn_implementation(before)
            AttentionInterface._global_mapping.pop(NAME, None)
            AttentionMaskInterface._global_mapping.pop(NAME, None)
        cache.crop(rows - cache.get_seq_length())


def _refuse(module: Any, query: Tensor, options: dict[str, Any]) -> None:
    """Raise for what the arena's contract leaves out."""
    given = [name for name in ("softcap", "s_aux", "sliding_window") if options.get(name) is not None]
    scale = options.get("scaling")
    if scale is not None and abs(scale * query.shape[3] ** 0.5 - 1) > 1e-6:
        given.append(f"scaling={scale}")
    if query.shape[0] != 1:
        given.append(f"a batch of {query.shape[0]}")
    if given:
        raise NotImplementedError(f"{type(module).__name__} asks for {', '.join(given)}; arena operators serve none")


def server_names() -> list[str]:
    """Everything that can serve beside dense."""
    return [*_configs(), *(name for name, entry in OPERATORS.items() if entry.family not in ("exact", "dbattn"))]


def make_server(name: str, budget: float) -> Server:
    """The server of that name; ``budget`` is the share of dense's bytes that operators of the arena may read.

    Raises:
        ValueError: there is none.
    """
    if name == DENSE:
        return Wrapped(DENSE, None)
    if name in (configs := _configs()):
        return Wrapped(name, configs[name])
    if name in server_names():
        return InModel(OPERATORS[name], budget)
    raise ValueError(f"operator {name!r} cannot serve decoding, expected one of {', '.join(server_names())}")


def _configs() -> dict[str, RetrievalConfig]:
    """dbattn at its default budget, and with each other index and tail, under the arena's names."""
    # A wish to retrieve: at these sizes the planner would often choose the dense scan, which is no test.
    options: dict[str, Any] = {"dense_below": 0, "audit_rate": 0.0, "max_queries": QUESTION_TOKENS}
    configs = {DEFAULT: RetrievalConfig(**options)}
    for index in INDEX_TRAITS:
        for tail in INDEX_TRAITS[index].tails:
            config = RetrievalConfig(index=index, tail=tail, **options)
            if (config.index_name, config.tail_name) != (configs[DEFAULT].index_name, configs[DEFAULT].tail_name):
                configs[f"{DEFAULT} {index}, {tail}"] = config
    return configs
