"""An instance norm that tracks running statistics is no instance norm in evaluation.

Why: in training each sample is normalised by itself, in evaluation all of them by an average over samples, which
removes no style and no contrast of the single image. The model that is evaluated is another than the one that was
trained. It is asked for at times, for inputs so small that their own statistics are noise.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.InstanceNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/KupynOrest/DeblurGAN/issues/94
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each such layer: a note, since what it does to the task is not measured."""
    for path, norm in facts.norms.items():
        if norm.kind != "instance" or not norm.has_statistics or norm.is_toggled:
            continue
        yield Finding(
            code="SN114",
            severity="note",
            confidence="proved",
            where=path,
            message=(
                "Training normalises each sample by itself, evaluation all samples by the running statistics: the "
                "two are different models."
            ),
            evidence={"batches tracked": norm.batches_tracked or 0},
            fix=Fix(
                "Construct the layer with track_running_stats=False and drop running_mean, running_var and "
                "num_batches_tracked from the checkpoint, then evaluate again."
            ),
        )
