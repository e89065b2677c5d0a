"""The inputs that every implementation is tried on, as data.

A case is only its description; `inputs()` makes the tensors, the same ones every time.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ACTIVATIONS = ("relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "elu")
FLOAT, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16

Layout = Literal["plain", "channels_last", "strided", "transposed", "expanded"]


@dataclass
class Inputs:
    """The tensors of one case. `x` and `residual` (N, C, *), `mask` (N, *spatial), the others (C,)."""

    x: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Case:
    """One input of batch normalization, described.

    `offset` and `deviation` are those of a typical channel; `special` plants something nasty in the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = FLOAT
    layout: Layout = "plain"
    cotangent_layout: Layout | None = None
    offset: float = 1.0
    deviation: float = 1.0
    eps: float = 1e-5
    momentum: float = 0.1
    is_affine: bool = True
    parameter_dtype: torch.dtype | None = None
    has_residual: bool = False
    activation: str | None = None
    mask: Literal["lengths", "scattered", "lost sample"] | None = None
    special: Literal["constant channel", "first sample zero", "one channel huge"] | None = None
    training: bool = True

    def __str__(self) -> str:
        return self.name

    def generator(self, what: str) -> np.random.Generator:
        """Random numbers that depend on nothing but the case and what they are for."""
        return np.random.default_rng(zlib.crc32(f"{self.name}/{what}".encode()))

    def inputs(self) -> Inputs:
        c = self.shape[1]
        rng = self.generator("channels")
        wide = torch.float64 if self.dtype == DOUBLE else torch.float32
        parameter = self.parameter_dtype or wide
        center = self.offset * rng.uniform(0.5, 1.5, c) * rng.choice([-1.0, 1.0], c)
        scale = self.deviation * rng.uniform(0.5, 2.0, c)
        weight, bias = rng.normal(1.0, 0.7, c), rng.normal(0.0, 0.7, c)
        if c >= 4:
            weight[2] = 0.0  # what cannot be recovered from the output
        mask = self._mask()
        return Inputs(
            x=self._x(center, scale, mask),
            running_mean=torch.from_numpy(center + scale * rng.normal(0, 0.5, c)).to(wide),
            running_var=torch.from_numpy(scale**2 * rng.uniform(0.5, 2.0, c)).to(wide),
            weight=torch.from_numpy(weight).to(parameter) if self.is_affine else None,
            bias=torch.from_numpy(bias).to(parameter) if self.is_affine else None,
            residual=self._residual(mask) if self.has_residual else None,
            mask=mask,
        )

    def cotangent(self) -> np.ndarray:
        """A random dy: the sum of a normalized output has gradient zero, so a plain sum would see nothing."""
        return self.generator("cotangent").standard_normal(self.shape)

    def _x(self, center: np.ndarray, scale: np.ndarray, mask: Tensor | None) -> Tensor:
        per_channel = (1, -1, *(1,) * (len(self.shape) - 2))
        x = self.generator("x").standard_normal(self.shape)
        x = center.reshape(per_channel) + scale.reshape(per_channel) * x
        if self.special == "constant channel":
            x[:, 1] = 12345.678
        elif self.special == "first sample zero":
            x[0] = 0.0
        elif self.special == "one channel huge":
            x[:, 0] *= 1e12
        return laid_out(spoil(torch.from_numpy(x), mask).to(self.dtype), self.layout)

    def _residual(self, mask: Tensor | None) -> Tensor:
        residual = torch.from_numpy(self.generator("residual").standard_normal(self.shape))
        return laid_out(spoil(residual, mask).to(self.dtype), self.layout)

    def _mask(self) -> Tensor | None:
        n, _, *spatial = self.shape
        rng = self.generator("mask")
        if self.mask is None:
            return None
        if self.mask == "scattered":
            keep = rng.random((n, *spatial)) < 0.6
            keep.reshape(-1)[:2] = True
            return torch.from_numpy(keep)
        if self.mask == "lost sample":
            keep = np.ones((n, *spatial), dtype=bool)
            keep[n // 2] = False
            return torch.from_numpy(keep)
        lengths = rng.integers(1, spatial[-1] + 1, n)
        keep = np.arange(spatial[-1]) < lengths.reshape(n, *(1,) * len(spatial))
        return torch.from_numpy(np.broadcast_to(keep, (n, *spatial)).copy())


def spoil(values: Tensor, mask: Tensor | None) -> Tensor:
    """NaN wherever the mask is false: what is in the padding must not matter."""
    return values if mask is None else torch.where(mask[:, None], values, math.nan)


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """The values of `x` (N, C, *) in another memory layout. `expanded` repeats the first sample (stride 0)."""
    if layout == "channels_last":
        return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])
    if layout == "strided":
        roomy = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        roomy[..., ::2] = x
        return roomy[..., ::2]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


PLAIN = Case("plain", (8, 5, 6, 7))

SHAPES = (
    PLAIN,
    Case("primes", (7, 11, 13, 3)),
    Case("powers of two", (8, 16, 8, 8)),
    Case("one sample", (1, 6, 5, 5)),
    Case("one position", (9, 6, 1, 1)),
    Case("one channel", (5, 1, 4, 6)),
    Case("two values", (2, 3)),
    Case("two values in one sample", (1, 3, 2)),
    Case("rows", (33, 17)),
    Case("rows, one channel", (19, 1)),
    Case("many rows, few channels", (500, 3)),
    Case("few rows, many channels", (3, 700)),
    Case("sequence", (4, 9, 31)),
    Case("volume", (2, 5, 3, 4, 6)),
    Case("7x7", (4, 24, 7, 7)),
    Case("14x14", (3, 17, 14, 14)),
    Case("images", (4, 3, 32, 32)),
    Case("long", (2, 2, 40_000)),
    Case("many samples", (700, 4, 3, 3)),
)
LAYOUTS = (
    Case("channels last", (4, 16, 6, 5), layout="channels_last"),
    Case("channels last, primes", (3, 13, 7, 5), layout="channels_last"),
    Case("channels last, three channels", (4, 3, 16, 16), layout="channels_last"),
    Case("channels last, wide", (2, 130, 3, 3), layout="channels_last"),
    Case("channels last, 7x7", (4, 40, 7, 7), layout="channels_last"),
    Case("channels last, large", (8, 12, 40, 40), layout="channels_last"),
    Case("channels last, volume", (2, 6, 3, 4, 5), layout="channels_last"),
    Case("channels last, plain cotangent", (4, 8, 5, 5), layout="channels_last", cotangent_layout="plain"),
    Case("plain, channels last cotangent", (4, 8, 5, 5), cotangent_layout="channels_last"),
    Case("expanded cotangent", (4, 8, 5, 5), cotangent_layout="expanded"),
    Case("strided", (4, 6, 5, 8), layout="strided"),
    Case("transposed", (4, 6, 5, 5), layout="transposed"),
    Case("transposed rows", (12, 6), layout="transposed"),
    Case("expanded", (4, 6, 5, 5), layout="expanded"),
)
VALUES = (
    Case("offset 1e4", (8, 6, 14, 14), offset=1e4),
    Case("offset 1e4, rows", (512, 6), offset=1e4),
    Case("offset 1e4, channels last", (8, 6, 14, 14), offset=1e4, layout="channels_last"),
    Case("offset 1e6", (8, 6, 14, 14), offset=1e6),
    Case("tiny variance", (8, 5, 6, 6), offset=0.1, deviation=1e-4),
    Case("tiny variance, tiny eps", (8, 5, 6, 6), offset=0.0, deviation=1e-6, eps=1e-12),
    Case("large eps", PLAIN.shape, eps=0.1),
    Case("constant channel", (6, 4, 5, 5), special="constant channel"),
    Case("first sample zero", (8, 4, 12, 12), offset=1e4, special="first sample zero"),
    Case("one channel huge", (6, 4, 5, 5), special="one channel huge"),
    Case("slow running statistics", PLAIN.shape, momentum=0.01),
    Case("no memory of the past", PLAIN.shape, momentum=1.0),
    Case("not affine", PLAIN.shape, is_affine=False),
)
DTYPES = (
    Case("float64", PLAIN.shape, dtype=DOUBLE),
    Case("float64, offset 1e6", PLAIN.shape, dtype=DOUBLE, offset=1e6),
    Case("float64, channels last", (4, 7, 5, 5), dtype=DOUBLE, layout="channels_last"),
    Case("bfloat16", (8, 6, 7, 9), dtype=BRAIN),
    Case("bfloat16, channels last", (8, 6, 7, 9), dtype=BRAIN, layout="channels_last"),
    Case("bfloat16, rows", (65, 19), dtype=BRAIN),
    Case("bfloat16 parameters", (8, 6, 7, 9), dtype=BRAIN, parameter_dtype=BRAIN),
    Case("float16", (8, 6, 7, 9), dtype=HALF),
    Case("float16, large values", (8, 6, 7, 9), dtype=HALF, offset=0.0, deviation=5e3),
    Case("float16, channels last", (8, 6, 7, 9), dtype=HALF, layout="channels_last"),
)
FUSED = (
    *(Case(f"{name}", (6, 5, 7, 5), activation=name) for name in ACTIVATIONS),
    *(Case(f"add, {name}", (6, 5, 7, 5), activation=name, has_residual=True) for name in ACTIVATIONS),
    Case("add", (6, 5, 7, 5), has_residual=True),
    *(
        Case(f"add, {name}, {what}", shape, activation=name, has_residual=True, layout=layout)
        for what, shape, layout in (("rows", (41, 18), "plain"), ("channels last", (4, 18, 3, 5), "channels_last"))
        for name in ("relu", "silu")
    ),
    Case("relu, bfloat16", (8, 6, 7, 9), dtype=BRAIN, activation="relu"),
    Case("add, gelu, bfloat16", (8, 6, 7, 9), dtype=BRAIN, activation="gelu", has_residual=True),
    Case("add, relu, float16", (8, 6, 7, 9), dtype=HALF, activation="relu", has_residual=True),
    Case("add, silu, float64", (6, 5, 7, 5), dtype=DOUBLE, activation="silu", has_residual=True),
    Case("add, relu, strided", (4, 6, 5, 8), layout="strided", activation="relu", has_residual=True),
    Case("relu, not affine", PLAIN.shape, activation="relu", is_affine=False),
    Case("relu6, offset 1e4", (8, 6, 14, 14), offset=1e4, activation="relu6"),
)
MASKED = (
    Case("lengths", (5, 4, 11), mask="lengths"),
    Case("lengths of images", (4, 3, 5, 9), mask="lengths"),
    Case("lengths, channels last", (4, 6, 5, 9), mask="lengths", layout="channels_last"),
    Case("scattered mask", (5, 4, 6, 7), mask="scattered"),
    Case("masked rows", (31, 6), mask="scattered"),
    Case("lost sample", (5, 4, 13), mask="lost sample"),
    Case("lengths, add, relu", (5, 4, 11), mask="lengths", has_residual=True, activation="relu"),
    Case("lengths, gelu", (5, 4, 11), mask="lengths", activation="gelu"),
    Case("lengths, bfloat16", (5, 4, 11), mask="lengths", dtype=BRAIN),
    Case("lengths, offset 1e4", (5, 4, 64), mask="lengths", offset=1e4),
    Case("lengths, float64", (5, 4, 11), mask="lengths", dtype=DOUBLE),
)
# Around the widths of vector registers (4, 8, 16 floats) and the unrolled multiples of them, with every tail.
WIDTHS = tuple(Case(f"width {length}", (2, 3, length)) for length in range(1, 71))
COLUMNS = tuple(Case(f"columns {c}", (9, c), activation="relu", has_residual=True) for c in range(1, 71, 3))

TRAINING = (*SHAPES, *LAYOUTS, *VALUES, *DTYPES, *FUSED, *MASKED)
EVALUATION = tuple(replace(case, name=f"{case.name}, evaluation", training=False) for case in TRAINING)
ALL = (*TRAINING, *EVALUATION)
BY_NAME = {case.name: case for case in ALL}
