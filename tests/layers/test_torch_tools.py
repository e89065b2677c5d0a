"""The tools of torch around a layer: autocast, memory formats, DDP, averaging, fusing, tracing by torch.fx."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn

from steadynorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_autocast(activation, dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation=activation))
    plain = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(8), nn.ReLU() if activation else nn.Identity())
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        y, expected = model(x), plain(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)
    y.square().mean().backward()
    expected.square().mean().backward()
    assert model[1].weight.grad.dtype == model[1].running_mean.dtype == torch.float32
    torch.testing.assert_close(model[1].weight.grad, plain[1].weight.grad, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(model[1].running_var, plain[1].running_var, rtol=1e-3, atol=1e-3)


def test_autocast_with_a_residual_from_outside_it():
    """The shortcut of the first block is float32, the branch bfloat16: their sum is float32, as x + residual is."""
    layer, x, residual = BatchNorm2d(3, activation="relu"), torch.randn(4, 3, 5, 5).bfloat16(), torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, residual)
    assert y.dtype == (x + residual).dtype
    torch.testing.assert_close(y, (nn.BatchNorm2d(3)(x.float()) + residual).relu(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", [None, "residual", "mask"])
@pytest.mark.parametrize(("kind", "shape"), [(BatchNorm2d, (4, 3, 6, 5)), (BatchNorm3d, (2, 3, 4, 5, 6))])
def test_channels_last_in_channels_last_out(kind, shape, extra, training):
    last = LAST[len(shape)]
    x = torch.randn(shape).contiguous(memory_format=last).requires_grad_()
    extras = {"residual": torch.randn(shape), "mask": torch.rand(shape[0], *shape[2:]) > 0.3}
    given = {} if extra is None else {extra: extras[extra]}
    layer, plain = kind(3).train(training), kind(3).train(training)
    y = layer(x, **given)
    y.backward(torch.randn(shape))
    assert y.is_contiguous(memory_format=last)
    assert x.grad.is_contiguous(memory_format=last)
    torch.testing.assert_close(y, plain(x.detach().contiguous(), **given))
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_ddp_with_two_forwards_and_one_backward(group_of_one):
    model = nn.Sequential(nn.Linear(4, 4), BatchNorm1d(4), BatchNorm1d(4).freeze_())
    buffers = [id(buffer) for buffer in model.buffers()]
    ddp = DistributedDataParallel(model)
    (ddp(torch.randn(8, 4)) * ddp(torch.randn(8, 4))).sum().backward()
    assert model[1].num_batches_tracked.item() == 2
    assert model[1].weight.grad is not None
    assert [id(buffer) for buffer in model.buffers()] == buffers
    fresh = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state := ddp.state_dict(), "module.")
    fresh.load_state_dict(state, strict=True)


def test_update_bn_gives_what_it_gives_for_torch():
    ours, theirs = nn.Sequential(BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    data = [torch.randn(16, 3) * 4 + 2 for _ in range(3)]
    for model in (ours, theirs):
        model(data[0] + 100)
        update_bn(data, model)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_averaged_model_of_ours_is_updated():
    model = nn.Sequential(BatchNorm1d(3))
    averaged = AveragedModel(model, use_buffers=True)
    model(torch.randn(8, 3) + 5)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].running_mean, model[0].running_mean)


def test_fusing_in_evaluation_is_right_without_an_activation():
    conv, norm = nn.Conv2d(3, 5, 3), BatchNorm2d(5)
    norm(torch.randn(16, 5, 4, 4) * 2 + 1)
    conv.eval(), norm.eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)), rtol=1e-4, atol=1e-5)
    linear, rows = nn.Linear(3, 5).eval(), BatchNorm1d(5).eval()
    torch.testing.assert_close(fuse_linear_bn_eval(linear, rows)(x[:, :, 0, 0]), rows(linear(x[:, :, 0, 0])))


def test_replacing_the_running_statistics_for_functional_transforms():
    layer, x = BatchNorm1d(3), torch.randn(8, 3)
    torch.func.replace_all_batch_norm_modules_(layer)
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
    torch.testing.assert_close(layer.eval()(x), nn.BatchNorm1d(3)(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3))
        self.norm = BatchNorm2d(3, activation="relu")

    def forward(self, x):
        return self.norm(self.conv(x), residual=x)


def test_fx_sees_one_node():
    block = Block()
    graph = torch.fx.symbolic_trace(block)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["conv.0", "conv.1", "norm"]
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(graph(x), Block.forward(copy.deepcopy(block), x))
    assert graph.get_submodule("norm").num_batches_tracked.item() == 1
