"""Inputs that are not prepared as in training are told by the first batch norm, and how.

Why: pixels from 0 to 255 for 0 to 1, a mean and deviation that were forgotten or taken twice, channels in another
order: nothing raises, and accuracy falls by some points or by all. The statistics of the first norm were learned on
inputs as they were; each usual preparation is tried on the way to it, and the one that fits, if one does and no other
nearly, is named. Where none does, the mean and the deviation of the training batches are tried, if those of the inputs
are far from them. With blurred or otherwise changed contents none fits, and the rule is silent.

Bad:
    images = [torch.rand(64, 3, 8, 8) * torch.tensor([0.4, 0.7, 1.0]).view(3, 1, 1) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in images * 20:
        model(x)
    batches = [255 * x for x in images]

Good:
    images = [torch.rand(64, 3, 8, 8) * torch.tensor([0.4, 0.7, 1.0]).view(3, 1, 1) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in images * 20:
        model(x)
    batches = images

Source: https://github.com/zylo117/Yet-Another-EfficientDet-Pytorch/issues/261
"""

from collections.abc import Iterator

from steadynorm.doctor.evidence import as_evidence, in_words, severity_of
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("drift",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for the evaluation batches."""
    found = facts.correction
    if found is None or facts.is_fresh:
        return
    yield Finding(
        code="SN405",
        severity="note" if found.effect is None else severity_of(found.effect),
        confidence="measured",
        where="",
        message=(
            f"The inputs are not those that the model was trained on: {found.name}, and they are"
            + ("." if found.effect is None else f"; {in_words(found.effect, 'so corrected')}.")
        ),
        evidence={
            "first norm": found.norm,
            "divergence as given": found.as_given,
            "divergence corrected": found.corrected,
            "divergence of the runner-up": found.runner_up,
            "corrections tried": found.tried,
            **({} if found.effect is None else as_evidence(found.effect, "as given", "corrected")),
        },
        fix=Fix(f"Prepare the inputs as in training: {found.name}."),
    )
