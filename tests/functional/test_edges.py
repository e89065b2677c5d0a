from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from steadynorm import functional
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.functional import batch_norm, normalize_batch, update_running_


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5), (3, 4, 0), (0, 4, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_output_and_changes_nothing(backend, shape, training):
    running_mean, running_var = torch.full((4,), 2.0), torch.full((4,), 3.0)
    x = torch.zeros(shape, requires_grad=True)
    backend.needs(x)
    weight = torch.ones(4, requires_grad=True)
    y = batch_norm(x, running_mean, running_var, weight, training=training, activation="relu")
    assert y.shape == shape
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.zeros(shape))
    assert dx.shape == shape
    assert dweight.eq(0).all()
    assert running_mean.eq(2).all()
    assert running_var.eq(3).all()


def test_a_mask_that_leaves_nothing(backend):
    running_mean, running_var = torch.full((4,), 2.0), torch.full((4,), 3.0)
    x, mask = torch.full((3, 4, 5), math.nan, requires_grad=True), torch.zeros(3, 5, dtype=torch.bool)
    if backend.name == "numba":
        pytest.skip("it takes no empty tensors")
    y = batch_norm(x, running_mean, running_var, torch.ones(4), training=True, mask=mask, residual=x.detach())
    assert y.eq(0).all()
    (dx,) = torch.autograd.grad(y, x, torch.randn(3, 4, 5))
    assert dx.eq(0).all()
    assert running_mean.eq(2).all()
    assert running_var.eq(3).all()


@pytest.mark.parametrize(
    ("shape", "cause"),
    [((1, 4), "one sample, often"), ((1, 4, 1), "one sample with one position"), ((1, 4, 1, 1), "a pooling to 1x1")],
)
def test_one_value_per_channel_in_training_is_refused_as_in_torch(backend, shape, cause):
    x, running_mean, running_var = torch.zeros(shape), torch.full((4,), 2.0), torch.full((4,), 3.0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(x, running_mean.clone(), running_var.clone(), training=True)
    expected = f"batch_norm expected more than one value per channel in training, got shape {shape}"
    with pytest.raises(DegenerateStatisticsError, match=re.escape(expected) + f".*{cause}.*drop_last=True") as caught:
        batch_norm(x, running_mean, running_var, training=True)
    assert "training=False" in str(caught.value)
    assert running_mean.eq(2).all()
    assert running_var.eq(3).all()
    assert torch.isfinite(batch_norm(x, running_mean, running_var)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_does_not_enter_the_running_statistics(backend, bad):
    x = torch.randn(8, 4, 6)
    x[3, 2, 1] = bad
    for guard, is_kept in ((True, True), (False, False)):
        running_mean, running_var = torch.full((4,), 2.0), torch.full((4,), 3.0)
        batch_norm(x, running_mean, running_var, training=True, guard=guard)
        assert (running_mean.eq(2).all() and running_var.eq(3).all()) == is_kept


def test_a_channel_that_is_not_finite_leaves_the_others_alone(backend):
    x = torch.randn(8, 4, 6)
    sound, _ = normalize_batch(x)
    x[3, 2, 1] = math.nan
    y, _ = normalize_batch(x)
    assert torch.isnan(y[:, 2]).all()
    assert torch.equal(y[:, [0, 1, 3]], sound[:, [0, 1, 3]])


def test_update_running_counts_in_place():
    running_mean, running_var, seen = torch.zeros(3), torch.ones(3), torch.tensor(0)
    _, moments = normalize_batch(torch.randn(9, 3))
    update_running_(running_mean, running_var, moments, None, num_batches_tracked=seen)
    torch.testing.assert_close(running_mean, moments.mean.float())
    assert seen.item() == 1


def test_a_constant_channel_is_its_bias(backend):
    """What float32 loses of the mean of 12345.678 would otherwise be blown up by 1/sqrt(eps): torch gives 0.075."""
    for x in (torch.full((16, 2, 7, 7), 12345.678), torch.full((99, 2), 12345.678)):
        y, moments = normalize_batch(x, torch.ones(2), torch.tensor([0.25, -3.0]))
        torch.testing.assert_close(y[:, 0], torch.full_like(y[:, 0], 0.25), rtol=0, atol=1e-3)
        torch.testing.assert_close(y[:, 1], torch.full_like(y[:, 1], -3.0), rtol=0, atol=1e-3)
        assert (moments.var >= 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_drop_in_for_torch(training, dtype):
    x = torch.randn(6, 4, 5, dtype=dtype)
    running, affine = [torch.randn(4), torch.rand(4) + 0.5], [torch.randn(4), torch.randn(4)]
    if dtype == torch.float64:
        running, affine = [t.double() for t in running], [t.double() for t in affine]
    found = []
    for function in (batch_norm, F.batch_norm):
        statistics = [t.clone() for t in running]
        found.append([function(x, *statistics, *affine, training, 0.3, 1e-3), *statistics])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_residual_of_another_type_is_promoted():
    x, residual = torch.randn(4, 3, 5).bfloat16(), torch.randn(4, 3, 5)
    y, _ = normalize_batch(x, residual=residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, normalize_batch(x.float())[0] + residual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, "activation got 'swish', expected None or one of relu"),
        ({"residual": torch.zeros(4, 3)}, r"residual got shape \(4, 3\), expected that of x, \(4, 3, 5\)"),
        ({"mask": torch.ones(4, 5)}, r"torch\.float32, expected \(4, 5\) and torch\.bool: True is valid"),
        ({"mask": torch.ones(4, 3, 5).bool()}, r"mask got shape \(4, 3, 5\)"),
    ],
)
def test_bad_input_says_what_was_expected(options, message):
    with pytest.raises(InputError, match=message):
        normalize_batch(torch.zeros(4, 3, 5), **options)


def test_evaluation_without_statistics_says_what_to_do():
    with pytest.raises(InputError, match="expected both with training=False: give them"):
        batch_norm(torch.zeros(4, 3))


def test_what_the_functions_are():
    assert list(functional.__all__) == sorted(functional.__all__)
