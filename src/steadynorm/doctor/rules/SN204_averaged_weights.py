"""Averaged weights need statistics of their own.

Why: the average of weights over the training (EMA, SWA) is another network, and the statistics that fit it are neither
those of the last weights, which some wrappers copy, nor the average of theirs, which others take: of digits the copied
ones gave 0.972, averaged ones 0.682, and both 0.994 after one pass over the data. Found where the model is such a
wrapper, or holds one; what it costs is measured by exchanging the statistics. Target networks and teachers whose
parameters are copied, or follow step by step, and whose buffers are not, are found where a training step calls them in
evaluation mode: their statistics were never learned, or are others than the original's although every parameter is the
same.

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
https://github.com/lucidrains/ema-pytorch/issues/8; https://github.com/DLR-RM/stable-baselines3/issues/996
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, gain_of, in_words, severity_of
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import MATERIAL_DIVERGENCE

needs: tuple[Part, ...] = ("drift",)
measures_by: tuple[Part, ...] = ("audit",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm of averaged weights whose statistics are farther from the data than chance.

    And for each norm of a copy that a training step evaluates, with statistics that the copy was not given.
    """
    yield from _copies(facts)
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


def _copies(facts: Facts) -> Iterator[Finding]:
    if facts.audit is None:
        return
    for path, stale in facts.audit.stale_copies.items():
        step = facts.audit.helpers.get(path) or facts.audit.norms.get(path)
        if step is None or step.trained or path in facts.averaged:
            continue
        why = "the parameters follow, and its running statistics are those that it was made with"
        if not stale.is_initial:
            why = "all parameters are the same, and its running statistics are others"
        yield Finding(
            code="SN204",
            severity="warning",
            confidence="measured",
            where=path,
            message=f"This layer is in a copy of the trained network, which the training step evaluates: {why}.",
            evidence={"divergence from the original": stale.divergence, "threshold": MATERIAL_DIVERGENCE},
            fix=Fix("Copy the buffers with the parameters (load_state_dict), or average both: training.AveragedModel."),
        )
