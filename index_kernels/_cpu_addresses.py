"""Arrays that a compiled kernel finds in a table of addresses, instead of being handed them one by one.

Numba takes about a microsecond to look at each array it is handed, call by call: its type, its memory, who owns it. A
decode step works on some fifty that stay where they are from step to step, so a table says once where they stand.
Numbers in it are an address and the lengths of the axes, array after array.
"""

# mypy: ignore-errors
# (The readers build LLVM instructions; Numba types them itself.)

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import as_dtype

I64 = ir.IntType(64)


class Addresses(NamedTuple):
    """``numbers``: the table, int64, which stands ``at``. ``held``: its arrays; without them their memory might go to
    others."""

    numbers: np.ndarray
    at: int
    held: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, kinds: Any, arrays: Any) -> "Addresses":
        """The table of arrays of these Numba types, as ``float32[:, ::1]``; others would be misread, and raise."""
        for array, kind in zip(arrays, kinds, strict=True):
            fits = array.dtype == as_dtype(kind.dtype) and array.ndim == kind.ndim and array.flags.c_contiguous
            if not fits:
                raise ValueError(f"{array.dtype} {list(array.shape)}, strides {array.strides}, expected {kind}")
        numbers = np.array([number for array in arrays for number in (array.ctypes.data, *array.shape)], np.int64)
        return cls(numbers, numbers.ctypes.data, tuple(arrays))


def width(*kinds: Any) -> int:
    """How many numbers a table has for arrays of these Numba types."""
    return sum(1 + kind.ndim for kind in kinds)


def _array(context, builder, kind, address, shape):
    """An array of Numba type ``kind`` at an address, that owns no memory."""
    element = context.get_data_type(kind.dtype)
    size = I64(context.get_abi_sizeof(element))
    strides = [size]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    array = context.make_array(kind)(context, builder)
    data = builder.inttoptr(address, element.as_pointer())
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
    return array._getvalue()


def reader(named: Any, *kinds: Any) -> Any:
    """For kernels: ``read(numbers, first)`` is the NamedTuple ``named`` of a table's arrays from ``numbers[first]`` on,
    which are of these types."""
    whole = types.BaseTuple.from_types(kinds, named)

    @intrinsic
    def read(typingctx, numbers, first):
        def gen(context, builder, sig, args):
            table = context.make_array(sig.args[0])(context, builder, args[0]).data
            found, at = [], 0
            for kind in kinds:
                places = [builder.add(args[1], I64(at + i)) for i in range(1 + kind.ndim)]
                address, *shape = (builder.load(builder.gep(table, [place])) for place in places)
                found.append(_array(context, builder, kind, address, shape))
                at += width(kind)
            return context.make_tuple(builder, whole, found)

        return whole(numbers, types.int64), gen

    return read


@intrinsic
def at_address(typingctx, address, shape, dtype):
    """For kernels: the array of this shape, a tuple of int64, and dtype at an address."""
    kind = types.Array(dtype.dtype, len(shape), "C")

    def gen(context, builder, sig, args):
        return _array(context, builder, kind, args[0], cgutils.unpack_tuple(builder, args[1]))

    return kind(types.int64, shape, dtype), gen
