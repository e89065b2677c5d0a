"""Runs batches through a model and records Facts. The model comes out exactly as it went in."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.probe.audit import Step
from steadynorm.probe.batches import Source
from steadynorm.probe.effects import Loss, Metrics, Task
from steadynorm.probe.facts import AT_REST, PARTS, Facts, Part
from steadynorm.probe.observer import COST_BATCH_SIZE, COSTS, Observer, Progress, Training, stages
from steadynorm.probe.optimizer import Optimizers, made
from steadynorm.probe.trace import Forward

__all__ = [
    "AT_REST",
    "COSTS",
    "COST_BATCH_SIZE",
    "PARTS",
    "SAMPLES",
    "Facts",
    "Forward",
    "Loss",
    "Metrics",
    "Optimizers",
    "Part",
    "Progress",
    "Source",
    "Step",
    "observe",
    "stages",
]

# Two halves of 300 samples read a divergence of up to 0.008 from each other, just below what matters (0.01).
SAMPLES = 256


def observe(
    model: nn.Module,
    batches: Source,
    *,
    forward: Forward,
    train_batches: Source | None = None,
    loss: Loss | None = None,
    metrics: Metrics | None = None,
    optimizer: Optimizers | None = None,
    step: Step | None = None,
    across_ranks: bool = False,
    checkpoint: Mapping[str, Tensor] | None = None,
    parts: Collection[Part] = PARTS,
    samples: int = SAMPLES,
    on_progress: Progress | None = None,
) -> Facts:
    """What can be seen of `model` by running a few batches through it.

    A forward that raises is a fact like any other: the parts that need it are in `skipped`, with the reason.

    Args:
        batches: of evaluation data, or a function that gives them.
        forward: how the model is called on a batch: `recipe.call`.
        train_batches: of training data. Without them the statistics are held against those of `batches`, and what
            depends on the size of the training batches is skipped.
        loss, metrics: (output, batch) to a scalar; to {name: number}, of which the first counts.
        optimizer: over the model's parameters, or a function that makes one from those that take a gradient.
        step: (model, batch), a training step of the user's own, in place of forward, loss, backward and optimizer.
        across_ranks: every process of the group does this, with the same model: running statistics are compared.
        checkpoint: what the model was loaded from, by name, without what wrappers put before the names.
        parts: which parts to look at.
        samples: how many of each split go through the model.

    Raises:
        InputError: there is no batch, the model has parameters without values, loss or metrics cannot be computed,
            `optimizer` is none, there are no processes to compare, or the checkpoint is of another model.
        DistributedError: another process is gone.
    """
    if missing := models.unmade_parts(model):
        raise InputError(
            f"the model has parameters without values ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): "
            "move it off the meta device, or run a batch through its lazy layers first."
        )
    made_of = None if optimizer is None else made(optimizer, model)
    training = Training(made_of, step, is_known=optimizer is not None, across_ranks=across_ranks, checkpoint=checkpoint)
    sources = [s for s in (batches, train_batches) if s is not None]
    generators = [g for s in sources if isinstance(g := getattr(s, "generator", None), torch.Generator)]
    with models.undisturbed(model, *generators):
        observer = Observer(model, forward, Task(loss, metrics), training, frozenset(parts), on_progress)
        observer.look(batches, train_batches, samples)
    return Facts(**observer.found, failures=tuple(observer.failures), skipped=observer.skipped)
