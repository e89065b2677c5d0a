"""`assert_agrees` must reject what is wrong, for the right reason, and accept what is right."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import cases, oracles
from tests.agree import assert_agrees
from tests.cases import BRAIN, Case

PLAIN = cases.PLAIN


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


class BiasedRunningVar(Honest):
    reason = "running_var"

    def unbiased(self, var):
        return var


class UnbiasedNormalization(Honest):
    reason = "y is off"

    def root(self, var):
        return super().root(self.unbiased(var))


class EpsOutsideTheRoot(Honest):
    reason = "y is off"

    def root(self, var):
        return 1 / (var.sqrt() + self.eps)


class EpsForgotten(Honest):
    case = cases.BY_NAME["tiny variance"]
    reason = "y is off"

    def root(self, var):
        return var.rsqrt()


class MomentumTurnedRound(Honest):
    reason = "running_mean"

    def remember(self, mean, var):
        self.momentum = 1 - self.momentum
        super().remember(mean, var)


class StaleRunningMean(Honest):
    reason = "running_mean"

    def remember(self, mean, var):
        super().remember(self.running[0].clone(), var)


class RunningStatisticsMoveInEvaluation(Honest):
    case = cases.BY_NAME["plain, evaluation"]
    reason = "an input was overwritten"

    def statistics(self, x):
        given = super().statistics(x)
        mean, var, self.count = self.batch_statistics(x)
        self.remember(mean, var)
        return given


class BatchStatisticsInEvaluation(Honest):
    case = cases.BY_NAME["plain, evaluation"]
    reason = "y is off"

    def statistics(self, x):
        return self.batch_statistics(x)


class ZeroDx(Honest):
    reason = "dx is off"

    def correct(self, g, dweight, dbias):
        return torch.zeros_like(g)


class NoFirstCorrection(Honest):
    reason = "dx is off"

    def correct(self, g, dweight, dbias):
        return g - self.x_hat * self.spread(dweight / self.count)


class NoSecondCorrection(Honest):
    reason = "dx is off"

    def correct(self, g, dweight, dbias):
        return g - self.spread(dbias / self.count)


class NoSecondCorrectionOfMany(NoSecondCorrection):
    case = cases.BY_NAME["long"]


class CorrectionsInEvaluation(Honest):
    case = cases.BY_NAME["plain, evaluation"]
    reason = "dx is off"

    def correct(self, g, dweight, dbias):
        self.training, self.count = True, self.valid[:, 0].sum()
        return super().correct(g, dweight, dbias)


class WeightGradientOfTheInput(Honest):
    reason = "dweight is off"

    def parameter_sums(self, g):
        return self.total(g * self.x), self.total(g)


class BiasGradientBeforeTheActivation(Honest):
    case = cases.BY_NAME["silu"]
    reason = "dbias is off"

    def through_activation(self, dy):
        self.dy = dy
        return super().through_activation(dy)

    def parameter_sums(self, g):
        return self.total(g * self.x_hat), self.total(self.dy)


class GroupsInterleaved(Honest):
    """Channels-last memory read as if it were plain."""

    case = cases.BY_NAME["channels last"]
    reason = "y is off"

    def widen(self, x):
        return super().widen(x).permute(0, 2, 3, 1).reshape(x.shape)


class PaddingCounted(Honest):
    case = cases.BY_NAME["lengths"]
    reason = "running_mean"

    def batch_statistics(self, x):
        count = x.numel() // x.shape[1]
        mean = self.total(x) / count
        return mean, self.total((x - self.spread(mean)).square()) / count, count


class PaddingLeaks(Honest):
    case = cases.BY_NAME["lengths"]
    reason = "y is off"

    def total(self, values):
        return values.sum(dim=[i for i in range(values.dim()) if i != 1])


class MeanOfSampleMeans(Honest):
    case = cases.BY_NAME["lengths"]
    reason = "running_mean"

    def batch_statistics(self, x):
        _, _, count = super().batch_statistics(x)
        samples = torch.where(self.valid, x, 0).sum(2) / self.valid.sum(2)
        mean = samples.mean(0)
        return mean, self.total((x - self.spread(mean)).square()) / count, count


class GradientInThePadding(Honest):
    case = cases.BY_NAME["lengths, add, relu"]
    reason = "dresidual is off"

    def residual_gradient(self, g):
        return torch.where(self.valid, g, 1.0)


class StatisticsInBfloat16(Honest):
    reason = "y is off"

    def batch_statistics(self, x):
        mean, var, count = super().batch_statistics(x)
        return mean.bfloat16().float(), var.bfloat16().float(), count


class ComputedInBfloat16(Honest):
    case = cases.BY_NAME["bfloat16"]
    reason = "y is off"

    def activate(self, z):
        narrow = self.x_hat.bfloat16() * self.spread(self.weight).bfloat16()
        return (narrow + (z - self.x_hat * self.spread(self.weight)).bfloat16()).float()


class MeanSquareMinusSquaredMean(Honest):
    case = cases.BY_NAME["offset 1e4"]
    reason = "y is off"

    def batch_statistics(self, x):
        mean, _, count = super().batch_statistics(x)
        return mean, (self.total(x.square()) / count - mean.square()).clamp(min=0), count


class ResidualGradientMissing(Honest):
    case = cases.BY_NAME["add, relu"]
    reason = "dresidual is off"

    def residual_gradient(self, g):
        return torch.zeros_like(g)


class ResidualGradientPastTheActivation(Honest):
    case = cases.BY_NAME["add, relu"]
    reason = "dresidual is off"

    def through_activation(self, dy):
        self.dy = dy
        return super().through_activation(dy)

    def residual_gradient(self, g):
        return self.dy


class DerivativeAtTheOutput(Honest):
    case = cases.BY_NAME["silu"]
    reason = "dx is off"

    def through_activation(self, dy):
        return self.derivative_at(self.activate(self.z)) * dy


class DerivativeBeforeTheResidual(Honest):
    case = cases.BY_NAME["add, relu"]
    reason = "dx is off"

    def through_activation(self, dy):
        return self.derivative_at(self.before_residual) * dy


class ApproximateGelu(Honest):
    case = cases.BY_NAME["gelu"]
    reason = "y is off"

    def activate(self, z):
        return F.gelu(z, approximate="tanh")


class ChannelsLastLost(Honest):
    case = cases.BY_NAME["channels last"]
    reason = "y: memory format"

    def finish(self, values, like):
        return super().finish(values, like).contiguous()


class ChannelsLastLostInTheGradient(Honest):
    case = cases.BY_NAME["channels last"]
    reason = "dx: memory format"

    def backward(self, dy):
        dx, *others = super().backward(dy)
        return dx.contiguous(), *others


class DtypeChanged(Honest):
    case = cases.BY_NAME["bfloat16"]
    reason = "y: dtype is"

    def finish(self, values, like):
        return values.clone()


class InputOverwritten(Honest):
    reason = "an input was overwritten"

    def finish(self, values, like):
        return super().finish(like.copy_(values), like)


class InputReturned(Honest):
    case = cases.BY_NAME["plain, evaluation"]
    reason = "shares memory"

    def finish(self, values, like):
        return like.view_as(like)


class CotangentOverwritten(Honest):
    case = cases.BY_NAME["relu"]
    reason = "an input was overwritten"

    def through_activation(self, dy):
        return dy.mul_(self.derivative_at(self.z))


class SavedTensorOverwritten(Honest):
    reason = "differs when asked for a second time"

    def correct(self, g, dweight, dbias):
        return g - self.spread(dbias / self.count) - self.x_hat.mul_(self.spread(dweight / self.count))


class TailNotWritten(Honest):
    """The elements after the last whole vector of eight are left as they were in fresh memory."""

    case = cases.BY_NAME["7x7"]
    reason = "y is off by inf"

    def finish(self, values, like):
        fresh = torch.empty_like(like)
        fresh.flatten(2)[..., :48] = values.flatten(2)[..., :48]
        return fresh


class Detached(Honest):
    reason = "does not lead back"

    def __call__(self, *arguments, **options):
        return super().__call__(*arguments, **options).detach()


SABOTEURS = sorted(Honest.__subclasses__() + NoSecondCorrection.__subclasses__(), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda kind: kind.__name__)
def test_rejects(saboteur):
    with pytest.raises(AssertionError, match=saboteur.reason):
        assert_agrees(saboteur(), oracles.batch_norm, saboteur.case)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_accepts_the_honest_one(case):
    assert_agrees(Honest(), oracles.batch_norm, case)


def torch_batch_norm(x, *arguments, residual=None, activation=None):
    y = F.batch_norm(x, *arguments)
    y = y if residual is None else y + residual
    return y if activation is None else getattr(F, activation)(y)


def is_within_reach_of_torch(case: Case) -> bool:
    """torch has no mask, rounds a half type between two operations, and wants statistics in the parameters' type.

    It also loses the variance of a matrix (rows, channels-last) at a large offset, by more than is allowed here.
    """
    is_split = case.dtype.itemsize == 2 and (case.has_residual or case.activation is not None)
    is_lost = case.offset >= 1e4 and (case.layout == "channels_last" or len(case.shape) == 2)
    return case.mask is None and not is_split and not is_lost and case.parameter_dtype != BRAIN


@pytest.mark.parametrize("case", [*filter(is_within_reach_of_torch, cases.ALL)], ids=str)
def test_accepts_torch(case):
    assert_agrees(torch_batch_norm, oracles.batch_norm, case)


def test_the_cases_have_distinct_names():
    names = [case.name for case in (*cases.ALL, *cases.WIDTHS, *cases.COLUMNS)]
    assert len(names) == len(set(names))
