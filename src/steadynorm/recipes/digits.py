"""A small residual network on scikit-learn's handwritten digits: 1,797 grey images of 8 by 8, ten classes.

The images come with scikit-learn, so nothing is downloaded. A fixed, stratified fifth of them is the test split; the
same images for every seed. The seed shuffles the training batches, whose ragged last one is left out.

Its normalization is plain ``torch.nn.BatchNorm2d``, not steadynorm's: that is what the models in the world have, so
what the doctor finds and what the lab compares here is what they would find there.
"""

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16
TEST_FRACTION = 0.2
SPLIT_SEED = 0


class ResidualBlock(nn.Module):
    """Two 3 by 3 convolutions with batch norm, added to the input; a 1 by 1 one where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to features (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A stem and two residual blocks, each of which halves the image, and a linear classifier.

    As in the large residual networks the last features have hardly any extent, here a single pixel: a statistic of the
    last block is taken over as many values as the batch has images.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block1 = ResidualBlock(width, 2 * width, stride=2)
        self.block2 = ResidualBlock(2 * width, 2 * width, stride=2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to class scores (N, 10)."""
        return self.head(self.block2(self.block1(self.stem(x))).mean((2, 3)))


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """The images (N, 1, 8, 8), from 0 to 1, and their labels (N,), by split."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=TEST_FRACTION, stratify=labels, random_state=SPLIT_SEED)
    train_images, test_images = (
        torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for part in parts[:2]
    )
    train_labels, test_labels = (torch.tensor(part) for part in parts[2:])
    return {"train": (train_images, train_labels), "test": (test_images, test_labels)}


def model() -> nn.Module:
    """A fresh network."""
    return ResidualNet()


def batches(split: str, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled training batches, all of `batch_size`, or the test images in their order."""
    images, labels = data()[split]
    if split == "test":
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield images[chosen], labels[chosen]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(output, batch[1])


def metrics(output: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The fraction of digits that are recognised."""
    return {"accuracy": (output.argmax(1) == batch[1]).float().mean().item()}


def optimizer(parameters: Iterable[nn.Parameter], lr: float = 0.1) -> torch.optim.Optimizer:
    """SGD with momentum; the learning rate is for batch size 32."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
