"""Padding is no data, and does not belong into a mean.

Why: sequences are filled up to the longest of their batch. A group or instance norm over time then divides by numbers
that depend on how long the others were, also in evaluation: up to 0.9 of the output. A batch norm does it in training
only, where it mostly costs little (0.966 against 0.967 with a mask). Shown by filling up the same batch further: a norm
that is given the same where there is data, and makes something else of it, counts the padding.

Bad:
    lengths = torch.arange(16) + 8
    x = torch.randn(16, 4, 23) * (torch.arange(23) < lengths[:, None])[:, None]
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv1d(4, 8, 1), nn.AdaptiveMaxPool1d(1), nn.Flatten())
    batches = [x + 2 * (x != 0)]

Good:
    lengths = torch.arange(16) + 8
    x = torch.randn(16, 4, 23) * (torch.arange(23) < lengths[:, None])[:, None]
    model = nn.Sequential(nn.Conv1d(4, 8, 1), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.LayerNorm(8))
    batches = [x + 2 * (x != 0)]

Source: https://github.com/pytorch/pytorch/issues/70529; https://github.com/SeanNaren/deepspeech.pytorch/issues/312
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix, Severity
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)

# Change of the model's output, in its deviations: beyond the border effects of convolutions, which reach 0.02.
WARNING, ERROR = 0.05, 0.25


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for the first norm that counts padding in evaluation, and for the first that does in training."""
    padding = facts.padding
    if padding is None:
        return
    change = padding.change
    for path, when in ((padding.evaluating, "evaluation"), (padding.training, "training")):
        if not path:
            continue
        severity: Severity = "note"
        if when == "evaluation":
            severity = "error" if change is not None and change >= ERROR else "warning"
            severity = "note" if change is not None and change < WARNING else severity
        felt = ""
        if change is not None and when == "evaluation":
            felt = f"; the output moves by {change:.2g} of its deviation with half as much padding again"
        yield Finding(
            code="SN403",
            severity=severity,
            confidence="proved",
            where=path,
            message=(
                f"In {when} the statistics of this layer count the padding: what it makes of a sample depends on how "
                f"long the longest sequence of the batch is{felt}."
            ),
            evidence={
                "longest sequence": padding.longest,
                "shortest sequence": padding.shortest,
                **({} if change is None else {"change of the output": change, "warning from": WARNING}),
            },
            fix=Fix(
                "Give the norm the mask or the lengths (steadynorm's take both), or put sequences of a length together."
            ),
        )
