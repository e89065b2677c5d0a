import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from steadynorm import recipe
from steadynorm.errors import InputError, RecipeError
from steadynorm.recipe import Recipe, call, evaluate, load, sample_count, seeded, train

WHOLE = """
import torch
from torch import nn

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()

def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 2))

def batches(split, batch_size, seed):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    return [(X[i], Y[i]) for i in order.split(batch_size)]

def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])

def metrics(output, batch):
    return {"accuracy": (output.argmax(1) == batch[1]).float().mean().item()}
"""


@pytest.fixture
def written(tmp_path):
    """`written(text)` puts a recipe into a file and gives its path."""

    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def whole(written):
    return load(written(WHOLE))


def test_a_file_becomes_a_recipe(whole):
    assert whole.name == "mine"
    assert isinstance(whole.model(), nn.Module)
    assert len(list(whole.batches("train", 8, 0))) == 3
    assert whole.optimizer is None
    assert not whole.has_weights


def test_a_dotted_module_is_found_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "dotted.py").write_text(WHOLE)
    monkeypatch.chdir(tmp_path)
    assert load("project.dotted").name == "dotted"


def test_a_recipe_imports_what_lies_beside_it(written):
    written("from torch import nn\nclass Net(nn.Linear): pass\n", "beside_it.py")
    text = WHOLE.replace("import torch\n", "import torch\nfrom beside_it import Net\n", 1)
    before = load(written(text)).fingerprint
    written("from torch import nn\nclass Net(nn.Linear):\n    changed = True\n", "beside_it.py")
    assert load(written(text)).fingerprint != before, "rows of the old model would count for the new one"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_recipe", r"there is no recipe 'no_such_recipe': give a \.py file.*digits"),
        ("nowhere/recipe.py", r"there is no recipe file nowhere/recipe\.py"),
        ("two words", "'two words' is no recipe"),
        ("torch.nothing_there", "there is no recipe 'torch.nothing_there'"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_sentence(spec, message):
    with pytest.raises(RecipeError, match=message):
        load(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\n\nundefined_name\n", r"mine\.py cannot be imported: NameError: .*\(.*mine\.py:3\)\.$"),
        ("def model(:\n", r"SyntaxError: .*mine\.py:1\)\.$"),
        ("import not_installed_anywhere\n", r"ModuleNotFoundError: .*'not_installed_anywhere' \(.*mine\.py:1\)"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \(.*mine\.py:1\)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_a_sentence_with_the_line(written, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load(written(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model", "batches"])
def test_a_missing_piece_shows_its_signature(written, name):
    text = WHOLE.replace(f"def {name}(", f"def other_{name}(")
    with pytest.raises(RecipeError, match=rf"does not define {name}: expected def {name}\("):
        load(written(text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def model():", "def model(width):", r"signature model\(width\): expected def model\(\) -> nn\.Module"),
        ("split, batch_size, seed", "split", r"batches\(split\): expected def batches\(split: str, batch_size: int"),
        ("def loss(output, batch)", "def loss(output)", r"loss\(output\): expected def loss\(output, batch\)"),
    ],
)
def test_a_piece_with_other_arguments_shows_both_signatures(written, old, new, message):
    with pytest.raises(RecipeError, match=message):
        load(written(WHOLE.replace(old, new)))


def test_a_piece_that_is_no_function_is_refused(written):
    with pytest.raises(RecipeError, match=r"optimizer of the recipe .* is str, not a function"):
        load(written(WHOLE + "\noptimizer = 'adam'\n"))


def test_a_model_that_is_no_module_is_refused(written):
    made = load(written(WHOLE + "\ndef model():\n    return 'resnet'\n"))
    with pytest.raises(RecipeError, match=r"model\(\) of the recipe gave str: expected def model\(\) -> nn\.Module"):
        made.model()


def test_an_error_inside_a_piece_names_the_piece_and_the_line(written):
    made = load(
        written(WHOLE + "\ndef batches(split, batch_size, seed):\n    yield X, Y\n    raise KeyError('labels')\n")
    )
    with pytest.raises(RecipeError, match=r"batches\(\) of the recipe raised KeyError: 'labels' \(.*mine\.py:23\)\."):
        list(made.batches("train", 8, 0))


def test_an_error_of_the_forward_names_the_users_line_and_keeps_its_cause(whole, written):
    broken = (
        "\nclass Net(nn.Module):\n    def forward(self, x):\n        return x @ x\n\ndef model():\n    return Net()\n"
    )
    made = load(written(WHOLE + broken))
    with pytest.raises(RecipeError, match=r"the model's forward raised RuntimeError: .*\(.*mine\.py:23\)") as caught:
        evaluate(made.model(), made)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_optimizers_default_is_the_learning_rate_of_the_recipe(written):
    sgd = "\ndef optimizer(parameters, lr{}):\n    return torch.optim.SGD(parameters, lr=lr)\n"
    assert load(written(WHOLE + sgd.format("=0.3"))).lr == 0.3
    assert load(written(WHOLE + sgd.format(""))).lr == recipe.LEARNING_RATE


def test_call_takes_tensors_tuples_and_dictionaries():
    class Sum(nn.Module):
        def forward(self, a, b=0.0):
            return a + b

    a, b = torch.ones(2), torch.full((2,), 3.0)
    assert call(Sum(), a).tolist() == [1, 1]
    assert call(Sum(), (a, "target")).tolist() == [1, 1]
    assert call(Sum(), ((a, b), "target")).tolist() == [4, 4]
    assert call(Sum(), ({"a": a, "b": b}, "target")).tolist() == [4, 4]
    assert call(Sum(), {"a": a, "b": b}).tolist() == [4, 4]


def test_samples_are_counted_in_every_kind_of_batch():
    x = torch.zeros(5, 3)
    assert [sample_count(batch) for batch in (x, (x, 1), ((x, x), 1), {"a": x}, ({"a": x}, 1))] == [5] * 5
    with pytest.raises(RecipeError, match="holds str where a tensor was expected"):
        sample_count(("text", 1))


def test_training_lowers_the_loss_and_reports_every_step(whole):
    model, seen = whole.model(), []
    before = evaluate(model, whole)["loss"]
    train(model, whole, batch_size=8, steps=30, lr=0.1, seed=0, on_step=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == list(range(1, 31))
    assert all(math.isfinite(loss) for _, loss in seen)
    assert evaluate(model, whole)["loss"] < 0.5 * before


def test_the_same_seed_is_the_same_training_and_another_is_not(whole):
    def weights(seed):
        with seeded(0):
            model = whole.model()
        train(model, whole, batch_size=8, steps=7, lr=0.1, seed=seed)
        return torch.cat([value.flatten().double() for value in model.state_dict().values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_epochs_get_seeds_of_their_own(whole):
    asked = []
    spied = Recipe(**{**vars(whole), "batches": lambda *a: (asked.append(a), whole.batches(*a))[1]})
    train(whole.model(), spied, batch_size=8, steps=7, lr=0.1, seed=5)
    assert asked == [("train", 8, 5), ("train", 8, 10_005), ("train", 8, 20_005)]


def test_training_leaves_random_states_and_modes_as_they_were(whole):
    model = whole.model()
    model[1].eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train(model, whole, batch_size=8, steps=3, lr=0.1, seed=0)
    evaluate(model, whole)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_averages_by_sample_and_does_not_touch_the_model(whole):
    model = whole.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    at_once, ragged = evaluate(model, whole, batch_size=24), evaluate(model, whole, batch_size=7)
    assert list(at_once) == ["loss", "accuracy"]
    for name, value in at_once.items():
        assert ragged[name] == pytest.approx(value, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def batches(*a):\n    return []", r"batches\('test', 256, 0\) of the recipe mine is empty"),
        ("def batches(*a):\n    return 3", r"batches\(\) of the recipe gave int: expected def batches\("),
        ("def metrics(o, b):\n    return 0.5", r"metrics\(\) of the recipe gave 0\.5: expected def metrics\("),
        ("loss = metrics = None", "cannot be evaluated: add def loss"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_sentence(written, text, message):
    made = load(written(f"{WHOLE}\n{text}\n"))
    with pytest.raises(RecipeError, match=message):
        evaluate(made.model(), made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def batches(*a):\n    return []", r"batches\('train', 8, …\) of the recipe mine is empty"),
        ("loss = None", "cannot be trained without a loss: add def loss"),
        ("def loss(o, b):\n    return o", r"loss\(\) of the recipe gave a tensor of shape \(8, 2\): expected"),
        ("def loss(o, b):\n    return o.detach().sum()", "the backward pass of the recipe's loss raised RuntimeError"),
        ("def optimizer(p, lr):\n    return torch.optim.SGD([], lr)", r"optimizer\(\) of the recipe raised ValueError"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_sentence(written, text, message):
    made = load(written(f"{WHOLE}\n{text}\n"))
    with pytest.raises(RecipeError, match=message):
        train(made.model(), made, batch_size=8, steps=2, lr=0.1, seed=0)


def test_weights_are_in_every_model_of_the_recipe(whole, written, tmp_path):
    trained = whole.model()
    train(trained, whole, batch_size=8, steps=3, lr=0.1, seed=0)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    loaded = load(written(WHOLE), tmp_path / "weights.pt")
    assert loaded.has_weights
    assert loaded.fingerprint != whole.fingerprint
    for model in (loaded.model(), loaded.model()):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.state_dict().items())


def test_weights_of_another_model_are_refused_when_loading(written, tmp_path):
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        InputError, match=r"do not fit the recipe's model: missing: 0\.weight, 0\.bias, 1\.weight and 6"
    ):
        load(written(WHOLE), tmp_path / "other.pt")
