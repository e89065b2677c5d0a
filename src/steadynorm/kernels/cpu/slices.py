"""What slices of a batch have in common: their statistics pooled, and the sums of their parameters' gradients."""

from typing import Any

from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    itself,
    load_f64,
    load_i64,
    load_v64,
    next_ticket,
    smaller,
    splat64,
    store_f64,
    store_vector,
)

(
    TICKET,
    SLICES,
    GROUP,
    SHARES,  # of each slice in all values, float64; they add up to 1
    MEAN,  # (slices, group) float64, as are the next three
    VAR,
    DWEIGHT,
    DBIAS,
    FIRST,  # (group,) float64: the pooled means, or the sums of DWEIGHT
    SECOND,  # the pooled variances, or the sums of DBIAS
    LENGTH,
) = range(11)

BLOCK = 8 * LANES
"""Columns of a task: a few lines of memory of every slice."""


def _over_columns(of_vector: Any, of_one: Any) -> Any:
    """A kernel that runs one of the two over all columns, block by block."""

    def kernel(args: Any) -> Any:
        group = load_i64(args + GROUP * 8)
        task = next_ticket(args)
        while task * BLOCK < group:
            stop = smaller((task + 1) * BLOCK, group)
            c = task * BLOCK
            while c + LANES <= stop:
                of_vector(args, c * 8)
                c += LANES
            while c < stop:
                of_one(args, c * 8)
                c += 1
            task = next_ticket(args)

    return kernel


def _make_pool(load: Any, store: Any, splat: Any, multiply_add: Any) -> Any:
    """mean = Σ share · mean; var = Σ share · (var + (mean_slice − mean)²), about the first slice's mean."""

    @inlined
    def pool(args: Any, o: Any) -> Any:
        slices, apart, shares = load_i64(args + SLICES * 8), load_i64(args + GROUP * 8) * 8, load_i64(args + SHARES * 8)
        means, variances = load_i64(args + MEAN * 8) + o, load_i64(args + VAR * 8) + o
        pivot = load(means)
        shift = square = var = splat(0.0)
        for i in range(slices):
            share, away = splat(load_f64(shares + i * 8)), load(means + i * apart) - pivot
            weighted = share * away
            shift, square = shift + weighted, multiply_add(weighted, away, square)
            var = multiply_add(share, load(variances + i * apart), var)
        # Slices lie about as far from the first as from their mean, so this subtraction costs no digits that matter.
        store(load_i64(args + FIRST * 8) + o, pivot + shift)
        store(load_i64(args + SECOND * 8) + o, var + (square - shift * shift))

    return pool


def _make_add(load: Any, store: Any, splat: Any) -> Any:
    @inlined
    def add(args: Any, o: Any) -> Any:
        slices, apart = load_i64(args + SLICES * 8), load_i64(args + GROUP * 8) * 8
        dweights, dbiases = load_i64(args + DWEIGHT * 8) + o, load_i64(args + DBIAS * 8) + o
        dweight = dbias = splat(0.0)
        for i in range(slices):
            dweight = dweight + load(dweights + i * apart)
            dbias = dbias + load(dbiases + i * apart)
        store(load_i64(args + FIRST * 8) + o, dweight)
        store(load_i64(args + SECOND * 8) + o, dbias)

    return add


@inlined
def _multiply_add(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


def make_pool(_: Storage) -> Any:
    """The Moments of all slices together, from those of each."""
    return _over_columns(
        _make_pool(load_v64, store_vector, splat64, fma), _make_pool(load_f64, store_f64, itself, _multiply_add)
    )


def make_add(_: Storage) -> Any:
    """The sums over all slices of the gradients of weight and bias."""
    return _over_columns(_make_add(load_v64, store_vector, splat64), _make_add(load_f64, store_f64, itself))
