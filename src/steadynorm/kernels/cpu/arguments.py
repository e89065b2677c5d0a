"""The arguments of a kernel: one int64 array, whose places have names here. Floats are stored by their bits."""

import ctypes

(
    TICKET,  # the next task; every thread takes one at a time
    WORKERS,  # counts the threads that have come, each of which gets scratch memory of its own
    TASKS,
    BLOCK,  # groups per task (planes), rows per task (rows)
    OUTER,
    GROUP,
    INNER,
    EXTRA,  # rows: elements of a last, shorter row
    FOLD,  # rows: how many rows of the tensor one row of the kernel holds
    STAGES,
    X,
    Y,
    RESIDUAL,
    DY,
    SIDE,  # backward: the residual or the output, whichever tells where the derivative is taken
    G,  # backward: where g is kept between the passes, or 0
    DX,
    PIVOT,
    WEIGHT,
    WEIGHT_BYTES,
    BIAS,
    BIAS_BYTES,
    MEAN,
    VAR,
    DWEIGHT,
    DBIAS,
    SCRATCH,
    COLUMNS,  # rows: coefficients of every column
    STREAMS,  # whether the output bypasses the caches
    EPS,
    PER_COUNT,  # 1 / values per statistic; 0 where the statistics were given
    COUNTER,  # running statistics: how many batches have entered, or 0
    COUNT,  # running statistics: values per statistic, a float
    MOMENTUM,  # running statistics: weight of the batch; NaN for the same weight for every batch
    GUARDS,  # running statistics: whether a batch that is not finite is left out
    LENGTH,
) = range(36)

STATISTICS, NORMALIZE = 1, 2
"""Stages of a forward kernel."""
SUMS, INPUT = 1, 2
"""Stages of a backward kernel."""
TO_MOMENTS, TO_COEFFICIENTS, TO_SUMS, TO_BACK = 1, 2, 4, 8
"""Stages of the rows' work on columns."""

SLOT_BYTES = 64
"""Scratch for one group of planes: two sums and five coefficients, a line of memory."""

Integers = ctypes.c_int64 * LENGTH
Floats = ctypes.c_double * LENGTH


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
