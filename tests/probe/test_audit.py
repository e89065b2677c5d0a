import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steadynorm import probe
from steadynorm.probe.audit import audit
from steadynorm.probe.trace import ForwardRaised, NotPossible
from steadynorm.recipe import call
from tests.doctor import networks
from tests.test_models import bits

X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 10


def snapshot(model):
    """Everything of a model that a step may change."""
    return (
        {name: bits(value).tolist() for name, value in model.state_dict().items()},
        {name: None if p.grad is None else bits(p.grad).tolist() for name, p in model.named_parameters()},
        [(module.training, len(module._forward_hooks)) for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


def flat(state):
    """A state of an optimizer as plain values."""
    return {
        key: flat(value) if isinstance(value, dict) else value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def watched(model, **options):
    return audit(model.train(), (X, Y), call, loss=options.pop("loss", loss), **options)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        net = networks.convolutional(nn.BatchNorm2d)
        self.stem, self.body, self.head, self.reentrant = net[0], net[1:5], net[5:], reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant))


def counters(model):
    return [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_step_updates_every_norm_once_in_the_forward():
    model = networks.convolutional(nn.BatchNorm2d)
    found = watched(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert {path: step.updates for path, step in found.norms.items()} == {"1": {"forward": 1}, "4": {"forward": 1}}
    assert (found.forwards, found.backwards, found.optimizer_steps) == (1, 1, 1)
    assert found.optimized == {name for name, _ in model.named_parameters()}
    assert found.helpers == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_seen_in_the_backward_pass_and_agrees_with_the_counters(reentrant):
    model = Checkpointed(reentrant)
    found = watched(model)
    twice = {"forward": 1, "backward": 1}
    assert {path: step.updates for path, step in found.norms.items()} == {"body.1": twice, "body.4": twice}
    assert counters(model) == [2, 2]


def test_each_phase_is_told_from_the_others():
    """A loss that calls the model and a part of it, and an optimizer with a closure."""
    model = networks.convolutional(nn.BatchNorm2d)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3, line_search_fn=None)

    def step(model, batch):
        def closure():
            optimizer.zero_grad()
            value = loss(model(batch[0]), batch)
            value.backward()
            return value

        loss(model(batch[0]), batch).backward()
        with torch.no_grad():
            model[:2](batch[0])
        optimizer.step(closure)

    found = watched(model, step=step)
    assert found.norms["1"].updates == {"forward": 1, "outside": 1, "optimizer": counters(model)[0] - 2}
    assert found.norms["4"].updates == {"forward": 1, "optimizer": counters(model)[1] - 1}
    assert found.is_users


@pytest.mark.parametrize("kind", ["closure", "wrapper", "no gradients"])
def test_a_helping_network_is_seen_and_put_back(kind):
    model = networks.convolutional(nn.BatchNorm2d)
    teacher = networks.convolutional(nn.BatchNorm2d, width=8)
    if kind != "no gradients":
        teacher.requires_grad_(False)
    before = snapshot(teacher)

    def distil(output, batch):
        called = teacher if kind != "wrapper" else nn.Sequential(nn.Identity(), teacher)
        with torch.set_grad_enabled(kind != "no gradients"):
            target = called(batch[0])
        return (output - target).square().mean()

    found = watched(model, loss=distil)
    assert len(found.helpers) == 2
    assert all(step.without_gradients and step.trained for step in found.helpers.values())
    assert [step.updates for step in found.helpers.values()] == [{"outside": 1}] * 2
    assert snapshot(teacher)[:3] == before[:3]


def test_a_rival_that_is_trained_is_no_helper():
    model, critic = networks.convolutional(nn.BatchNorm2d), networks.convolutional(nn.BatchNorm2d)
    found = watched(model, loss=lambda output, batch: (output - critic(batch[0])).square().mean())
    assert not any(step.without_gradients for step in found.helpers.values())


def test_a_moving_average_is_told_from_another_network():
    model = networks.convolutional(nn.BatchNorm2d)
    follower, other = (copy.deepcopy(model), networks.convolutional(nn.BatchNorm2d, width=8))
    for network in (follower, other):
        network.requires_grad_(False)
    found = watched(model, loss=lambda output, batch: (output - follower(batch[0]) - other(batch[0])).square().mean())
    assert {found.helpers[path].class_name for path in found.copies} == {"BatchNorm2d"}
    assert len(found.copies) == 2
    assert len(found.helpers) >= 2


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_is_put_back_bit_for_bit(make):
    model = networks.convolutional(nn.BatchNorm2d)
    optimizer = make(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(X), (X, Y)).backward()
        optimizer.step()
    state, before = copy.deepcopy(optimizer.state_dict()), snapshot(model)
    own = [id(s) for s in optimizer.state.values()]
    probe.observe(model, [(X, Y)], forward=call, loss=loss, optimizer=optimizer)
    assert flat(optimizer.state_dict()) == flat(state)
    assert snapshot(model) == before
    assert [id(s) for s in optimizer.state.values()] == own


def test_a_new_optimizer_holds_nothing_afterwards():
    model = networks.convolutional(nn.BatchNorm2d)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    probe.observe(model, [(X, Y)], forward=call, loss=loss, optimizer=optimizer)
    assert optimizer.state_dict()["state"] == {}


def test_the_model_is_put_back_after_a_step_of_the_users_and_after_one_that_raises():
    model = networks.convolutional(nn.BatchNorm2d)

    def step(model, batch):
        loss(model(batch[0]), batch).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model.eval()
        if len(calls) == 1:
            raise RuntimeError("enough")
        calls.append(1)

    calls = []
    for expected in ("", "the given training step raised RuntimeError: enough"):
        before = snapshot(model)
        facts = probe.observe(model, [(X, Y)], forward=call, step=step)
        assert snapshot(model) == before
        assert facts.skipped.get("audit", "").startswith(expected)
    assert facts.audit is None


def test_what_raises_is_told_apart():
    model = networks.convolutional(nn.BatchNorm2d)
    with pytest.raises(NotPossible, match="the loss raised ZeroDivisionError"):
        watched(model, loss=lambda output, batch: 1 / 0)
    with pytest.raises(NotPossible, match="the backward pass raised RuntimeError"):
        watched(model, loss=lambda output, batch: output)
    with pytest.raises(ForwardRaised):
        watched(nn.Linear(3, 3))


def test_hooks_are_gone_afterwards():
    from torch.nn.modules import module
    from torch.optim import optimizer

    watched(networks.convolutional(nn.BatchNorm2d))
    assert not module._global_forward_hooks
    assert not module._global_forward_pre_hooks
    assert not optimizer._global_optimizer_pre_hooks
    assert not optimizer._global_optimizer_post_hooks


@pytest.mark.parametrize("fewest", [0, 9])
def test_half_a_batch_is_enough_and_what_stops_on_it_is_given_the_whole(fewest):
    sizes = []

    def sized(output, batch):
        sizes.append(len(output))
        assert len(output) > fewest, "this loss knows its batch size"
        return loss(output, batch)

    model = networks.convolutional(nn.BatchNorm2d)
    before = snapshot(model)
    facts = probe.observe(model, [(X, Y)], forward=call, loss=sized, parts={"audit"})
    assert "audit" not in facts.skipped
    assert facts.audit.forwards == facts.audit.backwards == 1
    assert sizes[-2:] == ([8, 16] if fewest else [16, 8])
    assert snapshot(model) == before
