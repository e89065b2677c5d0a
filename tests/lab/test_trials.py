import math

import pytest

from steadynorm.errors import InputError
from steadynorm.lab.axes import Cell
from steadynorm.lab.trials import Budget, trial
from steadynorm.recipe import load
from tests.lab.toy import TOY


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    return load(str(tmp_path / "toy.py"))


@pytest.mark.parametrize("batch_size", [1, 2, 8, 32, 50])
def test_every_batch_size_sees_the_same_samples(batch_size):
    budget = Budget(steps=100, lr=0.1)
    assert abs(budget.steps_at(batch_size) * batch_size - budget.samples) <= batch_size / 2


def test_a_large_batch_still_takes_some_steps():
    assert Budget(steps=100, lr=0.1).steps_at(1024) == 20
    assert Budget(steps=5, lr=0.1).steps_at(1024) == 5


@pytest.mark.parametrize(("scaling", "lr"), [("linear", 0.025), ("sqrt", 0.05), ("none", 0.1)])
def test_the_learning_rate_follows_the_batch_size(scaling, lr):
    assert Budget(100, 0.1, scaling).lr_at(8) == pytest.approx(lr)
    assert Budget(100, 0.1, scaling).lr_at(32) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ((0, 0.1), "0 steps were given"),
        ((5, 0.0), r"a learning rate of 0\.0 was given"),
        ((5, math.nan), "a learning rate of nan was given"),
        ((5, 0.1, "cubic"), "there is no learning rate scaling 'cubic': choose from linear, sqrt, none"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget, message):
    with pytest.raises(InputError, match=message):
        Budget(*budget)


def test_a_trial_is_a_function_of_cell_and_budget(toy):
    budget = Budget(steps=10, lr=0.1)
    first = trial(toy, Cell("batch", 8, 0), budget)
    assert list(first) == ["loss", "accuracy"]
    assert trial(toy, Cell("batch", 8, 0), budget) == first
    others = [Cell("batch", 8, 1), Cell("group", 8, 0), Cell("batch", 16, 0)]
    assert all(trial(toy, cell, budget) != first for cell in others)


def test_a_training_that_diverges_is_an_error(toy):
    with pytest.raises(InputError, match=r"the training diverged: loss on the test split is (nan|inf)"):
        trial(toy, Cell("none", 8, 0), Budget(steps=50, lr=1e20))
