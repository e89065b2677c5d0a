"""`moments.ema_` in one launch: a single program, since one channel that is not finite keeps all of them out."""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.tiles import count_of


@triton.jit
def ema(
    running_mean, running_var, tracked, mean, var, count, plain_count, momentum, momentum_rest, group,
    GUARD: tl.constexpr, IS_CUMULATIVE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """running += weight · (batch − running), unless the batch is empty or, with GUARD, not finite.

    `tracked` counts the batches that entered, or is None. The momentum comes in two float32 parts.
    """
    n = count_of(count, plain_count)
    enters = n > 0
    if GUARD:
        bad = tl.zeros((CHANNELS,), tl.int32)
        for start in tl.range(0, group, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            size = tl.abs(tl.load(mean + channel, mask=channel < group, other=0.0))
            size += tl.abs(tl.load(var + channel, mask=channel < group, other=0.0))
            bad += tl.where(size < float("inf"), 0, 1)
        enters = enters & (tl.sum(bad, 0) == 0)
    weight = tl.cast(momentum, tl.float64) + tl.cast(momentum_rest, tl.float64)
    if tracked is not None:
        batches = tl.load(tracked) + enters.to(tl.int64)
        # Every thread has read the counter before one of them writes it.
        tl.debug_barrier()
        tl.store(tracked, batches)
        if IS_CUMULATIVE:
            weight = 1.0 / tl.maximum(batches, 1).to(tl.float64)
    unbiased = n / tl.maximum(n - 1, 1)
    for start in tl.range(0, group, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        there = channel < group
        old = tl.load(running_mean + channel, mask=there, other=0.0).to(tl.float64)
        new = tl.load(mean + channel, mask=there, other=0.0)
        tl.store(running_mean + channel, tl.where(enters, old + weight * (new - old), old), mask=there)
        old = tl.load(running_var + channel, mask=there, other=0.0).to(tl.float64)
        new = tl.load(var + channel, mask=there, other=0.0) * unbiased
        tl.store(running_var + channel, tl.where(enters, old + weight * (new - old), old), mask=there)
