"""Shards: the ranks of a process group, and which of a context's rows each of them holds.

Positions are dealt in blocks of ``BLOCK``: block b belongs to rank ``b % ranks``. So where a row is follows from its
position alone, a rank's rows stay in the order of their positions, and all ranks hold about as many. What ranks tell
each other goes through torch.distributed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")
# Positions dealt to a rank at a time: a prompt's chunk, and about what a GPU's rank reads at once.
BLOCK = 512


class ShardError(RuntimeError):
    """The ranks of a group cannot go on together: one has ended, or they were not asked the same."""


class Shards:
    """One rank's view of a process group over which rows are dealt; every rank makes the same calls in the same order.

    Args:
        group: of ``torch.distributed``: gloo for rows on CPUs, NCCL for rows on GPUs.

    Raises:
        ValueError: there is no such group, or this process is not in it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group needs torch.distributed: call torch.distributed.init_process_group first")
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"group is {group!r}, expected a process group this process is in (dist.group.WORLD)")
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        # What a call is about, beside its rows, in a number: ranks that differ in it are not asked the same.
        self.about = 0

    @classmethod
    def of(cls, group: "dist.ProcessGroup | Shards") -> "Shards":
        """The view of a group, or the one given."""
        return group if isinstance(group, Shards) else cls(group)

    def before(self, position: int) -> int:
        """How many rows before ``position`` are ours."""
        rounds, rest = divmod(position, BLOCK * self.ranks)
        return rounds * BLOCK + min(max(rest - BLOCK * self.rank, 0), BLOCK)

    def before_each(self, positions: Tensor) -> Tensor:
        """The same for each of ``positions``, int64."""
        rest = positions % (BLOCK * self.ranks) - BLOCK * self.rank
        return positions // (BLOCK * self.ranks) * BLOCK + rest.clamp(0, BLOCK)

    def position_of(self, rows: Tensor) -> Tensor:
        """The positions of our rows, int64; of -1 it is -1."""
        positions = (rows // BLOCK * self.ranks + self.rank) * BLOCK + rows % BLOCK
        return torch.where(rows < 0, -1, positions)

    def held_by_each(self, rows: int) -> list[int]:
        """How many of the first ``rows`` rows each rank holds."""
        rounds, rest = divmod(rows, BLOCK * self.ranks)
        return [rounds * BLOCK + min(max(rest - BLOCK * rank, 0), BLOCK) for rank in range(self.ranks)]

    def ours(self, rows: Tensor, first: int, dim: int = 2) -> Tensor:
        """Those of ``rows``, which stand at positions ``first ..`` along ``dim``, that are ours."""
        stop, parts, at = first + rows.shape[dim], [], first
        while at < stop:
            end = min(stop, at - at % BLOCK + BLOCK)
            if at // BLOCK % self.ranks == self.rank:
                parts.append(rows.narrow(dim, at - first, end - at))
            at = end
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=dim) if parts else rows.narrow(dim, 0, 0)

    def gather(self, numbers: Tensor) -> Tensor:
        """Each rank's ``numbers [n]``, as ``[ranks, n]``.

        Raises:
            ShardError: another rank does not answer.
        """
        sent = numbers.cpu() if self._on_host else numbers
        found = sent.new_empty(self.ranks, len(sent))
        with self._answered():
            dist.all_gather(list(found.unbind()), sent, group=self.group)
        return found.to(numbers.device)

    def gather_objects(self, thing: Any) -> list[Any]:
        """What each rank gives: plain data, seldom.

        Raises:
            ShardError: another rank does not answer.
        """
        found: list[Any] = [None] * self.ranks
        with self._answered():
            dist.all_gather_object(found, thing, group=self.group)
        return found

    def agreed(self, work: Callable[[], Made]) -> list[Made]:
        """What ``work`` gives on each rank; where it raises ValueError or OSError on one, all ranks raise.

        Raises:
            ShardError: another rank does not answer.
        """
        error: ValueError | OSError | None = None
        made: Any = None
        try:
            made = work()
        except (ValueError, OSError) as raised:
            error = raised
        found = self.gather_objects((made, None if error is None else (type(error), str(error))))
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                kind, text = failed
                raise (ValueError if issubclass(kind, UnicodeError) else kind)(f"rank {rank}: {text}")
        return [each for each, _ in found]

    def together(self, ours: Tensor) -> Tensor:
        """All rows ``[B, n]`` on the CPU, of which each rank has ``ours``; the way back from ``ours``.

        Raises:
            ShardError: another rank does not answer.
        """
        parts = self.gather_objects(ours.cpu())
        whole: Tensor = parts[0].new_empty(len(parts[0]), sum(part.shape[1] for part in parts))
        for rank, part in enumerate(parts):
            rows = torch.arange(part.shape[1])
            whole[:, (rows // BLOCK * self.ranks + rank) * BLOCK + rows % BLOCK] = part
        return whole

    def share_random_state(self) -> None:
        """Let all ranks draw the numbers that rank 0 will draw.

        Raises:
            ShardError: another rank does not answer.
        """
        states = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        host, device = self.gather_objects(states if self.rank == 0 else None)[0]
        torch.set_rng_state(host)
        if device is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(device)

    @property
    def _on_host(self) -> bool:
        return dist.get_backend(self.group) == "gloo"

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ShardError(
                f"rank {self.rank} of {self.ranks} got no answer from another rank, which has ended or stopped "
                f"({told}). What was saved is whole: start all ranks anew to go on from there"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


@contextmanager
def launched() -> Iterator["Shards | None"]:
    """The shards of the processes that ``torchrun`` started, None where it started none, or one alone.

    Rows are on the CPU: the group is of gloo. What all processes print is printed by rank 0.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    dist.init_process_group("gloo")
    try:
        assert dist.group.WORLD is not None
        yield Shards(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
