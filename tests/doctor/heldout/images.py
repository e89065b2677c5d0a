"""Held-out cases on pages and volumes: classes, adversaries, pairs, 3d convolutions."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import steadynorm
from tests.doctor.heldout import data
from tests.doctor.heldout.held import Subject, at, fit, planted
from tests.doctor.heldout.segmentation import Contrast, stage
from tests.doctor.heldout.tables import GROWERS, classes, subject


def how_much():
    images, _, labels = data.pages()
    return data.halves(images, labels)


class Grouped(nn.GroupNorm):
    """A group norm that takes the number of channels alone."""

    def __init__(self, channels):
        super().__init__(4, channels)


@planted("contrast over the batch", ("SN801", "contrast"))
def contrast_over_the_batch(is_faulty):
    model = nn.Sequential()
    model.enter = stage(3, 8, 2, Grouped)
    model.contrast = Contrast(is_faulty)
    model.deep = stage(8, 16, 2, Grouped)
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return subject(model, how_much(), GROWERS)


class Squeezed(nn.Module):
    """Convolutions with a gate by pooled features, which has a batch norm of its own."""

    def __init__(self, is_gate_normed=True):
        super().__init__()
        self.body = nn.Sequential(stage(3, 12, 2), stage(12, 12, 2))
        self.gate = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.body(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(x.mean((2, 3)))


@planted("a gate of one page", ("SN101", "gate.1"))
def a_gate_of_one_page(is_faulty):
    train, test = how_much()
    return subject(Squeezed(), ([t[:321] for t in train], test), GROWERS, drop_last=not is_faulty)


class Volumes(nn.Module):
    """3d convolutions down to a single position, and a head."""

    def __init__(self, head=None, norm=nn.BatchNorm3d, bias=False, width=8):
        super().__init__()
        self.shallow = nn.Sequential(nn.Conv3d(1, width, 3, 2, 1, bias=bias), norm(width), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv3d(width, 16, 3, 2, 1, bias=bias), norm(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv3d(16, 16, (2, 3, 5), bias=bias), norm(16) if head is None else nn.Identity())
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), *([] if head is None else [head]), nn.Linear(16, 4))

    def forward(self, x):
        return self.head(self.deep(self.middle(self.shallow(x))))


def of_volumes(model, size=32, **how):
    return subject(model, data.halves(*data.volumes()), GROWERS, size=size, lr=5e-3, **how)


@planted("volumes two at a time", ("SN102", "deep.1"))
def volumes_two_at_a_time(is_faulty):
    return of_volumes(Volumes(), size=2 if is_faulty else 32)


@planted("a group for each pooled channel", ("SN103", "head.2"))
def a_group_for_each_pooled_channel(is_faulty):
    return of_volumes(Volumes(head=nn.GroupNorm(16 if is_faulty else 2, 16)))


@planted("groups of two pooled channels", ("SN103", "head.2"))
def groups_of_two_pooled_channels(is_faulty):
    return of_volumes(Volumes(head=steadynorm.GroupNorm(8 if is_faulty else 1, 16)))


@planted("biases before instance norms, in 3d", *at("SN104", "shallow.0", "middle.0"), notes=True)
def biases_before_instance_norms(is_faulty):
    return of_volumes(Volumes(head=nn.LayerNorm(16), norm=steadynorm.InstanceNorm3d, bias=is_faulty))


class Scales(nn.Module):
    """One head over features of three sizes, with a norm for all of them or for each."""

    def __init__(self, is_shared):
        super().__init__()
        self.enter = stage(3, 12, 2)
        self.coarser = nn.ModuleList(nn.Conv2d(12, 12, 3, 2, 1) for _ in range(2))
        self.conv = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(1 if is_shared else 3))
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        levels = [self.enter(x)]
        for conv in self.coarser:
            levels.append(conv(levels[-1]) * 2 - 0.5)
        seen = [F.relu(self.norms[i % len(self.norms)](self.conv(level))) for i, level in enumerate(levels)]
        return sum(self.out(level.mean((2, 3))) for level in seen)


@planted("one norm for three scales", ("SN106", "norms.0"), also=[("SN203", "norms.0")])
def one_norm_for_three_scales(is_faulty):
    return subject(Scales(is_faulty), how_much(), GROWERS, steps=150)


class Adversaries(nn.Module):
    """A generator of pages from noise, and the critic of them and of real ones."""

    def __init__(self, is_apart):
        super().__init__()
        self.generate = nn.Sequential(nn.Linear(8, 12 * 60), nn.Unflatten(1, (12, 6, 10)), nn.Upsample(scale_factor=4))
        self.generate.extend([nn.Conv2d(12, 3, 3, padding=1), nn.Sigmoid()])
        self.critic = nn.Sequential(stage(3, 8, 2), stage(8, 16, 2), nn.Flatten(), nn.Linear(16 * 60, 1))
        self.is_apart = is_apart

    def forward(self, images, noise):
        made = self.generate(noise).detach()
        if self.is_apart:
            return self.critic(images), self.critic(made)
        return self.critic(torch.cat([images, made])).chunk(2)


def told_apart(output, batch):
    real, made = output
    return F.softplus(-real).mean() + F.softplus(made).mean()


def with_noise(images, noise):
    return ((images, noise),)


@planted(
    "a critic that sees real and made apart",
    *at("SN106", "critic.0.1", "critic.1.1"),
    also=at("SN203", "critic.0.1", "critic.1.1"),
)
def a_critic_that_sees_them_apart(is_faulty):
    model = Adversaries(is_faulty)
    images, _, _ = data.pages()
    train, test = data.halves(images, torch.randn(len(images), 8))
    batches = data.loader(train, 32, collate=with_noise)
    optimizer = torch.optim.Adam(model.critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
    fit(model, batches, told_apart, optimizer, 120)
    held = data.loader(test, 64, shuffle=False, drop_last=False, collate=with_noise)
    return Subject(model, held, batches, told_apart, optimizer=optimizer)


@planted("vectors of spectral norms, averaged", *at("SN208", "body.0", "body.2"))
def vectors_of_spectral_norms(is_faulty):
    body = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(12, 12, 3, 2, 1), nn.LeakyReLU(0.2))
    model = nn.Sequential()
    model.body = body
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    for i in (0, 2):
        parametrizations.spectral_norm(body[i])
    first = copy.deepcopy(model)
    made = subject(model, how_much(), GROWERS)
    if is_faulty:
        ours, theirs = dict(model.named_buffers()), dict(first.named_buffers())
        for name in ours:
            if name.endswith(("_u", "_v")):
                ours[name].copy_((ours[name] + theirs[name]) / 2)
    return made


ENCODER = ("encode.0.1", "encode.1.1")


class Siamese(nn.Module):
    """Two pages to whether they hold as much prose: a shared encoder, a distance."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.encode = nn.Sequential(stage(3, 12, 2, momentum=momentum), stage(12, 16, 2, momentum=momentum))
        self.embed = nn.Linear(16, 12)
        self.head = nn.Linear(12, 1)

    def forward(self, left, right):
        a, b = (self.embed(self.encode(x).mean((2, 3))) for x in (left, right))
        return self.head((a - b).abs())


def pairs():
    images, _, labels = data.pages()
    other = torch.where(torch.rand(len(images)) < 0.5, 1, 61)
    others = (torch.arange(len(images)) + other) % len(images)
    same = (labels == labels[others]).float()[:, None]
    return data.halves(images, images[others], same)


def as_pair(left, right, same):
    return (left, right), same


def siamese(model, steps=120):
    def loss(output, batch):
        return F.binary_cross_entropy_with_logits(output, batch[1])

    train, test = pairs()
    batches = data.loader(train, 24, collate=as_pair)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(model, batches, loss, optimizer, steps)
    held = data.loader(test, 48, shuffle=False, drop_last=False, collate=as_pair)
    return Subject(model, held, batches, loss, optimizer=optimizer)


@planted("one layer reset in a pair of encoders", ("SN201", "encode.1.1"))
def one_layer_reset_in_a_pair(is_faulty):
    made = siamese(Siamese())
    if is_faulty:
        made.model.encode[1][1].reset_running_stats()
    return made


@planted("an average too slow for a pair of encoders", *at("SN109", *ENCODER), also=at("SN203", *ENCODER))
def an_average_too_slow_for_a_pair(is_faulty):
    return siamese(Siamese(momentum=0.001 if is_faulty else 0.1))


STAGE = "regnet.encoder.stages.0.layers.0.layer.3.normalization"


@planted("a stage of a regnet with another's variances", ("SN203", STAGE))
def a_stage_of_a_regnet(is_faulty):
    from transformers import RegNetConfig, RegNetForImageClassification

    options = {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "groups_width": 8,
        "embedding_size": 8,
        "downsample_in_first_stage": False,
    }
    model = RegNetForImageClassification(RegNetConfig(**options, num_labels=4))

    def loss(output, batch):
        return classes(output.logits, batch)

    def right(output, batch):
        return {"accuracy": (output.logits.argmax(1) == batch[1]).float().mean().item()}

    made = subject(model, how_much(), {"loss": loss, "metrics": right}, steps=90, lr=3e-3)
    if is_faulty:
        model.get_submodule(STAGE).running_var.mul_(20)
    return made
