"""Running statistics of a model: which layers' are chosen, how they are exchanged, and what that did."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.moments import Moments
from steadynorm.selection import Selection, select

# Layers that a report lists; the rest are counted.
LISTED = 12


def choose(model: nn.Module, layers: Selection | None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The batch norm layers of `model` whose running statistics may be exchanged, and why others may not.

    Returns: layers by path, a shared one once; reasons by path of those that were meant and are left out.

    Raises:
        InputError: no layer is left, or the model has parameters without values.
    """
    if missing := models.unmade_parts(model):
        raise InputError(
            f"the model has parameters without values ({', '.join(missing[:3])}): run a batch through its lazy layers"
            " first, or move it off the meta device."
        )
    named = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if _holds_statistics(m)]
    if not named:
        raise InputError("the model has no batch norm: expected at least one layer with running statistics.")
    meant = select(named, layers, "layers", "layer with running statistics")
    reasons = {path: _why_not(model, m) for path, m in meant}
    chosen = {path: m for path, m in meant if not reasons[path]}
    left_out = {path: reason for path, reason in reasons.items() if reason}
    if not chosen:
        why = "; ".join(f"{path or 'the model'} {reason}" for path, reason in list(left_out.items())[:3])
        raise InputError(f"no layer has running statistics that may change: {why or 'none was meant'}.")
    return chosen, left_out


def _holds_statistics(module: nn.Module) -> bool:
    return models.has_running_statistics(module) or models.norm_kind(module) in ("batch", "sync")


def _why_not(model: nn.Module, module: nn.Module) -> str:
    """Why the statistics of a layer may not be exchanged; empty where they may."""
    kind = models.norm_kind(module)
    if not models.has_running_statistics(module):
        return "has none (track_running_stats=False)"
    if kind == "frozen" or getattr(module, "update_running", None) is False:
        return "is frozen"
    if models.running_statistics(module)[0].dim() != 1:
        return "keeps a set for each domain or step: take them domain by domain, merge_domains() gives a plain layer"
    if kind == "instance":
        return "is an instance norm, whose running variance is that within samples"
    if kind not in ("batch", "sync"):
        return "is not a batch norm"
    if model.training and not module.training:
        return "was put in evaluation mode while the model trains: it is taken for frozen"
    return ""


@dataclass(frozen=True)
class Moved:
    """How far the running statistics of one layer moved.

    Args:
        mean_shift: |new mean − old mean| in new deviations, of the channel where it is largest.
        deviation_ratio: new over old deviation, of the channel where it is farthest from 1.
        standard_error: of the new statistics, in deviations, of the channel where it is largest; None if not known.
    """

    path: str
    mean_shift: float
    deviation_ratio: float
    standard_error: float | None = None


@dataclass(frozen=True, repr=False)
class StatisticsReport:
    """What was done to the running statistics of a model; `undo` puts them back.

    Args:
        action: what was done, in a few words.
        layers: by path, in the order in which they run.
        left_out: by path, layers that were asked for and not touched, and why.
        samples, batches: that ran through the model, of all processes, in one pass.
        passes: over the data.
        stopped: what ended the passes: "end of data", "samples" or "tolerance".
    """

    action: str
    layers: dict[str, Moved]
    left_out: dict[str, str] = field(default_factory=dict)
    samples: int | None = None
    batches: int | None = None
    passes: int = 1
    stopped: str = ""
    _undo: Callable[[], None] = field(default=lambda: None, compare=False)

    @property
    def standard_error(self) -> float | None:
        """The largest of all layers, in deviations; None if it is not known."""
        known = [moved.standard_error for moved in self.layers.values() if moved.standard_error is not None]
        return max(known, default=None)

    def undo(self) -> None:
        """Put the statistics back as they were, bit for bit and in place."""
        self._undo()

    def __repr__(self) -> str:
        lines = [f"{self.action}: {_count(len(self.layers), 'layer')}{self._extent()}"]
        shown = list(self.layers.values())[:LISTED]
        width = max((len(moved.path or "(model)") for moved in shown), default=0)
        for moved in shown:
            line = f"  {moved.path or '(model)':<{width}}  mean moved {moved.mean_shift:.3g} deviations"
            line += f", deviation times {moved.deviation_ratio:.3g}"
            lines.append(line + (f", standard error {moved.standard_error:.2g}" if moved.standard_error else ""))
        if len(self.layers) > LISTED:
            lines.append(f"  and {len(self.layers) - LISTED} more")
        lines += [f"  left out: {path or '(model)'} {reason}" for path, reason in self.left_out.items()]
        return "\n".join(lines)

    def _extent(self) -> str:
        if self.samples is None:
            return ""
        extent = f" from {_count(self.samples, 'sample')}"
        if self.batches is not None:
            extent += f" in {_count(self.batches, 'batch', 'batches')}"
        extent += f", {self.passes} passes" if self.passes > 1 else ""
        extent += f", stopped by {self.stopped}" if self.stopped in ("samples", "tolerance") else ""
        worst = self.standard_error
        return extent if worst is None else f"{extent}, standard error at most {worst:.2g} deviations"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def put_(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Write running statistics in place, rounded once to their dtype."""
    with torch.no_grad():
        running_mean, running_var = models.running_statistics(layer)
        running_mean.copy_(mean)
        running_var.copy_(var)


def exchange_(
    layers: Mapping[str, nn.Module], new: Mapping[str, Moments], errors: Mapping[str, float], **about: Any
) -> StatisticsReport:
    """Give `layers` the statistics `new`; what is remembered is the unbiased variance, as in torch.nn.

    Args:
        errors: standard errors by path, where they are known.
        about: the other fields of the report.

    Raises:
        InputError: a statistic of one value, or one that is not finite; nothing is changed then.
    """
    for path, found in new.items():
        _check(path, found)
    old: dict[str, tuple[Tensor, Tensor]] = {}
    for path in new:
        mean, var = models.running_statistics(layers[path])
        old[path] = (mean.clone(), var.clone())

    def undo() -> None:
        for path, statistics in old.items():
            put_(layers[path], *statistics)

    moved = {path: _moved(path, layers[path], found, errors.get(path)) for path, found in new.items()}
    for path, found in new.items():
        put_(layers[path], found.mean, found.unbiased_var)
    return StatisticsReport(layers=moved, _undo=undo, **about)


def _check(path: str, found: Moments) -> None:
    where = path or "the layer"
    if bool((torch.as_tensor(found.count) < 2).any()):
        raise InputError(
            f"{where} got fewer than two values per channel, whose variance is unknown: give it more samples."
        )
    if not bool((torch.isfinite(found.mean) & torch.isfinite(found.var)).all()):
        raise InputError(f"the statistics of {where} are not finite: look for NaN or infinite values in the data.")


def _moved(path: str, layer: nn.Module, new: Moments, error: float | None) -> Moved:
    mean, var = (t.double().to(new.mean.device) for t in models.running_statistics(layer))
    eps = float(getattr(layer, "eps", 0.0))
    deviation = (new.unbiased_var + eps).sqrt()
    shift = ((new.mean - mean).abs() / deviation).nan_to_num(nan=torch.inf)
    ratio = (deviation / (var + eps).sqrt()).nan_to_num(nan=torch.inf)
    farthest = ratio.log().abs().argmax()
    return Moved(path, float(shift.max()), float(ratio[farthest]), error)
