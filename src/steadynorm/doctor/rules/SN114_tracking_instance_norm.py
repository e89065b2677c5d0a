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

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, gain_of, in_words
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import Effect

needs: tuple[Part, ...] = ("forward",)

# Shares of the loss and of the metric that normalising each sample by itself has to gain; of 128 samples, an accuracy
# of 0.2 moves by a sixth for no reason. Where nothing is known of the task: how much has to change.
LOSS_GAIN, METRIC_GAIN, CHANGED = 0.05, 0.25, 0.05


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each such layer: a warning where evaluation is better off as training does it."""
    gap = facts.instance_gap
    for path, norm in facts.norms.items():
        if gap is None or norm.kind != "instance" or not norm.has_statistics:
            continue
        yield Finding(
            code="SN114",
            severity="warning" if _matters(gap) and not facts.is_fresh else "note",
            confidence="measured",
            where=path,
            message=(
                "Training normalises each sample by itself, evaluation all of them by the running statistics; "
                f"{in_words(gap, 'with each sample by itself')}."
            ),
            evidence=as_evidence(gap, after="each sample by itself"),
            fix=Fix(
                "Construct the layer with track_running_stats=False and drop running_mean, running_var and "
                "num_batches_tracked from the checkpoint, then evaluate again.",
                apply=fixes.forget_,
                target=(path,),
            ),
        )


def _matters(gap: Effect) -> bool:
    gain = gain_of(gap)
    if gap.metric is not None and gap.metric[1] - gap.metric[0] >= METRIC_GAIN * max(abs(gap.metric[0]), 1e-12):
        return True
    if gain is not None:
        return gain >= LOSS_GAIN
    return (gap.distance if gap.changed is None else gap.changed) >= CHANGED
