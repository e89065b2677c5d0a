"""Steps carried out on a model: weights take a norm in, and an Identity or the activation stands in its place."""

import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn

from steadynorm import models
from steadynorm.convert import convert_
from steadynorm.convert.change import Converted
from steadynorm.convert.classes import is_ours, named
from steadynorm.deploy import units
from steadynorm.deploy.affine import CONVS, Affine, Weights, after, before, fits, put_, weights_of
from steadynorm.deploy.flow import Record
from steadynorm.deploy.places import Refused, Step
from steadynorm.errors import InputError
from steadynorm.layers import InputNorm

Before = nn.Module | dict[str, Tensor | None]

PADS: dict[int, Any] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}
BY_RANK: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


class Folding:
    """A model in which norms are folded; its weights are kept in float64 beside it, to be rounded once.

    Args:
        steps: what was done.
        norms: the norms that are gone, by path.
        before: what the layers were that took them in, by path: weight and bias, or the norm that was there.
        padding: of convolutions that do not pad any more, how they did.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = list[Step]()
        self.norms = dict[str, nn.Module]()
        self.before = dict[str, Before]()
        self.padding = dict[str, tuple[Any, list[int]]]()
        self.log = list[Converted]()
        self.wide = dict[str, Weights | Affine]()

    def take(self, step: Step) -> None:
        """Fold one norm.

        Raises:
            Refused: the new weights do not fit into the dtype of the layer; nothing is changed.
        """
        norm, layer = self.model.get_submodule(step.norm), self.model.get_submodule(step.layer)
        inside = units.inside_of(norm)
        new = self._new(step, layer, inside.affine)
        if not fits(layer, new):
            raise Refused(f"the weights of {step.layer} would not be finite in {layer.weight.dtype}")
        paths = tuple(path for path, one in self.model.named_modules(remove_duplicate=False) if one is norm)
        if isinstance(new, Affine):
            self.before.setdefault(step.layer, layer)
            merged = scaling(new, BY_RANK[step.rank], layer)
            models.replace(self.model, layer, merged)
        else:
            self.before.setdefault(step.layer, {name: getattr(layer, name, None) for name in ("weight", "bias")})
            put_(layer, new)
        self.wide[step.layer] = new
        stand_in = self._stand_in(step, layer, inside.activation)
        models.replace(self.model, norm, stand_in)
        self.steps.append(step)
        self.norms[step.norm] = norm
        verb = "folded into" if step.side == "after" else "folded forward into"
        shown = "the addition" if step.adds else named(type(stand_in))
        note = "" if isinstance(stand_in, nn.Identity) else f"{shown} in its place"
        self.log.append(Converted(paths, named(type(norm)), f"{verb} {step.layer}", note))

    def _stand_in(self, step: Step, layer: nn.Module, activation: nn.Module | None) -> nn.Module:
        """What is left to do where the norm was."""
        if step.adds:
            return adding(None, activation)
        if step.border is None:
            return activation or nn.Identity().eval()
        assert isinstance(layer, CONVS)
        widths = layer._reversed_padding_repeated_twice
        self.padding[step.layer] = (layer.padding, widths)
        layer.padding, layer._reversed_padding_repeated_twice = (0,) * (len(widths) // 2), [0] * len(widths)
        return PADS[len(widths) // 2](tuple(widths), step.border).eval()

    def _new(self, step: Step, layer: nn.Module, affine: Affine) -> Weights | Affine:
        """What the layer becomes."""
        wide = self.wide.get(step.layer)
        if not units.is_linear(layer):
            first = wide if isinstance(wide, Affine) else units.inside_of(layer).affine
            return Affine(first.scale * affine.scale, affine.scale * first.shift + affine.shift)
        weights = wide if isinstance(wide, Weights) else weights_of(layer)
        return (after if step.side == "after" else before)(layer, weights, affine)


def adding(norm: nn.Module | None, activation: nn.Module | None) -> nn.Module:
    """A module of torch that is called as a norm with a residual: activation(norm(input) + residual)."""
    graph = fx.Graph()
    y, residual = graph.placeholder("input"), graph.placeholder("residual")
    if norm is not None:
        y = graph.call_module("norm", (y,))
    y = graph.call_function(operator.add, (y, residual))
    if activation is not None:
        y = graph.call_module("activation", (y,))
    graph.output(y)
    parts = {name: part for name, part in (("norm", norm), ("activation", activation)) if part is not None}
    return fx.GraphModule(parts, graph).eval()


def scaling(affine: Affine, cls: type[nn.Module], like: nn.Module) -> nn.Module:
    """A batch norm of torch.nn in evaluation that is one scale and one shift."""
    first = next(tensor for tensor in (*like.parameters(), *like.buffers()) if tensor.is_floating_point())
    new: Any = cls(len(affine.scale), 0.0, None, device=first.device, dtype=first.dtype)
    with torch.no_grad():
        new.weight.copy_(affine.scale)
        new.bias.copy_(affine.shift)
    return new.eval().requires_grad_(False)


def make_torchs(model: nn.Module, record: Record) -> tuple[nn.Module, list[Converted], dict[str, str]]:
    """What is left of steadynorm's normalizations becomes torch.nn's, in evaluation; why not, where one cannot.

    A batch norm that stands alone stays a batch norm: torch's is one multiply and one add per value in evaluation
    already, bit for bit what it was. A 1x1 convolution by channel would be the same work in a slower kernel, and would
    round once more.
    """
    log, left = list[Converted](), dict[str, str]()
    for path, norm in list(units.normalizations(model)):
        if not is_ours(type(norm)) and not isinstance(norm, InputNorm):
            continue
        before = named(type(norm))
        paths = tuple(one for one, module in model.named_modules(remove_duplicate=False) if module is norm)
        try:
            new = _of_torch(path, norm, record)
        except (InputError, Refused) as reason:
            left[path] = f"it needs steadynorm: {reason}"
            continue
        model = models.replace(model, norm, new)
        after_it = "torch.fx.GraphModule" if isinstance(new, fx.GraphModule) else named(type(new))
        log.append(Converted(paths, before, after_it))
    return model, log, left


def _of_torch(path: str, norm: nn.Module, record: Record) -> nn.Module:
    if not units.known(norm, units.NORMS):
        # As a model of its own: convert_ says what it cannot take.
        holder = nn.Sequential(norm)
        convert_(holder, "torch")
        return holder[0]
    reason = units.why_not(norm)
    if reason:
        raise Refused(reason)
    calls = record.calls.get(path, [])
    others = {call.others for call in calls}
    if others - {(), ("residual",)} or len(others) > 1:
        raise Refused("it is called with more than its input: a residual in some of its calls, a mask or lengths")
    ranks = {len(call.given.shape) for call in calls if call.given is not None} or set(getattr(norm, "ranks", ()))
    classes = {BY_RANK[rank] for rank in ranks}
    if len(classes) != 1:
        raise Refused("no batch says which dimensions it takes" if not calls else "it takes several dimensions")
    if isinstance(norm, InputNorm):
        if any(call.given is None or call.made is None or call.given.dtype != call.made.dtype for call in calls):
            raise Refused("it takes another dtype than it gives")
        return _standardising(norm, classes.pop())
    return _batch_norm(norm, classes.pop(), adds=others == {("residual",)})


def _standardising(norm: InputNorm, cls: type[nn.Module]) -> nn.Module:
    """Two batch norms of torch.nn: the first takes the mean out, all digits of it, the second scales."""
    affine = units.inside_of(norm).affine
    one, zero = torch.ones_like(affine.scale), torch.zeros_like(affine.shift)
    centred = scaling(Affine(one, -norm.mean.double()), cls, norm)
    return nn.Sequential(OrderedDict(center=centred, scale=scaling(Affine(affine.scale, zero), cls, norm))).eval()


def _batch_norm(norm: nn.Module, cls: type[nn.Module], *, adds: bool) -> nn.Module:
    """A batch norm of torch.nn in evaluation with the tensors of one of ours; a sum and an activation behind it."""
    values: dict[str, Any] = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    # torch wants all of them in one dtype; ours keeps the statistics of half types in float32.
    dtype = max((tensor.dtype for tensor in tensors), key=lambda one: one.itemsize)
    new: Any = cls(norm.num_features, norm.eps, None, affine=False, device=tensors[0].device, dtype=dtype)
    for name in ("running_mean", "running_var"):
        getattr(new, name).copy_(values[name])
    if values["weight"] is not None or values["bias"] is not None:
        weight = values["weight"] if values["weight"] is not None else torch.ones_like(values["bias"])
        new.affine = True
        trains = weight.requires_grad
        new.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=trains)
        if values["bias"] is not None:
            new.bias = nn.Parameter(values["bias"].detach().to(dtype, copy=True), requires_grad=trains)
    new.eval()
    activation = units.inside_of(norm).activation
    if adds:
        return adding(new, activation)
    return new if activation is None else nn.Sequential(OrderedDict(norm=new, activation=activation)).eval()
