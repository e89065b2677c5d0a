"""Steps carried out on a model: weights take a norm in, and an Identity or the activation stands in its place."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.convert import convert_
from steadynorm.convert.change import Converted
from steadynorm.convert.classes import is_ours, named
from steadynorm.deploy import units
from steadynorm.deploy.affine import Weights, affine_of, after, before, fits, put_, weights_of
from steadynorm.deploy.flow import Record
from steadynorm.deploy.places import Refused, Step
from steadynorm.errors import InputError

BY_RANK: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


class Folding:
    """A model in which norms are folded; its weights are kept in float64 beside it, to be rounded once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wide: dict[str, Weights] = {}
        self.log: list[Converted] = []

    def take(self, step: Step) -> None:
        """Fold one norm.

        Raises:
            Refused: the new weights do not fit into the dtype of the layer; nothing is changed.
        """
        norm, layer = self.model.get_submodule(step.norm), self.model.get_submodule(step.layer)
        weights = self.wide.get(step.layer) or weights_of(layer)
        new = (after if step.side == "after" else before)(layer, weights, affine_of(norm))
        if not fits(layer, new):
            raise Refused(f"the weights of {step.layer} would not be finite in {layer.weight.dtype}")
        self.wide[step.layer] = new
        paths = tuple(path for path, one in self.model.named_modules(remove_duplicate=False) if one is norm)
        put_(layer, new)
        activation = units.activation_of(norm)
        models.replace(self.model, norm, nn.Identity().eval() if activation is None else activation)
        verb = "folded into" if step.side == "after" else "folded forward into"
        note = "" if activation is None else f"{type(activation).__name__} in its place"
        self.log.append(Converted(paths, named(type(norm)), f"{verb} {step.layer}", note))


def make_torchs(model: nn.Module, record: Record) -> tuple[nn.Module, list[Converted], dict[str, str]]:
    """What is left of steadynorm's normalizations becomes torch.nn's, in evaluation; why not, where one cannot.

    A batch norm that stands alone stays a batch norm: torch's is one multiply and one add per value in evaluation
    already, bit for bit what it was. A 1x1 convolution by channel would be the same work in a slower kernel, and would
    round once more.
    """
    log, left = list[Converted](), dict[str, str]()
    for path, norm in list(units.normalizations(model)):
        if not is_ours(type(norm)):
            continue
        before = named(type(norm))
        paths = tuple(one for one, module in model.named_modules(remove_duplicate=False) if module is norm)
        try:
            new = _of_torch(path, norm, record)
        except (InputError, Refused) as reason:
            left[path] = f"it needs steadynorm: {reason}"
            continue
        model = models.replace(model, norm, new)
        log.append(Converted(paths, before, named(type(new))))
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
    if any(not call.is_plain for call in calls):
        raise Refused("it is called with more than its input: a residual, a mask or lengths")
    ranks = {len(call.given.shape) for call in calls if call.given is not None} or set(getattr(norm, "ranks", ()))
    classes = {BY_RANK[rank] for rank in ranks}
    if len(classes) != 1:
        raise Refused("no batch says which dimensions it takes" if not calls else "it takes several dimensions")
    return _batch_norm(norm, classes.pop())


def _batch_norm(norm: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A batch norm of torch.nn in evaluation with the tensors of one of ours, and its activation behind it."""
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
    activation = units.activation_of(norm)
    return new if activation is None else nn.Sequential(OrderedDict(norm=new, activation=activation)).eval()
