"""What micro-batches keep for the backward pass: somewhere else, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import steadynorm
from benchmarks.models import UNet, our_norm
from steadynorm.layers import BatchNorm1d, BatchNorm2d
from steadynorm.training import microbatch, microbatch_offload, microbatch_recompute
from tests.training.test_microbatch import results, worst


@pytest.fixture(autouse=True)
def quick():
    """The reference backend, where nothing is compiled."""
    with steadynorm.backend("reference"):
        yield


@pytest.fixture
def everything(monkeypatch):
    """No tensor is too small to be moved."""
    monkeypatch.setattr(microbatch_offload, "SMALLEST", 1)


def unet():
    torch.manual_seed(0)
    return UNet(our_norm, width=4).double()


class Outputs:
    """The storages that came out of convolutions and norms, as long as they are somewhere in memory."""

    def __init__(self, model):
        self.found = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d | BatchNorm2d):
                module.register_forward_hook(self._see)

    def _see(self, module, inputs, output):
        storage = output.untyped_storage()
        self.found.append((StorageWeakRef(storage), storage.nbytes()))

    def alive(self):
        return sum(size for reference, size in self.found if not reference.expired())


def test_what_is_in_memory_between_forward_and_backward(everything):
    alive = {}
    for memory in ("keep", "offload", "recompute"):
        model = unet()
        outputs = Outputs(model)
        y = microbatch(model, 2, memory=memory)(torch.randn(8, 1, 32, 32, dtype=torch.float64))
        alive[memory] = outputs.alive()
        del y
        assert outputs.alive() == 0, "the graph is gone, and what it needed is not"
    assert alive["offload"] == 0
    # A window, and the last convolution of each micro-batch, whose output has been joined.
    assert alive["recompute"] < 1.2 / microbatch_recompute.WINDOWS * alive["keep"]
    assert alive["keep"] > 0


def test_windows_are_filled_one_at_a_time_and_let_go():
    model = unet()
    outputs = Outputs(model)
    x = torch.randn(8, 1, 32, 32, dtype=torch.float64)
    y = microbatch(model, 2)(x)
    whole = outputs.alive()
    del y
    outputs.found.clear()
    y = microbatch(model, 2, memory="recompute")(x)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # The gradient of the weight is there when the last micro-batch has gone through.
            module.weight.register_hook(lambda dw: seen.append(outputs.alive()))
    y.sum().backward()
    assert len(seen) == 19
    assert max(seen) < 0.5 * whole
    assert outputs.alive() <= y.nbytes


def test_how_much_is_run_again():
    """One and a half forward passes: three of the four windows, each from the start."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), BatchNorm1d(8, activation="silu")) for _ in range(16)))
    calls = []
    for module in model:
        module[0].register_forward_hook(lambda *_: calls.append(1))
    y = microbatch(model, 2, memory="recompute")(torch.randn(6, 8))
    assert len(calls) == 3 * 16
    y.sum().backward()
    assert 3 * 16 * 2.3 < len(calls) < 3 * 16 * 2.75


def test_the_file_is_where_it_is_asked_for_and_gone_with_the_graph(tmp_path, monkeypatch, everything):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def opened():
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return [target for link in links if link.is_symlink() and str(tmp_path) in (target := os.readlink(link))]

    model = unet()
    y = microbatch(model, 2, memory="offload")(torch.randn(4, 1, 16, 16, dtype=torch.float64))
    assert len(opened()) == 1
    assert not os.listdir(tmp_path)
    y.sum().backward()
    del y
    assert not opened()


@pytest.mark.parametrize("layout", ["plain", "channels_last", "strange"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.bool])
def test_what_is_moved_comes_back_bit_for_bit(dtype, layout, everything):
    x = torch.randn(3, 4, 5, 6).to(dtype)
    x = {
        "plain": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "strange": x.permute(3, 1, 0, 2)[1:4, ::2],
    }[layout]
    memory = microbatch_offload.Offload([])
    for tensor in (x, x[1:], x[:, :1], x[0, 0, 0, :1], x.flatten()[0], x[:0], x.new_zeros(1).expand(50, 60)):
        again = microbatch_offload._unpack(memory._pack(tensor))
        assert again.dtype == tensor.dtype
        assert again.stride() == tensor.stride() or tensor.numel() < 2
        assert torch.equal(again, tensor)
    if layout == "strange":
        return  # a view with gaps, of something larger: it stays
    moved = memory._pack(x[1:])
    assert moved.block is memory._pack(x).block, "once for all views of one memory"
    x.zero_()
    assert moved.block is not memory._pack(x).block, "it has been changed since"


def test_a_disk_that_fails_says_so(monkeypatch, everything):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    model = unet()
    before = [b.clone() for b in model.buffers()]
    exact = microbatch(model, 2, memory="offload")
    with pytest.raises(OSError, match="No space left"):
        exact(torch.randn(4, 1, 16, 16, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("memory", ["offload", "recompute"])
def test_what_is_there_anyway_stays(memory, everything):
    """Parameters, buffers and the batch are neither moved nor computed."""
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4))
    x = torch.randn(6, 3)
    exact = microbatch(model, 2, memory=memory)
    seen = []

    def pack(tensor):
        seen.append(tensor)
        return tensor

    resident = {t.untyped_storage()._cdata for t in (x, *model.parameters())}
    store = exact._memory([None], [x])
    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    kept = [t for t in seen if t.untyped_storage()._cdata in resident]
    assert len(kept) > 1
    for tensor in kept:
        packed = store._pack(tensor) if memory == "offload" else store._pack(0, tensor)
        assert packed.data_ptr() == tensor.data_ptr()


def test_small_tensors_stay():
    memory = microbatch_offload.Offload([])
    small = torch.randn(10)
    assert memory._pack(small).data_ptr() == small.data_ptr()
    assert not isinstance(memory._pack(torch.randn(5000)), torch.Tensor)


@pytest.mark.parametrize("memory", ["keep", "offload", "recompute"])
def test_everything_that_autograd_saves(memory, everything):
    """In-place activations, views, indices, concatenations, and a norm whose output and residual are saved."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
            self.norm1, self.norm2, self.norm3 = (BatchNorm2d(8) for _ in range(3))
            self.norm2.activation, self.norm3.activation = "relu", "silu"
            self.pool, self.act = nn.MaxPool2d(2, return_indices=True), nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.act(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(x), residual=x)
            y = self.norm3(torch.cat([y[:, :4], x[:, 4:].tanh()], 1), residual=y.sin())
            y, indices = self.pool(y)
            return (y * indices).exp2().log1p().transpose(1, 2)

    torch.manual_seed(0)
    models = [Model().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, dy = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.randn(6, 4, 8, 4, dtype=torch.float64)
    found = results(models[0], microbatch(models[0], [1, 2, 3], memory=memory), x, dy)
    assert worst(found, results(models[1], models[1], x, dy)) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["keep", "offload", "recompute"])
def test_on_a_gpu(memory):
    models = [UNet(our_norm, width=8).double().cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 1, 64, 64, dtype=torch.float64, device="cuda")
    dy = torch.randn(8, 2, 64, 64, dtype=torch.float64, device="cuda")
    expected = results(models[1], models[1], x, dy)
    assert worst(results(models[0], microbatch(models[0], 2, memory=memory), x, dy), expected) < 1e-10
