from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from steadynorm import functional as S
from steadynorm import kernels
from steadynorm.errors import BackendError
from steadynorm.functional.layer import normalize_positions

# torch's own forward-mode formulas are TorchScript still.
torch_script_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
MASK = torch.tensor([[True, True, False], [False, True, True]])


def group(activation=None, mask=None):
    return lambda x, w, b, r: S.group_norm(x, 2, w, b, residual=r, activation=activation, mask=mask)


def instance(activation=None, mask=None):
    return lambda x, w, b, r: S.instance_norm(x, weight=w, bias=b, residual=r, activation=activation, mask=mask)


FUNCTIONS = {
    "layer": lambda x, w, b: S.layer_norm(x, 3, w[:3], b[:3]),
    "layer, two dimensions": lambda x, w, b: S.layer_norm(x, (4, 3), torch.outer(w, b[:3]), torch.outer(b, w[:3])),
    "layer, add": lambda x, w, b, a: S.layer_norm(x, 3, w[:3], b[:3], addend=a),
    "rms": lambda x, w: S.rms_norm(x, 3, w[:3]),
    **{
        f"rms, {name}, add": lambda x, w, a, name=name: S.rms_norm(x, 3, w[:3], 1e-6, addend=a, convention=name)
        for name in ("torch", "llama", "gemma", "t5")
    },
    "positions": lambda x, w, b: normalize_positions(x, w, b, eps=1e-5),
    "group, relu": group("relu"),
    "group, silu": group("silu"),
    "group, masked": group(None, MASK),
    "group, gelu, masked": group("gelu", MASK),
    "group, relu, masked": group("relu", MASK),
    "instance": instance(),
    "instance, silu, masked": instance("silu", MASK),
}


# One of each kind of kernel: compiling one takes seconds on a fresh machine, and one source serves every dtype.
COMPILED = ("layer, add", "rms", "group, silu")


@pytest.fixture
def reference():
    with kernels.backend("reference"):
        yield


def leaves(function, dtype=torch.float64, shape=(2, 4, 3)):
    """A random leaf for each argument, by its letter: x, w(eight), b(ias), a(ddend), r(esidual)."""
    names = [name for name in function.__code__.co_varnames[: function.__code__.co_argcount] if len(name) == 1]
    shapes = {"w": shape[1:2], "b": shape[1:2]}
    return tuple(torch.randn(shapes.get(name, shape), dtype=dtype).requires_grad_() for name in names)


def in_reach(call, *args, **options):
    """What `call` gives, or a skip with the reason where the forced backend does not take such tensors."""
    try:
        return call(*args, **options)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(backend, name):
    if backend.name != "reference" and name not in COMPILED:
        pytest.skip("the float32 kernel is compared elsewhere")
    assert in_reach(gradcheck, FUNCTIONS[name], leaves(FUNCTIONS[name]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradgradcheck(reference, name):
    assert gradgradcheck(FUNCTIONS[name], leaves(FUNCTIONS[name]))


@torch_script_is_deprecated
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(reference, name):
    assert gradcheck(FUNCTIONS[name], leaves(FUNCTIONS[name]), check_forward_ad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_is_a_loop(reference, name):
    function = FUNCTIONS[name]
    stacked = [torch.stack([leaf.detach() + k for k in range(3)]) for leaf in leaves(function)]
    expected = [function(*each) for each in zip(*stacked, strict=True)]
    found = torch.vmap(function)(*stacked)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), [(each,) for each in expected]
    for k, one in enumerate(found):
        torch.testing.assert_close(one, torch.stack([each[k] for each in expected]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_func_grad_is_autograd(reference, name):
    function = FUNCTIONS[name]
    given = leaves(function)
    weights = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss(*args):
        found = function(*args)
        return (
            sum((each * weights * k).sum() for k, each in enumerate(found, 1))
            if isinstance(found, tuple)
            else (found * weights).sum()
        )

    expected = torch.autograd.grad(loss(*given), given)
    found = torch.func.grad(loss, argnums=tuple(range(len(given))))(*(leaf.detach() for leaf in given))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@torch_script_is_deprecated
def test_third_order(reference):
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).cos().reshape(1, 4, 3)

    def loss(x):
        return S.group_norm(x, 2, activation="silu").pow(3)[:, 0].sum()

    third = torch.func.jacrev(torch.func.jacrev(torch.func.grad(loss)))(x)
    v, h = torch.randn_like(x), 1e-4
    hessian = torch.func.hessian(loss)
    numeric = (hessian(x + h * v) - hessian(x - h * v)) / (2 * h)
    torch.testing.assert_close((third * v).sum((-3, -2, -1)), numeric, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer, add", "group, silu"])
def test_any_subset_of_gradients(backend, name):
    """Frozen weights, a first layer, ...: what is asked for is the same, the rest is not made."""
    function = FUNCTIONS[name]
    tensors = [leaf.detach() for leaf in leaves(function, torch.float32)]
    full = None
    for wanted in [(True,) * len(tensors), *itertools.product([False, True], repeat=len(tensors))][:-1]:
        given = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        y = in_reach(function, *given)
        y = y[0] if isinstance(y, tuple) else y
        if not any(wanted):
            assert not y.requires_grad
            continue
        y.backward(torch.linspace(-1, 2, y.numel()).reshape(y.shape))
        full = full or [leaf.grad for leaf in given]
        for leaf, expected, is_wanted in zip(given, full, wanted, strict=True):
            assert (leaf.grad is not None) == is_wanted
            assert leaf.grad is None or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("which", ["y", "total", "both"])
def test_gradients_of_the_sum_and_of_the_output_meet(backend, which):
    x, addend, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (4, 6), (6,)))
    dy, dtotal = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    found = []
    for fused in (True, False):
        y, total = in_reach(S.layer_norm, x, 6, weight, addend=addend) if fused else (None, x + addend)
        y = torch.nn.functional.layer_norm(total, (6,), weight) if y is None else y
        loss = {"y": (y * dy).sum(), "total": (total * dtotal).sum(), "both": (y * dy).sum() + (total * dtotal).sum()}
        found.append(torch.autograd.grad(loss[which], (x, addend, weight), allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs)


def test_double_backward_with_nan_in_the_padding(reference):
    x, w, b, r = leaves(group())
    padding = ~MASK[:, None].expand(x.shape)
    x, r = (torch.where(padding, torch.nan, t.detach()).requires_grad_() for t in (x, r))
    y = S.group_norm(x, 2, w, b, residual=r, activation="silu", mask=MASK)
    first = torch.autograd.grad(y.square().sum(), (x, w, b, r), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b, r))
    for gradient in (*first, *second):
        assert gradient.isfinite().all()
    for gradient in (first[0], first[3], second[0], second[3]):
        assert (gradient[padding] == 0).all()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_an_input_changed_before_the_backward_pass_is_an_error(reference, activation):
    x = torch.randn(2, 4, 5, requires_grad=True)
    base = x * 1
    y = S.group_norm(base, 2, activation=activation)
    base.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
