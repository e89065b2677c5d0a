from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadynorm import grouping
from steadynorm.grouping import SampleGrouping
from tests.cases import laid_out
from tests.oracles import label_groups, label_positions, label_rows

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
layouts = st.sampled_from(["plain", "channels_last", "strided", "transposed", "expanded"])


def numbered(shape, layout):
    """Every value tells its place."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return laid_out(x, layout if layout != "channels_last" or x.dim() > 3 else "plain")


def groupings(x):
    """Every way to group `x`: (dense x, grouping, the oracle's labels)."""
    found = [(*grouping.layer(x, dims), label_rows(x.shape, dims)) for dims in range(1, x.dim() + 1)]
    divisors = [g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0]
    found += [(*grouping.sample_groups(x, g), label_groups(x.shape, g)) for g in divisors]
    return [*found, (*grouping.positions(x), label_positions(x.shape))]


@given(shapes, layouts)
def test_statistics_and_weights_are_numbered_as_the_contract_says(shape, layout):
    for dense, view, (statistics, weights) in groupings(numbered(shape, layout)):
        _, outer, groups, channels, inner = view.sizes
        index = torch.arange(view.statistics).reshape(view.statistics_shape).expand(view.sizes)
        column = torch.arange(groups * channels).reshape(1, 1, groups, channels, 1).expand(view.sizes)
        # Where in the plain order every value of the view comes from.
        place = view.view(dense).long().numpy()
        if layout != "expanded":
            assert (statistics.ravel()[place] == index.numpy()).all()
            assert (weights.ravel()[place] == column.numpy()).all()
        assert view.values_per_group * view.statistics == dense.numel()
        assert 1 in (outer, inner)


@given(shapes, layouts)
def test_the_view_is_dense_and_shares_memory_with_a_dense_tensor(shape, layout):
    x = numbered(shape, layout)
    for dense, view, _ in groupings(x):
        seen = view.view(dense)
        assert seen.is_contiguous()
        assert seen.data_ptr() == dense.data_ptr()
    for dense, _ in (grouping.sample_groups(x, 1), grouping.positions(x)):
        if layout in ("plain", "channels_last"):
            assert dense is x


@given(shapes, layouts)
def test_restore_undoes_view(shape, layout):
    for dense, view, _ in groupings(numbered(shape, layout)):
        back = view.restore(view.view(dense), dense)
        assert torch.equal(back, dense)
        assert back.stride() == dense.stride()


@pytest.mark.parametrize(
    ("make", "shape", "layout", "expected"),
    [
        (lambda x: grouping.layer(x, 1), (4, 5, 6), "plain", (20, 1, 1, 6, 1, False)),
        (lambda x: grouping.layer(x, 2), (4, 5, 6), "plain", (4, 1, 1, 30, 1, False)),
        (lambda x: grouping.sample_groups(x, 3), (4, 6, 5, 7), "plain", (4, 1, 3, 2, 35, False)),
        (lambda x: grouping.sample_groups(x, 3), (4, 6, 5, 7), "channels_last", (4, 35, 3, 2, 1, False)),
        (lambda x: grouping.sample_groups(x, 6), (4, 6, 5, 7), "plain", (4, 1, 6, 1, 35, False)),
        (lambda x: grouping.sample_groups(x, 3), (4, 6), "plain", (4, 1, 3, 2, 1, False)),
        (grouping.positions, (4, 6, 5, 7), "plain", (4, 1, 1, 6, 35, True)),
        (grouping.positions, (4, 6, 5, 7), "channels_last", (140, 1, 1, 6, 1, False)),
    ],
)
def test_sizes(make, shape, layout, expected):
    _, view = make(numbered(shape, layout))
    assert view == SampleGrouping(*expected)


def test_nothing_is_grouped_too():
    for shape in ((0, 4, 3), (3, 4, 0)):
        _, view = grouping.sample_groups(torch.empty(shape), 2)
        assert np.prod(view.sizes) == 0
