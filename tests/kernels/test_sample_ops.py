from __future__ import annotations

from typing import Any

import pytest
import torch

from steadynorm import grouping as grouping_
from steadynorm import kernels
from steadynorm.errors import BackendError
from steadynorm.kernels import reference_sample
from steadynorm.kernels.backends import choose_sample
from steadynorm.kernels.sample_ops import OPS
from tests.sample_agree import Bench
from tests.sample_cases import BY_NAME, SampleCase

NAMES = (
    "layer, plain",
    "layer, add",
    "rms, bfloat16",
    "rms, add",
    "gemma, plain",
    "group, plain",
    "group, channels last",
    "group, lengths, add, relu",
    "group, add, silu",
    "instance, not affine",
    "channel, plain",
    "channel, channels last",
)


def arguments(case: SampleCase) -> dict[str, tuple[Any, ...]]:
    """What each op is called with, for one case."""
    bench = Bench.of(case)
    inputs = bench.inputs
    match case.norm:
        case "group" | "instance":
            total, view = grouping_.sample_groups(bench.total, case.groups)
        case "channel":
            total, view = grouping_.positions(bench.total)
        case _:
            total, view = grouping_.layer(bench.total, case.size)
    dy, residual = (None if t is None else grouping_.dense_like(t, total) for t in (bench.dy, inputs.residual))
    mask = None if inputs.mask is None else inputs.mask.reshape(view.samples, view.outer * view.inner)
    affine = (inputs.weight, inputs.bias)
    settings = (mask, case.eps, case.activation, case.is_centred, case.weight_offset)
    _, _, mean, var = reference_sample.sample_forward(total, None, view, *affine, residual, *settings)
    ahead = (dy, bench.dtotal, total, *view, mean, var, *affine, residual, None, *settings)
    return {
        "sample_forward": (total, inputs.addend, *view, *affine, residual, *settings),
        "sample_backward": (*ahead, residual is not None, inputs.weight is not None),
    }


@pytest.mark.parametrize("op", ["sample_forward", "sample_backward"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(op, name):
    """Schema (what is written to, what aliases), and that fake tensors have the form of the real ones."""
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(OPS, op), arguments(BY_NAME[name])[op], test_utils=utilities)


@pytest.mark.parametrize("name", NAMES)
def test_the_ops_are_the_backend(name):
    for op, args in arguments(BY_NAME[name]).items():
        with kernels.backend("reference"):
            expected = getattr(OPS, op)(*args)
        for one, two in zip(expected, getattr(OPS, op)(*args), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_what_is_not_asked_for_is_empty():
    args = arguments(BY_NAME["layer, add"])["sample_backward"][:-2]
    _, dweight, dbias, dresidual = OPS.sample_backward(*args, False, False)
    assert dweight.numel() == dbias.numel() == dresidual.numel() == 0


def test_a_tensor_that_no_compiled_backend_takes():
    x, view = grouping_.layer(torch.ones(4, 4, device="meta"), 1)
    assert choose_sample(x, view) is reference_sample
    with kernels.backend("reference"):
        assert choose_sample(torch.ones(4, 4), view) is reference_sample
    if kernels.status()[0].is_available:
        with kernels.backend("numba"), pytest.raises(BackendError, match="cannot take this tensor"):
            choose_sample(x, view)
