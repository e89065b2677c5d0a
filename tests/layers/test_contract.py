"""What every normalization promises to torch's tools, for those that no other file takes through all of it.

First and second derivatives, one graph, export, vmap, copies and files: the rest of the layers within a sample (see
`test_sample`), on weights and on the input. Those over the batch are in `test_relatives`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import steadynorm as sn
from steadynorm.errors import InputError

compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def spectral() -> nn.Module:
    """After many power iterations, where the singular vectors are those of the weight and σ has a derivative."""
    layer = sn.spectral_norm(nn.Linear(6, 4).double(), n_power_iterations=50)
    for _ in range(20):
        layer(torch.ones(1, 6, dtype=torch.float64))
    return layer.eval()


def lazy() -> nn.Module:
    layer = sn.LazyInstanceNorm2d(affine=True).double()
    layer(torch.randn(3, 6, 4, 5, dtype=torch.float64))
    return layer


LAYERS = {
    "InstanceNorm1d": (lambda: sn.InstanceNorm1d(6, affine=True).double(), (3, 6, 7)),
    "InstanceNorm3d": (lambda: sn.InstanceNorm3d(6, affine=True).double(), (3, 6, 2, 3, 4)),
    "LazyInstanceNorm2d": (lazy, (3, 6, 4, 5)),
    "RMSNorm, t5": (lambda: sn.RMSNorm(6, convention="t5").double(), (3, 5, 6)),
    "InputNorm": (lambda: sn.InputNorm.fit([torch.randn(40, 6, dtype=torch.float64) * 3 + 1]), (5, 6)),
    "weight_norm": (lambda: sn.weight_norm(nn.Linear(6, 4).double()), (5, 6)),
    "weight_norm, convolution": (lambda: sn.weight_norm(nn.Conv1d(6, 4, 3).double()), (5, 6, 8)),
    "weight_standardization": (lambda: sn.weight_standardization(nn.Linear(6, 4).double()), (5, 6)),
    "weight_standardization, scaled": (
        lambda: sn.weight_standardization(nn.Conv1d(6, 4, 3).double(), scaled=True),
        (5, 6, 8),
    ),
    "spectral_norm": (spectral, (5, 6)),
}
ALL = pytest.mark.parametrize("name", LAYERS)
ON_WEIGHTS = frozenset(name for name in LAYERS if name.startswith(("weight", "spectral")))


def made(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return (spectral() if name == "spectral_norm" else layer), torch.randn(shape, dtype=torch.float64)


@ALL
def test_first_and_second_derivatives(name):
    layer, x = made(name)
    parameters = dict(layer.named_parameters())

    def call(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x.requires_grad_(), *parameters.values())
    assert gradcheck(call, inputs)
    # Singular vectors are constants to the gradient of a spectral norm: that is its first derivative alone.
    assert gradgradcheck(layer, x) if name == "spectral_norm" else gradgradcheck(call, inputs)


@compiles
@ALL
def test_one_graph(name):
    layer, x = made(name)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), layer(x)
    torch.testing.assert_close(found, expected)
    if any(p.requires_grad for p in layer.parameters()):
        found.square().sum().backward()
        expected.square().sum().backward()
        for one, other in zip(twin.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


@ALL
def test_export(name):
    layer, x = made(name)
    exported = torch.export.export(layer.eval(), (x,))
    assert not any("steadynorm" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(exported.module()(x), layer(x))


@ALL
def test_vmap_and_a_functional_gradient(name):
    layer, x = made(name)
    batches = torch.stack([x, 2 * x + 1, x.flip(0)])
    torch.testing.assert_close(torch.vmap(layer)(batches), torch.stack([layer(each) for each in batches]))
    weights = torch.randn_like(layer(x)).detach()
    found = torch.func.grad(lambda x: (layer(x) * weights).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad((layer(leaf) * weights).sum(), leaf)[0])


@ALL
def test_copies_are_whole_and_apart(name):
    layer, x = made(name)
    expected = layer(x).detach()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(layer(x), expected)


@ALL
def test_a_file(name):
    layer, x = made(name)
    if name in ON_WEIGHTS:
        # torch pickles no parametrized module: its state goes into a file, or the module made plain.
        again = copy.deepcopy(layer)
        with torch.no_grad():
            for tensor in (*again.parameters(), *again.buffers()):
                tensor.normal_()
        again.load_state_dict(pickle.loads(pickle.dumps(layer.state_dict())))
        assert torch.equal(again(x), layer(x))
        plain = pickle.loads(pickle.dumps(sn.make_plain(copy.deepcopy(layer))))
        assert torch.equal(plain(x), layer(x))
    else:
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def _over_batch(kind: str, dims: int, *args: int):
    return lambda **options: getattr(sn, f"{kind}{dims}d")(*args, **EXTRA.get(kind, {}), **options)


EXTRA = {"GhostBatchNorm": {"ghost_size": 4}, "DomainBatchNorm": {"num_domains": 2}}
REMEMBER = {
    **{
        f"{kind}{dims}d": _over_batch(kind, dims, 6)
        for kind in ("BatchNorm", "GhostBatchNorm", "BatchRenorm", "DomainBatchNorm", "InstanceNorm")
        for dims in (1, 2, 3)
    },
    **{
        f"{kind}{dims}d": _over_batch(kind, dims)
        for kind in ("LazyBatchNorm", "LazyInstanceNorm")
        for dims in (1, 2, 3)
    },
    "StepBatchNorm1d": lambda **options: sn.StepBatchNorm1d(6, steps=3, **options),
    "SyncBatchNorm": lambda **options: sn.SyncBatchNorm(6, **options),
}
EVERY = {
    **REMEMBER,
    **{f"FrozenBatchNorm{dims}d": _over_batch("FrozenBatchNorm", dims, 6) for dims in (1, 2, 3)},
    "LayerNorm": lambda **options: sn.LayerNorm(6, **options),
    "ChannelLayerNorm": lambda **options: sn.ChannelLayerNorm(6, **options),
    "RMSNorm": lambda **options: sn.RMSNorm(6, **options),
    "GroupNorm": lambda **options: sn.GroupNorm(2, 6, **options),
    "weight_norm": lambda **options: sn.weight_norm(nn.Linear(3, 2), **options),
    "spectral_norm": lambda **options: sn.spectral_norm(nn.Linear(3, 2), **options),
    "weight_standardization": lambda **options: sn.weight_standardization(nn.Linear(3, 2), **options),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_negative_eps_is_refused(name):
    with pytest.raises(InputError, match=r"eps must (be positive|not be negative).*, got -1e-05\.$"):
        EVERY[name](eps=-1e-5)


@pytest.mark.parametrize("name", REMEMBER)
@pytest.mark.parametrize("momentum", [1.5, -0.1])
def test_a_momentum_that_is_no_weight_is_refused(name, momentum):
    with pytest.raises(InputError, match=rf"{name}: momentum must be in \[0, 1\].*got {momentum}"):
        REMEMBER[name](momentum=momentum)


@pytest.mark.parametrize("name", [n for n in (*EVERY,) if n.endswith("2d") and "Lazy" not in n] + ["GroupNorm"])
def test_a_mask_of_another_shape_is_refused_with_the_path(name):
    model = nn.ModuleDict({"stem": EVERY[name]()})

    def forward(x):
        extra = {"domain": torch.tensor([0, 1])} if name.startswith("Domain") else {}
        return model["stem"](x, mask=torch.ones(2, 4, 3, dtype=torch.bool), **extra)

    model.forward = forward
    with pytest.raises(InputError, match=rf"{name} at stem expected a mask \(2, 4, 4\).*got \(2, 4, 3\)"):
        model(torch.randn(2, 6, 4, 4))
