"""Small healthy architectures of many kinds, as one list: no rule may find anything above a note in them.

Each is trained or loaded as its users do it, briefly, on real digits. Those in `cases.HEALTHY` vary one network; these
vary the network, and how it came to its weights.
"""

import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from steadynorm import models, training
from steadynorm.recipes import digits
from tests.doctor.cases import Case, reset_all, train, trained
from tests.doctor.networks import convolutional, mlp


class DenseBlock(nn.Module):
    """Norms before their convolutions, on what is concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=1, bias=False)
        self.norm3, self.head = nn.BatchNorm2d(24), nn.Linear(24, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv1(self.norm1(x).relu())], 1)
        x = torch.cat([x, self.conv2(self.norm2(x).relu())], 1)
        return self.head(self.norm3(x).relu().mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with the eps of 1e-3 and the momentum of 0.01 of mobile networks."""

    def __init__(self):
        super().__init__()
        norm = {"eps": 1e-3, "momentum": 0.05}
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16, **norm),
            nn.Hardswish(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16, **norm),
            nn.Hardswish(),
            nn.Conv2d(16, 32, 1, bias=False),
            nn.BatchNorm2d(32, **norm),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Rows(nn.Module):
    """Rows of an image as tokens, through pre-norm attention with layer norms, or root mean squares."""

    def __init__(self, norm):
        super().__init__()
        self.embed, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm1, self.norm2, self.norm3 = norm(16), norm(16), norm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x[:, 0])
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))


class Critic(nn.Module):
    """Sees an image and a noisy twin in two calls of one network, as a discriminator sees real and made ones."""

    def __init__(self):
        super().__init__()
        self.net, self.head = convolutional(nn.BatchNorm2d)[:8], nn.Linear(16, 10)

    def forward(self, x):
        torch.manual_seed(0)
        real, made = self.net(x), self.net(x + 0.01 * torch.randn_like(x))
        return self.head((real + made) / 2)


class Style(nn.Module):
    """An image to an image through instance norms; its classes are read off the image."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.InstanceNorm2d(8, affine=True),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.InstanceNorm2d(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def frozen_backbone():
    """A pretrained network of which only the classifier is trained on, its norms frozen for good."""
    model = trained()
    model.requires_grad_(False)
    model.head = nn.Linear(32, 10)
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            models.replace(model, module, steadynorm.FrozenBatchNorm2d.from_batch_norm(module))
    return train(model)


class KeepsItsBackbone(nn.Module):
    """The same with plain torch: a train() that leaves the backbone in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = trained(), nn.Linear(32, 10)
        self.backbone.head = nn.Identity()
        self.backbone.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        return self.head(self.backbone(x))


def finetuned():
    """Trained on digits, then on digits with another contrast until the statistics have followed."""
    model = trained()

    def dimmed(split, batch_size, seed):
        return ((x * 0.5 + 0.2, y) for x, y in digits.batches(split, batch_size, seed))

    return train(model, steps=100, lr=0.02, batches=dimmed)


def dimmed(split):
    return [(x * 0.5 + 0.2, y) for x, y in digits.batches(split, 32, 0)]


def recalibrated():
    """Statistics lost on load, and taken anew."""
    model = reset_all(trained())
    training.recalibrate_(model, [x for x, _ in digits.batches("train", 64, 0)])
    return model


def adversarial_start():
    """Weights drawn as for a GAN, those of the norms around 1; it has not been trained, but was called once."""
    model = convolutional(nn.BatchNorm2d)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
    model.train()(torch.randn(8, 1, 8, 8))
    return model


def spectral(cast=lambda model: model):
    wrap = nn.utils.parametrizations.spectral_norm
    head = wrap(nn.Linear(64, 32)), nn.ReLU(), wrap(nn.Linear(32, 10))
    return cast(train(nn.Sequential(nn.Flatten(), *head)))


def spectral_in_half():
    return spectral(nn.Module.bfloat16)


def adapting_switch():
    """Statistics that follow the data in evaluation, because a switch says so."""
    model = train(convolutional(steadynorm.BatchNorm2d))
    for module in model.modules():
        if isinstance(module, steadynorm.BatchNorm2d):
            module.update_running = True
    return model


def halves(split):
    return [(x.bfloat16(), y) for x, y in digits.batches(split, 32, 0)]


def half_with_float_norms():
    model = trained().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def meta_learner():
    """Statistics of the last batch alone, by intent, with batches so large that they are those of the data."""
    model = train(convolutional(lambda c: nn.BatchNorm2d(c, momentum=1.0)))
    images, _ = digits.data()["train"]
    with torch.no_grad():
        model.train()(images)
    return model


class HandNorm(nn.Module):
    """A root mean square written by hand, in float32 or in whatever it is given."""

    def __init__(self, is_wide=True):
        super().__init__()
        self.is_wide = is_wide

    def forward(self, x):
        y = x.float() if self.is_wide else x
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).type_as(x)


def by_hand(is_wide=True):
    """Trained in float32 on pixels up to 600, and cast to float16."""
    model = nn.Sequential(nn.Flatten(), HandNorm(is_wide), nn.Linear(64, 10))
    return train(model, batches=lambda split, size, seed: bright(split, torch.float32)).half()


def bright(split, dtype=torch.float16):
    return [((600 * x).to(dtype), y) for x, y in digits.batches(split, 32, 0)]


BRIGHT = {"batches": lambda: bright("test"), "train_batches": lambda: bright("train")}


def projected(split, batch_size=32, seed=0):
    """Digits by 30 random projections, about normal, and what they are."""
    mix = torch.randn(64, 30, generator=torch.Generator().manual_seed(0)) / 4
    return [(x.flatten(1) @ mix, y) for x, y in digits.batches(split, batch_size, seed)]


def of_features():
    return nn.Sequential(
        nn.BatchNorm1d(30), nn.Linear(30, 24, bias=False), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 10)
    )


HALF = {"batches": lambda: halves("test"), "train_batches": lambda: halves("train")}

CONTROLS = [
    Case("norms before convolutions, concatenated", lambda: train(DenseBlock())),
    Case("depthwise convolutions", lambda: train(Separable(), steps=150)),
    Case("attention with layer norms", lambda: train(Rows(nn.LayerNorm))),
    Case("attention with root mean squares", lambda: train(Rows(nn.RMSNorm))),
    Case("attention, untrained", lambda: Rows(steadynorm.RMSNorm)),
    Case("critic of two calls", lambda: train(Critic())),
    Case("style, instance norms", lambda: train(Style())),
    Case("frozen backbone, FrozenBatchNorm", frozen_backbone),
    Case("frozen backbone, kept in evaluation mode", lambda: train(KeepsItsBackbone())),
    Case(
        "finetuned until the statistics followed",
        finetuned,
        batches=lambda: dimmed("test"),
        train_batches=lambda: dimmed("train"),
    ),
    Case("recalibrated after a load", recalibrated),
    Case("drawn as for a GAN, called once", adversarial_start),
    Case("drawn as for a GAN, no loss known", adversarial_start, loss=None),
    Case("spectral norms", spectral),
    Case("spectral norms in half precision", spectral_in_half, **HALF),
    Case("ghost batches", lambda: train(convolutional(lambda c: steadynorm.GhostBatchNorm2d(c, ghost_size=16)))),
    Case("batch renormalization", lambda: train(convolutional(steadynorm.BatchRenorm2d))),
    Case("statistics that adapt by a switch", adapting_switch),
    Case("half precision with float32 norms", half_with_float_norms, **HALF),
    Case("statistics of the last batch by intent", meta_learner),
    Case("norm by hand, in float32 inside float16", by_hand, **BRIGHT),
    Case(
        "features of no tails into a norm",
        lambda: train(of_features(), batches=projected),
        batches=lambda: projected("test"),
        train_batches=lambda: projected("train"),
    ),
    Case(
        "loaded without counters",
        trained,
        checkpoint=lambda model: {k: v for k, v in model.state_dict().items() if "num_batches" not in k},
    ),
    Case(
        "loaded from the checkpoint of a wrapper",
        trained,
        checkpoint=lambda model: {"model": {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}},
    ),
    Case("dense, everything frozen", lambda: train(mlp()).requires_grad_(False)),
]
