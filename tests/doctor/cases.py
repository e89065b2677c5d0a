"""Faulty models and healthy ones, small and trained on real digits: what the doctor must find, and must not."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm
from steadynorm import doctor, recipe
from steadynorm.recipe import Recipe
from steadynorm.recipes import digits
from tests.doctor.networks import (
    Centre,
    FrozenBatchNorm,
    HardCoded,
    HiddenLeak,
    KeepsFrozen,
    Masked,
    MaxOfBatch,
    NeverEvaluates,
    ReshapeForTranspose,
    Residual,
    Sequences,
    SharedTwice,
    SoftmaxOverSamples,
    convolutional,
    mlp,
)

STEPS = 60
NORMS = ("stem.1", "block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2", "block2.shortcut.1")


@dataclass(frozen=True)
class Case:
    """A model and its data. `expected` are (code, where) pairs of all findings above a note, or at all if `notes`.

    `borderline` are pairs of a fault that was planted there too and costs about as much as the threshold: whether it
    is found depends on how the processor adds.
    """

    name: str
    make: Callable[[], nn.Module]
    expected: frozenset[tuple[str, str]] = frozenset()
    batches: Callable[[], Iterable[Any]] = lambda: digits.batches("test", 32, 0)
    train_batches: Callable[[], Iterable[Any]] | None = lambda: digits.batches("train", 32, 0)
    loss: Callable[[Any, Any], Tensor] | None = digits.loss
    notes: bool = False
    optimizer: Callable[[nn.Module], Any] = lambda model: sgd(model)
    step: Callable[[nn.Module, Any], Any] | None = None
    checkpoint: Callable[[nn.Module], Any] = nn.Module.state_dict
    borderline: frozenset[tuple[str, str]] = frozenset()


@cache
def diagnosis(case: Case) -> doctor.Diagnosis:
    with recipe.seeded(0):
        model = case.make()
    metrics = digits.metrics if case.loss is digits.loss else None
    return doctor.examine(
        model,
        case.batches,
        train_batches=case.train_batches,
        loss=case.loss,
        metrics=metrics,
        optimizer=case.optimizer(model),
        step=case.step,
        checkpoint=case.checkpoint(model),
    )


def sgd(model):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def found(case: Case) -> set[tuple[str, str]]:
    pairs = {(f.code, f.where) for f in diagnosis(case).findings if case.notes or f.severity != "note"}
    return pairs - case.borderline


def train(model: nn.Module, batch_size: int = 32, steps: int = STEPS, lr: float = 0.05, **pieces: Any) -> nn.Module:
    given = {"batches": digits.batches, "loss": digits.loss, **pieces}
    recipe.train(model, Recipe("case", lambda: model, **given), batch_size=batch_size, steps=steps, lr=lr, seed=0)
    return model


@cache
def _digits() -> nn.Module:
    with recipe.seeded(0):
        return train(Residual(), steps=100)


def trained() -> nn.Module:
    return copy.deepcopy(_digits())


def with_change(path: str, change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """The trained digits with `change` done to one layer."""

    def make() -> nn.Module:
        model = trained()
        with torch.no_grad():
            change(model.get_submodule(path))
        return model

    return make


def with_head(head: nn.Module) -> Callable[[], nn.Module]:
    """The trained digits with something between its features and its classes, before the mean over the image."""

    def make() -> nn.Module:
        model = trained()
        model.block2 = nn.Sequential(model.block2, copy.deepcopy(head))
        return model

    return make


def reset_all(model: nn.Module) -> nn.Module:
    for path in NORMS:
        model.get_submodule(path).reset_running_stats()
    return model


def sequences(split, batch_size, seed):
    """Digits as sequences of rows with a length from 4 to 8; what is beyond the length is nonsense."""
    for images, labels in digits.batches(split, batch_size, seed):
        lengths = 4 + torch.arange(len(labels)) % 5
        padding = torch.arange(8)[None] >= lengths[:, None]
        yield (torch.where(padding[..., None], 50.0, images[:, 0]), padding), labels


def sequence_loss(output, batch):
    return F.cross_entropy(output["logits"], batch[1])


def halved(split):
    for images, labels in digits.batches(split, 32, 0):
        yield images.bfloat16(), labels


ON_SEQUENCES: dict[str, Any] = {"batches": sequences, "loss": sequence_loss}
SEQUENCES: dict[str, Any] = {
    "batches": lambda: sequences("test", 32, 0),
    "train_batches": lambda: sequences("train", 32, 0),
    "loss": sequence_loss,
}


def zero_init(model):
    for block in (model.block1, model.block2):
        nn.init.zeros_(block.bn2.weight)
    return model


def replaced(path, cls):
    """The trained digits with the class of one block changed."""

    def change(block):
        block.__class__ = cls

    return with_change(path, change)


def leak_in_zero_branch():
    model = zero_init(Residual())
    model.block1.__class__ = HiddenLeak
    return model


def averaged_weights():
    """Weights averaged over training, statistics those of a new model."""
    model, average = Residual(), Residual()
    train(model, steps=100)
    average.load_state_dict(dict(model.named_parameters()), strict=False)
    return average


def few_samples(model, batch_size):
    return train(model, batch_size, steps=150, lr=0.01)


def cumulative(is_recalibrated=False):
    """An average that never forgets the first steps, as it stands after training or taken anew."""
    model = train(convolutional(lambda c: nn.BatchNorm2d(c, momentum=None)), steps=150)
    if is_recalibrated:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        for x, _ in digits.batches("train", 64, 0):
            model(x)
    return model


def ragged():
    """Training batches of which the last holds one sample."""
    images, labels = digits.data()["train"]
    return [*digits.batches("train", 32, 0), (images[:1], labels[:1])]


def poisoned(bn):
    bn.running_mean[3] = torch.nan


def poisoned_all(bn):
    bn.running_mean.fill_(torch.nan)


def drowned(bn):
    """A mean far above the data: nothing gets through the activation after it."""
    bn.running_mean.add_(100)


def negative(bn):
    bn.running_var[2] = -0.5


def of(code: str, *paths: str) -> frozenset[tuple[str, str]]:
    return frozenset((code, path) for path in paths)


def _both(code: str, path: str) -> frozenset[tuple[str, str]]:
    return of(code, path) | of("SN801", "block1") | of("SN113", "block1")


FAULTS = [
    *(Case(f"reset {k}", with_change(k, lambda bn: bn.reset_running_stats()), of("SN201", k)) for k in NORMS),
    *(
        Case(f"shifted {k}", with_change(k, lambda bn: bn.running_mean.add_(bn.running_var.sqrt())), of("SN203", k))
        for k in NORMS
    ),
    *(Case(f"nan {k}", with_change(k, poisoned), of("SN202", k)) for k in NORMS),
    Case("negative variance", with_change("block1.bn2", negative), of("SN202", "block1.bn2")),
    Case("two reset", lambda: _reset_two(), of("SN201", "stem.1", "block2.bn1")),
    Case("statistics lost on load", lambda: reset_all(trained()), of("SN201", *NORMS)),
    Case("weights averaged alone", averaged_weights, of("SN201", *NORMS)),
    Case(
        "momentum too small",
        lambda: train(convolutional(lambda c: nn.BatchNorm2d(c, momentum=0.002))),
        of("SN109", "1", "4"),
    ),
    Case("cumulative from the first step", cumulative, of("SN203", "4")),
    Case(
        "no loss known",
        with_change("block1.bn1", lambda bn: bn.reset_running_stats()),
        of("SN201", "block1.bn1"),
        loss=None,
    ),
    Case("bias", lambda: train(convolutional(nn.BatchNorm2d, bias=True)), of("SN104", "0", "3"), notes=True),
    Case(
        "bias before instance norm",
        lambda: train(convolutional(lambda c: nn.InstanceNorm2d(c, affine=True), bias=True)),
        of("SN104", "0", "3"),
        notes=True,
    ),
    Case(
        "batch of 2",
        lambda: few_samples(Residual(), 2),
        of("SN102", "block2.bn2"),
        train_batches=lambda: digits.batches("train", 2, 0),
    ),
    Case(
        "batch of 4, dense",
        lambda: few_samples(mlp(), 4),
        of("SN102", "2"),
        train_batches=lambda: digits.batches("train", 4, 0),
    ),
    Case("last batch of 1", lambda: train(mlp()), of("SN101", "2"), train_batches=ragged),
    Case("hard-coded training=True", replaced("block1", HardCoded), of("SN801", "block1") | of("SN113", "block1")),
    Case("centred over samples", with_head(Centre()), of("SN801", "block2.1")),
    Case("softmax over samples", with_head(SoftmaxOverSamples()), of("SN801", "block2.1")),
    Case("divided by the batch's maximum", with_head(MaxOfBatch()), of("SN801", "block2.1")),
    Case("reshape for transpose", with_head(ReshapeForTranspose()), of("SN801", "block2.1")),
    Case("left in training mode", lambda: train(NeverEvaluates()), of("SN801", "net.4") | of("SN301", "net.4")),
    Case(
        "no running statistics",
        lambda: train(convolutional(lambda c: nn.BatchNorm2d(c, track_running_stats=c != 16))),
        of("SN801", "1"),
    ),
    Case("leak behind a zero gamma", leak_in_zero_branch, of("SN801", "block1")),
    Case("leak behind a stale layer", lambda: _leak_and("stem.1", drowned), _both("SN203", "stem.1")),
    Case("leak before a stale layer", lambda: _leak_and("block2.bn1", drowned), _both("SN203", "block2.bn1")),
    Case("leak behind a broken layer", lambda: _leak_and("stem.1", poisoned_all), _both("SN202", "stem.1")),
]


def _leak_and(path, change):
    """Two faults: the first block normalises by its batch for good, and the statistics of one layer are changed."""
    model = trained()
    model.block1.__class__ = HardCoded
    with torch.no_grad():
        change(model.get_submodule(path))
    return model


def _reset_two():
    model = trained()
    for path in ("stem.1", "block2.bn1"):
        model.get_submodule(path).reset_running_stats()
    return model


HEALTHY = [
    Case("batch norm", trained),
    Case("batch norm, dense", lambda: train(mlp())),
    Case("batch norm, no loss known", trained, loss=None),
    Case("batch norm, ours", lambda: train(convolutional(steadynorm.BatchNorm2d))),
    Case("batch norm, cumulative, recalibrated", lambda: cumulative(is_recalibrated=True)),
    Case("batch norm, ours, frozen", lambda: _freeze(train(convolutional(steadynorm.BatchNorm2d)))),
    Case("batch norm kept in evaluation mode", lambda: train(KeepsFrozen())),
    Case("frozen batch norm", lambda: train(convolutional(FrozenBatchNorm))),
    Case("synchronised batch norm", lambda: train(convolutional(nn.SyncBatchNorm))),
    Case("group norm", lambda: train(convolutional(lambda c: nn.GroupNorm(4, c), bias=True))),
    Case(
        "layer norm",
        lambda: train(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))),
    ),
    Case("instance norm", lambda: train(convolutional(nn.InstanceNorm2d))),
    Case(
        "instance norm that tracks, hardly trained",
        lambda: train(convolutional(lambda c: nn.InstanceNorm2d(c, track_running_stats=True))),
    ),
    Case("no norm", lambda: train(convolutional(lambda c: nn.Identity(), bias=True))),
    Case("fresh", Residual),
    Case("fresh, zero gammas", lambda: zero_init(Residual())),
    Case("zero gammas, trained", lambda: train(zero_init(Residual()), steps=100)),
    Case(
        "dropout at the end",
        lambda: train(nn.Sequential(*convolutional(nn.BatchNorm2d)[:8], nn.Dropout(0.5), nn.Linear(16, 10))),
    ),
    Case("siamese", lambda: train(SharedTwice(), steps=100)),
    Case("transformer with padding", lambda: train(Sequences(), **ON_SEQUENCES), **SEQUENCES),
    Case("masked batch norm", lambda: train(Masked(), **ON_SEQUENCES), **SEQUENCES),
    Case(
        "bfloat16",
        lambda: train(convolutional(nn.BatchNorm2d)).bfloat16(),
        batches=lambda: halved("test"),
        train_batches=lambda: halved("train"),
    ),
]


def _freeze(model):
    for module in model.modules():
        if isinstance(module, steadynorm.BatchNorm2d):
            module.freeze_()
    return model
