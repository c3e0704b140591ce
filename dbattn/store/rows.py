"""KVStore: the rows of one layer, kept once, in buffers that grow by an eighth."""

import copy
from typing import Any, Self

import torch
from torch import Tensor

from index_kernels import floats, rotate
from index_kernels.integer import is_integer
from index_kernels.ops import FLOATS
from index_kernels.reference import softcapped

from .host import check_host_rows
from .mapped import MappedRows, Part, new_buffer, with_spare
from .pages import Shared, Spread
from .queries import STRIDE, QuerySample
from .storage import LOOKED_AT, check_queries, check_range, on_device, stored

# Room for more rows in shared pages, an eighth of them but no less: it takes no memory before it is used.
SPARE_ROWS = 4096
# Rows added to a store, or moved in it, since its pages were made: so many, or a 32nd, are copied at each fork.
FEW_ROWS = 256


class KVStore:
    """Keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]``, appended in place.

    ``start [B]`` is the first valid row of each batch row (left padding); rows before it are never read. ``storage``:
    what rows are kept as, ``host``: whether in memory of the host, for a GPU; see RetrievalConfig.
    """

    start: Tensor
    has_padding: bool
    # What is known to fit ``start``.
    _fitting: Tensor
    # The same on the host, so that no call waits for it.
    starts: tuple[int, ...]
    # Whether rows came out of a graph; they are stored detached, so that no gradient goes back into it.
    requires_grad: bool
    # Some of the queries that rows were asked, as they came; None where none came.
    sample: QuerySample | None
    # The place of the next row on the device, int64 [1], where a CUDA graph is to write it; None: where the host knows.
    newest: Tensor | None = None
    # Whether the numbers of rows are kept rotated; those of packed rows are, but in snapshots of before that was done.
    rotated: bool

    def __init__(
        self, num_kv_heads: int, head_dim: int, value_dim: int, storage: str | None = None, *, host: bool = False
    ) -> None:
        if host:
            check_host_rows()
        for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            if not is_integer(value, 1):
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        self.num_kv_heads, self.head_dim, self.value_dim = num_kv_heads, head_dim, value_dim
        self.storage, self.host = storage, host
        self._clear()

    def _clear(self) -> None:
        self._length = self._settled = self._wanted = 0
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._mapped: MappedRows | None = None
        self._saved: tuple[str, int] = "", 0
        self._shared: Shared | None = None
        self._row_bytes = 0
        self._looked_at = 0
        self.requires_grad = False
        self.sample = None
        self.rotated = self.storage == "int8"
        self._set_start(torch.zeros(0, dtype=torch.int64))

    def check_queries(self, queries: Tensor, batch: int, rows: int, device: torch.device) -> None:
        """Raise ValueError unless queries are ``[B, Hq, n, D]`` of so many rows, with heads as those sampled before."""
        heads = "Hq" if self.sample is None else self.sample.heads
        expected = f"[{batch}, {heads}, {rows}, {self.head_dim}]"
        shape = tuple(queries.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (batch, rows, self.head_dim) or heads not in ("Hq", shape[1]):
            raise ValueError(f"queries have shape {list(shape)}, expected {expected}")
        check_queries("queries are", queries, self.num_kv_heads, device)

    def note_queries(self, queries: Tensor, first: int) -> None:
        """Sample queries ``[B, Hq, n, D]`` of the rows from ``first`` on; most calls of one row bring none."""
        if queries.shape[2] > -first % STRIDE:
            self._sample_for(queries).note(queries, first)

    def learn(self, queries: Tensor, first: int) -> None:
        """Learn from queries ``[B, Hq, m, D]`` of the rows from ``first`` on, for all rows; see QuerySample."""
        self._sample_for(queries).give(queries, self.start, first)

    def _sample_for(self, queries: Tensor) -> QuerySample:
        if self.sample is None:
            batch, heads, _, dim = queries.shape
            self.take_sample(QuerySample(batch, heads, dim, queries.device))
        assert self.sample is not None
        return self.sample

    def take_sample(self, sample: QuerySample | None) -> None:
        """Hold a sample of queries in place of what is held; its metric will be of the rows as they are kept."""
        self.sample = sample
        if sample is not None:
            sample.for_rows(rotated=self.rotated)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows after the newest; nothing is written when anything about them is wrong.

        Raises:
            ValueError: shapes, dtype or device that do not fit, or an element that is NaN, infinite (or becomes so) or
                larger than ``storage.LARGEST`` in size.
        """
        self._check(keys, values)
        self.requires_grad |= torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        keys, values = (
            stored(name, rows, self.storage, rotated=self.rotated)
            for name, rows in (("keys", keys), ("values", values))
        )
        self._write(keys.detach(), values.detach())
        if keys.shape[2] > 1 or not on_device(keys):
            self._looked_at = self._length

    def reserve(self, rows: int) -> None:
        """Say that so many rows are to be held: room is made for them at once, and none is copied as they come.

        Raises:
            ValueError: not a number of rows.
        """
        if not is_integer(rows, 0):
            raise ValueError(f"rows is {rows!r}, expected an integer of at least 0")
        self._wanted = rows

    def append_kept(self, keys: Tensor, values: Tensor) -> None:
        """Add rows as a store of the same kind keeps them, from ``rows`` or ``between``, after the newest."""
        self._write(keys, values)
        self._looked_at = self._settled = self._length

    def _write(self, keys: Tensor, values: Tensor) -> None:
        added = keys.shape[2]
        if self._mapped is not None:
            # Until somebody wants them together, rows that are mapped stay so.
            self._mapped = self._mapped.first(self._length).and_more(keys, values, host=self.host)
        else:
            self._reserve(keys, values, self._length + added)
            for buffer, rows in zip(self.buffers, (keys, values), strict=True):
                if self.newest is not None and added == 1:
                    buffer.index_copy_(2, self.newest, rows)
                else:
                    buffer.narrow(2, self._length, added).copy_(rows)
        self._length += added

    def note_written(self) -> None:
        """Count a row that a CUDA graph has written after the newest."""
        self._length += 1

    def widen(self, dtype: torch.dtype) -> torch.dtype:
        """Keep rows in a float type that holds those of ``dtype`` too, and return it: the wider one of both.

        Nothing that is stored changes its value. A store with ``storage`` keeps its type and takes any.
        """
        if self.storage is not None or not self._has_buffers:
            return dtype
        keys, values = self.buffers
        wider = dtype if dtype == keys.dtype else torch.promote_types(keys.dtype, dtype)
        if wider != keys.dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._buffers = self._as_kept(keys.to(wider)), self._as_kept(values.to(wider))
            self.touch(0)
        return wider

    def turn(self, rows: Tensor) -> Tensor:
        """Keys, values or queries ``[..., D]`` into the basis that rows are kept in; answers and stored rows out of it.

        Where rows are rotated, by Hadamard's matrix, which is its own inverse, as float32; else they are as they were.
        Whoever brings a query to ``rows`` turns it, and turns the answer: products and distances stay what they are.
        """
        return rotate(rows) if self.rotated else rows

    def restore(self, rows: "MappedRows", start: Tensor, settled: int, *, rotated: bool) -> None:
        """Hold saved rows in place of what is held; they are copied together when they are first asked for.

        ``rows`` fit the store and are finite: who reads them from disk has checked it. More rows will be kept as they
        are, rotated or not.
        """
        if self.host:
            check_host_rows(rows.device)
        self._clear()
        self._mapped, self._length, self._settled, self.rotated = rows, len(rows), settled, rotated
        self._looked_at = len(rows)
        self._set_start(start.to(rows.device))

    def check_mapped(self) -> None:
        """Look at all rows that are still in files.

        Raises:
            SnapshotError (a ValueError): a file that is damaged, or holds numbers out of range.
        """
        if self._mapped is not None:
            self._mapped.checked()

    def can_start_at(self, start: Tensor) -> bool:
        """Whether ``set_start`` would accept ``start [B]``."""
        if start is self.start or start is self._fitting or torch.equal(start, self.start):
            return True
        unsettled = (self.start >= self._settled) & (start >= self._settled)
        return bool(((start == self.start) | unsettled).all())

    def set_start(self, start: Tensor) -> None:
        """Declare left padding: batch row b has no rows before ``start[b]``.

        It settles the rows stored so far; only a batch row that has been nothing but padding can move its start later.

        Raises:
            ValueError: a wrong shape, a negative start, or a batch row that already has valid rows.
        """
        if start is self.start or start is self._fitting:  # it fitted before
            self._settled = self._length
            return
        if start.shape != self.start.shape or start.dtype != torch.int64 or start.device != self.start.device:
            raise ValueError(
                f"start is {start.dtype} {list(start.shape)} on {start.device}, "
                f"expected torch.int64 {list(self.start.shape)} on {self.start.device}"
            )
        if bool((start < 0).any()):
            raise ValueError(f"start is {start.tolist()}, expected no negative row")
        if not self.can_start_at(start):
            raise ValueError(f"start {start.tolist()} differs from {self.start.tolist()} for rows that are stored")
        self._settled = self._length
        self._set_start(start.clone())
        if on_device(start):
            self._fitting = start  # the layers of a model are given the same one, and need not wait to compare it

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows.

        Raises:
            ValueError: a length below 0 or above the number of rows.
        """
        if not is_integer(length, 0, self._length):
            raise ValueError(f"length is {length!r}, expected an integer from 0 to {self._length}")
        self._length = length
        self._settled, self._looked_at = min(self._settled, length), min(self._looked_at, length)
        self.touch(length)
        if self.sample is not None:
            self.sample.truncate(length)
        if not length:
            # As if no row had ever come: the next ones may have another batch size, dtype or padding.
            self._clear()

    def at_length(self, length: int) -> "KVStore":
        """The first ``length`` rows as a store of their own, to be read only: it shares the buffers."""
        if length == self._length:
            return self
        view = copy.copy(self)
        view._length, view._settled = length, min(self._settled, length)
        return view

    def select(self, batch: Tensor) -> None:
        """Keep the batch rows ``batch [B']`` (an index may repeat): beam search and batch edits."""
        if not self._has_buffers:
            return
        batch = batch.to(self.device)
        if self._mapped is not None:
            self._mapped = self._mapped.select(batch)
        else:
            keys, values = self.buffers
            with torch.inference_mode(False), torch.no_grad():
                keys, values = (self._as_kept(rows.index_select(0, batch)) for rows in (keys, values))
                self._buffers = keys, values
        self._set_start(self.start[batch])
        if self.sample is not None:
            self.sample.select(batch)
        self.touch(0)

    def touch(self, first: int) -> None:
        """Say that rows from ``first`` on were moved or replaced: snapshots and shared pages no longer hold them."""
        self._saved = self._saved[0], min(self._saved[1], first)
        if self._shared is not None:
            self._shared = self._shared.before(first)

    def fork(self) -> "KVStore":
        """A store with the same rows; neither sees what is done to the other.

        The first one moves the rows into pages that all share until they write (see pages.py); the next ones copy what
        was added or moved since, until that is a larger part. On a device, and where a system has no such pages, each
        has a copy.
        """
        twin = copy.copy(self)
        if self._has_buffers:
            twin._buffers, twin._shared = self._forked()
            twin._mapped = None
        twin.sample = None if self.sample is None else self.sample.fork()
        return twin

    def rows_shared(self, other: "KVStore") -> int:
        """How many leading rows, as they stand, are in the same pages as those of another store."""
        ours, theirs = self._shared, other._shared
        if ours is None or theirs is None or ours.pages is not theirs.pages:
            return 0
        return min(ours.rows, theirs.rows, len(self), len(other))

    def _forked(self) -> tuple[tuple[Tensor, Tensor], Shared | None]:
        shared = self._shared
        if shared is None or self._length - shared.rows > max(FEW_ROWS, self._length // 32):
            shared = self._moved_to_pages()
        if shared is None:
            return self._copied(), None
        keys, values = shared.view(self.buffers, self._length)
        return (keys, values), shared

    def _moved_to_pages(self) -> Shared | None:
        mapped, rows = self._mapped, self._length
        parts = [self.rows] if mapped is None else mapped.first(rows).checked()
        if self.device.type != "cpu":
            return None
        room = rows + max(rows // 8, SPARE_ROWS)
        shared = Shared.of([Spread(each, room) for each in zip(*parts, strict=True)], rows)
        if shared is not None:
            # In this order: another thread may fork the same store.
            keys, values = shared.pages.view()
            self._buffers, self._mapped = (keys, values), None
            self._shared = shared
        return shared

    def _copied(self) -> tuple[Tensor, Tensor]:
        keys, values = (self._grown(buffer, buffer, buffer.shape[2]) for buffer in self.buffers)
        return keys, values

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = copy.copy(self)
        memo[id(self)] = made
        if self._buffers is not None:
            # Buffers in pages are views of one larger tensor, all of which copy.deepcopy would copy.
            made._buffers, made._shared = self._copied(), None
        made.sample = copy.deepcopy(self.sample, memo)
        return made

    def mark_saved(self, digest: str) -> None:
        """Say that a snapshot's state ``digest`` holds all rows as they are."""
        self._saved = digest, self._length

    def rows_saved(self, digest: str) -> int:
        """How many leading rows are still as the snapshot's state ``digest`` has them."""
        return self._saved[1] if self._saved[0] == digest else 0

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Zero-copy views of keys and values as they are stored, ``[B, Hkv, n, D]`` or packed; what kernels read.

        Where they are rotated, a query must be, too: see ``turn``.
        """
        keys, values = self.buffers
        return keys.narrow(2, 0, self._length), values.narrow(2, 0, self._length)

    def rows_for(self, queries: int) -> tuple[Tensor, Tensor]:
        """The same, to be scanned by ``queries`` positions: what would come from host memory for each comes once."""
        keys, values = self.rows
        return (keys.clone(), values.clone()) if self.host and queries > 1 else (keys, values)

    def freeze(self) -> None:
        """Leave the present rows as they are: copies of the store share them, and more rows become parts beside them.

        So they take the memory of their numbers, and no more, until somebody wants them together.
        """
        if self._mapped is None and self._buffers is not None:
            self._mapped, self._buffers = MappedRows((Part(*self.rows),), self.device), None
            self._shared = None

    def between(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """The rows that stand at ``first .. stop``, as ``rows`` has them; where they are mapped, only these are read.

        Raises:
            SnapshotError (a ValueError): the file that has them is damaged.
        """
        if self._mapped is not None:
            return self._mapped.between(first, stop)
        keys, values = self.rows
        return keys[:, :, first:stop], values[:, :, first:stop]

    @property
    def kept_dtype(self) -> torch.dtype:
        """What numbers of rows are kept as; packed ones as int8."""
        return self._like[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are, or will be."""
        return self._like[0].device if self._mapped is None else self._mapped.device

    @property
    def keys(self) -> Tensor:
        """Keys ``[B, Hkv, n, D]`` as floats: a zero-copy view, of packed rows a float32 copy.

        In the order they stand, which an index may change: AttentionDB.keys has them by position.
        """
        return self._plain(self.rows[0])

    @property
    def values(self) -> Tensor:
        """Values ``[B, Hkv, n, Dv]`` likewise: AttentionDB.values has them by position."""
        return self._plain(self.rows[1])

    @property
    def kept(self) -> str:
        """What packed rows are kept as, or where other than on their device, in words; "" for other rows."""
        packed = "int8, rotated" if self.rotated else "int8" if self.storage == "int8" else ""
        return f"{packed or self.storage or 'they come'}, in host memory" if self.host else packed

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: a key and a value."""
        if not self._row_bytes:
            self._row_bytes = sum(buffer.element_size() * buffer.shape[3] for buffer in self._like)
        return self._row_bytes

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The whole buffers, spare capacity included; an index that moves rows in place says so with ``touch``."""
        if self._mapped is not None:
            self._buffers, self._mapped = self._mapped.together(host=self.host), None
        if self._buffers is None:
            raise ValueError("the store is empty: insert keys and values first")
        return self._buffers

    @property
    def capacity(self) -> int:
        """Rows that the buffers have room for."""
        return self.buffers[0].shape[2] if self._has_buffers else 0

    @property
    def settled(self) -> int:
        """Rows whose padding is settled; see ``set_start``."""
        return self._settled

    def scores(self, query: Tensor, slots: Tensor, scale: float, softcap: float | None = None) -> Tensor:
        """Logits ``scale * q.k`` of the given places, softcapped, -inf where a place is -1: ``[B, Hq, m, n]``.

        ``query`` is turned as the rows are.
        """
        keys = self.rows[0]
        b = torch.arange(slots.shape[0], device=slots.device)[:, None, None, None]
        h = (torch.arange(slots.shape[1], device=slots.device) // (slots.shape[1] // keys.shape[1]))[:, None, None]
        logits = (floats(keys[b, h, slots.clamp(min=0)]) @ query.float()[..., None]).squeeze(-1)
        return softcapped(logits * scale, softcap).masked_fill(slots < 0, float("-inf"))

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included; for saved rows not asked for yet, what they will take."""
        if self._mapped is not None:
            return sum(part.keys.nbytes + part.values.nbytes for part in self._mapped.parts)
        return 0 if self._buffers is None else sum(buffer.nbytes for buffer in self._buffers)

    @property
    def own_nbytes(self) -> int:
        """Bytes of rows that are in no pages shared with forks: those that came, or were moved, since."""
        if self._shared is None or self._buffers is None:
            return self.nbytes
        own = max(0, self._length - self._shared.rows)
        return own * sum(buffer.nbytes // max(1, buffer.shape[2]) for buffer in self._buffers)

    @property
    def is_empty(self) -> bool:
        """True before the first row, and after truncate(0)."""
        return self._length == 0

    def __len__(self) -> int:
        return self._length

    def _plain(self, rows: Tensor) -> Tensor:
        return self.turn(floats(rows)) if rows.dtype == torch.int8 else rows

    @property
    def _like(self) -> tuple[Tensor, Tensor]:
        """Some of the rows, of whose shape and type all are; mapped ones are not read."""
        if self._mapped is None:
            return self.buffers
        return self._mapped.parts[0].keys, self._mapped.parts[0].values

    @property
    def _has_buffers(self) -> bool:
        return self._buffers is not None or self._mapped is not None

    def _set_start(self, start: Tensor) -> None:
        self.start = self._fitting = start
        self.starts = tuple(start.tolist())
        self.has_padding = any(first > 0 for first in self.starts)

    def _reserve(self, keys: Tensor, values: Tensor, length: int) -> None:
        before = self.buffers if self._has_buffers else (None, None)
        if before[0] is None:
            capacity = max(length, 64)
            self._set_start(torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device))
        elif length > before[0].shape[2]:
            # A row is copied some nine times in all; doubled buffers held twice the rows where memory is short.
            capacity = max(length, with_spare(before[0].shape[2]))
        else:
            return
        if length <= self._wanted:
            capacity = max(capacity, with_spare(self._wanted))
        # Both at once: were memory to run out in between, keys and values would differ in length.
        self._buffers = self._grown(before[0], keys, capacity), self._grown(before[1], values, capacity)
        self._shared = None

    def _grown(self, buffer: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        grown = new_buffer(like, capacity, host=self.host)
        if buffer is not None:
            grown[:, :, : self._length] = buffer[:, :, : self._length]
        return grown

    def _as_kept(self, rows: Tensor) -> Tensor:
        """Rows that take the place of a buffer, where buffers are kept."""
        return self._grown(rows, rows, rows.shape[2]) if self.host else rows

    def _check(self, keys: Tensor, values: Tensor) -> None:
        held = self._like if self._has_buffers else (None, None)
        for name, rows, dim, buffer in (
            ("keys", keys, self.head_dim, held[0]),
            ("values", values, self.value_dim, held[1]),
        ):
            shape, batch = rows.shape, None if buffer is None else buffer.shape[0]
            fits = len(shape) == 4 and shape[0] and (shape[1], shape[3]) == (self.num_kv_heads, dim)
            if not fits or batch not in (None, shape[0]):
                expected = f"[{batch or 'B'}, {self.num_kv_heads}, n, {dim}]"
                raise ValueError(f"{name} have shape {list(shape)}, expected {expected}")
            if rows.dtype not in FLOATS:
                raise ValueError(f"{name} have dtype {rows.dtype}, expected one of float32, float16, bfloat16")
            if buffer is None:
                continue
            if (self.storage is None and rows.dtype != buffer.dtype) or rows.device != self.device:
                raise ValueError(
                    f"{name} are {rows.dtype} on {rows.device}, the store holds {buffer.dtype} on {self.device}"
                )
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} differ in batch, heads or rows")
        if keys.dtype != values.dtype or keys.device != values.device:
            raise ValueError(f"keys are {keys.dtype} on {keys.device}, values are {values.dtype} on {values.device}")
        if self.host:
            check_host_rows(keys.device)
        if keys.shape[2] == 1 and on_device(keys):
            if self._length - self._looked_at >= LOOKED_AT and not _is_captured(keys):
                self.look_at_rows()
            return
        self.look_at_rows()
        for name, rows in (("keys", keys), ("values", values)):
            check_range(name, rows)

    def look_at_rows(self) -> None:
        """Check the rows that came one by one to a device, which no call waited for.

        Raises:
            ValueError: one that is NaN, infinite or larger than ``storage.LARGEST``: rows from it on are of no use.
        """
        first, self._looked_at = self._looked_at, self._length
        if first < self._length and self._has_buffers and on_device(self.buffers[0]):
            for name, rows in zip(("keys", "values"), self.rows, strict=True):
                check_range(f"{name} stored one by one from row {first} on", rows[:, :, first:])


def _is_captured(tensor: Tensor) -> bool:
    """Whether what is called now goes into a CUDA graph, which may not wait."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """The rows ``[B, Hkv, n, D]`` that stand at ``places [B, Hkv, m]``: a copy, ``[B, Hkv, m, D]``."""
    return rows.gather(2, places[..., None].expand(-1, -1, -1, rows.shape[3]))
