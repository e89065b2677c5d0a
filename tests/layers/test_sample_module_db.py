"""torch's own samples for its normalizations within a sample, put to ours."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

import steadynorm
from tests.layers import test_module_db
from tests.layers.test_module_db import step

entries = test_module_db.entries
NAMES = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")


def samples(entries, name, dtype, training):
    """(sample, our layer, torch's layer, input) for every sample that torch lists."""
    info = entries[name]
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
        args, kwargs = sample.constructor_input.args, {**sample.constructor_input.kwargs, "dtype": dtype}
        ours, theirs = getattr(steadynorm, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
        (x,) = sample.forward_input.args
        yield sample, ours.train(training), theirs.train(training), x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_same_results_as_torch(entries, name, dtype, training):
    count = 0
    for sample, ours, theirs, x in samples(entries, name, dtype, training):
        count += 1
        cotangent = torch.randn_like(x)
        found, expected = step(ours, x, cotangent), step(theirs, x, cotangent)
        # torch's instance norms have a counter and do not count.
        found.pop("num_batches_tracked", None), expected.pop("num_batches_tracked", None)
        torch.testing.assert_close(found, expected, msg=lambda text, sample=sample: f"{sample.desc}: {text}")
    assert count, "torch lists samples"


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(entries, name):
    for sample, layer, _, x in samples(entries, name, torch.float64, True):
        parameters = dict(layer.named_parameters())

        def call(x, *values, layer=layer, parameters=parameters):
            return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

        with steadynorm.backend("reference"):
            assert gradcheck(call, (x, *parameters.values()), fast_mode=True), sample.desc


@pytest.mark.parametrize("name", NAMES)
def test_memory_order_plays_no_part(entries, name):
    for sample, ours, _, x in samples(entries, name, torch.float32, True):
        strided = torch.empty((*x.shape, 2), dtype=x.dtype)[..., 0].copy_(x.detach())
        cotangent = torch.randn_like(x)
        expected = step(copy.deepcopy(ours), x, cotangent)
        found = step(copy.deepcopy(ours), strided, cotangent)
        torch.testing.assert_close(found, expected, msg=lambda text, sample=sample: f"{sample.desc}: {text}")
