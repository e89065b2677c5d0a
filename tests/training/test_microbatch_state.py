"""What micro-batches share on one thread, and what ends them: torch's modes, random numbers, errors, strange paths."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from steadynorm.errors import DegenerateStatisticsError, InputError, NonFiniteStatisticsError
from steadynorm.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm1d,
    DomainBatchNorm1d,
    GhostBatchNorm1d,
    LazyBatchNorm1d,
)
from steadynorm.training.microbatch import KINDS, microbatch
from steadynorm.training.microbatch_state import exchange


class Modes(nn.Module):
    """Autocast begins before one norm and ends behind another; no_grad lies around a third, hooks around a fourth."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(5))
        self.norms = nn.ModuleList(BatchNorm1d(6, activation="silu") for _ in range(5))
        self.seen = set()

    def see(self, where):
        cpu = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        self.seen.add((where, torch.is_grad_enabled(), *cpu, len(exchange().hooks)))

    def forward(self, x):
        x = self.norms[0](self.layers[0](x))
        with torch.autocast("cpu", torch.bfloat16):
            x = self.norms[1](self.layers[1](x))
            self.see(0)
            with torch.no_grad():
                y = self.norms[2](self.layers[2](x))
                y = self.layers[3](y)  # cached without a graph
                self.see(1)
            with torch.autocast("cpu", enabled=False):
                x = x.float() + self.norms[3](self.layers[4](x.float()))
                self.see(2)
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda t: t, lambda t: t):
            x = self.norms[4](self.layers[3](x) + y)
            self.see(3)
        self.see(4)
        return x.float()


@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize("outer", [False, True])
def test_every_micro_batch_has_its_own_modes(outer, memory):
    model = Modes()
    whole, x, dy = copy.deepcopy(model), torch.randn(6, 6), torch.randn(6, 6)
    for forward in (whole, microbatch(model, 2, memory=memory)):
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            before = exchange()
            y = forward(x)
            assert exchange() == before
        y.backward(dy)
    # Where memory is saved there is one more pair of hooks; and what is computed again is in the same modes.
    own = 0 if memory == "keep" else 1
    assert model.seen == {(*seen[:-1], seen[-1] + own) for seen in whole.seen}
    assert len(whole.seen) == 5
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            # bfloat16 sums of other lengths.
            torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=0.05 * float(b.grad.abs().max()))
    for a, b in zip(model.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_exchange_puts_everything_back():
    with torch.autocast("cpu", torch.float16, cache_enabled=False), torch.no_grad():
        inside = exchange()
    outside = exchange()
    assert inside != outside
    assert exchange(inside) == outside
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (False, True)
    assert exchange(outside) == inside
    assert exchange() == outside
    assert torch.is_grad_enabled()


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(5, 40, bias=False), nn.Linear(40, 5)
        self.norm1, self.norm2 = BatchNorm1d(40), BatchNorm1d(40)
        self.dropout, self.masks = nn.Dropout(0.5), []

    def forward(self, x):
        x = self.dropout(self.norm1(self.before(x)))
        self.masks.append((x != 0).double() * 2)
        return self.after(self.dropout(self.norm2(x.sin())))


@pytest.mark.parametrize("memory", KINDS)
def test_dropout_has_numbers_of_its_own_and_the_same_ones_again(memory):
    """The gradient agrees with finite differences over the very same random numbers."""
    model = Dropped().double()
    exact, x = microbatch(model, 2, memory=memory), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    dy, dx = torch.randn(2, 6, 5, dtype=torch.float64)

    def call(x):
        torch.manual_seed(7)
        return (exact(x) * dy).sum()

    call(x).backward()
    masks = model.masks[:3]
    assert not torch.equal(masks[0], masks[1])
    step = 1e-6
    with torch.no_grad():
        slope = (call(x + step * dx) - call(x - step * dx)) / (2 * step)
    torch.testing.assert_close((x.grad * dx).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("memory", KINDS)
def test_random_numbers_behind_the_backward_pass_go_on_as_they_were(memory):
    torch.manual_seed(3)
    y = microbatch(Dropped(), 2, memory=memory)(torch.randn(6, 5))
    expected = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleDict({"a": BatchNorm1d(3), "b": BatchNorm1d(3)})
        self.first = BatchNorm1d(3)
        self.branch = None

    def forward(self, x):
        x = self.first(x)
        if x.shape[0] == 1:
            return x if self.branch is None else self.stages[self.branch](x)
        return self.stages["a"](x)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (None, "number 0 waits at BatchNorm1d at stages.a, number 2 has finished"),
        ("b", "number 0 waits at BatchNorm1d at stages.a, number 2 waits at BatchNorm1d at stages.b"),
    ],
)
def test_different_paths(branch, message):
    model = Branching()
    model.branch = branch
    assert_refused(model, microbatch(model, 2), torch.randn(5, 3), InputError, message)


def assert_refused(model, forward, x, error, message):
    """An error that says so, and a model that is bit for bit what it was."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], exchange()
    with pytest.raises(error, match=re.escape(message)):
        forward(x)
    for a, b in zip(before[0].values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, parameter in zip(before[1], model.parameters(), strict=True):
        assert torch.equal(a, parameter.grad)
    assert exchange() == before[2]


class Failing(nn.Module):
    """Fails in the second norm's neighbourhood, for one micro-batch, inside modes and a `finally`."""

    def __init__(self, when):
        super().__init__()
        self.norms = nn.ModuleList(BatchNorm1d(3) for _ in range(3))
        self.when, self.calls, self.cleaned = when, 0, 0

    def forward(self, x):
        self.calls += 1
        call = self.calls
        x = self.norms[0](x)
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                x = self.norms[1](x)
                if call == self.when:
                    raise KeyError("in the middle")
                x = self.norms[2](x)
        finally:
            self.cleaned += 1
        return x


@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize("when", [1, 2, 3])
def test_an_error_ends_all_and_leaves_the_model_alone(when, memory):
    model = Failing(when)
    assert_refused(model, microbatch(model, 2, memory=memory), torch.randn(5, 3), KeyError, "in the middle")
    assert model.cleaned == 3
    microbatch(model, 2, memory=memory)(torch.randn(5, 3))


def test_a_guard_that_raises():
    model = nn.Sequential(BatchNorm1d(3), BatchNorm1d(3, guard="raise"))
    x = torch.randn(5, 3)
    x[3, 1] = torch.inf
    assert_refused(model, microbatch(model, 2), x, NonFiniteStatisticsError, "BatchNorm1d at 1")


def test_a_guard_that_skips():
    model = BatchNorm1d(3)
    x = torch.randn(5, 3)
    x[3, 1] = torch.inf
    microbatch(model, 2)(x)
    assert model.num_batches_tracked == 0
    assert torch.equal(model.running_mean, torch.zeros(3))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around_a_norm_is_refused(use_reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    model = Model()
    x = torch.randn(5, 3, requires_grad=True)
    message = "BatchNorm1d at inner.1 is called inside torch.utils.checkpoint"
    assert_refused(model, microbatch(model, 2), x, InputError, message)


@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_beside_a_norm_is_exact(use_reentrant, memory):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 8, bias=False), nn.SiLU(), nn.Dropout(0.0), nn.Linear(8, 3))
            self.frozen, self.norm1, self.norm2 = BatchNorm1d(3).freeze_(), BatchNorm1d(3), BatchNorm1d(3)

        def forward(self, x):
            x = self.norm1(x)
            x = checkpoint(lambda x: self.frozen(self.inner(x)), x, use_reentrant=use_reentrant)
            return self.norm2(x)

    model = Model().double()
    whole, x = copy.deepcopy(model), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 3, dtype=torch.float64)
    for forward in (whole, microbatch(model, 2, memory=memory)):
        forward(x).backward(dy)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    for a, b in zip(model.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (GhostBatchNorm1d(3, ghost_size=2), "GhostBatchNorm1d at 0 is a GhostBatchNorm1d, whose statistics"),
        (BatchRenorm1d(3), "BatchRenorm1d at 0 is a BatchRenorm1d, whose statistics"),
        (LazyBatchNorm1d(), "without values: run the model once"),
    ],
    ids=str,
)
def test_relatives_that_cannot_be_put_together(layer, message):
    model = nn.Sequential(layer, BatchNorm1d(3))
    with pytest.raises(InputError, match=message):
        microbatch(model, 2)(torch.randn(5, 3))
    if not isinstance(layer, LazyBatchNorm1d):
        layer.freeze_()
        microbatch(model, 2)(torch.randn(5, 3))


def test_domains_cannot_be_put_together():
    model = DomainBatchNorm1d(3, num_domains=2)
    with pytest.raises(InputError, match="domains of a batch one by one"):
        microbatch(model, 2)(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    one = DomainBatchNorm1d(3, num_domains=1).double()
    whole, x = copy.deepcopy(one), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(microbatch(one, 2)(x, torch.zeros(5, dtype=torch.long)), whole(x, torch.zeros(5).long()))


def test_modes_that_are_not_exchanged_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3)

        def forward(self, x):
            with torch.inference_mode():
                return self.norm(x)

    model = Model()
    assert_refused(model, microbatch(model, 2), torch.randn(5, 3), InputError, "inference mode")
    with torch.inference_mode():
        assert microbatch(BatchNorm1d(3), 2)(torch.randn(5, 3)).shape == (5, 3)


def test_a_backward_pass_inside_the_forward_pass():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3)

        def forward(self, x):
            x = x * 2
            x.register_hook(lambda dx: self.norm(dx))
            (dx,) = torch.autograd.grad(x.sum(), x, retain_graph=True)
            return dx + self.norm(x)

    model = Model()
    x = torch.randn(5, 3, requires_grad=True)
    assert_refused(model, microbatch(model, 2), x, InputError, "BatchNorm1d at norm is called inside a backward pass")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_under_a_compiler():
    """A compiled model runs as it is written."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), BatchNorm1d(4), nn.SiLU(), BatchNorm1d(4)).double()
    whole, x = copy.deepcopy(model), torch.randn(6, 3, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    dy = torch.randn(6, 4, dtype=torch.float64)
    compiled(x)
    whole(x)
    for forward in (whole, microbatch(compiled, 2)):
        forward(x).backward(dy)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    for a, b in zip(model.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), BatchNorm1d(4), nn.Linear(4, 4)
        self.norms = nn.ModuleList(BatchNorm1d(4) for _ in range(6))

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x.sin() if random.random() < 0.5 else x.cos().exp()
        for norm in self.norms:
            x = norm(self.last(x))
        return x


def test_a_forward_pass_that_cannot_be_repeated():
    """Python's random numbers are not remembered."""

    def until_it_differs():
        for _ in range(20):
            microbatch(Random(), 3, memory="recompute")(torch.randn(6, 3)).sum().backward()

    with pytest.raises(RuntimeError, match="took another way when it was computed again"):
        until_it_differs()


def test_a_change_in_place_is_seen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), BatchNorm1d(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        microbatch(model, 3, memory="recompute").loss(
            lambda x: model[2](model[1](model[0](x)).mul_(2)).sum(), torch.randn(6, 3)
        ).backward()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "at least 1 sample, got 0"),
        (-1, "at least 1 sample, got -1"),
        (True, "at least 1 sample"),
        (2.0, "at least 1 sample"),
        ([], "at least 1 sample"),
        ([3, 0, 2], "at least 1 sample"),
        (6, "micro-batches of 6 for a batch of 5: give at most 5"),
        ([2, 2], "sizes [2, 2] for a batch of 5"),
    ],
)
def test_sizes_that_cannot_be_used(size, message):
    model = BatchNorm1d(3)
    with pytest.raises(InputError, match=re.escape(message)):
        microbatch(model, size)(torch.randn(5, 3))
    assert model.num_batches_tracked == 0


def test_models_and_options_that_cannot_be_used():
    with pytest.raises(InputError, match="no batch norm in Linear"):
        microbatch(nn.Linear(3, 3), 2)
    with pytest.raises(InputError, match="memory must be one of 'keep'"):
        microbatch(BatchNorm1d(3), 2, memory="disk")
    with pytest.raises(InputError, match="reduction must be"):
        microbatch(BatchNorm1d(3), 2).loss(lambda x: x.sum(), torch.randn(5, 3), reduction="none")


def test_layers_of_torch_are_named():
    model = nn.Sequential(nn.BatchNorm1d(3), BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.warns(UserWarning, match=r"0, 2\.0 of torch\.nn .* convert the model first"):
        microbatch(model, 2)(torch.randn(4, 3))
    model.eval()
    microbatch(model, 2)(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (("text",), "got none"),
        ((torch.randn(5, 3), torch.randn(4)), "got (5, 3), (4,)"),
        (({"a": torch.randn(5, 3)}, [torch.randn(5), torch.randn(6, 2)]), "(5, 3), (5,), (6, 2)"),
        ((torch.tensor(1.0),), "share their first size"),
    ],
)
def test_batches_that_cannot_be_cut(batch, message):
    model = BatchNorm1d(3)
    with pytest.raises(InputError, match=re.escape(message)):
        microbatch(model, 2)(*batch)
    assert model.num_batches_tracked == 0


def test_outputs_that_cannot_be_joined():
    model, x = BatchNorm1d(3), torch.randn(5, 3)
    exact = microbatch(model, 2)
    for function in (lambda x: model(x).sum(), lambda x: model(x).T, lambda x: model(x)[:1]):
        with pytest.raises(InputError, match="cannot join outputs"):
            MicroBatchesOf(exact, function)(x)
    with pytest.raises(InputError, match="different structure"):
        MicroBatchesOf(exact, lambda x: [model(x)] * len(x))(x)
    with pytest.raises(InputError, match="to be one number"):
        exact.loss(model, x)


def MicroBatchesOf(exact, function):  # noqa: N802
    """The same with another function in place of the model."""
    other = copy.copy(exact)
    other.model = copy.copy(exact.model)
    other.model.forward = function
    return other


def test_one_inside_the_other():
    model = BatchNorm1d(3)
    with pytest.raises(InputError, match="inside the forward pass of another one"):
        microbatch(model, 2).map(microbatch(model, 1), torch.randn(4, 3))


def test_one_value_in_all():
    model = BatchNorm2d(3)
    with pytest.raises(DegenerateStatisticsError, match="one value per channel"):
        microbatch(model, 1)(torch.randn(1, 3, 1, 1))
