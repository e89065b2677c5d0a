import sys

import pytest
import torch

from steadynorm.errors import RecipeError
from steadynorm.recipe import evaluate, load, seeded, train


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def trained(recipe, steps):
    with seeded(0):
        model = recipe.model()
    train(model, recipe, batch_size=32, steps=steps, lr=recipe.lr, seed=0)
    return model


def test_the_splits_are_fixed_stratified_and_apart(digits):
    train_images, train_labels = (torch.cat(part) for part in zip(*digits.batches("train", 1, 0), strict=True))
    test_images, test_labels = (torch.cat(part) for part in zip(*digits.batches("test", 50, 0), strict=True))
    assert len(train_labels) + len(test_labels) == 1797
    shares = torch.bincount(test_labels) / (torch.bincount(train_labels) + torch.bincount(test_labels))
    assert (shares - 0.2).abs().max() < 0.01
    again = torch.cat([labels for _, labels in digits.batches("test", 360, 9)])
    assert torch.equal(again, test_labels), "the test split does not depend on seed or batch size"
    distances = torch.cdist(train_images.flatten(1), test_images.flatten(1))
    assert distances.min() > 0, "an image is in both splits"


def test_the_seed_shuffles_and_batches_are_whole(digits):
    def labels(seed):
        return torch.cat([batch[1] for batch in digits.batches("train", 32, seed)])

    assert torch.equal(labels(3), labels(3))
    assert not torch.equal(labels(3), labels(4))
    assert {len(batch[0]) for batch in digits.batches("train", 32, 0)} == {32}


def test_it_learns_to_read(digits):
    assert evaluate(trained(digits, 200), digits)["accuracy"] > 0.97


def test_the_faulty_twin_trains_as_well_and_evaluates_badly():
    faulty = load("digits_faulty")
    model = trained(faulty, 150)
    batch = next(iter(faulty.batches("test", 360, 0)))
    with torch.no_grad():
        in_training = faulty.metrics(model.train()(batch[0]), batch)["accuracy"]
    assert in_training > 0.97
    assert evaluate(model, faulty)["accuracy"] < 0.85


def test_without_scikit_learn_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "steadynorm.recipes.digits", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        RecipeError, match=r"the recipe digits needs .*, the extra \[recipes\]: pip install scikit-learn"
    ):
        load("digits")
