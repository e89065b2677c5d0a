import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steadynorm.probe.trace import ForwardRaised, Watcher, run, trace, watching
from steadynorm.recipe import call

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Executes conv, other, norm in this order, while norm is fed by what `between` makes of the first."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.between = between

    def forward(self, x):
        first, second = self.conv(x), self.other(x)
        return self.norm(self.between(first, second)) + second


def producer(between, **modules):
    net = Net(between)
    for name, module in modules.items():
        setattr(net, name, module)
    calls, *_ = trace(net.eval(), X, call)
    return next(c.producer for c in calls if c.path == "norm")


def test_the_tensor_counts_and_not_the_order_of_execution():
    assert producer(lambda a, b: a) == "conv"
    assert producer(lambda a, b: b) == "other"
    assert producer(lambda a, b: F.relu(a)) == ""
    assert producer(lambda a, b: a + b) == ""


def test_an_operation_in_place_makes_another_tensor_of_it():
    assert producer(lambda a, b: a.relu_()) == ""
    assert producer(lambda a, b: nn.ReLU(inplace=True)(a)) == ""


def test_identities_and_containers_hand_on():
    assert producer(lambda a, b: a, conv=nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity())) == "conv.0"
    # In evaluation dropout gives back the very tensor; in training it does not.
    assert producer(lambda a, b: a, conv=nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout())) == "conv.1"


def test_calls_come_in_the_order_in_which_they_end_with_their_shapes():
    calls, output, _ = trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()), X, call)
    assert [c.path for c in calls] == ["0", "1", ""]
    assert calls[0].input_shape == (4, 3, 6, 6)
    assert calls[0].output_shape == (4, 5, 4, 4)
    assert calls[-1].output_shape == tuple(output.shape)


class Tries(nn.Module):
    """Goes on after a child that raises."""

    def __init__(self):
        super().__init__()
        self.bad, self.good = nn.Linear(99, 1), nn.Linear(6, 6)

    def forward(self, x):
        try:
            return self.bad(x)
        except RuntimeError:
            return self.good(x)


def test_a_call_that_raised_and_was_caught_does_not_confuse():
    calls, *_ = trace(nn.Sequential(Tries()), X, call)
    assert [c.path for c in calls] == ["0.good", "0", ""]


def test_an_error_knows_its_module_and_its_cause():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(99, 1)))
    watcher = Watcher()
    with pytest.raises(ForwardRaised) as caught, watching(model, watcher):
        run(model, X, call)
    assert watcher.active[-1] == "1.0"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_every_pass_has_the_same_random_numbers():
    model = nn.Dropout().train()
    assert torch.equal(run(model, X, call), run(model, X, call))


def test_what_runs_in_inference_mode_is_traced_with_less_known():
    net = torch.nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)).eval()
    net.forward = torch.inference_mode()(net.forward)
    calls, output, _ = trace(net, X, call)
    assert [c.path for c in calls] == ["0", "1", "2", ""]
    assert {c.producer for c in calls} == {""}
    assert output.shape == X.shape
