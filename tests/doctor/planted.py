"""Faults of the state, of the settings and of half precision, planted in small networks trained on real digits."""

import copy
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from steadynorm.recipes import digits
from tests.doctor.cases import NORMS, Case, cumulative, of, reset_all, train, trained, with_change
from tests.doctor.controls import (
    BRIGHT,
    HALF,
    DenseBlock,
    by_hand,
    dimmed,
    halves,
    of_features,
    projected,
    spectral,
)
from tests.doctor.networks import convolutional

DIMMED = {"batches": lambda: dimmed("test"), "train_batches": lambda: dimmed("train")}


def toggled():
    """A backbone "frozen" as a well-known trainer does it, then trained on digits of another contrast."""
    model = trained()
    for path in NORMS:
        model.get_submodule(path).track_running_stats = False
    return train(model, lr=0.02, batches=lambda split, size, seed: dimmed(split))


def transferred(backbone, width):
    """The fine-tuning of tutorials: no gradients for what is pretrained, and a new classifier."""

    def make():
        model = backbone().requires_grad_(False)
        model.head = nn.Identity()
        return train(nn.Sequential(model, nn.Linear(width, 10)))

    return make


def toggle(bn):
    bn.track_running_stats = False


def by_batch_with_own_buffers(bn):
    class Hard(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)

    bn.__class__ = Hard


def coarse():
    """A whole network trained in bfloat16, with a slow average: an update is less than the next number is away."""
    return copy.deepcopy(_coarse())


@cache
def _coarse():
    model = convolutional(lambda c: nn.BatchNorm2d(c, momentum=0.003)).bfloat16()
    return train(model, steps=100, batches=lambda split, size, seed: halves(split))


def averaged_vectors():
    """Spectral norms averaged over the training, vectors and all."""
    model, start = spectral(), spectral(lambda model: _other(model))
    with torch.no_grad():
        for a, b in zip(model.buffers(), start.buffers(), strict=True):
            a.add_(b).div_(2)
    return model


def _other(model):
    """The same network with vectors from elsewhere."""
    model = copy.deepcopy(model)
    for buffer in model.buffers():
        buffer.copy_(F.normalize(torch.randn_like(buffer), dim=0))
    return model


def vectors_of_another_start():
    """Spectral norms of length 1, as they should be, of another network."""
    return spectral(lambda model: _other(model))


def one_value():
    """As many groups as channels, after the image is gone."""
    return train(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GroupNorm(8, 32), nn.ReLU(), nn.Linear(32, 16))
        .append(nn.GroupNorm(16, 16))
        .append(nn.Linear(16, 10))
    )


def raw_features():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).bfloat16()


def shifted(split):
    return [(100 + x.bfloat16(), y) for x, y in digits.batches(split, 32, 0)]


def uncounted(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    return model


def parameters(model):
    """A checkpoint of weights and biases alone."""
    return dict(model.named_parameters())


def without(*names):
    """A checkpoint without the buffers of these names."""
    return lambda model: {k: v for k, v in model.state_dict().items() if not k.endswith(names)}


def renamed(model):
    """A checkpoint from when the first norm of the second block had another name."""
    return {key.replace("block2.bn1.running", "block2.norm1.running"): v for key, v in model.state_dict().items()}


def weights_alone():
    """Trained on digits of another contrast and loaded, weights alone, over what was trained on the usual ones."""
    model = trained()
    tuned = train(trained(), lr=0.02, batches=lambda split, size, seed: dimmed(split))
    model.load_state_dict(parameters(tuned), strict=False)
    return model


def federated():
    """Parameters averaged over clients whose digits have other contrasts, with the statistics of the first client."""
    clients = [
        train(trained(), lr=0.02, batches=lambda split, size, seed, c=c: contrast(split, c)) for c in (0.4, 1.0, 2.5)
    ]
    with torch.no_grad():
        for parameters in zip(*(client.parameters() for client in clients), strict=True):
            parameters[0].copy_(torch.stack(parameters).mean(0))
    return clients[0]


def contrast(split, factor):
    return [(x * factor, y) for x, y in digits.batches(split, 32, 0)]


def of_all_clients(split):
    """Digits of all contrasts in every batch."""
    return [
        (x * torch.tensor((0.4, 1.0, 2.5))[torch.arange(len(x)) % 3][:, None, None, None], y)
        for x, y in digits.batches(split, 32, 0)
    ]


def heavy(split, batch_size=32, seed=0):
    """Features of which a few are thousands of times the others."""
    return [((4 * x).exp(), y) for x, y in projected(split, batch_size, seed)]


PLANTED = [
    Case(
        "heavy tails into a norm",
        lambda: train(of_features(), batches=heavy),
        of("SN102", "0"),
        batches=lambda: heavy("test"),
        train_batches=lambda: heavy("train"),
    ),
    Case(
        "checkpoint of parameters alone",
        lambda: reset_all(trained()),
        of("SN207", *NORMS),
        checkpoint=parameters,
    ),
    Case(
        "statistics of one layer under another name",
        with_change("block2.bn1", lambda bn: bn.reset_running_stats()),
        of("SN207", "block2.bn1"),
        checkpoint=renamed,
    ),
    Case(
        "federated average of parameters alone",
        federated,
        # In the later layers it changes little, once these are mended.
        of("SN203", "stem.1", "block1.bn1", "block1.bn2"),
        borderline=of("SN203", "block2.bn1"),
        batches=lambda: of_all_clients("test"),
        train_batches=lambda: of_all_clients("train"),
    ),
    Case(
        "weights loaded over another training",
        weights_alone,
        # All but one, whose statistics are much the same for both contrasts.
        of("SN207", *(path for path in NORMS if path != "block1.bn2")),
        checkpoint=parameters,
        **DIMMED,
    ),
    Case(
        "counter of a cumulative average lost",
        lambda: uncounted(cumulative(is_recalibrated=True)),
        of("SN207", "1", "4"),
        checkpoint=without("num_batches_tracked"),
    ),
    Case(
        "statistics that the model has no place for",
        lambda: train(convolutional(lambda c: nn.BatchNorm2d(c, track_running_stats=False))),
        of("SN207", "1", "4") | of("SN801", "1"),  # behind the first leak the second is not told
        checkpoint=lambda model: train(convolutional(nn.BatchNorm2d)).state_dict(),
    ),
    Case("one value per statistic", one_value, of("SN103", "5")),
    Case(
        "momentum of another library",
        lambda: train(convolutional(lambda c: nn.BatchNorm2d(c, momentum=0.99))),
        of("SN108", "1", "4"),
    ),
    Case(
        "momentum zero",
        lambda: train(convolutional(lambda c: nn.BatchNorm2d(c, momentum=0.0))),
        of("SN110", "1", "4") | of("SN203", "1", "4"),
    ),
    Case(
        "instance norm that tracks",
        lambda: train(convolutional(lambda c: nn.InstanceNorm2d(c, track_running_stats=True)), steps=200),
        of("SN114", "1", "4"),
    ),
    Case("tracking toggled", toggled, of("SN205", *NORMS), **DIMMED),
    Case("tracking toggled, statistics fit", with_change("stem.1", toggle), of("SN205", "stem.1")),
    Case("trained in bfloat16", coarse, of("SN206", "1", "4"), **HALF),
    Case("averaged spectral vectors", averaged_vectors, of("SN208", "1", "3")),
    Case("spectral vectors of another start", vectors_of_another_start, of("SN208", "1", "3")),
    Case(
        "own buffers, training=True",
        with_change("block1.bn1", by_batch_with_own_buffers),
        of("SN801", "block1.bn1") | of("SN301", "block1.bn1") | of("SN113", "block1.bn1"),
    ),
    Case(
        "frozen parameters, moving statistics", transferred(trained, 32), of("SN302", *(f"0.{path}" for path in NORMS))
    ),
    Case(
        "frozen block, norms first",
        transferred(lambda: train(DenseBlock()), 24),
        of("SN302", "0.norm1", "0.norm2", "0.norm3"),
    ),
    Case("norm by hand in float16", lambda: by_hand(is_wide=False), of("SN502", "1"), **BRIGHT),
    Case(
        "features far from zero",
        raw_features,
        of("SN501", "1"),
        batches=lambda: shifted("test"),
        train_batches=lambda: shifted("train"),
    ),
]
