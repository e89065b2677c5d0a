"""What was measured, by name and in words."""

from steadynorm.probe.facts import Effect


def as_evidence(effect: Effect, before: str = "as stored", after: str = "recalibrated") -> dict[str, float | int | str]:
    """The numbers of an effect by name; `before` and `after` are what its two sides are called."""
    what = "change of the output, in deviations" if effect.changed is None else "change of the class probabilities"
    named: dict[str, float | int | str] = {"samples": effect.samples, what: effect.distance}
    if effect.null is not None:
        named["the same by chance"] = effect.null
    if effect.changed is not None:
        named["predictions that change"] = effect.changed
    for name, pair in (("loss", effect.loss), (effect.metric_name, effect.metric)):
        if pair is not None:
            named |= {f"{name}, {before}": pair[0], f"{name}, {after}": pair[1]}
    return named


def in_words(effect: Effect) -> str:
    """What an effect means for the user of the model."""
    parts = []
    if effect.changed is not None:
        parts.append(f"{effect.changed:.0%} of the predictions change")
    for name, pair in ((effect.metric_name, effect.metric), ("loss", effect.loss)):
        if pair is not None:
            parts.append(f"{name} goes from {pair[0]:.3g} to {pair[1]:.3g}")
    if not parts:
        parts.append(f"the output changes by {effect.distance:.2g} of its deviation")
    return "with recalibrated ones " + ", ".join(parts)
