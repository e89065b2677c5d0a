"""The line through what a batch norm gave and what a normalization within the sample makes of the same values.

A batch norm in evaluation is one scale and one shift for every channel, y = s · x + t. A normalization within the
sample subtracts and divides by other numbers for every sample, which no weight and bias undo. Those that come nearest
are, channel by channel, the line through the pairs (z, y) of all samples and positions, where z is the normalised input
and y what the batch norm gave for it:

    weight = cov(z, y) / var(z),  bias = mean(y) − weight · mean(z)
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from steadynorm import models

POSITIONS = 0
"""In place of a number of groups: the channels of one position share statistics."""


@dataclass(frozen=True)
class Fit:
    """What was found for one layer.

    Args:
        groups: of channels that share statistics, or POSITIONS.
        weight, bias: (C,), float64.
        error: sqrt(Σ (new − old)² / Σ (old − mean)²) of its output on the examples.
        dtype: of its input.
    """

    groups: int
    weight: Tensor
    bias: Tensor
    error: float
    dtype: torch.dtype


@dataclass
class Sums:
    """Sums over samples and positions, channel by channel, for each number of groups that is possible.

    `y` is taken less its centre, the bias of the batch norm, so that nothing is lost to a large one.
    """

    centre: Tensor
    candidates: list[int]
    dtype: torch.dtype
    count: float = 0.0
    y: Tensor | float = 0.0
    yy: Tensor | float = 0.0
    z: dict[int, Tensor] = field(default_factory=dict)
    zz: dict[int, Tensor] = field(default_factory=dict)
    zy: dict[int, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor, y: Tensor, valid: Tensor | None, eps: float) -> None:
        """One call: x (N, C, *), y (N, C, *) less the centre, both float64."""
        x, y = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), y.flatten(2) if y.dim() > 2 else y.unsqueeze(2)
        weights = torch.ones_like(x[:, :1]) if valid is None else valid.flatten(1).unsqueeze(1).to(x.dtype)
        width, channels = x.shape[2], x.shape[1]
        self.candidates = [g for g in self.candidates if g == POSITIONS or channels // g * width > 1]
        self.count += float(weights.sum())
        y = torch.where(weights > 0, y, 0.0)
        self.y, self.yy = self.y + y.sum((0, 2)), self.yy + y.square().sum((0, 2))
        for groups in self.candidates:
            z = normalized(x, weights, groups, eps)
            for sums, value in ((self.z, z), (self.zz, z.square()), (self.zy, z * y)):
                sums[groups] = sums.get(groups, torch.zeros_like(self.centre)) + value.sum((0, 2))

    def best(self) -> Fit:
        """The line of the number of groups that leaves least."""
        fits = [self._fit(groups) for groups in self.candidates]
        return min(fits, key=lambda fit: fit.error)

    def _fit(self, groups: int) -> Fit:
        mean_y, mean_z = self.y / self.count, self.z[groups] / self.count
        assert isinstance(mean_y, Tensor)
        var_y = (self.yy / self.count - mean_y.square()).clamp(min=0)
        var_z = (self.zz[groups] / self.count - mean_z.square()).clamp(min=0)
        covariance = self.zy[groups] / self.count - mean_z * mean_y
        # A channel that is constant says nothing about its weight.
        is_constant = var_z <= torch.finfo(var_z.dtype).eps
        weight = torch.where(is_constant, 0.0, covariance / torch.where(is_constant, 1.0, var_z))
        left = (var_y - weight * covariance).clamp(min=0).sum()
        total = var_y.sum()
        error = float((left / total).sqrt()) if total > 0 else 0.0
        return Fit(groups, weight, self.centre + mean_y - weight * mean_z, error, self.dtype)


def normalized(x: Tensor, valid: Tensor, groups: int, eps: float) -> Tensor:
    """x (N, C, L) less the mean, over the deviation, of its groups; 0 where `valid` (N, 1, L), of ones, is 0."""
    samples, channels, width = x.shape
    x = torch.where(valid > 0, x, 0.0)
    if groups == POSITIONS:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).square().mean(1, keepdim=True)
        return torch.where(valid > 0, (x - mean) / (var + eps).sqrt(), 0.0)
    count = (valid.sum((1, 2)) * (channels // groups)).clamp(min=1).view(samples, 1, 1, 1)
    grouped, mask = x.view(samples, groups, -1, width), valid.unsqueeze(1)
    centred = (grouped - grouped.sum((2, 3), keepdim=True) / count) * mask
    var = centred.square().sum((2, 3), keepdim=True) / count
    return (centred / (var + eps).sqrt()).view(samples, channels, width)


def was(layer: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """What the batch norm `layer` gives for x (N, C, *) in evaluation, before residual and activation, in float64."""
    x = x.double()
    if models.uses_batch_statistics(layer) or not models.has_running_statistics(layer):
        rows = x.movedim(1, -1)
        rows = rows[valid] if valid is not None else rows.flatten(0, -2)
        mean, var = rows.mean(0), rows.var(0, unbiased=False)
    else:
        mean, var = (statistic.double() for statistic in models.running_statistics(layer))
    y = (x - along(mean, x)) / along((var + float(layer.eps)).sqrt(), x)  # type: ignore[arg-type]
    weight, bias = layer.weight, layer.bias
    y = y * along(weight.double(), x) if isinstance(weight, Tensor) else y
    return y + along(bias.double(), x) if isinstance(bias, Tensor) else y


def along(values: Tensor, x: Tensor) -> Tensor:
    """(C,) so that it meets the channels of x (N, C, *)."""
    return values.detach().view(-1, *[1] * (x.dim() - 2))
