"""Drift: how far errors of answers are from what audits of sampled queries let expect."""

import math
from collections import deque
from typing import Any, Self

import torch
from torch import Tensor

# Answers to audit before the drift is known, and those remembered.
AUDITS_TO_LEARN, REMEMBERED = 8, 64
# What sampled queries said counts as so many audits.
PRIOR = 4
# Times are told in steps of so many an octave, so that plans can be kept.
STEPS = 4


class Drift:
    """What audits of one store's answers told about an expectation: some numbers, of which a change means a new one.

    Copies go on learning in the same place.
    """

    def __init__(self) -> None:
        self._about: tuple[float, ...] = ()
        self._ratios: deque[float] = deque(maxlen=REMEMBERED)
        self._times = 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def is_known(self, about: tuple[float, ...]) -> bool:
        """Whether enough answers were audited under this expectation."""
        return self._about == about and len(self._ratios) >= AUDITS_TO_LEARN

    def times(self, about: tuple[float, ...]) -> float:
        """Error audited over error expected, 1 where nothing is known."""
        return self._times if self._about == about else 1.0

    def learn(self, about: tuple[float, ...], ratio: float) -> None:
        """Take in an audit: its error over the error expected."""
        if self._about != about:
            self._about = about
            self._ratios.clear()
        if math.isfinite(ratio):
            self._ratios.append(ratio)
        self._times = self._mean()

    def _mean(self) -> float:
        mean = (PRIOR + sum(self._ratios)) / (PRIOR + len(self._ratios))
        return float(2.0 ** (round(STEPS * math.log2(mean)) / STEPS))

    def state(self) -> tuple[Tensor, Tensor]:
        """The numbers that it is about, and the ratios, float64; what a snapshot keeps."""
        return torch.tensor(self._about, dtype=torch.float64), torch.tensor(list(self._ratios), dtype=torch.float64)

    @classmethod
    def of_state(cls, about: Tensor, ratios: Tensor) -> "Drift":
        """What ``state`` was taken of.

        Raises:
            ValueError: ratios that no audits have, or too many.
        """
        drift = cls()
        if len(ratios) > REMEMBERED or not bool(((ratios >= 0) & (ratios < 1e6)).all()):
            raise ValueError(f"drift_ratios are {ratios[:3].tolist()} .., expected at most {REMEMBERED} from 0 to 1e6")
        drift._about = tuple(about.tolist())
        drift._ratios.extend(ratios.tolist())
        drift._times = drift._mean()
        return drift
