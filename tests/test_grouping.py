from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadynorm import grouping
from steadynorm.grouping import Grouping
from tests.cases import laid_out

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
layouts = st.sampled_from(["plain", "channels_last", "strided", "transposed", "expanded"])


def numbered(shape, layout):
    """Every value tells its place."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return laid_out(x, layout if layout != "channels_last" or x.dim() > 3 else "plain")


@given(shapes, layouts)
def test_a_group_holds_exactly_the_values_of_its_channel(shape, layout):
    x = numbered(shape, layout)
    dense, group = grouping.batch(x)
    view = group.view(dense)
    assert view.shape == (group.outer, group.group, group.inner)
    assert group.values_per_group * shape[1] == x.numel()
    for channel in range(shape[1]):
        assert sorted(view[:, channel].flatten().tolist()) == sorted(x[:, channel].flatten().tolist())


@given(shapes, layouts)
def test_the_view_is_dense_and_shares_memory_with_a_dense_tensor(shape, layout):
    x = numbered(shape, layout)
    dense, group = grouping.batch(x)
    view = group.view(dense)
    assert view.is_contiguous()
    assert view.data_ptr() == dense.data_ptr()
    if layout in ("plain", "channels_last"):
        assert dense is x


@given(shapes, layouts)
def test_restore_undoes_view(shape, layout):
    dense, group = grouping.batch(numbered(shape, layout))
    back = group.restore(group.view(dense), dense)
    assert torch.equal(back, dense)
    assert back.stride() == dense.stride()


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((4, 6, 5, 7), "plain", Grouping(4, 6, 35)),
        ((4, 6, 5, 7), "channels_last", Grouping(140, 6, 1)),
        ((4, 6, 5, 7), "strided", Grouping(4, 6, 35)),
        ((2, 3, 4, 5, 6), "channels_last", Grouping(240, 3, 1)),
        ((9, 6), "plain", Grouping(9, 6, 1)),
        ((9, 6, 1, 1), "channels_last", Grouping(9, 6, 1)),
        ((4, 1, 5, 7), "channels_last", Grouping(4, 1, 35)),
        ((4, 6, 11), "plain", Grouping(4, 6, 11)),
        ((0, 6, 5), "plain", Grouping(0, 6, 5)),
        ((4, 6, 0), "plain", Grouping(4, 6, 0)),
    ],
)
def test_sizes(shape, layout, expected):
    dense, group = grouping.batch(numbered(shape, layout))
    assert group == expected
    assert group.is_rows == (expected.inner == 1)
    assert group.view(dense).shape == expected


@pytest.mark.parametrize("shape", [(0, 6, 5), (0, 6), (0, 3, 4, 4), (4, 6, 0), (1, 3, 1, 1), (1, 1), (1, 5, 4, 4)])
def test_empty_and_single(shape):
    x = torch.zeros(shape)
    dense, group = grouping.batch(x)
    assert group.restore(group.view(dense), dense).shape == x.shape


def test_one_sample_channels_last():
    """With one sample outer = inner size of the image: still a matrix, and still restored as channels-last."""
    x = torch.randn(1, 5, 3, 4).to(memory_format=torch.channels_last)
    dense, group = grouping.batch(x)
    assert group == Grouping(12, 5, 1)
    assert group.restore(group.view(dense), dense).is_contiguous(memory_format=torch.channels_last)


def test_one_position_per_sample_channels_last():
    x = torch.randn(12, 5, 1, 1).to(memory_format=torch.channels_last)
    dense, group = grouping.batch(x)
    assert torch.equal(group.restore(group.view(dense), dense), x)
