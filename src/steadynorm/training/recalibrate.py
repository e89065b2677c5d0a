"""Running statistics anew from data, pooled exactly whatever the batches are.

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3 (PreciseBN). Unlike there, every
batch counts by its values, and the variance between batches is part of the variance.
"""

from typing import Any

from torch import nn

from steadynorm.selection import Selection
from steadynorm.training.evaluation import call, unwrapped
from steadynorm.training.passes import (
    Batches,
    Forward,
    Method,
    Progress,
    Run,
    check_options,
    standard_error,
)
from steadynorm.training.statistics import StatisticsReport, choose, exchange_


def recalibrate_(
    model: nn.Module,
    batches: Batches,
    *,
    layers: Selection | None = None,
    method: Method = "one_pass",
    samples: int | None = None,
    tolerance: float | None = None,
    forward: Forward | None = None,
    group: Any = None,
    progress: Progress | None = None,
) -> StatisticsReport:
    """Give the batch norms of `model` the statistics of the data: those of all batches concatenated.

    Everything runs in evaluation mode, without gradients: no dropout, nothing counted. "one_pass" takes all layers in
    one pass; each normalises by its own batch, as in training, so that no stale layer spoils those after it.
    "layer_by_layer" takes one layer a pass, behind layers that have their new statistics: what evaluation will see.

    Under torch.distributed all processes must call this, each with batches of its own, as many as it has; they end with
    the same bits. A failure anywhere, an interrupt too, leaves the model as it was, on every process.

    Args:
        model: with torch.nn's batch norms or ours. A wrapper (DDP, torch.compile) is looked through.
        batches: tensors, tuples that begin with the input, or dictionaries of arguments; or a function that gives
            them. For "layer_by_layer" they are gone through again and again: no iterator.
        layers: which: patterns for their names, classes, or a function of name and layer; all by default. Frozen ones
            are never touched.
        samples: enough, in all processes together. The first batch that reaches it is the last; it is an error if the
            data ends before.
        tolerance: enough, as the standard error of mean and deviation, in deviations, of the worst channel of all
            layers. Values of a sample may resemble each other, samples of a batch too; but the batches must be in
            random order. Not before 8 batches.
        forward: called as forward(model, batch), in place of model(batch), model(*args) or model(**dict).
        group: processes to pool over; the default group where there is one.
        progress: called after every batch.

    Returns: how far each layer moved, with `undo`.

    Raises:
        InputError: an option or data that cannot be used.
        NonFiniteStatisticsError: NaN or infinite values reached a layer.
        DistributedError: another process failed, or is gone.
    """
    check_options(method, samples, tolerance, batches)
    model = unwrapped(model)
    chosen, left_out = choose(model, layers)
    run = Run(model, chosen, batches, forward or call, group, progress, samples, tolerance)
    pools = run.take(method)
    return exchange_(
        chosen,
        {path: pool.all_values for path, pool in pools.items()},
        {path: standard_error(chosen[path], pool) for path, pool in pools.items()},
        action=f"Recalibrated ({method.replace('_', ' ')})",
        **run.about(left_out, pools),
    )
