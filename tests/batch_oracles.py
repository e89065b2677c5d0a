"""The relatives of batch normalization long-hand, in NumPy float64, on top of tests/oracles.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tests import oracles
from tests.oracles import Array, Expectation, Forward, Gradients, Mask, backward, ema, forward, moments, unbiased

Given = tuple[Array, Array] | None


def in_parts(
    x: Array,
    parts: Sequence[tuple[Array, Given]],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    activation: str | None,
    mask: Mask | None,
) -> tuple[Forward, Callable[[Array], Gradients]]:
    """Batch normalization of sets of samples, each on its own: (numbers of the samples, given statistics or None).

    The statistics in the Forward are the ones of the whole that make for the widest tolerance.
    """

    def of(array, samples):
        return None if array is None else array[samples]

    ahead = [
        forward(
            x[samples],
            weight=weight,
            bias=bias,
            eps=eps,
            residual=of(residual, samples),
            activation=activation,
            mask=of(mask, samples),
            given=given,
        )
        for samples, given in parts
    ]
    whole = {name: np.zeros(x.shape) for name in ("x_hat", "z", "y")}
    for name, array in whole.items():
        for (samples, _), part in zip(parts, ahead, strict=True):
            array[samples] = getattr(part, name)
    means = np.stack([part.mean for part in ahead])
    largest = np.take_along_axis(means, np.abs(means).argmax(0)[None], 0)[0]
    var = np.stack([part.var for part in ahead]).min(0)
    together = Forward(mean=largest, var=var, count=len(x), invstd=1.0 / np.sqrt(var + eps), **whole)

    def gradients(dy: Array) -> Gradients:
        found = [
            backward(
                dy[samples],
                part,
                weight=weight,
                activation=activation,
                mask=of(mask, samples),
                is_given=given is not None,
            )
            for (samples, given), part in zip(parts, ahead, strict=True)
        ]
        dx, dresidual = np.zeros(x.shape), np.zeros(x.shape)
        for (samples, _), gradient in zip(parts, found, strict=True):
            dx[samples], dresidual[samples] = gradient.dx, gradient.dresidual
        return Gradients(dx, sum(g.dweight for g in found), sum(g.dbias for g in found), dresidual)

    return together, gradients


def ghost(
    x,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    *,
    residual=None,
    activation=None,
    mask=None,
    sizes,
):
    """Slices of `sizes` samples; remembered is the whole batch."""
    starts = np.cumsum([0, *sizes])
    ranges = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    given = None if training else (running_mean, running_var)
    parts = [(samples, given) for samples in (ranges if training else [np.arange(len(x))])]
    ahead, gradients = in_parts(x, parts, weight, bias, eps, residual, activation, mask)
    mean, var, count = moments(x, mask)
    if training:
        running_mean = ema(running_mean, mean, momentum)
        running_var = ema(running_var, unbiased(var, count), momentum)
    return Expectation(dataclasses.replace(ahead, count=count), running_mean, running_var, gradients)


def renorm(
    x,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    *,
    residual=None,
    activation=None,
    mask=None,
    rmax,
    dmax,
):
    """y = act(weight · (x̂ · r + d) + bias + residual), with r and d constants in the gradients."""
    options = {"residual": residual, "activation": activation, "mask": mask}
    if not training:
        return oracles.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps, **options)
    mean, var, count = moments(x, mask)
    deviation = np.sqrt(running_var + eps)
    r = np.clip(np.sqrt(var + eps) / deviation, 1 / rmax, rmax)
    d = np.clip((mean - running_mean) / deviation, -dmax, dmax)
    weight, bias = (value if value is not None else other for value, other in ((weight, 1 + 0 * r), (bias, 0 * r)))
    plain = forward(x, weight=weight * r, bias=bias + weight * d, eps=eps, **options)
    valid = oracles.everywhere(mask, x)
    corrected = np.where(valid, plain.x_hat * oracles.spread(r, x.ndim) + oracles.spread(d, x.ndim), 0.0)

    def gradients(dy: Array) -> Gradients:
        found = backward(dy, plain, weight=weight * r, activation=activation, mask=mask)
        return dataclasses.replace(found, dweight=oracles.total(found.dresidual * corrected, valid))

    # Sizes of numbers are those after the correction.
    ahead = dataclasses.replace(plain, x_hat=corrected, invstd=plain.invstd * r * (1 + np.abs(plain.x_hat).max()))
    return Expectation(
        ahead, ema(running_mean, mean, momentum), ema(running_var, unbiased(var, count), momentum), gradients
    )


def domain(
    x,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    *,
    residual=None,
    activation=None,
    mask=None,
    ids,
    elsewhere,
):
    """Two domains, each a batch of its own. The running statistics are those of domain 0; 1 has `elsewhere`."""
    parts = []
    for number, rows in enumerate(((running_mean, running_var), elsewhere)):
        samples = np.flatnonzero(ids == number)
        if len(samples):
            parts.append((samples, None if training else rows))
    ahead, gradients = in_parts(x, parts, weight, bias, eps, residual, activation, mask)
    ours = ids == 0
    mean, var, count = moments(x[ours], None if mask is None else mask[ours])
    if training and count > 1:
        running_mean = ema(running_mean, mean, momentum)
        running_var = ema(running_var, unbiased(var, count), momentum)
    return Expectation(ahead, running_mean, running_var, gradients)
