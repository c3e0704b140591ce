"""Exact answers at retrieval's speed: retrieval drafts tokens, one dense pass checks several of them.

Speculative decoding (Leviathan et al. 2023) in which model and draft share weights and cache: a draft differs from the
model in what its attention reads. transformers' assisted decoding accepts and rejects; here is what it asks for drafts.
"""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerationMode
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .cache import DatabaseLayer
from .pace import Chance, Drafts, Pace
from .session import Session


class RetrievedDrafts(CandidateGenerator):  # type: ignore[misc]  # transformers is untyped here
    """Drafts of a wrapped model: the same cache, which gets its rows back after each, with retrieval on.

    Indexes are not brought up to drafted rows, only to those that a dense pass has accepted.
    """

    requires_model_outputs = False

    def __init__(
        self,
        model: Any,
        session: Session,
        drafts: Drafts,
        pace: Pace,
        cache: DynamicCache,
        processor: Any,
        generation: Any,
    ) -> None:
        self._model, self._session, self._drafts, self._cache = model, session, drafts, cache
        self._processor, self._samples, self._longest = processor, generation.do_sample, generation.max_length
        ends = getattr(generation, "_eos_token_tensor", None)
        self._ends = set() if ends is None else set(ends.flatten().tolist())
        self._pace = pace
        self._drafted: int | None = None
        self._began = 0.0
        # Of the latest pass: how many were drafted and accepted.
        self._passed: tuple[int, int] | None = None

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """The tokens ``[1, n]`` so far and d drafted ones, and the logits ``[1, d, V]`` they were sampled from."""
        self.note_pass()
        rows, n = self._cache.get_seq_length(), input_ids.shape[1]
        # Before the prompt was read there is nothing to go on from.
        self._drafted = None if rows != n - 1 else min(self._pace.choose(), self._longest - n - 1)
        drafted, logits = input_ids, []
        if self._drafted:
            with self._session.switched(retrieve=True, drafting=True):
                for _step in range(self._drafted):
                    began, before = time.perf_counter(), self._retrieved()
                    scores = self._model(drafted[:, -1:], past_key_values=self._cache, use_cache=True).logits[:, -1]
                    scores = self._processor(drafted, scores.float())
                    token = self._choice(scores)
                    self._pace.note_draft(time.perf_counter() - began)
                    drafted = torch.cat([drafted, token], dim=1)
                    logits.append(scores)
                    # Nothing retrieved: this was a dense step, of which more would gain nothing.
                    if int(token) in self._ends or self._retrieved() == before:
                        break
            self._drafted = len(logits)
        self._began = time.perf_counter()
        if logits:
            self._cache.crop(-len(logits))
        return drafted, torch.stack(logits, dim=1) if logits and self._samples else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Note what the pass over the draft took and accepted, and bring the indexes up to its rows."""
        for layer in self._cache.layers:
            if isinstance(layer, DatabaseLayer) and layer.db is not None:
                layer.db.sync()
        if self._drafted is None:
            return
        accepted, drafts = int(num_matches), self._drafts
        self._passed = self._drafted, accepted
        drafts.tokens, drafts.passes = drafts.tokens + accepted + 1, drafts.passes + 1
        drafts.drafted, drafts.accepted = drafts.drafted + self._drafted, drafts.accepted + accepted
        drafts.why_none = self._pace.why_none

    def note_pass(self) -> None:
        """Note what the latest pass took with all that was done around it, up to the next draft or the last token."""
        if self._passed is not None:
            self._pace.note_pass(*self._passed, time.perf_counter() - self._began)
        self._passed = None

    def _choice(self, scores: Tensor) -> Tensor:
        if self._samples:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        return scores.argmax(dim=-1, keepdim=True)

    def _retrieved(self) -> int:
        return sum(stats.retrieving for stats in self._session.stats)


class _Assisted:
    """A model to ``_assisted_decoding``, with our drafts in place of another model's; nothing of it is changed."""

    def __init__(self, model: Any, drafts: RetrievedDrafts) -> None:
        self._model, self._drafts = model, drafts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """As the model's own; of a prompt that is partly in the cache, what is not."""
        if next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - past_key_values.get_seq_length()
        return self._model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )

    def _get_candidate_generator(self, **_: Any) -> RetrievedDrafts:
        return self._drafts


class ExactGenerate:
    """A model's ``generate`` with drafts where these serve; where not, its own, densely, and the report says why."""

    def __init__(self, model: Any, session: Session, drafts: Drafts) -> None:
        # An object, not a closure: a deep copy of the model then has one of its own, which refuses to run as the copy.
        self._model, self._session, self._drafts, self._chance = model, session, drafts, Chance()
        # By the octave of the rows at first: what times a call found hold for the next over about as many.
        self._paces: dict[int, Pace] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        for name in ("custom_generate", "assistant_model", "stop_strings"):
            if kwargs.get(name) is not None:
                self._drafts.why_none = f"no drafts: {name} is given"
                return type(self._model).generate(self._model, *args, **kwargs)
        # A decoding method of the caller's is not told of a streamer.
        decode = partial(self._decode, streamed_to=kwargs.get("streamer"))
        return type(self._model).generate(self._model, *args, custom_generate=decode, **kwargs)

    def _decode(self, model: Any, input_ids: Tensor, *, generation_config: Any, streamed_to: Any, **kwargs: Any) -> Any:
        mode, cache = generation_config.get_generation_mode(), kwargs.get("past_key_values")
        given = kwargs | {"generation_config": generation_config}
        given |= {} if streamed_to is None else {"streamer": streamed_to}
        mask, why = kwargs.get("attention_mask"), ""
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            why = f"generate in the mode {mode.value}"
        elif len(input_ids) > 1:
            why = f"a batch of {len(input_ids)}"
        elif not isinstance(cache, DynamicCache):
            why = f"a cache of the type {type(cache).__name__}"
        elif mask is not None and not bool((mask == 1).all()):
            why = "a prompt with padding"
        elif not self._session.switches.drafts:
            why = "dense answers were asked for"
        elif getattr(generation_config, "_mask_length", input_ids.shape[1]) != input_ids.shape[1]:
            why = "of what the cache holds, the tokens were not given"
        if why:
            self._drafts.why_none = f"no drafts: {why}"
            return getattr(type(model), GENERATION_MODES_MAPPING[mode])(model, input_ids, **given)
        assert isinstance(cache, DynamicCache)
        pace = self._paces.setdefault(input_ids.shape[1].bit_length(), Pace(self._chance))
        drafts = RetrievedDrafts(
            model, self._session, self._drafts, pace, cache, kwargs["logits_processor"], generation_config
        )
        try:
            with self._session.switched(sync=False):
                return type(model)._assisted_decoding(_Assisted(model, drafts), input_ids, **given)
        finally:
            drafts.note_pass()
            for layer in cache.layers:
                if getattr(layer, "record_past", False):
                    layer.record_past = False
