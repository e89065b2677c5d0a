"""torch's own samples for its batch normalizations, put to ours: `torch.testing._internal.common_modules`."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import unittest

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import steadynorm

NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


@pytest.fixture(scope="module")
def entries():
    """The entries of torch's table of modules, by class name."""
    with pytest.MonkeyPatch.context() as patch:
        if "expecttest" not in sys.modules:
            # The table lives beside test classes that derive from this package's; the table itself needs nothing of it.
            stand_in = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase
            patch.setitem(sys.modules, "expecttest", stand_in)
        from torch.testing._internal.common_modules import module_db
    return {info.name.removeprefix("nn."): info for info in module_db}


def samples(entries, name, *, dtype=torch.float64, training=True):
    """(description, our layer, torch's layer, input) for every sample that torch lists."""
    info = entries[name]
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
        args, kwargs = sample.constructor_input.args, {**sample.constructor_input.kwargs, "dtype": dtype}
        ours, theirs = getattr(steadynorm, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
        (x,) = sample.forward_input.args
        yield sample.desc, ours.train(training), theirs.train(training), x


def step(layer, x, cotangent):
    """Output, gradients and state after one forward and backward."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(cotangent)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(layer.named_buffers())}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_same_results_as_torch(entries, name, dtype, training):
    for desc, ours, theirs, x in samples(entries, name, dtype=dtype, training=training):
        cotangent = torch.randn_like(x)
        found, expected = step(ours, x, cotangent), step(theirs, x, cotangent)
        if x.numel() == 0:
            # torch counts an empty batch; ours counts what moved the statistics.
            expected["num_batches_tracked"] = torch.tensor(0)
        torch.testing.assert_close(found, expected, msg=lambda text, desc=desc: f"{desc}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_memory_order_plays_no_part(entries, name):
    for desc, ours, _, x in samples(entries, name):
        strided = torch.empty((*x.shape, 2), dtype=x.dtype)[..., 0].copy_(x.detach())
        transposed = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
        cotangent = torch.randn_like(x)
        expected = step(copy.deepcopy(ours), x, cotangent)
        for other in (strided, transposed):
            torch.testing.assert_close(
                step(copy.deepcopy(ours), other, cotangent), expected, msg=lambda t, d=desc: d + t
            )
        expanded = torch.randn(1, *x.shape[1:], dtype=x.dtype).expand(x.shape)
        torch.testing.assert_close(step(copy.deepcopy(ours), x, expanded), step(ours, x, expanded.contiguous()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives(entries, name, training):
    for desc, layer, _, x in samples(entries, name, training=training):
        parameters = dict(layer.named_parameters())

        def call(x, *values, layer=layer, parameters=parameters):
            return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

        assert gradcheck(call, (x, *parameters.values()), fast_mode=True), desc
        assert gradgradcheck(call, (x, *parameters.values()), fast_mode=True), desc


@pytest.mark.parametrize("name", NAMES)
def test_pickles_and_copies(entries, name):
    for desc, layer, _, x in samples(entries, name):
        layer(x)
        for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert repr(other) == repr(layer), desc
            assert torch.equal(other(x), copy.deepcopy(layer)(x)), desc


@pytest.mark.parametrize("name", NAMES)
def test_inputs_torch_refuses_are_refused(entries, name):
    info = entries[name]
    listed = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    assert listed
    for error in listed:
        sample = error.module_error_input
        # torch notices in the first forward, ours at construction.
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(steadynorm, name)(*sample.constructor_input.args, **sample.constructor_input.kwargs)
