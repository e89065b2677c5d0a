"""Frozen batch norms of other libraries: modules of their own, known by what they hold and compute."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TENSORS = {"weight", "bias", "running_mean", "running_var"}
# Rounding of the same formula in another order, float32.
RTOL, ATOL = 1e-4, 1e-5


def is_frozen_batch_norm(layer: nn.Module) -> bool:
    """Whether a module is what torchvision and detectron2 call FrozenBatchNorm2d.

    By name, by four buffers (C,) and an eps, and by what it computes: some of that name have an eps of their own, in
    the code (Hugging Face), and what they compute with the one they show would be another result.
    """
    buffers = dict(layer.named_buffers())
    is_alike = (
        type(layer).__name__ == "FrozenBatchNorm2d"
        and buffers.keys() == TENSORS
        and isinstance(getattr(layer, "eps", None), float)
        and not [*layer.parameters(), *layer.children()]
        and len({tensor.shape for tensor in buffers.values()}) == 1
        and not any(tensor.is_meta for tensor in buffers.values())
    )
    return is_alike and _computes_alike(layer, buffers)


def _computes_alike(layer: nn.Module, buffers: dict[str, Tensor]) -> bool:
    mean, var, weight, bias = (buffers[name] for name in ("running_mean", "running_var", "weight", "bias"))
    x = torch.linspace(-2, 3, 12 * len(mean), dtype=mean.dtype, device=mean.device).view(2, -1, 2, 3)
    with torch.no_grad():
        expected = F.batch_norm(x, mean, var, weight, bias, False, 0.0, float(layer.eps))  # type: ignore[arg-type]
        try:
            y = type(layer).forward(layer, x)
        except Exception:  # somebody else's code: whatever it does, it is not what we know
            return False
    return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, RTOL, ATOL)
