"""InputNorm: the mean and deviation of the data, taken once and kept in the model."""

import copy
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from steadynorm import moments
from steadynorm.errors import InputError
from steadynorm.layers import checks
from steadynorm.layers.wide import WideBuffers, widened
from steadynorm.moments import Moments

Missing = Literal["error", "mean"]

CHOICES = ("error", "mean")
FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LISTED = 10
"""Columns named in a message or a report; the rest are counted."""


class InputNorm(WideBuffers):
    """Normalise the input of a model by the mean and deviation of its training data.

    y = (x − mean) / deviation,  per column of (N, F) or channel of (N, C, *)

    Made with `fit`, and saved with the model, so that nobody has to remember how the data was prepared. A constant
    column has deviation 0 and is only centred. Nothing here trains.

    Args:
        num_features: F or C. Until `fit` or a loaded state_dict, calling the layer is an error.
        missing: what NaN means. "error": no column may hold any in `fit`, and in a call NaN stays NaN. "mean": missing
            values enter no statistic, and become the mean, which is 0 in the output.

    Buffers: mean, deviation (F,), float32 at least in half types too; num_values, num_missing (F,), how many values of
    the data were used and left out.
    """

    mean: Tensor
    deviation: Tensor
    num_values: Tensor
    num_missing: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        missing: Missing = "error",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise InputError(f"InputNorm: num_features must be at least 1, got {num_features}.")
        _check_missing(missing)
        self.num_features = num_features
        self.missing = missing
        wide = widened(dtype or torch.get_default_dtype())
        self.register_buffer("mean", torch.zeros(num_features, dtype=wide, device=device))
        self.register_buffer("deviation", torch.zeros(num_features, dtype=wide, device=device))
        self.register_buffer("num_values", torch.zeros(num_features, dtype=torch.int64, device=device))
        self.register_buffer("num_missing", torch.zeros(num_features, dtype=torch.int64, device=device))
        self._is_fitted = False

    @classmethod
    def fit(cls, batches: Iterable[Any], *, missing: Missing = "error") -> Self:
        """An InputNorm with the statistics of `batches`, the same for any batching up to rounding of float64.

        Args:
            batches: tensors (N, F) or (N, C, *), of floating point or integers, or tuples that begin with one, as a
                DataLoader gives them. Gone through once; a tensor on its own is one batch.
            missing: see the class.

        Returns: the layer, with buffers of float64 if the data is, else float32, where the data is.

        Raises:
            InputError: no values; infinite ones, or NaN with ``missing="error"``, with the column named; a batch of
                another shape than the first.
        """
        _check_missing(missing)
        pooled = _pool([batches] if isinstance(batches, Tensor) else batches, missing)
        norm = cls(len(pooled.low), missing=missing, device=pooled.low.device, dtype=pooled.dtype)
        count = torch.as_tensor(pooled.moments.count)
        # What is constant is decided by its values: a variance that was added up has rounding errors.
        varies = pooled.low < pooled.high
        norm.mean.copy_(torch.where(varies | (count == 0), pooled.moments.mean, pooled.low))
        norm.deviation.copy_(torch.where(varies, pooled.moments.var.sqrt(), 0))
        norm.num_values.copy_(count)
        norm.num_missing.copy_(pooled.num_missing)
        norm._is_fitted = True
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, F) or (N, C, *).

        Returns: the shape of x, in its dtype, or in torch's default one for integers.

        Raises:
            InputError: the layer was not fitted, or x has another number of columns.
        """
        self._check(x)
        mean, scale = self._spread(x)
        z = (x.to(mean.dtype) - mean) / scale
        if self.missing == "mean":
            z = torch.where(z.isnan(), 0, z)
        return z.to(_out_dtype(x))

    def inverse(self, y: Tensor) -> Tensor:
        """x for a normalised y: mean + deviation · y. What was missing comes back as the mean."""
        self._check(y)
        mean, scale = self._spread(y)
        return (y.to(mean.dtype) * scale + mean).to(_out_dtype(y))

    def fold_into(self, layer: nn.Module) -> nn.Module:
        """A copy of the model's first layer that takes the data as it is: layer(norm(x)) = folded(x).

        weight' = weight / deviation;  bias' = bias − Σ weight' · mean,  in float64, rounded once

        Args:
            layer: a Linear for inputs (N, F), or a Conv1d, Conv2d or Conv3d without padding by zeros.

        Returns: the folded layer; `layer` is not touched.

        Raises:
            InputError: it cannot be done exactly, and why.
        """
        self._check_foldable(layer)
        assert isinstance(layer, FOLDABLE)
        weight = layer.weight.detach().double()
        groups = getattr(layer, "groups", 1)
        # (groups, inputs of a group): a grouped convolution counts the channels of its group only.
        mean, scale = (t.double().to(weight.device).view(groups, -1) for t in (self.mean, self._scale()))
        rows = weight.view(groups, -1, mean.shape[1], weight[0, 0].numel()) / scale[:, None, :, None]
        shift = (rows * mean[:, None, :, None]).sum((2, 3)).flatten()
        folded = copy.deepcopy(layer)
        bias = -shift if layer.bias is None else layer.bias.detach().double() - shift
        folded.weight.data = rows.view_as(weight).to(layer.weight.dtype)
        folded.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        return folded

    def report(self) -> str:
        """What was found in the data, in a few lines: values, what is missing, constant or empty."""
        values, missing = self.num_values, self.num_missing
        least, most = int(values.min()), int(values.max())
        counted = str(most) if least == most else f"{least} to {most}"
        lines = [f"InputNorm over {self.num_features} columns, {counted} values in each"]
        is_constant = (self.deviation == 0) & (values > 0)
        for text, columns in (("constant, only centred", is_constant), ("without any value, left at 0", values == 0)):
            if bool(columns.any()):
                lines.append(f"{text}: {_columns(columns)}")
        if bool(missing.any()):
            share = int(missing.sum()) / int((missing + values).sum())
            lines.append(f"missing: {int(missing.sum())} values ({share:.1%}), in {_columns(missing > 0)}")
        return "\n".join(lines)

    def extra_repr(self) -> str:
        """The size, and what is out of the ordinary."""
        shown = f"{self.num_features}, missing={self.missing!r}"
        if not bool((self.num_values > 0).any()):
            return f"{shown}, not fitted"
        is_constant = (self.deviation == 0) & (self.num_values > 0)
        shown += f", {int(self.num_values.max())} values"
        shown += f", constant: {_columns(is_constant)}" if bool(is_constant.any()) else ""
        return shown + (f", {int(self.num_missing.sum())} missing" if bool(self.num_missing.any()) else "")

    def _scale(self) -> Tensor:
        return torch.where(self.deviation > 0, self.deviation, 1)

    def _spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale against the columns of x, in the dtype to compute in."""
        dtype = widened(_out_dtype(x))
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return self.mean.to(dtype).view(shape), self._scale().to(dtype).view(shape)

    def _check(self, x: Tensor) -> None:
        if not self._is_fitted:
            # Statistics can also come from another process or a copy, past fit and load_state_dict.
            self._is_fitted = bool((self.num_values > 0).any())
        if not self._is_fitted:
            raise InputError(
                f"{checks.name(self)} has no statistics: make it with InputNorm.fit(batches), or load a state_dict."
            )
        if x.dim() < 2 or x.shape[1] != self.num_features:
            columns = f"{self.num_features} columns in dimension 1"
            raise InputError(f"{checks.name(self)} expected (N, F) or (N, C, *) with {columns}, got {tuple(x.shape)}.")

    def _check_foldable(self, layer: nn.Module) -> None:
        kind = type(layer).__name__
        if type(layer) not in FOLDABLE:
            expected = ", ".join(one.__name__ for one in FOLDABLE)
            advice = ": make_plain comes first" if kind.startswith("Parametrized") else ""
            raise InputError(f"InputNorm folds into one of {expected}, got {kind}{advice}.")
        inputs = layer.in_features if isinstance(layer, nn.Linear) else getattr(layer, "in_channels", 0)
        if inputs != self.num_features:
            raise InputError(f"InputNorm of {self.num_features} columns got a {kind} for {inputs} inputs.")
        if not bool((self.num_values > 0).any()):
            raise InputError("InputNorm has no statistics to fold: make it with InputNorm.fit(batches).")
        if self.missing == "mean":
            raise InputError(
                f"InputNorm with missing='mean' fills missing values, which a {kind} cannot: keep it before the model."
            )
        is_padded = any(getattr(layer, "_reversed_padding_repeated_twice", ()))
        if is_padded and getattr(layer, "padding_mode", "") == "zeros" and bool((self.mean != 0).any()):
            raise InputError(
                f"InputNorm does not fold into a {kind} that pads with zeros: after folding its border would be padded"
                " with 0 of the raw data, and not with the mean, so that outputs there would change. Keep the norm,"
                " or train with padding=0 or padding_mode='reflect', 'replicate' or 'circular'."
            )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_fitted = bool((self.num_values > 0).any())


class _Pooled(NamedTuple):
    moments: Moments
    low: Tensor
    high: Tensor
    num_missing: Tensor
    dtype: torch.dtype


def _pool(batches: Iterable[Any], missing: Missing) -> _Pooled:
    """The Moments, the range and the number of missing values of every column, over all batches."""
    pooled: _Pooled | None = None
    for index, batch in enumerate(batches):
        x = batch[0] if isinstance(batch, list | tuple) and batch else batch
        _check_batch(x, index, pooled)
        new = _look(x, index, missing)
        if pooled is not None:
            new = _Pooled(
                moments.merge([pooled.moments, new.moments]),
                torch.minimum(pooled.low, new.low),
                torch.maximum(pooled.high, new.high),
                pooled.num_missing + new.num_missing,
                torch.promote_types(pooled.dtype, new.dtype),
            )
        pooled = new
    if pooled is None or not bool((torch.as_tensor(pooled.moments.count) > 0).any()):
        raise InputError("InputNorm.fit got no values: give batches (N, F) or (N, C, *) with at least one.")
    return pooled


def _look(x: Tensor, index: int, missing: Missing) -> _Pooled:
    """What one batch holds, per column."""
    values = x.detach().movedim(1, 0).flatten(1).double()
    is_missing = values.isnan()
    _refuse(values.isinf().any(1), index, "infinite values", "look for overflow, or clip them")
    if missing == "error":
        _refuse(is_missing.any(1), index, "missing values (NaN)", "leave them out, or use missing='mean'")
    count = (~is_missing).sum(1)
    n = count.clamp(min=1)
    mean = values.nansum(1) / n
    residue = torch.where(is_missing, 0, values - mean[:, None])
    # Zero but for rounding: what the first mean got wrong.
    rest = residue.sum(1) / n
    var = (residue.square().sum(1) / n - rest.square()).clamp(min=0)
    low = torch.where(is_missing, torch.inf, values)
    high = torch.where(is_missing, -torch.inf, values)
    none = values.new_full((len(values), 1), torch.inf)  # a batch without samples has no smallest value
    return _Pooled(
        Moments(mean + rest, var, count),
        torch.cat([low, none], 1).amin(1),
        torch.cat([high, -none], 1).amax(1),
        is_missing.sum(1),
        widened(_out_dtype(x)),
    )


def _check_batch(x: Any, index: int, pooled: _Pooled | None) -> None:
    if not isinstance(x, Tensor):
        advice = ": torch.from_numpy makes one" if type(x).__module__ == "numpy" else ""
        raise InputError(f"InputNorm.fit expected tensors, got {type(x).__name__} in batch {index}{advice}.")
    if x.dim() < 2 or x.is_complex() or x.dtype == torch.bool:
        raise InputError(
            f"InputNorm.fit expected (N, F) or (N, C, *) of numbers, got {tuple(x.shape)} of {x.dtype} in batch"
            f" {index}: one sample needs x.unsqueeze(0)."
        )
    if pooled is not None and x.shape[1] != len(pooled.low):
        raise InputError(
            f"InputNorm.fit expected {len(pooled.low)} columns, as in the first batch, got {x.shape[1]} in batch"
            f" {index}, of shape {tuple(x.shape)}."
        )


def _refuse(columns: Tensor, index: int, what: str, advice: str) -> None:
    if bool(columns.any()):
        raise InputError(f"InputNorm.fit got {what} in {_columns(columns)} of batch {index}: {advice}.")


def _columns(where: Tensor) -> str:
    """The columns that are true in `where` (F,), in words."""
    found = where.nonzero().flatten().tolist()
    listed = ", ".join(str(column) for column in found[:LISTED])
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"{'column' if len(found) == 1 else 'columns'} {listed}{more}"


def _out_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _check_missing(missing: str) -> None:
    if missing not in CHOICES:
        raise InputError(f"InputNorm: missing must be one of 'error', 'mean', got {missing!r}.")
