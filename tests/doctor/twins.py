"""Faults of how a model is trained and fed, each beside a healthy twin that differs in the fault alone."""

import copy
import warnings
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import steadynorm
from steadynorm import recipe
from steadynorm.recipes import digits
from tests.doctor.cases import NORMS, Case, of, train, trained
from tests.doctor.networks import convolutional, mlp


class Recomputed(nn.Module):
    """A network of which all but the head is made anew in the backward pass, or not."""

    def __init__(self, is_recomputed=True):
        super().__init__()
        net = convolutional(nn.BatchNorm2d)
        self.stem, self.body, self.head, self.is_recomputed = net[0], net[1:8], net[8], is_recomputed

    def forward(self, x):
        x = self.stem(x)
        x = checkpoint(self.body, x, use_reentrant=False) if self.is_recomputed else self.body(x)
        return self.head(x)


def sgd_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def plain_step(model, batch):
    digits.loss(model(batch[0]), batch).backward()
    sgd_of(model).step()


def penalised_step(model, batch):
    """A consistency penalty against a second pass, in training mode, that nobody learns from."""
    output = model(batch[0])
    with torch.no_grad():
        other = model(batch[0] + 0.01 * torch.randn_like(batch[0]))
    (digits.loss(output, batch) + (output - other).square().mean()).backward()
    sgd_of(model).step()


def careful_step(model, batch):
    """The same with the second pass in evaluation mode, and the modes put back."""
    output = model(batch[0])
    model.eval()
    with torch.no_grad():
        other = model(batch[0])
    model.train()
    (digits.loss(output, batch) + (output - other).square().mean()).backward()
    sgd_of(model).step()


def sharp_step(model, batch):
    """An optimizer that asks for the loss again at another place, as sharpness-aware ones do."""

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step()

    def closure():
        loss = digits.loss(model(batch[0]), batch)
        loss.backward()
        return loss

    closure()
    Twice(model.parameters(), lr=0.01).step(closure)


def accumulating_step(model, batch):
    for images, labels in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
        (digits.loss(model(images), (images, labels)) / 4).backward()
    sgd_of(model).step()


def adversarial_step(model, batch):
    """Real and made images in two calls, each learned from."""
    digits.loss(model(batch[0]), batch).backward()
    digits.loss(model(batch[0].flip(0)), (None, batch[1].flip(0))).backward()
    sgd_of(model).step()


def trained_in_evaluation_mode():
    model = convolutional(nn.BatchNorm2d, bias=True)
    model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(4):
        for batch in digits.batches("train", 32, epoch):
            optimizer.zero_grad()
            digits.loss(model(batch[0]), batch).backward()
            optimizer.step()
    return model


def finetuned_in_evaluation_mode():
    """With statistics of a pretrained network held still, as usual."""
    model = trained().eval()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for batch in digits.batches("train", 32, 1):
        optimizer.zero_grad()
        digits.loss(model(batch[0]), batch).backward()
        optimizer.step()
    return model


def evaluates_in_forward():
    """A forward that calls eval() on a part of itself."""

    class Stays(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convolutional(nn.BatchNorm2d)

        def forward(self, x):
            self.net[4].eval()
            return self.net(x)

    return train(Stays())


def frozen_once(is_kept=False):
    """A pretrained backbone put into evaluation mode before the loop, whose model.train() takes that back, or not."""
    backbone = trained().requires_grad_(False)
    backbone.head = nn.Identity()

    class Tuned(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            if is_kept:
                self[0].eval()
            return self

    model = Tuned(backbone, nn.Linear(32, 10)).train()
    backbone.eval()
    return model


@cache
def _teacher(is_evaluating):
    with recipe.seeded(1), torch.enable_grad():
        teacher = train(convolutional(nn.BatchNorm2d, width=8)).requires_grad_(False)
    return teacher.train(not is_evaluating)


def distilled(is_evaluating):
    def loss(output, batch):
        teacher = _teacher(is_evaluating)
        with torch.no_grad():
            soft = teacher(batch[0]).softmax(1)
        return F.cross_entropy(output, soft)

    return loss


class Taught(nn.Module):
    """A student that holds its teacher, whose mode follows its own, or not; the teacher speaks in training only."""

    def __init__(self, is_kept=False, is_copy=False):
        super().__init__()
        self.student = convolutional(nn.BatchNorm2d)
        self.teacher = copy.deepcopy(self.student) if is_copy else train(convolutional(nn.BatchNorm2d, width=8))
        self.teacher.requires_grad_(False)
        self.is_kept = is_kept

    def train(self, mode=True):
        super().train(mode)
        if self.is_kept:
            self.teacher.eval()
        return self

    def forward(self, x):
        y = self.student(x)
        if self.training:
            with torch.no_grad():
                soft = self.teacher(x)
            y = y + 0.01 * soft
        return y


class Sampling(nn.Module):
    """Dropout at inference: by leaving everything in training mode, or the dropout alone."""

    def __init__(self, is_whole=True):
        super().__init__()
        self.net, self.is_whole = (
            nn.Sequential(*convolutional(nn.BatchNorm2d)[:8], nn.Dropout(0.2), nn.Linear(16, 10)),
            is_whole,
        )

    def train(self, mode=True):
        super().train(mode or self.is_whole)
        self.net[8].train()
        return self

    def forward(self, x):
        return self.net(x)


class Target(nn.Sequential):
    """A copy of the trained network, made at its start, that its parameters follow."""


@cache
def _target(kind):
    """A target whose parameters were copied, or follow by a moving average; with its buffers, or without."""
    target = Target(*convolutional(nn.BatchNorm2d))
    with recipe.seeded(2):
        online = train(convolutional(nn.BatchNorm2d))
    share = 1.0 if "copied" in kind else 0.9
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs, share)
        if "buffers of another time" in kind:
            for mine, theirs in zip(target.buffers(), online.buffers(), strict=True):
                mine.copy_(theirs * 1.5)
        elif "with its buffers" in kind:
            for mine, theirs in zip(target.buffers(), online.buffers(), strict=True):
                mine.copy_(theirs if share == 1 else theirs * 1.1)
    return online, target.eval()


def of_target(kind):
    return lambda: copy.deepcopy(_target(kind)[0])


def towards(kind):
    """A step that learns from a target network, as value learning does."""

    def step(model, batch):
        with torch.no_grad():
            goal = _target(kind)[1](batch[0]).softmax(1)
        F.cross_entropy(model(batch[0]), goal).backward()
        sgd_of(model).step()

    return step


def in_order(split, kind):
    """Training batches by class, of two classes each, from a small buffer; of all classes in equal shares; shuffled."""
    images, labels = digits.data()[split]
    order = torch.argsort(labels, stable=True)
    if kind == "balanced":
        order = order[: 10 * (len(order) // 10)].reshape(10, -1).T.flatten()
    if kind == "two classes":
        generator = torch.Generator().manual_seed(0)
        order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in order.split(288)])
    if kind == "shuffled":
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
    return [(images[rows], labels[rows]) for rows in order.split(32) if len(rows) == 32]


def ragged(last):
    images, labels = digits.data()["train"]
    rest = [(images[:last], labels[:last])] if last else []
    return [*digits.batches("train", 32, 0), *rest]


def changed(split, change):
    return [(change(x), y) for x, y in digits.batches(split, 32, 0)]


class WrongAxis(nn.Module):
    """Features with the channels last, through a norm that takes rows for channels; or the channels second."""

    def __init__(self, is_wrong=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(8 if is_wrong else 16)
        self.head, self.is_wrong = nn.Linear(16 * 64, 10), is_wrong

    def forward(self, x):
        x = self.conv(x).relu()
        x = self.norm(x.permute(0, 2, 3, 1) if self.is_wrong else x)
        return self.head(x.flatten(1))


class TwoKinds(nn.Module):
    """A critic that sees an image and one of another kind in two calls; or both in two norms."""

    def __init__(self, is_shared=True):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32, bias=False), nn.Linear(32, 10)
        self.norms = nn.ModuleList(nn.BatchNorm1d(32) for _ in range(1 if is_shared else 2))

    def forward(self, x):
        kinds = (x.flatten(1), 2 - 3 * x.flatten(1))
        y = [self.norms[i % len(self.norms)](self.first(kind)).relu() for i, kind in enumerate(kinds)]
        return self.second(y[0]) + self.second(y[1])


def dropping(is_first=True):
    """Dropout before or behind a narrow norm."""
    drop, norm = nn.Dropout(0.5), [nn.BatchNorm1d(32), nn.ReLU()]
    middle = [drop, *norm] if is_first else [*norm, drop]
    return train(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *middle, nn.Linear(32, 10)), steps=150)


def averaged(is_updated=False):
    """Weights averaged over a whole training, with the statistics of the last ones; or with their own."""
    model = convolutional(nn.BatchNorm2d)
    average = AveragedModel(model)
    for epoch in range(6):
        train(model, steps=15, batches=lambda split, size, seed, e=epoch: digits.batches(split, size, 7 + e))
        average.update_parameters(model)
    if is_updated:
        update_bn([x for x, _ in digits.batches("train", 64, 0)], average)
    return average


def without_norms(model):
    """An optimizer made by type, which forgets the norms."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.05)


def of_the_head(model):
    return torch.optim.SGD(model.head.parameters(), lr=0.05)


def filled(split, batch_size=32, seed=0):
    """Digits as sequences of rows, (N, 8, 8), of four to eight rows; zeros behind, and a mask of what is one."""
    for images, labels in digits.batches(split, batch_size, seed):
        lengths = 4 + torch.randint(5, (len(labels),), generator=torch.Generator().manual_seed(seed))
        is_filled = torch.arange(8)[None] >= lengths[:, None]
        yield (images[:, 0].transpose(1, 2) * ~is_filled[:, None], is_filled), labels


class Filled(nn.Module):
    """Rows through a norm, and the mean over those that are data."""

    def __init__(self, norm):
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv1d(8, 16, 1, bias=False), norm, nn.Linear(16, 10)

    def forward(self, x, is_filled):
        x = self.embed(x)
        given = {"mask": ~is_filled} if type(self.norm).__module__.startswith("steadynorm") else {}
        x = self.norm(x, **given).relu() * ~is_filled[:, None]
        return self.head(x.sum(2) / (~is_filled).sum(1, keepdim=True))


FILLED = {
    "batches": lambda: filled("test"),
    "train_batches": lambda: filled("train"),
}


def with_padding(norm):
    return lambda: train(Filled(norm()), batches=filled)


def compiled(is_training):
    """A network traced in the mode of the moment."""
    model = trained().train(is_training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, digits.data()["test"][0][:8], check_trace=False)


def weight_normed():
    net = convolutional(nn.BatchNorm2d)
    net[3] = nn.utils.parametrizations.weight_norm(net[3])
    return train(net)


def stacked():
    return train(
        nn.Sequential(*convolutional(nn.BatchNorm2d)[:2], nn.BatchNorm2d(16), *convolutional(nn.BatchNorm2d)[2:])
    )


TWINS = [
    *(
        (
            Case(f"target {kind}", of_target(kind), of("SN204", "Target.1", "Target.4"), step=towards(kind)),
            Case(
                f"target {kind}, with its buffers",
                of_target(f"{kind}, with its buffers"),
                step=towards(f"{kind}, with its buffers"),
            ),
        )
        for kind in ("copied", "that follows")
    ),
    (
        Case(
            "target copied, buffers of another time",
            of_target("copied, buffers of another time"),
            of("SN204", "Target.1", "Target.4"),
            step=towards("copied, buffers of another time"),
        ),
        Case("target of nothing", trained, step=towards("copied")),
    ),
    (
        Case("recomputed", lambda: train(Recomputed()), of("SN303", "body.1", "body.4"), notes=True),
        Case("not recomputed", lambda: train(Recomputed(False)), notes=True),
    ),
    (
        Case("penalty by a second pass", trained, of("SN304", ""), step=penalised_step, notes=True),
        Case("penalty by a second pass in evaluation mode", trained, step=careful_step, notes=True),
    ),
    (
        Case("optimizer that evaluates twice", trained, of("SN304", ""), step=sharp_step, notes=True),
        Case("optimizer that evaluates once", trained, step=plain_step, notes=True),
    ),
    (
        Case("accumulated over micro-batches", trained, of("SN309", ""), step=accumulating_step, notes=True),
        Case("two calls, each learned from", trained, step=adversarial_step),
    ),
    (
        Case("trained in evaluation mode", trained_in_evaluation_mode, of("SN305", "")),
        Case("finetuned in evaluation mode", finetuned_in_evaluation_mode),
    ),
    (
        Case("a forward that evaluates", evaluates_in_forward, of("SN305", "net.4")),
        Case("a forward that does not", lambda: train(convolutional(nn.BatchNorm2d))),
    ),
    (
        Case("frozen by a single eval()", frozen_once, of("SN306", *(f"0.{path}" for path in NORMS))),
        Case("frozen by a train() of its own", lambda: frozen_once(is_kept=True)),
    ),
    (
        Case(
            "teacher that learns, in the loss",
            lambda: train(convolutional(nn.BatchNorm2d)),
            of("SN307", "Sequential.1", "Sequential.4"),
            loss=distilled(False),
        ),
        Case("teacher, in the loss", lambda: train(convolutional(nn.BatchNorm2d)), loss=distilled(True)),
    ),
    (
        Case("teacher that learns, in the model", lambda: train(Taught()), of("SN307", "teacher.1", "teacher.4")),
        Case("teacher, in the model", lambda: train(Taught(is_kept=True))),
    ),
    (
        Case(
            "dropout sampled with everything in training mode",
            lambda: train(Sampling()),
            of("SN308", "net.1", "net.4") | of("SN801", "net.1") | of("SN301", "net.1", "net.4"),
        ),
        Case("dropout sampled by itself", lambda: train(Sampling(False))),
    ),
    (
        Case("sorted by class", trained, of("SN401", ""), train_batches=lambda: in_order("train", "sorted")),
        Case("shuffled", trained, train_batches=lambda: in_order("train", "shuffled")),
    ),
    (
        Case("two classes a batch", trained, of("SN401", ""), train_batches=lambda: in_order("train", "two classes")),
        Case("balanced by class", trained, train_batches=lambda: in_order("train", "balanced")),
    ),
    (
        Case("ragged last batch of 2", lambda: train(mlp()), of("SN402", "2"), train_batches=lambda: ragged(2)),
        Case("ragged last batch of 24", lambda: train(mlp()), train_batches=lambda: ragged(24)),
    ),
    (
        Case(
            "pixels from 0 to 255 in evaluation",
            trained,
            of("SN405", ""),
            batches=lambda: changed("test", lambda x: 255 * x),
        ),
        Case("pixels from 0 to 1 in evaluation", trained),
    ),
    (
        Case("inverted in evaluation", trained, of("SN405", ""), batches=lambda: changed("test", lambda x: 1 - x)),
        Case("noisy in evaluation", trained, batches=lambda: changed("test", lambda x: x + 0.02 * torch.randn_like(x))),
    ),
    (
        Case(
            "standardised twice",
            trained,
            of("SN405", ""),
            batches=lambda: changed("test", lambda x: (x - 0.1307) / 0.3081),
        ),
        Case(
            "another order of the evaluation batches", trained, batches=lambda: [*digits.batches("test", 32, 0)][::-1]
        ),
    ),
    (
        Case(
            "raw pixels, no norm near",
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 10)),
            of("SN406", "1"),
            batches=lambda: changed("test", lambda x: 255 * x),
            train_batches=lambda: changed("train", lambda x: 255 * x),
        ),
        Case(
            "raw pixels into a norm",
            lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
            batches=lambda: changed("test", lambda x: 255 * x),
            train_batches=lambda: changed("train", lambda x: 255 * x),
        ),
    ),
    (
        Case("channels last through the norm", lambda: train(WrongAxis()), of("SN105", "norm")),
        Case("channels second through the norm", lambda: train(WrongAxis(False))),
    ),
    (
        Case("two kinds through one norm", lambda: train(TwoKinds(), steps=150), of("SN106", "norms.0")),
        Case("two kinds through two norms", lambda: train(TwoKinds(False), steps=150), notes=True),
    ),
    (
        Case("dropout before a narrow norm", dropping, of("SN107", "3")),
        Case("dropout behind a narrow norm", lambda: dropping(False)),
    ),
    (
        Case("averaged weights, last statistics", averaged, of("SN204", "module.4")),
        Case("averaged weights, their statistics", lambda: averaged(is_updated=True)),
    ),
    (
        Case("an optimizer without the norms", trained, of("SN702", *NORMS), optimizer=without_norms),
        Case("an optimizer of the head", trained, optimizer=of_the_head),
    ),
    (
        Case("padding in a group norm", with_padding(lambda: nn.GroupNorm(4, 16)), of("SN403", "norm"), **FILLED),
        Case("masked group norm", with_padding(lambda: steadynorm.GroupNorm(4, 16)), **FILLED),
    ),
    (
        Case(
            "padding in a batch norm",
            with_padding(lambda: nn.BatchNorm1d(16)),
            of("SN403", "norm") | of("SN203", "norm"),
            **FILLED,
            notes=True,
        ),
        Case("masked batch norm, rows", with_padding(lambda: steadynorm.BatchNorm1d(16)), **FILLED),
    ),
    (
        Case("traced in training mode", lambda: compiled(True), of("SN802", *NORMS), train_batches=None),
        Case("traced in evaluation mode", lambda: compiled(False), train_batches=None),
    ),
    (
        Case("weight norm before a norm", weight_normed, of("SN115", "3"), notes=True),
        Case("no weight norm", lambda: train(convolutional(nn.BatchNorm2d)), notes=True),
    ),
    (
        Case("norm behind norm", stacked, of("SN116", "2"), notes=True),
        Case("norms apart", lambda: train(convolutional(nn.BatchNorm2d), steps=70), notes=True),
    ),
]
