import numpy as np
import pytest
import torch
from torch import nn

from steadynorm.probe.offsets import offset

SHAPE = (5, 6, 3, 4)


def image(dtype=torch.bfloat16):
    """Channels of different means and deviations, the fourth without any."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(SHAPE, generator=generator) * torch.arange(1, 7.0)[:, None, None]
        + 3 * torch.arange(6.0)[:, None, None]
    )
    x[:, 3] = 100
    return x.to(dtype)


def ratio(rows):
    """|mean| / deviation by row, long-hand in float64; 0 where nothing varies."""
    deviation = rows.std(-1)
    return np.abs(rows.mean(-1)) / np.where(deviation > 1e-2, deviation, np.inf)


def test_of_a_batch_norm_it_is_that_of_the_worst_channel():
    rows = image().double().numpy().transpose(1, 0, 2, 3).reshape(6, -1)
    assert offset(nn.BatchNorm2d(6), image()) == pytest.approx(ratio(rows).max(), rel=1e-4)


@pytest.mark.parametrize(
    ("norm", "groups"), [(nn.GroupNorm(2, 6), 2), (nn.InstanceNorm2d(6), 6), (nn.LayerNorm(SHAPE[1:]), 1)]
)
def test_within_a_sample_it_is_that_of_the_median_sample(norm, groups):
    x = image()
    x[0, 0] += 1000  # one sample says nothing
    rows = x.double().numpy().reshape(5, groups, -1)
    assert offset(norm, x) == pytest.approx(np.median(ratio(rows).max(1)), rel=1e-4)


@pytest.mark.parametrize("module", [nn.Conv2d(6, 6, 1), nn.RMSNorm(4)])
def test_what_takes_no_mean_has_none(module):
    assert offset(module, image()) is None


def test_full_precision_has_none():
    assert offset(nn.BatchNorm2d(6), image(torch.float32)) is None


@pytest.mark.parametrize("shape", [(0, 6, 2, 2), (6,)])
def test_nothing_to_see_is_no_error(shape):
    assert offset(nn.BatchNorm2d(6), torch.zeros(shape, dtype=torch.float16)) is None
