"""A step that is not taken leaves no trace in the running statistics: bit for bit, and without asking the device."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from steadynorm import layers
from steadynorm.errors import InputError
from steadynorm.training.transaction import transaction

STEPS, BAD = 10, 4
NORMS = {
    "torch BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "torch cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "BatchNorm1d": lambda: layers.BatchNorm1d(6),
    "debias": lambda: layers.BatchNorm1d(6, debias=True),
    "SyncBatchNorm": lambda: layers.SyncBatchNorm(6),
    "GhostBatchNorm1d": lambda: layers.GhostBatchNorm1d(6, ghost_size=4),
    "BatchRenorm1d": lambda: layers.BatchRenorm1d(6, limits=(2.0, 3.0)),
    "StepBatchNorm1d": lambda: layers.StepBatchNorm1d(6, steps=3),
    "DomainBatchNorm1d": lambda: layers.DomainBatchNorm1d(6, num_domains=2),
    "InstanceNorm1d": lambda: layers.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "torch InstanceNorm1d": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
}


class Network(nn.Module):
    """A linear layer, a normalization of any kind, a plain one in float64 beside it, and a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.norm = norm
        self.other = nn.BatchNorm1d(6, dtype=torch.float64)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, number: int = 0) -> Tensor:
        x = self.stem(x)
        if isinstance(self.norm, layers.DomainBatchNorm1d):
            x = self.norm(x, torch.arange(len(x)) % 2)
        elif isinstance(self.norm, layers.StepBatchNorm1d):
            x = self.norm(x, number)
        elif "Instance" in type(self.norm).__name__:
            x = self.norm(x.view(4, -1, 6).mT).mT.reshape(x.shape)
        else:
            x = self.norm(x)
        return self.head(self.other(x.double()).to(x.dtype))


def data(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    # The bad batch is far from the others: what it leaves in the statistics cannot be overlooked.
    x = torch.randn(16, 3, generator=generator) * (20 if number == BAD else 1) + (100 if number == BAD else 0)
    return x, torch.randn(16, 2, generator=generator)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in model.state_dict().items()}


def buffers(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.named_buffers()}


def train(model: nn.Module, numbers, *, is_guarded: bool, update_inside: bool = True, bad: int | None = BAD) -> None:
    """A plain AMP loop; the gradients of step `bad` are not finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    steps = transaction(model, scaler)
    for number in numbers:
        x, target = data(number)

        def step(x=x, target=target, number=number):
            loss = (model(x, number) - target).square().mean()
            scaler.scale(loss * torch.inf if number == bad else loss).backward()
            scaler.step(optimizer)
            if update_inside:
                scaler.update()

        if is_guarded:
            with steps:
                step()
        else:
            step()
        if not update_inside:
            scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("update_inside", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_an_overflow_in_one_of_ten_steps_leaves_the_bits_of_a_run_without_it(name, update_inside):
    """A skipped step still moves the statistics in torch, and there is no way to take it back.

    https://github.com/pytorch/pytorch/issues/90342, https://github.com/pytorch/pytorch/issues/88474
    """
    model = Network(NORMS[name]())
    without, unguarded = copy.deepcopy(model), copy.deepcopy(model)
    train(model, range(STEPS), is_guarded=True, update_inside=update_inside)
    train(without, [n for n in range(STEPS) if n != BAD], is_guarded=False)
    assert bits(model) == bits(without)
    train(unguarded, range(STEPS), is_guarded=False)
    assert buffers(unguarded) != buffers(without), "this run must show what the transaction is for"


def test_an_overflow_of_the_very_first_step_is_seen():
    """The scaler has no tensor yet when the block begins."""
    model = Network(nn.BatchNorm1d(6))
    before = buffers(model)
    train(model, [BAD], is_guarded=True)
    assert buffers(model) == before


def test_accepted_steps_change_nothing_and_a_growing_scale_is_no_overflow():
    model = Network(layers.BatchNorm1d(6))
    plain = copy.deepcopy(model)
    numbers = [n for n in range(STEPS) if n != BAD]
    train(model, numbers, is_guarded=True)
    train(plain, numbers, is_guarded=False)
    assert bits(model) == bits(plain)


def test_a_scaler_that_is_off_rejects_nothing():
    model = Network(layers.BatchNorm1d(6))
    with transaction(model, GradScaler("cpu", enabled=False)):
        model(data(0)[0])
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("name", NORMS)
def test_a_batch_that_the_user_rejects_leaves_no_trace(name):
    model = Network(NORMS[name]())
    model(data(0)[0])
    before = buffers(model)
    for number in range(1, 4):
        with transaction(model) as t:
            model(data(BAD)[0], number)
            t.reject()
    assert buffers(model) == before
    for _ in range(1):
        with transaction(model) as t:
            model(data(BAD)[0])
            t.reject()
            continue  # leaving the block early is leaving it
    assert buffers(model) == before


@pytest.mark.parametrize("loss", [1.0, float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_can_be_rejected_on_the_device(loss):
    """https://github.com/pytorch/pytorch/issues/96798"""
    model = Network(layers.BatchNorm1d(6))
    before = buffers(model)
    with transaction(model) as t:
        model(data(0)[0])
        moved = buffers(model)
        t.reject(~torch.tensor([1.0, loss]).isfinite())
        t.reject(False)
        t.reject(torch.tensor(False))
    assert buffers(model) == (moved if loss == 1.0 else before)


def test_statistics_that_are_not_finite_go_back_too():
    model = Network(nn.BatchNorm1d(6))
    before = buffers(model)
    with transaction(model) as t:
        loss = model(torch.full((16, 3), torch.nan)).mean()
        t.reject(~loss.isfinite())
    assert buffers(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_takes_the_statistics_back_and_passes(error):
    model = Network(layers.BatchNorm1d(6))
    before = buffers(model)
    steps = transaction(model)

    def step():
        with steps:
            model(data(0)[0])
            raise error

    with pytest.raises(error):
        step()
    assert buffers(model) == before
    with steps:
        model(data(0)[0])
    assert buffers(model) != before


def test_several_batches_in_one_transaction_go_back_together():
    """Gradient accumulation: one step, many forward passes."""
    model = Network(layers.BatchNorm1d(6))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        with transaction(model, scaler):
            for number in range(4):
                x, target = data(number)
                loss = (model(x) - target).square().mean() / 4
                scaler.scale(loss * torch.inf if (step, number) == (1, 2) else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        for number in range(4):
            x, target = data(number)
            ((plain(x) - target).square().mean() / 4).backward()
        other.step()
        other.zero_grad()
    assert buffers(model) == buffers(plain)
    assert int(model.norm.num_batches_tracked) == 8


def test_blocks_in_blocks():
    model = Network(layers.BatchNorm1d(6))
    before = buffers(model)
    with transaction(model) as outer:
        model(data(0)[0])
        kept = buffers(model)
        with transaction(model) as inner:
            model(data(1)[0])
            inner.reject()
        assert buffers(model) == kept
        outer.reject()
    assert buffers(model) == before


def test_a_backward_pass_after_the_block_still_finds_its_statistics():
    """Frozen layers keep their running statistics for the backward pass; they are written, and have not changed."""
    model = Network(nn.BatchNorm1d(6).eval())
    with transaction(model) as t:
        loss = model(data(0)[0]).square().mean()
        t.reject(torch.tensor(False))
    loss.backward()
    assert bool(model.stem.weight.grad.isfinite().all())


class Watch(TorchDispatchMode):
    """Fails where a value is brought to the host, which on a GPU is a wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_skipped", [False, True])
def test_the_block_asks_the_device_nothing(is_skipped):
    model = Network(layers.BatchNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu")
    steps = transaction(model, scaler)
    with Watch():
        t = steps.__enter__()
    loss = model(data(0)[0]).square().mean()
    scaler.scale(loss * torch.inf if is_skipped else loss).backward()
    scaler.step(optimizer)  # this one does ask, unless the optimizer is fused
    scaler.update()
    with Watch():
        t.reject(~loss.isfinite())
        steps.__exit__(None, None, None)
    assert int(model.norm.num_batches_tracked) == (not is_skipped)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        bool(loss > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("is_skipped", [False, True])
def test_the_block_does_not_wait_for_a_gpu(is_skipped):
    model = Network(layers.BatchNorm1d(6)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cuda")
    steps = transaction(model, scaler)
    x = data(0)[0].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        t = steps.__enter__()
        loss = model(x).square().mean()
        scaled = scaler.scale(loss * torch.inf if is_skipped else loss)
        t.reject(~loss.isfinite())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scaled.backward()
    scaler.step(optimizer)
    scaler.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.__exit__(None, None, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(model.norm.num_batches_tracked) == (not is_skipped)


def test_a_second_pass_of_the_same_batch_can_be_taken_back_alone():
    """SAM goes through every batch twice; the second pass, with other weights, is not for the statistics.

    https://github.com/davda54/sam/issues/17, https://github.com/pytorch/pytorch/issues/44415
    """
    model = Network(layers.BatchNorm1d(6))
    with transaction(model) as step:
        y = model(data(0)[0])
        once = buffers(model)
        with transaction(model) as second:
            again = model(data(0)[0])
            second.reject()
        step.reject(~again.isfinite())
    assert buffers(model) == once
    assert torch.equal(again, y), "it is normalised by its batch, as the first was"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_around_a_compiled_model():
    torch._dynamo.reset()
    model = Network(layers.BatchNorm1d(6))
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, range(STEPS), is_guarded=True)
    train(plain, [n for n in range(STEPS) if n != BAD], is_guarded=False)
    torch._dynamo.reset()
    for (name, value), (_, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert int(model.norm.num_batches_tracked) == STEPS - 1


def test_with_activation_checkpointing():
    model = Network(layers.BatchNorm1d(6))
    before = buffers(model)
    with transaction(model) as t:
        x = data(0)[0].requires_grad_()
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        t.reject()
    assert buffers(model) == before


def test_shared_layers_and_frozen_ones():
    shared = layers.BatchNorm1d(3)
    model = nn.Sequential(shared, shared, layers.BatchNorm1d(3).freeze_(), layers.FrozenBatchNorm1d(3))
    before = buffers(model)
    with transaction(model) as t:
        model(data(0)[0])
        t.reject(torch.tensor(True))
    assert buffers(model) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transaction(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))), "without running statistics"),
        (lambda: transaction(nn.Sequential(layers.LazyBatchNorm1d())), "0, a LazyBatchNorm1d, .*run one batch"),
        (lambda: transaction(nn.BatchNorm1d(2), scaler=torch.optim.SGD), "expected a torch.amp.GradScaler"),
        (lambda: transaction(nn.BatchNorm1d(2)).reject(), "inside of a transaction"),
    ],
)
def test_what_cannot_be_guarded_is_said(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_one_transaction_is_not_opened_twice():
    model = nn.BatchNorm1d(3)
    steps = transaction(model)
    before = buffers(model)

    def step(inner):
        with steps:
            model(data(0)[0])
            inner()

    with pytest.raises(InputError, match="open already"):
        step(steps.__enter__)
    assert buffers(model) == before


def test_the_model_is_as_it_was_for_copies_and_pickles():
    model = Network(layers.BatchNorm1d(6))
    with transaction(model):
        copy.deepcopy(model)
        pickle.dumps(model)
    assert "transaction" not in repr(vars(model.norm))
