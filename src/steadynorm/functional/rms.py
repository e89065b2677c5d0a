"""Root mean square normalization, in the conventions of the checkpoints that use it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm import grouping as grouping_
from steadynorm.errors import InputError
from steadynorm.functional import shapes
from steadynorm.functional.recall import recall, remember
from steadynorm.functional.sample import HALF, Settings, normalize_sample, under_autocast
from steadynorm.grouping import dense_like
from steadynorm.kernels.reference_sample import arithmetic_dtype

CONVENTIONS = ("torch", "llama", "gemma", "t5")
"""How a half type is rounded and where the weight counts from; see `rms_norm`."""


def normalize_rms(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    *,
    eps: float | None,
    addend: Tensor | None = None,
    convention: str = "torch",
) -> tuple[Tensor, Tensor]:
    """`rms_norm` over the last `dims` dimensions, without its checks: y and x + addend (x without one)."""
    given_eps = eps
    if eps is None:
        # That of the arithmetic, as torch takes it: of float32 for half types.
        eps = torch.finfo(arithmetic_dtype(x)).eps
    wide = _in_arithmetic(x, weight, convention)
    if addend is not None and wide is not x:
        # The sum is taken in the dtype of x, and only then widened.
        x, addend = x + addend, None
        wide = x.float()
    if torch.compiler.is_exporting() and convention == "torch" and (weight is None or weight.dtype == wide.dtype):
        x = x if addend is None else x + addend
        return F.rms_norm(x if wide.dtype == x.dtype else wide, x.shape[x.dim() - dims :], weight, eps), x
    late = _late_weight(x, weight, convention)
    dense, grouping = grouping_.layer(wide, dims)
    offset = 1.0 if convention == "gemma" and weight is not None else 0.0
    settings = Settings(grouping, eps, is_centred=False, weight_offset=offset)
    if addend is None and wide is x and not late:
        remember(("rms", x.shape[x.dim() - dims :], given_eps, convention), x, dense, weight, None, settings)
    y, total, *_ = normalize_sample(dense, None if late else weight, None, settings, addend=addend)
    if convention == "t5" and weight is not None and weight.dtype in HALF:
        y = y.to(weight.dtype)
    y = dense_like(y, x)
    return weight * y if late and weight is not None else y, x if addend is None else dense_like(total, x)


def _in_arithmetic(x: Tensor, weight: Tensor | None, convention: str) -> Tensor:
    """`x`, or `x` in float32 where that is what the convention gives out or casts from."""
    if convention == "torch":
        return under_autocast(x)
    is_cast_to_weight = convention == "t5" and weight is not None and weight.dtype != x.dtype
    return x.float() if is_cast_to_weight and x.dtype in HALF else x


def _late_weight(x: Tensor, weight: Tensor | None, convention: str) -> bool:
    """Whether the weight meets x̂ after a cast that rounds."""
    if weight is None or convention in ("torch", "gemma"):
        return False
    return x.dtype in HALF or weight.dtype in HALF


def rms_norm(
    x: Tensor,
    normalized_shape: int | tuple[int, ...] | list[int] | torch.Size,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    addend: Tensor | None = None,
    convention: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalization with the signature of `torch.nn.functional.rms_norm`, an addend, and a convention.

    x̂ = s / sqrt(mean(s²) + eps),  s = x + addend

    Conventions differ for half types, which are normalised in float32:

    "torch"   round(x̂ · weight)                    torch.nn.RMSNorm
    "llama"   round(x̂) · weight                    Llama, Mistral, Qwen; in the dtype that product has in PyTorch
    "gemma"   round(x̂ · (1 + weight))              Gemma
    "t5"      round(x̂) · weight, for a half weight; x̂ · weight in float32 for a float32 weight    T5

    Args:
        x: (*, *normalized_shape), floating point, any memory order.
        normalized_shape: the last dimensions of `x`.
        weight: of that shape, or None.
        eps: added to the mean square, in its unit; None is the machine epsilon of the arithmetic, as in torch.
        addend: of the shape of `x`: what a transformer adds before it normalises.
        convention: one of `CONVENTIONS`.

    Returns: y in the shape of `x`; with an addend (y, x + addend).

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization (2019), eq. 4.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if addend is None and (y := recall(("rms", shape, eps, convention), x, weight, None)) is not None:
        return y
    shapes.check_last(_who, x, shape, weight)
    shapes.check_eps(_who, eps)
    shapes.check_same_shape(_who, "addend", addend, x)
    check_convention(_who, convention)
    y, total = normalize_rms(x, len(shape), weight, eps=eps, addend=addend, convention=convention)
    return y if addend is None else (y, total)


def check_convention(who: shapes.Who, convention: str) -> None:
    """Raise InputError where there is no such convention."""
    if convention not in CONVENTIONS:
        raise InputError(f"{who()}: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}.")


def _who() -> str:
    return "rms_norm"
