"""Parallel loops over compiled functions that are found by address, so that one loop serves all kernels.

Numba types twice and optimises five times over what a parallel loop calls: for the call, for three functions that it
wraps around the loop, and for the function the loop stands in. Here the loop calls an address, and what it finds there
is compiled once.
"""

# mypy: ignore-errors
# (Numba compiles these functions and infers their types itself.)

from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from ._cpu_addresses import I64
from ._cpu_common import FAST, inner_parallel

# part(phase, i, memory) does part i of a phase of the call whose arguments stand at address ``memory``.
_PART = types.void(types.int64, types.int64, types.int64)
_CODE = ir.FunctionType(ir.VoidType(), [I64] * 3)
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
        builder.call(builder.inttoptr(args[0], _CODE.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), gen


@inner_parallel
def each_part(address, phase, n, memory):
    """Call the part at an address for a phase's parts 0 .. n in parallel."""
    for i in prange(n):
        call_part(address, phase, i, memory)


@intrinsic
def _handed_over(typingctx, part, arguments):
    """The addresses of code that calls ``part(i, *arguments)`` with what stands in memory, and of that memory."""
    call = part.get_call_type(typingctx, (types.int64, *arguments.types), {})
    addresses = types.UniTuple(types.int64, 2)

    def gen(context, builder, sig, args):
        compiled = part.dispatcher.get_compile_result(call)
        context.active_code_library.add_linking_library(compiled.library)
        memory, module = cgutils.alloca_once_value(builder, args[1]), builder.module
        code = ir.Function(module, _CODE, module.get_unique_name(f"each.{part.dispatcher.py_func.__name__}"))
        code.linkage = "internal"
        inside = ir.IRBuilder(code.append_basic_block())
        found = cgutils.unpack_tuple(inside, inside.load(inside.inttoptr(code.args[2], memory.type)))
        function = context.declare_function(module, compiled.fndesc)
        context.call_conv.call_function(inside, function, call.return_type, call.args, [code.args[1], *found])
        inside.ret_void()
        return context.make_tuple(builder, addresses, [builder.ptrtoint(x, I64) for x in (code, memory)])

    return addresses(part, arguments), gen


@njit(inline="always")
def each(n, part, arguments):
    """For kernels: ``part(i, *arguments)``, a compiled function, for i in 0 .. n in parallel. It returns nothing."""
    code, memory = _handed_over(part, arguments)
    each_part(code, 0, n, memory)
