"""GhostBatchNorm1d, 2d, 3d: k slices are k batch norms, and what is remembered is the whole batch."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call

import steadynorm
from steadynorm import backend
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.layers import BatchNorm1d, BatchNorm2d, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from tests import batch_oracles, cases
from tests.agree import assert_agrees

LAYERS = {2: GhostBatchNorm1d, 3: GhostBatchNorm1d, 4: GhostBatchNorm2d, 5: GhostBatchNorm3d}
# Cases with more than one slice of three, and whose ragged slice is none of a single value.
CASES = [
    case
    for case in (*cases.SHAPES, *cases.LAYOUTS, *cases.VALUES, *cases.DTYPES, *cases.FUSED, *cases.MASKED)
    if case.shape[0] >= 4 and case.mask != "lost sample" and not (case.shape[0] % 3 == 1 and len(case.shape) == 2)
]
RAGGED = cases.Case("ragged", (7, 3, 4, 5), has_residual=True, activation="relu")


def sizes_of(samples: int) -> list[int]:
    return [3] * (samples // 3) + ([samples % 3] if samples % 3 else [])


def through_the_layer(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *, activation=None, residual=None, mask=None
):
    layer = LAYERS[x.dim()](x.shape[1], eps, momentum, affine=weight is not None, activation=activation, ghost_size=3)
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    return functional_call(layer.train(training), given, (x,), {"residual": residual, "mask": mask})


@pytest.mark.parametrize(
    "case", [*CASES[::2], RAGGED, cases.BY_NAME["bfloat16 parameters"], cases.BY_NAME["plain, evaluation"]], ids=str
)
def test_agrees_with_the_formulas(case):
    oracle = functools.partial(batch_oracles.ghost, sizes=sizes_of(case.shape[0]))
    assert_agrees(through_the_layer, oracle, case)


def one_batch(x, *settings, **options):
    return nn.functional.batch_norm(x, *settings)


def ragged_slice_dropped(x, mean, var, weight, bias, training, momentum, eps):
    rest = x.shape[0] % 3
    y = through_the_layer(x[:-rest], mean, var, weight, bias, training, momentum, eps)
    return torch.cat([y, nn.functional.batch_norm(x[-rest:], mean, var, weight, bias, False, 0.0, eps)])


def moved(x, mean, var, momentum):
    """The running statistics after a batch, as torch moves them."""
    mean, var = mean.clone(), var.clone()
    nn.functional.batch_norm(x.detach(), mean, var, None, None, True, momentum)
    return torch.stack([mean, var])


def slices_averaged_one_by_one(x, mean, var, weight, bias, training, momentum, eps):
    parts = x.split(3)
    after = torch.stack([moved(part, mean, var, momentum) for part in parts]).mean(0)
    mean.copy_(after[0]), var.copy_(after[1])
    return torch.cat([nn.functional.batch_norm(p, None, None, weight, bias, True, 0.0, eps) for p in parts])


def chunks_instead_of_slices(x, mean, var, weight, bias, training, momentum, eps):
    after = moved(x, mean, var, momentum)
    mean.copy_(after[0]), var.copy_(after[1])
    return torch.cat([nn.functional.batch_norm(p, None, None, weight, bias, True, 0.0, eps) for p in x.chunk(2)])


@pytest.mark.parametrize(
    ("saboteur", "reason"),
    [
        (one_batch, "y is off"),
        (ragged_slice_dropped, "y is off"),
        (chunks_instead_of_slices, "y is off"),
        (slices_averaged_one_by_one, "running_mean is off"),
    ],
)
def test_the_comparison_rejects(saboteur, reason):
    case = cases.Case("seven samples", (7, 3, 4, 5))
    with pytest.raises(AssertionError, match=reason):
        assert_agrees(saboteur, functools.partial(batch_oracles.ghost, sizes=sizes_of(7)), case)


@pytest.mark.parametrize("samples", [4, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("is_ours", [True, False], ids=["named", "automatic"])
def test_k_slices_are_k_batch_norms(dtype, samples, is_ours):
    """Bit for bit by the same kernels; a small float32 batch norm takes torch's where nobody names a backend."""
    ghost, plain = GhostBatchNorm2d(3, ghost_size=2, activation="silu"), BatchNorm2d(3, activation="silu")
    x, dy = torch.randn(samples, 3, 5, 4).to(dtype), torch.randn(samples, 3, 5, 4).to(dtype)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with backend("reference") if is_ours else contextlib.nullcontext():
        y = ghost(leaf)
        expected = torch.cat([plain(part) for part in other.split(2)])
    for each in (y, expected):
        each.backward(dy)
    tolerance = {} if dtype == torch.float32 and not is_ours else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(leaf.grad, other.grad, **tolerance)
    torch.testing.assert_close(ghost.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("samples", [1, 5, 8])
def test_one_slice_is_a_batch_norm_bit_for_bit(samples):
    ghost, plain = GhostBatchNorm1d(3, ghost_size=8), BatchNorm1d(3)
    x = torch.randn(samples, 3, 4)
    assert torch.equal(ghost(x), plain(x))
    for ours, theirs in zip(ghost.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_remembered_is_the_whole_batch(momentum):
    ghost = GhostBatchNorm1d(3, momentum=momentum, dtype=torch.float64, ghost_size=4)
    plain = BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    for samples in (10, 13, 3):
        x = torch.randn(samples, 3, dtype=torch.float64) + torch.arange(samples)[:, None]
        ghost(x), plain(x)
    for ours, theirs in zip(ghost.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_last_slice_of_one_value_joins_the_one_before():
    x = torch.randn(9, 3)
    y = GhostBatchNorm1d(3, ghost_size=4)(x)
    torch.testing.assert_close(y, torch.cat([nn.BatchNorm1d(3)(x[:4]), nn.BatchNorm1d(3)(x[4:])]))
    images = torch.randn(9, 3, 2, 2)
    y = GhostBatchNorm2d(3, ghost_size=4)(images)
    torch.testing.assert_close(y, torch.cat([nn.BatchNorm2d(3)(part) for part in images.split(4)]))


def test_one_value_in_all_is_the_error_of_batch_norm():
    with pytest.raises(DegenerateStatisticsError, match="GhostBatchNorm1d expected more than one value per channel"):
        GhostBatchNorm1d(3, ghost_size=4)(torch.randn(1, 3))
    layer = GhostBatchNorm1d(3, ghost_size=4, single_value="running")
    assert torch.equal(layer(torch.ones(1, 3)), layer.eval()(torch.ones(1, 3)))


@pytest.mark.parametrize("samples", [1, 2, 3, 50])
def test_evaluation_takes_any_batch_size_and_knows_no_slices(samples):
    ghost, plain = GhostBatchNorm2d(3, ghost_size=16), nn.BatchNorm2d(3)
    ghost(torch.randn(32, 3, 2, 2) + 1)
    plain.load_state_dict(ghost.state_dict(), strict=True)
    x = torch.randn(samples, 3, 2, 2)
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))
    ghost.load_state_dict(plain.state_dict(), strict=True)


def test_channels_last_sequences_keep_their_order():
    x = torch.randn(7, 5, 3).movedim(-1, 1)
    y = GhostBatchNorm1d(3, ghost_size=2)(x)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, GhostBatchNorm1d(3, ghost_size=2)(x.contiguous()))


@pytest.mark.parametrize("size", [0, -4, 2.0, True, None])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match=r"GhostBatchNorm2d: ghost_size must be a positive integer, .* got"):
        GhostBatchNorm2d(3, ghost_size=size)


def test_slices_of_one_value_are_refused():
    layer = GhostBatchNorm1d(3, ghost_size=1)
    with pytest.raises(InputError, match=r"more than one value per channel in a slice, got ghost_size=1 .* at least 2"):
        layer(torch.randn(8, 3))
    assert layer.num_batches_tracked.item() == 0
    x = torch.randn(8, 3, 5)
    torch.testing.assert_close(layer(x), nn.InstanceNorm1d(3)(x))


def test_an_empty_batch_changes_nothing():
    layer = GhostBatchNorm2d(3, ghost_size=4)
    assert layer(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    assert layer.num_batches_tracked.item() == 0


def test_it_is_a_torch_layer_and_says_its_size():
    layer = steadynorm.GhostBatchNorm2d(3, ghost_size=4)
    assert isinstance(layer, nn.BatchNorm2d)
    assert "ghost_size=4" in repr(layer)
