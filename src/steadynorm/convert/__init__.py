"""convert_: one normalization into another in the model as it stands, with nothing lost, or a refusal.

Our layers are subclasses of torch.nn's with the same parameters and buffers. So a layer is converted by changing its
class: the object stays, and with it every path and alias that leads to it, its tensors, hooks, mode and attributes,
and whatever holds on to these: optimizers, DDP, averages. Relatives that normalise by something else go through the
same door: what they do not have is taken off, and said.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from steadynorm import models
from steadynorm.convert.become import become, snapshot
from steadynorm.convert.calibration import METHODS, Method, Progress, calibrate, put_fit_
from steadynorm.convert.change import Change, Converted
from steadynorm.convert.classes import is_ours, named
from steadynorm.convert.effect import Effect, Examples, Forward, Loss, effect
from steadynorm.convert.fit import Fit
from steadynorm.convert.holders import ensure_of, ensure_unwrapped, forget_, remembered, take_out_
from steadynorm.convert.refusals import Refusals
from steadynorm.convert.relatives import RELATIVES, WITHIN_SAMPLE, Wish, to_relative
from steadynorm.convert.targets import Plan, Rule, to_batch, to_steadynorm, to_sync, to_torch
from steadynorm.convert.told import Told, made_plain_
from steadynorm.convert.unseen import norms, paths, unseen
from steadynorm.errors import InputError
from steadynorm.layers.renorm import Limits
from steadynorm.layers.weight.target import own_class
from steadynorm.ranks import require_group
from steadynorm.selection import Selection, select

__all__ = ["Change", "Converted", "Effect", "Target", "convert_"]

Named = tuple[str, nn.Module]
UNKNOWN = "a normalization that is not of torch.nn's family"
FROZEN = "a frozen batch norm; one of ours becomes a batch norm again with to='batch'"
Target = Literal[
    "steadynorm",
    "torch",
    "sync",
    "batch",
    "frozen",
    "ghost",
    "renorm",
    "group",
    "instance",
    "layer",
    "channel_layer",
    "none",
]


def convert_(
    model: nn.Module,
    to: Target,
    *,
    only: Selection | None = None,
    leave: Selection | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    optimizer: Optimizer | None = None,
    as_: Told | None = None,
    process_group: Any = None,
    dims: Literal[1, 2, 3] | None = None,
    ghost_size: int | None = None,
    limits: tuple[float, float] | Limits | None = None,
    groups: int | None = None,
    method: Method | None = "layer_by_layer",
    progress: Progress | None = None,
) -> Change:
    """Make the normalizations of `model` others, in place: the same modules, tensors, hooks and aliases.

    A layer that something would be lost of is refused, and then no layer is changed.

    Args:
        model: changed in place; for a changed copy give ``copy.deepcopy(model)``.
        to: "steadynorm": every normalization of torch.nn becomes ours of its name. "torch": ours become torch.nn's.
            Batch norms, torch's, ours and synchronised ones, become "sync": our SyncBatchNorm; "ghost", "renorm",
            "frozen": ours of that name; "group": our GroupNorm; "layer": one with a single group, the statistics of a
            sample; "channel_layer": our ChannelLayerNorm, those of a position; "instance": our InstanceNorm; "none":
            an Identity. "batch": what was made synchronised, ghost, renorm or frozen becomes the batch norm it was.
        only, leave: which layers, and which not: a pattern for paths (``"backbone"`` is all that is inside, ``*`` any
            characters), a class, several of them, or a function of path and layer.
        batches: examples, kept in memory, that run before and after the conversion, in evaluation. What it did to the
            outputs is then the `difference` of the change. To "group", "layer", "channel_layer" and "instance" they
            set weight and bias so that every layer gives as nearly as it can what the batch norm gave: least squares,
            channel by channel.
        loss: called as loss(output, batch); with batches, it is measured before and after.
        forward: called as forward(model, batch), in place of model(batch), model(*args) or model(**dict).
        optimizer: one that holds parameters of the model. Those that the model has no more, to "frozen" or "none", are
            taken out of it, with their state. Without it they stay there, and never get a gradient. Those that
            `batches` set keep their place and lose their state.
        as_: for classes with a forward of their own, what their layers compute: a function by class that takes a layer
            and gives a layer of torch.nn or ours with the same tensors, such as
            ``{BatchNormAct2d: lambda layer: steadynorm.BatchNorm2d(layer.num_features, activation="relu")}``. Both are
            compared before the layer becomes that, and then what `to` says.
        process_group: to "sync", whose batches are one; None is all ranks, or what torch's layer had.
        dims: of a SyncBatchNorm that was none other before, the dimensions behind N and C.
        ghost_size: to "ghost", the samples of a slice; see `GhostBatchNorm2d`.
        limits: to "renorm"; see `BatchRenorm2d`.
        groups: to "group", how many. By default the number for which the error is least, layer by layer; without
            batches the largest up to 32 that divides the channels and leaves 4 in each.
        method: how weight and bias are found. "layer_by_layer": behind layers that are converted already, so that each
            makes up for those before it; two runs of every batch for each layer. "one_pass": all at once. None: they
            stay as they are.
        progress: called with the runs of a batch that are done, and of how many.

    Returns: what was done; `print` it.

    Raises:
        InputError: a layer cannot be converted, with its path and what would be lost. The model is as it was.
    """
    wish = Wish(to, dims, ghost_size, limits, groups, batches is not None and method is not None)
    rule, told = _rule(wish, process_group), dict(as_ or {})
    layers = _chosen(model, only, leave, told)
    examples = None if batches is None else Examples(batches, forward, loss)
    _check(model, examples, loss, optimizer, method)
    fits: dict[nn.Module, Fit] = {}
    before, difference = None, None
    with _restored(model, layers, optimizer, examples is not None):
        plans = _plans(model, layers, rule, told, f"convert_ to {to!r}")
        if examples is not None:
            before = examples.run(model)
            if method is not None and to in WITHIN_SAMPLE:
                found = [(plan.path, plan.layer) for plan in plans if plan.plan is not None]
                fits = calibrate(model, found, to, groups, examples, method, progress)
        log = _carry_out(model, plans, fits, optimizer, f"convert_ to {to!r}")
        if examples is not None and before is not None:
            difference = effect(before, examples.run(model))
    return Change(model, tuple(log), _left(model, rule, to), difference=difference)


@dataclass(frozen=True)
class _Planned:
    """A layer and what is to become of it.

    Args:
        was, held: its class and its parameters, as they were.
        note: what is to be known of what was made of it already, as told.
        plan: None where that was all.
    """

    path: str
    layer: nn.Module
    was: str
    held: tuple[nn.Parameter, ...]
    note: str
    plan: Plan | None


def _check(
    model: nn.Module, examples: Examples | None, loss: Loss | None, optimizer: Optimizer | None, method: Method | None
) -> None:
    if method is not None and method not in METHODS:
        raise InputError(f"convert_ got method={method!r}, expected one of {', '.join(map(repr, METHODS))}, or None.")
    if examples is None and loss is not None:
        raise InputError("convert_ got a loss= and no batches= to measure it on.")
    if optimizer is not None:
        ensure_of(model, optimizer)


def _rule(wish: Wish, process_group: Any) -> Rule:
    to = wish.to
    if to not in get_args(Target):
        raise InputError(f"convert_ got to={to!r}, expected one of {', '.join(map(repr, get_args(Target)))}.")
    if process_group is not None and to != "sync":
        raise InputError(f"convert_ got process_group= to {to!r}: only SyncBatchNorm, to 'sync', has one.")
    wish.check()
    if process_group is not None:
        require_group(process_group, "convert_")
    if to in RELATIVES:
        return to_relative(wish)
    rules: dict[str, Rule] = {
        "steadynorm": to_steadynorm,
        "torch": to_torch,
        "sync": to_sync(process_group),
        "batch": to_batch(wish.dims),
    }
    return rules[to]


def _chosen(model: nn.Module, only: Selection | None, leave: Selection | None, told: Told) -> list[Named]:
    found = norms(model, tuple(told))
    layers = select(found, only, "convert_(only=)", "normalization")
    if leave is None:
        return layers
    left_out = {id(layer) for _, layer in select(found, leave, "convert_(leave=)", "normalization")}
    return [(path, layer) for path, layer in layers if id(layer) not in left_out]


@contextmanager
def _restored(model: nn.Module, layers: list[Named], optimizer: Optimizer | None, has_run: bool) -> Iterator[None]:
    """Put model and optimizer back as they are now, if something goes wrong."""
    restores = [snapshot(layer) for _, layer in layers]
    restores += [] if optimizer is None else [remembered(optimizer)]
    restores += [models.remember(model)] if has_run else []
    try:
        yield
    except BaseException:
        for restore in restores:
            restore()
        raise


def _plans(model: nn.Module, layers: list[Named], rule: Rule, told: Told, what: str) -> list[_Planned]:
    """What is to become of the layers of which something is to become; those that are told about are made plain."""
    plans, refuse = [], Refusals(what)
    for path, layer in layers:
        was, held = named(own_class(layer)), tuple(layer.parameters(recurse=False))
        note = refuse.or_take(path, made_plain_, layer, told)
        plan = refuse.or_take(path, rule, layer)
        if note is not None or plan is not None:
            plans.append(_Planned(path, layer, was, held, note or "", plan))
    refuse.raise_any()
    lose = [one.path for one in plans if one.plan and (one.plan.constants or one.plan.gone or one.plan.emptied)]
    ensure_unwrapped(model, lose, what)
    return plans


def _carry_out(
    model: nn.Module, plans: list[_Planned], fits: dict[nn.Module, Fit], optimizer: Optimizer | None, what: str
) -> list[Converted]:
    """Carry all plans out, put the fits in, and tell the optimizer."""
    refuse, known = Refusals(what), paths(model)
    notes = {one.layer: [one.note, *(refuse.or_take(one.path, _become, one, fits) or [])] for one in plans}
    refuse.raise_any()
    remaining = {id(parameter) for parameter in model.parameters()}
    log = []
    for one in plans:
        gone = [parameter for parameter in one.held if id(parameter) not in remaining]
        fit = fits.get(one.layer)
        notes[one.layer] += _let_go(gone, one.held if fit is not None else (), optimizer)
        note, error = "; ".join(filter(None, notes[one.layer])), None if fit is None else fit.error
        log.append(Converted(tuple(known[id(one.layer)]), one.was, named(own_class(one.layer)), note, error))
    return log


def _become(planned: _Planned, fits: dict[nn.Module, Fit]) -> list[str]:
    """Carry out one plan; what is to be known about it."""
    layer, plan, fit = planned.layer, planned.plan, fits.get(planned.layer)
    if plan is None:
        return []
    if fit is not None and "num_groups" in plan.attributes:
        plan = replace(plan, attributes=plan.attributes | {"num_groups": fit.groups})
    notes = [become(layer, plan)]
    notes += [] if fit is None else [put_fit_(layer, fit)]
    notes += [_groups(plan.attributes["num_groups"])] if "num_groups" in plan.attributes else []
    return notes + (["never called"] if fits and fit is None else [])


def _let_go(gone: list[nn.Parameter], fitted: Collection[nn.Parameter], optimizer: Optimizer | None) -> list[str]:
    """Drop what would still move parameters that the model has no more, and the momentum of others that were set."""
    for parameter in gone:
        parameter.grad = None
    if optimizer is None:
        return []
    if take_out_(optimizer, gone):
        return ["taken out of the optimizer"]
    return ["state in the optimizer dropped"] if forget_(optimizer, fitted) else []


def _groups(number: int) -> str:
    return "1 group" if number == 1 else f"{number} groups"


def _left(model: nn.Module, rule: Rule, to: str) -> dict[str, str]:
    """What one could have expected to change, and why it did not."""
    left: dict[str, str] = {}
    frozen = [(path, is_ours(own_class(norm))) for path, norm in norms(model) if models.norm_kind(norm) == "frozen"]
    if to == "steadynorm":
        left |= dict.fromkeys((path for path, ours in frozen if not ours), UNKNOWN)
    if to in (*WITHIN_SAMPLE, "none"):
        left |= dict.fromkeys((path for path, _ in frozen), FROZEN)
    return left | unseen(model, rule, paths(model))
