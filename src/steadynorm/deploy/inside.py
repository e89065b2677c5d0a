"""What a normalization does in evaluation: one scale and one shift per channel, and an activation behind them.

Of the batch norms of torch.nn and ours that is known. Of somebody else's it is read from the operators that run in it,
so that a frozen batch norm, or a batch norm with an activation, is known by what it computes and not by its name.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steadynorm import layers
from steadynorm.deploy.affine import Affine, affine_of_input_norm, affine_of_running
from steadynorm.samples import tensors_in

RANKS = (4, 3, 5, 2)
"""Numbers of dimensions that a norm of somebody else's is tried with."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
}
"""What our layers call their activation, and the module of torch.nn that computes it."""

# The same by operator: what is made of its further arguments is a module that computes the same.
_OPERATORS: dict[str, Any] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": lambda approximate="none": nn.GELU(approximate),
    "leaky_relu": nn.LeakyReLU,
    "elu": lambda alpha=1.0, scale=1.0, input_scale=1.0: nn.ELU(alpha) if scale == input_scale == 1 else None,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
}


class Inside(NamedTuple):
    """y = activation(scale · x + shift), scale and shift per channel, dimension 1 of x.

    Args:
        affine: scale and shift.
        activation: None where there is none.
        distance: how many deviations the mean of a channel is from zero, at most: digits that x has and y has not.
        ranks: numbers of dimensions of x for which that is known; None is any.
    """

    affine: Affine
    activation: nn.Module | None
    distance: float
    ranks: frozenset[int] | None = None


def of_known(norm: nn.Module) -> Inside:
    """The inside of a batch norm of torch.nn or ours with running statistics, or of an InputNorm."""
    if isinstance(norm, layers.InputNorm):
        affine, mean = affine_of_input_norm(norm), norm.mean.double()
    else:
        assert isinstance(norm.running_mean, Tensor)
        affine, mean = affine_of_running(norm), norm.running_mean.double()
        # In units of the deviation, whatever the weight is.
        bare = affine_of_running(norm, with_weight=False)
        return Inside(affine, _activation(norm), _largest(mean * bare.scale))
    return Inside(affine, None, _largest(mean * affine.scale))


def of_foreign(norm: nn.Module) -> Inside | str:
    """The inside of somebody else's norm, or why it is not known.

    A copy in float64 is run on numbers; what is done with them must be one row of operators: those that scale and shift
    by values which do not depend on the input, then activations and the norm's own modules. What that gives is
    compared with what the norm gives for other numbers.
    """
    try:
        wide = copy.deepcopy(norm).cpu().double()
    except Exception as error:
        return f"it cannot be copied: {type(error).__name__}: {error}"
    found: dict[int, Inside] = {}
    reason = "it takes no batch of images, sequences, volumes or rows"
    for rank in RANKS:
        try:
            inside = _followed(norm, wide, rank)
        except _Lost as lost:
            reason = str(lost)
            continue
        except Exception:  # somebody else's code: dimensions that it does not take
            continue
        found[rank] = inside
    if not found:
        return reason
    first = next(iter(found.values()))
    alike = [rank for rank, one in found.items() if _are_equal(one.affine, first.affine)]
    return first._replace(ranks=frozenset(alike))


class _Lost(Exception):
    """The input cannot be followed further, and why."""


class _Following(TorchDispatchMode):
    """Follows one value through the operators that run."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.at, self.shape = x, x.shape
        self.past = [x]  # held, so that no storage is used again
        self.scale, self.shift = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
        self.behind = list[nn.Module]()
        self.is_within_child = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.is_within_child or not any(map(self._is_past, tensors_in((args, kwargs)))):
            return output
        places = [place for place, value in enumerate(args) if isinstance(value, Tensor) and self.is_at(value)]
        name = func.overloadpacket.__name__.rstrip("_") if func.overloadpacket.__name__[0] != "_" else str(func)
        others = [value for place, value in enumerate(args) if place not in places]
        if len(places) != 1 or any(map(self._is_past, tensors_in((others, kwargs)))):
            raise _Lost(f"{name} in it takes its input together with what was made of it")
        is_in_place = any(map(self.is_at, tensors_in(output)))
        if is_in_place and len(self.past) == 1:
            if name in ("detach", "alias", "view", "expand"):  # the same values at the same places
                return output
            raise _Lost(f"{name} in it changes its input")
        self._take(name, places[0], args, kwargs)
        self.move(output[0] if isinstance(output, tuple) else output)
        return output

    def move(self, value: Any) -> None:
        """Go on from what was made."""
        if not isinstance(value, Tensor) or value.shape != self.shape:
            raise _Lost("its output has another shape than its input")
        self.at = value
        self.past.append(value)

    def is_at(self, value: Tensor) -> bool:
        at = self.at
        return (
            value.untyped_storage()._cdata == at.untyped_storage()._cdata
            and value.shape == at.shape
            and value.stride() == at.stride()
            and value.storage_offset() == at.storage_offset()
            and value.dtype == at.dtype
        )

    def _is_past(self, value: Tensor) -> bool:
        return any(value.untyped_storage()._cdata == one.untyped_storage()._cdata for one in self.past)

    def _take(self, name: str, place: int, args: Any, kwargs: Any) -> None:
        if name in _OPERATORS and place == 0:
            activation = _OPERATORS[name](*args[1:], **kwargs)
            if activation is not None:
                self.behind.append(activation)
                return
        if self.behind:
            raise _Lost(f"{name} in it comes behind an activation")
        if name == "native_batch_norm" and place == 0 and not args[5]:
            weight, bias, mean, var = args[1:5]
            scale = (var + args[7]).rsqrt() * (1 if weight is None else weight)
            self._affine(scale, (0 if bias is None else bias) - mean * scale)
        elif name == "mul":
            self._affine(self._channels(args[1 - place]), 0)
        elif name == "div" and place == 0 and not kwargs and len(args) == 2:
            self._affine(1 / self._channels(args[1]), 0)
        elif name in ("add", "sub", "rsub"):
            self._add(name, place, args[1 - place], kwargs.get("alpha", args[2] if len(args) > 2 else 1))
        elif name == "addcmul" and place in (1, 2):
            self._affine(self._channels(args[3 - place]) * kwargs.get("value", 1), self._channels(args[0]))
        elif name == "neg":
            self._affine(-1, 0)
        else:
            raise _Lost(f"{name} in it is not one scale and one shift per channel")

    def _add(self, name: str, place: int, other: Any, alpha: Any) -> None:
        """x ± alpha · other, or other ± alpha · x; rsub(a, b) is b − alpha · a."""
        sign = 1 if name == "add" else -1
        is_first = place == (1 if name == "rsub" else 0)
        other = self._channels(other)
        self._affine(*((1, sign * alpha * other) if is_first else (sign * alpha, other)))

    def _affine(self, scale: Any, shift: Any) -> None:
        self.scale, self.shift = self.scale * scale, self.shift * scale + shift

    def _channels(self, value: Any) -> Tensor:
        """What is added or multiplied, per channel."""
        spread = torch.as_tensor(value, dtype=self.scale.dtype).expand(self.shape)
        channels = spread.movedim(1, 0).flatten(1)
        if not bool((channels == channels[:, :1]).all()):
            raise _Lost("what it scales or shifts by is not one value per channel")
        return channels[:, 0].clone()


def _followed(norm: nn.Module, wide: nn.Module, rank: int) -> Inside:
    mean = norm.running_mean
    assert isinstance(mean, Tensor)
    shape = (2, 2, mean.numel(), *(3, 2, 2)[: rank - 2])
    x, other = torch.linspace(-2, 3, math.prod(shape), dtype=torch.float64).sin().mul(3).view(shape)
    following = _Following(x.clone())
    with torch.no_grad(), _children(wide, norm, following), following:
        output = wide(following.at)
    if not isinstance(output, Tensor) or not following.is_at(output):
        raise _Lost("it returns something else than its normalised input")
    behind = following.behind
    activation = None if not behind else behind[0] if len(behind) == 1 else nn.Sequential(*behind)
    inside = Inside(Affine(following.scale, following.shift), activation, _distance(following))
    _check(inside, wide, other)
    return inside._replace(affine=Affine(*(t.to(mean.device) for t in inside.affine)))


def _check(inside: Inside, wide: nn.Module, x: Tensor) -> None:
    """Raise _Lost where other numbers give something else."""
    spread = [t.view(-1, *[1] * (x.dim() - 2)) for t in inside.affine]
    with torch.no_grad():
        y = x * spread[0] + spread[1]
        y = y if inside.activation is None else copy.deepcopy(inside.activation).cpu().double()(y)
        if not torch.allclose(y, wide(x.clone()), rtol=1e-9, atol=1e-9):
            raise _Lost("what it computes depends on more than its operators show")


@contextmanager
def _children(wide: nn.Module, norm: nn.Module, following: _Following) -> Iterator[None]:
    """What the modules of the norm do need not be known: they stay, behind it."""

    def enter(module: nn.Module, args: Any) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not following.is_at(args[0]):
            raise _Lost("a module in it is given something else than its normalised input")
        following.is_within_child = True

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            following.is_within_child = False
            if isinstance(output, Tensor) and following.is_at(output) and isinstance(module, nn.Identity | nn.Dropout):
                return
            following.behind.append(norm.get_submodule(name))
            following.move(output)

        return hook

    handles = []
    for name, child in wide.named_children():
        handles += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activation(norm: nn.Module) -> nn.Module | None:
    name: Any = getattr(norm, "activation", None)
    return None if name is None else ACTIVATIONS[name]().eval()


def _distance(following: _Following) -> float:
    mean = following.shift / following.scale
    return _largest(mean[following.scale != 0])


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _are_equal(a: Affine, b: Affine) -> bool:
    return torch.equal(a.scale, b.scale) and torch.equal(a.shift, b.shift)
