"""Frozen batch norms of other libraries: modules of their own, known by what they hold and compute."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

TENSORS = {"weight", "bias", "running_mean", "running_var"}
# Rounding of the same formula in another order, float64.
TOLERANCE = 1e-9
# Digits that the answer of a layer gives of its eps: some compute in float32 whatever they hold.
DIGITS = 6
FLOAT32_TOLERANCE = 1e-4
SHAPE = (2, 3)
SEED = 0


def frozen_eps(layer: nn.Module) -> float | str:
    """The eps of a frozen batch norm of another library, taken from what it computes; or why it is none.

    torchvision and detectron2 show theirs, Hugging Face have it in the code. With weight 1, variance 0 and mean 0 the
    answer to 1 is 1 / sqrt(eps). Then it has to compute what a frozen batch norm with this eps does, for statistics of
    its own and for random ones, in both modes, without changing them.
    """
    buffers = dict(layer.named_buffers())
    if buffers.keys() != TENSORS or [*layer.parameters(), *layer.children()]:
        return f"does not hold {', '.join(sorted(TENSORS))} as buffers and nothing else"
    if len({tensor.shape for tensor in buffers.values()}) != 1 or any(t.is_meta for t in buffers.values()):
        return "does not hold one value of each for every channel"
    try:
        return _measured(layer)
    except Exception as error:  # somebody else's code: whatever it does, it is not what we know
        return f"fails on a probe ({type(error).__name__})"


def _measured(layer: nn.Module) -> float | str:
    probe, forward = copy.deepcopy(layer).double(), type(layer).forward
    probe._forward_hooks.clear()
    probe._forward_pre_hooks.clear()
    own = {name: tensor.clone() for name, tensor in probe.named_buffers()}
    channels = len(own["weight"])
    with torch.no_grad():
        _fill(probe, {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 0.0})
        answer = forward(probe, torch.ones(1, channels, 1, 1, dtype=torch.float64, device=own["weight"].device))
        eps = float(f"{float(answer.flatten()[0]) ** -2:.{DIGITS - 1}e}")
        for statistics in (own, _random(own)):
            for mode in (True, False):
                _fill(probe.train(mode), statistics)
                x = _random_input(own["weight"])
                y = forward(probe, x.clone())
                if not _is_alike(y, _frozen(x, statistics, eps)):
                    return "does not compute what a frozen batch norm does"
                if any(not torch.equal(buffer, statistics[name]) for name, buffer in probe.named_buffers()):
                    return "changes its statistics"
    return eps


def _fill(probe: nn.Module, values: Any) -> None:
    for name, buffer in probe.named_buffers():
        value = values[name]
        buffer.fill_(value) if isinstance(value, float) else buffer.copy_(value)


def _random(own: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {
        name: (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5).to(tensor.device)
        for name, tensor in own.items()
    }


def _random_input(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + 1)
    n, *rest = SHAPE
    return torch.randn(n, len(like), *rest, n, generator=generator, dtype=torch.float64).to(like.device)


def _frozen(x: Tensor, statistics: dict[str, Tensor], eps: float) -> Tensor:
    mean, var, weight, bias = (
        statistics[name].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + eps).sqrt() * weight + bias


def _is_alike(y: Any, expected: Tensor) -> bool:
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    tolerance = TOLERANCE if y.dtype == torch.float64 else FLOAT32_TOLERANCE
    return torch.allclose(y.double(), expected, tolerance, tolerance)
