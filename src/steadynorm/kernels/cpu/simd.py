"""Vectors of 16 lanes for Numba: a type, arithmetic, and loads and stores through plain addresses.

LLVM's own vectorizer gives up silently on loops over many arrays (13 times slower was measured), so the kernels say
what they mean. 16 lanes are one AVX-512 register, two of AVX2, four of SSE2 or NEON. Arithmetic is float32, or
float64 for float64 tensors; bfloat16 and float16 are widened on loading and rounded to nearest even on storing.

Addresses are int64. Every name below is used inside kernels, never called from Python.
"""

import operator
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, extending, types
from numba.core.datamodel import models
from numba.core.typing import templates

from steadynorm.kernels.cpu.frontend import inlined

LANES = 16

# numba's annotations describe calls from Python, not the language inside a kernel
intrinsic: Any = extending.intrinsic

"""A function for kernels only: no entry points of its own, which halves what there is to compile."""

F32, F64 = ir.FloatType(), ir.DoubleType()
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """16 lanes of one float type."""

    def __init__(self, lane: types.Float) -> None:
        self.lane = lane
        super().__init__(name=f"Vector({lane})")


@extending.register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector lives in registers."""

    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(F64 if fe_type.lane == types.float64 else F32, LANES))


V32, V64 = Vector(types.float32), Vector(types.float64)


def _binary(op: Callable[..., Any], build: str) -> None:
    """Give two vectors of one type the Python operator `op`."""

    @templates.infer_global(op)
    class Template(templates.AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return templates.signature(args[0], *args)
            return None

    @extending.lower_builtin(op, Vector, Vector)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, build)(*args)


_binary(operator.add, "fadd")
_binary(operator.sub, "fsub")
_binary(operator.mul, "fmul")
_binary(operator.truediv, "fdiv")


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * LANES)


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _call(builder: Any, name: str, result: ir.Type, args: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _suffix(vector: ir.VectorType) -> str:
    return f"v{LANES}f64" if vector.element == F64 else f"v{LANES}f32"


@intrinsic
def splat32(typingctx: Any, value: Any) -> Any:
    """A float as a vector of float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[0], sig.args[0], types.float32))

    return V32(value), codegen


@intrinsic
def splat64(typingctx: Any, value: Any) -> Any:
    """A float as a vector of float64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[0], sig.args[0], types.float64))

    return V64(value), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, fused where the processor can."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, f"llvm.fmuladd.{_suffix(args[0].type)}", args[0].type, list(args))

    return a(a, b, c), codegen


def polynomial(coefficients: tuple[float, ...]) -> Any:
    """A kernel function of a vector: Horner's rule, highest power first, as one run of multiply-adds."""

    @intrinsic
    def function(typingctx: Any, t: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vector = args[0].type
            value = _constant(vector, coefficients[0])
            for coefficient in coefficients[1:]:
                terms = [value, args[0], _constant(vector, coefficient)]
                value = _call(builder, f"llvm.fmuladd.{_suffix(vector)}", vector, terms)
            return value

        return t(t), codegen

    return function


@inlined
def itself(value: Any) -> Any:
    """What stands for a conversion or a splat where there is nothing to do."""
    return value


@intrinsic
def widen(typingctx: Any, a: Any) -> Any:
    """A vector as float64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if args[0].type.element == F64:
            return args[0]
        return builder.fpext(args[0], ir.VectorType(F64, LANES))

    return V64(a), codegen


@intrinsic
def narrowed(typingctx: Any, a: Any) -> Any:
    """A float64 vector as float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptrunc(args[0], ir.VectorType(F32, LANES))

    return V32(a), codegen


@intrinsic
def lanes_sum(typingctx: Any, a: Any) -> Any:
    """Sum of the lanes, pairwise in their own precision, as float64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            low = ir.Constant(ir.VectorType(I32, width), list(range(width)))
            high = ir.Constant(ir.VectorType(I32, width), list(range(width, 2 * width)))
            undefined = ir.Constant(value.type, ir.Undefined)
            value = builder.fadd(
                builder.shuffle_vector(value, undefined, low), builder.shuffle_vector(value, undefined, high)
            )
        total = builder.extract_element(value, ir.Constant(I32, 0))
        return total if total.type == F64 else builder.fpext(total, F64)

    return types.float64(a), codegen


@intrinsic
def first_lane(typingctx: Any, a: Any) -> Any:
    """The first lane of a float64 vector."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(I32, 0))

    return types.float64(a), codegen


@intrinsic
def where_positive(typingctx: Any, condition: Any, yes: Any, no: Any) -> Any:
    """Lane by lane: `yes` where `condition` > 0, else `no` (also where it is NaN)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        is_positive = builder.fcmp_ordered(">", args[0], _constant(args[0].type, 0.0))
        return builder.select(is_positive, args[1], args[2])

    return yes(condition, yes, no), codegen


@intrinsic
def keep_last(typingctx: Any, a: Any, n: Any) -> Any:
    """The last `n` lanes of `a`, and zero in the others."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, n = args
        skipped = builder.sub(ir.Constant(I64, LANES), n)
        return builder.select(_first_lanes(builder, skipped), _constant(value.type, 0.0), value)

    return a(a, types.int64), codegen


@intrinsic
def absolute(typingctx: Any, a: Any) -> Any:
    """|a|."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, f"llvm.fabs.{_suffix(args[0].type)}", args[0].type, list(args))

    return a(a), codegen


def _chosen(order: str, about: str) -> Any:
    @intrinsic
    def choose(typingctx: Any, a: Any, b: Any) -> Any:
        kind = types.float64 if types.float64 in (a, b) else types.int64

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values = [context.cast(builder, value, given, kind) for value, given in zip(args, sig.args, strict=True)]
            compare = builder.fcmp_ordered if kind == types.float64 else builder.icmp_signed
            return builder.select(compare(order, *values), *values)

        return kind(a, b), codegen

    choose.__doc__ = about
    return choose


# Python's own would bring functions with them, to be compiled for every kernel.
smaller = _chosen("<", "The smaller of two numbers.")
larger = _chosen(">", "The larger of two numbers.")


@intrinsic
def square_root_of(typingctx: Any, a: Any) -> Any:
    """√a of a float64, or of a vector of them."""
    kind = a if isinstance(a, Vector) else types.float64

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        suffix = _suffix(args[0].type) if isinstance(kind, Vector) else "f64"
        return _call(builder, f"llvm.sqrt.{suffix}", args[0].type, list(args))

    return kind(kind), codegen


@intrinsic
def scaled_by_power_of_two(typingctx: Any, a: Any, power: Any) -> Any:
    """a · 2^power for whole `power` in the exponent range of normal numbers: made in the exponent bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        is_double = args[0].type.element == F64
        integer = ir.VectorType(I64 if is_double else I32, LANES)
        saturating = f"llvm.fptosi.sat.v{LANES}i{64 if is_double else 32}.{_suffix(args[1].type)}"  # defined for NaN
        whole = _call(builder, saturating, integer, [args[1]])
        bias = ir.Constant(integer, [1023 if is_double else 127] * LANES)
        shift = ir.Constant(integer, [52 if is_double else 23] * LANES)
        factor = builder.bitcast(builder.shl(builder.add(whole, bias), shift), args[0].type)
        return builder.fmul(args[0], factor)

    return a(a, a), codegen


@intrinsic
def nearest_whole(typingctx: Any, a: Any) -> Any:
    """`a` rounded to the nearest whole number, ties to even."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, f"llvm.rint.{_suffix(args[0].type)}", args[0].type, list(args))

    return a(a), codegen


# Memory.


def _pointer(builder: Any, address: Any, to: ir.Type) -> Any:
    return builder.inttoptr(address, to.as_pointer())


def _scalar_load(kind: Any, llvm: ir.Type) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(_pointer(builder, args[0], llvm))

        return kind(types.int64), codegen

    return load


def _scalar_store(kind: Any, llvm: ir.Type) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = context.cast(builder, args[1], sig.args[1], kind)
            builder.store(value, _pointer(builder, args[0], llvm))
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return store


load_i64 = _scalar_load(types.int64, I64)
load_f64 = _scalar_load(types.float64, F64)
load_f32 = _scalar_load(types.float32, F32)
store_f64 = _scalar_store(types.float64, F64)
store_f32 = _scalar_store(types.float32, F32)
store_i64 = _scalar_store(types.int64, I64)


@intrinsic
def next_ticket(typingctx: Any, address: Any) -> Any:
    """Take the number at `address` and leave the next one, atomically: how threads share out tasks."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], I64), ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def stores_fence(typingctx: Any) -> Any:
    """Order streaming stores before whatever another thread reads next."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the line at `address`, which may lie anywhere, without waiting: into the second cache.

    What is wanted is a row of up to 64 KiB ahead, which would push the present one out of the first: that cost rows of
    4096 and 16384 a tenth of their time, and shorter ones nothing.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, kind = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer, kind, kind, kind])
        declared = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        builder.call(declared, [builder.inttoptr(args[0], pointer), kind(0), kind(2), kind(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _splat_load(vector: Vector, llvm: ir.Type) -> Any:
    @intrinsic
    def load_splat(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _splat(builder, builder.load(_pointer(builder, args[0], llvm)))

        return vector(types.int64), codegen

    return load_splat


load_splat32 = _splat_load(V32, F32)
load_splat64 = _splat_load(V64, F64)


@intrinsic
def load_v64(typingctx: Any, address: Any) -> Any:
    """16 float64 from memory."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], ir.VectorType(F64, LANES)), align=8)

    return V64(types.int64), codegen


@intrinsic
def load_v32(typingctx: Any, address: Any) -> Any:
    """16 float32 from memory."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], ir.VectorType(F32, LANES)), align=4)

    return V32(types.int64), codegen


@intrinsic
def store_vector(typingctx: Any, address: Any, value: Any) -> Any:
    """A vector to memory, in its own lane type."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        align = 8 if args[1].type.element == F64 else 4
        builder.store(args[1], _pointer(builder, args[0], args[1].type), align=align)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


class Storage:
    """How a tensor's dtype is read into vectors and written from them.

    Attributes:
        bytes: size of one element.
        vector: V32, or V64 for float64.
        load(address), load_first(address, n, fill): 16 elements, or the first `n` and `fill` in the other lanes.
        load_splat(address): one element in all lanes.
        store(address, v), store_first(address, n, v), stream(address, v): `stream` bypasses the caches and needs an
            address that is a multiple of 16 elements.
        splat(float): a scalar in the arithmetic's precision.
        load_lanes(address), lane_bytes: vectors of the arithmetic's precision in memory, as `store_vector` writes them.
        store_lane(address, float), load_lane(address): one number of that precision; read into all lanes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        lane = {"float32": F32, "float64": F64, "bfloat16": I16, "float16": I16}[name]
        self.bytes = {F32: 4, F64: 8, I16: 2}[lane]
        self.is_double = name == "float64"
        self.vector = V64 if self.is_double else V32
        self.splat = splat64 if self.is_double else splat32
        self.memory = ir.VectorType(lane, LANES)
        self.lane_bytes = 8 if self.is_double else 4
        self.load_lanes = load_v64 if self.is_double else load_v32
        self.store_lane = store_f64 if self.is_double else store_f32
        self.load_lane = load_splat64 if self.is_double else load_splat32
        self.load = self._make_load()
        self.load_splat = self._make_load_splat()
        self.load_first = self._make_load_first()
        self.store = self._make_store()
        self.stream = self._make_store(is_streaming=True)
        self.store_first = self._make_store_first()

    def _widen(self, builder: Any, raw: Any) -> Any:
        if self.name == "bfloat16":
            wide = builder.zext(raw, ir.VectorType(I32, LANES))
            shifted = builder.shl(wide, ir.Constant(wide.type, [16] * LANES))
            return builder.bitcast(shifted, ir.VectorType(F32, LANES))
        if self.name == "float16":
            halves = builder.bitcast(raw, ir.VectorType(ir.HalfType(), LANES))
            return builder.fpext(halves, ir.VectorType(F32, LANES))
        return raw

    def _narrow(self, builder: Any, value: Any) -> Any:
        if self.name == "bfloat16":
            return _to_bfloat16(builder, value)
        if self.name == "float16":
            return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), self.memory)
        return value

    def _make_load(self) -> Any:
        storage = self

        @intrinsic
        def load(typingctx: Any, address: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                raw = builder.load(_pointer(builder, args[0], storage.memory), align=storage.bytes)
                return storage._widen(builder, raw)

            return storage.vector(types.int64), codegen

        return load

    def _make_load_splat(self) -> Any:
        storage = self

        @intrinsic
        def load_splat(typingctx: Any, address: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                one = builder.load(_pointer(builder, args[0], storage.memory.element), align=storage.bytes)
                return storage._widen(builder, _splat(builder, one))

            return storage.vector(types.int64), codegen

        return load_splat

    def _make_load_first(self) -> Any:
        storage = self

        @intrinsic
        def load_first(typingctx: Any, address: Any, n: Any, fill: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                address, n, fill = args
                mask = _first_lanes(builder, n)
                raw = _masked_load(builder, address, mask, storage)
                return builder.select(mask, storage._widen(builder, raw), fill)

            return storage.vector(types.int64, types.int64, fill), codegen

        return load_first

    def _make_store(self, is_streaming: bool = False) -> Any:
        storage = self

        @intrinsic
        def store(typingctx: Any, address: Any, value: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                pointer = _pointer(builder, args[0], storage.memory)
                align = LANES * storage.bytes if is_streaming else storage.bytes
                instruction = builder.store(storage._narrow(builder, args[1]), pointer, align=align)
                if is_streaming:
                    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
                return context.get_dummy_value()

            return types.void(types.int64, value), codegen

        return store

    def _make_store_first(self) -> Any:
        storage = self

        @intrinsic
        def store_first(typingctx: Any, address: Any, n: Any, value: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                address, n, value = args
                raw = storage._narrow(builder, value)
                pointer = _pointer(builder, address, storage.memory)
                mask = _first_lanes(builder, n)
                name = f"llvm.masked.store.{_memory_suffix(storage)}.p0"
                _call(builder, name, ir.VoidType(), [raw, pointer, ir.Constant(I32, storage.bytes), mask])
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, value), codegen

        return store_first


def _memory_suffix(storage: Storage) -> str:
    return f"v{LANES}" + {4: "f32", 8: "f64", 2: "i16"}[storage.bytes]


def _first_lanes(builder: Any, n: Any) -> Any:
    order = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    return builder.icmp_signed("<", order, _splat(builder, builder.trunc(n, I32)))


def _masked_load(builder: Any, address: Any, mask: Any, storage: Storage) -> Any:
    pointer = _pointer(builder, address, storage.memory)
    zeros = ir.Constant(storage.memory, [0 if storage.bytes == 2 else 0.0] * LANES)
    name = f"llvm.masked.load.{_memory_suffix(storage)}.p0"
    return _call(builder, name, storage.memory, [pointer, ir.Constant(I32, storage.bytes), mask, zeros])


def _to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest even in integers: the hardware's instruction flushes denormals and is not everywhere."""
    wide = ir.VectorType(I32, LANES)
    bits = builder.bitcast(value, wide)
    upper = builder.lshr(bits, ir.Constant(wide, [16] * LANES))
    odd = builder.and_(upper, ir.Constant(wide, [1] * LANES))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(wide, [0x7FFF] * LANES)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(bits, ir.Constant(wide, [0x00400000] * LANES))
    kept = builder.select(is_nan, quiet, rounded)
    return builder.trunc(builder.lshr(kept, ir.Constant(wide, [16] * LANES)), ir.VectorType(I16, LANES))


STORAGES = {name: Storage(name) for name in ("float32", "float64", "bfloat16", "float16")}


@inlined
def parameter(address: Any, size: Any, index: Any, default: Any) -> Any:
    """Element `index` of a float32 or float64 array, or `default` where there is none."""
    if address == 0:
        return default
    if size == 8:
        return load_f64(address + index * 8)
    return numba.float64(load_f32(address + index * 4))
