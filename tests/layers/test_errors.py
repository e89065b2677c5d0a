"""What a layer says about input it cannot take; one value per channel, and none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

DEGENERATE = [
    (BatchNorm1d, (1, 3)),
    (BatchNorm1d, (1, 3, 1)),
    (BatchNorm2d, (1, 3, 1, 1)),
    (BatchNorm3d, (1, 3, 1, 1, 1)),
]


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (BatchNorm2d, (32, 3), "BatchNorm2d expected (N, C, H, W), got (32, 3): use BatchNorm1d for (N, C)."),
        (
            BatchNorm2d,
            (3, 8, 8),
            "BatchNorm2d expected (N, C, H, W), got (3, 8, 8): use BatchNorm1d for (N, C, L), or x.unsqueeze(0) for one"
            " sample.",
        ),
        (
            BatchNorm3d,
            (2, 3, 4, 4),
            "BatchNorm3d expected (N, C, D, H, W), got (2, 3, 4, 4): use BatchNorm2d for (N, C, H, W), or"
            " x.unsqueeze(0) for one sample.",
        ),
        (BatchNorm1d, (3,), "BatchNorm1d expected (N, C) or (N, C, L), got (3,): one sample needs x.unsqueeze(0)."),
        (BatchNorm2d, (2, 1, 3, 4, 4, 4), "BatchNorm2d expected (N, C, H, W), got (2, 1, 3, 4, 4, 4): reshape it."),
        (BatchNorm2d, (), "BatchNorm2d expected (N, C, H, W), got (): reshape it."),
        (
            BatchNorm2d,
            (2, 5, 4, 4),
            "BatchNorm2d expected 3 channels in dimension 1, got shape (2, 5, 4, 4): construct it with num_features=5.",
        ),
        (
            BatchNorm1d,
            (2, 7, 3),
            "BatchNorm1d expected 3 channels in dimension 1, got shape (2, 7, 3): move them with x.movedim(-1, 1).",
        ),
    ],
)
def test_shapes(kind, shape, message):
    with pytest.raises(InputError) as error:
        kind(3)(torch.ones(shape))
    assert str(error.value) == message


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_only_floating_point(dtype):
    with pytest.raises(InputError, match=f"expected a floating-point tensor, got {dtype}: convert it"):
        BatchNorm1d(3)(torch.ones(4, 3, dtype=dtype))


def test_the_message_names_the_path_of_the_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([BatchNorm2d(3), BatchNorm2d(3)])

        def forward(self, x):
            return self.norms[1](x)

    with pytest.raises(InputError, match=r"^BatchNorm2d at 1\.norms\.1 expected \(N, C, H, W\), got \(4, 3\)"):
        nn.Sequential(nn.Identity(), Block())(torch.ones(4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": -1e-5}, "eps must be positive, got -1e-05"),
        ({"eps": float("nan")}, "eps must be positive, got nan"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], the weight of the new batch, or None .* got 1.5"),
        ({"momentum": -0.1}, "momentum must be in .* got -0.1"),
        ({"activation": "tanh"}, "activation must be one of None, 'relu', .*, 'elu', got 'tanh'"),
        ({"activation": nn.ReLU}, "activation must be one of None, 'relu'"),
        ({"guard": "ignore"}, "guard must be one of 'skip', 'raise', 'propagate', got 'ignore'"),
        ({"debias": "yes"}, "debias must be one of False, True, got 'yes'"),
        ({"single_value": "skip"}, "single_value must be one of 'error', 'running', got 'skip'"),
    ],
)
def test_options_are_checked_when_given_and_when_set(options, message):
    with pytest.raises(InputError, match=f"^BatchNorm1d: {message}"):
        BatchNorm1d(3, **options)
    layer = BatchNorm1d(3)
    vars(layer).update(options)
    with pytest.raises(InputError, match=message):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize(("switch", "value"), [("normalize_by", "runing"), ("update_running", "no")])
def test_switches_are_checked(switch, value):
    layer = BatchNorm1d(3)
    setattr(layer, switch, value)
    with pytest.raises(InputError, match=f"{switch} must be one of None, .* got '{value}'"):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"mask": torch.ones(4, 7)}, r"mask \(4, 7\) of torch.bool, .* got \(4, 7\) of torch.float32"),
        ({"mask": torch.ones(4, 1, 7, dtype=torch.bool)}, r"mask \(4, 7\) .* got \(4, 1, 7\) of torch.bool"),
        ({"lengths": torch.ones(4)}, r"lengths \(4,\) of an integer dtype, got \(4,\) of torch.float32"),
        ({"lengths": torch.ones(5, dtype=torch.int64)}, r"lengths \(4,\) .* got \(5,\) of torch.int64"),
        ({"lengths": torch.ones(4, dtype=torch.bool)}, r"lengths \(4,\) of an integer dtype, .* torch.bool"),
        (
            {"lengths": torch.ones(4, dtype=torch.int64), "mask": torch.ones(4, 7, dtype=torch.bool)},
            "got both mask and lengths, expected one",
        ),
        ({"residual": torch.ones(4, 3, 1)}, r"residual got shape \(4, 3, 1\), expected that of x, \(4, 3, 7\)"),
    ],
)
def test_what_comes_with_the_input(extras, message):
    with pytest.raises(InputError, match=message):
        BatchNorm1d(3)(torch.randn(4, 3, 7), **extras)


def test_rows_have_no_axis_for_lengths():
    with pytest.raises(InputError, match=r"lengths only with \(N, C, L\) or more, got \(4, 3\)"):
        BatchNorm1d(3)(torch.randn(4, 3), lengths=torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize(("kind", "shape"), DEGENERATE)
def test_one_value_per_channel_in_training_is_an_error_that_says_why(kind, shape):
    model = nn.Sequential(nn.Identity(), kind(3))
    where = f"{kind.__name__} at 1 expected more than one value per channel in training, got shape"
    with pytest.raises(DegenerateStatisticsError) as error:
        model(torch.ones(shape))
    assert str(error.value).startswith(where)
    assert "ragged batch" in str(error.value)
    assert "drop_last=True" in str(error.value)
    assert ("1x1" in str(error.value)) == (len(shape) > 2)
    assert model[1].num_batches_tracked.item() == 0


@pytest.mark.parametrize(("kind", "shape"), DEGENERATE)
def test_one_value_by_option_is_normalised_by_the_running_statistics(kind, shape):
    layer = kind(3, single_value="running")
    layer(torch.randn(9, *shape[1:]) * 3 + 1)
    before = [buffer.clone() for buffer in layer.buffers()]
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x))
    y.sum().backward()
    assert (x.grad != 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_one_value_and_no_running_statistics_to_turn_to():
    with pytest.raises(InputError, match="no running statistics to normalise by"):
        BatchNorm1d(3, track_running_stats=False, single_value="running")(torch.randn(1, 3))


@pytest.mark.parametrize(("kind", "shape"), DEGENERATE)
def test_evaluation_never_raises_for_one_value(kind, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(kind(3).eval()(x), getattr(nn, kind.__name__)(3).eval()(x))
    untracked = kind(3, track_running_stats=False).eval()
    with torch.no_grad():
        untracked.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(untracked(x).flatten(), untracked.bias)


def test_one_value_does_not_move_the_running_statistics_whatever_normalises():
    layer = BatchNorm1d(3)
    layer.normalize_by = "running"
    layer(torch.randn(1, 3))
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("options", [{}, {"guard": "propagate"}, {"guard": "raise"}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"), [(BatchNorm1d, (0, 3)), (BatchNorm2d, (0, 3, 4, 4)), (BatchNorm2d, (2, 3, 0, 4))]
)
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(kind, shape, training, options):
    layer = kind(3, activation="relu", **options).train(training)
    before = [buffer.clone() for buffer in layer.buffers()]
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
