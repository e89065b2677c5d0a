"""Momentum is the weight of the new batch: 0.99 in Keras is 0.01 here.

Why: PyTorch moves running statistics by `momentum` towards each batch, Keras, Flax and TensorFlow by one minus it. A
number carried over, or written down from a paper, makes evaluation depend on the last one or two training batches: it
jumps from checkpoint to checkpoint, and no seed explains it. A momentum of 1, statistics of the last batch and
nothing else, is what meta-learning asks for by intent; it is left alone.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.99), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.01), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/pytorch/vision/issues/8250
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)

# Momenta in use are 0.0003 to 0.4, and their Keras twins 0.9 to 0.9997: nothing is meant to lie between.
LARGEST = 0.5


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer that all but forgets every batch before the last."""
    for path, norm in facts.norms.items():
        if not norm.learns or norm.is_toggled or norm.momentum is None or not LARGEST <= norm.momentum < 1:
            continue
        yield Finding(
            code="SN108",
            severity="warning",
            confidence="proved",
            where=path,
            message=(
                f"With momentum {norm.momentum:g} the last training batch alone makes up {norm.momentum:.3g} of the "
                "running statistics: evaluation depends on which samples that batch holds."
            ),
            evidence={
                "momentum": norm.momentum,
                "threshold": LARGEST,
                "batches that count, as many alike": (2 - norm.momentum) / norm.momentum,
            },
            fix=Fix(
                f"Set momentum={1 - norm.momentum:.3g}, which is what the number means elsewhere.",
                apply=fixes.convert_momenta_,
                target=(path,),
            ),
        )
