"""Errors against float64 are no larger than torch's, in every family, layout and dtype.

The largest error of a case is decided by chance in the last bit, one seed for ours and the next for torch's; its mean
over seeds is not.
"""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from torch.nn import functional as F

from steadynorm import functional
from steadynorm.functional.layer import normalize_positions

SEEDS = 16
HALF = (torch.bfloat16, torch.float16)
CHANCE = dict.fromkeys(HALF, 1.001)
"""Both are off by the one rounding to the half type, half an ulp, give or take the error of float32 before it."""
DTYPES = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in HALF)]


def _positions(x, w, b):
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], w, b).movedim(-1, 1)


FAMILIES = {
    "layer": (
        lambda x, w, b: functional.layer_norm(x, x.shape[1:], w, b),
        lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b),
    ),
    "rms": (lambda x, w, b: functional.rms_norm(x, x.shape[1:], w), lambda x, w, b: F.rms_norm(x, x.shape[1:], w)),
    "group": (lambda x, w, b: functional.group_norm(x, 4, w, b), lambda x, w, b: F.group_norm(x, 4, w, b)),
    "instance": (
        lambda x, w, b: functional.instance_norm(x, weight=w, bias=b),
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    ),
    "channels": (lambda x, w, b: normalize_positions(x, w, b, eps=1e-5), _positions),
}
ROWS = ((32, 256), (300, 96), (257, 1000))
IMAGES = ((3, 32, 16, 16), (2, 24, 17, 19))
OF_IMAGES = ("group", "instance", "channels")
CASES = [
    *((family, shape, False) for family in ("layer", "rms") for shape in ROWS),
    *((family, shape, last) for family in OF_IMAGES for shape in IMAGES for last in (False, True)),
]


def results(call, tensors, dtype, family):
    x, weight, bias, dy = (t.to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in ((x, weight) if family == "rms" else (x, weight, bias))]
    y = call(x, weight, bias)
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, dy))]


@pytest.mark.parametrize(("family", "shape", "last"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_no_larger_than_torchs(family, shape, last, dtype):
    ours, theirs = FAMILIES[family]
    found = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        if last:
            x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
        weight, bias = (torch.randn(shape[1], generator=generator).to(dtype) for _ in range(2))
        tensors = x, weight, bias, dy
        exact = results(theirs, tensors, torch.float64, family)
        for call in (ours, theirs):
            errors = zip(results(call, tensors, dtype, family), exact, strict=True)
            found.append([((a - b).abs().max() / b.abs().max()).item() for a, b in errors])
    mine, other = ([fmean(each) for each in zip(*rows, strict=True)] for rows in (found[::2], found[1::2]))
    for name, own, their in zip(("y", "dx", "dweight", "dbias"), mine, other, strict=False):
        assert own <= their * CHANCE.get(dtype, 1.0), f"{name} is off by {own:.2e}, torch's by {their:.2e}"
