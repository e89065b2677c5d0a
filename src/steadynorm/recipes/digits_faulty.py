"""The network of `digits` with three normalization faults, each of which runs without a word from PyTorch.

1. The stem's batch norm has ``momentum=0.0003``, as torchvision's MNASNet has for trainings of many thousand steps:
   after a short one its running statistics still are the zeros and ones they began with, and evaluation uses them.
2. ``block1.conv1`` has a bias that the batch norm after it takes out again: parameters that never learn.
3. ``block2.bn2`` computes the statistics of the batch in evaluation too: what the network says of one image depends on
   the images that happen to be next to it.

It trains as well as its healthy twin, to 97 % of the digits, and in evaluation recognises 50 to 90 %, by the seed.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.recipes.digits import ResidualNet, batches, loss, metrics, optimizer

__all__ = ["batches", "loss", "metrics", "model", "optimizer"]


class AlwaysBatchStatistics(nn.Module):
    """A hand-written batch norm that forgot about evaluation."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized by the statistics of this batch."""
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class FaultyNet(ResidualNet):
    """The residual network with the three faults in."""

    def __init__(self) -> None:
        super().__init__()
        width = self.head.in_features // 2
        self.stem[1] = nn.BatchNorm2d(width, momentum=0.0003)
        self.block1.conv1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=True)
        self.block2.register_module("bn2", AlwaysBatchStatistics(2 * width))


def model() -> nn.Module:
    """A fresh network, faults and all."""
    return FaultyNet()
