"""freeze_ and unfreeze_: the normalizations of a model, chosen by name, depth or function, held as they are."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.layers.switches import DEFAULTS, Switches
from steadynorm.selection import Selection, select

BEFORE = "_before_freeze"
"""Attribute of a layer that `freeze_` has frozen: its switches and which of its parameters trained, as they were."""
LISTED = 5
WHAT = "normalization with running statistics"

Found = Sequence[tuple[str, nn.Module]]


def freeze_(
    model: nn.Module,
    only: Selection | None = None,
    *,
    leave: Selection | None = None,
    depth: int | None = None,
    affine: bool = True,
) -> tuple[str, ...]:
    """Normalise by the running statistics and keep them as they are, whatever `.train()` says, until `unfreeze_`.

    Args:
        model: changed in place. Of its layers those with running statistics count: batch norm and its relatives.
        only, leave: which of them, and which not: a pattern for paths (``"backbone"`` is all that is inside, ``*`` any
            characters), a class, several of them, or a function of path and layer.
        depth: of these the first so many, in the order in which the model defines them.
        affine: also stop weight and bias from training; their gradients are dropped.

    Returns: the paths of the layers that are frozen now and were not before, or not as far.

    Raises:
        InputError: a layer is torch.nn's, which `.train()` would thaw; nothing fits; or a weight cannot be frozen. The
            model is as it was.
    """
    layers = _chosen(model, only, leave, depth, "freeze_")
    switched = [(path, layer) for path, layer in layers if isinstance(layer, Switches)]
    _ensure_ours([found for found in layers if not isinstance(found[1], Switches)])
    if affine:
        _ensure_free(model, switched)
    frozen = []
    for path, layer in switched:
        if is_frozen(layer) and not (affine and layer.train_affine):
            continue
        if not (is_frozen(layer) and BEFORE in vars(layer)):
            vars(layer)[BEFORE] = _state(layer)
        layer.freeze_(affine)
        frozen.append(path)
    return tuple(frozen)


def unfreeze_(
    model: nn.Module,
    only: Selection | None = None,
    *,
    leave: Selection | None = None,
    depth: int | None = None,
) -> tuple[str, ...]:
    """Take `freeze_` back: each layer is as it was before, also where its own `freeze_` or switches had been used.

    A layer that `freeze_` has not frozen, but its own method or a checkpoint, is set to what torch.nn does.

    Args:
        model, only, leave, depth: as in `freeze_`; all layers by default.

    Returns: the paths of the layers that were changed.

    Raises:
        InputError: nothing fits, or the weights are in DistributedDataParallel. The model is as it was.
    """
    layers = _chosen(model, only, leave, depth, "unfreeze_")
    switched = [(path, layer) for path, layer in layers if isinstance(layer, Switches)]
    if isinstance(model, DistributedDataParallel) and not all(layer.train_affine for _, layer in switched):
        raise InputError(
            "unfreeze_ got a model inside DistributedDataParallel, which does not know weights that were frozen when it"
            " was made, and would not exchange their gradients: unfreeze its .module, and wrap that anew."
        )
    thawed = []
    for path, layer in switched:
        before = vars(layer).pop(BEFORE, None)
        if before is not None:
            _put_back(layer, before)
        elif is_frozen(layer):
            layer.unfreeze_()
        else:
            continue
        thawed.append(path)
    return tuple(thawed)


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer of ours normalises by its running statistics and does not move them, in any mode."""
    return isinstance(layer, Switches) and layer.normalize_by == "running" and layer.update_running is False


def _chosen(
    model: nn.Module, only: Selection | None, leave: Selection | None, depth: int | None, verb: str
) -> list[tuple[str, nn.Module]]:
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 1):
        raise InputError(f"{verb} got depth={depth!r}, expected a number of layers from 1 on.")
    found = [(path, one) for path, one in model.named_modules(remove_duplicate=False) if _can_move(one)]
    if not found:
        raise InputError(f"{verb} got a model without any {WHAT}: there is nothing that could be frozen.")
    left_out = [] if leave is None else [id(one) for _, one in select(found, leave, f"{verb}(leave=)", WHAT)]
    chosen = [(path, one) for path, one in select(found, only, f"{verb}(only=)", WHAT) if id(one) not in left_out]
    return chosen[:depth]


def _can_move(module: nn.Module) -> bool:
    """Whether a module, torch.nn's or ours, has statistics that could move: FrozenBatchNorm has not."""
    return isinstance(module, _NormBase) and models.has_running_statistics(module)


def _ensure_ours(torchs: Found) -> None:
    if torchs:
        kinds = ", ".join(sorted({type(layer).__name__ for _, layer in torchs}))
        raise InputError(
            f"freeze_ got {_listed(path for path, _ in torchs)} of torch.nn ({kinds}), which model.train() would thaw"
            " again: convert_(model, 'steadynorm') first, or leave= them out. Nothing was frozen."
        )


def _ensure_free(model: nn.Module, layers: Found) -> None:
    """Raise InputError where weight and bias of a layer cannot stop to train alone."""
    if isinstance(model, DistributedDataParallel):
        raise InputError(
            "freeze_ got a model inside DistributedDataParallel, which goes on waiting for the gradients of its"
            " weights: freeze before it is wrapped, or only the statistics with affine=False."
        )
    computed = [path for path, layer in layers if parametrize.is_parametrized(layer)]
    if computed:
        raise InputError(
            f"freeze_ got {_listed(computed)} with a parametrized weight or bias: make it plain with make_plain, or"
            " freeze only the statistics with affine=False."
        )
    chosen = {id(layer) for _, layer in layers}
    ours = {id(p): path for path, layer in layers for p in layer.parameters(recurse=False)}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(module) not in chosen and id(parameter) in ours:
                raise InputError(
                    f"freeze_ got {ours[id(parameter)]}, which shares a parameter with {path or 'the model'}, which"
                    " would stop to train too: freeze both, or only the statistics with affine=False."
                )


def _state(layer: Switches) -> dict[str, Any]:
    trains = {name: parameter.requires_grad for name, parameter in layer.named_parameters(recurse=False)}
    return {"switches": {switch: getattr(layer, switch) for switch in DEFAULTS}, "trains": trains}


def _put_back(layer: Switches, before: dict[str, Any]) -> None:
    for switch, value in before["switches"].items():
        if getattr(layer, switch) != value:  # setting train_affine sets the parameters
            setattr(layer, switch, value)
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.requires_grad = before["trains"].get(name, parameter.requires_grad)


def _listed(paths: Iterable[str]) -> str:
    paths = [path or "the model" for path in paths]
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(paths[:LISTED]) + more
