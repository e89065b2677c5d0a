"""What a look at a training step says: the rules of the monitor, over what was seen now and before."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.doctor.glimpse import Glimpse, Seen
from steadynorm.probe.facts import MATERIAL_DIVERGENCE

# What a monitor sees, and what of it rests on an optimizer.
CODES = ("SN002", "SN102", "SN202", "SN203", "SN302", "SN303", "SN304", "SN305")
OF_LEARNING = ("SN304", "SN305")
# Values behind a statistic below which its mean alone is off by a quarter of a deviation, even if all are unrelated.
FEW_VALUES = 16
# Looks in a row at which the statistics have to be away from the batch's.
PATIENCE = 3
# Of weights that move, running statistics lag behind. Healthy trainings of digits (batch sizes 4 to 128, learning rates
# 0.05 and 0.2) read at most 0.44 of the larger of these two from step 40 on, momenta of 0.0003 and 0 at least 12. FAR
# is a shift by half a deviation in every channel; CHANCE, a factor on what two halves of a batch read of each other.
FAR = 0.25
CHANCE = 5.0
SETTLED = 40


@dataclass
class History:
    """What a monitor remembers from look to look.

    Args:
        looks, settled: how many there were; those of them when running statistics could have settled.
        seen: norms that were called in a look.
        away: by path, how many looks in a row the running statistics were away from the batch's.
        frozen: norms that are frozen with what is around them, and with what.
    """

    looks: int = 0
    settled: int = 0
    seen: set[str] = field(default_factory=set)
    away: dict[str, int] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)


def judge(glimpse: Glimpse, history: History) -> Iterator[Finding]:
    """The faults that one look shows; `history` is brought up to date."""
    history.looks += 1
    history.seen.update(glimpse.norms)
    readings = glimpse.readings.by_path() if glimpse.readings else {}
    yield from _nonfinite(glimpse, readings)
    yield from _away(glimpse, readings, history)
    yield from _few(glimpse)
    yield from _moved(glimpse, history)
    yield from _unlearned(glimpse)


def frozen(model: nn.Module, layers: Mapping[str, nn.Module], paths: frozenset[str]) -> dict[str, str]:
    """The norms that are frozen with the block that they are in, or with the layer right before them."""
    found = {}
    for path, layer in layers.items():
        if any(parameter.requires_grad for parameter in layer.parameters()):
            continue
        block, _, name = path.rpartition(".")
        siblings = list(model.get_submodule(block)._modules)
        before = (
            [f"{block}.{each}".lstrip(".") for each in siblings[: siblings.index(name)]] if name in siblings else []
        )
        before = [each for each in before if any(True for _ in model.get_submodule(each).parameters())]
        others = [each for each in paths if each.startswith(f"{block}.") and each not in layers]
        if block in paths and others:
            found[path] = block
        elif before and before[-1] in paths:
            found[path] = before[-1]
    return found


def _nonfinite(glimpse: Glimpse, readings: Mapping[str, dict[str, float]]) -> Iterator[Finding]:
    """The first layer only: what is not finite goes through all that come after."""
    for name, code, what in (
        ("batch is finite", "SN002", "What reaches this layer holds values that are not finite"),
        ("statistics are finite", "SN202", "The running statistics of this layer are not finite"),
    ):
        broken = [path for path in glimpse.norms if path in readings and readings[path][name] == 0.0]
        if broken:
            yield Finding(
                code=code,
                severity="error",
                confidence="proved",
                where=broken[0],
                message=f"{what}, in step {glimpse.step}; it is the first of {len(broken)} such layers.",
                evidence={"step": glimpse.step, "layers": len(broken)},
                fix=Fix("Stop, go back to the last checkpoint that is finite, and look at the batch of this step."),
            )


def _away(glimpse: Glimpse, readings: Mapping[str, dict[str, float]], history: History) -> Iterator[Finding]:
    if glimpse.step < SETTLED:
        return
    history.settled += 1
    for path, found in readings.items():
        distance, chance = found["divergence"], found["chance"]
        threshold = max(FAR, CHANCE * chance)
        is_away = chance == chance and distance > threshold
        history.away[path] = history.away.get(path, 0) + 1 if is_away else 0
        if history.away[path] >= PATIENCE:
            yield Finding(
                code="SN203",
                severity="warning",
                confidence="measured",
                where=path,
                message=(
                    f"In the last {history.away[path]} looks the running statistics were not those of the batches: "
                    "evaluation now would be of another model than the one that trains."
                ),
                evidence={
                    "step": glimpse.step,
                    "divergence": distance,
                    "threshold": threshold,
                    "the same between halves of the batch": chance,
                    "material in a model at rest": MATERIAL_DIVERGENCE,
                },
                fix=Fix("Look at momentum and update_running of the layer; training.recalibrate_ before evaluation."),
            )


def _few(glimpse: Glimpse) -> Iterator[Finding]:
    known = {path: seen.values for path, seen in glimpse.norms.items() if seen.values is not None}
    if not known:
        return
    path = min(known, key=lambda each: known[each])
    if known[path] < FEW_VALUES:
        yield Finding(
            code="SN102",
            severity="warning",
            confidence="heuristic",
            where=path,
            message=(
                f"{known[path]} values stand behind each statistic of the batch: training normalises by noise, and "
                "evaluation by something else."
            ),
            evidence={"step": glimpse.step, "values": known[path], "threshold": FEW_VALUES},
            fix=Fix("Train with larger batches, take group norm, or synchronise over devices."),
        )


def _moved(glimpse: Glimpse, history: History) -> Iterator[Finding]:
    for path, seen in glimpse.norms.items():
        if seen.forward_updates and path in history.frozen:
            yield Finding(
                code="SN302",
                severity="warning",
                confidence="proved",
                where=path,
                message=f"Frozen with {history.frozen[path]}, and its running statistics move all the same.",
                evidence={"step": glimpse.step, "updates in the step": seen.forward_updates},
                fix=Fix("Freeze the norm too: steadynorm.training.freeze_, or FrozenBatchNorm in its place."),
            )
        if seen.backward_updates:
            yield _twice(path, seen, glimpse.step)


def _twice(path: str, seen: Seen, step: int) -> Finding:
    return Finding(
        code="SN303",
        severity="note",
        confidence="proved",
        where=path,
        message="Each training step updates its running statistics again in the backward pass, by recomputation.",
        evidence={
            "step": step,
            "updates in the forward pass": seen.forward_updates,
            "updates in the backward pass": seen.backward_updates,
        },
        fix=Fix("Let the layer skip the second update: steadynorm's batch norms do."),
    )


def _unlearned(glimpse: Glimpse) -> Iterator[Finding]:
    learned = glimpse.learned + glimpse.evaluating
    if glimpse.updating and learned:
        yield Finding(
            code="SN304",
            severity="note",
            confidence="proved",
            where="",
            message=(
                f"{glimpse.updating} of {glimpse.forwards} forwards in training mode moved the running statistics, and "
                "nothing was learned from them."
            ),
            evidence={"step": glimpse.step, "forwards": glimpse.forwards, "learned from": glimpse.learned},
            fix=Fix("Make the extra pass in evaluation mode, or inside training.transaction."),
        )
    evaluated = [path for path, seen in glimpse.norms.items() if seen.evaluated and not seen.forward_updates]
    if glimpse.evaluating and not glimpse.learned and evaluated:
        yield Finding(
            code="SN305",
            severity="warning",
            confidence="proved",
            where="",
            message="The optimizer steps while the model is in evaluation mode: its batch norms learn no statistics.",
            evidence={"step": glimpse.step, "layers": len(evaluated)},
            fix=Fix("Call model.train() before training; freeze what is meant to stay with training.freeze_."),
        )
