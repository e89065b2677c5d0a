"""What was seen of training: one step, the optimizer, the batches. Plain, frozen data, parts of `Facts`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["forward", "outside", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "outside", "backward", "optimizer")


@dataclass(frozen=True)
class NormStep:
    """What one norm layer did in one training step.

    Args:
        path: in the model; of a layer of another network, its path there behind the name of that network's class.
        calls: by phase: inside the model's forward; outside it, in a loss or in another network; while gradients are
            computed, where activations are made anew; inside the step of the optimizer.
        updates: by phase, how many of the calls moved the running statistics.
        trained: whether any call was made in training mode.
        without_gradients: whether every call was made with gradients switched off, or in a network that takes none.
    """

    path: str
    class_name: str
    calls: Mapping[Phase, int]
    updates: Mapping[Phase, int]
    trained: bool
    without_gradients: bool


@dataclass(frozen=True)
class StaleCopy:
    """A norm in a copy of a network, whose statistics are not those of the original's.

    Args:
        divergence: of the two.
        is_initial: whether its own are the 0 and 1 that it was made with.
    """

    divergence: float
    is_initial: bool


@dataclass(frozen=True)
class Audit:
    """One training step.

    Args:
        forwards: calls of the whole model in training mode, but for those that the optimizer makes.
        backwards: passes that brought a gradient to the parameters.
        optimizer_steps: calls of `step` of any optimizer.
        norms: by path, of the model's norms that were called.
        helpers: of norms in networks that the model is not made of.
        copies: paths in `helpers`, and in `norms`, of networks that take no gradient and have a twin that does, with
            parameters of the same shapes, as moving averages have.
        stale_copies: by path in `helpers` and in `norms`, norms of networks whose parameters follow another's, before
            the step, and whose statistics do not.
        is_users: whether the step is one that the user gave, rather than forward, loss, backward and optimizer.
        left_evaluating: norms that trained before the step and are in evaluation mode after it.
        optimized: names of the model's parameters that any optimizer holds that took a step.
    """

    forwards: int
    backwards: int
    optimizer_steps: int
    norms: Mapping[str, NormStep] = field(default_factory=dict)
    helpers: Mapping[str, NormStep] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    stale_copies: Mapping[str, StaleCopy] = field(default_factory=dict)
    is_users: bool = False
    left_evaluating: tuple[str, ...] = ()
    optimized: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Held:
    """How an optimizer holds the parameters of a model.

    Args:
        names: of the model's parameters in any of its groups.
        decays: by name, weight decay above zero.
        foreign: how many parameters it holds that the model does not have.
        trainable: names of the model's parameters that take a gradient, in the order of definition.
    """

    names: frozenset[str]
    decays: Mapping[str, float]
    foreign: int
    trainable: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """The scale of a split's first tensor of floating-point numbers.

    Args:
        mean, deviation, low, high: over all values.
        constant: features of a table, (samples, features), that do not vary.
        drowned: share of the features of a table, sparse and constant ones apart, that vary less than a hundredth of
            the one that varies most.
    """

    mean: float
    deviation: float
    low: float
    high: float
    constant: int = 0
    drowned: float = 0.0


@dataclass(frozen=True)
class Likeness:
    """Whether the batches of a split are like random samples of it.

    Args:
        ratio: variance between batches over that within them; 1 where samples were dealt out at random.
        chance: the ratio that random dealing of the same samples stays below in 99 of 100.
        p: share of random dealings with a ratio as large.
    """

    ratio: float
    chance: float
    p: float
    batches: int
    samples: int

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the batches differ more than random ones, and by more than chance makes of any data."""
        return self.p <= CHANCE and self.ratio >= MATERIAL_RATIO


# Shuffled batches read 0.86 to 1.07 and by chance up to 1.4; of small ones up to 2.1, which p takes care of.
CHANCE, MATERIAL_RATIO = 0.001, 1.5


@dataclass(frozen=True)
class Axes:
    """How much the entries of two axes of a norm's input differ: axis 1, which it takes for channels, and the last one.

    Args:
        share, last_share: of the variance, that is between the entries.
        spread, last_spread: variance of the logarithms of the entries' variances.
        likeness, last_likeness: mean correlation of neighbouring entries.
    """

    share: float
    spread: float
    likeness: float
    last_share: float
    last_spread: float
    last_likeness: float


@dataclass(frozen=True)
class Shared:
    """A norm that one pass calls several times, as it is in training.

    Args:
        calls: how many there are.
        divergence: of the statistics of one call from those of all (Jeffreys, mean over channels), the largest.
        null: the same of two halves of the data of one call, the largest.
    """

    calls: int
    divergence: float
    null: float

    @property
    def threshold(self) -> float:
        """What the divergence of calls on data of one kind stays below."""
        return max(MATERIAL_DIFFERENCE, DIFFERENCE_FACTOR * self.null)


# Siamese calls read up to 0.007, augmented views 0.0003; crops of two sizes 0.025, a clean and a noisy one 0.017, real
# and made ones 0.15 and more, levels of a pyramid 0.24.
MATERIAL_DIFFERENCE, DIFFERENCE_FACTOR = 0.02, 5.0


@dataclass(frozen=True)
class Program:
    """A compiled program in place of a module.

    Args:
        path: where it is in the model; empty is the model itself.
        kind: what made it: torch.jit or torch.export.
        training: places in it at which batch norm normalises by the batch.
        is_fixed: whether that is written into the program, so that no mode changes it.
    """

    path: str
    kind: str
    training: tuple[str, ...]
    is_fixed: bool


@dataclass(frozen=True)
class Ranks:
    """The processes of a distributed training.

    Args:
        processes: how many there are.
        keeps_buffers_apart: whether a DistributedDataParallel was told not to broadcast buffers.
        apart: by path, the largest divergence of the running statistics of a process from those of the first; None
            where they were not compared.
        synchronised: by path of a synchronised norm, the processes whose batches are one batch for it.
        trained: by path of a norm inside a DistributedDataParallel, the processes whose gradients that averages.
        unreduced: by path of such a norm, its parameters that take a gradient and are none of the wrapper's.
        synchronised_on: by path, on how many of the processes the norm is a synchronised one, where that is not the
            same on all; None where they were not compared.
    """

    processes: int
    keeps_buffers_apart: bool = False
    apart: Mapping[str, float] | None = None
    synchronised: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trained: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unreduced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    synchronised_on: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Padding:
    """Sequences that are filled up to the longest of their batch.

    Args:
        longest, shortest: lengths in the batch that was looked at.
        evaluating, training: path of the first norm that counts the padding in evaluation, and in training alone.
        change: of the model's output in evaluation when half as much padding is added, in deviations; None where its
            shape changes too.
    """

    longest: int
    shortest: int
    evaluating: str
    training: str
    change: float | None


@dataclass(frozen=True)
class Checkpoint:
    """What a model was loaded from, beside what the model has, by name.

    Args:
        missing: by path of a norm, the buffers of its running statistics that the checkpoint has not, or not in this
            shape.
        homeless: by path in the checkpoint, running statistics that it has and the model has not.
        missing_others, unknown_others: all other names that only the model has, or only the checkpoint.
        shared, differing: how many tensors both have in one shape; how many of those are not the same in both.
    """

    missing: Mapping[str, tuple[str, ...]]
    homeless: Mapping[str, tuple[str, ...]]
    missing_others: tuple[str, ...]
    unknown_others: tuple[str, ...]
    shared: int
    differing: int


@dataclass(frozen=True)
class Overflow:
    """A norm that is not torch's, in float16, whose output in float32 is another.

    Args:
        largest: magnitude in what it was given.
        change: of its output, relative to the largest value of the one in float32.
    """

    path: str
    class_name: str
    largest: float
    change: float


@dataclass(frozen=True)
class Regression:
    """A norm whose output is the model's, and numbers that it is trained on.

    Args:
        norm: its path.
        reach: root mean square of its weight, which is the deviation of its output in training.
        target: deviation of the targets, root mean square over their columns.
    """

    norm: str
    reach: float
    target: float

    @property
    def out_of_reach(self) -> float:
        """Share of the variance of the targets that an output of this deviation misses, however right it is."""
        return max(0.0, 1 - self.reach / self.target) ** 2 if self.target else 0.0
