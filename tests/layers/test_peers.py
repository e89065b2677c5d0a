"""The layers of Keras and Flax that mean the same: equal outputs, and running statistics where the conventions meet.

Neither is installed by `make`: `pip install keras flax`, then `pytest -m slow tests/layers/test_peers.py`. Both have
channels last, an eps of their own (1e-3 and 1e-6), a momentum that is the weight of the old statistics, and a running
variance without Bessel's correction.
"""

import os

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm as sn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EPS = 1e-3
N, C, H, W, GROUPS = 4, 6, 5, 3, 3


def _image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, C, H, W, generator=generator) * 2 + 3


def _layers() -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {
        "batch": sn.BatchNorm2d(C, eps=EPS),
        "frozen": sn.BatchNorm2d(C, eps=EPS).eval(),
        "group": sn.GroupNorm(GROUPS, C, eps=EPS),
        "instance": sn.InstanceNorm2d(C, eps=EPS, affine=True),
        "channels": sn.ChannelLayerNorm(C, eps=EPS),
        "rms": sn.RMSNorm(C, eps=EPS),
    }
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        layers["frozen"].running_mean.copy_(torch.randn(C, generator=generator))
        layers["frozen"].running_var.copy_(torch.rand(C, generator=generator) + 0.1)
    return layers


def _ours(kind: str, layer: nn.Module) -> np.ndarray:
    """The output with channels last."""
    x = _image()
    last = kind == "rms"
    y = layer(x.movedim(1, -1) if last else x)
    return (y if last else y.movedim(1, -1)).detach().numpy()


def _keras(kind: str, layer: nn.Module) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    makers = {
        "batch": lambda: layers.BatchNormalization(epsilon=EPS, momentum=0.9),
        "frozen": lambda: layers.BatchNormalization(epsilon=EPS),
        "group": lambda: layers.GroupNormalization(GROUPS, epsilon=EPS),
        "instance": lambda: layers.GroupNormalization(-1, epsilon=EPS),
        "channels": lambda: layers.LayerNormalization(epsilon=EPS),
        "rms": lambda: layers.RMSNormalization(epsilon=EPS),
    }
    theirs = makers[kind]()
    x = _image().movedim(1, -1).numpy()
    theirs.build(x.shape)
    for name, value in (
        ("gamma", layer.weight),
        ("scale", layer.weight),
        ("beta", getattr(layer, "bias", None)),
        ("moving_mean", getattr(layer, "running_mean", None)),
        ("moving_variance", getattr(layer, "running_var", None)),
    ):
        if value is not None and hasattr(getattr(theirs, name, None), "assign"):
            getattr(theirs, name).assign(value.detach().numpy())
    training = {"training": kind == "batch"} if kind in ("batch", "frozen") else {}
    y = keras.ops.convert_to_numpy(theirs(x, **training))
    state = {}
    if kind == "batch":
        state = {"mean": theirs.moving_mean, "var": theirs.moving_variance}
    return y, {name: keras.ops.convert_to_numpy(value) for name, value in state.items()}


def _flax(kind: str, layer: nn.Module) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    linen = pytest.importorskip("flax.linen")
    weight, bias = layer.weight.detach().numpy(), getattr(layer, "bias", None)
    params = {"scale": weight} if bias is None else {"scale": weight, "bias": bias.detach().numpy()}
    makers = {
        "batch": lambda: linen.BatchNorm(use_running_average=False, momentum=0.9, epsilon=EPS),
        "frozen": lambda: linen.BatchNorm(use_running_average=True, epsilon=EPS),
        "group": lambda: linen.GroupNorm(GROUPS, epsilon=EPS),
        "instance": lambda: linen.InstanceNorm(epsilon=EPS),
        "channels": lambda: linen.LayerNorm(epsilon=EPS),
        "rms": lambda: linen.RMSNorm(epsilon=EPS),
    }
    variables = {"params": params}
    if kind in ("batch", "frozen"):
        variables["batch_stats"] = {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}
    x = _image().movedim(1, -1).numpy()
    if kind != "batch":
        return np.asarray(makers[kind]().apply(variables, x)), {}
    y, moved = makers[kind]().apply(variables, x, mutable=["batch_stats"])
    return np.asarray(y), {name: np.asarray(value) for name, value in moved["batch_stats"].items()}


@pytest.mark.parametrize("peer", [_keras, _flax], ids=["keras", "flax"])
@pytest.mark.parametrize("kind", ["batch", "frozen", "group", "instance", "channels", "rms"])
def test_peers_agree(kind, peer):
    layer = _layers()[kind]
    theirs, state = peer(kind, layer)
    np.testing.assert_allclose(_ours(kind, layer), theirs, rtol=2e-5, atol=2e-5)
    if state:
        count = N * H * W
        biased = (layer.running_var - 0.9) * (count - 1) / count + 0.9  # the batch enters with 0.1, unbiased
        np.testing.assert_allclose(layer.running_mean, state["mean"], rtol=1e-5)
        np.testing.assert_allclose(biased, state["var"], rtol=1e-5)
