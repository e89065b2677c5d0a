"""The comparison of normalizations within samples must reject what is wrong, for the right reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import sample_cases
from tests.honest_sample import HonestSample
from tests.sample_agree import assert_agrees


class UnbiasedVariance(HonestSample):
    reason = "y is off"

    def root(self, var):
        return super().root(var * self.count / (self.count - 1))


class EpsOutsideTheRoot(HonestSample):
    reason = "y is off"

    def root(self, var):
        return 1 / (var.sqrt() + self.case_.eps)


class MeanTakenOffWhereItIsHeldAtZero(HonestSample):
    case = "rms, plain"
    reason = "y is off"

    def statistics(self, x):
        mean = self.average(x)
        return mean, self.average((x - mean).square())


class SumOfSquaresForTheirMean(HonestSample):
    case = "rms, plain"
    reason = "y is off"

    def statistics(self, x):
        mean, var = super().statistics(x)
        return mean, var * self.count


class WeightCountsFromZero(HonestSample):
    case = "gemma, plain"
    reason = "y is off"

    def scaled(self, weight):
        return weight


class BatchStatistics(HonestSample):
    reason = "y is off"

    def statistics(self, x):
        self.labels = self.weights
        self.count = self.sum_by(torch.ones_like(x))
        return super().statistics(x)


class GroupsInterleaved(HonestSample):
    """Channels dealt out to the groups in turn, as `reshape(N, C / G, G, L)` would."""

    reason = "y is off"

    def statistics(self, x):
        groups = self.case_.size
        sample, channel = self.labels // groups, self.weights
        self.labels = sample * groups + channel % groups
        return super().statistics(x)


class ChannelsLastReadAsPlain(HonestSample):
    case = "group, channels last"
    reason = "y is off"

    def widen(self, x):
        return super().widen(x).movedim(1, -1).reshape(x.shape) if x.dim() > 1 else super().widen(x)


class NoFirstCorrection(HonestSample):
    reason = "dx is off"

    def correct(self, h):
        return h - self.x_hat * self.average(h * self.x_hat)


class NoSecondCorrection(HonestSample):
    reason = "dx is off"

    def correct(self, h):
        return h - self.average(h)


class FirstCorrectionOfRms(HonestSample):
    case = "rms, plain"
    reason = "dx is off"

    def correct(self, h):
        return super().correct(h) - self.average(h)


class CorrectionsBeforeTheWeight(HonestSample):
    """The corrections of batch norm, whose weight is the same for a whole statistic."""

    reason = "dx is off"

    def correct(self, h):
        bare = torch.where(self.scale == 0, 0, h / self.scale)
        return super().correct(bare) * self.scale


class WeightGradientOfTheInput(HonestSample):
    reason = "dweight is off"

    def parameter_terms(self, g):
        return g * self.x, g


class SumNotReturned(HonestSample):
    case = "layer, add"
    reason = "the returned sum"

    def add(self, x, addend):
        self.total = x + addend
        return x.clone()


class GradientOfTheSumDropped(HonestSample):
    case = "layer, add"
    reason = "dx is off"

    def with_sum_gradient(self, dx, dtotal):
        return dx


class GradientOfTheAddendDropped(HonestSample):
    case = "rms, add"
    reason = "daddend is off"

    def addend_gradient(self, dx):
        return torch.zeros_like(dx)


class SumNotRounded(HonestSample):
    """Statistics of a sum that is kept wider than it is stored."""

    case = "layer, add, bfloat16"
    reason = "y is off"

    def widen(self, x):
        wide = super().widen(x)
        if x.shape == self.inputs.x.shape and torch.equal(x, self.inputs.x + self.inputs.addend):
            return super().widen(self.inputs.x) + super().widen(self.inputs.addend)
        return wide


class PaddingCounted(HonestSample):
    case = "group, lengths"
    reason = "y is off"

    def average(self, x):
        return self.sum_by(x) / self.add_up(torch.ones_like(x), self.labels)[self.labels]


class PaddingShared(HonestSample):
    """One length for all samples: the average of them."""

    case = "instance, lengths"
    reason = "y is off"

    def average(self, x):
        return self.sum_by(x) / self.count.mean()


class PaddingLeaks(HonestSample):
    case = "group, lengths"
    reason = "y is off"

    def sum_by(self, values):
        return self.add_up(values, self.labels)[self.labels]

    def statistics(self, x):
        return super().statistics(super().widen(self.inputs.x))


class GradientInThePadding(HonestSample):
    case = "group, lengths, add, relu"
    reason = "dresidual is off"

    def residual_gradient(self, g):
        return torch.where(self.valid, g, 1.0)


class ResidualAfterTheActivation(HonestSample):
    case = "group, add, relu"
    reason = "y is off"

    def activate(self, z):
        residual = super().widen(self.inputs.residual)
        return super().activate(z - residual) + residual


class DerivativeAtTheOutput(HonestSample):
    case = "group, silu"
    reason = "dx is off"

    def derivative(self):
        before, self.z = self.z, self.activate(self.z)
        found, self.z = super().derivative(), before
        return found


class ApproximateGelu(HonestSample):
    case = "group, gelu"
    reason = "y is off"

    def activate(self, z):
        return F.gelu(z, approximate="tanh")


class ComputedInBfloat16(HonestSample):
    case = "layer, bfloat16"
    reason = "y is off"

    def per_channel(self, weight):
        self.x_hat = self.x_hat.bfloat16().float()
        return super().per_channel(weight)


class MeanSquareMinusSquaredMean(HonestSample):
    case = "group, offset 1e4"
    reason = "y is off"

    def statistics(self, x):
        mean, _ = super().statistics(x)
        return mean, (self.average(x.square()) - mean.square()).clamp(min=0)


class ChannelsLastLost(HonestSample):
    case = "instance, channels last"
    reason = "y: memory format"

    def finish(self, values):
        return super().finish(values).contiguous()


class InputOverwritten(HonestSample):
    reason = "an input was overwritten"

    def finish(self, values):
        return self.inputs.x.data.copy_(values)


class Detached(HonestSample):
    reason = "does not lead back"

    def __call__(self, case, inputs):
        y, total = super().__call__(case, inputs)
        return y.detach(), total


SABOTEURS = sorted(HonestSample.__subclasses__(), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda kind: kind.__name__)
def test_rejects(saboteur):
    with pytest.raises(AssertionError, match=saboteur.reason):
        assert_agrees(saboteur(), sample_cases.BY_NAME[saboteur.case])


@pytest.mark.parametrize("case", sample_cases.ALL, ids=str)
def test_accepts_the_honest_one(case):
    assert_agrees(HonestSample(), case)


def theirs(case, inputs):
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    total = x if inputs.addend is None else x + inputs.addend
    match case.norm:
        case "group":
            y = F.group_norm(x, case.size, weight, bias, case.eps)
        case "instance":
            y = F.instance_norm(x, weight=weight, bias=bias, eps=case.eps)
        case "channel":
            y = F.layer_norm(x.movedim(1, -1), case.weight_shape, weight, bias, case.eps).movedim(-1, 1)
        case "layer":
            y = F.layer_norm(total, case.weight_shape, weight, bias, case.eps)
        case _:
            y = F.rms_norm(total, case.weight_shape, weight, case.eps)
    y = y if inputs.residual is None else y + inputs.residual
    y = y if case.activation is None else getattr(F, case.activation)(y)
    return y, None if inputs.addend is None else total


def is_within_reach_of_torch(case):
    """torch has no mask, loses channels-last, rounds a half type between two operations, and loses a large offset.

    Its layer_norm on the CPU also adds up the gradient of a weight in the half type of the input.
    """
    is_fused = case.has_addend or case.has_residual or case.activation is not None
    is_split = case.dtype.itemsize == 2 and (is_fused or case.norm == "layer")
    is_plain = case.layout == "plain" and case.cotangent_layout is None and case.norm != "channel"
    return case.mask is None and not is_split and is_plain and case.offset < 1e4 and case.norm != "gemma"


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("case", [*filter(is_within_reach_of_torch, sample_cases.ALL)], ids=str)
def test_accepts_torch(case):
    assert_agrees(theirs, case)


def test_the_cases_have_distinct_names():
    assert len(sample_cases.BY_NAME) == len(sample_cases.ALL)
