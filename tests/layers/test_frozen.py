"""FrozenBatchNorm1d, 2d, 3d: constants of a batch norm, to and from every class that holds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import steadynorm
from steadynorm.errors import InputError
from steadynorm.layers import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from tests import cases, oracles
from tests.agree import assert_agrees

LAYERS = {2: FrozenBatchNorm1d, 3: FrozenBatchNorm1d, 4: FrozenBatchNorm2d, 5: FrozenBatchNorm3d}
KEYS = ["weight", "bias", "running_mean", "running_var"]
SHAPES = {1: (6, 4, 5), 2: (3, 4, 5, 2), 3: (3, 4, 2, 3, 2)}


class AsInTorchvision(nn.Module):
    """Its layer, from its source: the same names, dtypes, and arithmetic."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in zip(KEYS, (1.0, 0.0, 0.0, 1.0), strict=True):
            self.register_buffer(name, torch.full((num_features,), value))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x):
        weight, bias, mean, var = (getattr(self, name).reshape(1, -1, 1, 1) for name in KEYS)
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


def through_the_layer(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *, activation=None, residual=None, mask=None
):
    layer = LAYERS[x.dim()](x.shape[1], eps, affine=weight is not None, activation=activation)
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    return functional_call(layer.train(), given, (x,), {"residual": residual, "mask": mask})


@pytest.mark.parametrize("case", cases.EVALUATION[::3], ids=str)
def test_agrees_with_the_formulas_in_training_mode(case):
    assert_agrees(through_the_layer, oracles.batch_norm, case)


@pytest.mark.parametrize("saboteur", ["default eps", "moving"])
def test_the_comparison_sees_what_frozen_layers_get_wrong(saboteur):
    """Hugging Face's keeps its own eps; torch's with requires_grad=False keeps moving."""

    def wrong(x, mean, var, weight, bias, training, momentum, eps):
        if saboteur == "default eps":
            return through_the_layer(x, mean, var, weight, bias, training, momentum, 1e-5)
        return torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, momentum, eps)

    case = cases.BY_NAME["large eps, evaluation"]
    with pytest.raises(AssertionError, match="y is off" if saboteur == "default eps" else "overwritten"):
        assert_agrees(wrong, oracles.batch_norm, case)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("family", [nn, steadynorm], ids=["torch", "ours"])
def test_from_batch_norm_is_its_evaluation(dims, options, family):
    norm = getattr(family, f"BatchNorm{dims}d")(4, eps=0.03, dtype=torch.float64, **options)
    for _ in range(3):
        norm(torch.randn(SHAPES[dims], dtype=torch.float64) * 3 + 1)
    kind = getattr(steadynorm, f"FrozenBatchNorm{dims}d")
    frozen, x = kind.from_batch_norm(norm), torch.randn(SHAPES[dims], dtype=torch.float64)
    assert frozen.eps == 0.03
    torch.testing.assert_close(frozen(x), norm.eval()(x), rtol=0, atol=1e-13)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    norm.train()(x + 9)
    frozen.train().requires_grad_(True)(x + 9)
    assert list(frozen.parameters()) == []
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key])
        assert key in norm.state_dict()


def test_from_batch_norm_keeps_the_activation_and_the_dtypes():
    norm = steadynorm.BatchNorm2d(4, activation="relu").half()
    frozen = FrozenBatchNorm2d.from_batch_norm(norm)
    assert frozen.activation == "relu"
    assert (frozen.weight.dtype, frozen.running_var.dtype) == (torch.float16, torch.float32)
    assert FrozenBatchNorm3d.from_batch_norm(nn.SyncBatchNorm(4, eps=1e-3)).eps == 1e-3


@pytest.mark.parametrize("is_theirs", [False, True], ids=["torch.nn", "torchvision"])
def test_state_dicts_go_both_ways_strictly(is_theirs):
    norm = nn.BatchNorm2d(4, eps=1e-3)
    norm(torch.randn(3, 4, 5, 5) * 2 + 1)
    theirs = AsInTorchvision(4, 1e-3) if is_theirs else nn.BatchNorm2d(4, eps=1e-3).eval()
    ours, again, x = FrozenBatchNorm2d(4, 1e-3), FrozenBatchNorm2d(4, 1e-3), torch.randn(2, 4, 3, 3)
    assert list(ours.state_dict()) == KEYS
    state = norm.state_dict()
    ours.load_state_dict(state, strict=True)
    assert "num_batches_tracked" in state
    theirs.load_state_dict(ours.state_dict(), strict=True)
    again.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(theirs(x), norm.eval()(x))
    torch.testing.assert_close(again(x), norm.eval()(x))


def test_a_half_precision_checkpoint_keeps_the_statistics_float32():
    ours = FrozenBatchNorm2d(4)
    ours.load_state_dict(nn.BatchNorm2d(4).half().state_dict(), assign=True)
    assert (ours.weight.dtype, ours.running_mean.dtype) == (torch.float16, torch.float32)


def test_eps_zero_is_that_of_old_checkpoints():
    ours, theirs = FrozenBatchNorm2d(4, eps=0.0), AsInTorchvision(4, 0.0)
    theirs.running_var.copy_(torch.tensor([1e-4, 1.0, 4.0, 9.0]))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    assert "eps=0.0" in repr(ours)


def test_meta_and_back():
    layer = FrozenBatchNorm1d(4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert [t[0].item() for t in layer.state_dict().values()] == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.BatchNorm1d(3), r"FrozenBatchNorm2d.from_batch_norm got a BatchNorm1d: use FrozenBatchNorm1d"),
        (nn.LayerNorm(3), r"expected a batch norm, got LayerNorm"),
        (nn.BatchNorm2d(3, track_running_stats=False), r"got a BatchNorm2d without running statistics"),
        (nn.LazyBatchNorm2d(), r"got a LazyBatchNorm2d without running statistics"),
    ],
    ids=str,
)
def test_what_cannot_be_frozen(norm, message):
    with pytest.raises(InputError, match=message):
        FrozenBatchNorm2d.from_batch_norm(norm)
