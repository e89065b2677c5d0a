"""Weight norm: against the oracle and torch, a row of zeros, both spellings of a checkpoint."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from steadynorm.errors import InputError
from steadynorm.layers import make_plain, weight_norm
from steadynorm.layers.weight.norm import WeightNorm
from tests import oracles
from tests.layers.weight.comparison import WEIGHT_ROUNDINGS, assert_weight_agrees, check

LAYERS = {
    "Linear": lambda: nn.Linear(7, 5),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d, grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d": lambda: nn.Conv3d(2, 3, (1, 2, 3)),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 7), 0), ((6, 4, 3), 0), ((4, 6, 3, 3), 1), ((6, 5), None), ((9,), None)]
)
def test_agrees_with_the_oracle(shape, dim, dtype):
    v = torch.randn(shape).to(dtype)
    g = (
        torch.randn(())
        if dim is None
        else torch.randn(shape[dim]).view([-1 if d == dim else 1 for d in range(v.dim())])
    )
    oracle = functools.partial(oracles.weight_norm, dim=dim)
    assert_weight_agrees(WeightNorm(dim), oracle, [g.to(dtype), v])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tiny", [0.0, 1e-14])
def test_a_row_of_zeros_gives_zeros(tiny, dtype):
    v = torch.randn(5, 7)
    v[2] = tiny
    assert_weight_agrees(WeightNorm(), oracles.weight_norm, [torch.randn(5, 1).to(dtype), v.to(dtype)])
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        layer.weight[2] = tiny
    layer = weight_norm(layer)
    layer(torch.randn(3, 7)).square().sum().backward()
    parts = layer.parametrizations.weight
    assert (layer.weight[2] == 0).all()
    assert (parts.original0.grad[2] == 0).all()
    assert (parts.original1.grad[2] == 0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_gradients_of_every_order():
    v = torch.randn(4, 6, dtype=torch.float64)
    v[1] = 0
    leaves = torch.randn(4, 1, dtype=torch.float64).requires_grad_(), v.requires_grad_()
    # Beside a row of zeros differences of finite size leave it: there only that nothing is NaN.
    rest = [leaf.detach()[2:].requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(WeightNorm(), rest)
    assert torch.autograd.gradgradcheck(WeightNorm(), rest)
    first = torch.autograd.grad(WeightNorm()(*leaves).square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves)
    assert all(s.isfinite().all() for s in second)
    assert (second[1][1] == 0).all()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_state_dict_goes_both_ways_with_torch(make, dim):
    theirs = parametrizations.weight_norm(make(), dim=dim)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.mul_(1.7)
    ours = weight_norm(make(), dim=dim)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("dim", [0, None])
def test_the_older_spelling_is_read(dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        older = torch.nn.utils.weight_norm(nn.Conv1d(4, 6, 3), dim=dim)
    state = nn.Sequential(older).state_dict()
    assert {"0.weight_g", "0.weight_v"} < state.keys()
    ours = nn.Sequential(weight_norm(nn.Conv1d(4, 6, 3), dim=dim))
    copy.deepcopy(ours).load_state_dict(state, strict=True)
    ours.load_state_dict(state, strict=True)
    assert "0.weight_g" in state  # the caller's own is left alone
    torch.testing.assert_close(ours[0].weight, older.weight)


def test_a_missing_half_is_reported():
    ours = weight_norm(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=r"original0.*original1"):
        ours.load_state_dict({"weight_g": torch.ones(2, 1), "bias": torch.zeros(2)})


def test_the_weight_is_what_it_was():
    layer = nn.Conv2d(3, 5, 3)
    before = layer.weight.detach().clone()
    torch.testing.assert_close(weight_norm(layer).weight, before)
    layer.weight = before * 2
    torch.testing.assert_close(layer.weight, before * 2)


def test_trains_as_torch_does():
    torch.manual_seed(0)
    ours, theirs = weight_norm(nn.Linear(6, 4)), parametrizations.weight_norm(nn.Linear(6, 4))
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype):
    layer = weight_norm(nn.Linear(2000, 3)).to(dtype)
    parts = layer.parametrizations.weight
    exact = oracles.weight_norm(*(p.detach().double().numpy() for p in (parts.original0, parts.original1))).weight
    assert layer.weight.dtype == dtype
    check("weight", layer.weight, exact, WEIGHT_ROUNDINGS)


def test_a_vector_of_single_numbers():
    assert torch.equal(WeightNorm(0)(torch.ones(4), torch.tensor([3.0, -0.5, 0.0, 2.0])), torch.tensor([1.0, -1, 0, 1]))


def test_copies_and_what_cannot_be_pickled():
    layer = weight_norm(nn.Linear(3, 2))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.parametrizations.weight.original0.zero_()
    assert (twin.weight == 0).all()
    assert not (layer.weight == 0).any()
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(layer)
    again = pickle.loads(pickle.dumps(make_plain(layer)))
    assert torch.equal(again.weight, layer.weight)


def test_compiles_in_one_graph():
    layer = weight_norm(nn.Linear(6, 4))
    x = torch.randn(5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_exports():
    layer = weight_norm(nn.Linear(6, 4)).eval()
    x = torch.randn(5, 6)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (nn.ReLU, {}, "ReLU has no tensor named 'weight' to put weight norm on: give name=."),
        (
            lambda: nn.LazyLinear(3),
            {},
            "LazyLinear.weight has no shape yet: run one batch through it before weight norm.",
        ),
        (lambda: nn.Linear(3, 2), {"eps": 0.0}, "Linear: eps must be positive, got 0.0."),
        (lambda: nn.Linear(3, 2), {"eps": float("nan")}, "Linear: eps must be positive, got nan."),
        (lambda: nn.Linear(3, 2), {"dim": 2}, "Linear: dim must be from 0 to 1 for weight of shape (2, 3), got 2."),
        (lambda: nn.Linear(3, 2), {"dim": -1}, "Linear: dim must be from 0 to 1 for weight of shape (2, 3), got -1."),
        (
            lambda: weight_norm(nn.Linear(3, 2)),
            {},
            "ParametrizedLinear.weight is parametrized already: weight norm has to be the first, so make it plain with"
            " make_plain, or put weight norm on before.",
        ),
    ],
)
def test_refusals(make, options, message):
    layer = make()
    before = list(layer.state_dict())
    with pytest.raises(InputError) as error:
        weight_norm(layer, **options)
    assert str(error.value) == message
    assert list(layer.state_dict()) == before
