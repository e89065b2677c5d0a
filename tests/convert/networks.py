"""Networks of several kinds for the digits, with batch norms in all of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from steadynorm.recipe import seeded
from steadynorm.recipes import digits


class Residual(nn.Module):
    """A stem and residual blocks of one width."""

    def __init__(self, blocks: int = 2, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*[digits.ResidualBlock(width, width) for _ in range(blocks)])
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def step(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


class UNet(nn.Module):
    """Down twice, up twice, with the features of the same size handed over; a score for every digit at every pixel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one, self.two = step(1, width), step(width, 2 * width)
        self.bottom = nn.Sequential(step(2 * width, 4 * width), step(4 * width, 4 * width))
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.four, self.five = step(4 * width, 2 * width), step(2 * width, width)
        self.head = nn.Conv2d(width, 10, 1)

    def forward(self, x):
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        bottom = self.bottom(F.max_pool2d(two, 2))
        four = self.four(torch.cat([self.up[0](bottom), two], 1))
        five = self.five(torch.cat([self.up[1](four), one], 1))
        return self.head(five).mean((2, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class HuggingFace(nn.Module):
    """A ResNet of transformers, from its configuration."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
        )
        self.net = ResNetForImageClassification(config)

    def forward(self, x):
        return self.net(F.interpolate(x, scale_factor=4)).logits


NETWORKS = {
    "the recipe `digits`": digits.model,
    "two residual blocks": Residual,
    "four residual blocks": lambda: Residual(4),
    "U-Net": UNet,
    "perceptron": perceptron,
    "ResNet of transformers": HuggingFace,
}


def trained(make, epochs: int, seed: int = 0, model: nn.Module | None = None, lr: float = 0.05) -> nn.Module:
    """The network after some epochs; or `model` after some more."""
    with seeded(seed):
        model = make() if model is None else model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
        for epoch in range(epochs):
            for batch in digits.batches("train", 32, seed + epoch):
                optimizer.zero_grad()
                digits.loss(model(batch[0]), batch).backward()
                optimizer.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    (batch,) = digits.batches("test", 360, 0)
    with torch.no_grad():
        return digits.metrics(model.eval()(batch[0]), batch)["accuracy"]
