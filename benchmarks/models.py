"""Models for benchmarks and tests, with a normalization of one's choice."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from steadynorm import BatchNorm2d


class TorchNorm(nn.Module):
    """What model code does: normalise, add in place, ReLU in place."""

    def __init__(self, channels: int, activation: str | None = "relu") -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(channels), activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y += residual
        return y.relu_() if self.activation else y


def our_norm(channels: int, activation: str | None = "relu") -> nn.Module:
    """The same in one call."""
    return BatchNorm2d(channels, activation=activation)


Norm = Callable[..., nn.Module]


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and the shortcut."""

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        after = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(before, width, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, after, 1, bias=False), norm(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after, None))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), residual=self.shortcut(x))


def resnet50(norm: Norm) -> nn.Module:
    """He et al. (2016), 25.6 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(blocks):
            stride = 2 if index == 0 and width > 64 else 1
            layers.append(Bottleneck(before, width, stride, norm))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class BasicBlock(nn.Module):
    """3x3, 3x3, and the shortcut."""

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width, None))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=self.shortcut(x))


def resnet18(norm: Norm, width: int = 64) -> nn.Module:
    """He et al. (2016), 11.7 million parameters; or with another width of the first stage."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width), nn.MaxPool2d(3, 2, 1)]
    for stage in range(4):
        before, after = width * 2 ** max(stage - 1, 0), width * 2**stage
        layers += [BasicBlock(before, after, 1 if stage == 0 else 2, norm), BasicBlock(after, after, 1, norm)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 1000))


class UNet(nn.Module):
    """Ronneberger et al. (2015) with batch norm, padding and 32 channels to begin with, 7.8 million parameters."""

    def __init__(self, norm: Norm, width: int = 32) -> None:
        super().__init__()
        widths = tuple(width * 2**level for level in range(5))
        self.down = nn.ModuleList(self._double(a, b, norm) for a, b in zip((1, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * b, b, 2, 2) for b in widths[-2::-1])
        self.join = nn.ModuleList(self._double(2 * b, b, norm) for b in widths[-2::-1])
        self.head = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def _double(before: int, after: int, norm: Norm) -> nn.Module:
        pairs = ((before, after), (after, after))
        return nn.Sequential(*(m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1, bias=False), norm(b))))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)
