from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from steadynorm import functional, kernels
from steadynorm.functional import batch_norm, normalize_batch, normalize_running
from steadynorm.kernels import reference
from tests import cases

# torch's own forward-mode formulas are TorchScript still.
torch_script_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
ACTIVATIONS = (None, *cases.ACTIVATIONS)
# One kernel of each kind of backward pass, since compiling a kernel takes seconds on a fresh machine.
COMPILED_IN_DOUBLE = (None,)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=4)][1:])
def test_any_subset_of_gradients(backend, wanted, training, activation):
    """Frozen weights, a first layer, ...: what is asked for is the same, the rest is not made."""
    tensors = [torch.randn(4, 6, 5), torch.randn(6), torch.randn(6), torch.randn(4, 6, 5)]
    dy = torch.randn(4, 6, 5)
    running = (torch.randn(6), torch.rand(6) + 0.5)
    everything = None
    for mask in ((True,) * 4, wanted):
        x, weight, bias, residual = leaves = [t.clone().requires_grad_(w) for t, w in zip(tensors, mask, strict=True)]
        arguments = (*(t.clone() for t in running), weight, bias, training)
        batch_norm(x, *arguments, residual=residual, activation=activation).backward(dy)
        grads = [leaf.grad for leaf in leaves]
        everything = everything or grads
        for grad, full, is_wanted in zip(grads, everything, mask, strict=True):
            assert (grad is not None) == is_wanted
            assert grad is None or torch.equal(grad, full)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_sums_are_asked_for_where_weight_or_bias_train(is_frozen, monkeypatch):
    """Of a frozen layer the input's gradient is one sweep, where nobody wants the sums."""
    asked, backward = [], reference.backward
    monkeypatch.setattr(reference, "backward", lambda *args: asked.append(args[-1]) or backward(*args))
    x = torch.randn(4, 6, 5, requires_grad=True)
    weight, bias = torch.randn(6), torch.randn(6, requires_grad=not is_frozen)
    with kernels.backend("reference"):
        normalize_running(x, torch.zeros(6), torch.ones(6), weight, bias, activation="relu").sum().backward()
    assert asked == [not is_frozen]


TWICE = {
    "batch": lambda x, w: functional.normalize_batch(x, w)[0],
    "batch, weight and bias in one": lambda x, w: functional.normalize_batch(x, w, w)[0],
    "batch, weight of x": lambda x, w: functional.normalize_batch(x, w * (1 + x.mean(0)))[0],
    "given": lambda x, w: functional.normalize_running(x, torch.zeros(8), torch.ones(8), w, activation="relu"),
    "slices": lambda x, w: functional.normalize_slices(x, (len(x) // 2,) * 2, w)[0],
    "together": lambda x, w: torch.cat(functional.normalize_together([functional.Part(t) for t in x.split(10)], w)[0]),
    "layer": lambda x, w: functional.layer_norm(x, 8, w),
    "rms": lambda x, w: functional.rms_norm(x, 8, w),
    "group": lambda x, w: functional.group_norm(x, 2, w),
}


@pytest.mark.parametrize("rows", [20, 20_000])
@pytest.mark.parametrize("norm", TWICE)
def test_a_norm_that_is_applied_twice_has_the_same_gradients_for_a_graph_of_them(norm, rows):
    """What comes before in the network is not differentiated twice: its weight is in both, or weight is made of x."""
    if norm == "together" and rows > 20:
        pytest.skip("a thousand parts")
    x, weight = torch.randn(rows, 8, requires_grad=True), (torch.rand(8) + 0.5).requires_grad_()
    dy, call = torch.randn(rows, 8), TWICE[norm]
    plain, graph = (
        torch.autograd.grad(call(call(x, weight).tanh(), weight), (x, weight), dy, create_graph=is_graph)
        for is_graph in (False, True)
    )
    for found, expected in zip(graph, plain, strict=True):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("shape", [(8, 4), (300, 300), (4, 4, 5, 6), (4, 20, 30, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trains", [True, False])
def test_given_statistics_keep_a_bad_value_to_itself(shape, dtype, trains):
    """dx = dy · weight · invstd: a NaN of x is in the gradient of weight, and not in that of other values."""
    x = torch.randn(shape, dtype=dtype)
    x.view(-1)[3] = math.nan
    x.requires_grad_()
    weight = torch.ones(shape[1], dtype=dtype, requires_grad=trains)
    mean, var = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
    normalize_running(x, mean, var, weight).sum().backward()
    assert x.grad.isnan().sum() <= 1
    torch.testing.assert_close(x.grad.nan_to_num(1), torch.ones_like(x), rtol=1e-4, atol=1e-4)


def test_nothing_is_recorded_where_no_gradient_is_wanted(backend):
    x, weight = torch.randn(4, 6, 5), torch.ones(6)
    assert not normalize_batch(x, weight)[0].requires_grad
    with torch.no_grad():
        assert not normalize_batch(x.requires_grad_(), weight)[0].requires_grad
    with torch.inference_mode():
        assert normalize_batch(x, weight)[0].is_inference()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_an_input_changed_before_the_backward_pass_is_an_error(backend, activation):
    x = torch.randn(4, 6, 5, requires_grad=True)
    base = x * 1
    y, _ = normalize_batch(base, torch.ones(6), activation=activation)
    base.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [True, False])
def test_an_output_changed_in_place_is_an_error_or_harmless(backend, activation, with_residual):
    """Never a wrong gradient in silence."""
    x, dy = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    residual = torch.randn(4, 6, 5) if with_residual else None
    found = []
    for in_place in (False, True):
        leaf = x.clone().requires_grad_()
        y, _ = normalize_batch(leaf, residual=residual, activation=activation)
        y = y.mul_(2) if in_place else y * 2
        if in_place and _is_refused(lambda y=y: y.backward(dy)):
            return
        if not in_place:
            y.backward(dy)
        found.append(leaf.grad)
    assert torch.equal(*found)


def _is_refused(backward) -> bool:
    try:
        backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


def test_running_statistics_that_move_before_the_backward_pass(backend):
    """An evaluation pass, a training pass, then the gradient of the first: as if the second had not been."""
    x, dy, weight = torch.randn(4, 6, 5, requires_grad=True), torch.randn(4, 6, 5), torch.randn(6)
    found = []
    for moves in (False, True):
        running = [torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)]
        y = batch_norm(x, *running, weight, activation="silu")
        if moves:
            batch_norm(x.detach() + 3, *running, weight, training=True)
        found.append(torch.autograd.grad(y, x, dy)[0])
    assert torch.equal(*found)


def leaves_in_float64(shape=(2, 2, 3)):
    x, residual = torch.randn(shape).double(), torch.randn(shape).double()
    tensors = (x, torch.randn(shape[1]).double() + 1, torch.randn(shape[1]).double(), residual)
    return tuple(t.requires_grad_() for t in tensors)


def function_of(training: bool, activation: str | None, with_residual: bool = True, masked: bool = False):
    """normalize_batch or normalize_running as a function of its tensors only."""
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool() if masked else None

    def call(x, weight, bias, residual=None):
        options = {"activation": activation, "mask": mask, "residual": residual}
        if training:
            return normalize_batch(x, weight, bias, **options)[0]
        mean, var = (torch.linspace(a, b, x.shape[1]).double() for a, b in ((-1, 1), (0.5, 2)))
        return normalize_running(x, mean, var, weight, bias, **options)

    return call, leaves_in_float64()[: 4 if with_residual else 3]


WAYS = {"alone": (False, False), "add": (True, False), "masked": (False, True), "add, masked": (True, True)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(backend, training, activation, way):
    function, tensors = function_of(training, activation, *WAYS[way])
    backend.needs(tensors[0])
    assert gradcheck(function, tensors)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", ["alone", "add, masked"])
def test_gradgradcheck(training, activation, way):
    with contextlib.nullcontext() if activation in COMPILED_IN_DOUBLE else kernels.backend("reference"):
        assert gradgradcheck(*function_of(training, activation, *WAYS[way]))


@pytest.mark.parametrize("shape", [(5, 3), (2, 2, 2, 3)])
def test_gradcheck_of_other_ranks(backend, shape):
    (function, _), tensors = function_of(True, "silu"), leaves_in_float64(shape)
    backend.needs(tensors[0])
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@torch_script_is_deprecated
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode(training, activation, masked):
    function, tensors = function_of(training, activation, True, masked)
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_forward_grad=True)


@torch_script_is_deprecated
def test_forward_mode_to_the_second_order():
    """Where F.batch_norm is wrong without a word: https://github.com/pytorch/pytorch/issues/196699."""
    function, tensors = function_of(True, None, False)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True)
    x, *affine = (t.detach() for t in tensors)
    v = torch.randn_like(x)

    def along(t):
        y = function(x + t * v, *affine)
        return y.square().sum() + y[0].pow(3).sum()

    zero, one, h = torch.zeros(()).double(), torch.ones(()).double(), 1e-4
    forward_twice = torch.func.jvp(lambda t: torch.func.jvp(along, (t,), (one,))[1], (zero,), (one,))[1]
    backward_twice = torch.func.grad(torch.func.grad(along))(zero)
    numeric = (along(zero + h) - 2 * along(zero) + along(zero - h)) / h**2
    torch.testing.assert_close(forward_twice, backward_twice)
    torch.testing.assert_close(forward_twice, numeric, rtol=1e-4, atol=1e-4)


@torch_script_is_deprecated
def test_third_order():
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).cos().reshape(6, 2)

    def loss(x):
        return normalize_batch(x, activation="silu")[0].pow(3)[:, 0].sum()

    third = torch.func.jacrev(torch.func.jacrev(torch.func.grad(loss)))(x)
    v, h = torch.randn_like(x), 1e-4
    hessian = torch.func.hessian(loss)
    numeric = (hessian(x + h * v) - hessian(x - h * v)) / (2 * h)
    torch.testing.assert_close((third * v).sum((-2, -1)), numeric, rtol=1e-4, atol=1e-4)
