"""BatchNorm1d, BatchNorm2d, BatchNorm3d.

A layer holds settings and calls the functional. It is a subclass of the torch.nn layer of its name, with the same
parameters, buffers and state_dict; `switches` says what decides which statistics it uses and whether they move.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from steadynorm import functional
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.functional.shapes import about_single_value
from steadynorm.kernels.reference import statistics_dtype
from steadynorm.layers import checks, lockstep, portable
from steadynorm.layers.finite import require_finite
from steadynorm.layers.running import STATISTICS, Running, update_
from steadynorm.layers.switches import Switches
from steadynorm.layers.wide import WideBuffers
from steadynorm.moments import Moments

Guard = Literal["skip", "raise", "propagate"]
SingleValue = Literal["error", "running"]


class BatchNorm(WideBuffers, Switches):
    """What the batch normalizations of every rank share, and the relatives over the batch; see `BatchNorm2d`."""

    ranks: ClassVar[tuple[int, ...]] = ()
    wide_buffers = STATISTICS
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "activation": (None, *functional.ACTIVATIONS),
        "guard": ("skip", "raise", "propagate"),
        "single_value": ("error", "running"),
        "debias": (False, True),
        "normalize_by": (None, "batch", "running"),
        "update_running": (None, True, False),
    }
    # Shown by repr where they are not at their default, which stands on the class.
    shown: ClassVar[tuple[str, ...]] = ("activation", "guard", "single_value", "debias")
    activation: str | None = None
    guard: Guard = "skip"
    single_value: SingleValue = "error"
    debias: bool = False
    # Gathers Moments until an optimizer step is over, in place of the running statistics: training.pooled_statistics.
    _pool: Callable[["BatchNorm", Running, Moments], None] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        guard: Guard = "skip",
        single_value: SingleValue = "error",
        debias: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._configure(bias, activation, guard, single_value, debias)

    def _configure(
        self, bias: bool, activation: str | None, guard: Guard, single_value: SingleValue, debias: bool
    ) -> None:
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.guard = guard
        self.single_value = single_value
        self.debias = debias
        self._check_settings()
        self._widen_buffers()

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalise, add, activate: activation(weight · (x − mean) / sqrt(var + eps) + bias + residual).

        Args:
            input: x (N, C, *), floating point.
            residual: (N, C, *), added before the activation.
            mask: (N, *) bool, True where a value is valid. Padding enters no statistic, and its output and gradient
                are zero, whatever it holds.
            lengths: (N,) integers, instead of `mask`: how many positions of the last axis are valid, from its start.

        Returns: y (N, C, *), in the dtype and memory order of `input`.

        Raises:
            InputError: a tensor or setting that cannot be used.
            DegenerateStatisticsError: one value per channel in training, unless ``single_value="running"``.
            NonFiniteStatisticsError: the statistics of the batch are not finite, with ``guard="raise"``.
        """
        if isinstance(input, torch.fx.Proxy):
            return as_leaf(self, input, residual=residual, mask=mask, lengths=lengths)
        mask = self._checked(input, mask, lengths)
        running = self._running()
        y, moments = self._normalize(input, residual, mask, running, self.weight, self.bias)
        if running is not None and moments is not None:
            self._require_finite(running, moments)
            self._remember(running, moments)
        return y

    def _checked(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """The mask that the call means, after a look at the settings and at everything it brings."""
        self._check_settings()
        self._check_input_dim(x)
        return checks.valid(self, x, mask, lengths)

    def _normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        running: Running | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Moments | None]:
        """y by what the switches say, against one set of running statistics; what is to be remembered, if anything."""
        by_batch, updates = self._decide(x, running is not None)
        weight, bias = self._trained(weight), self._trained(bias)
        extras: dict[str, Any] = {"eps": self.eps, "residual": residual, "activation": self.activation, "mask": mask}
        if by_batch or running is None:
            y, moments = self._by_batch(x, running, weight, bias, extras)
        else:
            # A graph that leaves PyTorch is not to need our operators.
            normalize = portable if torch.compiler.is_exporting() else functional
            mean, var = running.mean, running.var
            if updates:
                # A checkpoint that calls this again must find the same kernels, whatever has become of the statistics:
                # those for small tensors look at them, and do not take wide ones.
                mean, var = mean.to(statistics_dtype(x)), var.to(statistics_dtype(x))
            y = normalize.normalize_running(x, mean, var, weight, bias, **extras)
            if updates:
                moments = self._of_all_parts(functional.moments(x, mask))
        return y, moments if updates else None

    def _by_batch(
        self, x: Tensor, running: Running | None, weight: Tensor | None, bias: Tensor | None, extras: dict[str, Any]
    ) -> tuple[Tensor, Moments | None]:
        """y by the statistics of `x`, and what is to be remembered of it. A relative is another version of this."""
        joined, reduction = lockstep.current(), self._reduction()
        if joined is None and reduction is None:
            return functional.normalize_batch(x, weight, bias, **extras)
        part = functional.Part(x, extras["residual"], extras["mask"])
        rest: dict[str, Any] = {"eps": self.eps, "activation": self.activation, "reduction": reduction}
        if joined is not None:
            return joined.normalize(self, part, weight, bias, **rest)
        (y,), moments = functional.normalize_together([part], weight, bias, **rest)
        return y, moments

    def _of_all_parts(self, moments: Moments) -> Moments | None:
        """What is to be remembered of a batch that did not normalise itself, where `moments` may be those of a part."""
        joined, reduction = lockstep.current(), self._reduction()
        if joined is not None:
            return joined.pool(self, moments, reduction)
        return moments if reduction is None else reduction.merge(moments)

    def _reduction(self) -> functional.Reduction | None:
        """What joins this batch with those of other processes; None where it is all there is."""
        return None

    def _running(self) -> Running | None:
        try:
            # An attribute of a module is a function call, of which a small tensor has too many.
            buffers = self._buffers
            mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # they are something else than buffers
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        return None if mean is None or var is None else Running(mean, var, batches)

    def _decide(self, x: Tensor, has_running: bool) -> tuple[bool, bool]:
        """Whether this call normalises by its batch, and whether the running statistics move."""
        by_batch = self.training or not has_running
        if self.normalize_by is not None:
            by_batch = self.normalize_by == "batch"
        updates = self.training and self.track_running_stats
        if self.update_running is not None:
            updates = self.update_running
        values = self._value_count(x)
        # Of one micro-batch a single value is enough: its statistics are those of all of them.
        is_part = values < 2 and lockstep.current() is not None
        if by_batch and self.training and values == 1 and not is_part:
            if self.single_value == "error":
                advice = "normalise such a batch by the running statistics with single_value='running'"
                raise DegenerateStatisticsError(about_single_value(checks.name(self), x, advice))
            by_batch = False
        if not (by_batch or has_running):
            raise InputError(
                f"{checks.name(self)} has no running statistics to normalise by: construct it with"
                " track_running_stats=True."
            )
        # Fewer than two values say nothing about a variance.
        return by_batch, updates and has_running and (values > 1 or is_part)

    def _value_count(self, x: Tensor) -> int:
        """How many values per channel this batch has, in the padding too."""
        return x.numel() // max(self.num_features, 1)

    def _require_finite(self, running: Running, moments: Moments) -> None:
        # Inside a functional transform there is no one value to look at; functional.update_running_ steps aside too.
        if self.guard != "raise" or torch._C._are_functorch_transforms_active():
            return
        if torch.compiler.is_compiling():
            torch.ops.steadynorm.require_finite(moments.mean, moments.var, running.mean, checks.name(self))
        else:
            require_finite(moments.mean, moments.var, lambda: checks.name(self))

    def _remember(self, running: Running, moments: Moments) -> None:
        if self._pool is not None:
            self._pool(self, running, moments)
            return
        update_(running, moments, self.momentum, guard=self.guard != "propagate", debias=self.debias)

    def _check_input_dim(self, input: Tensor) -> None:
        checks.check_input(self, input, self.ranks, self.num_features)

    def _check_settings(self) -> None:
        checks.check_choices(self, self.choices)
        if not self.eps > 0:
            raise InputError(f"{checks.name(self)}: eps must be positive, got {self.eps}.")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise InputError(
                f"{checks.name(self)}: momentum must be in [0, 1], the weight of the new batch, or None for a"
                f" cumulative average, got {self.momentum}."
            )

    def extra_repr(self) -> str:
        """What torch.nn shows, and every setting of ours that is not at its default."""
        shown = super().extra_repr()
        for setting in self.shown:
            if getattr(self, setting) != getattr(type(self), setting):
                shown += f", {setting}={getattr(self, setting)!r}"
        for switch, value in self.switches().items():
            shown += f", {switch}={value!r}"
        return shown


def as_leaf(layer: nn.Module, x: Any, **kwargs: Any) -> Any:
    """One node for the whole layer in a graph that torch.fx traces, as torch.nn's own layers get."""
    given = {key: value for key, value in kwargs.items() if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), given)


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """`BatchNorm2d` for (N, C) and (N, C, L)."""

    ranks = (2, 3)


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Batch normalization over (N, C, H, W), in place of `torch.nn.BatchNorm2d`.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    Mean and biased variance of a channel are taken over its N·H·W values in training; in evaluation they are the
    running ones. `freeze_`, `unfreeze_` and the switches change that.

    Args:
        num_features: C.
        eps: added to the variance, in its unit; positive.
        momentum: weight of the new batch in the running statistics, in [0, 1]; None gives all batches the same.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics; without, evaluation too normalises by the batch.
        device, dtype: of weight and bias. The running statistics are float32 at least, whatever the module is cast to.
        bias: whether there is a bias where there is a weight.
        activation: None or one of `steadynorm.functional.ACTIVATIONS`.
        guard: what a batch with statistics that are not finite does to the running ones. "skip": nothing;
            "raise": an error that names the layer and the channel; "propagate": it spoils them, as in torch.nn.
        single_value: what one value per channel does in training. "error": an error that names the layer and the
            probable cause; "running": the running statistics normalise and do not move.
        debias: the running statistics are an average of batches alone, without the 0 and 1 they start from: that of
            batch t gets the weight momentum / (1 − (1 − momentum)^t). For evaluation after a few steps.

    Source: Ioffe & Szegedy, Batch Normalization (2015), Algorithm 1.
    """

    ranks = (4,)


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """`BatchNorm2d` for (N, C, D, H, W)."""

    ranks = (5,)
