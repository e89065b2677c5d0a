import numpy as np
import pytest
import torch
from torch import nn

import steadynorm
from steadynorm.probe import spectral

WRAPS = {
    "new": nn.utils.parametrizations.spectral_norm,
    "old": nn.utils.spectral_norm,
}
LAYERS = [lambda: nn.Linear(7, 5), lambda: nn.Conv2d(3, 5, 2), lambda: nn.ConvTranspose2d(3, 5, 2)]


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
@pytest.mark.parametrize("layer", LAYERS)
def test_healthy_vectors_have_length_one(wrap, layer):
    (found,) = spectral.vectors(nn.Sequential(nn.ReLU(), wrap(layer())))
    assert found.path == "1"
    assert (found.u_norm, found.v_norm) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert found.is_fresh == (wrap is nn.utils.spectral_norm)
    assert found.norm_after == pytest.approx(1, abs=0.05) or found.is_fresh


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
@pytest.mark.parametrize("layer", LAYERS)
def test_the_norm_that_is_told_is_that_of_the_weight_evaluation_uses(wrap, layer):
    module = wrap(layer())
    for _ in range(300):  # the old one starts from random vectors
        _weight(module.train())
    module.eval()
    u = next(buffer for name, buffer in module.named_buffers() if name.endswith("_u"))
    with torch.no_grad():
        u.mul_(0.7)
    (found,) = spectral.vectors(module)
    weight = _weight(module).detach().double()
    rows = weight.movedim(1 if isinstance(module, nn.ConvTranspose2d) else 0, 0).flatten(1).numpy()
    assert found.norm_after == pytest.approx(np.linalg.svd(rows, compute_uv=False)[0], rel=1e-3)
    assert found.norm_after == pytest.approx(1 / 0.7, rel=1e-3)


@pytest.mark.parametrize("layer", [*LAYERS, lambda: nn.Linear(300, 200), lambda: nn.Linear(9, 1)])
def test_the_norm_that_is_told_of_vectors_that_point_elsewhere(layer):
    module = WRAPS["new"](layer()).eval()
    for buffer in module.buffers():
        buffer.copy_(nn.functional.normalize(torch.randn_like(buffer), dim=0))
    (found,) = spectral.vectors(module)
    weight = module.weight.detach().double()
    rows = weight.movedim(1 if isinstance(module, nn.ConvTranspose2d) else 0, 0).flatten(1).numpy()
    assert found.norm_after == pytest.approx(np.linalg.svd(rows, compute_uv=False)[0], rel=1e-2)
    assert not found.is_fresh


def test_the_older_of_torchs_is_new_until_it_has_run():
    module = nn.Sequential(WRAPS["old"](nn.Linear(64, 32)))
    (found,) = spectral.vectors(module)
    assert (found.is_fresh, found.norm_after > 2) == (True, True)
    module(torch.randn(2, 64))
    assert not spectral.vectors(module)[0].is_fresh


def test_a_weight_of_zeros_has_nothing_to_be_divided():
    module = WRAPS["new"](nn.Linear(3, 3))
    with torch.no_grad():
        module.parametrizations.weight.original.zero_()
    (found,) = spectral.vectors(module)
    assert found.norm_after == 1


def _weight(module):
    for hook in module._forward_pre_hooks.values():
        hook(module, None)
    return module.weight


@pytest.mark.parametrize("start", [0.0, float("nan"), 0.6])
def test_vectors_are_taken_anew_from_anything(start):
    torch.manual_seed(0)
    matrix = torch.randn(6, 4)
    u, v = torch.full((6,), start), torch.full((4,), start)
    spectral.iterate_(matrix, u, v, 200)
    left, values, right = np.linalg.svd(matrix.double().numpy())
    assert float(u @ matrix @ v) == pytest.approx(values[0], rel=1e-5)
    assert abs(left[:, 0] @ u.numpy()) == pytest.approx(1, abs=1e-5)
    assert abs(right[0] @ v.numpy()) == pytest.approx(1, abs=1e-5)


def test_a_weight_without_spectral_norm_has_no_vectors():
    assert (
        spectral.vectors(nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))) == ()
    )


def test_ours_is_left_out_since_lengths_do_it_no_harm():
    layer = steadynorm.spectral_norm(nn.Linear(7, 5)).eval()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight[0]._u.mul_(0.7)
    torch.testing.assert_close(layer.weight.detach(), before)
    assert spectral.vectors(layer) == ()
