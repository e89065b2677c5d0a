"""Which norm can go into which layer, decided by what was recorded; a reason where none can."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from steadynorm.deploy import units
from steadynorm.deploy.affine import CONVS, TAKES_BEFORE, channel_axis, in_features, out_features
from steadynorm.deploy.difference import default_tolerance
from steadynorm.deploy.flow import Call, Geometry, Key, Record, Use, own_tensors
from steadynorm.deploy.inside import Inside
from steadynorm.layers.weight.target import TRANSPOSED

EXACT_PADDING = ("circular", "reflect", "replicate")
"""Padding with values of the input: scaled and shifted as they are."""
ROUNDING = 1e-12
"""Of one value in float64."""
SPARE = 4
"""A norm whose input is so far from zero that rounding alone reaches 1/4 of the tolerance stays where it is."""


@dataclass(frozen=True)
class Step:
    """One fold: the norm at a path goes into the layer at another, which runs before it or after it.

    Args:
        norm, layer: paths; the layer may be another norm.
        side: on which side of the layer the norm is.
        rank: number of dimensions of what the layer makes.
        adds: whether it is called with a residual, which is still to be added where it was.
        turns: whether the output of the norm lies in memory otherwise than its input: a view of it may want that.
        border: of a norm before a layer that pads with zeros, the value that the norm takes to 0: padding with it in
            the norm's place is padding with 0 behind it. None where there is nothing to pad.
    """

    norm: str
    layer: str
    side: Literal["after", "before"]
    rank: int
    adds: bool = False
    turns: bool = False
    border: float | None = None


class Refused(Exception):
    """This norm cannot go there, and why."""


class Places:
    """The places of norms in the recorded flow of a model.

    Args:
        modules: the units, by path.
        record: what was seen of them.
        merging: whether a norm may go into another norm; for when there is nothing else left to do.
    """

    def __init__(self, modules: dict[str, nn.Module], record: Record, *, merging: bool = False) -> None:
        self.modules, self.record, self.makers, self.merging = modules, record, record.makers(), merging

    def of(self, path: str) -> Step:
        """Where the norm at `path` can go.

        Raises:
            Refused: nowhere, with the reason.
        """
        inside = units.inside_of(self.modules[path])
        self._check(path, inside)
        try:
            return self._after(path, inside)
        except Refused as refusal:
            reason = str(refusal)
        try:
            return self._before(path, inside)
        except Refused as refusal:
            raise Refused("; ".join(filter(None, (reason, str(refusal))))) from None

    def _check(self, path: str, inside: Inside) -> None:
        """Raise Refused where the norm can go nowhere, whatever is around it."""
        if self.record.blind:
            raise Refused(f"what happens in the model could not be seen: {self.record.blind}")
        calls = self.record.calls[path]
        if not calls:
            raise Refused("no batch led through it")
        if len({call.others for call in calls}) > 1 or calls[0].others not in ((), ("residual",)):
            raise Refused("it is called with more than its input: a residual in some of its calls, a mask or lengths")
        for call in calls:
            if call.given is None or call.made is None:
                raise Refused("its input or output is of a kind that cannot be followed")
            if call.given.dtype != call.made.dtype:
                raise Refused(f"it takes {_named(call.given.dtype)} and gives {_named(call.made.dtype)}")
            if inside.ranks is not None and len(call.given.shape) not in inside.ranks:
                raise Refused(f"what it computes of {len(call.given.shape)} dimensions is not known")
        if not inside.affine.is_finite():
            raise Refused("its statistics or weights are not finite, or eps is 0 beside a variance of 0")
        self._check_parameters(path)

    def _after(self, path: str, inside: Inside) -> Step:
        """The layer that makes the input of the norm, where nobody else sees what it makes."""
        calls = self.record.calls[path]
        makers = [self.makers.get(call.given.key) if call.given is not None else None for call in calls]
        sources = {maker.path if maker is not None else None for maker in makers}
        if len(sources) > 1:
            named = ", ".join(sorted("something else" if one is None else one for one in sources))
            raise Refused(f"its input comes from {named} in turn")
        source = sources.pop()
        if source is None or not self._takes_after(source):
            raise Refused(f"its input comes from {source or self._origin(calls[0])}, not from a layer that can take it")
        layer = self.modules[source]
        size = self._size(source)
        if size != len(inside.affine.scale):
            raise Refused(f"{source} has {size} channels, the norm {len(inside.affine.scale)}")
        for call, maker in zip(calls, makers, strict=True):
            assert call.given is not None
            assert maker is not None
            assert maker.made is not None
            axis = channel_axis(layer, len(maker.made.shape)) if units.is_linear(layer) else 1
            if not _have_same_channels(maker.made, axis, call.given, 1):
                raise Refused(
                    f"{source} gives {maker.made.shape}, and of {call.given.shape} the norm takes dimension 1 for"
                    " channels, and the layer another"
                )
        for made in self.record.calls[source]:
            self._check_sole_use(source, made, path)
        self._check_parameters(source)
        return self._step(path, source, "after")

    def _before(self, path: str, inside: Inside) -> Step:
        """The layer that alone takes the output of the norm."""
        calls = self.record.calls[path]
        target = self._taker(path, calls)
        layer = self.modules[target]
        if inside.activation is not None:
            raise Refused(f"its activation, {type(inside.activation).__name__}, is between it and {target}")
        if calls[0].others:
            raise Refused(f"a residual is added between it and {target}")
        made = {call.made.key: call for call in calls if call.made is not None}
        for taken in self.record.calls[target]:
            maker = made.get(taken.given.key) if taken.given is not None else None
            if maker is None:
                raise Refused(f"{target} is also given what does not come from it")
            if taken.others:
                raise Refused(f"{target} is called with more than its input")
            self._check_unchanged(maker, taken, target)
            self._check_inner_axis(target, layer, inside, maker, taken)
            if not _keeps_digits(inside, taken.given):
                raise Refused(
                    f"its mean is {inside.distance:.0f} deviations from zero: {target} would lose digits that it keeps"
                )
        for call in calls:
            self._check_sole_use(path, call, target)
        border = self._border(target, layer, inside)
        if border is not None and any(taken.given not in map(_made, calls) for taken in self.record.calls[target]):
            raise Refused(f"{target} pads with zeros what is reshaped behind the norm")
        self._check_parameters(target)
        return dataclasses.replace(self._step(path, target, "before"), border=border)

    def _step(self, path: str, layer: str, side: Literal["after", "before"]) -> Step:
        calls, made = self.record.calls[path], self.record.calls[layer][0].made
        turns = any(call.given is None or call.made is None or call.given.stride != call.made.stride for call in calls)
        rank = 0 if made is None else len(made.shape)
        return Step(path, layer, side, rank, bool(calls[0].others), turns)

    def _takes_after(self, source: str) -> bool:
        """Whether a norm behind this layer can go into it."""
        layer = self.modules[source]
        if units.is_linear(layer):
            return True
        if not self.merging or not units.is_norm(layer) or units.why_not(layer):
            return False
        inside, calls = units.inside_of(layer), self.record.calls[source]
        return (
            inside.activation is None
            and inside.affine.is_finite()
            and all(not call.others and _keeps_form(call) and _keeps_digits(inside, call.made) for call in calls)
        )

    def _size(self, source: str) -> int:
        layer = self.modules[source]
        return out_features(layer) if units.is_linear(layer) else len(units.inside_of(layer).affine.scale)

    def _origin(self, call: Call) -> str:
        """What made the input of a call, in words."""
        uses = self.record.uses.get(call.given.key, []) if call.given is not None else []
        return uses[0].what if uses and uses[0].call is None else "outside of the model"

    def _taker(self, path: str, calls: list[Call]) -> str:
        takers = set[str | None]()
        for call in calls:
            uses = self.record.uses.get(call.made.key, []) if call.made is not None else []
            for use in uses:
                if not self._passes(use):
                    takers.add(use.call.path if use.call is not None else None)
        linear = [one for one in takers if one is not None and _takes_before(self.modules[one])]
        if len(takers) != 1 or not linear:
            raise Refused("no convolution or linear layer alone takes its output" if linear else "")
        return linear[0]

    def _check_sole_use(self, source: str, made: Call, taker: str) -> None:
        """Raise Refused where what a call made is seen by anything but one call of `taker`."""
        if made.made is None or not made.is_fresh:
            raise Refused(f"the output of {source} is of a kind that cannot be followed")
        key = made.made.key
        if key in self.record.returned:
            raise Refused(f"the output of {source} is also an output of the model")
        if key in self.record.kept:
            raise Refused(f"the output of {source} is kept after the forward pass")
        uses = [use for use in self.record.uses.get(key, []) if not self._passes(use)]
        others = [u for u in uses if u.call is None or u.call.path != taker]
        if others:
            raise Refused(f"the output of {source} is also used elsewhere: {others[0].what}")
        if len(uses) > 1:
            raise Refused(f"the output of {source} is used {len(uses)} times")

    def _check_unchanged(self, norm: Call, taken: Call, target: str) -> None:
        """The layer will read what the norm read: nothing may have written there in between."""
        assert norm.given is not None
        for use in self.record.uses[norm.given.key]:
            if norm.number + 1 < use.number <= taken.number and use.is_write:
                raise Refused(f"its input is used between it and {target}, and may be changed there: {use.what}")

    def _check_inner_axis(self, target: str, layer: nn.Module, inside: Inside, maker: Call, taken: Call) -> None:
        assert taken.given is not None
        assert maker.made is not None
        axis = channel_axis(layer, len(taken.given.shape))
        size = len(inside.affine.scale)
        if size != in_features(layer) or not _have_same_channels(maker.made, 1, taken.given, axis):
            raise Refused(f"{target} takes {taken.given.shape}, and its channels are not those of the norm")

    def _border(self, target: str, layer: nn.Module, inside: Inside) -> float | None:
        """What is to be padded with before the norm, where zeros are behind it; None where nothing is."""
        scale, shift = inside.affine
        if not bool(shift.any()) or isinstance(layer, nn.Linear):
            return None
        if isinstance(layer, TRANSPOSED):
            raise Refused(
                f"{target} is a transposed convolution: of the shift of a norm before it, a different part reaches each"
                " place of its output"
            )
        assert isinstance(layer, CONVS)
        if not any(layer._reversed_padding_repeated_twice) or layer.padding_mode in EXACT_PADDING:
            return None
        border = -shift[0] / scale[0]
        # torch.nn pads with one value for all channels.
        if not bool(((scale * border + shift).abs() <= ROUNDING * shift.abs().max()).all()):
            raise Refused(
                f"{target} pads with zeros behind the norm; before it that is another value for each channel, which no"
                " layer of torch.nn pads with"
            )
        return float(border)

    def _check_parameters(self, path: str) -> None:
        """Raise Refused where code outside of the layer reads its tensors."""
        if path in self.record.altered:
            raise Refused(f"{path} is called in another mode, or with other tensors, than it has between calls")
        for name, tensor in own_tensors(self.modules[path]).items():
            for use in self.record.uses.get(_key(tensor), []):
                raise Refused(f"{path}.{name} is also used elsewhere: {use.what}")

    def _passes(self, use: Use) -> bool:
        """Whether a use is a call that gave back what it was given."""
        call = use.call
        return call is not None and units.is_passing(self.modules[call.path]) and call.made == call.given


def _made(call: Call) -> Geometry | None:
    return call.made


def _takes_before(layer: nn.Module) -> bool:
    return units.is_linear(layer) and units.known(layer, TAKES_BEFORE)


def _keeps_form(call: Call) -> bool:
    """Whether dtype and shape come out as they went in: what is written for images makes four dimensions of two."""
    if call.given is None or call.made is None:
        return False
    return call.given.dtype == call.made.dtype and call.given.shape == call.made.shape


def _keeps_digits(inside: Inside, taken: Geometry | None) -> bool:
    """Whether a layer may subtract what the norm takes out now: large numbers, where the mean is far from zero."""
    assert taken is not None
    return inside.distance * torch.finfo(taken.dtype).eps * SPARE <= default_tolerance(taken.dtype)


def _have_same_channels(made: Geometry, axis: int, taken: Geometry, taken_axis: int) -> bool:
    """Whether every value that is taken belongs to the same channel as when it was made, place by place in memory."""
    if min(axis, taken_axis) < 0 or taken_axis >= len(taken.shape) or made.dtype != taken.dtype:
        return False
    if made.shape[axis] != taken.shape[taken_axis]:
        return False
    if (made.shape, made.stride, made.offset, axis) == (taken.shape, taken.stride, taken.offset, taken_axis):
        return True
    places = torch.full((max(made.reach, taken.reach),), -1, dtype=torch.int32)
    places.as_strided(made.shape, made.stride, made.offset).copy_(_channels(made.shape, axis))
    found = places.as_strided(taken.shape, taken.stride, taken.offset)
    return bool((found == _channels(taken.shape, taken_axis)).all())


def _channels(shape: tuple[int, ...], axis: int) -> Tensor:
    """The channel of each value of a tensor."""
    return torch.arange(shape[axis], dtype=torch.int32).view([-1 if one == axis else 1 for one in range(len(shape))])


def _key(tensor: Tensor) -> Key:
    return tensor.untyped_storage()._cdata


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
