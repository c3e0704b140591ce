"""KVStore: the rows of one layer, kept once, in buffers that double."""

import math

import torch
from torch import Tensor

from index_kernels.ops import FLOATS


class KVStore:
    """Keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]``, appended in place.

    ``start [B]`` is the first valid row of each batch row (left padding); rows before it are never read.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, value_dim: int) -> None:
        for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        self.num_kv_heads, self.head_dim, self.value_dim = num_kv_heads, head_dim, value_dim
        self._clear()

    def _clear(self) -> None:
        self._length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.start = torch.zeros(0, dtype=torch.int64)
        self.has_padding = False
        self._settled = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows after the newest; nothing is written when anything about them is wrong.

        Raises:
            ValueError: shapes, dtype or device that do not fit, or a value that is NaN or infinite.
        """
        self._check(keys, values)
        added = keys.shape[2]
        self._reserve(keys, values, self._length + added)
        assert self._keys is not None
        assert self._values is not None
        self._keys[:, :, self._length : self._length + added] = keys.detach()
        self._values[:, :, self._length : self._length + added] = values.detach()
        self._length += added

    def can_start_at(self, start: Tensor) -> bool:
        """Whether ``set_start`` would accept ``start [B]``."""
        if torch.equal(start, self.start):
            return True
        unsettled = (self.start >= self._settled) & (start >= self._settled)
        return bool(((start == self.start) | unsettled).all())

    def set_start(self, start: Tensor) -> None:
        """Declare left padding: batch row b has no rows before ``start[b]``.

        It settles the rows stored so far; only a batch row that has been nothing but padding can move its start later.

        Raises:
            ValueError: a wrong shape, a negative start, or a batch row that already has valid rows.
        """
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
        if start is not self.start:
            self.start = start.clone()
            self.has_padding = bool((start > 0).any())

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows.

        Raises:
            ValueError: a length below 0 or above the number of rows.
        """
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= self._length:
            raise ValueError(f"length is {length!r}, expected an integer from 0 to {self._length}")
        self._length = length
        self._settled = min(self._settled, length)
        if not length:
            # As if no row had ever come: the next ones may have another batch size, dtype or padding.
            self._clear()

    def select(self, batch: Tensor) -> None:
        """Keep the batch rows ``batch [B']`` (an index may repeat): beam search and batch edits."""
        if self._keys is None or self._values is None:
            return
        batch = batch.to(self._keys.device)
        with torch.inference_mode(False), torch.no_grad():
            self._keys, self._values = self._keys.index_select(0, batch), self._values.index_select(0, batch)
        self.start = self.start[batch]
        self.has_padding = bool((self.start > 0).any())

    @property
    def keys(self) -> Tensor:
        """Zero-copy view ``[B, Hkv, n, D]`` of the rows."""
        return self._view(self._keys)

    @property
    def values(self) -> Tensor:
        """Zero-copy view ``[B, Hkv, n, Dv]`` of the rows."""
        return self._view(self._values)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The whole buffers, spare capacity included; for an index that moves rows in place."""
        if self._keys is None or self._values is None:
            raise ValueError("the store is empty: insert keys and values first")
        return self._keys, self._values

    def scores(self, query: Tensor, slots: Tensor, scale: float) -> Tensor:
        """Logits ``scale * q.k`` of the given places, -inf where a place is -1: ``[B, Hq, m, n]``."""
        keys = self.keys
        b = torch.arange(slots.shape[0], device=slots.device)[:, None, None, None]
        h = (torch.arange(slots.shape[1], device=slots.device) // (slots.shape[1] // keys.shape[1]))[:, None, None]
        logits = (keys[b, h, slots.clamp(min=0)].float() @ query.float()[..., None]).squeeze(-1)
        return (logits * scale).masked_fill(slots < 0, float("-inf"))

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return sum(b.numel() * b.element_size() for b in (self._keys, self._values) if b is not None)

    @property
    def is_empty(self) -> bool:
        """True before the first row, and after truncate(0)."""
        return self._length == 0

    def __len__(self) -> int:
        return self._length

    def _view(self, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            raise ValueError("the store is empty: insert keys and values first")
        return buffer[:, :, : self._length]

    def _reserve(self, keys: Tensor, values: Tensor, length: int) -> None:
        if self._keys is not None and self._values is not None:
            if length <= self._keys.shape[2]:
                return
            capacity = max(length, 2 * self._keys.shape[2])
        else:
            capacity = max(length, 64)
            self.start = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        # Both at once: were memory to run out in between, keys and values would differ in length.
        self._keys, self._values = self._grown(self._keys, keys, capacity), self._grown(self._values, values, capacity)

    def _grown(self, buffer: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        # An ordinary tensor even under inference_mode, whose tensors could not be written to outside it.
        with torch.inference_mode(False):
            grown = torch.empty((*like.shape[:2], capacity, like.shape[3]), dtype=like.dtype, device=like.device)
        if buffer is not None:
            grown[:, :, : self._length] = buffer[:, :, : self._length]
        return grown

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for name, rows, dim, buffer in (
            ("keys", keys, self.head_dim, self._keys),
            ("values", values, self.value_dim, self._values),
        ):
            batch = "B" if buffer is None else buffer.shape[0]
            expected = f"[{batch}, {self.num_kv_heads}, n, {dim}]"
            if rows.ndim != 4 or rows.shape[1] != self.num_kv_heads or rows.shape[3] != dim or rows.shape[0] == 0:
                raise ValueError(f"{name} have shape {list(rows.shape)}, expected {expected}")
            if rows.dtype not in FLOATS:
                raise ValueError(f"{name} have dtype {rows.dtype}, expected one of float32, float16, bfloat16")
            if buffer is None:
                continue
            if rows.shape[0] != buffer.shape[0]:
                raise ValueError(f"{name} have shape {list(rows.shape)}, expected {expected}")
            if rows.dtype != buffer.dtype or rows.device != buffer.device:
                raise ValueError(
                    f"{name} are {rows.dtype} on {rows.device}, the store holds {buffer.dtype} on {buffer.device}"
                )
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} differ in batch, heads or rows")
        if keys.dtype != values.dtype or keys.device != values.device:
            raise ValueError(f"keys are {keys.dtype} on {keys.device}, values are {values.dtype} on {values.device}")
        for name, rows in (("keys", keys), ("values", values)):
            check_finite(name, rows)


def exponential_noise(heads: int, first: int, stop: int, device: torch.device) -> Tensor:
    """``-ln u`` with u uniform in (0, 1], fixed for each KV head and row position: ``[heads, stop - first]`` float32.

    A hash of the position (splitmix64), so that a row keeps its noise however it arrived.
    """
    x = torch.arange(first, stop, device=device) * heads + torch.arange(heads, device=device)[:, None]
    x = (x + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    uniform = (((x >> 11) & 0x1FFFFFFFFFFFFF).double() + 1) * 2.0**-53
    return -torch.log(uniform).float()


def check_finite(name: str, rows: Tensor) -> None:
    """Raise ValueError naming the first NaN or infinite element of ``rows``."""
    # A finite sum proves every element finite in one cheap pass; only an overflow of the sum needs the second look.
    if math.isfinite(rows.sum(dtype=torch.float32).item()):
        return
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise ValueError(f"{name} hold {rows[tuple(at)].item()} at {at} ({len(bad)} elements are not finite)")
