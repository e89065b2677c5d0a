"""Statistics within a sample long-hand in NumPy float64, and random inputs for the kernels that compute them.

Arrays are (samples, outer, groups, channels, inner), as the memory of the kernels is. Nothing of the project computes
anything here but the sizes of the cases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from steadynorm.grouping import SampleGrouping
from tests.oracles import KINKS, Array, activate, activation_derivative

NEAR = 1e-3
"""No gradient is compared so near to a kink of the activation."""


@dataclass(frozen=True)
class Call:
    """One call of the kernels: sizes, settings, and which of the optional tensors there are."""

    sizes: tuple[int, ...]
    is_per_position: bool = False
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    is_centred: bool = True
    offset: float = 0.0
    has: frozenset[str] = field(default_factory=lambda: frozenset({"weight", "bias"}))
    parameter: torch.dtype = torch.float32
    mean: float = 0.5
    eps: float = 1e-5

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.sizes)), "positions" if self.is_per_position else ""]
        parts += [str(self.dtype)[6:], self.activation or "", "" if self.is_centred else "rms"]
        parts += [f"offset{self.offset}" if self.offset else "", "+".join(sorted(self.has)) or "bare"]
        parts += [f"mean{self.mean:g}" if self.mean != 0.5 else ""]
        return "-".join(part for part in parts if part)

    @property
    def grouping(self) -> SampleGrouping:
        return SampleGrouping(*self.sizes, self.is_per_position)

    @property
    def axes(self) -> tuple[int, ...]:
        return (1, 2, 3) if self.is_per_position else (1, 3, 4)

    def inputs(self) -> dict[str, Any]:
        """Random tensors by their names in the contract; what the case has not is None."""
        samples, outer, groups, channels, inner = self.sizes
        found: dict[str, Any] = dict.fromkeys(("addend", "weight", "bias", "residual", "mask", "dtotal"))
        width = groups * channels
        spread = torch.rand(samples, 1, groups, 1, 1) + 0.5
        found["x"] = ((torch.randn(self.sizes) * spread) + self.mean).to(self.dtype)
        found["dy"] = torch.randn(self.sizes).to(self.dtype)
        for name in ("addend", "residual", "dtotal"):
            if name in self.has:
                found[name] = torch.randn(self.sizes).to(self.dtype)
        if "weight" in self.has:
            found["weight"] = (torch.rand(width) + 0.5).to(self.parameter)
        if "bias" in self.has:
            found["bias"] = torch.randn(width).to(self.parameter)
        if "mask" in self.has:
            mask = torch.rand(samples, outer * inner) < 0.7
            mask[0] = False  # a sample without a valid value
            mask[-1] = True
            found["mask"] = mask
            padding = ~mask.reshape(samples, outer, 1, 1, inner).expand(self.sizes)
            for name, bad in (("x", torch.nan), ("dy", torch.inf), ("residual", torch.nan), ("dtotal", torch.nan)):
                if found[name] is not None:
                    found[name][padding] = bad
        return found


@dataclass(frozen=True)
class Expected:
    """What a call must give; `z` enters the activation."""

    total: Array
    mean: Array
    var: Array
    z: Array
    y: Array
    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array


def expected(call: Call, inputs: dict[str, Any], total: torch.Tensor) -> Expected:
    """The formulas of the contract, for a total that was rounded already. `dy` counts as zero near a kink."""

    def array(name: str) -> Array:
        return np.zeros(call.sizes) if inputs[name] is None else inputs[name].double().numpy()

    samples, outer, groups, channels, inner = call.sizes
    axes = call.axes
    valid = np.ones(call.sizes, dtype=bool)
    if inputs["mask"] is not None:
        valid = np.broadcast_to(inputs["mask"].numpy().reshape(samples, outer, 1, 1, inner), call.sizes)
    count = np.maximum(valid.sum(axis=axes, keepdims=True), 1)

    def mean_of(values: Array) -> Array:
        return np.where(valid, values, 0.0).sum(axis=axes, keepdims=True) / count

    x = np.where(valid, total.double().numpy(), 0.0)
    mean = mean_of(x)
    mean = mean + mean_of(x - mean) if call.is_centred else np.zeros_like(mean)
    var = mean_of((x - mean) ** 2)
    invstd = 1.0 / np.sqrt(var + call.eps)
    normalized = np.where(valid, (x - mean) * invstd, 0.0)
    weight = np.ones((groups, channels, 1))
    if inputs["weight"] is not None:
        weight = call.offset + inputs["weight"].double().numpy().reshape(weight.shape)
    z = normalized * weight
    if inputs["bias"] is not None:
        z = z + inputs["bias"].double().numpy().reshape(weight.shape)
    z = np.where(valid, z + array("residual"), 0.0)
    y = np.where(valid, activate(z, call.activation), 0.0)

    near = np.zeros(call.sizes, dtype=bool)
    for kink in KINKS[call.activation]:
        near |= np.abs(z - kink) < NEAR
    inputs["dy"] = torch.where(torch.from_numpy(near), 0, inputs["dy"])
    g = np.where(valid, array("dy") * activation_derivative(z, call.activation), 0.0)
    h = g * weight
    dx = h - normalized * mean_of(h * normalized)
    if call.is_centred:
        dx = dx - mean_of(h)
    dx = np.where(valid, dx * invstd + array("dtotal"), 0.0)
    dweight, dbias = (g * normalized).sum(axis=(0, 1, 4)).ravel(), g.sum(axis=(0, 1, 4)).ravel()
    return Expected(total.double().numpy(), mean.ravel(), var.ravel(), z, y, dx, dweight, dbias, g)
