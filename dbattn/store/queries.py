"""QuerySample: some of the queries that the rows of a store were asked, from which an index learns.

What a list must keep small is the scatter of its *logits*, q·(k - mean), not of its keys. With E, the second moment of
the queries of a KV head's group, keys are clustered as A(k - mean), A = (E + ridge)^(POWER / 2). E is taken of the
queries just before the rows that are clustered end: those of a text's beginning, which rotary embedding has turned less
far, mislead (measured: worse than none at all).
"""

import copy
from typing import Any

import torch
from torch import Tensor

from index_kernels import floats, pack_rows
from index_kernels.packed import SCALE_BYTES, rotated, scales

from .drift import Drift
from .pages import Shared, Spread
from .storage import check_range

# Every STRIDE-th query is kept; a metric is made of those of the WINDOW rows before it.
STRIDE, WINDOW = 32, 2048
# Where windows end, so that neighbouring segments share a metric; and how many of its queries one takes at least.
STEP, LEAST_KNOWN = 1024, 16
GIVEN = WINDOW // STRIDE
# Swept on rows of SmolLM2, Qwen2.5-Coder and Gemma 3: power 1 does as well on most layers and fails on some.
POWER, RIDGE = 0.75, 1e-3
# Room for more of them in shared pages; and how many new ones are copied at each fork.
FEW_PLACES = 128
# Metrics kept at hand.
METRICS = 8


class QuerySample:
    """Sampled queries of one store, as packed int8 rows; it grows with the store.

    What it tells is a function of rows and queries in their order, not of how they arrived. Queries given to
    ``analyze`` count for all rows that were there, whatever was sampled of them.
    """

    def __init__(self, batch: int, heads: int, dim: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.queries = torch.zeros(batch, heads, 0, dim + SCALE_BYTES, dtype=torch.int8, device=device)
            # Of the positions 0, STRIDE, 2 STRIDE, ...: those whose queries came.
            self.present = torch.zeros(0, dtype=torch.bool)
            self.given = self.queries
            self.given_known = torch.zeros(batch, 0, dtype=torch.bool)
        self.given_rows = 0
        self.drift = Drift()
        # Whether the rows that the metric is for are kept rotated; what is kept of the queries is not.
        self._rotated = False
        # What of ``queries`` is shared with forks; its places count as rows.
        self._shared: Shared | None = None
        self._metrics: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.queries.shape[1]

    def note(self, queries: Tensor, first: int) -> None:
        """Take in what belongs to the sample of the queries ``[B, Hq, n, D]`` of positions ``first ..``."""
        least = -first % STRIDE
        chosen = queries[:, :, least::STRIDE]
        if not chosen.shape[2]:
            return
        at = (first + least) // STRIDE
        count = at + chosen.shape[2]
        # Written in place again, by calls in inference mode or not.
        with torch.inference_mode(False), torch.no_grad():
            if count > len(self.present):
                room = max(count, 2 * len(self.present)) - len(self.present)
                self.queries = torch.nn.functional.pad(self.queries, (0, 0, 0, room))
                self.present = torch.nn.functional.pad(self.present, (0, room))
                self._shared = None
            if self._shared is not None:
                self._shared = self._shared.before(at)
            self.queries[:, :, at:count] = pack_rows(chosen)
            self.present[at:count] = True

    def give(self, queries: Tensor, start: Tensor, first: int) -> None:
        """Learn from the queries ``[B, Hq, m, D]`` of positions ``first ..`` for all rows up to the last of them."""
        m = queries.shape[2]
        with torch.inference_mode(False), torch.no_grad():
            at = torch.linspace(0, m - 1, min(m, GIVEN)).round().long()
            self.given = pack_rows(queries[:, :, at.to(queries.device)])
            self.given_known = first + at >= start.cpu()[:, None]
        self.given_rows = first + m
        self.drift = Drift()
        self._metrics = {}

    def for_rows(self, *, rotated: bool) -> None:
        """Make metrics for rows that are kept so; see ``KVStore.turn``."""
        self._rotated, self._metrics = rotated, {}

    def truncate(self, length: int) -> None:
        """Forget the queries of rows from ``length`` on; what was given stays."""
        self.present[-(-length // STRIDE) :] = False
        self._metrics = {}

    def select(self, batch: Tensor) -> None:
        """Keep those of the batch rows ``batch [B']``."""
        with torch.inference_mode(False), torch.no_grad():
            self.queries, self.given = self.queries[batch], self.given[batch]
            self.given_known = self.given_known[batch.cpu()]
        self._shared = None
        self._metrics = {}

    def latest(self, stop: int, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """At most ``count`` of the newest sampled queries of rows up to ``stop``, evenly spread over a window.

        Returns:
            ``[B, Hq, m, D]`` float32, and which of them are known, bool ``[B, m]``; on the CPU.
        """
        packed, known = self._window(stop, start.cpu())
        at = torch.linspace(0, packed.shape[2] - 1, min(count, packed.shape[2])).round().long()
        return floats(packed[:, :, at.to(packed.device)].cpu()), known[:, at]

    def metric(self, stop: int, start: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """What to cluster keys of rows up to ``stop`` by, and in which batch rows there is enough to tell.

        Returns:
            A, float32 ``[B, Hkv, D, D]``, symmetric, positive and on the scale of the identity; bool ``[B]``. On the
            CPU.
        """
        end = self._end_for(stop)
        if end not in self._metrics:
            if len(self._metrics) >= METRICS:
                self._metrics.pop(next(iter(self._metrics)))
            self._metrics[end] = self._made(end, start.cpu(), kv_heads)
        return self._metrics[end]

    def tells(self, stop: int, start: Tensor) -> Tensor:
        """In which batch rows there are enough queries of rows up to ``stop`` for a metric, bool ``[B]``."""
        end = self._end_for(stop)
        return self._enough(end, self._window(end, start.cpu())[1])

    def _end_for(self, stop: int) -> int:
        return self.given_rows if stop <= self.given_rows else max(stop - stop % STEP, min(stop, STEP))

    def _enough(self, end: int, known: Tensor) -> Tensor:
        return known.sum(dim=1) >= (1 if end == self.given_rows else LEAST_KNOWN)

    def _made(self, end: int, start: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        packed, known = self._window(end, start)
        enough = self._enough(end, known)
        packed = packed.cpu()
        # In units of all scales, so that squares fit float32, whose eigenvectors take less time than float64's.
        tiny, dim = torch.finfo(torch.float32).tiny, packed.shape[3] - SCALE_BYTES
        scale = scales(packed) * known[:, None]
        of_group = scale.view(len(packed), kv_heads, -1)
        of_group /= of_group.sum(dim=2, keepdim=True).clamp(min=tiny)
        queries = (packed[..., :-SCALE_BYTES] * scale[..., None]).view(len(packed), kv_heads, -1, dim)
        if self._rotated:
            queries = rotated(queries)
        moment = queries.mT @ queries
        # On the scale of a mean of 1 over the dimensions; the identity where all queries are 0.
        diagonal = moment.diagonal(dim1=2, dim2=3)
        diagonal += tiny
        moment *= (dim / diagonal.sum(dim=-1))[..., None, None]
        diagonal += RIDGE
        size, direction = torch.linalg.eigh(moment)
        power = size.clamp(min=RIDGE).pow(POWER / 2)
        return (direction * power[..., None, :]) @ direction.mT, enough

    def _window(self, end: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """Packed queries ``[B, Hq, m, D + 4]`` that tell of rows up to ``end``; which are known, bool ``[B, m]``."""
        if end <= self.given_rows:
            return self.given, self.given_known
        first, last = -(-max(0, end - WINDOW) // STRIDE), -(-end // STRIDE)
        packed = self.queries[:, :, first:last]
        at = torch.arange(first, first + packed.shape[2])
        return packed, self.present[first:last] & (STRIDE * at >= start[:, None])

    @property
    def _used(self) -> int:
        """Places up to the last one whose query came."""
        return int(self.present.nonzero().max()) + 1 if bool(self.present.any()) else 0

    def state(self) -> dict[str, Tensor]:
        """What a snapshot keeps of it."""
        used = self._used
        about, ratios = self.drift.state()
        return {
            "drift_about": about,
            "drift_ratios": ratios,
            "queries": self.queries[:, :, :used],
            "present": self.present[:used].to(torch.uint8),
            "given": self.given,
            "given_known": self.given_known.to(torch.uint8),
            "given_rows": torch.tensor([self.given_rows]),
        }

    @classmethod
    def of_state(
        cls, state: dict[str, Tensor], rows: int, batch: int, kv_heads: int, dim: int, device: torch.device
    ) -> "QuerySample":
        """The sample of a store of ``rows`` rows that ``state`` was taken of; it may come from anyone.

        Raises:
            ValueError: tensors that are no such sample; names the first.
        """

        def take(name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
            part = state.get(name)
            if part is None:
                raise ValueError(f"{name} is missing")
            fits = part.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, part.shape, strict=True))
            if part.dtype != dtype or not fits:
                raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, expected {dtype} {list(shape)}")
            return part

        queries = take("queries", torch.int8, batch, None, None, dim + SCALE_BYTES)
        heads, count = queries.shape[1:3]
        if not heads or heads % kv_heads or STRIDE * (count - 1) >= rows:
            raise ValueError(f"queries are {list(queries.shape)}, not of heads over {kv_heads} KV heads or of rows")
        given = take("given", torch.int8, batch, heads, None, dim + SCALE_BYTES)
        present = take("present", torch.uint8, count)
        known = take("given_known", torch.uint8, batch, given.shape[2])
        stop = take("given_rows", torch.int64, 1)
        # Snapshots of older versions have none.
        drift = Drift()
        if {"drift_about", "drift_ratios"} & state.keys():
            drift = Drift.of_state(*(take(name, torch.float64, None) for name in ("drift_about", "drift_ratios")))
        names = {"queries", "present", "given", "given_known", "given_rows", "drift_about", "drift_ratios"}
        if unknown := sorted(state.keys() - names):
            raise ValueError(f"{unknown[0]} is not part of it")
        if given.shape[2] > GIVEN or not 0 <= int(stop) < 1 << 48 or (int(stop) > 0) != (given.shape[2] > 0):
            raise ValueError(
                f"given is {list(given.shape)} with given_rows {int(stop)}, expected at most {GIVEN} positions"
            )
        for name, part in (("present", present), ("given_known", known)):
            if bool((part > 1).any()):
                raise ValueError(f"{name} holds {int(part.max())}, expected 0 and 1")
        for name, part in (("queries", queries), ("given", given)):
            check_range(name, part)
        sample = cls(batch, heads, dim, device)
        sample.drift = drift
        with torch.inference_mode(False):
            sample.queries, sample.present = queries.clone().to(device), present.bool()
            sample.given, sample.given_known, sample.given_rows = given.clone().to(device), known.bool(), int(stop)
        return sample

    def fork(self) -> "QuerySample":
        """A sample of the same queries; what it takes in later is its own. See ``KVStore.fork``."""
        used, shared = self._used, self._shared
        if shared is None or used - shared.rows > FEW_PLACES:
            room = max(len(self.present), used + max(used // 8, FEW_PLACES))
            shared = Shared.of([Spread([self.queries[:, :, :used]], room)], used)
            if shared is None:
                return copy.deepcopy(self)
            with torch.inference_mode(False):
                self.present = torch.nn.functional.pad(self.present, (0, room - len(self.present)))
            (self.queries,) = shared.pages.view()
            self._shared = shared
        (queries,) = shared.view([self.queries], used)
        return self._with(queries, shared)

    def _with(self, queries: Tensor, shared: Shared | None) -> "QuerySample":
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        # Written in place by ``note``; everything else is replaced whole.
        with torch.inference_mode(False):
            made.queries, made._shared = queries, shared
            made.present, made._metrics = self.present.clone(), dict(self._metrics)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuerySample":
        with torch.inference_mode(False):
            memo[id(self)] = made = self._with(self.queries.clone(), None)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.queries.nbytes + self.given.nbytes + self.present.nbytes
