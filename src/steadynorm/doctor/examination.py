"""A model is observed, and every rule says what it sees in the facts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from steadynorm import recipe as recipes
from steadynorm.doctor.diagnosis import Diagnosis, Judgement
from steadynorm.doctor.evidence import CONSEQUENCE
from steadynorm.doctor.finding import SEVERITIES, Finding
from steadynorm.doctor.pages import why_of
from steadynorm.doctor.rules import RULES, Rule, code_of, is_on
from steadynorm.doctor.source import locate, locate_piece
from steadynorm.errors import InputError, RecipeError
from steadynorm.probe import (
    AT_REST,
    COST_BATCH_SIZE,
    COSTS,
    PARTS,
    Facts,
    Loss,
    Metrics,
    Optimizers,
    Part,
    Progress,
    Source,
    Step,
    observe,
    stages,
)
from steadynorm.recipe import Recipe, call, seeded
from steadynorm.weights import first_few, unpacked

# Enough for the running statistics to settle with a momentum of 0.1, and for digits to be told apart (0.99).
TRAINING_STEPS = 100
NO_BATCHES = "no batches were given"
# The function of a recipe that a finding about no module points at, by the topic of its code; else model().
PIECES = {"SN002": "batches", "SN4": "batches", "SN7": "optimizer"}


def examine(
    model: nn.Module,
    batches: Source | None = None,
    *,
    train_batches: Source | None = None,
    loss: Loss | None = None,
    metrics: Metrics | None = None,
    optimizer: Optimizers | None = None,
    step: Step | None = None,
    across_ranks: bool = False,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> Diagnosis:
    """The normalization faults of `model`. It comes out exactly as it went in.

    Args:
        batches: of evaluation data, or a function that gives them. A batch is `inputs` or `(inputs, target, ...)`, as
            in a recipe. Without it nothing is run: what is stored is looked at, in a moment, and the rest is listed as
            not checked.
        train_batches: of training data; without them the rules about training are listed as not checked.
        loss: (output, batch) to a scalar. Without it, effects are told as changes of the output.
        metrics: (output, batch) to {name: number}, higher is better; the first one is used.
        optimizer: over the model's parameters, or a function that makes one from those that take a gradient.
        step: (model, batch), a training step of your own, looked at in place of forward, loss, backward and optimizer.
            The model, other networks and the optimizers that it calls are put back; what else it counts is not.
        across_ranks: every process of torch.distributed calls this, with its own copy of the model: their running
            statistics are compared. Where only one calls it, it waits for the others until the group's timeout.
        checkpoint: the state_dict that the model was loaded from, or its file (opened without running code): what it
            lacks of the running statistics was lost on load. It is not loaded here.
        select: codes, or beginnings of codes, of the rules to check; none is all but those that are off by default.
        ignore: codes, or beginnings of codes, of rules to leave out.
        on_progress: called with how much is done, and of how much.

    Raises:
        InputError: there is no batch, a code fits no rule, loss or metrics cannot be computed, or the checkpoint cannot
            be read or is of another model.
    """
    rules = _selected(select, ignore)
    needed = _needed(rules)
    state = None if checkpoint is None else unpacked(checkpoint)
    facts = observe(
        model,
        batches if batches is not None else (),
        forward=call,
        train_batches=train_batches if batches is not None else None,
        loss=loss,
        metrics=metrics,
        optimizer=optimizer,
        step=step,
        across_ranks=across_ranks,
        checkpoint=state,
        parts=needed if batches is not None else needed & AT_REST,
        on_progress=on_progress,
    )
    if batches is None:
        facts = replace(facts, skipped={**dict.fromkeys(set(PARTS) - AT_REST, NO_BATCHES), **facts.skipped})
    found = {code_of(rule): _checked(rule, facts, model) for rule in rules}
    unchecked = {}
    for rule in rules:
        missing = [facts.skipped[part] for part in rule.needs if part in facts.skipped]
        if missing and not found[code_of(rule)]:
            unchecked[code_of(rule)] = missing[0]
    findings = sorted((f for group in found.values() for f in group), key=lambda f: SEVERITIES.index(f.severity))
    return Diagnosis(
        findings=tuple(findings),
        checked=tuple(code for code in found if code not in unchecked),
        unchecked=unchecked,
        facts=facts,
        remarks=_remarks(facts),
        title=f"Diagnosis of {type(model).__name__}",
        judgement=Judgement(train_batches, loss, metrics, optimizer, step, state),
        off=tuple(code_of(rule) for rule in RULES if rule not in rules),
    )


def _needed(rules: Sequence[Rule]) -> set[Part]:
    """The parts of the probe that the rules need, or measure by."""
    return {part for rule in rules for part in (*rule.needs, *getattr(rule, "measures_by", ()))}


def _remarks(facts: Facts) -> tuple[str, ...]:
    """What a checkpoint says beyond the statistics that it lacks."""
    found, remarks = facts.checkpoint, []
    if found is None:
        return ()
    if found.differing:
        remarks.append(
            f"{found.differing} of {found.shared} tensors of the checkpoint are not what the model holds: it was not "
            "loaded, or the model has changed since. What is measured is the model as it is."
        )
    for names, what in (
        (found.missing_others, "The checkpoint lacks, or has in another shape"),
        (found.unknown_others, "The checkpoint has, and the model has not"),
    ):
        if names:
            remarks.append(f"{what}: {first_few(list(names))}.")
    return tuple(remarks)


def _checked(rule: Rule, facts: Facts, model: nn.Module) -> tuple[Finding, ...]:
    """What a rule finds, with the lines of code, the consequence and the cause that the rule itself does not know."""
    if all(facts.skipped.get(part) == NO_BATCHES for part in rule.needs):
        return ()
    found = []
    for finding in rule.check(facts):
        evidence = dict(finding.evidence)
        consequence = str(evidence.pop(CONSEQUENCE, ""))
        found.append(
            replace(
                finding,
                evidence=evidence,
                consequence=finding.consequence or consequence,
                cause=finding.cause or why_of(rule),
                source=finding.source or (locate(model, finding.where) if finding.where else None),
            )
        )
    return tuple(found)


def _selected(select: Sequence[str], ignore: Sequence[str]) -> tuple[Rule, ...]:
    codes = [code_of(rule) for rule in RULES]
    for prefix in (*select, *ignore):
        if not any(code.startswith(prefix.upper()) for code in codes) or not prefix:
            raise InputError(f"no rule has the code {prefix!r}: expected one of {', '.join(codes)}, or how they begin.")

    def fits(code: str, prefixes: Sequence[str]) -> bool:
        return any(code.startswith(prefix.upper()) for prefix in prefixes)

    chosen = [rule for rule in RULES if (fits(code_of(rule), select) if select else is_on(rule))]
    chosen = [rule for rule in chosen if not fits(code_of(rule), ignore)]
    if not chosen:
        raise InputError("no rule is left: select and ignore exclude each other.")
    return tuple(chosen)


def examine_recipe(
    recipe: Recipe,
    *,
    batch_size: int = 32,
    steps: int = TRAINING_STEPS,
    seed: int = 0,
    quick: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> tuple[nn.Module, Diagnosis]:
    """The model of a recipe, and its faults.

    A model without weights is first trained briefly, so that its statistics mean something; the diagnosis says so.

    Args:
        batch_size: of the training and of all batches that are looked at.
        steps: of the brief training.
        seed: of the model, the training and the training batches.
        quick: make the model and look at what it has stored, run nothing.
    """
    advance = on_progress or (lambda done, total: None)
    needed = _needed(_selected(select, ignore))
    looking = sum(COSTS[stage] for stage in stages(needed, has_train_batches=True))
    is_trained = not recipe.has_weights and recipe.loss is not None
    training = max(1, round(steps * batch_size / COST_BATCH_SIZE)) if is_trained else 0
    total = training + looking
    with seeded(seed):
        model = recipe.model()
    if quick:
        found = examine(model, checkpoint=recipe.state, select=select, ignore=ignore, on_progress=on_progress)
        return model, _of_recipe(found, recipe, ("Quick: the model was made and looked at, and nothing was run.",))
    remarks = []
    if not recipe.has_weights:
        remarks.append(
            _trained(
                model, recipe, batch_size, steps, seed, lambda step, _: advance(round(training * step / steps), total)
            )
        )
    make = recipe.optimizer
    diagnosis = examine(
        model,
        lambda: recipe.batches("test", batch_size, 0),
        train_batches=lambda: recipe.batches("train", batch_size, seed),
        loss=recipe.loss,
        metrics=recipe.metrics,
        optimizer=None if make is None else lambda parameters: make(parameters, recipe.lr),
        checkpoint=recipe.state,
        select=select,
        ignore=ignore,
        on_progress=lambda done, _: advance(training + done, total),
    )
    return model, _of_recipe(diagnosis, recipe, tuple(remarks))


def _of_recipe(diagnosis: Diagnosis, recipe: Recipe, remarks: tuple[str, ...]) -> Diagnosis:
    """The diagnosis under the name of the recipe; findings without a line of code point at a function of the recipe."""
    findings = []
    for finding in diagnosis.findings:
        piece = next((name for code, name in PIECES.items() if finding.code.startswith(code)), "model")
        findings.append(replace(finding, source=finding.source or locate_piece(recipe, piece)))
    remarks = (*remarks, *diagnosis.remarks)
    return replace(diagnosis, findings=tuple(findings), remarks=remarks, title=f"Diagnosis of {recipe.name}")


def _trained(
    model: nn.Module, recipe: Recipe, batch_size: int, steps: int, seed: int, on_step: Callable[[int, float], None]
) -> str:
    """Train briefly; what was done, or why it could not be, in a sentence."""
    if recipe.loss is None:
        return "No weights were given and the recipe has no loss: the model was examined as it was made."
    try:
        recipes.train(model, recipe, batch_size=batch_size, steps=steps, lr=recipe.lr, seed=seed, on_step=on_step)
    except RecipeError as error:
        return f"No weights were given, and training stopped: {error}"
    return f"No weights were given: the model was first trained for {steps} steps at batch size {batch_size}."
