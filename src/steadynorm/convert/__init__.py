"""convert_: one normalization into another in the model as it stands, with nothing lost, or a refusal.

Our layers are subclasses of torch.nn's with the same parameters and buffers. So a layer is converted by changing its
class: the object stays, and with it every path and alias that leads to it, its tensors, hooks, mode and attributes,
and whatever holds on to these: optimizers, DDP, averages. Relatives that normalise by something else go through the
same door: what they do not have is taken off, and said.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from steadynorm.convert.holders import ensure_not_awaited, ensure_of, forget_, remembered, take_out_
from steadynorm.convert.relatives import RELATIVES, WITHIN_SAMPLE, Wish, to_relative
from steadynorm.convert.targets import Plan, Rule, to_batch, to_steadynorm, to_sync, to_torch
from steadynorm.convert.unseen import norms, paths, unseen
from steadynorm.errors import InputError
from steadynorm.layers.renorm import Limits
from steadynorm.layers.weight.target import own_class
from steadynorm.ranks import require_group
from steadynorm.selection import Selection, select

__all__ = ["Change", "Converted", "Effect", "Target", "convert_"]

UNKNOWN = "a normalization that is not of torch.nn's family"
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
    wish = Wish(to, dims, ghost_size, limits, groups)
    rule = _rule(wish, process_group)
    layers = _chosen(model, only, leave)
    known = paths(model)
    examples = None if batches is None else Examples(batches, forward, loss)
    if method is not None and method not in METHODS:
        raise InputError(f"convert_ got method={method!r}, expected one of {', '.join(map(repr, METHODS))}, or None.")
    if examples is None and loss is not None:
        raise InputError("convert_ got a loss= and no batches= to measure it on.")
    if optimizer is not None:
        ensure_of(model, optimizer)
    what = f"convert_ to {to!r}"
    plans = _plans(layers, rule, what)
    leaving = [path for path, layer, plan in plans if {*plan.constants, *plan.gone} & {*layer._parameters}]
    ensure_not_awaited(model, leaving, what)
    before = None if examples is None else examples.run(model)
    fits: dict[nn.Module, Fit] = {}
    if examples is not None and method is not None and to in WITHIN_SAMPLE and plans:
        found = [(path, layer) for path, layer, _ in plans]
        fits = calibrate(model, found, to, groups, examples, method, progress)
    with _restored(model, plans, optimizer, examples is not None):
        log = _carry_out(plans, fits, known, optimizer, what)
        after = None if examples is None else examples.run(model)
    difference = None if before is None or after is None else effect(before, after)
    return Change(model, tuple(log), _left(model, rule, known), difference=difference)


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


def _chosen(model: nn.Module, only: Selection | None, leave: Selection | None) -> list[tuple[str, nn.Module]]:
    layers = select(norms(model), only, "convert_(only=)", "normalization")
    if leave is None:
        return layers
    left_out = {id(layer) for _, layer in select(norms(model), leave, "convert_(leave=)", "normalization")}
    return [(path, layer) for path, layer in layers if id(layer) not in left_out]


Planned = list[tuple[str, nn.Module, Plan]]


def _plans(layers: list[tuple[str, nn.Module]], rule: Rule, what: str) -> Planned:
    """A plan for every layer that the rule has one for, or an InputError with every layer that it refuses."""
    refusals, plans = [], []
    for path, layer in layers:
        try:
            plan = rule(layer)
        except InputError as refusal:
            refusals.append((path, str(refusal)))
        else:
            plans += [(path, layer, plan)] if plan is not None else []
    if refusals:
        raise InputError(_about(refusals, what))
    return plans


@contextmanager
def _restored(model: nn.Module, plans: Planned, optimizer: Optimizer | None, has_run: bool) -> Iterator[None]:
    """Put model and optimizer back as they are now, if something goes wrong."""
    restores = [snapshot(layer) for _, layer, _ in plans]
    restores += [] if optimizer is None else [remembered(optimizer)]
    restores += [models.remember(model)] if has_run else []
    try:
        yield
    except BaseException:
        for restore in restores:
            restore()
        raise


def _carry_out(
    plans: Planned, fits: dict[nn.Module, Fit], known: dict[int, list[str]], optimizer: Optimizer | None, what: str
) -> list[Converted]:
    refusals, log = [], []
    for path, layer, plan in plans:
        before, held, fit = named(own_class(layer)), dict(layer._parameters), fits.get(layer)
        if fit is not None and "num_groups" in plan.attributes:
            plan = replace(plan, attributes=plan.attributes | {"num_groups": fit.groups})
        try:
            notes = [become(layer, plan)]
        except InputError as refusal:
            refusals.append((path, str(refusal)))
            continue
        notes += [] if fit is None else [put_fit_(layer, fit)]
        notes += [_groups(plan.attributes["num_groups"])] if "num_groups" in plan.attributes else []
        notes += ["never called"] if fits and fit is None else []
        notes += [] if optimizer is None else [_tell(optimizer, layer, held, fit)]
        error = None if fit is None else fit.error
        note = "; ".join(filter(None, notes))
        log.append(Converted(tuple(known[id(layer)]), before, named(own_class(layer)), note, error))
    if refusals:
        raise InputError(_about(refusals, what))
    return log


def _groups(number: int) -> str:
    return "1 group" if number == 1 else f"{number} groups"


def _tell(optimizer: Optimizer, layer: nn.Module, held: dict[str, nn.Parameter | None], fit: Fit | None) -> str:
    """Tell the optimizer about the parameters of a layer that are gone, or are others now; what was done."""
    gone = [one for name, one in held.items() if one is not None and layer._parameters.get(name) is not one]
    if take_out_(optimizer, gone):
        return "taken out of the optimizer"
    if fit is not None and forget_(optimizer, [one for one in held.values() if one is not None]):
        return "state in the optimizer dropped"
    return ""


def _about(refusals: list[tuple[str, str]], what: str) -> str:
    lines = [f"{path or 'the model'} {reason.rstrip('.')}." for path, reason in refusals]
    which = "one layer" if len(lines) == 1 else f"{len(lines)} layers"
    return f"{what} cannot take {which}, and nothing was changed; leave= leaves a layer out.\n" + "\n".join(lines)


def _left(model: nn.Module, rule: Rule, known: dict[int, list[str]]) -> dict[str, str]:
    left: dict[str, str] = {}
    if rule is to_steadynorm:
        foreign = (
            path for path, norm in norms(model) if models.norm_kind(norm) == "frozen" and not is_ours(own_class(norm))
        )
        left |= dict.fromkeys(foreign, UNKNOWN)
    return left | unseen(model, rule, known)
