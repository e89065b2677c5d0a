"""One training run: what it may spend, and the numbers it ends with."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from steadynorm.errors import InputError
from steadynorm.lab.axes import Cell, set_norm
from steadynorm.recipe import Recipe, evaluate, seeded, train

Scaling = Literal["linear", "sqrt", "none"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

# The batch size at which a recipe's learning rate is meant.
REFERENCE_BATCH_SIZE = 32
# Below this a training has not begun, whatever the number of samples.
MIN_STEPS = 20
DEFAULT_STEPS = 100


@dataclass(frozen=True)
class Budget:
    """What every cell may spend: the same number of samples, whatever its batch size.

    Samples, not steps, since that is what a user holds fixed who asks which batch size to train with: so many epochs.
    The learning rate follows the batch size: by default in proportion to it, the rule for SGD.

    Args:
        steps: at batch size 32; batch size 8 takes four times as many, 64 half, and none fewer than 20.
        lr: the learning rate at batch size 32.
        lr_scaling: "linear", "sqrt" (usual for Adam) or "none".

    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1, the linear scaling rule.
    """

    steps: int
    lr: float
    lr_scaling: Scaling = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"{self.steps} steps were given: expected at least 1.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"a learning rate of {self.lr} was given: expected a positive number.")
        if self.lr_scaling not in SCALINGS:
            raise InputError(
                f"there is no learning rate scaling '{self.lr_scaling}': choose from {', '.join(SCALINGS)}."
            )

    @property
    def samples(self) -> int:
        """How many samples a cell sees, floor on the steps apart."""
        return self.steps * REFERENCE_BATCH_SIZE

    def steps_at(self, batch_size: int) -> int:
        """Steps of a cell at `batch_size`."""
        return max(min(MIN_STEPS, self.steps), round(self.samples / batch_size))

    def lr_at(self, batch_size: int) -> float:
        """Learning rate of a cell at `batch_size`."""
        exponent = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[self.lr_scaling]
        return self.lr * (batch_size / REFERENCE_BATCH_SIZE) ** exponent

    def to_dict(self) -> dict[str, int | float | str]:
        """As plain data."""
        return asdict(self)


def trial(recipe: Recipe, cell: Cell, budget: Budget) -> dict[str, float]:
    """Train the recipe's model as the cell says and measure it on the test split.

    Returns: the test loss if the recipe has one, and its metrics.

    Raises:
        InputError: the recipe cannot do it, or the training ended in numbers that are not finite.
    """
    with seeded(cell.seed):
        model = set_norm(recipe.model(), cell.norm)
    steps, lr = budget.steps_at(cell.batch_size), budget.lr_at(cell.batch_size)
    train(model, recipe, batch_size=cell.batch_size, steps=steps, lr=lr, seed=cell.seed)
    numbers = evaluate(model, recipe)
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise InputError(f"the training diverged: {name} on the test split is {number}; try a smaller lr.")
    return numbers
