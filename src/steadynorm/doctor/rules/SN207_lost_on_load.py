"""A checkpoint without the running statistics of a layer leaves the layer those that it was made with.

Why: buffers are no parameters. A checkpoint that keeps `parameters()` only has none, nor has what a server averages in
federated learning; `load_state_dict(strict=False)` then says nothing, nor does it where a layer has another name in the
checkpoint. Seen by holding the checkpoint against the model: give it to `examine`, or to `steadynorm doctor` as
`--weights`. What it costs is measured by exchanging the statistics for those of the data; layers that lost theirs
together are one fault. A counter that alone is missing is harmless, but to a cumulative average (`momentum=None`): the
next training batch replaces what was learned.

Bad:
    batches = [3 + torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    checkpoint = dict(model.named_parameters())
    model.load_state_dict(checkpoint, strict=False)

Good:
    batches = [3 + torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in batches * 20:
        model(x)
    checkpoint = model.state_dict()
    model.load_state_dict(checkpoint)

Source: https://github.com/DLR-RM/stable-baselines3/issues/996; https://github.com/SymbioticLab/FedScale/issues/57
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, judged
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import Norm
from steadynorm.probe.training_facts import Checkpoint
from steadynorm.weights import first_few

needs: tuple[Part, ...] = ("checkpoint",)
measures_by: tuple[Part, ...] = ("drift",)

COUNTER = "num_batches_tracked"


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer that lost what it goes by; one for all whose statistics fit the data all the same."""
    if facts.checkpoint is None:
        return
    fitting = []
    for path in facts.lost:
        drift = facts.drift.get(path)
        if facts.norms[path].state_fault == "broken":
            continue  # SN202
        if drift is not None and not drift.is_beyond_chance:
            fitting.append(path)
        else:
            yield _lost(path, facts, facts.checkpoint)
    if fitting:
        yield Finding(
            code="SN207",
            severity="note",
            confidence="measured",
            where="",
            message="The checkpoint lacks running statistics that the model has; those of the model fit the data.",
            evidence={"layers": len(fitting), "of them": first_few(fitting)},
            fix=Fix("Save model.state_dict() again, buffers and all."),
        )
    yield from _counters(facts, facts.checkpoint)
    yield from _homeless(facts, facts.checkpoint)


def _lost(path: str, facts: Facts, checkpoint: Checkpoint) -> Finding:
    norm, drift = facts.norms[path], facts.drift.get(path)
    evidence: dict[str, float | int | str] = {"not in the checkpoint": ", ".join(checkpoint.missing[path])}
    if checkpoint.homeless:
        evidence["statistics under names that the model has not"] = first_few(list(checkpoint.homeless))
    goes_by = "those that it was made with" if norm.has_initial_statistics else "those that it had before"
    message = f"The checkpoint has no running statistics of this layer, and the model goes by {goes_by}"
    if drift is None or drift.effect is None:
        return Finding(
            code="SN207",
            severity="error" if norm.has_initial_statistics else "warning",
            confidence="proved" if norm.has_initial_statistics else "heuristic",
            where=path,
            message=f"{message}.",
            evidence=evidence,
            fix=Fix("Load a whole state_dict, or recalibrate the statistics from the data."),
        )
    severity, words = judged(drift.effect, facts, facts.lost)
    fix = Fix("Recalibrate the statistics from the data.", True, fixes.recalibrate_, (path,))
    if severity == "note":
        fix = Fix("Load a whole state_dict, or recalibrate: so far it changes next to nothing.")
    return Finding(
        code="SN207",
        severity=severity,
        confidence="measured",
        where=path,
        message=f"{message}; {words}.",
        evidence={**evidence, "divergence": drift.divergence, **as_evidence(drift.effect)},
        fix=fix,
    )


def _counters(facts: Facts, checkpoint: Checkpoint) -> Iterator[Finding]:
    for path, names in checkpoint.missing.items():
        norm = facts.norms[path]
        if names != (COUNTER,) or not norm.learns or norm.momentum is not None or norm.batches_tracked:
            continue
        yield Finding(
            code="SN207",
            severity="warning",
            confidence="proved",
            where=path,
            message=(
                "The checkpoint has no counter for this cumulative average: the first batch of a training that goes on "
                "replaces the running statistics."
            ),
            evidence={"not in the checkpoint": COUNTER, "batches tracked": 0},
            fix=Fix("Set num_batches_tracked to the batches that the statistics have seen, or give it a momentum."),
        )


def _homeless(facts: Facts, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Statistics that were saved and that the model has no place for."""
    known = [path for path in checkpoint.homeless if _has_no_place(facts.norms.get(path))]
    for path in known:
        norm = facts.norms[path]
        instead = "the batch" if norm.kind in ("batch", "sync") else f"the sample ({norm.class_name})"
        yield Finding(
            code="SN207",
            severity="warning",
            confidence="proved",
            where=path,
            message=(
                "The checkpoint has running statistics of this layer and the model has no place for them: it "
                f"normalises by {instead}, not as what was saved."
            ),
            evidence={"in the checkpoint": ", ".join(checkpoint.homeless[path])},
            fix=Fix("Make the layer as it was when the checkpoint was saved."),
        )
    if (rest := [path for path in checkpoint.homeless if path not in known]) and not facts.lost:
        yield Finding(
            code="SN207",
            severity="note",
            confidence="proved",
            where="",
            message="The checkpoint has running statistics of layers that the model does not have.",
            evidence={"layers": len(rest), "of them": first_few(rest)},
        )


def _has_no_place(norm: Norm | None) -> bool:
    return norm is not None and not norm.has_statistics
