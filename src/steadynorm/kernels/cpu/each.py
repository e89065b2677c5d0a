"""The kernel that runs others for several calls, whose arguments lie one after the other."""

from typing import Any

from llvmlite import ir
from numba import types

from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.simd import I64, Storage, intrinsic, load_i64, next_ticket, store_i64

(
    TICKET,  # the next call
    WORKERS,  # counts the threads that have come
    CALLS,
    FIRST,  # where the arguments of the calls begin
    STRIDE,  # bytes between those of one call and of the next
    ROOM,  # bytes of scratch memory that a thread has for itself, where calls are whole
    IS_WHOLE,
    STEPS,
    STEP,  # the address of a kernel and its stages, for each step
) = range(9)


@intrinsic
def call(typingctx: Any, kernel: Any, arguments: Any) -> Any:
    """Call the kernel at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def make_each(_: Storage) -> Any:
    """Threads share the tasks of every call, one call after the other, in one step; or with IS_WHOLE the calls.

    Of a whole call one thread does all steps, while the tensors are in its caches.
    """

    @inlined
    def whole(args: Any, call_at: Any, shift: Any) -> Any:
        store_i64(call_at + at.SCRATCH * 8, load_i64(call_at + at.SCRATCH * 8) + shift)
        store_i64(call_at + at.COLUMNS * 8, load_i64(call_at + at.COLUMNS * 8) + shift)
        for step in range(load_i64(args + STEPS * 8)):
            step_at = args + (STEP + 2 * step) * 8
            store_i64(call_at + at.TICKET * 8, 0)
            store_i64(call_at + at.WORKERS * 8, 0)
            store_i64(call_at + at.STAGES * 8, load_i64(step_at + 8))
            call(load_i64(step_at), call_at)

    def kernel(args: Any) -> Any:
        calls, first, stride = load_i64(args + CALLS * 8), load_i64(args + FIRST * 8), load_i64(args + STRIDE * 8)
        if load_i64(args + IS_WHOLE * 8) == 0:
            for i in range(calls):
                call(load_i64(args + STEP * 8), first + i * stride)
        else:
            shift = next_ticket(args + WORKERS * 8) * load_i64(args + ROOM * 8)
            i = next_ticket(args + TICKET * 8)
            while i < calls:
                whole(args, first + i * stride, shift)
                i = next_ticket(args + TICKET * 8)

    return kernel
