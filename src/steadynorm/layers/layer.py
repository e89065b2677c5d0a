"""LayerNorm over the last dimensions, and ChannelLayerNorm over the channels of (N, C, *)."""

import math
from typing import Any, overload

import torch
from torch import Tensor, nn

from steadynorm.functional import shapes
from steadynorm.functional.layer import normalize_layer, normalize_positions, quick_layer
from steadynorm.layers import checks
from steadynorm.layers.batch import as_leaf


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last dimensions, in place of `torch.nn.LayerNorm`.

    y = weight · (s − mean) / sqrt(var + eps) + bias,  s = x + addend

    Statistics are float32 or better for half types; weights may be float32 beside half inputs.

    Args:
        normalized_shape: the last dimensions of the input, which share statistics.
        eps: added to the variance, in its unit; not negative.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias where there is a weight.
        device, dtype: of weight and bias.

    Raises:
        InputError: a negative eps.
        DegenerateStatisticsError: a normalized_shape of one value, whose variance is zero.

    Source: Ba, Kiros & Hinton, Layer Normalization (2016), eq. 4.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        shapes.check_eps(self._name, eps)
        shapes.check_width(self._name, math.prod(self.normalized_shape))

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, addend: Tensor | None = None) -> Any:
        """Add, and normalise.

        Args:
            input: x (*, *normalized_shape), floating point, any memory order, which the output has too.
            addend: of the shape of x: what a transformer adds before it normalises.

        Returns: y in the shape of x; with an addend (y, x + addend).

        Raises:
            InputError: a tensor that cannot be used.
        """
        if isinstance(input, torch.fx.Proxy):
            return as_leaf(self, input, addend=addend)
        shape, weight, bias = self.normalized_shape, self.weight, self.bias
        if addend is None and (y := quick_layer(input, shape, weight, bias, self.eps)) is not None:
            return y
        shapes.check_eps(self._name, self.eps)
        shapes.check_last(self._name, input, shape)
        shapes.check_same_shape(self._name, "addend", addend, input)
        y, total = normalize_layer(input, len(shape), weight, bias, eps=self.eps, addend=addend)
        return y if addend is None else (y, total)

    def _name(self) -> str:
        return checks.name(self)


class ChannelLayerNorm(LayerNorm):
    """Layer normalization of (N, C, *) over its channels: one statistic per sample and position.

    What ConvNeXt calls a LayerNorm in "channels_first", and torchvision and timm LayerNorm2d, for any number of spatial
    dimensions; their `state_dict` fits. Plain and channels-last memory are read as they are, without a transposition,
    and stay what they are.

    Args:
        num_channels: C.
        eps: added to the variance, in its unit; not negative.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias where there is a weight.
        device, dtype: of weight and bias.

    Source: Liu et al., A ConvNet for the 2020s (2022), section 2.6.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise x (N, C, *) over C.

        Returns: y (N, C, *), in the memory order of x.

        Raises:
            InputError: a tensor that cannot be used.
        """
        if isinstance(input, torch.fx.Proxy):
            leaf: Tensor = as_leaf(self, input)
            return leaf
        shapes.check_eps(self._name, self.eps)
        shapes.check_channels_first(self._name, input, self.normalized_shape[0])
        return normalize_positions(input, self.weight, self.bias, eps=self.eps)
