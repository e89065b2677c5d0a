"""What was seen of a model: plain, frozen data. The rules of the doctor read nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from steadynorm.probe.training_facts import (
    Audit,
    Axes,
    Checkpoint,
    Held,
    Inputs,
    Likeness,
    Overflow,
    Padding,
    Program,
    Ranks,
    Regression,
    Shared,
)

Part = Literal[
    "program", "state", "checkpoint", "optimizer", "data", "forward", "training", "drift", "isolation", "audit"
]
PARTS: tuple[Part, ...] = (
    "program",
    "state",
    "checkpoint",
    "optimizer",
    "data",
    "forward",
    "training",
    "drift",
    "isolation",
    "audit",
)
# What needs no batches: the model, what it was loaded from and its optimizer, at rest.
AT_REST: frozenset[Part] = frozenset({"program", "state", "checkpoint", "optimizer"})


@dataclass(frozen=True)
class Norm:
    """One normalization layer as it is stored.

    Args:
        path, kind, class_name: where it is, what it normalises (see `models.Kind`), and its class.
        learns: whether, in training mode, it normalises by the batch and moves its running statistics.
        is_frozen: whether it is a batch norm that `model.train()` leaves on its running statistics.
        trains_in_evaluation: whether `model.eval()` leaves it in training mode.
        has_statistics: whether it holds a running mean and variance.
        momentum: weight of the new batch; None is a cumulative average.
        batches_tracked: how many batches its statistics have seen, where it counts them.
        nonfinite, negative: channels whose running mean or variance is NaN or infinite; whose variance is below zero.
        has_initial_statistics: whether every mean is 0 and every variance 1.
        has_initial_affine: whether it looks as when it was made: its bias, if it has one, is all zeros (some
            initialisations draw weights at random, none draws biases), else its weight all ones or all zeros.
        takes_single_values: whether one value per statistic in training is met by the running statistics, by option.
        is_toggled: whether `track_running_stats` was set to False on a batch norm that has statistics: training uses
            the batch and leaves them alone, evaluation uses them.
        is_undone: whether it was put in evaluation mode by hand, and the next `model.train()` takes it out again.
        updates_always: whether its running statistics move in evaluation by a switch that says so.
        trains_affine: whether its weight or bias takes a gradient; None if it has neither.
        group_size: channels (group, instance) or all values (layer, rms) of a sample that share a statistic.
        is_debiased: whether the initial statistics are left out of the running ones, by option.
        below_eps: channels whose running variance is less than eps, but more than that of a dead one.
        dead: channels whose weight is next to nothing beside the others', or whose input does not vary.
    """

    path: str
    kind: str
    class_name: str
    channels: int | None
    eps: float | None
    momentum: float | None
    learns: bool
    is_frozen: bool
    trains_in_evaluation: bool
    has_statistics: bool
    statistics_dtype: str | None = None
    batches_tracked: int | None = None
    nonfinite: int = 0
    negative: int = 0
    has_initial_statistics: bool = False
    has_initial_affine: bool = True
    takes_single_values: bool = False
    is_toggled: bool = False
    is_undone: bool = False
    updates_always: bool = False
    trains_affine: bool | None = None
    group_size: int | None = None
    is_debiased: bool = False
    below_eps: int = 0
    dead: int = 0

    @property
    def residue(self) -> float:
        """Weight that the initial 0 and 1 still have in the running statistics; 0 where that is not known."""
        if (
            self.is_debiased
            or not self.momentum
            or self.momentum >= 1
            or (self.batches_tracked or 0) <= DRY_RUNS
            or not self.learns
        ):
            return 0.0
        return float((1 - self.momentum) ** (self.batches_tracked or 0))

    @property
    def state_fault(self) -> Literal["", "broken", "default", "toggled", "half"]:
        """What is wrong with the stored statistics as they stand, without a look at the data; the worst of it."""
        if self.nonfinite or self.negative:
            return "broken"
        if self.is_toggled:
            return "toggled"
        # With momentum 0 they could not become anything else.
        if self.has_initial_statistics and self.learns and self.momentum != 0:
            return "default"
        return "half" if self.learns and self.statistics_dtype in HALF else ""


HALF = ("bfloat16", "float16")
MEAN_AND_VARIANCE = frozenset({"running_mean", "running_var"})
# A channel whose input varies by less than this is dead.
DEAD_VARIANCE = 1e-8
# Weight of the initial statistics in the running ones from which on they are no statistics of the data.
MOST_RESIDUE = 0.05
# A look at the shapes is one forward, at a siamese network two, at a training and a test batch four.
DRY_RUNS = 4


@dataclass(frozen=True)
class Call:
    """One call of a module in an evaluation pass, in the order in which the calls ended.

    Args:
        producer: the module whose output is this call's first input, the same untouched tensor; empty if there is none.
        input_shape, output_shape: of the first tensor in and out.
        input_dtype: of the first tensor in.
        axes: how much the entries of the axes of a batch norm's input differ.
        offset: of what a norm is given in half precision: |mean| / deviation of the worst channel.
        is_training: whether the module was in training mode in this call, though the pass is one of evaluation.
        drops: whether it was a dropout layer that dropped.
        maker: the module that made the first output; of a container that hands it on, the one inside.
    """

    path: str
    class_name: str
    producer: str = ""
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    input_dtype: str = ""
    offset: float | None = None
    axes: Axes | None = None
    is_training: bool = False
    drops: bool = False
    maker: str = ""


@dataclass(frozen=True)
class DeadBias:
    """A bias that the norm after it takes out again.

    Args:
        producer, norm: paths of the layer that has the bias and of the norm that its every output goes into.
        change: largest relative change of anything else in the network, in training mode, when the bias is moved by
            `moved`, in deviations of that layer's output.
    """

    producer: str
    norm: str
    change: float
    moved: float
    parameters: int


@dataclass(frozen=True)
class Batches:
    """What the batches of one split look like.

    Args:
        sizes: samples of each batch that was looked at.
        last: samples of the last batch of the whole split, where that is known.
        nonfinite: indices of batches whose inputs hold a NaN, or an infinity that is no mask; they are left out.
        used: how many samples went through the model.
    """

    sizes: tuple[int, ...] = ()
    last: int | None = None
    nonfinite: tuple[int, ...] = ()
    used: int = 0


@dataclass(frozen=True)
class Values:
    """How many values stand behind one statistic of a batch norm layer.

    Args:
        per_sample: values per statistic that each sample adds.
        independent_per_sample: the same, counted as independent values: values of one image resemble each other, and
            var(all) / var(means of samples) of them are worth as much as that many unrelated ones.
        tails: how much the variance varies from batch to batch, beside that of as many independent values of a normal
            distribution: about 1, and far more where rare values decide it. None where it is not known.
    """

    path: str
    per_sample: float
    independent_per_sample: float | None = None
    tails: float | None = None


@dataclass(frozen=True)
class Effect:
    """What a change of statistics does to the output, over the same samples before and after.

    Args:
        distance: between the two outputs: total variation of the class probabilities where the outputs are class
            scores, else root mean square of the difference over the deviation of the output.
        relative_square: mean square of the difference over the variance of the output.
        null: the same distance between statistics from two halves of the same data: what chance alone does.
        changed: share of predictions that change, where outputs are class scores.
        loss, metric: (before, after), where they can be computed.
    """

    samples: int
    distance: float
    relative_square: float
    null: float | None = None
    changed: float | None = None
    loss: tuple[float, float] | None = None
    metric: tuple[float, float] | None = None
    metric_name: str = ""


@dataclass(frozen=True)
class Correction:
    """A preparation of the inputs that they lack, or have had once too often.

    Args:
        norm: path of the first norm.
        name: what is to be done to the inputs.
        as_given, corrected, runner_up: divergence of the stored statistics of that norm from those of the inputs.
        tried: how many corrections.
        effect: of the inputs as they are, against corrected ones.
    """

    norm: str
    name: str
    as_given: float
    corrected: float
    runner_up: float
    tried: int
    effect: Effect | None = None


@dataclass(frozen=True)
class Drift:
    """Stored statistics of one layer against those of the data.

    Args:
        divergence: Jeffreys' divergence of the two normal distributions, mean over channels; infinite where the stored
            ones are broken.
        null: the same between two halves of the data.
        mean_shift: largest difference of the means over channels, in deviations of the data.
        variance_ratio: stored over recalibrated variance, of the channel where it is farthest from 1.
        effect: of this layer's stored statistics alone, all other stale layers recalibrated before and after.
        with_dropout: divergence of the stored statistics from those of the data with dropout switched on; None where
            the model has no dropout, or nothing to explain by it.
        without_beginning: divergence of the stored statistics less what they still hold of the 0 and 1 that they began
            with; None where that is not known, or there is nothing to explain by it.
        stored, measured: (mean, variance) of every channel, as stored and of the data.
    """

    path: str
    divergence: float
    null: float
    mean_shift: float
    variance_ratio: float
    effect: Effect | None = None
    with_dropout: float | None = None
    without_beginning: float | None = None
    stored: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    measured: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def is_from_dropout(self) -> bool:
        """Whether the statistics are those of the data as dropout changes it."""
        return self.with_dropout is not None and self.with_dropout * DROPOUT_FACTOR <= self.divergence

    @property
    def is_from_beginning(self) -> bool:
        """Whether the statistics are those of the data but for what they still hold of their beginning.

        A weight of 0.0002 is much where the variance of 1 that it began with is a million times that of the data.
        """
        return self.without_beginning is not None and self.without_beginning * BEGINNING_FACTOR <= self.divergence

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the divergence is more than chance and more than matters anywhere."""
        return not self.divergence <= max(MATERIAL_DIVERGENCE, CHANCE_FACTOR * self.null)


# Healthy networks read at most 0.004 against their own recalibration, and a layer that was reset at least 0.037
# (54 layers of ResNet-18 and MobileNetV3); two halves of 300 samples differ by up to 0.008.
MATERIAL_DIVERGENCE = 0.01
CHANCE_FACTOR = 3.0
# Statistics that were learned with dropout came 18 times nearer and more when it was switched on, stale ones no nearer.
DROPOUT_FACTOR = 10.0
# As for dropout. What is stale for another reason is no nearer without its beginning, or farther.
BEGINNING_FACTOR = 10.0


@dataclass(frozen=True)
class Leak:
    """A module whose output for one sample depends on the other samples of the batch, in evaluation mode.

    Args:
        change: of the module's own output for the sample, largest difference relative to its largest value.
        output_change: the same of the model's output; 0 where the leak is hidden so far.
        is_confirmed: whether NaN put into the other samples reaches the sample in the same module.
        effect: of giving samples of the evaluation data other batch mates.
        recalibrated: how many layers had stale statistics and were given those of the data for all of this.
    """

    path: str
    class_name: str
    change: float
    output_change: float
    is_confirmed: bool
    effect: Effect | None = None
    recalibrated: int = 0


@dataclass(frozen=True)
class SpectralVectors:
    """The two stored vectors of a spectral normalization, in place of the singular vectors of the weight.

    Args:
        path: of the layer whose weight is divided.
        u_norm, v_norm: their lengths.
        norm_after: largest singular value of the weight that evaluation computes with, where 1 is promised.
        is_fresh: whether no forward in training mode has computed the weight yet, as far as that can be seen.
    """

    path: str
    u_norm: float
    v_norm: float
    norm_after: float
    dtype: str = "float32"
    is_fresh: bool = False


# How far from 1 a length may be: the rounding of float32 is a thousand times less.
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Failure:
    """A pass that raised: in which part, in which module, and what."""

    part: Part
    path: str
    error: str
    message: str


@dataclass(frozen=True)
class Facts:
    """Everything that was seen.

    Args:
        skipped: parts that could not be looked at, with the reason.
        frozen_layers: modules that have parameters, none of which takes a gradient; empty if that is the whole model.
        instance_gap: of giving the instance norms that track running statistics those of each sample, as in training.
        moved: modules whose running statistics changed in a forward in evaluation mode.
        drift_together: effect of recalibrating all layers that drifted, at once.
        dropping: dropout layers that `model.eval()` leaves in training mode.
        hard_coded: modules that, in evaluation mode, call for a batch norm by the batch with a constant.
        rescaled: layers whose weight is normalised, and by what.
        averaged: norms in a network of averaged weights, and what averages them.
        checkpoint: what the model was loaded from, beside what it has.
        shared: norms that one pass calls several times.
        padding: sequences that are filled up, and the norms that count it.
        ranks: the processes, where there is a process group or a model that is wrapped for one.
        programs: compiled programs in place of modules.
        correction: what makes the evaluation inputs those that the first norm has learned.
        bare_layer: the first layer with weights, where no norm is before it.
        inputs, likeness: of the training batches: their scale, and whether they are alike.
        overflows: norms of other classes that lose their output in float16.
        regression: a norm that makes the output of a model which is trained on numbers.
        held: how the optimizer holds the parameters.
        audit: one training step.
        training_gap: between training and evaluation mode on the same batches, with recalibrated statistics: what the
            noise of batch statistics does at this batch size.
    """

    norms: Mapping[str, Norm] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    batches: Batches = Batches()
    train_batches: Batches | None = None
    values: Mapping[str, Values] = field(default_factory=dict)
    dead_biases: tuple[DeadBias, ...] = ()
    drift: Mapping[str, Drift] = field(default_factory=dict)
    drift_together: Effect | None = None
    training_gap: Effect | None = None
    leaks: tuple[Leak, ...] = ()
    frozen_layers: frozenset[str] = frozenset()
    instance_gap: Effect | None = None
    moved: tuple[str, ...] = ()
    spectral: tuple[SpectralVectors, ...] = ()
    dropping: tuple[str, ...] = ()
    hard_coded: tuple[str, ...] = ()
    rescaled: Mapping[str, str] = field(default_factory=dict)
    averaged: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    shared: Mapping[str, Shared] = field(default_factory=dict)
    ranks: Ranks | None = None
    padding: Padding | None = None
    programs: tuple[Program, ...] = ()
    correction: Correction | None = None
    bare_layer: str = ""
    inputs: Inputs | None = None
    likeness: Likeness | None = None
    overflows: tuple[Overflow, ...] = ()
    regression: Regression | None = None
    held: Held | None = None
    audit: Audit | None = None
    failures: tuple[Failure, ...] = ()
    skipped: Mapping[Part, str] = field(default_factory=dict)

    @property
    def lost(self) -> tuple[str, ...]:
        """Paths of the norms whose running statistics are not in the checkpoint that the model was loaded from."""
        missing = {} if self.checkpoint is None else self.checkpoint.missing
        return tuple(path for path, names in missing.items() if MEAN_AND_VARIANCE & set(names))

    @property
    def was_trained_evaluating(self) -> bool:
        """Whether no norm ever saw a batch, and the trained weights fit statistics of 0 and 1 better than the data's.

        Where the data's fit better, the statistics were lost.
        """
        learning = [norm for norm in self.norms.values() if norm.learns]
        untouched = all(norm.has_initial_statistics and not norm.batches_tracked for norm in learning)
        loss = None if self.drift_together is None else self.drift_together.loss
        return bool(learning) and untouched and not self.is_fresh and loss is not None and loss[0] < loss[1]

    @property
    def is_fresh(self) -> bool:
        """Whether the model looks as when it was made: no norm with statistics has ever been trained.

        A forward or two in training mode, to see the shapes, is no training.
        """
        tracked = [norm for norm in self.norms.values() if norm.has_statistics and norm.kind != "frozen"]
        return all(
            norm.has_initial_affine and (norm.has_initial_statistics or 0 < (norm.batches_tracked or 0) <= DRY_RUNS)
            for norm in tracked
        )
