from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from steadynorm import moments
from steadynorm.moments import Moments
from tests import oracles

GROUPS = 3
# Merging in float64 loses a few roundings a step; the oracle is float64 too, so neither is exact.
RELATIVE = 1e-12


def values(count: int, seed: int, offset: float) -> np.ndarray:
    """(count, GROUPS), with means `offset` and different deviations."""
    return offset + np.random.default_rng(seed).standard_normal((count, GROUPS)) * [0.5, 1.0, 3.0]


def of(rows: np.ndarray) -> Moments:
    return moments.of(torch.from_numpy(rows)[:, :, None])


def assert_same(found: Moments, rows: np.ndarray) -> None:
    """`found` is what the oracle says of all `rows` at once."""
    mean, var, count = oracles.moments(rows)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=RELATIVE)
    # The rounding of the data's mean is part of any variance: relative to the offset, not to the variance alone.
    floor = (np.abs(mean) * 2**-52) ** 2 + RELATIVE * np.abs(mean) * 2**-52
    np.testing.assert_allclose(found.var.numpy(), var, rtol=1e-9, atol=floor.max())
    assert np.all(np.asarray(found.count) == count)


cuts = st.lists(st.integers(0, 40), max_size=6)
seeds = st.integers(0, 2**32 - 1)
offsets = st.sampled_from([0.0, 1.0, -1e4, 1e6])


def split(rows: np.ndarray, at: list[int]) -> list[np.ndarray]:
    """Parts of any size; equal cuts and cuts at the ends give empty ones."""
    return np.split(rows, sorted(min(cut, len(rows)) for cut in at))


def as_counted(part: Moments, kind: str) -> Moments:
    """The same moments with the count as an int, a scalar tensor or one per group; an empty part is full of NaN."""
    mean, var, count = part.mean, part.var, part.count
    assert isinstance(count, int)
    if count == 0:
        mean, var = torch.full_like(mean, math.nan), torch.full_like(var, math.nan)
    if kind == "int":
        return Moments(mean, var, count)
    return Moments(mean, var, torch.tensor(count) if kind == "scalar" else torch.full((GROUPS,), count))


kinds = st.sampled_from(["int", "scalar", "groups"])


@given(st.integers(1, 40), cuts, seeds, offsets, kinds, st.randoms(use_true_random=False))
@example(1, [], 0, 1e6, "int", random.Random(0))
@example(5, [0, 0, 1, 5, 5], 0, 1e6, "scalar", random.Random(1))
@example(2, [1], 0, 0.0, "groups", random.Random(2))
def test_merge_is_the_same_for_any_split_and_order(count, at, seed, offset, kind, shuffler):
    rows = values(count, seed, offset)
    parts = [as_counted(of(part), kind) for part in split(rows, at)]
    shuffler.shuffle(parts)
    assert_same(moments.merge(parts), rows)


@given(st.integers(3, 40), cuts, seeds, st.lists(kinds, min_size=7, max_size=7))
def test_counts_of_different_kinds_mix(count, at, seed, mixed):
    rows = values(count, seed, 1.0)
    parts = [as_counted(of(part), kind) for part, kind in zip(split(rows, at), mixed, strict=False)]
    assert_same(moments.merge(parts), rows)


@given(st.integers(3, 40), cuts, seeds)
def test_merge_in_any_tree(count, at, seed):
    rows = values(count, seed, 1e6)
    parts = [of(part) for part in split(rows, at)]
    while len(parts) > 1:
        parts = [moments.merge(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    assert_same(parts[0], rows)


def test_groups_with_counts_of_their_own():
    rows = values(9, 0, 1e6)
    first, second = [4, 0, 9], [5, 9, 0]
    parts = []
    for begin, length in (([0, 0, 0], first), (first, second)):
        each = [of(rows[b : b + n]) for b, n in zip(begin, length, strict=True)]
        parts.append(
            Moments(
                torch.stack([one.mean[g] if n else torch.tensor(math.nan) for g, (one, n) in _numbered(each, length)]),
                torch.stack([one.var[g] if n else torch.tensor(math.nan) for g, (one, n) in _numbered(each, length)]),
                torch.tensor(length),
            )
        )
    assert_same(moments.merge(parts), rows)


def _numbered(each, length):
    return enumerate(zip(each, length, strict=True))


@pytest.mark.parametrize("kind", ["int", "scalar", "groups"])
def test_nothing_but_empty_parts(kind):
    merged = moments.merge([as_counted(of(values(0, 0, 0.0)), kind)] * 3)
    assert np.all(np.asarray(merged.count) == 0)
    if kind != "int":
        assert torch.isfinite(merged.mean).all()
        assert torch.isfinite(merged.var).all()


def test_merge_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="give at least one"):
        moments.merge([])


def test_merge_leaves_its_parts_alone():
    parts = [of(values(4, seed, 1.0)) for seed in range(3)]
    before = [(part.mean.clone(), part.var.clone()) for part in parts]
    moments.merge(parts)
    for part, (mean, var) in zip(parts, before, strict=True):
        assert torch.equal(part.mean, mean)
        assert torch.equal(part.var, var)


@given(st.integers(1, 30), st.integers(1, 4), seeds, offsets)
def test_of_is_the_oracle(outer, inner, seed, offset):
    rows = values(outer * inner, seed, offset)
    x = torch.from_numpy(rows).reshape(outer, inner, GROUPS).movedim(-1, 1)
    assert_same(moments.of(x), rows)


def test_of_float32_is_in_float64():
    x = (1e6 + torch.randn(50, GROUPS, 2)).requires_grad_(False)
    found = moments.of(x)
    assert found.mean.dtype == found.var.dtype == torch.float64
    assert_same(found, x.double().movedim(1, -1).reshape(-1, GROUPS).numpy())


@pytest.mark.parametrize("count", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", ["int", "scalar", "groups"])
def test_unbiased_var(count, kind):
    rows = values(count, 0, 1.0)
    found = as_counted(of(rows), kind).unbiased_var
    expected = np.var(rows, axis=0, ddof=1) if count > 1 else np.zeros(GROUPS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", ["int", "scalar", "groups"])
def test_from_unbiased_is_the_inverse(count, kind):
    part = as_counted(of(values(count, 0, 1.0)), kind)
    back = Moments.from_unbiased(part.mean, part.unbiased_var, part.count)
    torch.testing.assert_close(back.var, part.var, rtol=1e-15, atol=0)
    assert back.count is part.count


@given(st.integers(1, 40), cuts, seeds, offsets, st.sampled_from(["rows", "groups"]))
@example(3, [0, 0, 3], 0, 1e6, "groups")
def test_rows_merge_at_once(count, at, seed, offset, kind):
    rows = values(count, seed, offset)
    parts = [as_counted(of(part), "scalar") for part in split(rows, at)]
    counts = torch.stack([torch.as_tensor(part.count) for part in parts])
    counts = counts if kind == "rows" else counts[:, None].expand(-1, GROUPS)
    stacked = Moments(torch.stack([p.mean for p in parts]), torch.stack([p.var for p in parts]), counts)
    assert_same(moments.merge_rows(stacked), rows)


def test_rows_with_one_count_for_all():
    rows = values(12, 0, 1e6)
    parts = [of(part) for part in np.split(rows, 4)]
    merged = moments.merge_rows(Moments(torch.stack([p.mean for p in parts]), torch.stack([p.var for p in parts]), 3))
    assert_same(merged, rows)
    assert merged.count == 12


def test_empty_rows_are_finite():
    nothing = Moments(torch.full((2, GROUPS), math.nan), torch.full((2, GROUPS), math.nan), torch.zeros(2))
    merged = moments.merge_rows(nothing)
    assert merged.mean.tolist() == merged.var.tolist() == [0, 0, 0]
    assert float(merged.count) == 0


def test_invstd_has_eps_inside_the_root():
    found = Moments(torch.zeros(2), torch.tensor([0.0, 3.0]), 4).invstd(1.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5]))


momenta = st.one_of(st.sampled_from([0.0, 0.1, 1.0, None]), st.floats(0, 1))


@given(momenta, st.lists(st.integers(1, 9), min_size=1, max_size=6), seeds, kinds, st.booleans())
def test_ema_is_the_oracle(momentum, counts, seed, kind, guard):
    rng = np.random.default_rng(seed)
    mean, var = rng.standard_normal(GROUPS), rng.uniform(0.5, 2, GROUPS)
    running_mean, running_var, seen = torch.from_numpy(mean.copy()), torch.from_numpy(var.copy()), torch.tensor(0)
    for i, count in enumerate(counts):
        rows = values(count, seed + i, 1.0)
        batch = as_counted(of(rows), kind)
        moments.ema_(running_mean, running_var, batch, momentum, num_batches_tracked=seen, guard=guard)
        new_mean, new_var, _ = oracles.moments(rows)
        mean = oracles.ema(mean, new_mean, momentum, i)
        var = oracles.ema(var, oracles.unbiased(new_var, count), momentum, i)
    np.testing.assert_allclose(running_mean.numpy(), mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(running_var.numpy(), var, rtol=1e-12, atol=1e-14)
    assert seen.item() == len(counts)


def test_ema_agrees_with_torch():
    x = 3 + 2 * torch.randn(20, GROUPS, 5)
    ours, theirs = ((torch.zeros(GROUPS), torch.ones(GROUPS)) for _ in range(2))
    moments.ema_(*ours, moments.of(x), 0.3)
    torch.nn.functional.batch_norm(x, *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours, theirs)


def test_ema_rounds_a_narrow_running_statistic_once():
    running_mean, running_var = torch.tensor([10.0], dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
    batch = Moments(torch.tensor([11.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64), 100)
    moments.ema_(running_mean, running_var, batch, 0.25)
    assert running_mean.dtype == torch.bfloat16
    assert running_mean.item() == 10.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["mean", "var"])
@pytest.mark.parametrize("kind", ["int", "scalar", "groups"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_a_batch_that_is_not_finite_changes_nothing(bad, which, kind, momentum):
    running_mean, running_var, seen = torch.randn(GROUPS), torch.rand(GROUPS), torch.tensor(5)
    before = (running_mean.clone(), running_var.clone(), seen.clone())
    batch = as_counted(of(values(6, 0, 1.0)), kind)
    getattr(batch, which)[1] = bad
    moments.ema_(running_mean, running_var, batch, momentum, num_batches_tracked=seen)
    for now, then in zip((running_mean, running_var, seen), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("kind", ["int", "scalar", "groups"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_changes_nothing(kind, momentum):
    running_mean, running_var, seen = torch.randn(GROUPS), torch.rand(GROUPS), torch.tensor(5)
    before = (running_mean.clone(), running_var.clone(), seen.clone())
    empty = Moments(torch.zeros(GROUPS), torch.zeros(GROUPS), 0)
    counted = empty if kind == "int" else replace(empty, count=torch.zeros(() if kind == "scalar" else GROUPS))
    moments.ema_(running_mean, running_var, counted, momentum, num_batches_tracked=seen)
    for now, then in zip((running_mean, running_var, seen), before, strict=True):
        assert torch.equal(now, then)


def test_a_batch_that_was_left_out_does_not_weigh_in_the_cumulative_average():
    running_mean, running_var, seen = torch.zeros(1), torch.ones(1), torch.tensor(0)
    for mean in (2.0, math.nan, 4.0, math.inf, 9.0):
        batch = Moments(torch.tensor([mean]), torch.ones(1), 3)
        moments.ema_(running_mean, running_var, batch, None, num_batches_tracked=seen)
    assert seen.item() == 3
    assert running_mean.item() == pytest.approx(5.0)


def test_without_the_guard_it_propagates():
    running_mean, running_var, seen = torch.zeros(2), torch.ones(2), torch.tensor(0)
    batch = Moments(torch.tensor([1.0, math.nan]), torch.ones(2), 3)
    moments.ema_(running_mean, running_var, batch, 0.5, num_batches_tracked=seen, guard=False)
    assert seen.item() == 1
    assert running_mean[0].item() == 0.5
    assert math.isnan(running_mean[1].item())


def test_ema_writes_into_the_tensors_it_was_given():
    running_mean, running_var = torch.zeros(2), torch.ones(2)
    alias = running_mean.view(2)
    moments.ema_(running_mean, running_var, Moments(torch.ones(2), torch.ones(2), 3), 0.5)
    assert alias.tolist() == [0.5, 0.5]


def test_cumulative_without_a_counter_says_what_to_do():
    batch = Moments(torch.ones(2), torch.ones(2), 3)
    with pytest.raises(ValueError, match="num_batches_tracked: give the counter"):
        moments.ema_(torch.zeros(2), torch.ones(2), batch, None)


def test_ema_takes_no_host_synchronisation():
    """On the meta device there is nothing to look at: code that decides on the host fails there."""
    meta = [torch.ones(2, device="meta") for _ in range(4)]
    seen = torch.zeros((), dtype=torch.int64, device="meta")
    moments.ema_(meta[0], meta[1], Moments(meta[2], meta[3], 5), None, num_batches_tracked=seen)
    moments.ema_(meta[0], meta[1], Moments(meta[2], meta[3], seen + 1), 0.1, num_batches_tracked=seen)
    moments.merge([Moments(meta[2], meta[3], seen), Moments(meta[2], meta[3], 5)])
