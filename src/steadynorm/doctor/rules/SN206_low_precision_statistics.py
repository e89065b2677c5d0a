"""Running statistics in half precision stop moving before they arrive.

Why: an update adds momentum times a difference. In bfloat16, with 8 bits, whatever is less than 1/256 of the number is
rounded away: with a momentum of 0.003, a mean on its way from 0 to 3 stopped at 1.01. Layers of steadynorm keep their
statistics in float32 when a model is cast. In a model that is only evaluated the cast costs a rounding, and is a note.

Bad:
    data = [5 + torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.003), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    model.bfloat16()
    batches = [x.bfloat16() for x in data]
    for x in batches * 50:
        model(x)

Good:
    data = [5 + torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), steadynorm.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    model.bfloat16()
    batches = [x.bfloat16() for x in data]
    for x in batches * 50:
        model(x)

Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.3.
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, in_words, severity_of
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)

# Half the distance to the next number, relative: an update that is less changes nothing.
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each such layer that would move in training; more than a note where it has drifted already."""
    for path, norm in facts.norms.items():
        if norm.statistics_dtype not in ROUNDING or not norm.learns or norm.state_fault not in ("", "half"):
            continue
        rounding = ROUNDING[norm.statistics_dtype]
        evidence: dict[str, float | int | str] = {"dtype": norm.statistics_dtype, "rounding": rounding}
        message = f"The running statistics are {norm.statistics_dtype}"
        if norm.momentum:
            evidence["momentum"] = norm.momentum
            evidence["stalls at this distance, relative"] = rounding / norm.momentum
            message += f", which stalls up to {rounding / norm.momentum:.0%} away from those of the data"
        drift = facts.drift.get(path)
        fix, effect = Fix("None needed to evaluate. For training keep the layer in float32."), None
        if drift is not None and drift.is_beyond_chance and not facts.is_fresh:
            effect = drift.effect
        if effect is not None:
            evidence |= {"divergence": drift.divergence if drift else 0.0, **as_evidence(effect)}
            message += f"; {in_words(effect)}"
            text = "Keep the layer in float32 and recalibrate its statistics from the data."
            fix = Fix(text, True, fixes.widen_, (path,))
        yield Finding(
            code="SN206",
            severity="note" if effect is None else severity_of(effect),
            confidence="proved" if effect is None else "measured",
            where=path,
            message=f"{message}.",
            evidence=evidence,
            fix=fix,
        )
