"""Statistics of several models as one: of clients, of domains, of the processes of one training run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models, moments
from steadynorm.errors import InputError
from steadynorm.moments import Moments
from steadynorm.selection import Selection
from steadynorm.training.evaluation import unwrapped
from steadynorm.training.processes import gathered
from steadynorm.training.statistics import StatisticsReport, choose, exchange_

MEAN, VAR, BATCHES = "running_mean", "running_var", "num_batches_tracked"

# Any count of at least two gives the unbiased variance back that is put in.
WITHOUT_COUNT = 2

Counts = Sequence[float | Mapping[str, float]]


def merge_statistics(state_dicts: Sequence[Mapping[str, Any]], counts: Counts) -> dict[str, Tensor]:
    """The running statistics of the data of several models together, from their state_dicts.

    mean = Σ n·mean_i / Σ n;  var = Σ n·(var_i + (mean_i − mean)²) / Σ n,  Bessel's factor taken out and put back

    Averaging the variances, as federated averaging does, leaves out the variance between clients: where their data
    differs, the result is too small.

    Args:
        state_dicts: with the same layers.
        counts: of each, how many values stand behind a statistic, or how many samples (which differs by Bessel's
            factor only, 1 / n); 0 leaves it out. Or, of each, a dictionary by layer ("layer1.0.bn1"). No shares of 1.

    Returns: running_mean, running_var, and the sum of num_batches_tracked of every layer, in the dtypes of the first;
        nothing else. What becomes of weights is not for statistics to say: `model.load_state_dict(merged,
        strict=False)` keeps those of `model`, which have to be the weights that the statistics were taken with.
        Statistics of averaged weights are in no client: `recalibrate_` them if there is data.

    Raises:
        InputError: nothing to merge, other layers or shapes, counts that are no weights, statistics that are not finite
            or kept by domain or step.
    """
    if not state_dicts or len(state_dicts) != len(counts):
        raise InputError(
            f"merge_statistics got {len(state_dicts)} state_dicts and {len(counts)} counts: give at least one of each,"
            " and as many."
        )
    layers = [_layers_of(state) for state in state_dicts]
    if not layers[0]:
        raise InputError("the first state_dict has no running_mean with a running_var: nothing to merge.")
    for number, found in enumerate(layers):
        if odd := sorted(set(layers[0]) ^ set(found)):
            raise InputError(f"state_dict {number} and the first differ in the layers {', '.join(odd[:3])}.")
    merged: dict[str, Tensor] = {}
    for prefix in layers[0]:
        merged |= _merge_layer(prefix, state_dicts, [_count(given, prefix, i) for i, given in enumerate(counts)])
    return merged


def _layers_of(state: Mapping[str, Any]) -> list[str]:
    return [
        key.removesuffix(MEAN) for key in state if key.split(".")[-1] == MEAN and f"{key[: -len(MEAN)]}{VAR}" in state
    ]


def _count(given: float | Mapping[str, float], prefix: str, number: int) -> float:
    path = prefix.removesuffix(".")
    if isinstance(given, Mapping):
        if path not in given:
            raise InputError(f"counts of state_dict {number} have no {path!r}: give every layer one.")
        given = given[path]
    return _checked(given, f"counts of state_dict {number}")


def _checked(count: float, what: str) -> float:
    if count != 0 and not 2 <= count < float("inf"):
        raise InputError(
            f"{what} got {count}, expected a number of values or samples, at least 2, or 0 to leave it out: of fewer"
            " the variance is not known, and shares of 1 do not say how many there are."
        )
    return float(count)


def _merge_layer(prefix: str, states: Sequence[Mapping[str, Any]], counts: list[float]) -> dict[str, Tensor]:
    like = states[0][prefix + MEAN]
    n = torch.tensor(counts, dtype=torch.float64)
    if not bool(n.sum() > 0):
        raise InputError(f"counts of {prefix.removesuffix('.')} are all 0: give at least one a positive number.")
    rows = []
    for number, state in enumerate(states):
        mean, var = (state[prefix + name].detach().double().cpu() for name in (MEAN, VAR))
        if mean.dim() != 1 or mean.shape != like.shape or var.shape != like.shape:
            raise InputError(
                f"{prefix}{MEAN} of state_dict {number} has shape {tuple(mean.shape)}, expected one statistic per"
                f" channel, {tuple(like.shape)} as in the first. Layers by domain have merge_domains()."
            )
        if counts[number] and not bool((torch.isfinite(mean) & torch.isfinite(var) & (var >= 0)).all()):
            raise InputError(f"{prefix}{MEAN} or {prefix}{VAR} of state_dict {number} is negative or not finite.")
        rows.append((mean, var))
    known = Moments.from_unbiased(torch.stack([m for m, _ in rows]), torch.stack([v for _, v in rows]), n[:, None])
    pooled = moments.merge_rows(Moments(known.mean, known.var, n))
    found = {prefix + MEAN: pooled.mean.to(like), prefix + VAR: pooled.unbiased_var.to(states[0][prefix + VAR])}
    tracked = [state[prefix + BATCHES] for state in states if prefix + BATCHES in state]
    if len(tracked) == len(states):
        found[prefix + BATCHES] = torch.stack([t.detach().cpu() for t in tracked]).sum().to(tracked[0])
    return found


def merge_ranks_(
    model: nn.Module, *, count: int | None = None, layers: Selection | None = None, group: Any = None
) -> StatisticsReport:
    """Give all processes the running statistics of their data together, with the variance between them.

    For DistributedDataParallel without SyncBatchNorm, before evaluation or a checkpoint: there each process keeps
    statistics of its own data, and DDP overwrites them with those of rank 0 at every forward pass. Construct it with
    ``forward_sync_buffers=False`` (``broadcast_buffers=False`` before torch 2.13), or little is left to merge. All
    processes must call this; they end with the same bits.

    Args:
        model: wrapped or not.
        count: how many values, or samples, stand behind the statistics of this process; 0 leaves it out. By default
            the batches that each layer has counted (num_batches_tracked) are its weight, which is right where batches
            have the same size, but for Bessel's factor.
        layers, group: as `recalibrate_`.

    Returns: how far each layer moved on this process, with `undo`.

    Raises:
        InputError: processes with other layers; counts that are no weights; statistics that are not finite.
        DistributedError: a process is gone.
    """
    model = unwrapped(model)
    chosen, left_out = choose(model, layers)
    if count is not None:
        _checked(count, "count")
    mine = {path: _of_layer(layer, count) for path, layer in chosen.items()}
    everyone = gathered(mine, group, "merge_ranks_")
    merged: dict[str, Moments] = {}
    for path in chosen:
        if not all(path in other and other[path][0].shape == mine[path][0].shape for other in everyone):
            raise InputError(f"{path} is not the same layer on all processes: build the same model on each.")
        merged[path] = _merge_processes(path, [other[path] for other in everyone])
    return exchange_(chosen, merged, {}, action=f"Merged over {len(everyone)} processes", left_out=left_out)


def _of_layer(layer: nn.Module, count: int | None) -> tuple[Tensor, Tensor, float, bool]:
    """Mean, unbiased variance, weight, and whether the weight is a number of values."""
    mean, var = (t.detach().double().cpu() for t in models.running_statistics(layer))
    tracked = getattr(layer, BATCHES, None)
    weight = count if count is not None else 1 if tracked is None else int(tracked)
    return mean, var, float(weight), count is not None


def _merge_processes(path: str, parts: list[tuple[Tensor, Tensor, float, bool]]) -> Moments:
    means, variances = (torch.stack([part[i] for part in parts]) for i in (0, 1))  # type: ignore[misc]
    n = torch.tensor([part[2] for part in parts], dtype=torch.float64)
    if not bool(n.sum() > 0):
        if any(part[3] for part in parts):
            raise InputError(f"count is 0 on every process: nobody has seen a batch at {path}.")
        n = torch.ones_like(n)  # nothing was counted: statistics of a checkpoint, which count alike
    if all(part[3] for part in parts):
        known = Moments.from_unbiased(means, variances, n[:, None])
        return moments.merge_rows(Moments(known.mean, known.var, n))
    pooled = moments.merge_rows(Moments(means, variances, n))
    # Without a number of values there is no Bessel's factor to take out: the variances count as they are.
    return Moments.from_unbiased(pooled.mean, pooled.var, WITHOUT_COUNT)
