"""Which norm can go into which layer, decided by what was recorded; a reason where none can."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from steadynorm.deploy import units
from steadynorm.deploy.affine import CONVS, affine_of, in_features, out_features
from steadynorm.deploy.flow import Call, Key, Record, Use
from steadynorm.layers.weight.target import TRANSPOSED

EXACT_PADDING = ("circular", "reflect", "replicate")
"""Padding with values of the input: scaled and shifted as they are."""


@dataclass(frozen=True)
class Step:
    """One fold: the norm at a path goes into the layer at another, which runs before it or after it.

    Args:
        norm, layer: paths.
        side: on which side of the layer the norm is.
    """

    norm: str
    layer: str
    side: Literal["after", "before"]


class Refused(Exception):
    """This norm cannot go there, and why."""


class Places:
    """The places of norms in the recorded flow of a model."""

    def __init__(self, modules: dict[str, nn.Module], record: Record) -> None:
        self.modules, self.record, self.makers = modules, record, record.makers()

    def of(self, path: str) -> Step:
        """Where the norm at `path` can go.

        Raises:
            Refused: nowhere, with the reason.
        """
        self._check(path)
        try:
            return self._after(path)
        except Refused as refusal:
            reason = str(refusal)
        try:
            return self._before(path)
        except Refused as refusal:
            raise Refused("; ".join(filter(None, (reason, str(refusal))))) from None

    def _check(self, path: str) -> None:
        """Raise Refused where the norm can go nowhere, whatever is around it."""
        norm = self.modules[path]
        if self.record.blind:
            raise Refused(f"what happens in the model could not be seen: {self.record.blind}")
        calls = self.record.calls[path]
        if not calls:
            raise Refused("no batch led through it")
        if any(not call.is_plain for call in calls):
            raise Refused("it is called with more than its input: a residual, a mask or lengths")
        if not affine_of(norm).is_finite():
            raise Refused("its statistics or weights are not finite, or eps is 0 beside a variance of 0")
        self._check_parameters(path)

    def _after(self, path: str) -> Step:
        """The layer that makes the input of the norm, where nobody else sees what it makes."""
        norm, calls = self.modules[path], self.record.calls[path]
        makers = [self.makers.get(call.given.key) if call.given is not None else None for call in calls]
        sources = {maker.path if maker is not None else None for maker in makers}
        if len(sources) > 1:
            named = ", ".join(sorted("something else" if one is None else one for one in sources))
            raise Refused(f"its input comes from {named} in turn")
        source = sources.pop()
        if source is None or not units.is_linear(self.modules[source]):
            raise Refused("its input does not come straight from a convolution or linear layer")
        layer = self.modules[source]
        for call, maker in zip(calls, makers, strict=True):
            assert maker is not None
            if maker.made != call.given:
                raise Refused(f"what {source} makes is reshaped before it is normalised")
            self._check_axis(source, layer, norm, call)
        for made in self.record.calls[source]:
            self._check_sole_use(source, made, path)
        self._check_parameters(source)
        return Step(path, source, "after")

    def _before(self, path: str) -> Step:
        """The layer that alone takes the output of the norm."""
        norm, calls = self.modules[path], self.record.calls[path]
        if units.activation_of(norm) is not None:
            raise Refused(f"its activation, {norm.activation}, is between it and what follows")
        target = self._taker(path, calls)
        layer = self.modules[target]
        made = {call.made: call for call in calls}
        for taken in self.record.calls[target]:
            maker = made.get(taken.given)
            if maker is None:
                raise Refused(f"{target} is also given what does not come from it")
            if not taken.is_plain:
                raise Refused(f"{target} is called with more than its input")
            self._check_unchanged(maker, taken, target)
            self._check_inner_axis(target, layer, norm, taken)
        for call in calls:
            self._check_sole_use(path, call, target)
        self._check_padding(target, layer, norm)
        self._check_parameters(target)
        return Step(path, target, "before")

    def _taker(self, path: str, calls: list[Call]) -> str:
        takers = set[str | None]()
        for call in calls:
            uses = self.record.uses.get(call.made.key, []) if call.made is not None else []
            for use in uses:
                if not self._passes(use):
                    takers.add(use.call.path if use.call is not None else None)
        linear = [one for one in takers if one is not None and units.is_linear(self.modules[one])]
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
        if norm.given is None:
            raise Refused("its input cannot be followed")
        for use in self.record.uses[norm.given.key]:
            if norm.number + 1 < use.number <= taken.number and use.is_write:
                raise Refused(f"its input is used between it and {target}, and may be changed there: {use.what}")

    def _check_axis(self, source: str, layer: nn.Module, norm: nn.Module, call: Call) -> None:
        """Raise Refused where the channels of the norm are not those of the output of the layer."""
        assert call.given is not None
        shape = call.given.shape
        if len(shape) != _rank(layer):
            raise Refused(
                f"{source} gives {shape}, of which the norm takes dimension 1 for channels, and the layer another"
            )
        if shape[1] != out_features(layer) or norm.num_features != out_features(layer):
            raise Refused(f"{source} has {out_features(layer)} channels, the norm {norm.num_features}")

    def _check_inner_axis(self, target: str, layer: nn.Module, norm: nn.Module, taken: Call) -> None:
        assert taken.given is not None
        shape = taken.given.shape
        if len(shape) != _rank(layer) or shape[1] != in_features(layer) or norm.num_features != in_features(layer):
            raise Refused(f"{target} takes {shape}, and its channels are not those of the norm")

    def _check_padding(self, target: str, layer: nn.Module, norm: nn.Module) -> None:
        if not bool(affine_of(norm).shift.any()) or isinstance(layer, nn.Linear):
            return
        if isinstance(layer, TRANSPOSED):
            raise Refused(
                f"{target} is a transposed convolution: of the shift of a norm before it, a different part reaches each"
                " place of its output"
            )
        assert isinstance(layer, CONVS)
        reach = layer._reversed_padding_repeated_twice
        if any(reach) and layer.padding_mode not in EXACT_PADDING:
            raise Refused(
                f"{target} pads with zeros behind the norm, which would be before it: the border would differ"
            )

    def _check_parameters(self, path: str) -> None:
        """Raise Refused where code outside of the layer reads its tensors."""
        module = self.modules[path]
        if path in self.record.altered:
            raise Refused(f"{path} is called in another mode, or with other tensors, than it has between calls")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            for use in self.record.uses.get(_key(tensor), []) if tensor is not None else []:
                raise Refused(f"{path}.{name} is also used elsewhere: {use.what}")

    def _passes(self, use: Use) -> bool:
        """Whether a use is a call that gave back what it was given."""
        call = use.call
        return call is not None and units.is_passing(self.modules[call.path]) and call.made == call.given


def _rank(layer: nn.Module) -> int:
    """Dimensions of a batch for a layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dim()


def _key(tensor: Tensor) -> Key:
    return tensor.untyped_storage()._cdata
