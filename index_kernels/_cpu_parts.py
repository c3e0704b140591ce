"""Parallel loops over compiled functions that are found by address, so that one loop serves all kernels.

Numba optimises whatever a parallel loop calls five times over: for the call, for three functions that it wraps around
the loop, and for the function the loop stands in. Here the loop calls an address. What it finds there is compiled once
for each shape and type of rows, and the loop and all around it once for all of them.
"""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

from llvmlite import ir
from numba import cfunc, prange, types
from numba.extending import intrinsic

from ._cpu_addresses import I64
from ._cpu_common import FAST, inner_parallel

# part(phase, i, memory) does part i of a phase of the call whose arguments stand at address ``memory``.
_PART = types.void(types.int64, types.int64, types.int64)
# What addresses were given of: code must not go while it may be called.
_kept = []


def part_address(part):
    """The address of ``part(phase, i, memory)``, three int64, once it is compiled.

    What it closes over, sizes as lanes and types, is known as it is compiled; Numba's cache on disk tells by it.
    """
    _kept.append(cfunc(_PART, cache=True, fastmath=FAST)(part))
    return _kept[-1].address


@intrinsic
def call_part(typingctx, address, phase, i, memory):
    """Call the part at an address."""

    def gen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), gen


@inner_parallel
def each_part(address, phase, n, memory):
    """Call the part at an address for a phase's parts 0 .. n in parallel."""
    for i in prange(n):
        call_part(address, phase, i, memory)
