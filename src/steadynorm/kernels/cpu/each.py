"""The kernel that runs another one for several calls, whose arguments lie one after the other."""

from typing import Any

from llvmlite import ir
from numba import types

from steadynorm.kernels.cpu.simd import I64, Storage, intrinsic, load_i64, next_ticket

TICKET, KERNEL, CALLS, FIRST, STRIDE, IS_WHOLE = range(6)
"""Places in its arguments: the kernel's address, how many calls, where theirs begin, and the bytes between them."""


@intrinsic
def call(typingctx: Any, kernel: Any, arguments: Any) -> Any:
    """Call the kernel at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def make_each(_: Storage) -> Any:
    """Threads share the tasks of every call, one call after the other; with IS_WHOLE they share the calls instead."""

    def kernel(args: Any) -> Any:
        entry, calls = load_i64(args + KERNEL * 8), load_i64(args + CALLS * 8)
        first, stride = load_i64(args + FIRST * 8), load_i64(args + STRIDE * 8)
        if load_i64(args + IS_WHOLE * 8) == 0:
            for i in range(calls):
                call(entry, first + i * stride)
        else:
            i = next_ticket(args + TICKET * 8)
            while i < calls:
                call(entry, first + i * stride)
                i = next_ticket(args + TICKET * 8)

    return kernel
