"""A masked batch is the batch of its valid values: in output, running statistics and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from steadynorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

LENGTHS = torch.tensor([7, 2, 5, 1])


def sequences(fill: float, *, room: int = 7) -> Tensor:
    """Four sequences of 3 channels, padded with `fill` to `room` positions; the same values every time."""
    generator = torch.Generator().manual_seed(4)
    x = torch.full((4, 3, room), fill, dtype=torch.float64)
    for row, length in zip(x, LENGTHS.tolist(), strict=True):
        row[:, :length] = torch.randn(3, length, generator=generator, dtype=torch.float64) * 2 + 5
    return x


def mask_of(room: int = 7) -> Tensor:
    return torch.arange(room) < LENGTHS[:, None]


def concatenated(x: Tensor, mask: Tensor) -> Tensor:
    """The valid values of `x` (N, C, *) as rows (count, C)."""
    return x.movedim(1, -1)[mask]


def step(layer: nn.Module, x: Tensor, cotangent: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient of one training step; weight and bias keep theirs."""
    x = x.clone().requires_grad_()
    y = layer(x, **extras)
    y.backward(cotangent)
    return y.detach(), x.grad


def affine(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 0.7]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("fill", [0.0, 1e30, math.nan, math.inf])
def test_masked_equals_concatenated(fill, momentum, training):
    x, mask = sequences(fill), mask_of()
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    ours = affine(BatchNorm1d(3, momentum=momentum, dtype=torch.float64)).train(training)
    theirs = affine(nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)).train(training)
    y, dx = step(ours, x, cotangent, mask=mask)
    y_rows, dx_rows = step(theirs, concatenated(x, mask), concatenated(cotangent, mask))

    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(concatenated(y, mask), y_rows, **close)
    torch.testing.assert_close(concatenated(dx, mask), dx_rows, **close)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **close)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, **close)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, **close)
    assert (concatenated(y, ~mask) == 0).all()
    assert (concatenated(dx, ~mask) == 0).all()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_residual_and_activation_under_a_mask(activation):
    x, mask = sequences(math.nan), mask_of()
    residual = torch.randn(x.shape, dtype=torch.float64)
    residual = torch.where(mask[:, None], residual, math.nan).requires_grad_()
    y = BatchNorm1d(3, dtype=torch.float64, activation=activation)(x, residual, mask)
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    y.backward(cotangent)

    rows = concatenated(residual.detach(), mask).requires_grad_()
    expected = nn.BatchNorm1d(3, dtype=torch.float64)(concatenated(x, mask)) + rows
    expected = expected if activation is None else getattr(nn.functional, activation)(expected)
    expected.backward(concatenated(cotangent, mask))
    torch.testing.assert_close(concatenated(y, mask), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(concatenated(residual.grad, mask), rows.grad, rtol=0, atol=1e-12)
    assert (concatenated(residual.grad, ~mask) == 0).all()


def test_lengths_are_the_mask_they_stand_for():
    by_lengths, by_mask = BatchNorm1d(3, dtype=torch.float64), BatchNorm1d(3, dtype=torch.float64)
    x = sequences(math.nan)
    assert torch.equal(by_lengths(x, lengths=LENGTHS), by_mask(x, mask=mask_of()))
    assert torch.equal(by_lengths.running_var, by_mask.running_var)
    assert torch.equal(by_lengths.eval()(x, lengths=LENGTHS.int()), by_mask.eval()(x, mask=mask_of()))


@pytest.mark.parametrize("room", [7, 8, 20])
def test_how_much_padding_there_is_plays_no_part(room):
    layer, longer = BatchNorm1d(3, dtype=torch.float64), BatchNorm1d(3, dtype=torch.float64)
    y, y_longer = layer(sequences(0.0), lengths=LENGTHS), longer(sequences(9.0, room=room), lengths=LENGTHS)
    torch.testing.assert_close(y, y_longer[..., :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.running_var, longer.running_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "shape"), [(BatchNorm2d, (4, 3, 5, 7)), (BatchNorm3d, (4, 3, 2, 5, 7))])
def test_lengths_of_images_and_volumes_count_along_the_last_axis(kind, shape):
    x = torch.randn(shape)
    mask = mask_of().view(4, *[1] * (len(shape) - 3), 7).expand(4, *shape[2:])
    y = kind(3)(torch.where(mask[:, None], x, math.nan), lengths=LENGTHS)
    torch.testing.assert_close(concatenated(y, mask), nn.BatchNorm1d(3)(concatenated(x, mask)))


def test_an_all_true_mask_is_no_mask():
    x, layer, masked = sequences(0.0), BatchNorm1d(3, dtype=torch.float64), BatchNorm1d(3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), masked(x, mask=torch.ones(4, 7, dtype=torch.bool)), rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.running_var, masked.running_var, rtol=0, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("guard", ["skip", "raise", "propagate"])
@pytest.mark.parametrize("valid", [0, 1])
def test_fewer_than_two_valid_values_leave_the_running_statistics_alone(valid, guard, momentum):
    layer = BatchNorm1d(3, guard=guard, momentum=momentum)
    layer(torch.randn(8, 3, 4))
    before = [buffer.clone() for buffer in layer.buffers()]
    x = torch.randn(4, 3, 7, requires_grad=True)
    mask = torch.zeros(4, 7, dtype=torch.bool)
    mask[1, :valid] = True
    y = layer(x, mask=mask)
    y.backward(torch.randn(y.shape))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    assert (y == 0).all(), "one value less its mean is zero, and the bias is zero"
    assert (x.grad == 0).all()
    assert torch.isfinite(layer.weight.grad).all()


def test_gradients_of_a_masked_batch_to_second_order():
    mask = mask_of()
    layer = BatchNorm1d(3, dtype=torch.float64, activation="silu")
    x, residual = sequences(0.0).requires_grad_(), torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual, mask))

    inputs = (x, residual, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_a_training_run_on_padded_data_gives_the_statistics_of_the_data():
    """With padding in, p the padded share, the mean would be (1 − p)·5 and the variance wrong as well."""
    layer = BatchNorm1d(3, momentum=None, dtype=torch.float64)
    x, mask = sequences(0.0), mask_of()
    for _ in range(3):
        layer(x, mask=mask)
    rows = concatenated(x, mask)
    torch.testing.assert_close(layer.running_mean, rows.mean(0))
    torch.testing.assert_close(layer.running_var, rows.var(0))
