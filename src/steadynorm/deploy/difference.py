"""Two models on the same batches: how far their outputs are apart, and where."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.recipe import seeded

Forward = Callable[[nn.Module, Any], Any]
SEED = 0
"""Every pass starts from the same random numbers, so that a model that draws some draws the same."""


def default_tolerance(dtype: torch.dtype) -> float:
    """sqrt(machine epsilon): half of the digits of a dtype. 1.5e-8, 3.5e-4, 0.03, 0.09 for float64, 32, 16, bfloat16.

    Folding rounds other numbers than the model did, some of them in every layer, and leaves more than half of the
    digits; what is wrong leaves fewer. For integers and booleans 0.
    """
    return math.sqrt(torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else 0.0


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of two models is apart.

    Args:
        name: where it is in what the model gives: "" where that is a tensor, "logits", "0.1".
        dtype: of the first model's.
        absolute: largest difference over all batches; of integers and booleans the largest too.
        relative: that over the largest value of the first model's; of integers and booleans the share that differs.
            Infinite where shapes differ, or one is finite and the other is not.
        batch, sample: where the largest difference is; `sample` is the index in the first dimension.
    """

    name: str
    dtype: torch.dtype
    absolute: float
    relative: float
    batch: int
    sample: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name or 'output'} ({dtype}): absolute {self.absolute:.1e}, relative {self.relative:.1e}, worst"
            f" in sample {self.sample} of batch {self.batch}"
        )

    def is_within(self, tolerance: float | None) -> bool:
        """Whether the relative difference is at most `tolerance`, or that of its dtype."""
        return self.relative <= (default_tolerance(self.dtype) if tolerance is None else tolerance)


@dataclass
class _Sum:
    """What has been seen of one output."""

    dtype: torch.dtype
    absolute: float = 0.0
    largest: float = 0.0
    differing: int = 0
    values: int = 0
    is_broken: bool = False
    batch: int = 0
    sample: int = 0

    def add(self, a: Tensor, b: Tensor | None, batch: int) -> None:
        """One more batch of it."""
        if b is None or a.shape != b.shape or a.dtype.is_floating_point != b.dtype.is_floating_point:
            if not self.is_broken:
                self.is_broken, self.batch, self.sample = True, batch, 0
            return
        distance = distances(a, b)
        self.values += a.numel()
        if not a.numel():
            return
        self.differing += int((distance != 0).sum())
        finite = a[torch.isfinite(a)]
        self.largest = max(self.largest, float(finite.abs().double().max()) if finite.numel() else 0.0)
        worst = float(distance.max())
        if worst > self.absolute:
            per_sample = distance.flatten(1).amax(1) if distance.dim() > 1 else distance.flatten()
            self.absolute, self.batch, self.sample = worst, batch, int(per_sample.argmax())

    def result(self, name: str) -> OutputDifference:
        if self.is_broken:
            absolute = relative = math.inf
        elif self.dtype.is_floating_point or self.dtype.is_complex:
            absolute = self.absolute
            relative = absolute / self.largest if self.largest else (math.inf if absolute else 0.0)
        else:
            absolute, relative = self.absolute, self.differing / max(self.values, 1)
        return OutputDifference(name, self.dtype, absolute, relative, self.batch, self.sample)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """|a − b| in float64; 0 where both are NaN or the same infinity, infinite where only one is not finite."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    distance = (a - b).abs()
    distance = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, distance)
    return torch.where(distance.isnan(), math.inf, distance)


def compare(a: nn.Module, b: nn.Module, batches: Sequence[Any], forward: Forward) -> tuple[OutputDifference, ...]:
    """How far each output of `b` is from that of `a`, both in the mode they are in and left as they were."""
    sums: dict[str, _Sum] = {}
    with models.undisturbed(a), models.undisturbed(b):
        for number, batch in enumerate(batches):
            ours = dict(named_tensors(run(a, batch, forward)))
            theirs = dict(named_tensors(run(b, batch, forward)))
            for name in ours | theirs:
                one = ours.get(name)
                other = theirs.get(name)
                if one is None:
                    one, other = other, None
                assert one is not None
                sums.setdefault(name, _Sum(one.dtype)).add(one, other, number)
    return tuple(found.result(name) for name, found in sums.items())


def first_parting(
    a: nn.Module,
    b: nn.Module,
    batch: Any,
    forward: Forward,
    tolerance: float | None = None,
    apart: frozenset[str] = frozenset(),
) -> str | None:
    """The path of the first module, in the order in which they end, whose outputs are apart; None where none is.

    Args:
        apart: paths that are meant to be apart.
    """
    with models.undisturbed(a), models.undisturbed(b):
        ours = _outputs_of_modules(a, batch, forward)
        theirs = _outputs_of_modules(b, batch, forward)
    for (path, number), values in ours.items():
        if path in apart or (path, number) not in theirs:
            continue
        others = theirs[path, number]
        for name, value in values.items():
            found = _Sum(value.dtype)
            found.add(value, others.get(name), 0)
            if not found.result(name).is_within(tolerance):
                return path
    return None


def run(model: nn.Module, batch: Any, forward: Forward) -> Any:
    """The output of a model, without gradients and always from the same random numbers."""
    with seeded(SEED), torch.no_grad():
        return forward(model, batch)


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested value, and where it is."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((entry.name, getattr(value, entry.name)) for entry in dataclasses.fields(value))
    else:
        return
    for key, item in items:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def _outputs_of_modules(model: nn.Module, batch: Any, forward: Forward) -> dict[tuple[str, int], dict[str, Tensor]]:
    """What each call of each module gave, copied: it may be changed in place afterwards."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    counts: dict[str, int] = {}

    def after(path: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            number = counts[path] = counts.get(path, -1) + 1
            found[path, number] = {name: tensor.clone() for name, tensor in named_tensors(output)}

        return leave

    watched = ((path, one) for path, one in model.named_modules() if not isinstance(one, torch.jit.ScriptModule))
    handles = [module.register_forward_hook(after(path)) for path, module in watched]
    try:
        run(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    return found
