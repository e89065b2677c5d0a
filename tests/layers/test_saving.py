"""recompute_outputs: the same gradients from less memory, and as strict about changes in place as autograd."""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import steadynorm
from steadynorm import functional
from steadynorm.layers import BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm, recompute_outputs, saving
from tests import oracles


class Block(nn.Module):
    """conv, norm, conv, norm with a residual, as in a residual network."""

    def __init__(self, before, after, activation, kind=BatchNorm2d):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(before, 4, 1), nn.Conv2d(4, after, 3, padding=1)
        self.norm1 = kind(4, activation=activation)
        self.norm2 = kind(after, activation=activation)
        self.shortcut = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1), kind(after))

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=self.shortcut(x))


def group_norm(channels, activation=None):
    return GroupNorm(2, channels, activation=activation)


NETWORKS = {
    "plain": lambda act: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), BatchNorm2d(8, activation=act), nn.Conv2d(8, 8, 3, padding=1),
        BatchNorm2d(8, activation=act), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 6), BatchNorm1d(6, activation=act),
        nn.Linear(6, 5),
    ),
    "group norm": lambda act: nn.Sequential(
        nn.Conv2d(3, 8, 3), GroupNorm(4, 8, activation=act), nn.Conv2d(8, 8, 3), GroupNorm(4, 8), nn.Flatten(),
        LayerNorm(32), nn.Linear(32, 5),
    ),
    "residual": lambda act: nn.Sequential(
        Block(3, 6, act), *(Block(6, 6, act) for _ in range(5)), nn.Conv2d(6, 2, 3), nn.Flatten(), nn.Linear(32, 5)
    ),
    "residual, group norm": lambda act: nn.Sequential(
        Block(3, 6, act, group_norm), *(Block(6, 6, act, group_norm) for _ in range(5)), nn.Conv2d(6, 2, 6)
    ),
}  # fmt: skip


@pytest.fixture
def packed(monkeypatch):
    """What is saved inside the context, in the order in which it is."""
    seen = []
    pack = saving._pack

    def recorded(tensor):
        seen.append(pack(tensor))
        return seen[-1]

    monkeypatch.setattr(saving, "_pack", recorded)
    return seen


def gradients(model, x, dy, context, in_thread=False, **options):
    """Gradients of x and of all parameters, and the running statistics afterwards."""
    model, x = copy.deepcopy(model), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with context():
        y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) if dy is None else dy
    if in_thread:
        thread = threading.Thread(target=y.backward, args=(dy,))
        thread.start()
        thread.join()
    else:
        y.backward(dy, **options)
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same_bits(model, x, **options):
    plain = gradients(model, x, None, contextlib.nullcontext, **options)
    ours = gradients(model, x, None, recompute_outputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


@pytest.fixture(autouse=True)
def quick(request):
    """The reference backend, where nothing is compiled; a test that asks for `compiled` gets the kernels."""
    with contextlib.nullcontext() if "compiled" in request.fixturenames else steadynorm.backend("reference"):
        yield


@pytest.fixture
def compiled():
    """See `quick`."""


def test_what_is_computed_again_runs_on_the_backend_of_the_norm():
    """On a device autograd asks for it from a thread of its own, which knows of no block."""
    model, x = NETWORKS["group norm"]("silu"), torch.randn(4, 3, 6, 6)
    found = []
    for context in (contextlib.nullcontext, recompute_outputs):
        with steadynorm.backend("reference"):
            found.append(gradients(model, x, None, context, in_thread=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def check_bits(network, activation, last, dtype, packed):
    model = NETWORKS[network](activation).to(dtype)
    x = torch.randn(4, 3, 6, 6).to(dtype)
    if last:
        x, model = (t.to(memory_format=torch.channels_last) for t in (x, model))
    assert_same_bits(model, x)
    assert any(saved.source is not None for saved in packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "leaky_relu", None])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_bits(network, activation, last, dtype, packed):
    check_bits(network, activation, last, dtype, packed)


@pytest.mark.parametrize(
    ("network", "activation", "last"),
    [("plain", "relu", False), ("plain", "relu", True), ("residual", "silu", False), ("group norm", "relu", False)],
)
def test_the_same_bits_of_compiled_kernels(network, activation, last, packed, compiled):
    check_bits(network, activation, last, torch.float32, packed)


@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_against_the_oracle(activation):
    """A linear layer behind a norm: its weight's gradient is made of the output that was let go."""
    x = torch.randn(30, 6, dtype=torch.float64) + 3
    weight, bias = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    matrix = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(30, 4, dtype=torch.float64)
    check_against_the_oracle(x, weight, bias, matrix, dy, activation)


def check_against_the_oracle(x, weight, bias, matrix, dy, activation):
    ahead = oracles.forward(x.numpy(), weight=weight.numpy(), bias=bias.numpy(), activation=activation)
    with recompute_outputs():
        y, _ = functional.normalize_batch(x.clone().requires_grad_(), weight, bias, activation=activation)
        z = nn.functional.linear(y, matrix)
        kept = StorageWeakRef(y.untyped_storage())
        del y
    gc.collect()
    assert kept.expired(), "the output is still in memory"
    z.backward(dy)
    np.testing.assert_allclose(matrix.grad.numpy(), dy.numpy().T @ ahead.y, rtol=1e-12, atol=1e-12)


def without_activation(backend, settings, *rest):
    return again(backend, (*settings[:2], None, *settings[3:]), *rest)


def with_another_eps(backend, settings, *rest):
    return again(backend, (settings[0], 1e-3, *settings[2:]), *rest)


def with_running_statistics(backend, settings, x, *rest):
    return again(backend, settings, x, *rest[:-2], torch.zeros_like(rest[-2]), torch.ones_like(rest[-1]))


def without_bias(backend, settings, x, weight, bias, *rest):
    return again(backend, settings, x, weight, None, *rest)


def of_the_next_sample(backend, settings, x, *rest):
    return again(backend, settings, x, *rest).roll(1, 0)


again = saving._again
SABOTEURS = [without_activation, with_another_eps, with_running_statistics, without_bias, of_the_next_sample]


@pytest.mark.parametrize("saboteur", SABOTEURS)
def test_what_is_computed_wrongly_is_seen(saboteur, monkeypatch):
    monkeypatch.setattr(saving, "_again", saboteur)
    with pytest.raises(AssertionError, match="Not equal"):
        test_against_the_oracle("relu")
    model, x = NETWORKS["plain"]("relu"), torch.randn(4, 3, 6, 6)
    nn.init.normal_(model[1].bias)
    with pytest.raises(AssertionError):
        assert_same_bits(model, x)


def kept_bytes(packed, model):
    """Bytes in what was saved, each storage once, less parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def add(part):
        if isinstance(part, saving._Saved):
            add(part.source if part.tensor is None else part.tensor)
        elif isinstance(part, saving._Source):
            for inner in part.parts:
                add(inner)
        elif part is not None and part.untyped_storage()._cdata not in own:
            storages[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()

    for saved in packed:
        add(saved)
    return sum(storages.values())


def test_what_is_saved_is_half(packed):
    """conv, norm with relu, and so on: of two tensors a layer one is left."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), BatchNorm2d(8, activation="relu"))]
    model, x = nn.Sequential(*layers, nn.Conv2d(8, 1, 1)), torch.randn(8, 8, 16, 16)
    with recompute_outputs():
        y = model(x)
    assert kept_bytes(packed, model) == pytest.approx(7 * x.nbytes, rel=0.01)  # x and six inputs of norms
    del y


def test_chains_are_short_and_every_output_is_computed_once(packed, monkeypatch):
    calls = []
    compute = saving._again
    monkeypatch.setattr(saving, "_again", lambda *args: calls.append(0) or compute(*args))
    model = nn.Sequential(*(Block(6, 6, "relu") for _ in range(9)), nn.Conv2d(6, 2, 1))
    norm, x = BatchNorm2d(6), torch.randn(2, 6, 5, 5)
    with recompute_outputs():
        y = model(norm(x.requires_grad_()))
    sources = {id(saved.source): saved.source for saved in packed if saved.source is not None}.values()
    assert {source.depth for source in sources} == set(range(saving.LONGEST_CHAIN + 1))
    assert not calls
    y.backward(torch.randn_like(y))
    assert len(calls) == len(sources)
    assert all(source.output is None for source in sources), "an output was not let go again"


def test_nothing_is_left_after_backward():
    model, x = NETWORKS["plain"]("relu"), torch.randn(4, 3, 6, 6)
    gc.collect()
    gc.disable()  # by reference counts alone: there are no cycles
    try:
        with recompute_outputs():
            inside = model[0](x)
            watched = StorageWeakRef(inside.untyped_storage())
            loss = model[1:](inside).square().sum()
        del inside
        assert not watched.expired()
        loss.backward()
        assert watched.expired()
        assert loss.grad_fn is not None
        with recompute_outputs():
            inside = model[0](x)
            watched = StorageWeakRef(inside.untyped_storage())
            loss = model[1:](inside).square().sum()
        del inside, loss  # no backward pass at all
        assert watched.expired()
    finally:
        gc.enable()


CONTEXTS = [contextlib.nullcontext, recompute_outputs]


def in_parts(context):
    model = NETWORKS["plain"]("relu")
    with context():
        x = model[0](torch.randn(4, 3, 6, 6))
        y = model[1](x)
        z = model[2](y)
    return model, x, y, z.sum()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_changed_output_raises(context):
    _, _, y, loss = in_parts(context)
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_changed_output_raises_also_if_it_is_gone(context):
    _, _, y, loss = in_parts(context)
    y.detach().mul_(2)
    del y
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_changed_input_raises(context):
    _, x, _, loss = in_parts(context)
    x.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("part", ["1.weight", "2.weight"])
def test_a_changed_parameter_raises(context, part):
    model, _, _, loss = in_parts(context)
    with torch.no_grad():
        model.get_parameter(part).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("hidden", [True, False])
def test_what_was_changed_before_it_was_saved_is_kept(hidden, backend):
    """An activation in place behind the norm; and a change that autograd does not see."""

    class Changed(nn.Module):
        def forward(self, y):
            if not hidden:
                return y.relu_()
            with torch.no_grad():
                y.mul_(2)
            return y

    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8), Changed(), nn.Conv2d(8, 2, 3))
    with steadynorm.backend(backend):
        assert_same_bits(model, torch.randn(4, 3, 6, 6))


def test_masks(packed):
    """Where there is a mask, by what the reference computes from the statistics once more."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.norm = (
                nn.Conv1d(3, 6, 1),
                nn.Conv1d(6, 2, 3),
                BatchNorm1d(6, activation="silu"),
            )

        def forward(self, x):
            return self.conv2(self.norm(self.conv1(x), lengths=torch.tensor([9, 4, 7])))

    model, x = Masked().double(), torch.randn(3, 3, 9, dtype=torch.float64)
    ours, plain = (gradients(model, x, None, context) for context in (recompute_outputs, contextlib.nullcontext))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert any(saved.source is not None for saved in packed)


@pytest.mark.parametrize("frozen", [True, False])
def test_running_statistics(frozen, packed):
    model = NETWORKS["plain"]("relu")
    model(torch.randn(4, 3, 6, 6))
    model = model if frozen else model.eval()
    if frozen:
        for layer in model:
            if hasattr(layer, "freeze_"):
                layer.freeze_(affine=False)
    assert_same_bits(model, torch.randn(4, 3, 6, 6))
    assert any(saved.source is not None for saved in packed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model = NETWORKS["residual"]("relu")

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            for block in self.model[:3]:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.model[3:](x)

    assert_same_bits(Checkpointed(), torch.randn(4, 3, 6, 6))


def test_inside_a_checkpoint():
    inner = NETWORKS["plain"]("relu")

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = inner

        def run(self, x):
            with recompute_outputs():
                return self.model(x)

        def forward(self, x):
            return checkpoint(self.run, x, use_reentrant=False)

    model, x = Inside(), torch.randn(4, 3, 6, 6)
    ours, plain = (gradients(m, x, None, contextlib.nullcontext) for m in (model, inner))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(packed):
    model, x = NETWORKS["plain"]("relu"), torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(model, x)
    let_go = [saved for saved in packed if saved.source is not None]
    assert {saved.source.geometry[0] for saved in let_go} == {(4, 8, 6, 6), (4, 6)}


@pytest.mark.parametrize("network", ["plain", "residual"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_backward_of_backward(network, activation):
    """A gradient penalty: the gradient of the norm of the gradient."""

    def penalty(context):
        torch.manual_seed(0)
        model = NETWORKS[network](activation).double()
        x = torch.randn(3, 3, 6, 6, dtype=torch.float64).requires_grad_()
        with context():
            y = model(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    for ours, plain in zip(penalty(recompute_outputs), penalty(contextlib.nullcontext), strict=True):
        if plain is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_gradgradcheck():
    model = nn.Sequential(
        nn.Linear(3, 4), BatchNorm1d(4, activation="silu", track_running_stats=False), nn.Linear(4, 2)
    )

    def run(x):
        with recompute_outputs():
            return model.double()(x)

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("network", ["plain", "residual"])
def test_more_than_one_backward(network):
    model, x = NETWORKS[network]("relu"), torch.randn(4, 3, 6, 6)
    with recompute_outputs():
        y = model(x)
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, list(model.parameters()), dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_of_two_branches():
    conv, norm = nn.Conv2d(3, 4, 1), BatchNorm2d(4, activation="relu")
    left, right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
    with recompute_outputs():
        y = norm(conv(torch.randn(3, 3, 4, 4)))
        a, b = left(y), right(y)
    torch.autograd.grad(a.sum(), left.weight, retain_graph=True)
    torch.autograd.grad(b.sum(), right.weight, retain_graph=True)
    (a + b).sum().backward()
    assert torch.equal(left.weight.grad, right.weight.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model():
    model, x = NETWORKS["plain"]("relu"), torch.randn(4, 3, 6, 6)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    for one in (model, compiled):
        with recompute_outputs():
            y = one(x)
        y.square().sum().backward()
    for ours, plain in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


def test_what_others_have_saved_is_left_to_them():
    """A norm outside, its next layer inside; and one whose backward pass is over."""
    norm, conv, x = BatchNorm2d(3), nn.Conv2d(3, 2, 1), torch.randn(4, 3, 5, 5, requires_grad=True)
    y = norm(x)
    with recompute_outputs():
        conv(y).sum().backward()
        z = norm(x)
        (2 * z).sum().backward()
        loss = conv(z).sum()
    assert torch.autograd.grad(loss, conv.weight)[0].isfinite().all()
    with torch.autograd.graph.save_on_cpu(), recompute_outputs():
        conv(norm(x)).sum().backward()


def test_under_no_grad_and_with_frozen_parameters():
    model, x = NETWORKS["plain"]("relu"), torch.randn(4, 3, 6, 6)
    with torch.no_grad(), recompute_outputs():
        assert not model(x).requires_grad
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    with recompute_outputs():
        y = model(x)
    y.sum().backward()
    assert model[2].weight.grad is not None
    assert model[0].weight.grad is None


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "saving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    assert all(p.grad is not None for p in names["model"].parameters())
