"""Held-out cases on pages of source code whose prose is to be marked."""

import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from tests.doctor.heldout import data
from tests.doctor.heldout.held import at, fit, planted
from tests.doctor.heldout.tables import subject


def prose():
    images, masks, _ = data.pages()
    return data.halves(images, masks)


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


@planted("a step in evaluation mode", *at("SN305", *UNET), also=[*at("SN201", *UNET), *at("SN203", *UNET)])
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


class Contrast(nn.Module):
    """Divide by the largest value of the sample, or of the batch."""

    def __init__(self, is_faulty):
        super().__init__()
        self.is_faulty = is_faulty

    def forward(self, x):
        return x / (x.amax() if self.is_faulty else x.amax((1, 2, 3), keepdim=True)).clamp(min=1e-3)


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


class Contrasted(UNet):
    """A U-Net whose first features are scaled by their contrast."""

    def __init__(self, is_faulty, **options):
        super().__init__(**options)
        self.contrast = Contrast(is_faulty)
        self.enter.append(self.contrast)


@planted("two faults at once", *at("SN108", *UNET), ("SN801", "enter.3"), also=at("SN203", *UNET))
def two_faults_at_once(is_faulty):
    return segmenter(model=Contrasted(is_faulty, momentum=0.9 if is_faulty else 0.1))


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

    return subject(model, data.halves(images, masks), {"loss": loss, "metrics": None}, size=16, steps=80)
