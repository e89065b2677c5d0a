"""What a batch that is not finite does to the running statistics, in each of the three modes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from steadynorm.errors import NonFiniteStatisticsError
from steadynorm.layers import BatchNorm1d, BatchNorm2d


def spoiled(value: float) -> torch.Tensor:
    x = torch.randn(4, 3, 5, 5)
    x[2, 1, 3, 3] = value
    return x


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_skip_is_as_if_the_batch_had_not_been(value, momentum):
    guarded, clean = BatchNorm2d(3, momentum=momentum), BatchNorm2d(3, momentum=momentum)
    for number in range(4):
        x = torch.randn(4, 3, 5, 5)
        guarded(x), clean(x)
        if number == 1:
            guarded(spoiled(value))
    for ours, theirs in zip(guarded.buffers(), clean.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert guarded.num_batches_tracked.item() == 4


def test_propagate_is_what_torch_does():
    ours, theirs = BatchNorm2d(3, guard="propagate"), nn.BatchNorm2d(3)
    for x in (torch.randn(4, 3, 5, 5), spoiled(math.nan), torch.randn(4, 3, 5, 5)):
        torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
    for ours_buffer, theirs_buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours_buffer, theirs_buffer, equal_nan=True)
    assert ours.running_mean.isnan().tolist() == [False, True, False]


def test_raise_names_the_layer_and_the_channel_and_changes_nothing():
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"norm": BatchNorm2d(3, guard="raise")})["norm"])
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(NonFiniteStatisticsError, match=r"BatchNorm2d at 1 got .* not finite in channel 1 \(.*nan"):
        model(spoiled(math.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    model(torch.randn(4, 3, 5, 5))
    assert model[1].num_batches_tracked.item() == 1


def test_raise_with_many_channels_lists_a_few():
    with pytest.raises(NonFiniteStatisticsError, match=r"in channels 0, 1, 2, 3, 4 and 4 more \("):
        BatchNorm1d(9, guard="raise")(torch.full((4, 9), math.nan))


def test_raise_concerns_only_what_would_be_remembered():
    layer = BatchNorm2d(3, guard="raise").eval()
    assert layer(spoiled(math.nan)).isnan().any()
    assert layer.train().freeze_()(spoiled(math.nan)).isnan().any()


def test_overflow_in_half_precision_is_no_overflow_of_the_statistics():
    layer = BatchNorm1d(2, guard="raise", momentum=1.0)
    layer(torch.tensor([[6e4, -6e4], [-6e4, 6e4]], dtype=torch.float16))
    torch.testing.assert_close(layer.running_var, torch.full((2,), 7.2e9))


def classifier(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))


def train(model: nn.Module, *, broken_at: int) -> float:
    """Tell bright images from dark ones; one batch holds one NaN pixel, and its step is left out as a scaler would."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(30):
        target = torch.randint(0, 2, (16,), generator=generator)
        x = torch.randn(16, 1, 6, 6, generator=generator) + 2.0 * target.view(-1, 1, 1, 1)
        if number == broken_at:
            x[0, 0, 0, 0] = math.nan
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        if loss.isfinite():
            optimizer.step()
    target = torch.arange(64) % 2
    x = torch.randn(64, 1, 6, 6, generator=generator) + 2.0 * target.view(-1, 1, 1, 1)
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == target).double().mean().item()


def test_one_nan_pixel_does_not_cost_a_training_run_its_evaluation():
    torch.manual_seed(0)
    assert train(classifier(BatchNorm2d), broken_at=15) > 0.95
    torch.manual_seed(0)
    assert train(classifier(nn.BatchNorm2d), broken_at=15) <= 0.5, "torch.nn answers NaN everywhere: the case is real"
