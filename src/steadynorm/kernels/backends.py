"""Which backend a tensor gets, and how to ask for one."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from steadynorm.errors import BackendError, InputError
from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import numba_cpu, reference, reference_sample, triton_gpu

BACKENDS = ("numba", "triton", "reference")

_forced: ContextVar[str | None] = ContextVar("steadynorm_backend", default=None)


class Status(NamedTuple):
    """One line of `steadynorm backends`."""

    name: str
    is_available: bool
    reason: str


def status() -> list[Status]:
    """Which backends can run here, for which tensors, and why not."""
    lines = []
    reason = numba_cpu.why_not()
    lines.append(Status("numba", not reason, reason or "CPU tensors: float32, float64, bfloat16, float16"))
    reason = triton_gpu.why_not()
    lines.append(Status("triton", not reason, reason or triton_gpu.takes()))
    lines.append(Status("reference", True, "any device and dtype, plain PyTorch"))
    return lines


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for everything inside the block, and for the backward passes of what is called there.

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


forced = _forced.get
"""The backend that `backend` names here, or None."""


def choose(x: Tensor, *, masked: bool = False) -> ModuleType:
    """The backend for a tensor: the fastest that takes it, or the one that `backend` names."""
    named = forced()
    if named == "reference":
        return reference
    compiled = triton_gpu if _is_for_triton(x, named) else numba_cpu
    reason = compiled.why_not(x, masked=masked)
    if not reason:
        return compiled
    return _instead(reference, named, reason)


def _is_for_triton(x: Tensor, named: str | None) -> bool:
    return named == "triton" or (named is None and not x.is_cpu)


def _instead(module: ModuleType, named: str | None, reason: str) -> ModuleType:
    """The reference, unless a backend was asked for, which is never replaced without a word."""
    if named is not None:
        raise BackendError(f"backend {named!r} was asked for and cannot take this tensor: {reason}.")
    return module


@cache
def _sample(name: str) -> ModuleType | None:
    name = f"steadynorm.kernels.{name}"
    return import_module(name) if find_spec(name) is not None else None


def choose_sample(x: Tensor, grouping: SampleGrouping, *, masked: bool = False) -> ModuleType:
    """`choose`, for normalization within a sample."""
    named = forced()
    if named == "reference":
        return reference_sample
    compiled = _sample("triton_sample" if _is_for_triton(x, named) else "numba_sample")
    reason = "its kernels are not here" if compiled is None else compiled.why_not(x, grouping, masked=masked)
    if compiled is not None and not reason:
        return compiled
    return _instead(reference_sample, named, reason)
