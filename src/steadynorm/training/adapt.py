"""Running statistics drawn towards the data that a model meets when it is used.

Source: Schneider et al., Improving robustness against common corruptions by covariate shift adaptation (2020),
section 3, eq. 1: N/(N + n)·source + n/(N + n)·target, for mean and variance each. That leaves out the variance between
source and target; here they are merged as moments, so that it is in.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models, moments
from steadynorm.errors import InputError
from steadynorm.moments import Moments
from steadynorm.selection import Selection
from steadynorm.training.evaluation import call, unwrapped
from steadynorm.training.layer_inputs import Pool
from steadynorm.training.passes import (
    Batches,
    Forward,
    Method,
    Progress,
    Run,
    check_options,
)
from steadynorm.training.statistics import StatisticsReport, choose, exchange_


def adapt_(
    model: nn.Module,
    batches: Batches,
    *,
    prior: float,
    layers: Selection | None = None,
    method: Method = "one_pass",
    forward: Forward | None = None,
    group: Any = None,
    progress: Progress | None = None,
) -> StatisticsReport:
    """Merge the statistics of `model`, as if of `prior` samples, with those of target data.

    mean = (N·source + n·target) / (N + n)
    var = (N·source_var + n·target_var) / (N + n) + N·n / (N + n)² · (source − target)²,  N = prior, n target samples

    If the source statistics are those of N samples, the result of the first layer is that of all N + n together. One
    sample is enough: it weighs 1 / (N + 1). Weights stay as they are. "one_pass": each layer runs behind layers that
    are adapted to the batch alone, which is exact for a single batch; "layer_by_layer": behind layers that are adapted
    to all batches.

    Args:
        prior: N, the samples that the stored statistics count for; 0 forgets them, many keep them. 16 suits batches of
            one sample, 256 and more large shifts of which there is little data to be sure; it is the one thing to try.
        model, batches, layers, method, forward, group, progress: as `recalibrate_`.

    Returns: how far each layer moved, with `undo`. An `undo` goes back to the statistics from before this call; call it
        before you adapt to the next data, or what was adapted counts as source.

    Raises:
        InputError: an option or data that cannot be used; with prior=0 also one value per channel.
    """
    if not (prior >= 0 and math.isfinite(prior)):
        raise InputError(f"prior must be a number of samples from 0 on, such as 16, got {prior}.")
    check_options(method, None, None, batches)
    model = unwrapped(model)
    chosen, left_out = choose(model, layers)
    source = {path: tuple(t.double().clone() for t in models.running_statistics(m)) for path, m in chosen.items()}

    def merged(path: str, target: Moments, samples: int) -> Moments:
        mean, var = source[path]
        share = torch.as_tensor(target.count, dtype=torch.float64, device=target.mean.device) / max(samples, 1)
        known = Moments.from_unbiased(mean.to(target.mean.device), var.to(target.mean.device), prior * share)
        return moments.merge([known, target])

    def correct(path: str, batch: Moments, samples: int) -> tuple[Tensor, Tensor]:
        found = merged(path, batch, samples)
        return found.mean, found.unbiased_var

    def finish(path: str, pool: Pool) -> Moments:
        return merged(path, pool.all_values, run.samples_seen)

    run = Run(model, chosen, batches, forward or call, group, progress, correct=correct)
    pools = run.take(method, finish)
    return exchange_(
        chosen,
        {path: finish(path, pool) for path, pool in pools.items()},
        {},
        action=f"Adapted (prior of {prior:g} samples, {method.replace('_', ' ')})",
        **run.about(left_out, pools),
    )


@contextmanager
def adapted(model: nn.Module, batches: Batches, *, prior: float, **options: Any) -> Iterator[StatisticsReport]:
    """`adapt_` for the length of a block: afterwards, also after an exception, the statistics are those from before."""
    report = adapt_(model, batches, prior=prior, **options)
    try:
        yield report
    finally:
        report.undo()
