"""What comes back from saved-tensor hooks, and parameters that are not what x needs."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from steadynorm import functional, kernels
from steadynorm.errors import InputError


def together(x, residual):
    parts = [functional.Part(x[part], residual[part]) for part in (slice(0, 1), slice(1, 4))]
    return torch.cat(functional.normalize_together(parts, activation="silu")[0])


CALLS = {
    "batch": lambda x, r: functional.normalize_batch(x, residual=r, activation="relu")[0],
    "batch, silu": lambda x, r: functional.normalize_batch(x, residual=r, activation="silu")[0],
    "slices": lambda x, r: functional.normalize_slices(x, (2, 2), residual=r, activation="relu")[0],
    "together": lambda x, r: together(x, r),
    "group": lambda x, r: functional.group_norm(x, 4, residual=r, activation="silu"),
    "group, a known call": lambda x, r: functional.group_norm(x, 4),
}


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_hooks_may_give_back_another_memory_order(name, backend):
    """As offloading to pinned memory does."""
    x, residual = (torch.randn(4, 8, 9, 7).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    call = CALLS[name]
    with kernels.backend(backend):
        call(x, residual)
        expected = call(x, residual)
        dy = torch.randn(expected.shape)
        wanted = torch.autograd.grad(expected, (x, residual), dy, allow_unused=True)
        with saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
            found = torch.autograd.grad(call(x, residual), (x, residual), dy, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("width", [1, 7, 9])
def test_a_weight_of_another_length(width):
    x = torch.randn(4, 8, 3)
    for call in (
        functional.normalize_batch,
        lambda x, *affine: functional.normalize_slices(x, (2, 2), *affine),
        lambda x, *affine: functional.normalize_together([functional.Part(x)], *affine),
    ):
        with pytest.raises(InputError, match=rf"weight got shape \({width},\), expected \(8,\)"):
            call(x, torch.ones(width))
        with pytest.raises(InputError, match=rf"bias got shape \({width},\), expected \(8,\)"):
            call(x, torch.ones(8), torch.ones(width))


@pytest.mark.parametrize("samples", [4, 4000])
def test_a_weight_on_another_device(samples):
    x, weight = torch.randn(samples, 8, 3), torch.ones(8, device="meta")
    for call in (
        lambda: functional.normalize_batch(x, weight),
        lambda: functional.normalize_running(x, weight, torch.ones(8)),
        lambda: functional.normalize_running(x, torch.ones(8), weight),
        lambda: functional.normalize_slices(x, (samples // 2,) * 2, weight),
        lambda: functional.group_norm(x, 4, weight),
        lambda: functional.layer_norm(x.movedim(1, -1), 8, weight),
        lambda: functional.rms_norm(x.movedim(1, -1), 8, weight),
    ):
        with pytest.raises(InputError, match="is on meta, expected it on the cpu"):
            call()
