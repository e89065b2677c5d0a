"""A second set, written when the first had been run and what it found was mended."""

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import steadynorm
from tests.doctor.heldout import data
from tests.doctor.heldout.held import Subject, at, fit, planted
from tests.doctor.heldout.images import Grouped, Volumes, how_much, of_volumes
from tests.doctor.heldout.segmentation import segmenter, stage
from tests.doctor.heldout.series import Reader1d, of_lines
from tests.doctor.heldout.tables import GROWERS, REGRESSION, TUMOURS, classes, regressor, subject
from tests.doctor.heldout.text import Reader, is_prose


def pages_of(*layers, **how):
    """A classifier of pages, trained."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return subject(nn.Sequential(*layers, *head), how_much(), GROWERS, **how)


@planted("a table left raw in evaluation", ("SN405", ""), also=[("SN203", "0")])
def a_table_left_raw(is_faulty):
    x, y = data.cancer(False)
    x = torch.log1p(x)
    mean, deviation = x.mean(), x.std()
    train, test = data.halves((x - mean) / deviation, y)
    if is_faulty:
        test[0] = test[0] * deviation + mean
    model = nn.Sequential(nn.BatchNorm1d(30), nn.Linear(30, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    return subject(model.append(nn.Linear(16, 1)), (train, test), TUMOURS)


class Folded(nn.Module):
    """Halves of a sample as samples of their own, brought together again, rightly or not."""

    def __init__(self, is_faulty):
        super().__init__()
        self.each, self.is_faulty = nn.Linear(80, 16), is_faulty

    def forward(self, lines):
        n = len(lines)
        parts = lines.flatten(1).reshape(n, 2, 80)
        folded = (parts.transpose(0, 1) if self.is_faulty else parts).reshape(2 * n, 80)
        return self.each(folded).relu().reshape(n, 32)


@planted("halves given back to other samples", ("SN801", "fold"))
def halves_given_back(is_faulty):
    model = nn.Sequential(OrderedDict(fold=Folded(is_faulty), norm=nn.LayerNorm(32), head=nn.Linear(32, 2)))
    return subject(model, of_lines(), REGRESSION)


class Scaled(nn.Module):
    """A residual branch behind a scale that begins at zero."""

    def __init__(self, is_faulty, width=32):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.scale, self.axis = nn.Parameter(torch.zeros(width)), 0 if is_faulty else -1

    def forward(self, x):
        return x + self.scale * F.normalize(self.mix(self.norm(x)), dim=self.axis)


@planted("unit length over the samples, behind a zero", ("SN801", "1"))
def unit_length_over_the_samples(is_faulty):
    model = nn.Sequential(nn.Linear(10, 32), Scaled(is_faulty), Scaled(False), nn.Linear(32, 1))
    return subject(model, data.halves(*data.diabetes()), REGRESSION, steps=0)


@planted("an expert's places given in order", ("SN801", "route"))
def an_experts_places(is_faulty):
    class Route(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(10, 2), nn.ModuleList(nn.Linear(10, 16) for _ in range(2))

        def forward(self, x):
            chosen = self.gate(x).argmax(1)
            y = x.new_zeros(len(x), 16)
            for i, expert in enumerate(self.experts):
                taken = chosen == i
                if is_faulty:  # so many and no more, first come first served
                    taken = taken & (taken.cumsum(0) <= max(1, len(x) // 3))
                y = y + taken[:, None] * expert(x)
            return y

    model = nn.Sequential(OrderedDict(route=Route(), act=nn.ReLU(), head=nn.Linear(16, 1)))
    return subject(model, data.halves(*data.diabetes()), REGRESSION)


@planted("blocks recomputed, the older way", *at("SN303", "0.1", "1.1"), notes=True)
def blocks_recomputed(is_faulty):
    class Pages(nn.Sequential):
        def forward(self, x):
            x = x.requires_grad_(self.training)
            for i, block in enumerate(self):
                x = checkpoint(block, x, use_reentrant=True) if is_faulty and i < 2 and self.training else block(x)
            return x

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return subject(Pages(stage(3, 12, 2), stage(12, 16, 2), head), how_much(), GROWERS)


@planted("an optimizer with a closure", ("SN304", ""), notes=True)
def an_optimizer_with_a_closure(is_faulty):
    made = subject(regressor(), data.halves(*data.diabetes()), REGRESSION)
    optimizer = torch.optim.LBFGS(made.model.parameters(), lr=0.01, max_iter=3 if is_faulty else 1)

    def step(model, batch):
        model.train()

        def closure():
            optimizer.zero_grad()
            value = REGRESSION["loss"](model(batch[0]), batch)
            value.backward()
            return value

        optimizer.step(closure)

    made.optimizer, made.step = optimizer, step
    return made


@planted("a perceptual loss in training mode", *at("SN307", "Sequential.0.1", "Sequential.1.1"))
def a_perceptual_loss(is_faulty):
    made = pages_of(stage(3, 12, 2), stage(12, 16, 2))
    judge = nn.Sequential(stage(3, 8), stage(8, 8, 2)).requires_grad_(False)
    judge.train(is_faulty)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model.append(nn.Conv2d(8, 3, 3, padding=1))

    def loss(output, batch):
        return F.mse_loss(judge(output), judge(batch[0]).detach())

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(model, made.train_batches, loss, optimizer, 60)
    return Subject(model, made.batches, made.train_batches, loss, optimizer=optimizer)


@planted("a backbone of text frozen but for its norms' statistics", *at("SN302", "norm1", "norm2"))
def a_backbone_of_text(is_faulty):
    made = subject(Reader(norm=steadynorm.BatchNorm1d), is_prose(), GROWERS)
    model = made.model.requires_grad_(False)
    if not is_faulty:
        steadynorm.training.freeze_(model)
    model.head = nn.Linear(24, 2)
    made.optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05)
    fit(model, made.train_batches, classes, made.optimizer, 40)
    return made


@planted("batches of one source each", ("SN401", ""))
def batches_of_one_source(is_faulty):
    x, y = data.cancer()
    train, test = data.halves(x, y)
    if is_faulty:  # from small tumours to large ones, as a file may be sorted
        order = train[0][:, 0].argsort()
        train = [t[order] for t in train]
    return subject(regressor(30), (train, test), TUMOURS, shuffle=not is_faulty)


@planted("a last batch of two volumes", ("SN402", "deep.1"))
def a_last_batch_of_two(is_faulty):
    train, test = data.halves(*data.volumes())
    return subject(Volumes(), ([t[:258] for t in train], test), GROWERS, drop_last=not is_faulty)


@planted("variances below zero after an extrapolation", ("SN202", "join1.1"))
def variances_below_zero(is_faulty):
    made = segmenter()
    if is_faulty:
        made.model.join1[1].running_var[:3].mul_(-0.2)
    return made


@planted("one level of a U-Net shifted", ("SN203", "enter.1"))
def one_level_shifted(is_faulty):
    made = segmenter()
    if is_faulty:
        norm = made.model.enter[1]
        norm.running_mean.add_(1.5 * norm.running_var.sqrt())
    return made


class ModelEma(nn.Module):
    """An average of parameters, as written in many a repository: buffers are left as they were."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)

    def forward(self, x):
        return self.module(x)


@planted("an average that never took statistics", *at("SN204", "module.1", "module.4"))
def an_average_that_never_took_statistics(is_faulty):
    model, split = Reader1d(), of_lines()
    batches = data.loader(split[0], 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    average = ModelEma(model)
    for _ in range(40):
        fit(model, batches, REGRESSION["loss"], optimizer, 5)
        average.update(model)
    if not is_faulty:
        steadynorm.training.recalibrate_(average.module, batches)
    held = data.loader(split[1], 64, shuffle=False, drop_last=False)
    return Subject(average, held, batches, **REGRESSION)


@planted("channels last into a batch norm", ("SN105", "norm"))
def channels_last(is_faulty):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm = nn.Linear(3, 24), nn.BatchNorm2d(24)
            self.head = nn.Linear(24, 4)

        def forward(self, x):
            x = self.mix(x.permute(0, 2, 3, 1))  # (N, H, W, C), 24 rows and 24 channels
            x = self.norm(x) if is_faulty else self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.head(x.relu().mean((1, 2)))

    return subject(Pixels(), how_much(), GROWERS)


@planted("clean and noisy through one norm", ("SN106", "body.1"), also=[("SN203", "body.1")])
def clean_and_noisy(is_faulty):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = stage(3, 16, 2), nn.Linear(16, 4)

        def forward(self, x):
            hard = x + 2 * torch.randn_like(x) if is_faulty else x.flip(3)
            return self.head(self.body(x).mean((2, 3))) + self.head(self.body(hard).mean((2, 3)))

    return subject(Twice(), how_much(), GROWERS)


@planted("a stream far from zero, in bfloat16", ("SN501", "norm"))
def a_stream_far_from_zero(is_faulty):
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm = nn.Linear(30, 32), nn.LayerNorm(32)
            self.head = nn.Linear(32, 1)
            with torch.no_grad():
                self.enter.bias.fill_(800.0 if is_faulty else 0.0)

        def forward(self, x):
            return self.head(self.norm(self.enter(x)).relu())

    x, y = data.cancer()
    return subject(Stream().bfloat16(), data.halves(x.bfloat16(), y.bfloat16()), TUMOURS, optimizer=torch.optim.SGD)


@planted("weight normalization into a batch norm, in 3d", ("SN115", "middle.0"), notes=True)
def weight_normalization(is_faulty):
    model = Volumes()
    if is_faulty:
        steadynorm.weight_norm(model.middle[0])
    return of_volumes(model)


@planted("an instance norm before a group norm", ("SN116", "0.1.1"), notes=True)
def an_instance_norm_before_a_group_norm(is_faulty):
    both = [nn.InstanceNorm2d(12), nn.GroupNorm(4, 12)] if is_faulty else [nn.Identity(), nn.GroupNorm(4, 12)]
    first = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.Sequential(*both), nn.ReLU())
    return pages_of(first, stage(12, 16, 2, Grouped))


@planted("a norm of the only output", ("SN103", "3"))
def a_norm_of_the_only_output(is_faulty):
    norm = steadynorm.RMSNorm(1) if is_faulty else nn.Identity()
    model = nn.Sequential(nn.Linear(10, 24), nn.SiLU(), nn.Linear(24, 1), norm, nn.Linear(1, 1))
    return subject(model, data.halves(*data.diabetes()), REGRESSION)


@planted("vectors of spectral norms that were not loaded", *at("SN208", "0.0", "1.0"))
def vectors_that_were_not_loaded(is_faulty):
    first, second = stage(3, 12, 2, Grouped), stage(12, 16, 2, Grouped)
    for part in (first, second):
        nn.utils.spectral_norm(part[0])
    made = pages_of(first, second)
    if is_faulty:
        for part in (first, second):
            for vector in (part[0].weight_u, part[0].weight_v):
                vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
    return made


@planted("a program exported while training", *at("SN802", "norm1", "norm2"))
def a_program_exported(is_faulty):
    made = subject(Reader(), is_prose(), GROWERS)
    made.model.train(is_faulty)
    example = next(iter(made.batches))[0]
    made.model, made.optimizer = torch.export.export(made.model, (example,)).module(), None
    made.train_batches = None
    made.batches = [batch for batch in made.batches if len(batch[0]) == len(example)]
    return made
