"""Statistics of groups that are one run of memory, with a weight for every channel: GroupNorm and InstanceNorm.

A unit is a (sample, group), swept while it is in the cache; where there are few of them, or large ones, all threads
share each. A part of a unit is some whole channels, or a piece of one. The sums of a channel's gradients are kept for
every sample and added at the end.
"""

from functools import cache
from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.samples import (
    make_add,
    make_load_valid,
    make_masked_moments,
    make_run_moments,
    make_write,
    over_units,
    place,
    pool,
)
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    keep_last,
    lanes_sum,
    larger,
    load_f64,
    parameter,
    smaller,
    square_root_of,
    store_f64,
    where_positive,
)

CHUNK = 64 * LANES
"""Values of a run added in the arithmetic's precision: 32 terms a lane in each of two chains."""
COUNT, MEAN, VAR = 0, 8, 16
"""Places in the slot of a part, forward."""
SLOT = 24
FIRST, SECOND = 0, 8
"""Places in the slot of a unit, backward: the means of h and of h·x̂."""


@inlined
def extent(args: Any, part: Any) -> Any:
    """A part of a unit: its first and last channel, and its values in each of them."""
    cuts, splits, inner = place(args, at.CUTS), place(args, at.SPLITS), place(args, at.INNER)
    channels = place(args, at.CHANNELS)
    if cuts > 1:
        start = part % cuts * place(args, at.PIECE)
        return part // cuts, part // cuts + 1, start, smaller(start + place(args, at.PIECE), inner)
    each = (channels + splits - 1) // splits
    return smaller(part * each, channels), smaller((part + 1) * each, channels), 0, inner


def make_forward(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    """Statistics of a group, then y = activation(x̂ · weight + bias + residual) channel by channel."""
    moments, masked_moments, add = make_run_moments(storage), make_masked_moments(storage), make_add(storage)
    size = storage.bytes

    @inlined
    def first(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        start, stop, low, high = extent(args, part)
        inner, total = place(args, at.INNER), place(args, at.TOTAL)
        is_centred = place(args, at.IS_CENTRED) != 0
        o = ((unit * place(args, at.CHANNELS) + start) * inner + low) * size
        n = (stop - start) * (high - low)
        x = place(args, at.X) + o
        if total != 0:
            add(x, place(args, at.ADDEND) + o, total + o, n)
            x = total + o
        count = mean = var = 0.0
        if is_masked:
            valid = place(args, at.MASK) + unit // place(args, at.GROUPS) * inner + low
            for c in range(stop - start):
                found, other, spread = masked_moments(x + c * inner * size, valid, high - low, is_centred)
                count, mean, var = pool(count, mean, var, found, other, spread)
        elif n > 0:
            count = numba.float64(n)
            mean, var = moments(x, n, 1.0 / n, is_centred)
        store_f64(slot + part * SLOT + COUNT, count)
        store_f64(slot + part * SLOT + MEAN, mean)
        store_f64(slot + part * SLOT + VAR, var)

    @inlined
    def between(args: Any, unit: Any, slot: Any) -> Any:
        count = mean = var = 0.0
        for part in range(slot, slot + place(args, at.SPLITS) * SLOT, SLOT):
            found, other, spread = load_f64(part + COUNT), load_f64(part + MEAN), load_f64(part + VAR)
            count, mean, var = pool(count, mean, var, found, other, spread)
        store_f64(place(args, at.MEAN) + unit * 8, mean)
        store_f64(place(args, at.VAR) + unit * 8, var)

    return over_units(first, between, _make_normalize(storage, activation, is_masked))


@cache
def _make_coefficients(storage: Storage) -> Any:
    """Of a group: `high`, the mean as far as the precision goes, what it is too much, and 1/σ; then of a channel."""
    is_double = storage.is_double

    @inlined
    def of_group(args: Any, unit: Any) -> Any:
        mean, var = load_f64(place(args, at.MEAN) + unit * 8), load_f64(place(args, at.VAR) + unit * 8)
        high = mean if is_double else numba.float64(numba.float32(mean))
        return high, high - mean, 1.0 / square_root_of(var + load_f64(args + at.EPS * 8))

    @inlined
    def of_channel(args: Any, c: Any) -> Any:
        weight = parameter(place(args, at.WEIGHT), place(args, at.WEIGHT_BYTES), c, 1.0)
        bias = parameter(place(args, at.BIAS), place(args, at.BIAS_BYTES), c, 0.0)
        return weight + load_f64(args + at.WEIGHT_OFFSET * 8), bias

    return of_group, of_channel


@cache
def _make_normalize(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    apply, _ = activations.make(storage, activation)
    load, load_first, splat, size = storage.load, storage.load_first, storage.splat, storage.bytes
    of_group, of_channel = _make_coefficients(storage)
    load_valid, load_valid_first = make_load_valid(storage)

    @inlined
    def value_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, residual, valid = run
        high, scale, shift = factors
        if n == LANES:
            z = fma(load(x + i * size) - high, scale, shift)
            if residual != 0:
                z = z + load(residual + i * size)
        else:
            z = fma(load_first(x, n, high) - high, scale, shift)
            if residual != 0:
                z = z + load_first(residual, n, high)
        if is_masked:
            is_valid = load_valid(valid + i) if n == LANES else load_valid_first(valid, n)
            return where_positive(is_valid, apply(z), splat(0.0))
        return apply(z)

    write = make_write(storage, value_at)

    @inlined
    def second(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        start, stop, low, high = extent(args, part)
        inner, channels = place(args, at.INNER), place(args, at.CHANNELS)
        groups, total, residual = place(args, at.GROUPS), place(args, at.TOTAL), place(args, at.RESIDUAL)
        x, y = total if total != 0 else place(args, at.X), place(args, at.Y)
        streams = place(args, at.STREAMS) != 0
        centre, rest, invstd = of_group(args, unit)
        valid = place(args, at.MASK) + unit // groups * inner + low
        group = unit % groups * channels
        for c in range(start, stop):
            o = ((unit * channels + c) * inner + low) * size
            weight, bias = of_channel(args, group + c)
            scale = weight * invstd
            factors = splat(centre), splat(scale), splat(bias + rest * scale)
            write((x + o, residual + o if residual != 0 else 0, valid), y + o, high - low, factors, streams)

    return second


@cache
def _make_gradient(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    """x − high and g of a vector, both zero where nothing is valid."""
    _, back = activations.make(storage, activation)
    has_activation, size = activation is not None, storage.bytes
    load, load_first, splat = storage.load, storage.load_first, storage.splat
    load_valid, load_valid_first = make_load_valid(storage)

    @inlined
    def values_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, dy, side, valid, is_output = run
        high, scale, shift = factors
        zero, o = splat(0.0), i * size
        beside = zero
        if n == LANES:
            centred, value = load(x + o) - high, load(dy + o)
            if has_activation and side != 0:
                beside = load(side + o)
        else:
            centred, value = load_first(x, n, high) - high, load_first(dy, n, zero)
            if has_activation and side != 0:
                beside = load_first(side, n, zero)
        if has_activation:
            value = back(beside, value) if is_output else back(fma(centred, scale, shift) + beside, value)
        if is_masked:
            is_valid = load_valid(valid + i) if n == LANES else load_valid_first(valid, n)
            return where_positive(is_valid, centred, zero), where_positive(is_valid, value, zero)
        return centred, value

    return values_at


def make_backward(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    """h = g · weight; dx = (h − mean(h) − x̂ · mean(h·x̂)) · invstd + dtotal, the first mean only where it is centred."""
    values_at = _make_gradient(storage, activation, is_masked)
    sums, (of_group, of_channel) = _make_sums(storage, values_at), _make_coefficients(storage)
    splat, size = storage.splat, storage.bytes

    @inlined
    def first(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        start, stop, low, high = extent(args, part)
        inner, channels, cuts = place(args, at.INNER), place(args, at.CHANNELS), place(args, at.CUTS)
        groups, x, dy = place(args, at.GROUPS), place(args, at.X), place(args, at.DY)
        side, g, is_output = place(args, at.SIDE), place(args, at.G), place(args, at.IS_OUTPUT) != 0
        products, totals = place(args, at.PRODUCTS), place(args, at.TOTALS)
        centre, rest, invstd = of_group(args, unit)
        valid = place(args, at.MASK) + unit // groups * inner + low
        group = unit % groups * channels
        for c in range(start, stop):
            o = ((unit * channels + c) * inner + low) * size
            weight, bias = of_channel(args, group + c)
            scale = weight * invstd
            factors = splat(centre), splat(scale), splat(bias + rest * scale)
            run = x + o, dy + o, side + o if side != 0 else 0, valid, is_output
            total, product = sums(run, g + o if g != 0 else 0, high - low, factors)
            at_c = ((unit * channels + c) * cuts + part % cuts) * 8
            store_f64(totals + at_c, total)
            store_f64(products + at_c, (product + rest * total) * invstd)

    @inlined
    def between(args: Any, unit: Any, slot: Any) -> Any:
        channels, cuts, groups = place(args, at.CHANNELS), place(args, at.CUTS), place(args, at.GROUPS)
        products, totals = place(args, at.PRODUCTS), place(args, at.TOTALS)
        of_mean = of_var = 0.0
        for c in range(channels):
            weight, _ = of_channel(args, unit % groups * channels + c)
            at_c = (unit * channels + c) * cuts * 8
            for k in range(at_c, at_c + cuts * 8, 8):
                of_mean += weight * load_f64(totals + k)
                of_var += weight * load_f64(products + k)
        count = channels * place(args, at.INNER)
        if is_masked:
            count = 0
            valid = place(args, at.MASK) + unit // groups * place(args, at.INNER)
            for i in range(place(args, at.INNER)):
                count += at.load_bool(valid + i)
            count = larger(count * channels, 1)
        store_f64(slot + FIRST, of_mean / count if place(args, at.IS_CENTRED) != 0 else 0.0)
        store_f64(slot + SECOND, of_var / count)

    return over_units(first, between, _make_input(storage, values_at, is_masked))


@cache
def _make_sums(storage: Storage, values_at: Any) -> Any:
    """Σ g and Σ g·(x − high) of a run; g kept where asked for."""
    store, store_first, splat, size = storage.store, storage.store_first, storage.splat, storage.bytes

    @inlined
    def sums(run: Any, g: Any, n: Any, factors: Any) -> Any:
        total = product = 0.0
        if n < LANES:
            centred, value = values_at(run, 0, n, factors)
            if g != 0:
                store_first(g, n, value)
            return lanes_sum(value), lanes_sum(value * centred)
        # The end is read before anything is written near it, for g may be kept where it is read.
        last, last_value = values_at(run, n - LANES, LANES, factors)
        whole = n // LANES * LANES
        for start in range(0, whole, CHUNK):
            s0 = p0 = s1 = p1 = splat(0.0)
            stop = smaller(start + CHUNK, whole)
            i = start
            while i + 2 * LANES <= stop:
                centred, value = values_at(run, i, LANES, factors)
                other_centred, other = values_at(run, i + LANES, LANES, factors)
                if g != 0:
                    store(g + i * size, value)
                    store(g + (i + LANES) * size, other)
                s0, p0 = s0 + value, fma(value, centred, p0)
                s1, p1 = s1 + other, fma(other, other_centred, p1)
                i += 2 * LANES
            if i < stop:
                centred, value = values_at(run, i, LANES, factors)
                if g != 0:
                    store(g + i * size, value)
                s0, p0 = s0 + value, fma(value, centred, p0)
            total += lanes_sum(s0 + s1)
            product += lanes_sum(p0 + p1)
        if whole < n:
            if g != 0:
                store(g + (n - LANES) * size, last_value)
            value = keep_last(last_value, n - whole)
            total += lanes_sum(value)
            product += lanes_sum(value * keep_last(last, n - whole))
        return total, product

    return sums


@cache
def _make_input(storage: Storage, values_at: Any, is_masked: bool) -> Any:
    load, load_first, splat, size = storage.load, storage.load_first, storage.splat, storage.bytes
    of_group, of_channel = _make_coefficients(storage)
    load_valid, load_valid_first = make_load_valid(storage)

    @inlined
    def value_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        inputs, g, dtotal = run
        to_z, (scale, slope, centre) = factors
        x, _, _, valid, _ = inputs
        high, zero, o = to_z[0], splat(0.0), i * size
        if g != 0:
            centred = load(x + o) - high if n == LANES else load_first(x, n, high) - high
            value = load(g + o) if n == LANES else load_first(g, n, zero)
        else:
            centred, value = values_at(inputs, i, n, to_z)
        more = zero
        if dtotal != 0:
            more = load(dtotal + o) if n == LANES else load_first(dtotal, n, zero)
        value = fma(centred, slope, fma(value, scale, centre)) + more
        if is_masked:
            return where_positive(load_valid(valid + i) if n == LANES else load_valid_first(valid, n), value, zero)
        return value

    write = make_write(storage, value_at)

    @inlined
    def second(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        start, stop, low, high = extent(args, part)
        inner, channels, groups = place(args, at.INNER), place(args, at.CHANNELS), place(args, at.GROUPS)
        x, dy, dx = place(args, at.X), place(args, at.DY), place(args, at.DX)
        side, g, dtotal = place(args, at.SIDE), place(args, at.G), place(args, at.DTOTAL)
        is_output, streams = place(args, at.IS_OUTPUT) != 0, place(args, at.STREAMS) != 0
        mean, rest, invstd = of_group(args, unit)
        slope = -load_f64(slot + SECOND) * invstd * invstd
        centre = slope * rest - load_f64(slot + FIRST) * invstd
        valid = place(args, at.MASK) + unit // groups * inner + low
        group = unit % groups * channels
        for c in range(start, stop):
            o = ((unit * channels + c) * inner + low) * size
            weight, bias = of_channel(args, group + c)
            scale = weight * invstd
            to_z = splat(mean), splat(scale), splat(bias + rest * scale)
            to_dx = splat(scale), splat(slope), splat(centre)
            inputs = x + o, dy + o, side + o if side != 0 else 0, valid, is_output
            run = inputs, g + o if g != 0 else 0, dtotal + o if dtotal != 0 else 0
            write(run, dx + o, high - low, (to_z, to_dx), streams)

    return second
