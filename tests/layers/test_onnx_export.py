"""What leaves PyTorch by torch.onnx gives in onnxruntime what the layer gives here."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

import steadynorm as sn

LAYERS = {
    "batch": (lambda: sn.BatchNorm2d(8), (3, 8, 5, 4)),
    "batch, relu": (lambda: sn.BatchNorm2d(8, activation="relu"), (3, 8, 5, 4)),
    "batch, rows": (lambda: sn.BatchNorm1d(8), (5, 8)),
    "frozen": (lambda: sn.FrozenBatchNorm2d(8), (3, 8, 5, 4)),
    "ghost": (lambda: sn.GhostBatchNorm2d(8, ghost_size=2), (3, 8, 5, 4)),
    "renorm": (lambda: sn.BatchRenorm2d(8), (3, 8, 5, 4)),
    "layer": (lambda: sn.LayerNorm(16), (3, 7, 16)),
    "channels": (lambda: sn.ChannelLayerNorm(8), (3, 8, 5, 4)),
    "rms": (lambda: sn.RMSNorm(16), (3, 7, 16)),
    "rms, gemma": (lambda: sn.RMSNorm(16, convention="gemma"), (3, 7, 16)),
    "group": (lambda: sn.GroupNorm(4, 8), (3, 8, 5, 4)),
    "group, silu": (lambda: sn.GroupNorm(4, 8, activation="silu"), (3, 8, 5, 4)),
    "instance": (lambda: sn.InstanceNorm2d(8, affine=True), (3, 8, 5, 4)),
    "instance, tracking": (lambda: sn.InstanceNorm2d(8, track_running_stats=True), (3, 8, 5, 4)),
}


RARE = tuple(name for name in LAYERS if name not in ("batch, relu", "layer", "group, silu"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in RARE)) for n in LAYERS])
def test_onnxruntime_gives_what_the_layer_gives(name):
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    layer.eval()
    x = torch.randn(shape) * 2 + 1
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x).detach(), rtol=1e-5, atol=1e-5)
