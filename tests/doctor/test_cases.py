"""Recall, exact location and false alarms, over the faults planted one by one and the healthy controls."""

import pytest

from tests.doctor.cases import FAULTS, HEALTHY, NORMS, Case, diagnosis, found
from tests.doctor.controls import CONTROLS
from tests.doctor.planted import PLANTED
from tests.doctor.twins import TWINS

# The same fault at one layer after another: at the first and the last of them on every push.
AT_OTHER_LAYERS = tuple(f"{fault} {path}" for fault in ("reset", "shifted", "nan") for path in NORMS[1:-1])
# Healthy twins that no control resembles run on every push, the others with the slow ones.
UNUSUAL = ("second pass in evaluation mode", "teacher, in the loss", "balanced", "optimizer of the head")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c.name in AT_OTHER_LAYERS)) for c in FAULTS + PLANTED],
    ids=lambda case: case.name,
)
def test_a_fault_is_found_where_it_is_and_nowhere_else(case: Case):
    assert found(case) == case.expected


@pytest.mark.parametrize("case", HEALTHY + CONTROLS, ids=lambda case: case.name)
def test_a_healthy_model_has_no_finding_above_a_note(case: Case):
    assert found(case) == set(), diagnosis(case).findings


@pytest.mark.parametrize("case", [fault for fault, _ in TWINS], ids=lambda case: case.name)
def test_a_fault_of_training_or_data_is_found_where_it_is_and_nowhere_else(case: Case):
    assert found(case) == case.expected, diagnosis(case).findings


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(twin, marks=() if any(part in twin.name for part in UNUSUAL) else pytest.mark.slow)
        for _, twin in TWINS
    ],
    ids=lambda case: case.name,
)
def test_its_healthy_twin_has_no_finding_above_a_note(case: Case):
    assert found(case) == case.expected == set(), diagnosis(case).findings


@pytest.mark.parametrize("case", HEALTHY + CONTROLS, ids=lambda case: case.name)
def test_a_healthy_model_is_checked_by_every_rule(case: Case):
    frozen = case.name == "dense, everything frozen"
    assert diagnosis(case).unchecked == ({"SN702": "no parameter takes a gradient"} if frozen else {})


def test_names_of_cases_are_distinct():
    names = [case.name for case in FAULTS + PLANTED + HEALTHY + CONTROLS + [case for pair in TWINS for case in pair]]
    assert len(set(names)) == len(names)


def test_the_loss_before_and_after_is_that_of_the_swapped_layer():
    """One layer shifted: the loss before is the model's, the loss after that of the unharmed model, nearly."""
    broken = next(case for case in FAULTS if case.name == "shifted block1.bn2")
    harmed, healthy = diagnosis(broken), diagnosis(HEALTHY[0])
    evidence = harmed.findings[0].evidence
    assert "change of the class probabilities" in evidence
    assert "the same by chance" in evidence
    unharmed = healthy.facts.training_gap.loss[1]
    assert evidence["loss, as stored"] > 3 * evidence["loss, recalibrated"]
    assert evidence["loss, recalibrated"] == pytest.approx(unharmed, abs=0.1)


def test_a_batch_of_one_is_told_in_the_words_that_pytorch_stops_with():
    case = next(case for case in FAULTS if case.name == "last batch of 1")
    (finding,) = (finding for finding in diagnosis(case).findings if finding.code == "SN101")
    model = case.make().train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(list(case.train_batches())[-1][0])
    assert "Expected more than 1 value per channel when training" in finding.message


def test_the_effect_of_a_layer_is_its_own_where_several_are_stale():
    two = next(case for case in FAULTS if case.name == "two reset")
    facts = diagnosis(two).facts
    alone = [drift.effect for drift in facts.drift.values() if drift.effect is not None]
    assert len(alone) == 2
    assert all(effect.loss[1] == pytest.approx(facts.drift_together.loss[1]) for effect in alone)
    assert all(effect.loss[0] != facts.drift_together.loss[0] for effect in alone)
