"""RMSNorm, in the conventions of the checkpoints that use it."""

from typing import Any, overload

import torch
from torch import Tensor, nn

from steadynorm.functional import shapes
from steadynorm.functional.recall import recall
from steadynorm.functional.rms import check_convention, normalize_rms
from steadynorm.layers import checks
from steadynorm.layers.batch import as_leaf


class RMSNorm(nn.RMSNorm):
    """RMS normalization over the last dimensions, in place of `torch.nn.RMSNorm`.

    y = weight · s / sqrt(mean(s²) + eps),  s = x + addend

    Half types are normalised in float32; `convention` says where they are rounded and where the weight counts from, as
    `steadynorm.functional.rms_norm` lists it. Under `steadynorm.backend("reference")` a float32, bfloat16 or float16
    input gives the bits of the formula that the convention is named for.

    Args:
        normalized_shape: the last dimensions of the input, which share statistics.
        eps: added to the mean square, in its unit; not negative. None is the machine epsilon of the arithmetic.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight.
        convention: "torch", "llama", "gemma" (whose weight starts at 0) or "t5".

    Raises:
        InputError: a negative eps, or no such convention.

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization (2019), eq. 4.
    """

    convention: str = "torch"

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        convention: str = "torch",
    ) -> None:
        # Where the weight starts depends on it, and torch.nn sets the weight at once.
        object.__setattr__(self, "convention", convention)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.convention = convention
        shapes.check_eps(self._name, eps)
        check_convention(self._name, convention)

    def reset_parameters(self) -> None:
        """The weight as it is constructed: the identity, which is 0 where the weight counts from 1."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 0.0 if self.convention == "gemma" else 1.0)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Any:
        """Add, and normalise.

        Args:
            x: (*, *normalized_shape), floating point, any memory order, which the output has too.
            addend: of the shape of x: what a transformer adds before it normalises.

        Returns: y in the shape of x; with an addend (y, x + addend).

        Raises:
            InputError: a tensor that cannot be used.
        """
        if isinstance(x, torch.fx.Proxy):
            return as_leaf(self, x, addend=addend)
        shape, weight, eps, convention = self.normalized_shape, self.weight, self.eps, self.convention
        if addend is None and (y := recall(("rms", shape, eps, convention), x, weight, None)) is not None:
            return y
        shapes.check_eps(self._name, eps)
        check_convention(self._name, convention)
        shapes.check_last(self._name, x, shape)
        shapes.check_same_shape(self._name, "addend", addend, x)
        y, total = normalize_rms(x, len(shape), weight, eps=eps, addend=addend, convention=convention)
        return y if addend is None else (y, total)

    def extra_repr(self) -> str:
        """What torch.nn shows, and the convention where it is not torch's."""
        shown = super().extra_repr()
        return shown if self.convention == "torch" else f"{shown}, convention={self.convention!r}"

    def _name(self) -> str:
        return checks.name(self)
