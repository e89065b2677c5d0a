"""Averaged weights need statistics of their own.

Why: the average of weights over the training (EMA, SWA) is another network, and the statistics that fit it are neither
those of the last weights, which some wrappers copy, nor the average of theirs, which others take: of digits the copied
ones gave 0.972, averaged ones 0.682, and both 0.994 after one pass over the data. Found where the model is such a
wrapper, or holds one; what it costs is measured by exchanging the statistics.

Bad:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(net[1].bias)
    model = torch.optim.swa_utils.AveragedModel(net)
    for x in batches * 10:
        net(x * 3)
    model.update_parameters(net)

Good:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(net[1].bias)
    model = torch.optim.swa_utils.AveragedModel(net)
    model.update_parameters(net)
    torch.optim.swa_utils.update_bn(batches, model)

Source: Izmailov et al., Averaging Weights Leads to Wider Optima, arXiv 1803.05407, section 3.2;
https://github.com/lucidrains/ema-pytorch/issues/8
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, gain_of, in_words, severity_of
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("drift",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm of averaged weights whose statistics are farther from the data than chance."""
    for path, by in facts.averaged.items():
        drift = facts.drift.get(path)
        if path in facts.lost or drift is None or not drift.is_beyond_chance or drift.effect is None or facts.is_fresh:
            continue
        severity, gain = severity_of(drift.effect), gain_of(drift.effect)
        fix = Fix("Recalibrate the statistics of the averaged weights.", True, fixes.recalibrate_, (path,))
        if severity == "note" or (gain is not None and gain < 0):
            fix = Fix("Recalibrate after the last update of the average: so far it changes next to nothing.")
        yield Finding(
            code="SN204",
            severity=severity,
            confidence="measured",
            where=path,
            message=(
                f"The weights are averaged by {by}, and the statistics of this layer are not those of the data under "
                f"them; {in_words(drift.effect)}."
            ),
            evidence={"averaged by": by, "divergence": drift.divergence, **as_evidence(drift.effect)},
            fix=fix,
        )
