"""The contract of a backend, held against the oracle function by function (see steadynorm/kernels/__init__.py)."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steadynorm import grouping as grouping_
from steadynorm.grouping import Grouping
from steadynorm.kernels import FROM_OUTPUT
from tests import agree, oracles
from tests.agree import Bound
from tests.cases import Case

# A variance in one pass around a pivot pays (mean − pivot)² / var more roundings; among a hundred channels of few
# values some pivot is two deviations off.
PIVOT = 4


class Bench:
    """The tensors of one case as a backend takes them, and what the oracle says about each result."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        self.inputs = inputs = case.inputs()
        self.expectation = agree.ask(oracles.batch_norm, inputs, case)
        dy = agree.cotangent(self.expectation, inputs, case)
        self.expected = agree.bounds(self.expectation, inputs, case, dy)
        self.x, self.grouping = grouping_.batch(inputs.x)
        self.dy = grouping_.dense_like(dy, self.x)
        self.residual = None if inputs.residual is None else grouping_.dense_like(inputs.residual, self.x)
        self.mask = None
        if inputs.mask is not None:
            self.mask = inputs.mask.reshape(self.grouping.outer, self.grouping.inner)
        ahead = self.expectation.ahead
        self.mean, self.var = torch.from_numpy(ahead.mean.copy()), torch.from_numpy(ahead.var.copy())
        self.count = torch.tensor(ahead.count) if case.training else None
        grads = self.expectation.gradients(agree.array(dy))
        self.dweight, self.dbias = torch.from_numpy(grads.dweight.copy()), torch.from_numpy(grads.dbias.copy())
        self.g = torch.empty_like(self.x).copy_(torch.from_numpy(grads.dresidual))
        if device != "cpu":
            self._move(device)

    def _move(self, device: str) -> None:
        for owner in (self, self.inputs):
            for name, value in list(vars(owner).items()):
                if isinstance(value, Tensor):
                    setattr(owner, name, value.to(device))

    def tensors(self) -> list[Tensor]:
        found = [self.x, self.dy, self.g, self.residual, self.mask, self.mean, self.var, self.dweight, self.dbias]
        return [t for t in (*found, self.inputs.weight, self.inputs.bias) if t is not None]

    def check_last(self, **results: Tensor | None) -> None:
        """`check`, of sums that were rounded to the dtypes of weight and bias."""
        for name, parameter in (("dweight", self.inputs.weight), ("dbias", self.inputs.bias)):
            found = results[name]
            assert found is not None
            if parameter is not None:
                assert found.dtype == parameter.dtype, name
                assert found.shape == (self.grouping.group,), name
                bound = self.expected[name]
                rounding = torch.finfo(parameter.dtype).eps / 2 * np.abs(bound.expected)
                _close(f"{self.case.name}: {name}", found, replace(bound, allowed=bound.allowed + rounding))
                del results[name]
        self.check(**results)

    def check(self, **results: Tensor | None) -> None:
        """Compare results with the oracle's by name, and their form with the contract's."""
        for name, found in results.items():
            assert found is not None, name
            bound = self.expected["dresidual" if name == "g" else name] if name not in ("mean", "var") else None
            if name in ("y", "dx", "g"):
                assert found.dtype == self.x.dtype, name
                assert found.shape == self.x.shape, name
                assert found.stride() == self.x.stride() or found.numel() <= 1, f"{name} is not in the order of x"
            else:
                assert found.dtype == torch.float64, name
                assert found.shape == (self.grouping.group,), name
            _close(f"{self.case.name}: {name}", found, bound or self.statistic(name))

    def statistic(self, name: str) -> Bound:
        """Mean and variance of the batch, whatever the case normalises with; no allowance for a large mean."""
        mean, var, count = oracles.moments(agree.array(self.inputs.x), agree.array(self.inputs.mask))
        relative = agree.tolerance(self.case.dtype, count)
        unit = agree.tolerance(self.case.dtype, 1) / agree.ROUNDINGS
        if name == "mean":
            size = np.abs(mean) + np.sqrt(var)
            return Bound(mean, relative * size, unit * size)
        return Bound(var, PIVOT * relative * var + (unit * mean) ** 2, unit * var)


def _close(name: str, found: Tensor, bound: Bound) -> None:
    error = np.abs(agree.array(found) - bound.expected)
    error = np.where(np.isnan(error), np.inf, error)
    worst = float((error - bound.allowed).max(initial=-np.inf))
    assert worst <= 0, f"{name} is off by {error.max():.3g}, {worst:.3g} more than is allowed"


def assert_keeps_contract(backend: ModuleType, case: Case, device: str = "cpu") -> None:
    """Each of the four functions alone, on exact inputs, and the two fusions; inputs stay as they were."""
    bench = Bench(case, device)
    before = [agree.memory(tensor) for tensor in bench.tensors()]
    x, grouping, mask, weight, bias = bench.x, bench.grouping, bench.mask, bench.inputs.weight, bench.inputs.bias
    statistics = (bench.mean, bench.var)
    settings: tuple[Any, ...] = (mask, case.eps, case.activation)

    mean, var = backend.moments(x, grouping, mask)
    bench.check(mean=mean, var=var)
    y = backend.normalize(x, grouping, *statistics, weight, bias, bench.residual, *settings)
    bench.check(y=y)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = [t.to(dtype) for t in statistics]
        found = backend.normalize(x, grouping, *narrow, weight, bias, bench.residual, *settings)
        widened = [t.double() for t in narrow]
        wanted = backend.normalize(x, grouping, *widened, weight, bias, bench.residual, *settings)
        assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)), f"statistics in {dtype} count as others"
    for kept in _ways_to_know_z(bench, y):
        ahead = (bench.dy, x, grouping, *statistics, weight, bias, *kept, *settings)
        g, dweight, dbias = backend.backward_sums(*ahead)
        bench.check(g=g, dweight=dweight, dbias=dbias)
        dx, dweight, dbias, g = backend.backward(*ahead, not case.training, True)
        bench.check_last(dx=dx, dweight=dweight, dbias=dbias, g=g)
        _, _, _, g = backend.backward(*ahead, not case.training, False)
        assert g is None
        for needs_dresidual in (False, True):
            # Of weight and bias nobody wants anything: what is in the sums is not said, what is in the rest is.
            dx, _, _, g = backend.backward(*ahead, not case.training, needs_dresidual, False)
            bench.check(dx=dx, **({"g": g} if needs_dresidual else {}))
    sums = (bench.dweight, bench.dbias, bench.count)
    bench.check(dx=backend.backward_input(bench.g, x, grouping, *statistics, weight, *sums, mask, case.eps))
    if case.training:
        y, mean, var = backend.forward(x, grouping, weight, bias, bench.residual, *settings)
        bench.check(y=y, mean=mean, var=var)
    for tensor, bytes_before in zip(bench.tensors(), before, strict=True):
        assert torch.equal(agree.memory(tensor), bytes_before), "an input was written to"


def _ways_to_know_z(bench: Bench, y: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    """What the forward pass may have kept: (residual, y)."""
    if bench.residual is None or bench.case.activation is None:
        return [(None, None)]
    ways: list[tuple[Tensor | None, Tensor | None]] = [(bench.residual, None)]
    return [*ways, (None, y)] if bench.case.activation in FROM_OUTPUT else ways


def everything(backend: ModuleType, x: Tensor, dy: Tensor, grouping: Grouping, **options: Any) -> list[Tensor]:
    """Every tensor that a forward and a backward pass give, to compare bits."""
    y, mean, var = backend.forward(x, grouping, **options)
    dx, dweight, dbias, g = backend.backward(dy, x, grouping, mean, var, needs_dresidual=True, **options)
    return [y, mean, var, dx, dweight, dbias, *([] if g is None else [g])]
