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
from steadynorm.doctor.evidence import as_evidence, judged
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import Norm

needs: tuple[Part, ...] = ("state",)

# Half the distance to the next number, relative: an update that is less changes nothing.
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each such layer that has drifted, and one note for all others that would move in training."""
    quiet: list[Norm] = []
    low = [path for path, norm in facts.norms.items() if norm.state_fault == "half"]
    for path, norm in facts.norms.items():
        if norm.statistics_dtype not in ROUNDING or not norm.learns:
            continue
        if norm.state_fault in ("broken", "toggled") or (norm.state_fault == "default" and not facts.is_fresh):
            continue
        drift = facts.drift.get(path)
        if facts.is_fresh or drift is None or drift.effect is None or not drift.is_beyond_chance:
            quiet.append(norm)
            continue
        severity, words = judged(drift.effect, facts, low)
        yield Finding(
            code="SN206",
            severity=severity,
            confidence="measured",
            where=path,
            message=f"The running statistics are {norm.statistics_dtype}{_stall(norm)}; {words}.",
            evidence={**_evidence(norm), "divergence": drift.divergence, **as_evidence(drift.effect)},
            fix=Fix(
                "Keep the layer in float32 and recalibrate its statistics from the data.", True, fixes.widen_, (path,)
            ),
        )
    if quiet:
        yield Finding(
            code="SN206",
            severity="note",
            confidence="proved",
            where=quiet[0].path if len(quiet) == 1 else "",
            message=f"Running statistics are {quiet[0].statistics_dtype}{_stall(quiet[0])}.",
            evidence={"layers": len(quiet), **_evidence(quiet[0])},
            fix=Fix("None needed to evaluate. For training keep the norm layers in float32."),
        )


def _stall(norm: Norm) -> str:
    if not norm.momentum:
        return ""
    return f", which in training stall up to {ROUNDING[str(norm.statistics_dtype)] / norm.momentum:.0%} from the data"


def _evidence(norm: Norm) -> dict[str, float | int | str]:
    rounding = ROUNDING[str(norm.statistics_dtype)]
    found: dict[str, float | int | str] = {"dtype": str(norm.statistics_dtype), "rounding": rounding}
    if norm.momentum:
        found |= {"momentum": norm.momentum, "stalls at this distance, relative": rounding / norm.momentum}
    return found
