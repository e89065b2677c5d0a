"""Networks as people have them leave PyTorch and come back: the same numbers, or a reason."""

from __future__ import annotations

import pytest
import torch

from steadynorm import deploy
from steadynorm.errors import InputError
from steadynorm.recipe import load
from steadynorm.recipes import SHIPPED
from tests.deploy.architectures import ARCHITECTURES, made
from tests.deploy.networks import trained

# What torch.export has to say of them, whatever is done here.
REFUSED = {
    "RT-DETR, frozen norms": "Its code fixes a size",
    "D-FINE, frozen norms": "Its code fixes a size",
    "FlexibleUNet": "fake tensor",
    "control flow by the data": "data-dependent",
}
# And torch.onnx, whose decomposition of attention views a tensor as one that its strides do not allow.
REFUSED_AS_ONNX = REFUSED | dict.fromkeys(
    ("Wav2Vec2-Conformer", "Parakeet (Fast Conformer)", "SeamlessM4T, speech"), "torch.onnx cannot write the model"
)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_agrees_or_says_why_not(tmp_path, name, suffix):
    # Settled: a deep network of random weights multiplies roundings, SE-ResNet's own up to a thousandth.
    model, batches = made(name)
    path = tmp_path / f"net{suffix}"
    refused = REFUSED_AS_ONNX if suffix == ".onnx" else REFUSED
    if name in refused:
        with pytest.raises(InputError, match=refused[name]):
            deploy.export(model, batches, path)
        assert not list(tmp_path.iterdir())
        return
    exported = deploy.export(model, batches, path, batch_sizes=(1, 2, 3, 8))
    assert all(output.is_within(None) for output in exported.outputs)
    assert exported.invariance.holds
    assert deploy.verify(model, deploy.load(path), batches).agrees


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_agrees_in_onnxruntime_or_says_why_not(tmp_path, name):
    recipe = load(name)
    model = recipe.model().eval()
    batches = list(recipe.batches("test", 32, 0))[:4]
    if name == "digits_faulty":
        with pytest.raises(InputError, match=r"block2\.bn2 normalizes by the statistics of the batch"):
            deploy.export(model, batches, tmp_path / "net.onnx")
        assert not list(tmp_path.iterdir())
        return
    exported = deploy.export(trained(model), batches, tmp_path / "net.onnx")
    assert exported.outputs[0].relative < 1e-5
    with torch.no_grad():
        images = batches[0][0]
        found = deploy.load(exported.path)(images)[""]
        exact = model.double()(images.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
