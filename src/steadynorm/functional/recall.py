"""Calls that were made before: with sizes that were checked then, settings, and the plans of the kernels.

To check, group and plan a call again costs nothing beside a large tensor or a warm cache. Between the two, some
megabytes, Python has just been pushed out of the caches by the tensors, and a normalization waits for it.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from steadynorm.functional.sample import Settings, apply_known
from steadynorm.kernels import backends, numba_cpu, numba_known
from steadynorm.kernels.batch_plans import is_readable

KEPT = 1024
"""Calls that are kept; then all are forgotten."""
TYPES = (Tensor, nn.Parameter)

_calls: dict[Hashable, "Call"] = {}


class Call(NamedTuple):
    """What there is to know about a call besides its tensors."""

    settings: Settings
    known: numba_known.Known


def _key(kind: Hashable, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Hashable:
    return (
        kind,
        x.shape,
        x.stride(),
        x.dtype,
        None if weight is None else (weight.shape, weight.dtype, weight.requires_grad),
        None if bias is None else (bias.shape, bias.dtype, bias.requires_grad),
        torch.get_num_threads(),
    )


def _is_plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernels can take the tensors as they are, and nobody looks at the call but autograd."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in TYPES
        and x.is_cpu
        and (weight is None or (type(weight) in TYPES and weight.is_cpu and weight.is_contiguous()))
        and (bias is None or (type(bias) in TYPES and bias.is_cpu and bias.is_contiguous()))
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.compiler.is_exporting()
        and backends.forced() is None
    )


def recall(kind: Hashable, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """y, where a call of this kind was made before with tensors of these sizes, dtypes and memory order; else None.

    Args:
        kind: the function, and all its settings.
    """
    if not _is_plain(x, weight, bias):
        return None
    call = _calls.get(_key(kind, x, weight, bias))
    return None if call is None else apply_known(x, weight, bias, *call)


def remember(
    kind: Hashable, x: Tensor, dense: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Settings
) -> None:
    """Keep a call that was checked, if the kernels can take its tensors where they are.

    Args:
        dense: what the grouping of `settings` is of; `x` itself, if it is dense.
    """
    if not _is_plain(x, weight, bias) or dense.data_ptr() != x.data_ptr() or dense.stride() != x.stride():
        return
    key = _key(kind, x, weight, bias)
    if key in _calls:
        return
    parameters = [t for t in (weight, bias) if t is not None]
    if numba_cpu.why_not(x) or not all(is_readable(t) and t.dim() == 1 for t in parameters):
        return
    weight_bytes, bias_bytes = (0 if t is None else t.element_size() for t in (weight, bias))
    needs_affine = any(t.requires_grad for t in parameters)
    if len(_calls) >= KEPT:
        _calls.clear()
    known = numba_known.known(settings.grouping, x.dtype, settings[1:], weight_bytes, bias_bytes, needs_affine)
    _calls[key] = Call(settings, known)
