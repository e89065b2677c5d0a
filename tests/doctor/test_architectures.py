"""Architectures of other libraries, as they are published, have nothing above a note."""

import pytest

from tests.doctor.architectures import ARCHITECTURES, KNOWN, STEPS, examine

# One of each kind on every push: batch, group, layer, instance and root mean square norm.
ALWAYS = ("RegNet", "BiT", "ViT", "monai U-Net, instance norm", "Llama")


def named(names):
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in names]


def worse(diagnosis):
    return {(f.code, f.where) for f in diagnosis.findings if f.severity != "note"}


@pytest.mark.parametrize("name", named(ARCHITECTURES))
def test_an_untrained_architecture_has_no_finding_above_a_note(name):
    found = examine(ARCHITECTURES[name])
    assert {pair for pair in worse(found) if pair[0] not in KNOWN.get(name, ())} == set()
    assert found.facts.failures == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_briefly_trained_architecture_has_no_finding_above_a_note(name):
    found = examine(ARCHITECTURES[name], STEPS)
    assert {pair for pair in worse(found) if pair[0] not in KNOWN.get(name, ())} == set()


def test_there_are_forty_or_more():
    assert len(ARCHITECTURES) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV1", "MobileNetV2"])
def test_a_momentum_in_the_sense_of_another_library_is_found_in_published_classes(name):
    found = examine(ARCHITECTURES[name])
    assert {f.code for f in found.findings if f.severity != "note"} == KNOWN[name]
    assert all(f.evidence["momentum"] == pytest.approx(0.997) for f in found.findings if f.code == "SN108")
