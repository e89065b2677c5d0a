"""Merged statistics against those of all the data, in NumPy float64. Across processes: statistics_on_ranks.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steadynorm.errors import InputError
from steadynorm.training import merge_ranks_, merge_statistics

VALUES = 6
"""Positions of an image, each of which is a value behind a statistic."""


def client(x):
    """The state_dict of a model whose norm has the exact statistics of x (N, C, L), and a weight of its own."""
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3, momentum=None)).double()
    values = np.moveaxis(x, 1, -1).reshape(-1, 3)
    model[1].running_mean.copy_(torch.from_numpy(values.mean(0)))
    model[1].running_var.copy_(torch.from_numpy(values.var(0, ddof=1)))
    model[1].num_batches_tracked.fill_(len(x))
    return model.state_dict()


def data(sizes, seed, offset=0.0):
    """Images of clients that differ in mean and deviation."""
    rng = np.random.default_rng(seed)
    return [
        offset + rng.normal(10 * rng.standard_normal(3)[:, None], rng.uniform(0.5, 3), (size, 3, VALUES))
        for size in sizes
    ]


def assert_pooled(merged, parts, rtol=1e-9):
    values = np.moveaxis(np.concatenate(parts), 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(merged["1.running_mean"].numpy(), values.mean(0), rtol=rtol)
    np.testing.assert_allclose(merged["1.running_var"].numpy(), values.var(0, ddof=1), rtol=rtol)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 1000), st.sampled_from([0.0, 1e4]))
def test_merged_statistics_are_those_of_all_the_data(sizes, seed, offset):
    parts = data(sizes, seed, offset)
    merged = merge_statistics([client(part) for part in parts], [size * VALUES for size in sizes])
    assert_pooled(merged, parts, rtol=1e-6 if offset else 1e-9)
    assert merged["1.num_batches_tracked"].item() == sum(sizes)
    assert merged["1.num_batches_tracked"].dtype == torch.int64


def test_counts_by_layer():
    sizes = [3, 11]
    parts = data(sizes, 0)
    merged = merge_statistics([client(part) for part in parts], [{"1": size * VALUES} for size in sizes])
    assert_pooled(merged, parts)


def test_counts_of_samples_differ_by_bessels_factor_only():
    sizes = [30, 110]
    parts = data(sizes, 0)
    merged = merge_statistics([client(part) for part in parts], sizes)
    assert_pooled(merged, parts, rtol=1 / 30)


def test_nothing_but_statistics_is_merged():
    parts = data([4, 5], 0)
    states = [client(part) for part in parts]
    merged = merge_statistics(states, [24, 30])
    assert set(merged) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)).double()
    model.load_state_dict(states[1])
    weight = model[0].weight.clone()
    model.load_state_dict(merged, strict=False)
    assert torch.equal(model[0].weight, weight)
    assert_pooled(model.state_dict(), parts)


def test_dtypes_are_those_of_the_first_and_nothing_is_changed():
    states = [
        {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in client(x).items()} for x in data([4, 5], 0)
    ]
    before = [{k: v.clone() for k, v in state.items()} for state in states]
    merged = merge_statistics(states, [24, 30])
    assert merged["1.running_var"].dtype == torch.bfloat16
    for now, then in zip(states, before, strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)


def test_a_client_of_no_values_does_not_weigh():
    parts = data([4, 5], 0)
    nothing = client(np.full((1, 3, VALUES), np.nan))
    merged = merge_statistics([nothing, *map(client, parts)], [0, 24, 30])
    assert_pooled(merged, parts)


def test_averaged_variances_would_be_caught():
    """https://github.com/SymbioticLab/FedScale/issues/57, https://github.com/TsingZ0/PFLlib/issues/260

    What federated averaging does: the variance between clients is gone.
    """
    parts = data([10, 10], 0)
    states = [client(part) for part in parts]
    averaged = {key: torch.stack([state[key].double() for state in states]).mean(0) for key in states[0]}
    with pytest.raises(AssertionError, match="rtol"):
        assert_pooled(averaged, parts, rtol=0.05)


def test_bessels_factor_left_in_would_be_caught():
    sizes = [1, 2]
    parts = data(sizes, 0)
    states = [client(part) for part in parts]
    for state in states:
        state["1.running_var"] = state["1.running_var"] * (VALUES - 1) / VALUES
    with pytest.raises(AssertionError, match="rtol"):
        assert_pooled(merge_statistics(states, [size * VALUES for size in sizes]), parts)


def broken(change):
    state = client(data([4], 0)[0])
    change(state)
    return state


@pytest.mark.parametrize(
    ("second", "counts", "match"),
    [
        (None, [24], "2 state_dicts and 1 counts"),
        (None, [24, -1], "counts of state_dict 1 got -1"),
        (None, [24, 0.5], "shares of 1"),
        (None, [24, float("nan")], "got nan"),
        (None, [0, 0], "all 0"),
        (None, [{"1": 24}, {"2": 24}], "have no '1'"),
        (lambda s: s.pop("1.running_mean"), [24, 24], "differ in the layers 1."),
        (lambda s: s.update({"1.running_mean": torch.zeros(4)}), [24, 24], "one statistic per channel"),
        (lambda s: s.update({"1.running_var": torch.full((3,), torch.nan)}), [24, 24], "not finite"),
        (lambda s: s.update({"1.running_var": torch.full((3,), -1.0)}), [24, 24], "negative"),
    ],
)
def test_what_cannot_be_merged(second, counts, match):
    with pytest.raises(InputError, match=match):
        merge_statistics([client(data([4], 0)[0]), broken(second or (lambda state: None))], counts)


def test_nothing_to_merge():
    with pytest.raises(InputError, match="at least one"):
        merge_statistics([], [])
    with pytest.raises(InputError, match="no running_mean"):
        merge_statistics([nn.Linear(2, 2).state_dict()], [5])
    rows = {"running_mean": torch.zeros(2, 3), "running_var": torch.ones(2, 3)}
    with pytest.raises(InputError, match="merge_domains"):
        merge_statistics([rows], [5])


def test_one_process_merges_with_itself():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model(torch.randn(8, 3))
    before = [buffer.clone() for buffer in model.buffers()]
    report = merge_ranks_(model)
    for now, then in zip(model.buffers(), before, strict=True):
        assert torch.equal(now, then)
    assert "Merged over 1 processes" in str(report)
    with pytest.raises(InputError, match="count got 1"):
        merge_ranks_(model, count=1)
    with pytest.raises(InputError, match="not initialised"):
        merge_ranks_(model, group="workers")
