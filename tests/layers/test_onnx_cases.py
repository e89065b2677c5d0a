"""The node cases that the onnx package generates for its normalization operators, put to our functions."""

from __future__ import annotations

import importlib

import numpy as np
import onnx
import pytest
import torch

from steadynorm import functional as S

MODULES = (
    "batch_normalization",
    "groupnormalization",
    "instance_normalization",
    "layernormalization",
    "rmsnormalization",
)


def collected():
    """Every generated case that is one node of a normalization; the expanded ones are other operators."""
    node = importlib.import_module("onnx.backend.test.case.node")
    for module in MODULES:
        importlib.import_module(f"onnx.backend.test.case.node.{module}")
    return [case for case in node._NodeTestCases if len(case.model.graph.node) == 1]


def attributes(node):
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def layer(x, weight, bias=None, *, axis=-1, epsilon=1e-5, **_):
    return (S.layer_norm(x, x.shape[axis:], weight, bias, epsilon),)


def rms(x, weight, *, axis=-1, epsilon=1e-5, **_):
    return (S.rms_norm(x, x.shape[axis:], weight, epsilon),)


def group(x, weight, bias, *, num_groups, epsilon=1e-5, **_):
    return (S.group_norm(x, num_groups, weight, bias, epsilon),)


def instance(x, weight, bias, *, epsilon=1e-5):
    return (S.instance_norm(x, weight=weight, bias=bias, eps=epsilon),)


def batch(x, weight, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0, **_):
    before = var.clone()
    y = S.batch_norm(x, mean, var, weight, bias, bool(training_mode), 1 - momentum, epsilon)
    if training_mode:
        # onnx remembers the biased variance, and its momentum is the weight of the past.
        count = x.numel() // x.shape[1]
        var = before * momentum + (var - before * momentum) * (count - 1) / count
    return y, mean, var


CALLS = {
    "BatchNormalization": batch,
    "GroupNormalization": group,
    "InstanceNormalization": instance,
    "LayerNormalization": layer,
    "RMSNormalization": rms,
}
CASES = collected()


def test_there_are_cases_of_every_operator():
    assert {case.model.graph.node[0].op_type for case in CASES} >= set(CALLS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node_case(case):
    node = case.model.graph.node[0]
    if node.op_type not in CALLS:
        pytest.skip(f"{node.op_type} is no normalization of ours")
    for inputs, outputs in case.data_sets:
        tensors = [torch.from_numpy(np.array(value)) for value in inputs]
        found = CALLS[node.op_type](*tensors, **attributes(node))
        for ours, theirs in zip(found, outputs, strict=False):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=case.rtol, atol=1e-5)
