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
    IS_OUTPUT,  # whether SIDE is the output
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
    LENGTH,
) = range(33)

STATISTICS, NORMALIZE = 1, 2
"""Stages of a forward kernel."""
SUMS, INPUT = 1, 2
"""Stages of a backward kernel."""
TO_MOMENTS, TO_COEFFICIENTS, TO_SUMS, TO_BACK = 1, 2, 4, 8
"""Stages of the rows' work on columns."""

SLOT = 2 * 16 * 8 + 64
"""Bytes of scratch for one group of planes: two sums of 16 float64, and the coefficients."""


class Arguments:
    """An argument array by name; `address` is what a kernel takes."""

    def __init__(self) -> None:
        self.integers = (ctypes.c_int64 * LENGTH)()
        self.floats = (ctypes.c_double * LENGTH).from_buffer(self.integers)
        self.address = ctypes.addressof(self.integers)

    def restart(self, tasks: int, stages: int = 0) -> int:
        """Set the tickets back for another launch; returns the address."""
        self.integers[TICKET] = self.integers[WORKERS] = 0
        self.integers[TASKS] = tasks
        self.integers[STAGES] = stages
        return self.address

