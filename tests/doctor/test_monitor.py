"""The monitor of a training loop: what it sees, what it leaves alone, and that it never waits for a device."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import steadynorm
from steadynorm.doctor import glimpse
from steadynorm.errors import InputError
from steadynorm.recipes import digits

WAITS = ("_local_scalar_dense", "is_nonzero", "equal.default")


def network(**options):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8, **options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def batches(count, size=16):
    images, labels = digits.data()["train"]
    for i in range(count):
        at = torch.arange(i * size, (i + 1) * size) % len(images)
        yield images[at], labels[at]


def step(model, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def watched(model, do=step, steps=12, every=2, size=16, optimizer=None):
    """The monitor after a training of some steps."""
    optimizer = optimizer or sgd(model)
    with steadynorm.watch(model, optimizer, every=every, on_finding=lambda finding: None) as monitor:
        for batch in batches(steps, size):
            do(model, optimizer, batch)
    return monitor


def found(monitor):
    return [(finding.code, finding.where) for finding in monitor.findings]


def hooks_of(model):
    names = [name for name in vars(model) if "hooks" in name]
    return {(path, name): len(vars(m)[name]) for path, m in model.named_modules() for name in names if name in vars(m)}


def test_a_healthy_training_has_no_finding_and_is_the_same_as_unwatched():
    torch.manual_seed(0)
    model = digits.model().train()
    twin = copy.deepcopy(model)
    monitor = watched(model, steps=60, every=10, size=32)
    optimizer = sgd(twin)
    for batch in batches(60, 32):
        step(twin, optimizer, batch)
    assert monitor.findings == ()
    assert (monitor.steps, monitor.looks) == (60, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_hooks_are_gone_after_an_exception_too():
    model = network()
    optimizer = sgd(model)
    before = hooks_of(model)

    def interrupted():
        with steadynorm.watch(model, optimizer, every=1):
            for batch in batches(3):
                step(model, optimizer, batch)
                assert hooks_of(model) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert hooks_of(model) == before
    assert not optimizer._optimizer_step_post_hooks


def test_between_looks_there_is_no_hook_on_the_model():
    model = network()
    optimizer = sgd(model)
    before = hooks_of(model)
    with steadynorm.watch(model, optimizer, every=3):
        for number, batch in enumerate(batches(7)):
            assert (hooks_of(model) != before) == (number % 3 == 0)
            step(model, optimizer, batch)


def poisoned(model, optimizer, batch):
    batch[0][3, 0, 2, 2] = torch.nan
    step(model, optimizer, batch)


def test_a_batch_with_nan_is_found_at_the_first_layer_and_so_are_its_statistics():
    model = nn.Sequential(network(), nn.BatchNorm1d(10))
    monitor = watched(model, poisoned)
    assert found(monitor) == [("SN002", "0.1"), ("SN202", "0.1")]
    assert monitor.findings[0].evidence == {"step": 0, "layers": 2}
    assert monitor.findings[1].evidence["step"] == 2


def test_a_guarded_layer_has_no_broken_statistics():
    model = network()
    model[1] = steadynorm.BatchNorm2d(8)
    assert found(watched(model, poisoned)) == [("SN002", "1")]


@pytest.mark.parametrize("momentum", [0.0, 0.0003])
def test_statistics_that_do_not_follow_the_batches_are_found(momentum):
    assert found(watched(network(momentum=momentum), steps=60, every=5)) == [("SN203", "1")]


def test_statistics_are_not_judged_before_they_could_settle():
    assert found(watched(network(momentum=0.0003), steps=39, every=3)) == []


def test_frozen_layers_that_move_are_found_and_those_that_do_not_are_not():
    model = network()
    model[:2].requires_grad_(False)
    assert found(watched(model)) == [("SN302", "1")]
    model[1].eval()
    assert found(watched(model)) == []
    model[1] = steadynorm.BatchNorm2d(8).freeze_()
    assert found(watched(model.train())) == []


class Recomputed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), norm(8), nn.Linear(8, 10)

    def forward(self, x):
        y = checkpoint(lambda each: self.norm(self.conv(each)), x, use_reentrant=False)
        return self.head(y.mean((2, 3)))


def test_an_update_in_the_backward_pass_is_found():
    monitor = watched(Recomputed(nn.BatchNorm2d))
    assert found(monitor) == [("SN303", "norm")]
    assert monitor.findings[0].evidence["updates in the backward pass"] == 1
    assert monitor.findings[0].source.file.endswith("test_monitor.py")
    assert found(watched(Recomputed(steadynorm.BatchNorm2d))) == []


def with_a_log(model, optimizer, batch):
    with torch.no_grad():
        model(batch[0])
    step(model, optimizer, batch)


def test_a_forward_that_nothing_is_learned_from_is_found():
    monitor = watched(network(), with_a_log)
    assert found(monitor) == [("SN304", "")]
    assert monitor.findings[0].evidence == {"step": 0, "forwards": 2, "learned from": 1}


def siamese(model, optimizer, batch):
    optimizer.zero_grad()
    (model(batch[0]) - model(batch[0].flip(-1))).square().mean().backward()
    optimizer.step()


def accumulated(model, optimizer, batch):
    optimizer.zero_grad()
    for images, labels in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
        F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def validated(model, optimizer, batch):
    step(model, optimizer, batch)
    with torch.no_grad():
        model.eval()(batch[0])
    model.train()


@pytest.mark.parametrize("do", [siamese, accumulated, validated])
def test_loops_that_call_the_model_often_for_a_reason_are_healthy(do):
    assert found(watched(network(), do)) == []


def test_a_training_in_evaluation_mode_is_found():
    assert found(watched(network().eval())) == [("SN305", "")]
    model = network()
    model[1].eval()  # one layer, by hand, is a decision
    assert found(watched(model)) == []


def test_few_values_are_found_where_they_are_fewest():
    model = nn.Sequential(network(), nn.BatchNorm1d(10))
    assert found(watched(model, size=4)) == [("SN102", "1")]


class WithDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return {"logits": self.net(x), "name": "x"}


def test_outputs_may_be_dictionaries():
    def do(model, optimizer, batch):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0])["logits"], batch[1]).backward()
        optimizer.step()

    assert found(watched(WithDictionary(), do)) == []
    assert found(watched(WithDictionary().eval(), do)) == [("SN305", "")]


def test_without_an_optimizer_a_forward_is_a_step_and_learning_is_not_checked():
    model = network(momentum=0.0)
    optimizer = sgd(model)
    with steadynorm.watch(model, every=10, on_finding=lambda finding: None) as monitor:
        for batch in batches(70):
            step(model, optimizer, batch)
    assert found(monitor) == [("SN203", "1")]
    assert monitor.looks == 7
    assert monitor.diagnosis().unchecked == dict.fromkeys(("SN304", "SN305"), "no optimizer was given")


def test_a_copy_made_in_the_middle_of_a_step_is_not_taken_for_the_model():
    model = network()
    copies = []

    def do(model, optimizer, batch):
        copies.append(copy.deepcopy(model))
        copies[-1](torch.full_like(batch[0], torch.nan))
        step(model, optimizer, batch)

    assert found(watched(model, do)) == []


class Odd(nn.BatchNorm2d):
    """Takes what no batch norm takes."""

    def forward(self, x):
        return super().forward(x["image"])


class CallsOdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = Odd(1), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.norm({"image": x, "shape": torch.tensor(0)}).flatten(1))


def test_a_look_that_fails_is_told_and_stops_nothing(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("cannot be looked at")

    monkeypatch.setattr(glimpse, "of_rows", fail)
    monitor = watched(network())
    assert monitor.findings == ()
    assert "1 could not be looked at: RuntimeError: cannot be looked at" in str(monitor)


def test_layers_with_inputs_of_their_own_do_not_stop_the_training():
    assert found(watched(CallsOdd())) == []


@pytest.mark.parametrize("is_wrapper", [True, False])
def test_what_is_compiled_is_not_seen_and_that_is_said_and_nothing_stays_in_the_graph(is_wrapper):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = network(momentum=0.0)
    twin = copy.deepcopy(model)
    compiled, optimizer, plain = torch.compile(model, backend="eager", fullgraph=True), sgd(model), sgd(twin)
    with steadynorm.watch(compiled if is_wrapper else model, optimizer, every=2) as monitor:
        for batch in batches(8):
            step(compiled, optimizer, batch)
    for batch in batches(2):
        step(compiled, optimizer, batch)
    for count in (8, 2):
        for batch in batches(count):
            step(twin, plain, batch)
    assert monitor.findings == ()
    assert "SN203" in monitor.diagnosis().unchecked
    assert "SN203" not in monitor.diagnosis().checked
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


class Waits(TorchDispatchMode):
    """The operators that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in WAITS):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_look_does_not_wait_for_the_device():
    model = digits.model().train()
    optimizer = sgd(model)
    waits = Waits()
    with steadynorm.watch(model, optimizer, every=1), waits:
        for batch in batches(3):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            glimpsed = list(waits.seen)
            optimizer.step()
            waits.seen.clear()
            assert glimpsed == []
    with Waits() as control:
        torch.zeros(()).item()
    assert control.seen


def test_findings_are_told_once_each(caplog):
    told = []
    model = network(momentum=0.0)
    optimizer = sgd(model)
    with steadynorm.watch(model, optimizer, every=2, on_finding=told.append):
        for batch in batches(60):
            step(model, optimizer, batch)
    assert [finding.code for finding in told] == ["SN203"]
    with caplog.at_level(logging.WARNING, "steadynorm"), steadynorm.watch(model, optimizer, every=2):
        for batch in batches(60):
            step(model, optimizer, batch)
    assert [record.message.startswith("SN203 1: In the last 3 looks") for record in caplog.records] == [True]


def test_it_shows_itself_with_what_was_not_seen():
    monitor = watched(network(), steps=3, every=2)
    text = str(monitor)
    assert "2 of 3 steps were looked at" in text
    assert "it takes 3 looks after step 40" in text
    assert "Never called" not in text
    assert monitor.diagnosis().to_dict()["unchecked"] == {"SN203": "it takes 3 looks after step 40, 2 steps apart"}
    model = network()
    with steadynorm.watch(model, sgd(model)) as monitor:
        pass
    assert set(monitor.diagnosis().unchecked.values()) == {"no step was looked at"}


def test_a_model_without_batch_norm_is_watched_in_vain():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LayerNorm(10))
    monitor = watched(model)
    assert found(monitor) == []
    assert monitor.diagnosis().checked == ()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"optimizer": [3]}, "watch got int as optimizer"),
        ({"every": 0}, "watch got every=0"),
        ({"every": 2.5}, "watch got every=2.5"),
    ],
)
def test_what_cannot_be_watched_is_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        steadynorm.watch(network(), **arguments)


def test_layers_that_are_never_called_are_named():
    model = network()
    model.spare = nn.BatchNorm1d(3)
    model.forward = lambda x: model[:6](x)
    assert "Never called in a look: spare." in str(watched(model))


def test_it_cannot_be_started_twice():
    model = network()
    with steadynorm.watch(model, sgd(model)) as monitor, pytest.raises(InputError, match="watches already"):
        monitor.start()
    assert hooks_of(model) == hooks_of(network())
