"""Micro-batches in lock-step: output, statistics and every gradient are those of the one batch they are.

https://github.com/pytorch/pytorch/issues/46516, https://github.com/keras-team/keras/issues/16633,
https://github.com/ultralytics/yolov5/issues/1630
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import steadynorm
from benchmarks.models import UNet, our_norm, resnet18
from steadynorm.errors import InputError
from steadynorm.layers import BatchNorm1d, BatchNorm2d, StepBatchNorm1d
from steadynorm.training import microbatch
from steadynorm.training.microbatch import KINDS

DTYPE = torch.float64


def torch_norm(channels, activation="relu"):
    """What the oracle is made of: torch's layer, which shares no code with ours."""
    return TorchNorm(channels, activation)


class TorchNorm(nn.BatchNorm2d):
    def __init__(self, channels, activation):
        super().__init__(channels)
        self.activation = activation

    def forward(self, x, residual=None):
        y = super().forward(x)
        y = y if residual is None else y + residual
        return y.relu() if self.activation else y


NETWORKS = {
    "resnet18": (lambda norm: resnet18(norm, width=4), (3, 32, 32)),
    "unet": (lambda norm: UNet(norm, width=4), (1, 32, 32)),
}


def made(name, norm, dtype=DTYPE):
    torch.manual_seed(0)
    model = NETWORKS[name][0](norm).to(dtype)
    for module in model.modules():
        # An oracle that starts from weight 1 and bias 0 would not see them.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def batch_of(name, count=8, dtype=DTYPE):
    return torch.randn(count, *NETWORKS[name][1], dtype=dtype) * 2 + 1


def results(model, forward, x, dy):
    """Output, gradients of the input and of every parameter under a cotangent, and all buffers."""
    x = x.clone().requires_grad_()
    y = forward(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def worst(found, expected):
    """The largest difference, in the size of what is compared."""
    assert len(found) == len(expected)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(found.values(), expected.values(), strict=True)
    )


def compared(model, oracle, forward, x, dy=None):
    dy = torch.randn(oracle(x).shape, dtype=x.dtype) if dy is None else dy
    oracle.load_state_dict(model.state_dict())
    return worst(results(model, forward, x, dy), results(oracle, oracle, x, dy))


@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize("size", [2, 3, [1, 2, 5], 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_whole_batch_in_torch(name, size, memory):
    model, oracle = made(name, our_norm), made(name, torch_norm)
    assert compared(model, oracle, microbatch(model, size, memory=memory), batch_of(name)) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_accumulation_is_caught(name):
    """The saboteur: the same comparison, every micro-batch normalised alone."""
    model, oracle = made(name, our_norm), made(name, torch_norm)

    def accumulated(x):
        return torch.cat([model(part) for part in x.split(2)])

    assert compared(model, oracle, accumulated, batch_of(name)) > 1


@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_in_single_precision(name, memory):
    """As close to the truth as the whole batch in single precision is, give or take a rounding."""
    model, truth = made(name, our_norm, torch.float32), made(name, torch_norm)
    x = batch_of(name, dtype=torch.float32)
    truth.load_state_dict(model.state_dict())
    dy = torch.randn(truth(x.double()).shape)
    truth.load_state_dict(model.state_dict())
    whole = copy.deepcopy(model)
    expected = results(truth, truth, x.double(), dy.double())
    error = worst(results(model, microbatch(model, 3, memory=memory), x, dy), expected)
    assert error < 3 * worst(results(whole, whole, x, dy), expected)


def test_the_loss_of_uneven_micro_batches_is_the_mean_of_the_batch():
    model, oracle = made("resnet18", our_norm), made("resnet18", torch_norm)
    oracle.load_state_dict(model.state_dict())
    x, labels = batch_of("resnet18"), torch.randint(1000, (8,))
    found = microbatch(model, 3).loss(lambda x, t: nn.functional.cross_entropy(model(x), t), x, labels)
    expected = nn.functional.cross_entropy(oracle(x), labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_the_loss_that_is_a_sum():
    model = made("resnet18", our_norm)
    whole = copy.deepcopy(model)
    x, labels = batch_of("resnet18"), torch.randint(1000, (8,))

    def loss(x, labels, model=model):
        return nn.functional.cross_entropy(model(x), labels, reduction="sum")

    found = microbatch(model, [5, 3]).loss(loss, x, labels=labels, reduction="sum")
    torch.testing.assert_close(found, loss(x, labels, whole), rtol=1e-12, atol=0)


def test_statistics_move_once_and_are_counted_once():
    model = made("unet", our_norm)
    microbatch(model, 2)(batch_of("unet"))
    assert all(m.num_batches_tracked == 1 for m in model.modules() if isinstance(m, BatchNorm2d))


class Shared(nn.Module):
    """One norm, called three times, once on another size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3, bias=False)
        self.norm = BatchNorm2d(6, activation="silu")

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.norm(self.second(x) + self.norm(x)[..., 1:-1, 1:-1])


class Padded(nn.Module):
    """Masks and lengths, in layers of their own and with a residual."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 6, 1, bias=False)
        self.norm1, self.norm2 = BatchNorm1d(6, activation="relu"), BatchNorm1d(6, activation="relu")

    def forward(self, x, lengths):
        mask = torch.arange(x.shape[-1]) < lengths[:, None]
        y = self.norm1(self.first(x), mask=mask)
        return self.norm2(self.second(y), residual=y, lengths=lengths)


@pytest.mark.parametrize("memory", KINDS)
def test_shared_layers(memory):
    model = Shared().to(DTYPE)
    whole, x = copy.deepcopy(model), torch.randn(7, 3, 9, 9, dtype=DTYPE)
    assert compared(model, whole, microbatch(model, 2, memory=memory), x) < 1e-12
    assert model.norm.num_batches_tracked == 3


@pytest.mark.parametrize("memory", KINDS)
def test_masks_and_residuals(memory):
    model = Padded().to(DTYPE)
    x, lengths = torch.randn(6, 3, 8, dtype=DTYPE), torch.tensor([8, 1, 0, 5, 8, 2])
    whole = copy.deepcopy(model)
    exact = microbatch(model, [1, 2, 3], memory=memory)
    dy = torch.randn(6, 6, 8, dtype=DTYPE)
    found = results(model, lambda x: exact(x, lengths=lengths), x, dy)
    expected = results(whole, lambda x: whole(x, lengths), x, dy)
    # In front of a norm a bias has no gradient but the roundings.
    assert found.pop("dfirst.bias").abs().max() < 1e-12
    expected.pop("dfirst.bias")
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("memory", KINDS)
def test_one_sample_behind_a_pooling(memory):
    """One value per channel in every micro-batch is no fault: the batch has more."""
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), BatchNorm2d(5, activation="relu"), nn.AdaptiveAvgPool2d(1), BatchNorm2d(5)
    ).to(DTYPE)
    whole, x = copy.deepcopy(model), torch.randn(5, 3, 6, 6, dtype=DTYPE)
    assert compared(model, whole, microbatch(model, 1, memory=memory), x) < 1e-11
    assert model[3].num_batches_tracked == 1


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.Linear(4, 4, bias=False), StepBatchNorm1d(4, steps=2)

    def forward(self, x):
        for step in range(3):
            x = x + self.norm(self.cell(x), step).tanh()
        return x


def test_step_batch_norm_and_update_running():
    model = Recurrent().to(DTYPE)
    assert compared(model, copy.deepcopy(model), microbatch(model, 3), torch.randn(7, 4, dtype=DTYPE)) < 1e-12
    norm = BatchNorm1d(4).to(DTYPE)
    norm.normalize_by, norm.update_running = "running", True
    assert compared(norm, copy.deepcopy(norm), microbatch(norm, 3), torch.randn(7, 4, dtype=DTYPE)) < 1e-12
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("memory", KINDS)
def test_frozen_layers_and_evaluation_do_not_wait(memory):
    model = made("resnet18", our_norm)
    for module in list(model.modules())[:20]:
        if isinstance(module, BatchNorm2d):
            module.freeze_()
    x = batch_of("resnet18")
    whole = copy.deepcopy(model)
    dy = torch.randn(8, 1000, dtype=DTYPE)
    expected, found = (
        [y, *(p.grad for p in m.parameters() if p.grad is not None), *m.buffers()]
        for m, forward in ((whole, whole), (model, microbatch(model, 3, memory=memory)))
        for y in [forward(x)]
        for _ in [y.backward(dy)]
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(microbatch(model, 3)(x), model(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("memory", KINDS)
def test_second_order(memory):
    """A gradient penalty over the whole batch."""
    model = nn.Sequential(nn.Linear(3, 5), BatchNorm1d(5, activation="silu"), nn.Linear(5, 2), BatchNorm1d(2)).to(DTYPE)
    x, dy = torch.randn(6, 3, dtype=DTYPE), torch.randn(6, 2, dtype=DTYPE)
    found = []
    for forward in (microbatch(model, 2, memory=memory), model):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(forward(leaf), leaf, dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [leaf, model[0].weight, model[1].weight]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory", KINDS)
def test_without_gradients_and_twice_backward(memory):
    model = made("unet", our_norm)
    x, dy = batch_of("unet", 4), torch.randn(4, 2, 32, 32, dtype=DTYPE)
    exact = microbatch(model, 2, memory=memory)
    with torch.no_grad():
        y = exact(x)
    assert not y.requires_grad
    y = exact(x)
    parameters = list(model.parameters())
    first = torch.autograd.grad(y, parameters, dy, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, parameters, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_batches_of_any_structure():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3)

        def forward(self, batch, scale, *, mode):
            assert mode == "sum"
            y = self.norm(batch["x"] + batch["more"][0] * scale)
            return {"scores": y, "all": (y.square(), [y.mean(1)]), "mode": mode}

    model = Model()
    whole = copy.deepcopy(model)
    batch = {"x": torch.randn(5, 3), "more": [torch.randn(5, 3)]}
    found = microbatch(model, 2)(batch, torch.tensor(2.0), mode="sum")
    expected = whole(batch, torch.tensor(2.0), mode="sum")
    assert found.pop("mode") == expected.pop("mode")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_map_gives_what_there_is_for_each():
    model = BatchNorm1d(3)
    found = microbatch(model, 2).map(lambda x: (model(x).shape, "text"), torch.randn(5, 3))
    assert found == [((2, 3), "text"), ((2, 3), "text"), ((1, 3), "text")]


def test_the_package_shows_it():
    assert steadynorm.training.microbatch is microbatch
    with pytest.raises(InputError):
        microbatch(nn.Linear(2, 2), 1)


@pytest.mark.parametrize("memory", KINDS)
def test_training_goes_the_same_way(memory):
    """Ten steps, and the parameters are still those of training on whole batches."""
    model, oracle = made("resnet18", our_norm), made("resnet18", torch_norm)
    oracle.load_state_dict(model.state_dict())
    exact = microbatch(model, 2, memory=memory)
    for step in range(10):
        torch.manual_seed(step)
        x, labels = batch_of("resnet18", 6), torch.randint(1000, (6,))
        for network, forward in ((model, exact), (oracle, oracle)):
            network.zero_grad()
            nn.functional.cross_entropy(forward(x), labels).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.01 * parameter.grad
    assert worst(model.state_dict(), {n: oracle.state_dict()[n] for n in model.state_dict()}) < 1e-8


@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize(
    "context",
    [steadynorm.recompute_outputs, torch.autograd.graph.save_on_cpu],
    ids=["recompute_outputs", "save_on_cpu"],
)
def test_inside_hooks_of_others(context, memory):
    model, oracle = made("unet", our_norm), made("unet", torch_norm)
    exact = microbatch(model, 2, memory=memory)

    def inside(x):
        with context():
            return exact(x)

    assert compared(model, oracle, inside, batch_of("unet", 4)) < 1e-12
