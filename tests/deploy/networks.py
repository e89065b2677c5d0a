"""Small networks with the structures that folding meets, and statistics that are not those of a fresh layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def trained(model, seed=0):
    """`model` in evaluation, with weights, biases and statistics that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not hasattr(module, "parametrizations"):
                module.weight.mul_(3)  # or what depends on the input would die away, and an error with it
            if getattr(module, "running_mean", None) is None:
                continue
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.3, 3.0, generator=generator)
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    tensor.uniform_(-1.5, 1.5, generator=generator)
    return model.eval()


class Residual(nn.Module):
    """3x3, 3x3, and a shortcut with a norm of its own."""

    def __init__(self, before, width, norm=nn.BatchNorm2d, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu_(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(norm=nn.BatchNorm2d):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(inplace=True)),
        *(Residual(8, 8, norm), Residual(8, 12, norm, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


class UNet(nn.Module):
    """Down, up by a transposed convolution, and the features of the way down beside those of the way up."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), norm(8), nn.ReLU())
        self.up, self.bn_up = nn.ConvTranspose2d(8, 4, 2, 2, groups=2), norm(4)
        self.join = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), norm(4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        deep = self.deep(F.max_pool2d(skip, 2))
        return {"mask": self.head(self.join(torch.cat([skip, self.bn_up(self.up(deep))], 1)))}


def mobilenet(norm=nn.BatchNorm2d):
    def separable(before, width):
        return (
            *(nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False), norm(before), nn.ReLU6()),
            *(nn.Conv2d(before, width, 1, bias=False), norm(width)),
        )

    return nn.Sequential(*separable(4, 8), *separable(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


class Dense(nn.Module):
    """Pre-activation: every layer normalises all there is so far, and adds to it."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(norm(4 + 3 * i) for i in range(3))
        self.mids = nn.ModuleList(nn.Conv2d(4 + 3 * i, 6, 1, bias=False) for i in range(3))
        self.inner = nn.ModuleList(norm(6) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6, 3, 3, padding=1, bias=False) for _ in range(3))
        self.last, self.head = norm(13), nn.Conv2d(13, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        for norm, mid, inner, conv in zip(self.norms, self.mids, self.inner, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(inner(mid(F.relu(norm(x))))))], 1)
        return self.head(self.last(x))


class Choosing(nn.Module):
    """Control flow that depends on the data: no tracer follows it."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn_left, self.bn_both = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        positive = x.mean() > 0
        y = F.relu(self.bn(self.stem(x)))
        y = self.bn_left(self.left(y)) if positive else self.right(y)
        for _ in range(int(positive) + 1):
            y = self.bn_both(y)
        return y
