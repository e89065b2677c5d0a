"""GroupNorm."""

import torch
from torch import Tensor, nn

from steadynorm.functional import shapes
from steadynorm.functional.group import normalize_groups, quick_group
from steadynorm.layers import checks
from steadynorm.layers.batch import as_leaf


class GroupNorm(nn.GroupNorm):
    """Group normalization of (N, C, *), in place of `torch.nn.GroupNorm`.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    Mean and biased variance are those of one sample's group of C / num_groups neighbouring channels.

    Args:
        num_groups: how many groups; divides num_channels.
        num_channels: C.
        eps: added to the variance, in its unit; not negative.
        affine: whether there are weight and bias.
        device, dtype: of weight and bias.
        bias: whether there is a bias where there is a weight.
        activation: None or one of `steadynorm.functional.ACTIVATIONS`.

    Raises:
        InputError: groups that do not divide the channels, a negative eps, no such activation.

    Source: Wu & He, Group Normalization (2018), eq. 1 to 7.
    """

    activation: str | None = None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        shapes.check_groups(lambda: type(self).__name__, num_groups, num_channels)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        shapes.check_eps(self._name, eps)
        shapes.check_activation(self._name, activation)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalise, add, activate.

        Args:
            input: x (N, C, *), floating point.
            residual: (N, C, *), added before the activation.
            mask: (N, *) bool, True where a value is valid. Padding enters no statistic, and its output and gradient
                are zero, whatever it holds.
            lengths: (N,) integers, instead of `mask`: how many positions of the last axis are valid, from its start.

        Returns: y (N, C, *), in the dtype and memory order of `input`.

        Raises:
            InputError: a tensor that cannot be used.
            DegenerateStatisticsError: one value per sample and group.
        """
        if isinstance(input, torch.fx.Proxy):
            leaf: Tensor = as_leaf(self, input, residual=residual, mask=mask, lengths=lengths)
            return leaf
        weight, bias = self.weight, self.bias
        if weight is not None and residual is None and mask is None and lengths is None:
            # The weight has one value a channel, which is all that is left to check.
            y = quick_group(input, self.num_groups, weight, bias, self.eps, self.activation)
            if y is not None:
                return y
        shapes.check_eps(self._name, self.eps)
        shapes.check_channels_first(self._name, input, self.num_channels)
        shapes.check_several(self._name, input, self.num_groups)
        mask = checks.valid(self, input, mask, lengths)
        shapes.check_extras(self._name, input, residual, self.activation, mask)
        return normalize_groups(
            input,
            self.num_groups,
            weight,
            bias,
            eps=self.eps,
            residual=residual,
            activation=self.activation,
            mask=mask,
        )

    def extra_repr(self) -> str:
        """What torch.nn shows, and the activation where there is one."""
        shown = super().extra_repr()
        return shown if self.activation is None else f"{shown}, activation={self.activation!r}"

    def _name(self) -> str:
        return checks.name(self)
