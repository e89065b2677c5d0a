"""The formulas long-hand, in NumPy float64: what every implementation is held to.

Nothing of the project is imported and nothing of torch. Arrays are (N, C, *), whatever their memory order was;
per-channel values are (C,). A mask is (N, *spatial), true where a value counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

LEAKY_SLOPE = 0.01
ELU_ALPHA = 1.0

# Where the derivative jumps, or where its one-sided values differ: no gradient is compared next to these points.
KINKS: dict[str | None, tuple[float, ...]] = {
    None: (),
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    "silu": (),
    "gelu": (),
    "elu": (),
}

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def activate(z: Array, activation: str | None) -> Array:
    """act(z), each as torch.nn.functional defines it with its default arguments."""
    match activation:
        case None:
            return z.copy()
        case "relu":
            return np.maximum(z, 0.0)
        case "leaky_relu":
            return np.where(z > 0, z, LEAKY_SLOPE * z)
        case "relu6":
            return np.clip(z, 0.0, 6.0)
        case "hardswish":
            return z * np.clip(z + 3.0, 0.0, 6.0) / 6.0
        case "silu":
            return z * _sigmoid(z)
        case "gelu":
            return z * 0.5 * (1.0 + _erf(z / math.sqrt(2.0)))
        case "elu":
            return np.where(z > 0, z, ELU_ALPHA * np.expm1(np.minimum(z, 0.0)))
    raise ValueError(f"no such activation: {activation}")


def activation_derivative(z: Array, activation: str | None) -> Array:
    """d act / dz at z."""
    one = np.ones_like(z)
    match activation:
        case None:
            return one
        case "relu":
            return np.where(z > 0, 1.0, 0.0)
        case "leaky_relu":
            return np.where(z > 0, 1.0, LEAKY_SLOPE)
        case "relu6":
            return np.where((z > 0) & (z < 6), 1.0, 0.0)
        case "hardswish":
            return np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3.0 + 0.5))
        case "silu":
            s = _sigmoid(z)
            return s * (1.0 + z * (1.0 - s))
        case "gelu":
            density = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
            return 0.5 * (1.0 + _erf(z / math.sqrt(2.0))) + z * density
        case "elu":
            return np.where(z > 0, 1.0, ELU_ALPHA * np.exp(np.minimum(z, 0.0)))
    raise ValueError(f"no such activation: {activation}")


def spread(per_channel: Array, ndim: int) -> Array:
    """(C,) as (1, C, 1, ...), to meet an array of `ndim` dimensions."""
    return per_channel.reshape(1, -1, *(1,) * (ndim - 2))


def everywhere(mask: Mask | None, x: Array) -> Mask:
    """The mask of every single value of x (N, C, *): all true where there is none."""
    if mask is None:
        return np.ones(x.shape, dtype=bool)
    return np.broadcast_to(np.expand_dims(mask, 1), x.shape)


def total(values: Array, valid: Mask) -> Array:
    """Sum per channel over the valid values."""
    return np.where(valid, values, 0.0).sum(axis=tuple(i for i in range(values.ndim) if i != 1))


def moments(x: Array, mask: Mask | None = None) -> tuple[Array, Array, int]:
    """Mean (C,), biased variance (C,) and count of each channel of x (N, C, *), in two passes."""
    valid = everywhere(mask, x)
    count = valid.size // x.shape[1] if mask is None else int(mask.sum())
    if count == 0:
        return np.zeros(x.shape[1]), np.zeros(x.shape[1]), 0
    mean = total(x, valid) / count
    residue = np.where(valid, x - spread(mean, x.ndim), 0.0)
    # The second sum repairs the rounding of the mean: it would be zero in exact arithmetic.
    mean_residue = total(residue, valid) / count
    var = total(residue**2, valid) / count - mean_residue**2
    return mean + mean_residue, var, count


def unbiased(var: Array, count: int) -> Array:
    """The variance with Bessel's factor; of a single value, zero."""
    return var * (count / max(count - 1, 1))


def ema(running: Array, new: Array, momentum: float | None, batches_before: int = 0) -> Array:
    """running + momentum · (new − running); with momentum None the plain average of all batches so far."""
    weight = 1.0 / (batches_before + 1) if momentum is None else momentum
    return (1.0 - weight) * running + weight * new


@dataclass(frozen=True)
class Forward:
    """Everything a forward pass determines: `x_hat` is normalized, `z` is what enters the activation, `y` leaves it."""

    x_hat: Array
    z: Array
    y: Array
    mean: Array
    var: Array
    count: int
    invstd: Array


@dataclass(frozen=True)
class Gradients:
    """The gradients of Σ dy · y. Those of padding are zero."""

    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array


def forward(
    x: Array,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    residual: Array | None = None,
    activation: str | None = None,
    mask: Mask | None = None,
    given: tuple[Array, Array] | None = None,
) -> Forward:
    """y = act((x − mean) / sqrt(var + eps) · weight + bias + residual), zero in the padding.

    Mean and variance are those of the batch, or `given` ones.
    """
    valid = everywhere(mask, x)
    mean, var, count = moments(x, mask)
    if given is not None:
        mean, var = given
    invstd = 1.0 / np.sqrt(var + eps)
    x_hat = np.where(valid, (x - spread(mean, x.ndim)) * spread(invstd, x.ndim), 0.0)
    z = x_hat.copy()
    if weight is not None:
        z = z * spread(weight, x.ndim)
    if bias is not None:
        z = z + spread(bias, x.ndim)
    if residual is not None:
        z = z + residual
    z = np.where(valid, z, 0.0)
    y = np.where(valid, activate(z, activation), 0.0)
    return Forward(x_hat, z, y, mean, var, count, invstd)


def backward(
    dy: Array,
    ahead: Forward,
    *,
    weight: Array | None = None,
    activation: str | None = None,
    mask: Mask | None = None,
    is_given: bool = False,
) -> Gradients:
    """Gradients of Σ dy · y, with statistics of the batch or (`is_given`) fixed ones.

    g = dy · act'(z);  dbias = Σ g;  dweight = Σ g · x̂;
    dx = weight · invstd · (g − Σ g / n − x̂ · Σ g·x̂ / n), the two corrections only where x moves the statistics.
    """
    valid = everywhere(mask, dy)
    g = np.where(valid, dy * activation_derivative(ahead.z, activation), 0.0)
    dbias = total(g, valid)
    dweight = total(g * ahead.x_hat, valid)
    slope = ahead.invstd if weight is None else weight * ahead.invstd
    inside = g
    if not is_given and ahead.count:
        inside = g - spread(dbias / ahead.count, dy.ndim) - ahead.x_hat * spread(dweight / ahead.count, dy.ndim)
    dx = np.where(valid, inside * spread(slope, dy.ndim), 0.0)
    return Gradients(dx, dweight, dbias, g)


@dataclass(frozen=True)
class Expectation:
    """What one call of batch normalization must give: the forward pass, the running statistics after it, gradients."""

    ahead: Forward
    running_mean: Array
    running_var: Array
    gradients: Callable[[Array], Gradients]


def batch_norm(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    mask: Mask | None = None,
) -> Expectation:
    """Batch normalization with statistics of the batch (training) or running ones (evaluation)."""
    ahead = forward(
        x,
        weight=weight,
        bias=bias,
        eps=eps,
        residual=residual,
        activation=activation,
        mask=mask,
        given=None if training else (running_mean, running_var),
    )
    if training and ahead.count:
        running_mean = ema(running_mean, ahead.mean, momentum)
        running_var = ema(running_var, unbiased(ahead.var, ahead.count), momentum)

    def gradients(dy: Array) -> Gradients:
        return backward(dy, ahead, weight=weight, activation=activation, mask=mask, is_given=not training)

    return Expectation(ahead, running_mean, running_var, gradients)


@dataclass(frozen=True)
class WeightExpectation:
    """A weight computed from others, and the gradients of Σ dweight · weight, one for each of them."""

    weight: Array
    gradients: Callable[[Array], tuple[Array, ...]]


def _but(dim: int | None, ndim: int) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d != dim)


def weight_norm(g: Array, v: Array, *, dim: int | None = 0, eps: float = 1e-12) -> WeightExpectation:
    """g · v / ‖v‖ over all dimensions but `dim`; zero, with zero gradients, where ‖v‖ is at most eps.

    dg = Σ dw · v / ‖v‖;  dv = g / ‖v‖ · (dw − v · Σ dw·v / ‖v‖²)
    """
    axes = _but(dim, v.ndim)
    length = np.sqrt((v**2).sum(axis=axes, keepdims=True))
    is_long = length > eps
    safe = np.where(is_long, length, 1.0)
    unit = np.where(is_long, v / safe, 0.0)

    def gradients(dw: Array) -> tuple[Array, ...]:
        along = (dw * unit).sum(axis=axes, keepdims=True)
        dv = np.where(is_long, g.reshape(length.shape) / safe * (dw - unit * along), 0.0)
        return along.reshape(g.shape), dv

    return WeightExpectation(g.reshape(length.shape) * unit, gradients)


def weight_standardization(
    v: Array, gain: Array | None = None, *, constant: float = 1.0, eps: float = 1e-6
) -> WeightExpectation:
    """(v − mean) / sqrt(var + eps) per output, times gain · constant / sqrt(fan_in) where there is a gain."""
    axes = _but(0, v.ndim)
    fan_in = v[0].size
    centred = v - v.mean(axis=axes, keepdims=True)
    invstd = 1.0 / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + eps)
    standard = centred * invstd
    scale = np.ones((v.shape[0], *(1,) * (v.ndim - 1)))
    if gain is not None:
        scale = gain.reshape(scale.shape) * constant / math.sqrt(fan_in)

    def gradients(dw: Array) -> tuple[Array, ...]:
        inside = dw * scale
        along = (inside * standard).mean(axis=axes, keepdims=True)
        dv = invstd * (inside - inside.mean(axis=axes, keepdims=True) - standard * along)
        if gain is None:
            return (dv,)
        return dv, (dw * standard).sum(axis=axes) * constant / math.sqrt(fan_in)

    return WeightExpectation(standard * scale, gradients)


def spectral_norm(v: Array, *, dim: int = 0) -> WeightExpectation:
    """v / σ, σ the largest singular value of v as (dim, everything else), by a singular value decomposition.

    dv = dw / σ − (Σ dw·v / σ²) · u₁ ⊗ v₁
    """
    matrix = np.moveaxis(v, dim, 0).reshape(v.shape[dim], -1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    sigma = float(values[0])

    def gradients(dw: Array) -> tuple[Array, ...]:
        direction = np.outer(left[:, 0], right[0]).reshape(np.moveaxis(v, dim, 0).shape)
        return (dw / sigma - (dw * v).sum() / sigma**2 * np.moveaxis(direction, 0, dim),)

    return WeightExpectation(v / sigma, gradients)


def input_norm(x: Array) -> tuple[Array, Array, Array]:
    """Mean (C,), deviation (C,) and normalised values of data (N, C, *); NaN is missing, and 0 in the result.

    A constant column is centred only.
    """
    columns = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    mean, deviation = np.zeros(len(columns)), np.zeros(len(columns))
    for i, column in enumerate(columns):
        values = column[~np.isnan(column)]
        if values.size:
            mean[i] = math.fsum(values) / values.size
            deviation[i] = math.sqrt(math.fsum((values - mean[i]) ** 2) / values.size)
        if values.size and values.min() == values.max():
            mean[i], deviation[i] = values[0], 0.0
    scale = np.where(deviation > 0, deviation, 1.0)
    z = (x - spread(mean, x.ndim)) / spread(scale, x.ndim)
    return mean, deviation, np.where(np.isnan(x), 0.0, z)


Labels = NDArray[np.intp]
"""For every value of a tensor, the number of the statistic it belongs to; or of the weight it is multiplied by."""


def label_rows(shape: tuple[int, ...], dims: int) -> tuple[Labels, Labels]:
    """Statistics and weights of a layer norm over the last `dims` dimensions."""
    width = math.prod(shape[len(shape) - dims :])
    place = np.arange(math.prod(shape)).reshape(shape)
    return place // max(width, 1), place % max(width, 1)


def label_groups(shape: tuple[int, ...], groups: int) -> tuple[Labels, Labels]:
    """Statistics and weights of a group norm of (N, C, *)."""
    sample, channel, *_ = np.indices(shape)
    return sample * groups + channel // (shape[1] // groups), channel


def label_positions(shape: tuple[int, ...]) -> tuple[Labels, Labels]:
    """Statistics and weights of a layer norm of (N, C, *) over C."""
    place = np.arange(shape[0] * math.prod(shape[2:])).reshape(shape[0], 1, *shape[2:])
    return np.broadcast_to(place, shape), np.indices(shape)[1]


@dataclass(frozen=True)
class Within:
    """What a normalization within samples determines, value by value: `mean`, `var`, `count` in the shape of x."""

    x_hat: Array
    z: Array
    y: Array
    mean: Array
    var: Array
    count: Array
    invstd: Array
    scale: Array
    gradients: Callable[[Array, Array | None], Gradients]


def total_by(labels: Labels, values: Array) -> Array:
    """The sum over all values of one label, at each of its places."""
    return np.bincount(labels.ravel(), values.ravel(), int(labels.max(initial=0)) + 1)[labels]


def within_samples(
    x: Array,
    statistics: Labels,
    weights: Labels,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    residual: Array | None = None,
    activation: str | None = None,
    mask: Mask | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
) -> Within:
    """y = act((x − mean) / sqrt(var + eps) · (weight_offset + weight) + bias + residual), zero in the padding.

    Not centred, the mean is held at zero. The gradients are those of Σ dy · y, plus `dtotal` at x.
    """
    valid = everywhere(mask, x)
    values = np.where(valid, x, 0.0)
    count = np.maximum(total_by(statistics, valid.astype(np.float64)), 1.0)

    def average(of: Array) -> Array:
        return total_by(statistics, np.where(valid, of, 0.0)) / count

    mean = average(values)
    # The second sum repairs the rounding of the first.
    mean = mean + average(values - mean) if is_centred else np.zeros_like(x)
    var = average((values - mean) ** 2)
    invstd = 1.0 / np.sqrt(var + eps)
    x_hat = np.where(valid, (values - mean) * invstd, 0.0)
    scale = np.ones_like(x) if weight is None else weight_offset + weight.ravel()[weights]
    z = x_hat * scale
    if bias is not None:
        z = z + bias.ravel()[weights]
    if residual is not None:
        z = z + residual
    z = np.where(valid, z, 0.0)
    y = np.where(valid, activate(z, activation), 0.0)

    def gradients(dy: Array, dtotal: Array | None = None) -> Gradients:
        g = np.where(valid, dy * activation_derivative(z, activation), 0.0)
        inside = g * scale - x_hat * average(g * scale * x_hat)
        if is_centred:
            inside = inside - average(g * scale)
        dx = inside * invstd if dtotal is None else inside * invstd + dtotal
        width = int(weights.max(initial=-1)) + 1
        dweight, dbias = (np.bincount(weights.ravel(), of.ravel(), width) for of in (g * x_hat, g))
        return Gradients(np.where(valid, dx, 0.0), dweight, dbias, g)

    return Within(x_hat, z, y, mean, var, count, invstd, scale, gradients)
