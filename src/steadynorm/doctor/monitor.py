"""Watches a training loop: the faults that show while a model trains, from a look at one step in a hundred."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from steadynorm import models
from steadynorm.doctor import signs
from steadynorm.doctor.diagnosis import Diagnosis
from steadynorm.doctor.finding import SEVERITIES, Finding
from steadynorm.doctor.glimpse import Glimpse, Looking, is_in_backward
from steadynorm.doctor.pages import advice_for, why_for
from steadynorm.doctor.source import locate
from steadynorm.errors import InputError
from steadynorm.probe import Facts
from steadynorm.probe.facts import Norm
from steadynorm.probe.state import frozen_layers

# A look costs about as much as the norms of a step: 0.5 % of the time where one step in a hundred is looked at.
EVERY = 100

log = logging.getLogger("steadynorm")


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    every: int = EVERY,
    on_finding: Callable[[Finding], None] | None = None,
) -> "Monitor":
    """A monitor of a training loop, to be used in a `with` statement.

        with steadynorm.watch(model, optimizer) as monitor:
            for batch in loader:
                ...
        print(monitor)

    Args:
        optimizer: whose step ends a training step; of several the first. Without one, each forward of the model in
            training mode counts as a step, and what has to do with learning is listed as not checked.
        every: how many steps from one look to the next; the first step is looked at.
        on_finding: called with each finding, once; without it a line goes to the logger "steadynorm".

    Raises:
        InputError: `optimizer` is none, or `every` is no positive number.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    if wrong := [each for each in optimizers if not isinstance(each, Optimizer)]:
        raise InputError(
            f"watch got {type(wrong[0]).__name__} as optimizer: expected a torch.optim.Optimizer, or several."
        )
    if not isinstance(every, int) or every < 1:
        raise InputError(f"watch got every={every!r}: expected how many steps lie between two looks, from 1 on.")
    if not isinstance(model, nn.Module):
        raise InputError(f"watch got {type(model).__name__}: expected a torch.nn.Module.")
    return Monitor(model, optimizers, every, on_finding)


class Monitor:
    """What `watch` gives: starts with the `with` statement, and leaves model and optimizer as they were.

    `findings` are those so far, each once. `start` and `stop` do the same for loops that have callbacks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        every: int,
        on_finding: Callable[[Finding], None] | None,
    ) -> None:
        self.model, self.optimizers, self.every = model, tuple(optimizers), every
        self.findings: tuple[Finding, ...] = ()
        self.steps = 0
        self._on_finding = on_finding
        self._handles: list[RemovableHandle] = []
        self._looking: Looking | None = None
        self._waiting: list[Glimpse] = []
        self._history = signs.History()
        self._layers: dict[str, nn.Module] = {}
        self._unseen: dict[str, str] = {}
        self._has_begun = False

    def __enter__(self) -> "Monitor":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to watch: the first step is looked at.

        Raises:
            InputError: it watches already.
        """
        if self._handles:
            raise InputError("this monitor watches already: use one `with` statement for one loop.")
        self._layers = {
            path: layer
            for path, layer in models.norms(self.model).items()
            if models.norm_kind(layer) in ("batch", "sync")
        }
        self._history.frozen = signs.frozen(self.model, self._layers, frozen_layers(self.model))
        if self.optimizers:
            self._handles.append(self.optimizers[0].register_step_post_hook(self._stepped()))
        else:
            self._handles.append(self.model.register_forward_pre_hook(self._called()))
        self._look()

    def stop(self) -> None:
        """Take every hook off, and judge what was seen last. A step that was not finished is left out."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if self._looking is not None:
            last, self._looking = self._looking.stop(), None
            if not self.optimizers and last.norms:
                self._waiting.append(last)
        self._judge(wait=True)

    def skip(self) -> None:
        """Leave out the look at the present step."""
        if self._looking is not None:
            self._looking.stop()
            self._looking = None

    @property
    def looks(self) -> int:
        """How many steps were looked at and judged."""
        return self._history.looks

    def diagnosis(self) -> Diagnosis:
        """The findings so far in the formats of the doctor, with what was looked at and what was not."""
        reason = "" if self.looks else "no step was looked at"
        codes = signs.CODES if self._layers else ()
        unchecked = {code: reason or self._reason(code) for code in codes}
        unchecked = {code: why for code, why in unchecked.items() if why}
        remark = f"{self.looks} of {self.steps} steps were looked at, while the model was trained."
        unseen = [f"{path or 'The model'} could not be looked at: {why}" for path, why in self._unseen.items()]
        missing = [path or "the model" for path in self._layers if path not in self._history.seen]
        if missing and self.looks:
            unseen.append(f"Never called in a look: {', '.join(missing)}.")
        return Diagnosis(
            findings=tuple(sorted(self.findings, key=lambda found: SEVERITIES.index(found.severity))),
            checked=tuple(code for code in codes if code not in unchecked),
            unchecked=unchecked,
            facts=Facts(norms={path: _norm(path, layer) for path, layer in self._layers.items()}),
            remarks=(remark, *unseen),
            title=f"The training of {type(self.model).__name__}",
        )

    def __str__(self) -> str:
        return str(self.diagnosis())

    def _repr_html_(self) -> str:
        return self.diagnosis()._repr_html_()

    def _reason(self, code: str) -> str:
        if code in signs.OF_LEARNING:
            return "" if self.optimizers else "no optimizer was given"
        if not self._history.seen:
            return "no norm layer was called where it could be seen, as inside a compiled graph"
        few = self._history.settled < signs.PATIENCE
        wait = f"it takes {signs.PATIENCE} looks after step {signs.SETTLED}, {self.every} steps apart"
        return wait if few and code == "SN203" else ""

    def _stepped(self) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._next()

        return hook

    def _called(self) -> Callable[..., None]:
        def hook(model: nn.Module, args: Any) -> None:
            if model is self.model and model.training and not is_in_backward():
                if self._has_begun:
                    self._next()
                self._has_begun = True

        return hook

    def _next(self) -> None:
        """A step has ended."""
        self.steps += 1
        if self._looking is not None:
            self._waiting.append(self._looking.stop())
            self._looking = None
        if self._waiting:
            self._judge(wait=False)
        if self.steps % self.every == 0:
            self._look()

    def _look(self) -> None:
        self._looking = Looking(self.model, self._layers, self.steps)
        self._looking.start()

    def _judge(self, wait: bool) -> None:
        """Judge what has arrived from the device, in order."""
        while self._waiting and (wait or self._waiting[0].readings is None or self._waiting[0].readings.is_here):
            glimpse = self._waiting.pop(0)
            if not glimpse.norms and not glimpse.forwards:
                continue
            self._unseen |= glimpse.unseen
            known = {(found.code, found.where) for found in self.findings}
            new = [self._placed(found) for found in signs.judge(glimpse, self._history)]
            new = [found for found in new if (found.code, found.where) not in known]
            self.findings = (*self.findings, *new)
            self._tell(new)

    def _placed(self, finding: Finding) -> Finding:
        place = locate(self.model, finding.where) if finding.where else None
        return replace(finding, cause=why_for(finding.code), source=place)

    def _tell(self, new: Sequence[Finding]) -> None:
        if self._on_finding is not None:
            for finding in new:
                self._on_finding(finding)
            return
        for code in dict.fromkeys(finding.code for finding in new):
            same = [finding for finding in new if finding.code == code]
            more = f" (and {len(same) - 1} more layers)" if len(same) > 1 else ""
            log.warning(
                "%s %s%s: %s %s",
                code,
                same[0].where or "the model",
                more,
                same[0].message,
                f"steadynorm explain {code} says more: {advice_for(code)}",
            )


def _norm(path: str, layer: nn.Module) -> Norm:
    kind, momentum, eps = models.norm_kind(layer), getattr(layer, "momentum", None), getattr(layer, "eps", None)
    has_statistics = models.has_running_statistics(layer)
    uses_batch = models.uses_batch_statistics(layer)
    return Norm(
        path=path,
        kind=kind or "batch",
        class_name=type(layer).__name__,
        channels=getattr(layer, "num_features", None),
        eps=eps if isinstance(eps, float) else None,
        momentum=momentum if isinstance(momentum, float) else None,
        learns=uses_batch and has_statistics,
        is_frozen=not uses_batch,
        trains_in_evaluation=False,
        has_statistics=has_statistics,
    )
