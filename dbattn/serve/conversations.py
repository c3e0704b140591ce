"""Conversations: the rows of what was said, kept for the next turn."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from .contexts import Served


@dataclass(frozen=True, eq=False)
class _Kept:
    """A cache with the rows of a context and of the tokens ``said`` after it, and the bytes that are its own.

    ``asked``: how many of these came before the latest answer.
    """

    owner: str
    served: Served
    said: list[int]
    asked: int
    cache: Any
    nbytes: int


class Conversations:
    """The latest conversations, up to ``memory`` bytes of rows beside those of the contexts that all share.

    Rows are given to a request only where model, context and owner are the same and the tokens are equal, one by one,
    from the first on; what follows the first difference is dropped. So nobody's answer depends on what another owner
    said, nor does the time until it comes tell whether somebody said it. A cache is lent to one request at a time:
    another one with the same beginning reads it anew. So does one that would drop more than half of what was kept, and
    not the latest answer alone: two conversations that begin alike do not take each other's rows away. Over a context
    that was read by windows, each question chooses its own, and what was said before is read anew with these.

    Not safe for threads: the engine alone uses it.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.nbytes = 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # the least recently used first
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, owner: str, served: Served, ids: list[int]) -> Any:
        """A cache with the rows of the first of ``ids``, which begin with the context's; it lacks one of them or more.

        It holds the context's rows, and as much of the conversation as was kept.
        """
        said = ids[len(served.ids) :]
        best, most = None, 0
        for number, kept in self._kept.items():
            if kept.owner == owner and kept.served is served and (same := _common(kept.said, said)) > most:
                best, most = number, same
        if best is not None and most >= min(self._kept[best].asked, len(self._kept[best].said) / 2):
            kept = self._drop(best)
            surplus = len(kept.said) - min(most, len(said) - 1)
            try:
                if surplus:
                    kept.cache.crop(-surplus)
                return kept.cache
            except (ValueError, RuntimeError, NotImplementedError):
                pass  # states that cannot go back, as those of linear attention: all is read anew
        return served.handle.new_cache()

    def keep(self, owner: str, served: Served, ids: list[int], asked: int, cache: Any) -> None:
        """Keep a cache with the rows of ``ids``, the latest answer from ``asked`` on; the least recently used go."""
        if served.handle.windows is not None:
            return  # the next question chooses other windows, which what was said has not seen
        said = ids[len(served.ids) :]
        nbytes = sum(_own_nbytes(layer) for layer in cache.layers)
        if not said or nbytes > self.memory:
            return
        self._kept[next(self._numbers)] = _Kept(owner, served, said, asked - len(served.ids), cache, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.memory:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Let all go."""
        self._kept.clear()
        self.nbytes = 0

    def _drop(self, number: int) -> _Kept:
        kept = self._kept.pop(number)
        self.nbytes -= kept.nbytes
        return kept


def _common(one: list[int], other: list[int]) -> int:
    """How many leading tokens are equal."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _own_nbytes(layer: Any) -> int:
    """Bytes of a cache's layer that no other cache shares."""
    held = [value for each in vars(layer).values() for value in (each.values() if isinstance(each, dict) else (each,))]
    beside = sum(value.nbytes for value in held if isinstance(value, Tensor))
    db = getattr(layer, "db", None)
    return beside + (0 if db is None else db.own_nbytes)
