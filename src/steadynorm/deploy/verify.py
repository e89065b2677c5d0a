"""verify: do two models compute the same, and if not, where do they part?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from steadynorm.deploy.difference import Forward, OutputDifference, compare, first_parting
from steadynorm.errors import InputError
from steadynorm.training.evaluation import call, evaluation


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two models on the same batches; printed, it is a short report.

    Args:
        outputs: how far each output is apart.
        first: the first module, in the order in which their calls end, that gives something else, on the batch with
            the largest difference; None where the outputs agree, or no module of one path in both is apart.
        tolerance: what the relative differences were held to; None is that of each dtype.
    """

    outputs: tuple[OutputDifference, ...]
    first: str | None
    tolerance: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether every output is within the tolerance."""
        return all(output.is_within(self.tolerance) for output in self.outputs)

    @property
    def worst(self) -> OutputDifference:
        """The output with the largest relative difference: its `batch` and `sample` say where."""
        return max(self.outputs, key=lambda output: output.relative)

    def __repr__(self) -> str:
        lines = ["the models agree" if self.agrees else "the models differ"]
        lines += [f"  {output}" for output in self.outputs]
        if self.first is not None:
            lines.append(f"  they part at {self.first or 'the model itself'}")
        return "\n".join(lines)


def verify(
    a: nn.Module,
    b: nn.Module,
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    apart: Iterable[str] = (),
    forward: Forward | None = None,
) -> Comparison:
    """Run two models on the same batches, in evaluation mode and from the same random numbers, and compare.

    Both are left as they were.

    Args:
        a, b: the models; differences are relative to the outputs of `a`.
        batches: what they are run on; gone through once.
        tolerance: the largest relative difference that agrees; by default sqrt(machine epsilon) of each output's dtype.
        apart: paths of modules that are meant to give something else, and are not where the models part: of a folded
            model ``change.apart``.
        forward: called as forward(model, batch), in place of model(batch), model(*args) or model(**dict).

    Raises:
        InputError: no batch, or no tensor among the outputs.
    """
    batches = [*batches]
    forward = forward or call
    if not batches:
        raise InputError("verify got no batch: give at least one that both models can take.")
    with evaluation(a, batches), evaluation(b, batches):
        outputs = compare(a, b, batches, forward)
        if not outputs:
            raise InputError("verify found no tensor in what the models return: there is nothing to compare.")
        comparison = Comparison(outputs, None, tolerance)
        if comparison.agrees:
            return comparison
        batch = batches[comparison.worst.batch]
        first = first_parting(a, b, batch, forward, tolerance, frozenset(apart))
    return Comparison(outputs, first, tolerance)
