"""convert_: one normalization into another in the model as it stands, with nothing lost, or a refusal.

Our layers are subclasses of torch.nn's with the same parameters and buffers. So a layer is converted by changing its
class: the object stays, and with it every path and alias that leads to it, its tensors, hooks, mode and attributes,
and whatever holds on to these: optimizers, DDP, averages.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from torch import nn

from steadynorm import models
from steadynorm.convert.become import become, snapshot
from steadynorm.convert.change import Change, Converted
from steadynorm.convert.classes import is_ours, named
from steadynorm.convert.targets import BY_DIMS, Rule, to_batch, to_steadynorm, to_sync, to_torch
from steadynorm.errors import InputError
from steadynorm.layers.weight.target import own_class
from steadynorm.ranks import require_group
from steadynorm.selection import Selection, select

__all__ = ["Change", "Converted", "Target", "convert_"]

# Of a module: what named_modules has been through, and hooks, which belong to no model.
PLACES = {name for name in vars(nn.Module()) if name.startswith("_")}
UNKNOWN = "a normalization that is not of torch.nn's family"
UNSEEN = "not among the modules of the model, where .to() and state_dict() would see it"
Target = Literal["steadynorm", "torch", "sync", "batch"]


def convert_(
    model: nn.Module,
    to: Target,
    *,
    only: Selection | None = None,
    leave: Selection | None = None,
    process_group: Any = None,
    dims: Literal[1, 2, 3] | None = None,
) -> Change:
    """Make the normalizations of `model` others, in place: the same modules, tensors, hooks and aliases.

    There and back again is the identity. A layer that something would be lost of is refused, and then no layer is
    changed.

    Args:
        model: changed in place; for a changed copy give ``copy.deepcopy(model)``.
        to: "steadynorm": every normalization of torch.nn becomes ours of its name. "torch": ours become torch.nn's.
            "sync": BatchNorm1d, 2d and 3d, torch's or ours, and torch's SyncBatchNorm become our SyncBatchNorm.
            "batch": a SyncBatchNorm, torch's or ours, becomes the batch norm that it was before it was converted.
        only, leave: which layers, and which not: a pattern for paths (``"backbone"`` is all that is inside, ``*`` any
            characters), a class, several of them, or a function of path and layer.
        process_group: with "sync", whose batches are one; None is all ranks, or what torch's layer had.
        dims: with "batch", the dimensions behind N and C of a SyncBatchNorm that was none other before.

    Returns: what was done; `print` it.

    Raises:
        InputError: a layer cannot be converted, with its path and what would be lost. The model is as it was.
    """
    rule = _rule(to, process_group, dims)
    layers = select(_norms(model), only, "convert_(only=)", "normalization")
    left_out = {id(layer) for _, layer in select(_norms(model), leave, "convert_(leave=)", "normalization")}
    if leave is not None:
        layers = [(path, layer) for path, layer in layers if id(layer) not in left_out]
    paths = _paths(model)
    log = _convert(layers, rule, paths, f"convert_ to {to!r}")
    return Change(model, tuple(log), _left(model, rule, paths))


def _rule(to: str, process_group: Any, dims: int | None) -> Rule:
    if to not in get_args(Target):
        raise InputError(f"convert_ got to={to!r}, expected one of {', '.join(map(repr, get_args(Target)))}.")
    if process_group is not None and to != "sync":
        raise InputError(f"convert_ got process_group= to {to!r}: only SyncBatchNorm, to 'sync', has one.")
    if dims is not None and (to != "batch" or dims not in BY_DIMS):
        raise InputError(f"convert_ got dims={dims!r} to {to!r}, expected 1, 2 or 3, to 'batch'.")
    if process_group is not None:
        require_group(process_group, "convert_")
    rules: dict[str, Rule] = {
        "steadynorm": to_steadynorm,
        "torch": to_torch,
        "sync": to_sync(process_group),
        "batch": to_batch(dims),
    }
    return rules[to]


def _convert(
    layers: list[tuple[str, nn.Module]], rule: Rule, paths: dict[int, list[str]], what: str
) -> list[Converted]:
    """All of `layers` that the rule has a plan for, or none."""
    refusals, plans = [], []
    for path, layer in layers:
        try:
            plan = rule(layer)
        except InputError as refusal:
            refusals.append((path, str(refusal)))
        else:
            plans += [(path, layer, plan)] if plan is not None else []
    log, restores = [], [snapshot(layer) for _, layer, _ in plans]
    try:
        for path, layer, plan in plans:
            before = named(own_class(layer))
            try:
                note = become(layer, plan)
            except InputError as refusal:
                refusals.append((path, str(refusal)))
            else:
                log.append(Converted(tuple(paths[id(layer)]), before, named(own_class(layer)), note))
        if refusals:
            raise InputError(_about(refusals, what))
    except BaseException:
        for restore in restores:
            restore()
        raise
    return log


def _about(refusals: list[tuple[str, str]], what: str) -> str:
    lines = [f"{path or 'the model'} {reason.rstrip('.')}." for path, reason in refusals]
    which = "one layer" if len(lines) == 1 else f"{len(lines)} layers"
    return f"{what} cannot take {which}, and nothing was changed; leave= leaves a layer out.\n" + "\n".join(lines)


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The normalizations of torch.nn's family and ours, under every path that leads to them."""
    return [(path, one) for path, one in model.named_modules(remove_duplicate=False) if _is_norm(one)]


def _is_norm(module: nn.Module) -> bool:
    # Statistics by domain or step, which are ours, are of no one kind.
    return models.norm_kind(module) is not None or is_ours(own_class(module))


def _paths(model: nn.Module) -> dict[int, list[str]]:
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


def _left(model: nn.Module, rule: Rule, paths: dict[int, list[str]]) -> dict[str, str]:
    """What the rule would change if it were one of the model's modules: held in a plain list, dict or attribute."""
    left: dict[str, str] = {}
    if rule is to_steadynorm:
        foreign = (
            path for path, norm in _norms(model) if models.norm_kind(norm) == "frozen" and not is_ours(type(norm))
        )
        left |= dict.fromkeys(foreign, UNKNOWN)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in PLACES:
                continue
            for where, held in _held(value, ".".join(filter(None, (path, name))), set()):
                left |= {
                    ".".join(filter(None, (where, inner))): UNSEEN
                    for inner, norm in held.named_modules()
                    if id(norm) not in paths and _is_norm(norm) and _applies(rule, norm)
                }
    return left


def _held(value: Any, where: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a plain attribute, also inside of lists, tuples, sets and dicts."""
    if isinstance(value, nn.Module):
        yield where, value
    elif isinstance(value, list | tuple | set | frozenset | dict) and id(value) not in seen:
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _held(item, f"{where}[{key!r}]", seen)


def _applies(rule: Rule, norm: nn.Module) -> bool:
    try:
        return rule(norm) is not None
    except InputError:
        return True
