"""Digits recognised before a conversion, after it, and after a little training: the table of docs/convert.md."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest

from steadynorm.convert import convert_
from steadynorm.recipes import digits
from tests.convert.networks import NETWORKS, accuracy, trained

EPOCHS, SEEDS = 5, 2
DATA = 8
FINE_TUNING_RATE = 0.003
WAYS = {
    "carried over": {"method": None, "groups": 8},
    "one pass": {"method": "one_pass"},
    "layer by layer": {"method": "layer_by_layer"},
    "layer by layer, 8 groups": {"groups": 8},
}


def row(name: str, seed: int) -> dict[str, float]:
    model = trained(NETWORKS[name], EPOCHS, seed)
    data = list(digits.batches("train", 64, 99))[:DATA]
    found = {"before": accuracy(model)}
    for way, options in WAYS.items():
        one = copy.deepcopy(model)
        change = convert_(one, "group", batches=data, loss=digits.loss, **options)
        found |= {way: accuracy(one), f"{way}, loss": change.difference.loss_after}
        found[f"{way}, relative"] = change.difference.relative[0]
        found[f"{way}, an epoch later"] = accuracy(trained(None, 1, seed + 50, one, FINE_TUNING_RATE))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_most_is_recognised_again(name):
    rows = [row(name, seed) for seed in range(SEEDS)]
    mean = {key: float(np.mean([one[key] for one in rows])) for key in rows[0]}
    sys.stdout.write("\n".join([f"\n{name}", *(f"  {key:<40} {value:.3f}" for key, value in mean.items()), ""]))
    assert mean["layer by layer, loss"] < mean["carried over, loss"] / 2
    assert mean["layer by layer, relative"] <= mean["one pass, relative"] * 1.02
    assert mean["layer by layer"] > mean["carried over"]
