"""What was measured, by name and in words."""

from collections.abc import Collection

from steadynorm.doctor.finding import Severity
from steadynorm.probe import Facts
from steadynorm.probe.facts import Effect

# Change of the output, in what chance alone does. Over 48 conditions of two networks, 2.5 found 34 of the 35 in which
# recalibration gained 2 points of accuracy or more, with 1 alarm in the other 13; 5 had none.
WARNING_RATIO = 2.5
ERROR_RATIO = 5.0
# Beyond chance is not yet worth a warning: so much has to change, or to be gained.
WARNING_CHANGED, ERROR_CHANGED = 0.01, 0.05
WARNING_GAIN, ERROR_GAIN = 0.05, 0.25
# Where nothing is known of the task: change of the output in its own deviation.
WARNING_DISTANCE, ERROR_DISTANCE = 0.05, 0.25


AS_STORED, RECALIBRATED = "as stored", "recalibrated"
CONSEQUENCE = "consequence"
"""The entry of an evidence that `examine` moves to `Finding.consequence`."""


def as_evidence(effect: Effect, before: str = AS_STORED, after: str = RECALIBRATED) -> dict[str, float | int | str]:
    """The numbers of an effect by name, and what they mean; `before` and `after` are what its two sides are called."""
    what = "change of the output, in deviations" if effect.changed is None else "change of the class probabilities"
    named: dict[str, float | int | str] = {"samples": effect.samples, what: effect.distance}
    if effect.null is not None:
        named["the same by chance"] = effect.null
    if effect.changed is not None:
        named["predictions that change"] = effect.changed
    for name, pair in (("loss", effect.loss), (effect.metric_name, effect.metric)):
        if pair is not None:
            named |= {f"{name}, {before}": pair[0], f"{name}, {after}": pair[1]}
    named[CONSEQUENCE] = _consequence(effect, before, after)
    return named


def _consequence(effect: Effect, before: str, after: str) -> str:
    """What an effect means for the results, in a sentence."""
    refreshed = (before, after) == (AS_STORED, RECALIBRATED)
    how = "when this layer's statistics are refreshed" if refreshed else f"{after} instead of {before}"
    if effect.changed is not None:
        return f"{effect.changed:.0%} of predictions change {how}."
    return f"The output changes by {effect.distance:.2g} of its deviation {how}."


def in_words(effect: Effect, how: str = "with recalibrated ones") -> str:
    """What an effect means for the user of the model; `how` is what was done."""
    parts = []
    if effect.changed is not None:
        parts.append(f"{effect.changed:.0%} of the predictions change")
    for name, pair in ((effect.metric_name, effect.metric), ("loss", effect.loss)):
        if pair is not None:
            parts.append(f"{name} goes from {pair[0]:.3g} to {pair[1]:.3g}")
    if not parts:
        parts.append(f"the output changes by {effect.distance:.2g} of its deviation")
    return f"{how} " + ", ".join(parts)


def gain_of(effect: Effect) -> float | None:
    """Share of the loss that recalibration takes away; None where no loss is known."""
    if effect.loss is None:
        return None
    before, after = effect.loss
    return (before - after) / max(abs(before), 1e-12) if before == before else 1.0


def severity_of(effect: Effect) -> Severity:
    """From what exchanging the statistics does to the task, beyond what chance does."""
    ratio = effect.distance / max(effect.null or 0.0, 1e-12)
    gain, changed = gain_of(effect), effect.changed or 0.0
    if ratio < WARNING_RATIO or (gain is not None and gain < 0):
        return "note"
    if gain is None and effect.changed is None:
        changed, gain = 0.0, 0.0
        if ratio >= ERROR_RATIO and effect.distance >= ERROR_DISTANCE:
            return "error"
        return "warning" if effect.distance >= WARNING_DISTANCE else "note"
    if ratio >= ERROR_RATIO and (changed >= ERROR_CHANGED or (gain or 0.0) >= ERROR_GAIN):
        return "error"
    return "warning" if changed >= WARNING_CHANGED or (gain or 0.0) >= WARNING_GAIN else "note"


def judged(effect: Effect, facts: Facts, paths: Collection[str]) -> tuple[Severity, str]:
    """How bad it is that one of the layers `paths` is stale, all for one reason, and what it means in words.

    Alone each may change next to nothing, and mended alone it leaves the model as bad as it was: where no layer is
    stale for another reason, and all together are worth a warning, each of them is.
    """
    severity, words = severity_of(effect), in_words(effect)
    stale = {drift.path for drift in facts.drift.values() if drift.is_beyond_chance}
    together = facts.drift_together
    if severity != "note" or len(stale) < 2 or not stale <= set(paths) or together is None:
        return severity, words
    if severity_of(together) == "note":
        return severity, words
    return "warning", in_words(together, f"with recalibrated ones in all {len(stale)} such layers")
