"""Budget: how the rows to be read are shared among ranks, by what they tell each other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# Of how much a shard's part of the budget is worth, the newest call tells this share.
NEWEST = 0.2
# No shard's part is below this share of an equal one: what nobody looks at is never found.
LEAST_PART = 0.2
# Where the shares of what is left unread move by more than this from call to call, past calls do not tell the next.
MOVES = 0.05
# Budgets are of so many sizes, so that plans are the same from call to call.
SIZES = 64


class Told(NamedTuple):
    """What ranks tell each other of an answer, beside its state, as numbers.

    Attributes:
        about: what was asked; see ``Shards.about``. rows: of the context.
        retrieves: 1 where the rank did not read all its rows.
        retrieved, read, bytes, seconds: rows and bytes as in ``Answer``; seconds only where the call is measured.
        expected_rows, expected_bytes, expected_seconds: what its plan had expected of them.
        more: rows that audits of its sampled queries ask for, over those of a budget by size.
    """

    about: float
    rows: float
    retrieves: float
    retrieved: float
    read: float
    bytes: float
    seconds: float
    expected_rows: float
    expected_bytes: float
    expected_seconds: float
    more: float


class Budget:
    """How the rows to be read are shared among ranks, by what each was found to leave unread.

    A shard that reads k rows leaves the weight c / k unread, about, so that errors are least in all where k grows with
    the root of c. It is the same on all ranks: a function of what all of them told. Forks share it.
    """

    def __init__(self, ranks: int) -> None:
        # Of each rank: c, None until it retrieved.
        self._unread: list[float | None] = [None] * ranks
        # How far a call's c are from these, as shares of their sum; and rows asked for over those of a budget by size.
        self.moves = 1.0
        self.more = 1.0

    def parts(self, total: int, indexed: Sequence[int], unread: Sequence[float] | None = None) -> list[int]:
        """Rows that each rank reads of ``total``, where so many are in its index; at least 1.

        ``unread``: what the ranks leave unread of this call, each with as many rows, where it is known.
        """
        known = [each for each in self._unread if each is not None]
        usual = sum(known) / len(known) if known else 1.0
        needs = unread or [usual if each is None else each for each in self._unread]
        roots = [need**0.5 * (rows > 0) for need, rows in zip(needs, indexed, strict=True)]
        mean = sum(roots) / max(1, sum(rows > 0 for rows in indexed)) or 1.0
        wanted = [max(root, LEAST_PART * mean) * (rows > 0) for root, rows in zip(roots, indexed, strict=True)]
        size = max(1, total // SIZES)
        return [max(1, round(total * each / (sum(wanted) or 1.0) / size) * size) for each in wanted]

    def note(self, parts: Sequence[int], unread: Sequence[float], told: Sequence[Told]) -> None:
        """Take in what shares of the whole weight the ranks left unread of their rows."""
        found = [max(share, 1e-9) * part for part, share in zip(parts, unread, strict=True)]
        before = [now if was is None else was for was, now in zip(self._unread, found, strict=True)]
        moved = max(abs(now / sum(found) - was / sum(before)) for was, now in zip(before, found, strict=True))
        self.moves += NEWEST * (moved - self.moves)
        for rank, (was, now, one) in enumerate(zip(before, found, told, strict=True)):
            if one.retrieves:
                self._unread[rank] = was ** (1 - NEWEST) * now**NEWEST
        asked = [one.more for one in told if one.retrieves]
        if asked:
            self.more = sum(asked) / len(asked)

    @property
    def is_told(self) -> bool:
        """Whether what ranks leave unread is about the same from call to call, so that past ones tell the next."""
        return self.moves < MOVES

    def __deepcopy__(self, memo: dict[int, Any]) -> "Budget":
        return self
