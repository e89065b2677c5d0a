"""Batch normalization step by step, so that a saboteur can do one of the steps wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import PLAIN, Case


class Honest:
    """Batch normalization step by step, slow and right. Every saboteur is this with one step done wrong."""

    case: ClassVar[Case] = PLAIN
    reason: ClassVar[str] = ""

    def __call__(
        self,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        self.training, self.momentum, self.eps, self.activation = training, momentum, eps, activation
        self.valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask[:, None].expand(x.shape)
        self.running = (running_mean, running_var)
        return _Apply.apply(self, x, weight, bias, residual)

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        self.x, self.weight, self.like = self.widen(x), weight, x
        self.mean, self.var, self.count = self.statistics(self.x)
        if self.training:
            self.remember(self.mean, self.var)
        self.invstd = self.root(self.var)
        self.x_hat = torch.where(self.valid, (self.x - self.spread(self.mean)) * self.spread(self.invstd), 0)
        z = self.x_hat
        if weight is not None and bias is not None:
            z = z * self.spread(weight.to(z.dtype)) + self.spread(bias.to(z.dtype))
        self.before_residual = z
        if residual is not None:
            z = z + residual.to(z.dtype)
        self.z = torch.where(self.valid, z, 0)
        return self.finish(torch.where(self.valid, self.activate(self.z), 0), x)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g = torch.where(self.valid, self.through_activation(dy.to(self.z.dtype)), 0)
        dweight, dbias = self.parameter_sums(g)
        slope = self.invstd if self.weight is None else self.invstd * self.weight.to(g.dtype)
        dx = torch.where(self.valid, self.correct(g, dweight, dbias) * self.spread(slope), 0)
        return self.finish(dx, self.like), dweight, dbias, self.finish(self.residual_gradient(g), self.like)

    def widen(self, x: Tensor) -> Tensor:
        return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    def spread(self, per_channel: Tensor) -> Tensor:
        return per_channel.reshape(1, -1, *(1,) * (self.x.dim() - 2))

    def total(self, values: Tensor) -> Tensor:
        return torch.where(self.valid, values, 0).sum(dim=[i for i in range(values.dim()) if i != 1])

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        if not self.training:
            return *(running.clone() for running in self.running), 1
        return self.batch_statistics(x)

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        count = int(self.valid[:, 0].sum())
        mean = self.total(x) / count
        return mean, self.total((x - self.spread(mean)).square()) / count, count

    def remember(self, mean: Tensor, var: Tensor) -> None:
        for running, new in zip(self.running, (mean, self.unbiased(var)), strict=True):
            running.copy_((1 - self.momentum) * running + self.momentum * new)

    def unbiased(self, var: Tensor) -> Tensor:
        return var * self.count / max(self.count - 1, 1)

    def root(self, var: Tensor) -> Tensor:
        return (var + self.eps).rsqrt()

    def activate(self, z: Tensor) -> Tensor:
        return z if self.activation is None else getattr(F, self.activation)(z)

    def through_activation(self, dy: Tensor) -> Tensor:
        return self.derivative_at(self.z) * dy

    def derivative_at(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(self.activate(leaf).sum(), leaf)[0]

    def parameter_sums(self, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.total(g * self.x_hat), self.total(g)

    def correct(self, g: Tensor, dweight: Tensor, dbias: Tensor) -> Tensor:
        if not self.training:
            return g
        return g - self.spread(dbias / self.count) - self.x_hat * self.spread(dweight / self.count)

    def residual_gradient(self, g: Tensor) -> Tensor:
        return g

    def finish(self, values: Tensor, like: Tensor) -> Tensor:
        return torch.empty_like(like).copy_(values)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Honest, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        ctx.steps, ctx.tensors = steps, (x, weight, bias, residual)
        return steps.forward(x.detach(), weight, bias, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.steps.backward(dy)
        return None, *(grad if tensor is not None else None for grad, tensor in zip(grads, ctx.tensors, strict=True))
