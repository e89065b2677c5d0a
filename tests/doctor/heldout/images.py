"""Held-out cases on pages and volumes of source code: segmentation, reconstruction, adversaries, 3d convolutions."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import steadynorm
from tests.doctor.heldout import data
from tests.doctor.heldout.held import Subject, at, fit, planted
from tests.doctor.heldout.tables import GROWERS, classes, subject


def prose():
    images, masks, _ = data.pages()
    return data.halves(images, masks)


def how_much():
    images, _, labels = data.pages()
    return data.halves(images, labels)


def overlap(output, batch):
    return F.binary_cross_entropy_with_logits(output["mask"], batch[1])


def dice(output, batch):
    found = output["mask"] > 0
    both = (found & (batch[1] > 0.5)).sum() * 2
    return {"dice": (both / (found.sum() + batch[1].sum()).clamp(min=1)).item()}


SEGMENTS = {"loss": overlap, "metrics": dice}


def stage(inputs, outputs, stride=1, norm=nn.BatchNorm2d, **options):
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, norm(outputs, **options), nn.LeakyReLU(0.1))


class UNet(nn.Module):
    """Pages to a mask in a dictionary: two levels down, one bridge, two up by transposed convolutions."""

    def __init__(self, width=8, **options):
        super().__init__()
        self.enter = stage(3, width, **options)
        self.down1 = stage(width, 2 * width, 2, **options)
        self.down2 = stage(2 * width, 3 * width, 2, **options)
        self.up1 = nn.ConvTranspose2d(3 * width, 2 * width, 2, 2)
        self.join1 = stage(4 * width, 2 * width, **options)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join2 = stage(2 * width, width, **options)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        a = self.enter(x)
        b = self.down1(a)
        x = self.down2(b)
        x = self.join1(torch.cat([self.up1(x), b], 1))
        x = self.join2(torch.cat([self.up2(x), a], 1))
        return {"mask": self.out(x)}


UNET = ("enter.1", "down1.1", "down2.1", "join1.1", "join2.1")


def segmenter(size=16, steps=60, model=None, **options):
    model = UNet(**options) if model is None else model
    return subject(model, prose(), SEGMENTS, size=size, steps=steps, lr=1e-2)


@planted("channels in the other order", ("SN405", ""), also=at("SN203", "enter.1"))
def channels_in_the_other_order(is_faulty):
    made = segmenter()
    _, (images, masks) = prose()
    images = images.flip(1) if is_faulty else images
    made.batches = data.loader([images, masks], 64, shuffle=False, drop_last=False)
    return made


@planted("pages from 0 to 255", ("SN405", ""), also=at("SN203", "enter.1"))
def pages_from_0_to_255(is_faulty):
    made = segmenter()
    _, (images, masks) = prose()
    made.batches = data.loader([images * (255 if is_faulty else 1), masks], 64, shuffle=False, drop_last=False)
    return made


@planted("a checkpoint without buffers", *at("SN201", *UNET))
def a_checkpoint_without_buffers(is_faulty):
    made = segmenter()
    if is_faulty:
        weights = dict(made.model.named_parameters())
        made.model = UNet()
        made.model.load_state_dict(weights, strict=False)
        made.optimizer = None
    return made


@planted("a convolution scaled after the training", ("SN203", "join2.1"))
def a_convolution_scaled(is_faulty):
    made = segmenter()
    if is_faulty:
        with torch.no_grad():
            made.model.join2[0].weight.mul_(0.15)
    return made


@planted("the momentum of Keras, in a U-Net", *at("SN108", *UNET), also=at("SN203", *UNET))
def the_momentum_of_keras_in_a_unet(is_faulty):
    return segmenter(momentum=0.99 if is_faulty else 0.1)


@planted("an encoder frozen by half", *at("SN302", "enter.1", "down1.1", "down2.1"))
def an_encoder_frozen_by_half(is_faulty):
    made = segmenter()
    parts = [made.model.enter, made.model.down1, made.model.down2]
    for part in parts:
        part.requires_grad_(False)
        if not is_faulty:
            part[1] = steadynorm.FrozenBatchNorm2d.from_batch_norm(part[1])
    left = [p for p in made.model.parameters() if p.requires_grad]
    made.optimizer = torch.optim.AdamW(left, lr=1e-3)
    fit(made.model, made.train_batches, overlap, made.optimizer, 20)
    return made


@planted("an encoder frozen until the next epoch", *at("SN306", "enter.1", "down1.1", "down2.1"))
def an_encoder_frozen_until_the_next_epoch(is_faulty):
    made = segmenter(model=Kept() if not is_faulty else None)
    parts = [made.model.enter, made.model.down1, made.model.down2]
    for part in parts:
        part.requires_grad_(False)
    made.model.train()
    for part in parts:
        part.eval()
    made.optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], lr=1e-3)
    return made


class Kept(UNet):
    """A U-Net whose encoder stays in evaluation mode once its weights are frozen."""

    def train(self, mode=True):
        super().train(mode)
        for part in (self.enter, self.down1, self.down2):
            part.train(mode and part[0].weight.requires_grad)
        return self


@planted("a step in evaluation mode", ("SN305", ""), also=[*at("SN201", *UNET), *at("SN203", *UNET)])
def a_step_in_evaluation_mode(is_faulty):
    made = segmenter(steps=0)
    optimizer = made.optimizer

    def step(model, batch):
        model.train(not is_faulty)
        optimizer.zero_grad()
        overlap(model(batch[0]), batch).backward()
        optimizer.step()

    for _ in range(4):
        for batch in made.train_batches:
            step(made.model, batch)
    made.step = step
    return made


class Grouped(nn.GroupNorm):
    """A group norm that takes the number of channels alone."""

    def __init__(self, channels):
        super().__init__(4, channels)


class Contrast(nn.Module):
    """Divide by the largest value of the sample, or of the batch."""

    def __init__(self, is_faulty):
        super().__init__()
        self.is_faulty = is_faulty

    def forward(self, x):
        return x / (x.amax() if self.is_faulty else x.amax((1, 2, 3), keepdim=True)).clamp(min=1e-3)


@planted("contrast over the batch", ("SN801", "contrast"))
def contrast_over_the_batch(is_faulty):
    model = nn.Sequential()
    model.enter = stage(3, 8, 2, Grouped)
    model.contrast = Contrast(is_faulty)
    model.deep = stage(8, 16, 2, Grouped)
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return subject(model, how_much(), GROWERS)


class StaysInTraining(steadynorm.BatchNorm2d):
    """A batch norm that does not hear of evaluation."""

    def train(self, mode=True):
        return super().train(True)


@planted("a norm that does not hear of evaluation", *at("SN301", "down1.1"), *at("SN801", "down1.1"))
def a_norm_that_does_not_hear(is_faulty):
    model = UNet(norm=steadynorm.BatchNorm2d)
    if is_faulty:
        model.down1[1] = StaysInTraining(16)
    return segmenter(model=model)


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
    fit(model, batches, told_apart, optimizer, 50)
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


class Contrasted(UNet):
    """A U-Net of pages whose contrast is raised before."""

    def __init__(self, is_faulty, **options):
        super().__init__(**options)
        self.contrast = Contrast(is_faulty)

    def forward(self, x):
        return super().forward(self.contrast(x))


@planted("two faults at once", *at("SN108", *UNET), ("SN801", "contrast"), also=at("SN203", *UNET))
def two_faults_at_once(is_faulty):
    return segmenter(model=Contrasted(is_faulty, momentum=0.9 if is_faulty else 0.1))


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


LEVELS = ("conv_0", *(f"down_{i}.convs" for i in range(1, 5)), *(f"upcat_{i}.convs" for i in range(1, 5)))
MONAI = [f"{level}.conv_{i}.adn.N" for level in LEVELS for i in range(2)]


@planted("a U-Net of monai with the momentum of Keras", *at("SN108", *MONAI), also=at("SN203", *MONAI))
def a_unet_of_monai(is_faulty):
    from monai.networks.nets import BasicUNet

    norm = ("batch", {"momentum": 0.99 if is_faulty else 0.1})
    model = BasicUNet(2, 3, 1, features=(8, 8, 8, 8, 8, 8), norm=norm)
    images, masks, _ = data.pages(height=32)
    images, masks = (F.pad(x, (0, 8)) for x in (images, masks))

    def loss(output, batch):
        return F.binary_cross_entropy_with_logits(output, batch[1])

    return subject(model, data.halves(images, masks), {"loss": loss, "metrics": None}, size=16, steps=40)
