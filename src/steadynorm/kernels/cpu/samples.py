"""What the kernels of statistics within a sample share: arguments, the statistics of a run, parameters, the last sums.

Four layouts, a file each: `samples_rows` (a sample is a row, and the weight runs along it), `samples_planes` (a group
is one run of memory, its channels pieces of that run), `samples_last` (channels last: a sample is a matrix, a group
some of its columns) and `samples_positions` (one statistic per position, over channels that lie far apart).

A statistic of a run is taken in one sweep, about a pivot: the mean of the run's head, and from chunk to chunk the mean
of what was seen. A chunk whose mean turns out to be far from its pivot is summed again, so that neither a large mean
nor an outlier costs digits. Chunks are pooled in float64.
"""

import ctypes
from functools import cache
from typing import Any

import numba
from llvmlite import ir

from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.simd import (
    F32,
    F64,
    I32,
    LANES,
    Storage,
    _call,
    _first_lanes,
    fma,
    intrinsic,
    keep_last,
    lanes_sum,
    larger,
    load_f64,
    load_i64,
    next_ticket,
    parameter,
    smaller,
    store_f32,
    store_f64,
    stores_fence,
    where_positive,
    widen,
)
from steadynorm.kernels.cpu.sums import make_sums

(
    TICKET,  # the next task; every thread takes one at a time
    WORKERS,  # counts the threads that have come, each of which gets scratch memory of its own
    TASKS,
    BLOCK,  # units per task
    UNITS,  # samples of rows, groups of planes, samples whose channels are last, tiles of positions
    SAMPLES,
    OUTER,
    GROUPS,
    CHANNELS,
    INNER,
    X,  # backward: the total
    ADDEND,
    TOTAL,  # forward: where x + addend is written, or 0
    Y,
    RESIDUAL,
    MASK,
    DY,
    DTOTAL,
    SIDE,  # backward: the residual or the output, whichever tells where the derivative is taken
    IS_OUTPUT,  # whether SIDE is the output
    G,  # backward: where g is kept between the sweeps, or 0
    DX,
    WEIGHT,
    WEIGHT_BYTES,
    WEIGHT_OFFSET,
    BIAS,
    BIAS_BYTES,
    IS_PREPARED,  # whether WEIGHT and BIAS can be read as they are, in the arithmetic's precision
    MEAN,
    VAR,
    PRODUCTS,  # sums of g·x̂ for every parameter, of every part of the input
    TOTALS,  # the same of g
    PARTS,  # how many parts those sums are in
    REPEATED,  # neighbouring numbers of a part that belong to one parameter
    DWEIGHT,
    DBIAS,
    IS_NARROW,  # whether DWEIGHT and DBIAS are float32, and not float64
    NEEDS_AFFINE,
    SPLITS,  # parts of a unit, each of which has sums of its own
    IS_SHARED,  # whether threads share a unit, part by part; else it is one task's alone
    SHARED,  # the slots of all units that are shared, SLOT_BYTES each
    SLOT_BYTES,
    FLAGS,  # of each: how many parts are done, and whether what they all need is there; zeros at first
    CUTS,  # planes: pieces of a channel
    PIECE,  # planes: values in one of them
    IS_CENTRED,
    SCRATCH,
    WORKER_BYTES,
    STREAMS,  # whether the output bypasses the caches
    EPS,
    LENGTH,
) = range(51)

Integers = ctypes.c_int64 * LENGTH
Floats = ctypes.c_double * LENGTH

BYTES = ir.VectorType(ir.IntType(8), LANES)

CHUNK = 128 * LANES
"""Values that share a pivot, added in the arithmetic's precision: 64 terms a lane in each of two chains."""
HEAD, LONG_HEAD = 4 * LANES, 8 * LANES
"""Values whose mean is the first pivot, in runs of up to 16 times as many and in longer ones."""
NEAR = 0.1
"""Square of the distance between pivot and mean, in variances, that costs no digit; a run in a hundred is above it."""


def template(values: dict[int, int | float]) -> bytes:
    """The bytes of an argument array with some places filled."""
    integers = Integers()
    floats = Floats.from_buffer(integers)
    for place, value in values.items():
        if isinstance(value, float):
            floats[place] = value
        else:
            integers[place] = value
    return bytes(integers)


@intrinsic
def load_bool(typingctx: Any, address: Any) -> Any:
    """A bool of one byte, as an integer."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.zext(byte, ir.IntType(64))

    return numba.types.int64(numba.types.int64), codegen


@cache
def make_load_valid(storage: Storage) -> Any:
    """`load_valid(address)`: 16 bools as 1 and 0; `load_valid_first(address, n)`: `n` of them, and 0."""
    lane = F64 if storage.is_double else F32

    def spread(builder: Any, raw: Any) -> Any:
        return builder.uitofp(raw, ir.VectorType(lane, LANES))

    @intrinsic
    def load_valid(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], BYTES.as_pointer())
            return spread(builder, builder.load(pointer, align=1))

        return storage.vector(numba.types.int64), codegen

    @intrinsic
    def load_valid_first(typingctx: Any, address: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], BYTES.as_pointer())
            mask, zeros = _first_lanes(builder, args[1]), ir.Constant(BYTES, [0] * LANES)
            arguments = [pointer, ir.Constant(I32, 1), mask, zeros]
            return spread(builder, _call(builder, f"llvm.masked.load.v{LANES}i8.p0", BYTES, arguments))

        return storage.vector(numba.types.int64, numba.types.int64), codegen

    return load_valid, load_valid_first


@inlined
def place(args: Any, index: Any) -> Any:
    """An argument."""
    return load_i64(args + index * 8)


def over_tasks(run: Any) -> Any:
    """A kernel that runs all tasks; every thread has scratch memory of its own.

    `run` is two functions: `begin(args, scratch)`, which returns what all tasks of a thread read, and
    `task(args, task, scratch, common)`.
    """
    begin, one = run

    def kernel(args: Any) -> Any:
        tasks = place(args, TASKS)
        scratch = place(args, SCRATCH) + next_ticket(args + WORKERS * 8) * place(args, WORKER_BYTES)
        task = next_ticket(args)
        if task >= tasks:
            return
        common = begin(args, scratch)
        while task < tasks:
            one(args, task, scratch, common)
            task = next_ticket(args)
        stores_fence()

    return kernel


@intrinsic
def count_up(typingctx: Any, address: Any) -> Any:
    """Add one to the number at `address`, which it was; what was written before is seen by who reads it next."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return numba.types.int64(numba.types.int64), codegen


@intrinsic
def look_up(typingctx: Any, address: Any) -> Any:
    """The number at `address`, and with it all that was written before it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return numba.types.int64(numba.types.int64), codegen


def over_units(first: Any, between: Any, second: Any) -> Any:
    """A kernel of two sweeps over every unit (a group, a sample), with a little work between them.

    `first(args, unit, part, slot)`, `between(args, unit, slot)`, `second(args, unit, part, slot)`. A unit is either
    swept by one thread, which begins the second sweep with what it saw last, or by all of them: the first sweep of the
    next unit comes before the second sweep of this one, so that nobody waits for the last part. Who takes a part of a
    second sweep waits for tickets drawn before its own, which are all being worked on: there is always one that does
    not wait. The parts are the same either way, and so are the results.
    """

    @inlined
    def alone(args: Any, slot: Any) -> Any:
        tasks, block, units, splits = place(args, TASKS), place(args, BLOCK), place(args, UNITS), place(args, SPLITS)
        task = next_ticket(args)
        while task < tasks:
            for unit in range(task * block, smaller((task + 1) * block, units)):
                for part in range(splits):
                    first(args, unit, part, slot)
                between(args, unit, slot)
                for part in range(splits):
                    second(args, unit, splits - 1 - part, slot)
            task = next_ticket(args)

    @inlined
    def together(args: Any) -> Any:
        units, splits = place(args, UNITS), place(args, SPLITS)
        slots, slot_bytes, flags = place(args, SHARED), place(args, SLOT_BYTES), place(args, FLAGS)
        task = next_ticket(args)
        while task < (2 * units + 1) * splits:
            turn, part = task // splits, task % splits
            # turns: first 0, first 1, second 0, first 2, second 1, ...
            if turn == 0 or turn % 2 == 1:
                unit = (turn + 1) // 2
                if unit < units:
                    first(args, unit, part, slots + unit * slot_bytes)
                    if count_up(flags + unit * 16) == splits - 1:
                        between(args, unit, slots + unit * slot_bytes)
                        count_up(flags + unit * 16 + 8)
            else:
                unit = turn // 2 - 1
                while look_up(flags + unit * 16 + 8) == 0:
                    pass
                second(args, unit, part, slots + unit * slot_bytes)
            task = next_ticket(args)

    def kernel(args: Any) -> Any:
        if place(args, IS_SHARED) == 0:
            alone(args, place(args, SCRATCH) + next_ticket(args + WORKERS * 8) * place(args, WORKER_BYTES))
        else:
            together(args)
        stores_fence()

    return kernel


@inlined
def pool(count: Any, mean: Any, var: Any, other_count: Any, other_mean: Any, other_var: Any) -> Any:
    """Mean and variance of two sets of values together."""
    both = count + other_count
    if other_count == 0:
        return both, mean, var
    share = numba.float64(other_count) / both
    step = other_mean - mean
    return both, mean + step * share, var + (other_var - var + step * step * (1.0 - share)) * share


@cache
def make_run_moments(storage: Storage) -> Any:
    """`moments(run, n, 1 / n, is_centred)`: mean and variance of a run; not centred 0 and the mean square."""
    total, about, squares = make_sums(storage)
    splat, is_double = storage.splat, storage.is_double

    @inlined
    def rounded(value: Any) -> Any:
        return value if is_double else numba.float64(numba.float32(value))

    @inlined
    def chunk(run: Any, start: Any, stop: Any, n: Any, per_count: Any, pivot: Any) -> Any:
        """Mean and variance of a chunk; a second time where the pivot turns out to be a bad one."""
        mean = var = 0.0
        for _ in range(2):
            s, q = about(run, start, stop, n, splat(pivot))
            shift = lanes_sum(s) * per_count
            mean = pivot + shift
            var = lanes_sum(widen(q)) * per_count - shift * shift
            if not shift * shift > NEAR * var:
                break
            pivot = rounded(mean)
        return mean, var

    @inlined
    def moments(run: Any, n: Any, per_count: Any, is_centred: Any) -> Any:
        mean = var = 0.0
        if not is_centred:
            for start in range(0, n, CHUNK):
                var += lanes_sum(widen(squares(run, start, smaller(start + CHUNK, n), n)))
            return mean, var * per_count
        head = smaller(HEAD if n <= 16 * HEAD else LONG_HEAD, n)
        pivot = rounded(lanes_sum(total(run, 0, head, n)) / head)
        if n <= CHUNK:
            mean, var = chunk(run, 0, n, n, per_count, pivot)
            return mean, 0.0 if var < 0.0 else var
        for start in range(0, n, CHUNK):
            stop = smaller(start + CHUNK, n)
            count = numba.float64(stop - start)
            other, spread = chunk(run, start, stop, n, 1.0 / count, pivot)
            _, mean, var = pool(numba.float64(start), mean, var, count, other, spread)
            pivot = rounded(mean)
        return mean, 0.0 if var < 0.0 else var

    return moments


@cache
def make_masked_moments(storage: Storage) -> Any:
    """`moments(run, valid, n, is_centred)`: count, mean and variance of the valid ones of `n` values."""
    load, load_first, splat = storage.load, storage.load_first, storage.splat
    size, is_double = storage.bytes, storage.is_double
    load_valid, load_valid_first = make_load_valid(storage)

    @inlined
    def values_at(run: Any, valid: Any, i: Any, n: Any) -> Any:
        if n < LANES:
            return load_first(run, n, splat(0.0)), load_valid_first(valid, n)
        return load(run + i * size), load_valid(valid + i)

    @inlined
    def sums(run: Any, valid: Any, start: Any, stop: Any, n: Any, pivot: Any) -> Any:
        """How many are valid, and the sums of their distances from the pivot and of the squares of those."""
        c = s = q = zero = splat(0.0)
        for i in range(start, stop, LANES):
            left = stop - i
            value, is_valid = values_at(run, valid, i if left >= LANES else larger(stop - LANES, 0), n)
            if left < LANES and n >= LANES:
                is_valid = keep_last(is_valid, left)
            value = where_positive(is_valid, value - pivot, zero)
            c, s, q = c + is_valid, s + value, fma(value, value, q)
        return lanes_sum(c), lanes_sum(widen(s)), lanes_sum(widen(q))

    @inlined
    def moments(run: Any, valid: Any, n: Any, is_centred: Any) -> Any:
        count = mean = var = 0.0
        for start in range(0, n, CHUNK):
            stop = smaller(start + CHUNK, n)
            found, total, squares = sums(run, valid, start, stop, n, splat(0.0))
            if found > 0.0:
                if is_centred:
                    pivot = total / found if is_double else numba.float64(numba.float32(total / found))
                    _, shift, squares = sums(run, valid, start, stop, n, splat(pivot))
                    shift /= found
                    squares = squares / found - shift * shift
                    count, mean, var = pool(count, mean, var, found, pivot + shift, squares)
                else:
                    count, mean, var = pool(count, mean, var, found, 0.0, squares / found)
        return count, mean, var

    return moments


@cache
def make_prepare(storage: Storage) -> Any:
    """`prepare(args, out, repeated)`: weights, then biases, in the arithmetic's precision; where they are."""
    lane, is_double = storage.lane_bytes, storage.is_double

    @inlined
    def keep(address: Any, value: Any) -> Any:
        if is_double:
            store_f64(address, value)
        else:
            store_f32(address, value)

    @inlined
    def prepare(args: Any, out: Any, repeated: Any) -> Any:
        weight, bias = place(args, WEIGHT), place(args, BIAS)
        if place(args, IS_PREPARED) != 0:
            return weight, bias
        count = place(args, GROUPS) * place(args, CHANNELS)
        weight_bytes, bias_bytes = place(args, WEIGHT_BYTES), place(args, BIAS_BYTES)
        offset = load_f64(args + WEIGHT_OFFSET * 8)
        biases = out + count * repeated * lane
        for c in range(count):
            w, b = parameter(weight, weight_bytes, c, 1.0), parameter(bias, bias_bytes, c, 0.0)
            for i in range(c * repeated, (c + 1) * repeated):
                keep(out + i * lane, w + offset)
                keep(biases + i * lane, b)
        for i in range(count * repeated, count * repeated + LANES):
            keep(biases + i * lane, 0.0)
        return out, biases

    return prepare


def make_affine() -> Any:
    """The last sums: dweight and dbias of every parameter out of the parts, in their order."""

    @inlined
    def begin(args: Any, scratch: Any) -> Any:
        return 0

    @inlined
    def task(args: Any, task: Any, scratch: Any, common: Any) -> Any:
        products, totals, repeated = place(args, PRODUCTS), place(args, TOTALS), place(args, REPEATED)
        parts, block, width = place(args, PARTS), place(args, BLOCK), place(args, GROUPS) * place(args, CHANNELS)
        first, last = task * block, smaller((task + 1) * block, width)
        dweight, dbias = place(args, DWEIGHT), place(args, DBIAS)
        # The first part's sums are added to, where they are.
        for part in range(parts):
            for c in range(first, last):
                product = total = 0.0
                o = (part * width + c) * repeated * 8
                for i in range(o, o + repeated * 8, 8):
                    product += load_f64(products + i)
                    total += load_f64(totals + i)
                at_c = c * repeated * 8
                if part > 0:
                    product += load_f64(products + at_c)
                    total += load_f64(totals + at_c)
                store_f64(products + at_c, product)
                store_f64(totals + at_c, total)
        for c in range(first, last):
            product, total = load_f64(products + c * repeated * 8), load_f64(totals + c * repeated * 8)
            if place(args, IS_NARROW) != 0:
                store_f32(dweight + c * 4, product)
                store_f32(dbias + c * 4, total)
            else:
                store_f64(dweight + c * 8, product)
                store_f64(dbias + c * 8, total)

    return over_tasks((begin, task))


@cache
def make_add(storage: Storage) -> Any:
    """`add(x, addend, total, n)`: total = x + addend, rounded to the tensor's dtype."""
    load, load_first, splat = storage.load, storage.load_first, storage.splat
    store, store_first, size = storage.store, storage.store_first, storage.bytes

    @inlined
    def add(x: Any, addend: Any, total: Any, n: Any) -> Any:
        for i in range(0, n, LANES):
            o, left = i * size, n - i
            if left >= LANES:
                store(total + o, load(x + o) + load(addend + o))
            else:
                value = load_first(x + o, left, splat(0.0)) + load_first(addend + o, left, splat(0.0))
                store_first(total + o, left, value)

    return add


@cache
def make_zero(storage: Storage) -> Any:
    """`zero(y, n)`: n zeros."""
    store, store_first, splat, size = storage.store, storage.store_first, storage.splat, storage.bytes

    @inlined
    def zero(y: Any, n: Any) -> Any:
        for i in range(0, n, LANES):
            if n - i >= LANES:
                store(y + i * size, splat(0.0))
            else:
                store_first(y + i * size, n - i, splat(0.0))

    return zero


@cache
def make_write(storage: Storage, value_at: Any) -> Any:
    """Write a run of `n` values, each vector made by `value_at(run, i, n, factors)` from element `i` on.

    The end that does not fill a vector is done by one that overlaps the vector before it, made before anything is
    written, so that `out` may be read from. `streams` needs an output that nothing is read from.
    """
    store, store_first, stream, size = storage.store, storage.store_first, storage.stream, storage.bytes

    @inlined
    def write(run: Any, out: Any, n: Any, factors: Any, streams: Any) -> Any:
        if n < LANES:
            store_first(out, n, value_at(run, 0, n, factors))
            return
        last = value_at(run, n - LANES, LANES, factors)
        i = 0
        if streams:
            ahead = (-(out // size)) % LANES
            if ahead != 0:
                store(out, value_at(run, 0, LANES, factors))
                i = ahead
            while i + LANES <= n:
                stream(out + i * size, value_at(run, i, LANES, factors))
                i += LANES
        else:
            while i + LANES <= n:
                store(out + i * size, value_at(run, i, LANES, factors))
                i += LANES
        if i < n:
            store(out + (n - LANES) * size, last)

    return write
