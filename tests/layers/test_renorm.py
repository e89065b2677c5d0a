"""BatchRenorm1d, 2d, 3d: batch norm at its limits, evaluation within them, and the paper's formula between."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import steadynorm
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.layers import BatchNorm2d, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormLimits
from tests import batch_oracles, cases
from tests.agree import assert_agrees

LAYERS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
LIMITS = {"rmax": 1.3, "dmax": 0.4}
# What rounding a mean of 1e4 costs, the correction by it costs a second time.
CASES = [case for case in cases.TRAINING if case.offset < 1e4 and case.special is None]
oracle = functools.partial(batch_oracles.renorm, **LIMITS)


def through_the_layer(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *, activation=None, residual=None, mask=None
):
    layer = LAYERS[x.dim()](
        x.shape[1], eps, momentum, affine=weight is not None, activation=activation, limits=tuple(LIMITS.values())
    )
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    return functional_call(layer.train(training), given, (x,), {"residual": residual, "mask": mask})


@pytest.mark.parametrize("case", [*CASES[::2], cases.BY_NAME["plain, evaluation"]], ids=str)
def test_agrees_with_the_formulas(case):
    assert_agrees(through_the_layer, oracle, case)


def in_torch(x, mean, var, weight, bias, training, momentum, eps, *, wrong=""):
    """Renormalization in plain operations, with one of them wrong."""
    shape = (1, -1, 1, 1)
    new_mean, new_var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    center, spread = mean.clone(), (var + eps).sqrt() if wrong != "eps outside the root" else var.sqrt() + eps
    r = (new_var + eps).sqrt() / spread
    d = (new_mean - center) / (spread if wrong != "d by the batch" else (new_var + eps).sqrt())
    if wrong != "no limits":
        r, d = r.clamp(1 / LIMITS["rmax"], LIMITS["rmax"]), d.clamp(-LIMITS["dmax"], LIMITS["dmax"])
    if wrong != "gradient through r and d":
        r, d = r.detach(), d.detach()
    nn.functional.batch_norm(x.detach(), mean, var, None, None, True, momentum, eps)
    x_hat = (x - new_mean.view(shape)) / (new_var + eps).sqrt().view(shape)
    z = x_hat * r.view(shape) + d.view(shape)
    return z * weight.view(shape) + bias.view(shape)


def test_the_comparison_accepts_plain_operations():
    assert_agrees(in_torch, oracle, cases.PLAIN)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("gradient through r and d", "dx is off"),
        ("no limits", "y is off"),
        ("d by the batch", "y is off"),
        ("eps outside the root", "y is off"),
    ],
)
def test_the_comparison_rejects(wrong, reason):
    case = cases.BY_NAME["large eps"] if wrong == "eps outside the root" else cases.PLAIN
    with pytest.raises(AssertionError, match=reason):
        assert_agrees(functools.partial(in_torch, wrong=wrong), oracle, case)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_at_its_limits_it_is_batch_norm(options):
    """rmax 1 and dmax 0: always so with (1, 0), and in the first 5000 batches of the paper's schedule."""
    plain = BatchNorm2d(3, **options)
    layers = [BatchRenorm2d(3, **options), BatchRenorm2d(3, limits=(1.0, 0.0), **options)]
    for _ in range(3):
        x, dy = torch.randn(4, 3, 5, 5) * 2 + 1, torch.randn(4, 3, 5, 5)
        results = []
        for layer in (plain, *layers):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            results.append((y, leaf.grad))
        for found in results[1:]:
            torch.testing.assert_close(found[0], results[0][0], rtol=0, atol=1e-6)
            torch.testing.assert_close(found[1], results[0][1], rtol=0, atol=1e-6)
    for layer in layers:
        for ours, theirs in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_without_limits_training_gives_what_evaluation_gives():
    layer = BatchRenorm1d(3, dtype=torch.float64, limits=(float("inf"), float("inf")))
    for _ in range(3):
        layer(torch.randn(6, 3, 4, dtype=torch.float64) * 2 + 1)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    before = copy.deepcopy(layer).eval()
    torch.testing.assert_close(layer(x), before(x), rtol=0, atol=1e-12)


def test_the_schedule_of_the_paper():
    limits = RenormLimits()
    for batches, rmax, dmax in (
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (10**7, 3, 5),
    ):
        found = limits(torch.tensor(batches))
        torch.testing.assert_close(torch.stack(found), torch.tensor([rmax, dmax], dtype=torch.float32))


def test_limits_from_the_first_batch_on():
    assert BatchRenorm1d(3, limits=RenormLimits(2.0, 1.0, 0, 0, 0)).limits_now() == (2.0, 1.0)
    assert BatchRenorm1d(3, limits=(2.0, 1.0)).limits_now() == (2.0, 1.0)


def test_how_far_the_limits_have_grown_is_in_the_state_dict_of_a_batch_norm():
    layer = BatchRenorm1d(3, limits=RenormLimits(start=0, rmax_until=4, dmax_until=4))
    seen = []
    for _ in range(6):
        seen.append(layer.limits_now())
        layer(torch.randn(8, 3))
        layer(torch.full((8, 3), torch.nan))  # does not enter, and does not count
    assert seen == [(1.0, 0.0), (1.5, 1.25), (2.0, 2.5), (2.5, 3.75), (3.0, 5.0), (3.0, 5.0)]
    plain, fresh = nn.BatchNorm1d(3), BatchRenorm1d(3, limits=layer.limits)
    plain.load_state_dict(layer.state_dict(), strict=True)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert fresh.limits_now() == (3.0, 5.0)
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_finds_the_statistics_that_the_forward_pass_found(use_reentrant):
    layer = BatchRenorm1d(3, limits=(3.0, 5.0), momentum=0.9)
    layer(torch.randn(8, 3))
    plain = copy.deepcopy(layer)
    x, dy = torch.randn(8, 3) * 1.5, torch.randn(8, 3)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpoint(lambda x: layer(x).sin(), leaf, use_reentrant=use_reentrant).backward(dy)
    plain(other).sin().backward(dy)
    torch.testing.assert_close(leaf.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_a_function_of_ones_own():
    layer = BatchRenorm1d(3, limits=lambda batches: (1 + batches, batches - 5))
    assert layer.limits_now() == (1.0, 0.0), "held at 1 and 0 at least"
    layer(torch.randn(8, 3))
    assert layer.limits_now() == (2.0, 0.0)
    layer.limits = lambda batches: (0.5, 1.0)
    with pytest.raises(InputError, match=r"rmax must be at least 1, .* got 0.5"):
        layer(torch.randn(8, 3))


def test_one_value_per_channel():
    layer = BatchRenorm1d(3, limits=(3.0, 5.0))
    with pytest.raises(DegenerateStatisticsError, match="BatchRenorm1d expected more than one value per channel"):
        layer(torch.randn(1, 3))
    layer.single_value = "running"
    x = torch.randn(1, 3)
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))


def test_half_parameters_are_corrected_in_full_precision():
    layer = BatchRenorm2d(3, limits=(3.0, 5.0), dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).float()
    x = torch.randn(4, 3, 5, 5).bfloat16() * 3 + 2
    torch.testing.assert_close(layer(x).float(), wide(x.float()), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0.9, 5.0), "rmax must be at least 1"),
        ((3.0, -0.1), "dmax must be at least 0"),
        ((3.0,), r"limits must be \(rmax, dmax\), or a function"),
        ((float("nan"), 1.0), r"limits must be \(rmax, dmax\), or a function"),
        (("3", 5.0), r"limits must be \(rmax, dmax\), or a function"),
        (3.0, r"limits must be \(rmax, dmax\), or a function"),
        (None, r"limits must be \(rmax, dmax\), or a function"),
    ],
    ids=str,
)
def test_limits_that_are_none_are_refused(limits, message):
    with pytest.raises(InputError, match=f"BatchRenorm2d: {message}"):
        BatchRenorm2d(3, limits=limits)


@pytest.mark.parametrize("wrong", [{"rmax": 0.5}, {"dmax": -1.0}, {"start": -1}, {"start": 30_000}], ids=str)
def test_schedules_that_are_none_are_refused(wrong):
    with pytest.raises(InputError, match=r"RenormLimits: \w+ must be at least"):
        RenormLimits(**wrong)


def test_running_statistics_are_needed():
    with pytest.raises(InputError, match="BatchRenorm1d is drawn towards running statistics"):
        BatchRenorm1d(3, track_running_stats=False)


def test_it_is_a_torch_layer_and_says_its_limits():
    assert isinstance(steadynorm.BatchRenorm2d(3), nn.BatchNorm2d)
    assert "limits=(3.0, 5.0)" in repr(steadynorm.BatchRenorm2d(3, limits=(3.0, 5.0)))
