"""Networks of transformers and monai: how many norms are folded, and that nothing else changes.

`python -m benchmarks.fold` folds the same networks with other tools too.
"""

from __future__ import annotations

import copy

import pytest

from steadynorm import deploy, models
from steadynorm.deploy.difference import named_tensors, run
from steadynorm.samples import map_tensors
from steadynorm.training.evaluation import call
from tests.deploy.architectures import ARCHITECTURES, made

# Batch norms that stay, and why: everything else folds.
LEFT = {
    "SwiftFormer": {"its input comes from add.Tensor": 1},
    "TextNet": {"its input comes from relu": 3},
    "HuBERT, norm before conv": {"pads with zeros": 1},
    "PatchTST": {"its input comes from add.Tensor": 2},
    "SegResNet, pre-activation": {"is also used elsewhere: add_": 10, "its input comes from": 3},
    "DenseNet, pre-activation": {"from cat": 4, "from max_pool2d": 1, "from avg_pool2d": 1},
    "HighResNet, pre-activation": {"is also used elsewhere: relu": 1, "its input comes from": 2},
    "control flow by the data": {"comes from bn_both, left, right in turn": 1},
}
QUICK = ("LeViT", "DETR, frozen norms", "Wav2Vec2-Conformer", "control flow by the data")
WITHIN = "it normalises within the sample"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
@pytest.mark.filterwarnings("default")  # of packages, when they are imported
def test_all_norms_fold_but_those_that_cannot(name):
    try:
        model, batches = made(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    norms = [path for path, one in model.named_modules() if models.norm_kind(one) in ("batch", "sync", "frozen")]
    change = deploy.fold(model, batches)

    reasons = [reason for reason in change.left.values() if not reason.startswith(WITHIN)]
    for part, count in LEFT.get(name, {}).items():
        assert sum(part in reason for reason in reasons) == count, reasons
    assert len(reasons) == sum(LEFT.get(name, {}).values()), reasons
    assert sum(one.after.startswith("folded") for one in change.log) == len(norms) - len(reasons)

    # What shares no code with the comparison that fold makes: the model as it was, in float64.
    oracle = copy.deepcopy(model).double()
    for batch in batches:
        wide = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)
        expected = dict(named_tensors(run(oracle, wide, call)))
        for place, y in named_tensors(run(change.model, batch, call)):
            scale = float(expected[place].abs().max())
            assert float((y.double() - expected[place]).abs().max()) < 2e-4 * scale
            if place in ("", "logits", "last_hidden_state") and y.dim() > 1:
                assert float(y.std(0).mean()) > 0.01 * scale, "the input hardly reaches the output"
    assert max(one.relative for one in change.difference.float64) < 1e-12
