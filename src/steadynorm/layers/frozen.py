"""FrozenBatchNorm1d, 2d, 3d: batch normalization of which nothing changes any more.

Weight, bias and running statistics are buffers, as in the frozen layers of torchvision and detectron2: no optimizer
sees them, no mode, no `requires_grad_` and no recalibration moves them. A layer that is to thaw again is
`BatchNorm2d(...).freeze_()`.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.parameter import is_lazy

from steadynorm import functional
from steadynorm.errors import InputError
from steadynorm.layers import checks, portable
from steadynorm.layers.batch import BatchNorm, as_leaf
from steadynorm.layers.running import STATISTICS
from steadynorm.layers.wide import WideBuffers


class FrozenBatchNorm(WideBuffers):
    """What the frozen batch normalizations of every rank share; see `FrozenBatchNorm2d`."""

    ranks: ClassVar[tuple[int, ...]] = ()
    wide_buffers = STATISTICS
    activation: str | None = None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        affine: bool = True,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.activation = activation
        self._check_settings()
        has = {"weight": affine, "bias": affine and bias, "running_mean": True, "running_var": True}
        for name, is_there in has.items():
            # Only memory: reset_parameters gives the values, here and after a move from the meta device.
            value = torch.empty(num_features, device=device, dtype=dtype) if is_there else None
            self.register_buffer(name, value)
        self._widen_buffers()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and variance 1, bias and mean 0: the identity, but for eps."""
        for tensor, value in ((self.weight, 1), (self.bias, 0), (self.running_mean, 0), (self.running_var, 1)):
            if tensor is not None:
                tensor.fill_(value)

    @classmethod
    def from_batch_norm(cls, norm: nn.Module) -> Self:
        """A frozen copy of a batch normalization of torch or of ours, with its eps, activation, device and dtype.

        Args:
            norm: a batch normalization with running statistics, synchronised ones included; it is left as it is.

        Raises:
            InputError: it has none, or takes another rank.
        """
        if not isinstance(norm, TorchBatchNorm):
            raise InputError(f"{cls.__name__}.from_batch_norm expected a batch norm, got {type(norm).__name__}.")
        named = [kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(norm, kind)]
        if named and named[0].__name__[-2:] != cls.__name__[-2:]:
            right = f"FrozenBatchNorm{named[0].__name__[-2:]}"
            raise InputError(f"{cls.__name__}.from_batch_norm got a {type(norm).__name__}: use {right}.")
        if norm.running_mean is None or norm.running_var is None or is_lazy(norm.running_mean):
            raise InputError(
                f"{cls.__name__}.from_batch_norm got a {type(norm).__name__} without running statistics: only one with"
                " track_running_stats=True, and a lazy one only after its first batch, can be frozen."
            )
        like = norm.running_mean if norm.weight is None else norm.weight
        frozen = cls(
            norm.num_features,
            norm.eps,
            like.device,
            like.dtype,
            affine=norm.weight is not None,
            bias=norm.bias is not None,
            activation=norm.activation if isinstance(norm, BatchNorm) else None,
        )
        for name in frozen._buffers:
            value = getattr(norm, name)
            # Statistics keep the dtype that they have, float64 too.
            setattr(frozen, name, None if value is None else value.detach().clone())
        frozen._widen_buffers()
        return frozen.train(norm.training)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalise by the constants, add, activate; arguments, result and errors as `BatchNorm2d` in evaluation."""
        if isinstance(input, torch.fx.Proxy):
            return as_leaf(self, input, residual=residual, mask=mask, lengths=lengths)
        self._check_settings()
        checks.check_input(self, input, self.ranks, self.num_features)
        normalize = portable if torch.compiler.is_exporting() else functional
        return normalize.normalize_running(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            activation=self.activation,
            mask=checks.valid(self, input, mask, lengths),
        )

    def _check_settings(self) -> None:
        checks.check_choices(self, {"activation": BatchNorm.choices["activation"]})
        if not self.eps >= 0:
            raise InputError(f"{checks.name(self)}: eps must be positive, or 0 for old checkpoints, got {self.eps}.")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Of a batch norm; what is frozen counts nothing.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The settings that make the numbers."""
        shown = f"{self.num_features}, eps={self.eps}"
        if self.weight is None:
            shown += ", affine=False"
        elif self.bias is None:
            shown += ", bias=False"
        return shown if self.activation is None else f"{shown}, activation={self.activation!r}"


class FrozenBatchNorm1d(FrozenBatchNorm):
    """`FrozenBatchNorm2d` for (N, C) and (N, C, L)."""

    ranks = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm):
    """Batch normalization over (N, C, H, W) by constants, in place of `torchvision.ops.FrozenBatchNorm2d`.

    y = activation(weight · (x − running_mean) / sqrt(running_var + eps) + bias + residual)

    Its four tensors are buffers. A state_dict goes both ways with `torch.nn.BatchNorm2d`, whose num_batches_tracked is
    left out, and with torchvision's class.

    Args:
        num_features: C.
        eps: added to the variance; that of the layer that was frozen, or the numbers are others. 0 is allowed:
            torchvision had it before 0.9, and still sets it for detection weights trained then.
        device, dtype: of weight and bias. The statistics are float32 at least.
        affine, bias: whether there are weight and bias.
        activation: None or one of `steadynorm.functional.ACTIVATIONS`.
    """

    ranks = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm):
    """`FrozenBatchNorm2d` for (N, C, D, H, W)."""

    ranks = (5,)
