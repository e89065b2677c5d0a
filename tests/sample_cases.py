"""The inputs that every normalization within a sample is tried on, as data; see `tests/cases.py`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tests.cases import ACTIVATIONS, BRAIN, DOUBLE, FLOAT, HALF, Layout, laid_out, spoil
from tests.oracles import Labels, label_groups, label_positions, label_rows

Norm = Literal["layer", "rms", "gemma", "group", "instance", "channel"]


@dataclass
class SampleInputs:
    """The tensors of one case."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    addend: Tensor | None
    residual: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class SampleCase:
    """One input of a normalization within samples: `size` is how many last dimensions or groups."""

    name: str
    norm: Norm
    shape: tuple[int, ...]
    size: int = 1
    dtype: torch.dtype = FLOAT
    layout: Layout = "plain"
    cotangent_layout: Layout | None = None
    offset: float = 1.0
    deviation: float = 1.0
    eps: float = 1e-5
    is_affine: bool = True
    parameter_dtype: torch.dtype | None = None
    has_addend: bool = False
    has_residual: bool = False
    activation: str | None = None
    mask: Literal["lengths", "scattered", "lost sample"] | None = None

    def __str__(self) -> str:
        return f"{self.norm}, {self.name}"

    @property
    def is_centred(self) -> bool:
        return self.norm not in ("rms", "gemma")

    @property
    def weight_offset(self) -> float:
        return 1.0 if self.norm == "gemma" and self.is_affine else 0.0

    @property
    def groups(self) -> int:
        return self.shape[1] if self.norm == "instance" else self.size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        is_last = self.norm in ("layer", "rms", "gemma")
        return self.shape[len(self.shape) - self.size :] if is_last else self.shape[1:2]

    def labels(self) -> tuple[Labels, Labels]:
        """Which values share a statistic, and which a weight."""
        if self.norm in ("group", "instance"):
            return label_groups(self.shape, self.groups)
        return label_positions(self.shape) if self.norm == "channel" else label_rows(self.shape, self.size)

    def generator(self, what: str) -> np.random.Generator:
        """Random numbers that depend on nothing but the case and what they are for."""
        return np.random.default_rng(zlib.crc32(f"{self}/{what}".encode()))

    def inputs(self) -> SampleInputs:
        rng, mask = self.generator("weights"), self._mask()
        parameter = self.parameter_dtype or (torch.float64 if self.dtype == DOUBLE else torch.float32)
        weight, bias = (
            rng.normal(1.0 - self.weight_offset, 0.7, self.weight_shape),
            rng.normal(0, 0.7, self.weight_shape),
        )
        has_bias = self.is_affine and self.is_centred
        return SampleInputs(
            x=self._values("x", self.deviation, self._centers(), mask),
            weight=torch.from_numpy(weight).to(parameter) if self.is_affine else None,
            bias=torch.from_numpy(bias).to(parameter) if has_bias else None,
            addend=self._values("addend", 0.5 * self.deviation, 0.0, None) if self.has_addend else None,
            residual=self._values("residual", 1.0, 0.0, mask) if self.has_residual else None,
            mask=mask,
        )

    def cotangent(self, what: str = "cotangent") -> np.ndarray:
        """A random dy: the sum of a normalized output has gradient zero, so a plain sum would see nothing."""
        return self.generator(what).standard_normal(self.shape)

    def _centers(self) -> np.ndarray:
        """A mean of its own for every statistic."""
        statistics, _ = self.labels()
        rng, count = self.generator("centers"), int(statistics.max(initial=-1)) + 1
        return (self.offset * rng.uniform(0.5, 1.5, count) * rng.choice([-1.0, 1.0], count))[statistics]

    def _values(self, what: str, deviation: float, center: np.ndarray | float, mask: Tensor | None) -> Tensor:
        values = torch.from_numpy(center + deviation * self.generator(what).standard_normal(self.shape))
        return laid_out(spoil(values, mask).to(self.dtype), self.layout)

    def _mask(self) -> Tensor | None:
        if self.mask is None:
            return None
        n, _, *spatial = self.shape
        rng = self.generator("mask")
        if self.mask == "scattered":
            keep = rng.random((n, *spatial)) < 0.6
            keep.reshape(n, -1)[:, :2] = True
        elif self.mask == "lost sample":
            keep = np.ones((n, *spatial), dtype=bool)
            keep[n // 2] = False
        else:
            lengths = rng.integers(1, spatial[-1] + 1, n).reshape(n, *(1,) * len(spatial))
            keep = np.broadcast_to(np.arange(spatial[-1]) < lengths, (n, *spatial)).copy()
        return torch.from_numpy(keep)


ROWS = tuple(
    SampleCase(name, norm, shape, size, **options)
    for norm in ("layer", "rms")
    for name, shape, size, options in (
        ("plain", (4, 7, 24), 1, {}),
        ("primes", (3, 11, 13), 1, {}),
        ("two dimensions", (5, 4, 6), 2, {}),
        ("one row", (1, 50), 1, {}),
        ("one statistic", (37,), 1, {}),
        ("two values", (6, 2), 1, {}),
        ("wide", (3, 5000), 1, {}),
        ("many rows", (700, 9), 1, {}),
        ("channels last", (2, 6, 5, 7), 1, {"layout": "channels_last"}),
        ("channels last, whole samples", (3, 6, 5, 7), 3, {"layout": "channels_last"}),
        ("strided", (4, 5, 6), 1, {"layout": "strided"}),
        ("transposed", (4, 5, 6), 1, {"layout": "transposed"}),
        ("expanded cotangent", (4, 5, 6), 1, {"cotangent_layout": "expanded"}),
        ("large eps", (4, 24), 1, {"eps": 0.1}),
        ("tiny", (4, 24), 1, {"offset": 0.0, "deviation": 1e-6, "eps": 1e-12}),
        ("not affine", (4, 24), 1, {"is_affine": False}),
        ("float64", (4, 7, 24), 1, {"dtype": DOUBLE}),
        ("bfloat16", (9, 33), 1, {"dtype": BRAIN}),
        ("bfloat16 weights", (9, 33), 1, {"dtype": BRAIN, "parameter_dtype": BRAIN}),
        ("float16", (9, 33), 1, {"dtype": HALF}),
        ("float16, large", (9, 33), 1, {"dtype": HALF, "offset": 0.0, "deviation": 8e3}),
        ("add", (4, 7, 24), 1, {"has_addend": True}),
        ("add, bfloat16", (9, 33), 1, {"has_addend": True, "dtype": BRAIN}),
        ("add, float64", (9, 5), 1, {"has_addend": True, "dtype": DOUBLE}),
        ("add, channels last", (2, 6, 5, 7), 1, {"has_addend": True, "layout": "channels_last"}),
    )
)
ROW_EXTRAS = (
    SampleCase("offset 1e4", "layer", (6, 96), offset=1e4),
    SampleCase("offset 1e6, float64", "layer", (6, 96), offset=1e6, dtype=DOUBLE),
    *(SampleCase(name, "gemma", (9, 33), dtype=dtype) for name, dtype in (("plain", FLOAT), ("bfloat16", BRAIN))),
    SampleCase("add", "gemma", (9, 33), has_addend=True),
    SampleCase("not affine", "gemma", (9, 33), is_affine=False),
)
CHANNELS = tuple(
    SampleCase(name, norm, shape, size, **options)
    for norm, size in (("group", 3), ("instance", 1), ("channel", 1))
    for name, shape, options in (
        ("plain", (4, 6, 5, 7), {}),
        ("sequence", (3, 9, 31), {}),
        ("volume", (2, 6, 3, 4, 5), {}),
        ("two positions", (3, 6, 2), {}),
        ("images", (2, 12, 33, 32), {}),
        ("one sample", (1, 6, 5, 5), {}),
        ("channels last", (4, 12, 6, 5), {"layout": "channels_last"}),
        ("channels last, volume", (2, 6, 3, 4, 5), {"layout": "channels_last"}),
        ("channels last, plain cotangent", (2, 6, 5, 5), {"layout": "channels_last", "cotangent_layout": "plain"}),
        ("plain, channels last cotangent", (2, 6, 5, 5), {"cotangent_layout": "channels_last"}),
        ("strided", (2, 6, 5, 8), {"layout": "strided"}),
        ("transposed", (4, 6, 5, 5), {"layout": "transposed"}),
        ("offset 1e4", (4, 6, 14, 14), {"offset": 1e4}),
        ("offset 1e4, channels last", (4, 6, 14, 14), {"offset": 1e4, "layout": "channels_last"}),
        ("not affine", (4, 6, 5, 7), {"is_affine": False}),
        ("float64", (4, 6, 5, 7), {"dtype": DOUBLE}),
        ("bfloat16", (4, 6, 7, 9), {"dtype": BRAIN}),
        ("bfloat16, channels last", (4, 6, 7, 9), {"dtype": BRAIN, "layout": "channels_last"}),
        ("float16", (4, 6, 7, 9), {"dtype": HALF}),
    )
)
ONE_GROUP = (
    SampleCase("one group", "group", (4, 6, 5, 7), 1),
    SampleCase("no positions", "group", (7, 12), 3),
    SampleCase("every channel", "group", (4, 6, 5, 7), 6),
)
FUSED = (
    *(SampleCase(name, "group", (3, 6, 7, 5), 3, activation=name) for name in ACTIVATIONS),
    *(SampleCase(f"add, {name}", "group", (3, 6, 7, 5), 3, activation=name, has_residual=True) for name in ACTIVATIONS),
    # A kernel for each: few of the pairs of a type and an activation stand for all.
    *(
        SampleCase(
            f"add, {act or 'nothing'}, {what}", norm, (3, 6, 7, 5), size, activation=act, has_residual=True, **how
        )
        for norm, size in (("group", 2), ("instance", 1))
        for act, what, how in (
            *((act, "channels last", {"layout": "channels_last"}) for act in (None, "relu", "silu")),
            *((act, "bfloat16", {"dtype": BRAIN}) for act in ("relu", "silu")),
            ("silu", "float64", {"dtype": DOUBLE}),
        )
    ),
)
MASKED = tuple(
    SampleCase(name, norm, shape, size, mask=mask, **options)
    for norm, size in (("group", 2), ("instance", 1))
    for name, shape, mask, options in (
        ("lengths", (5, 4, 11), "lengths", {}),
        ("lengths of images", (4, 4, 5, 9), "lengths", {}),
        ("lengths, channels last", (4, 6, 5, 9), "lengths", {"layout": "channels_last"}),
        ("scattered", (5, 4, 6, 7), "scattered", {}),
        ("lost sample", (5, 4, 13), "lost sample", {}),
        ("lengths, add, relu", (5, 4, 11), "lengths", {"has_residual": True, "activation": "relu"}),
        ("lengths, add, silu", (5, 4, 11), "lengths", {"has_residual": True, "activation": "silu"}),
        ("lengths, bfloat16", (5, 4, 11), "lengths", {"dtype": BRAIN}),
        ("lengths, offset 1e4", (5, 4, 64), "lengths", {"offset": 1e4}),
        ("lengths, float64", (5, 4, 11), "lengths", {"dtype": DOUBLE}),
    )
)

ALL = (*ROWS, *ROW_EXTRAS, *CHANNELS, *ONE_GROUP, *FUSED, *MASKED)
BY_NAME = {str(case): case for case in ALL}
