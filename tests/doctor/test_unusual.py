"""Models that are not a chain from one tensor to another: a diagnosis, or one clear sentence."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from steadynorm import doctor
from steadynorm.doctor import source
from steadynorm.doctor.finding import Location
from steadynorm.errors import InputError
from steadynorm.recipe import Recipe
from tests.doctor.networks import convolutional


def images(count=3, size=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 8, 8, generator=generator) for _ in range(count)]


def labelled():
    return [(x, torch.arange(len(x)) % 10) for x in images()]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def examined(model, batches, **options):
    """A diagnosis of a model that has a stale norm, which came out as it went in."""
    before, modes = state_of(model), [module.training for module in model.modules()]
    found = doctor.examine(model, batches, train_batches=batches, **options)
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    return found


def stale(model):
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean += 3
    nn.init.uniform_(norm.bias)
    return model


@dataclasses.dataclass
class Scores:
    logits: torch.Tensor
    name: str = "scores"


class Wrapped(nn.Module):
    """Gives its scores inside something."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = convolutional(nn.BatchNorm2d), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


WRAPS = {
    "dictionary": lambda y: {"logits": y, "aux": None},
    "tuple": lambda y: (y, y.mean()),
    "list in a dictionary": lambda y: {"all": [y, y * 2]},
    "dataclass": Scores,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_outputs_may_be_wrapped(wrap):
    found = examined(stale(Wrapped(wrap)), labelled())
    assert ("SN203", "net.1") in {(f.code, f.where) for f in found.findings}
    assert not {"SN203", "SN801", "SN301"} & set(found.unchecked)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (convolutional(nn.BatchNorm2d) for _ in range(2))

    def forward(self, a, b, scale=1.0):
        return self.left(a) + scale * self.right(b)


def test_inputs_may_be_several():
    pairs = [((x, x.flip(-1)), torch.arange(len(x)) % 10) for x in images()]
    named = [({"a": x, "b": x.flip(-1)}, torch.arange(len(x)) % 10) for x in images()]
    for batches in (pairs, named):
        found = examined(stale(TwoInputs()), batches, select=["SN2"])
        assert ("SN203", "left.1") in {(f.code, f.where) for f in found.findings}


class Alternates(nn.Module):
    """Runs another branch every time it is called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = convolutional(nn.BatchNorm2d), convolutional(nn.BatchNorm2d)
        self.turn = itertools.count()

    def forward(self, x):
        return (self.a if next(self.turn) % 2 else self.b)(x)


class Grows(nn.Module):
    """Makes a layer when it is first called, and another one for every new width."""

    def __init__(self):
        super().__init__()
        self.net, self.heads = convolutional(nn.BatchNorm2d), nn.ModuleDict()

    def forward(self, x):
        key = f"head{len(self.heads) % 3}"
        if key not in self.heads:
            self.heads[key] = nn.Linear(10, 10)
        return self.heads[key](self.net(x))


@pytest.mark.parametrize("kind", [Alternates, Grows])
def test_the_structure_may_change_between_calls(kind):
    model = kind()
    paths = [path for path, _ in model.named_modules()]
    found = doctor.examine(model, images(), train_batches=images())
    assert [path for path, _ in model.named_modules()] == paths
    assert found.facts.norms
    assert found.to_dict()
    assert str(found)


def test_a_model_without_norms_is_examined():
    found = examined(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), labelled())
    assert "rules checked 0 norm layers" in found.summary
    assert all(f.severity == "note" for f in found.findings)
    assert doctor.examine(nn.Identity()).findings == ()


def test_a_model_without_values_is_refused_in_a_sentence():
    with torch.device("meta"):
        model = convolutional(nn.BatchNorm2d)
    for batches in (images(), None):
        with pytest.raises(InputError, match=r"parameters without values \(0\.weight, .*move it off the meta device"):
            doctor.examine(model, batches)
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    with pytest.raises(InputError, match="run a batch through its lazy layers first"):
        doctor.examine(lazy, images())
    assert isinstance(lazy[0], nn.LazyConv2d)


def recipe(**pieces):
    given = {"model": lambda: convolutional(nn.BatchNorm2d), "batches": lambda split, size, seed: labelled(), **pieces}
    return Recipe("mine", **given)


def test_a_recipe_without_loss_and_optimizer_runs_what_it_can_and_lists_the_rest():
    _, found = doctor.examine_recipe(recipe())
    assert found.remarks == (
        "No weights were given and the recipe has no loss: the model was examined as it was made.",
    )
    assert "SN203" in found.checked
    assert all(found.unchecked.values())
    _, whole = doctor.examine_recipe(
        recipe(
            loss=lambda output, batch: F.cross_entropy(output, batch[1]),
            optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
        ),
        steps=3,
    )
    assert set(whole.unchecked) < set(found.unchecked)
    assert set(found.checked) < set(whole.checked)


def test_a_quick_look_at_a_recipe_asks_for_no_batch():
    def batches(split, size, seed):
        raise AssertionError("a batch was asked for")

    model, found = doctor.examine_recipe(recipe(batches=batches, model=lambda: stale(Wrapped(Scores))), quick=True)
    assert isinstance(model, Wrapped)
    assert "SN203" in found.unchecked
    assert {"SN108", "SN202"} <= set(found.checked)
    assert found.facts.calls == ()


class Listed(nn.Module):
    """Makes its children in ways of which some can be traced to a line."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(2)])
        for name in ("p", "q"):
            setattr(self, name, nn.BatchNorm1d(4))
        self.add_module("added", nn.BatchNorm1d(4))


def line_of(text):
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, start=1) if text in line)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("blocks.1", "self.blocks = nn.ModuleList"),
        ("added", 'self.add_module("added"'),
        ("p", "class Listed(nn.Module)"),
        ("", "class Listed(nn.Module)"),
        ("nothing.there", "class Listed(nn.Module)"),
    ],
)
def test_a_module_is_traced_to_the_line_that_makes_it(path, text):
    assert source.locate(Listed(), path) == Location(__file__, line_of(text))


def test_what_a_library_makes_has_no_line():
    assert source.locate(nn.Sequential(nn.BatchNorm1d(2)), "0") is None
    names = {}
    exec("from torch import nn\nclass Typed(nn.BatchNorm1d):\n    pass", names)
    assert source.locate(nn.Sequential(names["Typed"](2)), "0") is None


def test_a_piece_of_a_recipe_is_found_in_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\ndef model():\n    pass\n")
    where = str(file.resolve())
    assert source.locate_piece(Recipe("mine", None, None, spec=str(file)), "model") == Location(where, 3)
    assert source.locate_piece(Recipe("mine", None, None, spec=str(file)), "optimizer") == Location(where, 1)
    assert source.locate_piece(Recipe("mine", None, None, spec="no.such.module"), "model") is None


@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_quantised_by_the_batch_are_named_as_such():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 10))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    batches = [torch.randn(16, 1, 8, 8) for _ in range(4)]
    assert doctor.examine(model, batches, select=["SN801"]).findings == ()
    (finding,) = doctor.examine(quantised, batches, select=["SN801"]).findings
    assert (finding.where, finding.severity) == ("1", "error")
    assert "static scales" in finding.fix.text


def test_layers_that_no_gradient_of_a_sample_comes_through_are_those_that_vmap_refuses():
    x = torch.randn(4, 3, 8, 8)
    for norm, is_unsafe in (
        (nn.BatchNorm2d(8), True),
        (nn.GroupNorm(4, 8), False),
        (nn.InstanceNorm2d(8), False),
        (steadynorm.FrozenBatchNorm2d(8), False),
    ):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.Linear(288, 2))
        found = doctor.examine(model, select=["SN805"]).findings
        assert [f.where for f in found] == ["1"] * is_unsafe
        model.train()
        per_sample = torch.func.vmap(
            torch.func.grad(lambda p, one, net=model: torch.func.functional_call(net, p, (one[None],)).sum()), (None, 0)
        )
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        if is_unsafe:
            with pytest.raises(RuntimeError, match="in-place"):
                per_sample(parameters, x)
        else:
            per_sample(parameters, x)
