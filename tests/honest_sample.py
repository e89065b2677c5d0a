"""Normalization within samples step by step, so that a saboteur can do one of the steps wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.sample_cases import SampleCase, SampleInputs


class HonestSample:
    """Slow and right. Every saboteur is this with one step done wrong."""

    case: ClassVar[str] = "group, plain"
    reason: ClassVar[str] = ""

    def __call__(self, case: SampleCase, inputs: SampleInputs) -> tuple[Tensor, Tensor | None]:
        self.case_, self.inputs = case, inputs
        self.labels, self.weights = (torch.from_numpy(labels.copy()) for labels in case.labels())
        x = inputs.x
        self.valid = (
            torch.ones_like(x, dtype=torch.bool) if inputs.mask is None else inputs.mask[:, None].expand(x.shape)
        )
        y, total = _Apply.apply(self, x, inputs.addend, inputs.weight, inputs.bias, inputs.residual)
        return y, None if inputs.addend is None else total

    def forward(
        self, x: Tensor, addend: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total = self.add(x, addend)
        self.x = torch.where(self.valid, self.widen(total), 0)
        self.count = self.sum_by(torch.ones_like(self.x)).clamp(min=1)
        self.mean, self.var = self.statistics(self.x)
        self.invstd = self.root(self.var)
        self.x_hat = torch.where(self.valid, (self.x - self.mean) * self.invstd, 0)
        self.scale = torch.ones_like(self.x) if weight is None else self.scaled(self.per_channel(weight))
        z = self.x_hat * self.scale
        if bias is not None:
            z = z + self.per_channel(bias)
        if self.inputs.residual is not None:
            z = z + self.widen(self.inputs.residual)
        self.z = torch.where(self.valid, z, 0)
        y = torch.where(self.valid, self.activate(self.z), 0)
        return self.finish(y), total

    def backward(self, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        g = torch.where(self.valid, self.derivative() * self.widen(dy), 0)
        dx = self.correct(g * self.scale) * self.invstd
        if dtotal is not None:
            dx = self.with_sum_gradient(dx, self.widen(dtotal))
        dx = torch.where(self.valid, dx, 0)
        dweight, dbias = (self.per_weight(of) for of in self.parameter_terms(g))
        return (
            self.finish(dx),
            self.finish(self.addend_gradient(dx)),
            dweight,
            dbias,
            self.finish(self.residual_gradient(g)),
        )

    def add(self, x: Tensor, addend: Tensor | None) -> Tensor:
        return x.clone() if addend is None else x + addend

    def widen(self, x: Tensor) -> Tensor:
        return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    def per_channel(self, weight: Tensor) -> Tensor:
        return self.widen(weight).flatten()[self.weights]

    def scaled(self, weight: Tensor) -> Tensor:
        return weight + self.case_.weight_offset

    def sum_by(self, values: Tensor) -> Tensor:
        return self.add_up(torch.where(self.valid, values, 0), self.labels)[self.labels]

    def per_weight(self, values: Tensor) -> Tensor:
        return self.add_up(values, self.weights)

    def add_up(self, values: Tensor, labels: Tensor) -> Tensor:
        totals = values.new_zeros(int(labels.max()) + 1, dtype=torch.float64)
        return totals.scatter_add_(0, labels.flatten(), values.double().flatten()).to(values.dtype)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.average(x) if self.case_.is_centred else torch.zeros_like(x)
        return mean, self.average((x - mean).square())

    def average(self, x: Tensor) -> Tensor:
        return self.sum_by(x) / self.count

    def root(self, var: Tensor) -> Tensor:
        return (var + self.case_.eps).rsqrt()

    def activate(self, z: Tensor) -> Tensor:
        return z if self.case_.activation is None else getattr(F, self.case_.activation)(z)

    def derivative(self) -> Tensor:
        with torch.enable_grad():
            leaf = self.z.detach().requires_grad_()
            return torch.autograd.grad(self.activate(leaf).sum(), leaf)[0]

    def correct(self, h: Tensor) -> Tensor:
        inside = h - self.x_hat * self.average(h * self.x_hat)
        return inside - self.average(h) if self.case_.is_centred else inside

    def with_sum_gradient(self, dx: Tensor, dtotal: Tensor) -> Tensor:
        return dx + dtotal

    def addend_gradient(self, dx: Tensor) -> Tensor:
        return dx

    def parameter_terms(self, g: Tensor) -> tuple[Tensor, Tensor]:
        return g * self.x_hat, g

    def residual_gradient(self, g: Tensor) -> Tensor:
        return g

    def finish(self, values: Tensor) -> Tensor:
        return torch.empty_like(self.inputs.x).copy_(values)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: HonestSample, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.steps, ctx.others = steps, (x, *others)
        addend, weight, bias, _ = others
        return steps.forward(x.detach(), addend, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        addend = ctx.others[1]
        grads = ctx.steps.backward(dy, None if addend is None else dtotal)
        return None, *(
            None if tensor is None else grad.reshape(tensor.shape).to(tensor.dtype)
            for grad, tensor in zip(grads, ctx.others, strict=True)
        )
