"""unfold: norms that were folded come back, also when the folded model has been trained since."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from steadynorm import models
from steadynorm.convert.change import Change, Converted
from steadynorm.convert.classes import named
from steadynorm.deploy import units
from steadynorm.deploy.affine import LINEARS, Affine, Weights, after, before, by_input, by_output, put_, weights_of
from steadynorm.deploy.difference import Forward
from steadynorm.deploy.fold import Folded
from steadynorm.deploy.folding import Before, scaling
from steadynorm.deploy.places import Step
from steadynorm.deploy.verify import verify
from steadynorm.errors import DifferenceError, InputError


def unfold(
    change: Folded, batches: Iterable[Any], *, tolerance: float | None = None, forward: Forward | None = None
) -> Change:
    """A copy of a folded model in which the norms are where they were, and the outputs are what they are now.

    after a layer:   W = W' / scale,  c = (c' − shift) / scale
    before a layer:  W = W' / scale,  c = c' − Σ W · shift

    Weights that are what `fold` made of them become, bit for bit, what they were; those that were trained since are
    taken apart in float64 with the norm that was folded, and rounded once. So a model can be fine-tuned without the
    cost of its frozen norms, and still be given back in the form, and with the names, that it had.

    A channel whose scale is 0 cannot be taken apart: where its weights were trained, its norm gets the weight that
    makes its scale 1. A layer that had no bias gets none as long as the norm behind it has one to take it.

    Args:
        change: what `fold` returned; its model may have been trained, in place, since.
        batches: examples on which both models are run and compared.
        tolerance: the largest relative difference of an output; by default `default_tolerance`.
        forward: called as forward(model, batch), in place of model(batch), model(*args) or model(**dict).

    Returns: the model, with the norms in evaluation mode as they were; what came back; the comparison. Weights that
        `fold` made plain or untied stay so, and norms of ours that it left standing stay torch's.

    Raises:
        InputError: the model has other layers than `fold` gave it, or another dtype; two norms that became one were
            trained.
        DifferenceError: the outputs are apart, with the numbers; nothing is returned.
    """
    if not isinstance(change, Folded) or change.folding is None:
        raise InputError(f"unfold expected what fold returned, got {type(change).__name__}.")
    batches = [*batches]
    model, folding = copy.deepcopy(change.model), change.folding
    norms = copy.deepcopy(folding.norms)
    paths = {step.norm: entry.paths for step, entry in zip(folding.steps, folding.log, strict=True)}
    notes = dict[str, str]()
    for layer in dict.fromkeys(step.layer for step in folding.steps):
        steps = [step for step in folding.steps if step.layer == layer]
        _take_back(model, layer, folding.before[layer], steps, norms, notes)
        if layer in folding.padding:
            conv: Any = _at(model, layer)
            conv.padding, conv._reversed_padding_repeated_twice = folding.padding[layer]
    log = tuple(
        Converted(paths[path], _put_back(model, paths[path], norm), named(type(norm)), notes.get(path, ""))
        for path, norm in norms.items()
    )
    comparison = verify(change.model, model, batches, tolerance=tolerance, apart=change.apart, forward=forward)
    if not comparison.agrees:
        raise DifferenceError(
            f"the unfolded model differs from the folded one: {comparison.worst}; they part at"
            f" {comparison.first or 'the model itself'}. Nothing was unfolded; tolerance= allows more."
        )
    return Change(model, log, {}, "unfolded", comparison, change.apart)


def _put_back(model: nn.Module, paths: tuple[str, ...], norm: nn.Module) -> str:
    """Put a norm where it was; what stood there."""
    for path in paths:
        old = _at(model, path)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, norm)
    return "torch.fx.GraphModule" if isinstance(old, fx.GraphModule) else named(type(old))


def _take_back(
    model: nn.Module, path: str, was: Before, steps: list[Step], norms: dict[str, nn.Module], notes: dict[str, str]
) -> None:
    """Take the norms out of one layer again."""
    layer = _at(model, path)
    if isinstance(was, nn.Module):
        _split_norm(model, path, was, steps, norms)
        return
    now, then = getattr(layer, "weight", None), was["weight"]
    assert then is not None
    if (
        not isinstance(layer, LINEARS)
        or not isinstance(now, Tensor)
        or (now.shape, now.dtype) != (then.shape, then.dtype)
    ):
        raise InputError(f"unfold: {path} is not the layer that fold left there: it has another class, shape or dtype.")
    original = _holding(layer, was)
    for step in steps:
        norms[step.norm].to(now.device)
    levels = [weights_of(original)]
    for step in steps:
        levels.append(_fold(step)(layer, levels[-1], units.inside_of(norms[step.norm]).affine))
    is_same = _same(layer, levels[-1])
    if all(bool(part.all()) for part in is_same):
        _restore(layer, was)
        return
    wide = weights_of(layer)
    for step, level in zip(reversed(steps), reversed(levels[:-1]), strict=True):
        is_same = _rescaled(step, layer, norms[step.norm], is_same)
        wide = _apart(step, layer, wide, level, units.inside_of(norms[step.norm]).affine, is_same)
    _put_trained(layer, wide, was, steps[0], norms, notes)


def _apart(step: Step, layer: nn.Module, folded: Weights, level: Weights, affine: Affine, is_same: Weights) -> Weights:
    """The weights before one norm was folded in; those that nobody changed are what they were."""
    if step.side == "after":
        found = after(layer, folded, affine.inverse())
        weight = torch.where(is_same.weight, level.weight, found.weight)
        return Weights(weight, torch.where(is_same.bias, level.bias, found.bias))
    one, zero = torch.ones_like(affine.scale), torch.zeros_like(affine.shift)
    weight = before(layer, folded, Affine(1 / affine.scale, zero)).weight
    weight = torch.where(is_same.weight, level.weight, weight)
    bias = before(layer, Weights(weight, folded.bias), Affine(one, -affine.shift)).bias
    return Weights(weight, torch.where(is_same.bias, level.bias, bias))


def _same(layer: nn.Module, folded: Weights) -> Weights:
    """Which weights are, to the bit, what fold made; of biases, where all that makes the output is."""
    dtype = layer.weight.dtype
    now = weights_of(layer)
    weight = now.weight == folded.weight.to(dtype).double()  # type: ignore[arg-type]
    bias = now.bias == folded.bias.to(dtype).double()  # type: ignore[arg-type]
    return Weights(weight, bias & by_output(layer, weight).all(1))


def _rescaled(step: Step, layer: nn.Module, norm: nn.Module, is_same: Weights) -> Weights:
    """Give scale 1 to the channels of a norm whose scale is 0 and whose weights were trained; what is the same then."""
    scale = units.inside_of(norm).affine.scale
    changed = ~is_same.bias if step.side == "after" else ~by_input(layer, is_same.weight).all(1)
    lost = changed & (scale.abs() < torch.finfo(torch.float32).tiny)
    if not bool(lost.any()):
        return is_same
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        with torch.no_grad():
            weight[lost] = 1
            weight[lost] = (1 / units.inside_of(norm).affine.scale[lost]).to(weight.dtype)
    if not torch.allclose(units.inside_of(norm).affine.scale[lost], torch.ones_like(scale[lost])):
        raise InputError(f"unfold: {step.norm} has channels of scale 0 that were trained in {step.layer} since.")
    ones, none = torch.ones_like(is_same.weight, dtype=scale.dtype), torch.zeros_like(scale)
    touched = _fold(step)(layer, Weights(ones, scale.new_zeros(is_same.bias.shape)), Affine(lost.double(), none))
    same = is_same.weight & (touched.weight == 0)
    return Weights(same, is_same.bias & by_output(layer, same).all(1))


def _put_trained(
    layer: nn.Module,
    wide: Weights,
    was: dict[str, Tensor | None],
    first: Step,
    norms: dict[str, nn.Module],
    notes: dict[str, str],
) -> None:
    """Give the layer its weights; a bias that it did not have goes into the norm behind it, where there is a place."""
    norm = norms[first.norm]
    bias = getattr(norm, "bias", None)
    put_(layer, wide)
    if was["bias"] is not None or isinstance(layer, nn.Embedding):
        return
    if first.side == "before" or not isinstance(bias, Tensor):
        notes[first.norm] = f"{first.layer} has a bias now"
        return
    with torch.no_grad():
        bias.copy_(bias.double() + units.inside_of(norm).affine.scale * wide.bias)
    layer.register_parameter("bias", None)


def _restore(layer: nn.Module, was: dict[str, Tensor | None]) -> None:
    """The parameters that a layer had, in copies."""
    now = layer.weight
    assert isinstance(now, Tensor)
    for name in layer._parameters.keys() & was.keys():
        tensor = was[name]
        new = None if tensor is None else nn.Parameter(tensor.detach().to(now.device, copy=True), now.requires_grad)
        layer.register_parameter(name, new)


def _split_norm(model: nn.Module, path: str, was: nn.Module, steps: list[Step], norms: dict[str, nn.Module]) -> None:
    """Two norms that became one."""
    merged = _at(model, path)
    affine = units.inside_of(was).affine
    for step in steps:
        behind = units.inside_of(norms[step.norm]).affine
        affine = Affine(affine.scale * behind.scale, behind.scale * affine.shift + behind.shift)
    expected = scaling(affine, type(merged), merged).state_dict()
    if any(not torch.equal(value, expected[name]) for name, value in merged.state_dict().items()):
        raise InputError(f"unfold: {path}, which was more than one norm, was changed: which of them was is not known.")
    models.replace(model, merged, copy.deepcopy(was))


def _holding(layer: nn.Module, was: dict[str, Tensor | None]) -> nn.Module:
    """The layer with the weight and bias that it had, where the layer is now."""
    held, device = copy.copy(layer), next(layer.parameters()).device
    then = {name: tensor if tensor is None else tensor.to(device) for name, tensor in was.items()}
    held.__dict__["_parameters"] = layer._parameters | then
    return held


def _fold(step: Step) -> Any:
    return after if step.side == "after" else before


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"unfold: the model has no {path} any more.") from error
