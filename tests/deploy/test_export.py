"""An artefact is on disk only after another engine ran it and gave what the model gives."""

from __future__ import annotations

import hashlib
import json
import os
import signal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import steadynorm as sn
from steadynorm import deploy
from steadynorm.deploy import artefact, program
from steadynorm.deploy.export import STEPS
from steadynorm.errors import DifferenceError, InputError
from tests.deploy.networks import Choosing, Residual, resnet, trained

IMAGES = torch.linspace(-2, 2, 6 * 3 * 8 * 8).sin().mul(3).reshape(6, 3, 8, 8)
BATCHES = [(IMAGES[:4], torch.zeros(4)), (IMAGES[4:], torch.zeros(2))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A residual network and what came of it; exporting to ONNX takes seconds."""
    model = trained(
        nn.Sequential(
            *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Residual(4, 6)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
        )
    )
    return model, deploy.export(model, BATCHES, tmp_path_factory.mktemp("onnx") / "net.onnx")


def rows(features=4):
    return [torch.linspace(-3, 3, n * features).sin().reshape(n, features) for n in (3, 2)]


def small():
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)))


def test_onnxruntime_gives_what_the_model_gives_in_float64(exported):
    model, made = exported
    session = onnxruntime.InferenceSession(made.path)
    with torch.no_grad():
        exact = model.double()(IMAGES.double()).numpy()
    model.float()
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * abs(exact).max())
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    assert made.outputs[0].relative < 1e-5


def test_what_was_measured_lies_beside_the_artefact(exported):
    _, made = exported
    assert sorted(os.listdir(made.path.parent)) == ["net.onnx", "net.onnx.json"]
    content = made.path.read_bytes()
    report = json.loads(made.report.read_text(encoding="utf-8"))
    assert report["sha256"] == hashlib.sha256(content).hexdigest()
    assert report["size"] == len(content)
    assert report["opset"] == {entry.domain: entry.version for entry in onnx.load(made.path).opset_import}[""]
    assert report["batch_sizes"] == [1, 2, 3, 4, 8, 16, 32, 64]
    assert report["outputs"][0]["relative"] == made.outputs[0].relative <= report["outputs"][0]["tolerance"]
    assert report["invariance"]["holds"]
    assert report["machine"]["torch"] == torch.__version__
    for line in ("onnxruntime", "relative", "1, 2, 3, 4, 8, 16, 32, 64 samples", "alone and in batches of 1 to 64"):
        assert line in repr(made)


def test_the_artefact_holds_no_path_of_the_machine_it_was_made_on(exported):
    _, made = exported
    assert str(os.getcwd()).encode() not in made.path.read_bytes()
    assert b"stack_trace" not in made.path.read_bytes()


def test_verify_finds_a_difference_that_was_planted_in_the_file(exported, tmp_path):
    model, made = exported
    assert deploy.verify(model, deploy.load(made.path), BATCHES).agrees
    proto = onnx.load(made.path)
    head = next(one for one in proto.graph.initializer if one.name.endswith("6.bias"))
    wrong = numpy_helper.to_array(head).copy()
    wrong[2] += 0.5
    head.CopyFrom(numpy_helper.from_array(wrong, head.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    found = deploy.verify(model, deploy.load(tmp_path / "wrong.onnx"), BATCHES)
    assert not found.agrees
    assert found.worst.absolute == pytest.approx(0.5, rel=1e-3)


def test_verify_finds_a_difference_that_was_planted_in_the_model(exported):
    model, made = exported
    with torch.no_grad():
        model[3].bn1.bias[1] += 0.5
    try:
        assert not deploy.verify(model, deploy.load(made.path), BATCHES).agrees
    finally:
        with torch.no_grad():
            model[3].bn1.bias[1] -= 0.5


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_an_artefact_that_differs_is_refused_and_leaves_no_file(tmp_path, suffix):
    model, other = small(), small()
    with torch.no_grad():
        other[3].bias[1] += 0.01
    with pytest.raises(DifferenceError, match=r"differs from the model by more than 3\.5e-04.*Nothing was written"):
        deploy.export(model, rows(), tmp_path / f"net{suffix}", reference=other)
    assert os.listdir(tmp_path) == []
    assert deploy.export(model, rows(), tmp_path / f"net{suffix}", reference=other, tolerance=0.5).path.exists()


def test_a_file_that_was_there_stays_when_its_successor_is_refused(tmp_path):
    path = tmp_path / "net.pt2"
    deploy.export(small(), rows(), path)
    before = path.read_bytes(), (tmp_path / "net.pt2.json").read_text()
    with pytest.raises(InputError):
        deploy.export(small().train(), rows(), path)
    assert (path.read_bytes(), (tmp_path / "net.pt2.json").read_text()) == before


class ByHand(nn.Module):
    """A batch norm that somebody wrote without looking at the mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, self.weight, None, training=True)


def in_training(path):
    model = trained(resnet())
    model.get_submodule(path).train()
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: resnet().train(), ("training mode", "(1, 3.bn1, 3.bn2 and 4 more)", "model.eval()")),
        (lambda: in_training("3.bn2"), ("training mode (3.bn2)",)),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval().append(nn.Dropout()), ("training mode (2)",)),
        (lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval(), ("0 normalizes by the",)),
        (lambda: nn.Sequential(nn.Linear(4, 4), ByHand()).eval(), ("1 normalizes by the statistics of the batch",)),
        (lambda: nn.Sequential(nn.LazyLinear(4)).eval(), ("without values (0.weight, 0.bias)",)),
        (lambda: nn.DataParallel(small()), ("DataParallel", "the model inside")),
    ],
    ids=["training", "one module", "dropout", "no statistics", "by hand", "lazy", "wrapped"],
)
def test_a_model_that_is_not_ready_is_refused_with_the_modules_named(tmp_path, make, words):
    with pytest.raises(InputError) as refused:
        deploy.export(make(), rows(), tmp_path / "net.pt2")
    for word in words:
        assert word in str(refused.value)
    assert os.listdir(tmp_path) == []


class Fixed(nn.Module):
    """A size of the example in the code."""

    def forward(self, x):
        return x.reshape(3, 4) * 2


class Branching(nn.Module):
    """Another answer for one sample: exporters take it for granted that there are more."""

    def forward(self, x):
        return x * 2 if x.shape[0] > 1 else x * 3


class BatchMean(nn.Module):
    """What a sample is told depends on its neighbours."""

    def forward(self, x):
        return x - 0.5 * x.mean(0, keepdim=True)


def test_a_batch_size_that_is_fixed_in_the_code_is_refused_or_exported_as_it_is(tmp_path):
    with pytest.raises(InputError, match="dynamic_batch=False"):
        deploy.export(Fixed().eval(), rows()[:1], tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == []
    made = deploy.export(Fixed().eval(), rows()[:1], tmp_path / "net.pt2", dynamic_batch=False)
    assert (made.batch_sizes, made.invariance) == ((), None)


def test_one_sample_is_tried_however_many_there_are_in_the_batches(tmp_path):
    with pytest.raises(DifferenceError, match=r"a batch of 1\)"):
        deploy.export(Branching().eval(), rows(), tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == []
    assert deploy.export(Branching().eval(), rows(), tmp_path / "net.pt2", batch_sizes=(2, 3)).path.exists()


def test_examples_of_one_sample_make_no_constant_of_it(tmp_path):
    made = deploy.export(small(), [rows()[0][:1]], tmp_path / "net.pt2")
    assert made.batch_sizes == (1, 2, 3, 4, 8, 16, 32, 64)
    assert deploy.load(made.path)(torch.ones(5, 4)).shape == (5, 3)


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_a_sample_that_depends_on_its_batch_is_told(tmp_path, suffix):
    pair, path = torch.tensor([[1.0], [3.0]]), tmp_path / f"net{suffix}"
    made = deploy.export(BatchMean().eval(), [pair], path, batch_sizes=(1, 2))
    # Alone 1 − 0.5, beside 3 it is 1 − 1: a difference of 0.5 where the output is 0.5.
    assert made.invariance.model == made.invariance.artefact == 1.0
    assert not made.invariance.holds
    assert "DEPENDS ON THE BATCH" in repr(made)


def test_sizes_that_vary_between_batches_may_be_any(tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 2, 3), nn.BatchNorm1d(2)).eval()
    made = deploy.export(model, [torch.randn(2, 3, 9), torch.randn(4, 3, 7)], tmp_path / "net.pt2")
    x = torch.randn(7, 3, 31)
    torch.testing.assert_close(deploy.load(made.path)(x), model(x))


class Summing(nn.Module):
    """As many tensors as one likes, and more by name."""

    def forward(self, *tensors, **more):
        return sum(tensors) * more["scale"]


def test_any_number_of_inputs_is_taken(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Summing()

        def forward(self, *tensors):
            return self.inner(*tensors[:-1], scale=tensors[-1])

    batches = [((torch.randn(n, 2), torch.randn(n, 2), torch.randn(n, 1)), "target") for n in (3, 2)]
    made = deploy.export(Named().eval(), batches, tmp_path / "net.pt2")
    assert deploy.load(made.path)(*(torch.ones(7, width) for width in (2, 2, 1))).shape == (7, 2)


class Structured(nn.Module):
    """Named inputs, a dictionary for an output, one tensor twice and an input among them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, scale=None):
        y = self.norm(x) * scale
        return {"logits": y, "pair": (y, y.sum(1)), "x": x}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_named_inputs_and_nested_outputs_keep_their_places(tmp_path, suffix):
    model = trained(Structured())
    batches = [({"scale": torch.rand(n, 1) + 1, "x": torch.randn(n, 4)}, "target") for n in (3, 2)]
    made = deploy.export(model, batches, tmp_path / f"net{suffix}")
    assert [output.name for output in made.outputs] == ["logits", "pair.0", "pair.1", "x"]
    found = deploy.verify(model, deploy.load(made.path), batches)
    assert found.agrees
    assert [output.name for output in found.outputs] == ["logits", "pair.0", "pair.1", "x"]


def test_the_model_comes_out_as_it_went_in(tmp_path):
    model = small()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    deploy.export(model, rows(), tmp_path / "net.pt2")
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_layers_of_ours_leave_as_operators_of_pytorch(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), sn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 1), sn.GroupNorm(2, 8)
    )
    with sn.backend("reference"):  # no kernel has to be compiled for a few passes
        made = deploy.export(trained(model), [IMAGES], tmp_path / "net.pt2")
    assert all(name.startswith("aten.") for name in made.operators), made.operators
    assert made.outputs[0].relative < 1e-5


def test_operators_of_ours_are_refused_with_their_place(tmp_path):
    class Calling(nn.Module):
        def forward(self, x):
            return sn.functional.batch_norm(x, torch.zeros(4), torch.ones(4), training=False)

    with pytest.raises(InputError, match="operators of steadynorm"):
        deploy.export(nn.Sequential(Calling()).eval(), rows(), tmp_path / "net.pt2")


def test_control_flow_that_depends_on_the_data_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"torch\.export cannot follow the model: .*networks\.py:\d+"):
        deploy.export(trained(Choosing()), [IMAGES], tmp_path / "net.pt2")


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_at_any_step_it_leaves_no_file(tmp_path, step):
    def stop(done, total):
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy.export(small(), rows(), tmp_path / "net.pt2", progress=stop)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["traced", "written", "compared", "replacing"])
def test_killed_it_leaves_nothing_under_the_name(tmp_path, monkeypatch, when):
    """A process that is killed cannot clean up: what it has not finished must not look finished."""
    child = os.fork()
    if not child:
        step = {"traced": 1, "written": 2, "compared": STEPS}.get(when)

        def kill(done=None, total=None):
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            if when == "replacing":
                monkeypatch.setattr(os, "replace", lambda *_: kill())
            deploy.export(small(), rows(), tmp_path / "net.pt2", progress=kill if step else None)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "net.pt2").exists()
    assert not (tmp_path / "net.pt2.json").exists()
    if when != "replacing":
        assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        deploy.export(small(), rows(), tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out": "net.bin"}, "expected a file that ends in .onnx or .pt2"),
        ({"out": "net.pt2", "opset": 18}, "only ONNX has one"),
        ({"out": "net.pt2", "batches": []}, "no batch"),
        ({"out": "net.pt2", "model": nn.Identity().eval(), "batches": [(3,)]}, "no tensor"),
        ({"out": "net.pt2", "batches": [torch.ones(2, 7)]}, "the model raised RuntimeError"),
        ({"out": "net.pt2", "batches": [torch.ones(2, 4), (torch.ones(2, 4, 1),)]}, "different structure"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, options, words):
    given = {"model": small(), "batches": rows(), **options}
    out = tmp_path / given.pop("out")
    with pytest.raises(InputError, match=words) as refused:
        deploy.export(given.pop("model"), given.pop("batches"), out, **given)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_the_opset_is_the_one_that_was_asked_for(tmp_path, opset):
    made = deploy.export(small(), rows(), tmp_path / "net.onnx", opset=opset)
    assert made.opset == opset


@pytest.mark.slow
def test_an_opset_that_is_not_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="opset=13, which torch's exporter does not write"):
        deploy.export(small(), rows(), tmp_path / "net.onnx", opset=13)
    assert os.listdir(tmp_path) == []


def test_what_onnx_needs_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(artefact.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        deploy.export(small(), rows(), tmp_path / "net.onnx")


def test_names_of_outputs_differ_from_one_another_and_from_the_inputs():
    assert program.output_names(["", "x", "0.1", "y", "x.0"], ["x"]) == ["output", "x_2", "output_0.1", "y", "x.0"]


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        deploy.load(tmp_path / "none.onnx")
    for name in ("a.onnx", "a.pt2"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(InputError, match=f"{name}: .* cannot"):
            deploy.load(tmp_path / name)
