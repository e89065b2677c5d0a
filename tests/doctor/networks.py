"""Networks with something wrong in them, and unusual ones with nothing wrong."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from steadynorm.recipes import digits


def convolutional(norm: Callable[[int], nn.Module], bias: bool = False, width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=bias),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=bias),
        norm(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


class Residual(nn.Module):
    """A stem, two residual blocks of which the second has a norm in its shortcut, and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block1 = digits.ResidualBlock(16, 16)
        self.block2 = digits.ResidualBlock(16, 32, stride=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class Centre(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class SoftmaxOverSamples(nn.Module):
    def forward(self, x):
        return x * x.flatten(1).mean(1).softmax(0)[:, None, None, None]


class MaxOfBatch(nn.Module):
    def forward(self, x):
        return x / x.amax()


class ReshapeForTranspose(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.reshape(c, n, h, w).transpose(0, 1)


class HardCoded(digits.ResidualBlock):
    """F.batch_norm(..., training=True) in the forward of a parent, whose children are all as they should be."""

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.batch_norm(self.conv2(y), None, None, self.bn2.weight, self.bn2.bias, training=True)
        return F.relu(y + self.shortcut(x))


class HiddenLeak(digits.ResidualBlock):
    """A leak in a branch whose last gamma starts at zero."""

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y - y.mean(0))) + self.shortcut(x))


class NeverEvaluates(nn.Module):
    """Keeps one norm in training mode whatever it is told."""

    def __init__(self):
        super().__init__()
        self.net = convolutional(nn.BatchNorm2d)

    def train(self, mode=True):
        super().train(mode)
        self.net[4].training = True
        return self

    def forward(self, x):
        return self.net(x)


class KeepsFrozen(NeverEvaluates):
    """The usual fine-tuning pattern: batch norms in evaluation mode, always."""

    def train(self, mode=True):
        super(NeverEvaluates, self).train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class FrozenBatchNorm(nn.Module):
    """As detection libraries have it: four buffers, no batch norm of torch's."""

    def __init__(self, width):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x):
        scale = (self.weight / (self.running_var + 1e-5).sqrt())[:, None, None]
        return x * scale + (self.bias - self.running_mean * scale[:, 0, 0])[:, None, None]


class SharedTwice(nn.Module):
    """A siamese pair: the two halves of an image through one encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = convolutional(nn.BatchNorm2d)[:8]
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(torch.cat([self.encoder(x[..., :4]), self.encoder(x[..., 4:])], 1))


class Sequences(nn.Module):
    """Rows of an image as a sequence, some of it padding, through a transformer with a mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, rows, padding):
        y = self.encoder(self.embed(rows).transpose(0, 1), src_key_padding_mask=padding).transpose(0, 1)
        valid = ~padding[..., None]
        return {"logits": self.head((y * valid).sum(1) / valid.sum(1))}


class Masked(nn.Module):
    """Sequences with padding through a masked batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 1, bias=False)
        self.bn = steadynorm.BatchNorm1d(16, activation="relu")
        self.head = nn.Linear(16, 10)

    def forward(self, rows, padding):
        y = self.bn(self.conv(rows.transpose(1, 2)), mask=~padding)
        return {"logits": self.head(y.sum(2) / (~padding).sum(1, keepdim=True))}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
