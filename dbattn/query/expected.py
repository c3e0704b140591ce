"""What error a store's answers are expected to have: told by its sampled queries, put right by audits of answers."""

from typing import NamedTuple, Self

from ..config import RetrievalConfig
from ..store import KVStore
from ..store.drift import Drift
from .call import RowIndex
from .usage import Needs


class Expected(NamedTuple):
    """The budget that audits of sampled queries found, and how far answers have been from it."""

    told: Needs
    drift: Drift

    @classmethod
    def of(cls, index: RowIndex, store: KVStore, config: RetrievalConfig) -> Self | None:
        """None where the config seeks no budget, or nothing was audited."""
        if not config.finds_budget or index.needs is None or store.sample is None:
            return None
        return cls(index.needs, store.sample.drift)

    @property
    def needs(self) -> Needs:
        """The budget that both say is needed."""
        return self.told.at(self.drift.times(self.told.about))

    @property
    def is_known(self) -> bool:
        """Whether enough answers were audited."""
        return self.drift.is_known(self.told.about)

    def learn(self, error: float) -> None:
        """Take in the audited error of an answer under ``needs``."""
        about = self.told.about
        self.drift.learn(about, error / self.needs.error * self.drift.times(about))
