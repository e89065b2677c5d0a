"""`assert_agrees` must reject what is wrong, for the right reason, and accept what is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import cases, oracles
from tests.agree import assert_agrees
from tests.cases import BRAIN, Case
from tests.honest import Honest


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
