"""Kernels: what a backend implements, and which backend a tensor gets.

A backend is a module with four functions over a dense `(outer, group, inner)` view, and their two fusions:

    moments(x, grouping, mask)                                              -> mean, var
    normalize(x, grouping, mean, var, weight, bias, residual, mask, eps, activation) -> y
    backward_sums(dy, x, grouping, mean, var, weight, bias, residual, y, mask, eps, activation)
                                                                            -> g, dweight, dbias
    backward_input(g, x, grouping, mean, var, weight, dweight, dbias, count, eps)    -> dx

    forward  = moments, then normalize
    backward = backward_sums, then backward_input

An all-reduce (of moments going forward, of the two sums coming back) fits between the four, which is why they are
the contract; the fusions exist because one pass over memory is what a single process pays for.

    x̂ = (x − mean) / sqrt(var + eps)      z = weight · x̂ + bias + residual      y = activation(z)
    g = dy · activation'(z)               dbias = Σ g      dweight = Σ g·x̂      dresidual = g
    dx = weight / sqrt(var + eps) · (g − dbias / count − x̂ · dweight / count)

Every backend keeps this: `x`, `residual`, `y`, `dy`, `g` are dense in memory in the order (outer, group, inner), in
one dtype, and outputs come in the memory order of `x`; mean, var and the two sums are float64 (group,); weight and
bias are (group,) or None in any float dtype; `mask` is bool (outer, inner), True where a value is valid: where it is
False a value enters no statistic and no sum, and y, g and dx are zero whatever x holds; inputs are never written to;
a result does not depend on the number of threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from steadynorm.errors import BackendError, InputError
from steadynorm.kernels import reference

ACTIVATIONS = reference.ACTIVATIONS
FROM_OUTPUT = frozenset({"relu", "leaky_relu", "relu6"})
"""Activations whose derivative can be read off the output, which the next layer keeps anyway."""

BACKENDS = ("numba", "reference")

_forced: ContextVar[str | None] = ContextVar("steadynorm_backend", default=None)


class Status(NamedTuple):
    """One line of `steadynorm backends`."""

    name: str
    is_available: bool
    reason: str


def status() -> list[Status]:
    """Which backends can run here, for which tensors, and why not."""
    from steadynorm.kernels import numba_cpu

    lines = []
    reason = numba_cpu.why_not()
    lines.append(Status("numba", not reason, reason or "CPU tensors: float32, float64, bfloat16, float16"))
    lines.append(Status("reference", True, "any device and dtype, plain PyTorch"))
    return lines


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for everything inside the block.

    Raises:
        InputError: the name is not one of `BACKENDS`.
        BackendError: the backend cannot run here, or (at a call) cannot take a tensor it is given.
    """
    if name not in BACKENDS:
        raise InputError(f"backend got {name!r}, expected one of {', '.join(BACKENDS)}: see `steadynorm backends`.")
    for line in status():
        if line.name == name and not line.is_available:
            raise BackendError(f"backend {name!r} cannot run here: {line.reason}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(x: Tensor, *, masked: bool = False) -> ModuleType:
    """The backend for a tensor: the fastest that takes it, or the one that `backend` names."""
    from steadynorm.kernels import numba_cpu

    forced = _forced.get()
    if forced == "reference":
        return reference
    reason = numba_cpu.why_not(x, masked=masked)
    if not reason:
        return numba_cpu
    if forced is not None:
        raise BackendError(f"backend 'numba' was asked for and cannot take this tensor: {reason}.")
    return reference
