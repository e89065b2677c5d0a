import copy

import pytest
import torch
from torch import nn

from steadynorm import doctor
from steadynorm.doctor import fixes
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.recipes import digits
from tests.doctor import cases, networks, planted


def batches():
    return digits.batches("test", 32, 0)


def examined(model):
    return doctor.examine(
        model, batches, train_batches=lambda: digits.batches("train", 32, 0), loss=digits.loss, metrics=digits.metrics
    )


@torch.no_grad()
def accuracy(model):
    model.eval()
    images, labels = digits.data()["test"]
    return (model(images).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("nan block2.bn2", "negative variance")),
        "reset block1.bn1",
        "statistics lost on load",
    ],
)
def test_statistics_are_repaired_to_the_accuracy_of_the_healthy_twin(name):
    case = next(case for case in cases.FAULTS if case.name == name)
    model = case.make()
    harmed = accuracy(model)
    sentences = doctor.repair(model, examined(model), batches)
    assert len(sentences) == len(case.expected)
    assert all("done" in str(sentence) for sentence in sentences)
    assert accuracy(model) > harmed
    assert accuracy(model) == pytest.approx(accuracy(cases.trained()), abs=0.01)
    assert examined(model).is_clean


def test_only_the_statistics_of_the_stale_layer_change():
    case = next(case for case in cases.FAULTS if case.name == "reset block1.bn1")
    model = case.make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    doctor.repair(model, examined(model), batches)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"block1.bn1.running_mean", "block1.bn1.running_var"}


def test_recalibration_gives_the_moments_of_the_data():
    model = nn.Sequential(nn.BatchNorm2d(1))
    images = digits.data()["train"][0]
    fixes.recalibrate_(model, [("0",)], [images[:1000], images[1000:1037], images[1037:]])
    torch.testing.assert_close(model[0].running_mean[0], images.mean())
    torch.testing.assert_close(model[0].running_var[0], images.var())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True)])
def test_a_dead_bias_is_folded_exactly_and_removed(norm):
    model = cases.train(networks.convolutional(norm, bias=True))
    images = digits.data()["test"][0]
    before = model.eval()(images).detach()
    sentences = doctor.repair(model, examined(model), batches)
    assert len(sentences) == 2
    assert model[0].bias is None
    assert model[3].bias is None
    torch.testing.assert_close(model.eval()(images), before, rtol=1e-4, atol=1e-5)
    assert doctor.examine(model, batches).findings == ()


def spoil_(model, targets, data):
    """A repair that makes things worse."""
    for (path,) in targets:
        model.get_submodule(path).running_mean.add_(100)


def test_a_repair_that_does_not_help_is_taken_back_bit_for_bit():
    case = next(case for case in cases.FAULTS if case.name == "two reset")
    model = case.make()
    before = copy.deepcopy(model.state_dict())
    diagnosis = examined(model)
    wrong = tuple(
        Finding(**{**vars(f), "fix": Fix("Add a hundred.", True, spoil_, (f.where,))}) for f in diagnosis.findings
    )
    sentences = doctor.repair(model, doctor.Diagnosis(**{**vars(diagnosis), "findings": wrong}), batches)
    assert len(sentences) == 2
    assert all("not repaired, the finding is still there" in str(sentence) for sentence in sentences)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def raise_the_loss_(model, targets, data):
    model.head.weight.mul_(-1)


def test_a_repair_that_raises_the_loss_is_taken_back():
    model = cases.trained()
    before = copy.deepcopy(model.state_dict())
    diagnosis = examined(model)
    finding = Finding("SN203", "error", "measured", "block1.bn1", "", {}, Fix("Turn.", True, raise_the_loss_, ("",)))
    sentences = doctor.repair(model, doctor.Diagnosis(**{**vars(diagnosis), "findings": (finding,)}), batches)
    assert "the loss rose" in str(sentences[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_advice_without_a_safe_fix_is_left_alone():
    case = next(case for case in cases.FAULTS if case.name == "centred over samples")
    model = case.make()
    before = copy.deepcopy(model.state_dict())
    assert doctor.repair(model, examined(model), batches) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def planted_case(name):
    case = next(case for case in planted.PLANTED if case.name == name)
    return case, case.make()


def repaired(case, model):
    judgement = {"train_batches": case.train_batches, "loss": case.loss}
    sentences = doctor.repair(model, doctor.examine(model, case.batches, **judgement), case.batches)
    return sentences, doctor.examine(model, case.batches, **judgement)


def test_statistics_in_half_precision_are_widened_and_recalibrated():
    case, model = planted_case("trained in bfloat16")
    images = digits.data()["test"][0].bfloat16()
    labels = digits.data()["test"][1]
    before = (model.eval()(images).argmax(1) == labels).float().mean()
    sentences, again = repaired(case, model)
    assert len(sentences) == 2
    assert all("done" in str(sentence) for sentence in sentences)
    assert again.is_clean
    assert model[1].running_mean.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    assert (model.eval()(images).argmax(1) == labels).float().mean() > before + 0.2


def test_a_layer_that_cannot_be_widened_is_put_back():
    class OneType(nn.Module):
        """Adds its input to the norm's weight in place, which takes one dtype."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) + torch.dot(self.net[1].weight, self.net[1].weight.new_ones(16).to(x.dtype))

    case, model = planted_case("trained in bfloat16")
    model = OneType(model)
    before = copy.deepcopy(model.state_dict())
    sentences, _ = repaired(case, model)
    assert any("does not run with the layer in float32" in str(sentence) for sentence in sentences)
    assert model.net[1].running_mean.dtype == torch.bfloat16
    assert model.net[1].running_mean.equal(before["net.1.running_mean"])


@pytest.mark.parametrize("kind", ["new", "old"])
def test_spectral_vectors_are_taken_anew(kind):
    wrap = nn.utils.spectral_norm if kind == "old" else nn.utils.parametrizations.spectral_norm
    conv = wrap(nn.Conv2d(1, 8, 3))
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(288, 10)).eval()
    _, vector = next((name, b) for name, b in conv.named_buffers() if name.endswith("_u"))
    with torch.no_grad():
        vector.mul_(0.6)
    sentences, again = repaired(cases.Case("spectral", lambda: model), model)
    assert [s.is_done for s in sentences] == [True]
    assert again.is_clean
    model.eval()(torch.zeros(1, 1, 8, 8))
    norm = torch.linalg.matrix_norm(conv.weight.detach().flatten(1).double(), 2)
    assert norm.item() == pytest.approx(1, abs=1e-4)
