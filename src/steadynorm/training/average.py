"""Averages of weights over training, EMA and SWA, whose buffers are those of a model that can be used."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from steadynorm import models, moments
from steadynorm.errors import InputError
from steadynorm.layers.switches import DEFAULTS, Switches
from steadynorm.moments import Moments
from steadynorm.training.evaluation import unwrapped
from steadynorm.training.passes import Batches
from steadynorm.training.recalibrate import recalibrate_
from steadynorm.training.statistics import StatisticsReport

Statistics = Literal["copy", "recalibrate", "average"]
Buffer = Literal["copy", "average", "keep", "moments", "recalibrate"]
STATISTICS = ("copy", "recalibrate", "average")
BUFFERS = ("copy", "average", "keep")


class AveragedModel(swa_utils.AveragedModel):
    """`torch.optim.swa_utils.AveragedModel` whose buffers are taken care of, each in a way that `plan` shows.

    Parameters are averaged as by torch: the plain mean of all updates (SWA), `decay` for an exponential one (EMA), or
    any `avg_fn` or `multi_avg_fn`. The state_dict is torch's, and goes both ways.

    Running statistics of batch norms belong to the weights that they were taken with. Averaged weights give other
    activations, for which there are statistics nowhere but in data:

    - "copy": those of the newest model. Right for an EMA, whose weights are near; far off for an SWA.
    - "recalibrate": copied, and evaluation refuses to run until `recalibrate_` has taken them from data. For an SWA.
    - "average": averaged like the weights, as moments: var = (1 − w)·var + w·new + w·(1 − w)·(mean − new_mean)². For
      an EMA without data. Torch's use_buffers=True leaves out the last term, and averages the counter too.

    Args:
        model, device, avg_fn, multi_avg_fn: as torch's; the functions have to be linear, as all averages are.
        use_buffers: True is torch's word for statistics="average" with buffers={"*": "average"}.
        decay: weight of the average in an exponential one, such as 0.999; in place of the functions.
        statistics: of layers with running statistics; frozen ones are copied.
        buffers: what becomes of other buffers, by pattern for their names: "copy" (of all by default), "average" or
            "keep" (as it was at the start). The first pattern that fits counts. Integers are never averaged.

    Raises:
        InputError: an option that is none, or a pattern that fits no buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Any = None,
        use_buffers: bool = False,
        *,
        decay: float | None = None,
        statistics: Statistics | None = None,
        buffers: Mapping[str, Buffer] | None = None,
    ) -> None:
        if decay is not None:
            if avg_fn is not None or multi_avg_fn is not None or not 0 <= decay <= 1:
                raise InputError(f"decay must be in [0, 1] and without avg_fn and multi_avg_fn, got {decay}.")
            multi_avg_fn = swa_utils.get_ema_multi_avg_fn(decay)
        statistics = statistics or ("average" if use_buffers else "copy")
        if statistics not in STATISTICS:
            raise InputError(f"statistics must be one of {', '.join(map(repr, STATISTICS))}, got {statistics!r}.")
        chosen: dict[str, Buffer] = dict(buffers or ({"*": "average"} if use_buffers else {}))
        plan = _plan(model, statistics, chosen)
        # Not use_buffers: update_parameters is to leave the buffers to us.
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers=False)
        self.plan: dict[str, Buffer] = plan
        self.needs_recalibration = False

    def update_parameters(self, model: nn.Module) -> None:
        """Take `model` into the average: its parameters as torch does, its buffers as `plan` says."""
        count = int(self.n_averaged)
        weight = 1.0 if count == 0 else self._weight(count)
        own = dict(self.module.named_buffers())
        shapes = [[tuple(buffer.shape) for buffer in one.buffers()] for one in (self.module, model)]
        if shapes[0] != shapes[1]:
            raise InputError("the model and its average have different buffers: average the model that you began with.")
        before = {name: buffer.detach().clone() for name, buffer in own.items()}
        super().update_parameters(model)  # copies all buffers
        with torch.no_grad():
            self._average(before, own, weight)
        self._follow_switches(model)
        self.needs_recalibration = "recalibrate" in self.plan.values()

    def _average(self, before: dict[str, Tensor], own: dict[str, Tensor], weight: float) -> None:
        """`own` holds what is new, `before` the average so far."""
        for name, buffer in own.items():
            action = self.plan.get(name, "copy")
            if action == "keep":
                buffer.copy_(before[name])
            elif action == "average":
                wide = torch.promote_types(buffer.dtype, torch.float32)
                buffer.copy_(torch.lerp(before[name].to(wide), buffer.to(wide), weight))
            elif action == "moments" and name.endswith("running_mean"):
                spread = name.removesuffix("running_mean") + "running_var"
                old = Moments(before[name].double(), before[spread].double(), torch.tensor(1 - weight))
                new = Moments(buffer.double(), own[spread].double(), torch.tensor(weight))
                merged = moments.merge([old, new])
                buffer.copy_(merged.mean)
                own[spread].copy_(merged.var)

    def _weight(self, count: int) -> float:
        """The weight of the new model in the average of `count` before, by asking the function."""
        old, new = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        if self.multi_avg_fn is not None:
            self.multi_avg_fn([old], [new], torch.tensor(count))
            return float(old)
        if self.avg_fn is not None:
            return float(self.avg_fn(old, new, torch.tensor(count)))
        return 1 / (count + 1)

    def _follow_switches(self, model: nn.Module) -> None:
        """What was frozen in the model since the average began is frozen in the average."""
        for own, theirs in zip(unwrapped(self.module).modules(), unwrapped(model).modules(), strict=True):
            if isinstance(own, Switches) and isinstance(theirs, Switches):
                for switch in DEFAULTS.keys() - {"train_affine"}:
                    setattr(own, switch, getattr(theirs, switch))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model.

        Raises:
            InputError: in evaluation, with statistics="recalibrate" and weights that are newer than the statistics.
        """
        if self.needs_recalibration and not self.training:
            raise InputError(
                "the weights of this average are newer than its running statistics: call recalibrate_(batches) first,"
                " or construct it with statistics='copy'."
            )
        return super().forward(*args, **kwargs)

    def recalibrate_(self, batches: Batches, **options: Any) -> StatisticsReport:
        """Take the running statistics of the averaged weights from data: see `steadynorm.training.recalibrate_`."""
        report = recalibrate_(self.module, batches, **options)
        self.needs_recalibration = False
        return report


def _plan(model: nn.Module, statistics: Statistics, buffers: dict[str, Buffer]) -> dict[str, Buffer]:
    """What becomes of every buffer, by name."""
    for pattern, action in buffers.items():
        if action not in BUFFERS:
            raise InputError(f"buffers[{pattern!r}] must be one of {', '.join(map(repr, BUFFERS))}, got {action!r}.")
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name, _ in model.named_buffers()):
            names = ", ".join(name for name, _ in list(model.named_buffers())[:3])
            raise InputError(f"buffers got {pattern!r}, expected a pattern for the name of a buffer, such as {names}.")
    of_statistics = _of_statistics(model, statistics)
    plan: dict[str, Buffer] = {}
    for name, buffer in model.named_buffers():
        action = next((action for pattern, action in buffers.items() if fnmatchcase(name, pattern)), "copy")
        if not buffer.is_floating_point() and action == "average":
            action = "copy"
        plan[name] = of_statistics.get(name, action)
    return plan


def _of_statistics(model: nn.Module, statistics: Statistics) -> dict[str, Buffer]:
    """What becomes of running means and variances, by name."""
    found: dict[str, Buffer] = {}
    for path, module in model.named_modules():
        kind = models.norm_kind(module)
        if not models.has_running_statistics(module) or (kind is None and not isinstance(module, Switches)):
            continue
        action: Buffer = "moments" if statistics == "average" else statistics
        if kind == "frozen" or getattr(module, "update_running", None) is False:
            action = "copy"
        elif statistics == "average" and kind == "instance":
            action = "average"  # its variance is that within samples
        elif statistics == "recalibrate" and kind not in ("batch", "sync"):
            action = "copy"  # recalibrate_ leaves them out
        for name in ("running_mean", "running_var"):
            found[f"{path}.{name}" if path else name] = action
    return found
