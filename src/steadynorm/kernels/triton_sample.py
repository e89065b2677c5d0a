"""Statistics within a sample on CUDA devices, in Triton (kernels/gpu/): `reference_sample` says what is computed.

Rows that registers hold are read once, by one launch forward and one backward; what is larger is read twice, by one
launch where a program sees a whole statistic. One more puts the sums for weight and bias together.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import triton_gpu
from steadynorm.kernels.gpu.start import start

if TYPE_CHECKING:
    from steadynorm.kernels.gpu.sample_launch import Launch

# Parts of sums that one program of a merge takes in one step, and channels, a line of the cache; more parts than the
# first are merged in two launches, since a single program would be long alone with them.
MERGED_PARTS = 128
MERGED_CHANNELS = 32
MERGED_AT_ONCE = 2048
MERGED_WARPS = 8


def why_not(x: Tensor | None = None, grouping: SampleGrouping | None = None, *, masked: bool = False) -> str:
    """Why this backend cannot run here, or cannot take `x`; empty where it can."""
    return triton_gpu.why_not(x, masked=masked)


def _plan(x: Tensor, grouping: SampleGrouping, sums: int = -1) -> "tuple[Launch, ...]":
    from steadynorm.kernels.gpu.sample_launch import plan

    index = x.device.index if x.is_cuda else None
    return plan(grouping, x.element_size(), triton_gpu._multiprocessors(index), sums)


def _run(kernel: Any, x: Tensor, made: "Launch", *arguments: Any, **constants: Any) -> None:
    start(kernel, x, made.programs, *arguments, **constants, TILE=made.tile, num_warps=made.warps)


def _doubles(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=x.device)


def _spans(grouping: SampleGrouping, made: "Launch") -> tuple[int, ...]:
    """What the kernels of gpu/samples.py take last."""
    return *grouping.sizes[1:], made.chunks, made.splits, made.units


def sample_forward(
    x: Tensor,
    addend: Tensor | None,
    grouping: SampleGrouping,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference_sample.sample_forward`."""
    from steadynorm.kernels.gpu import rows, samples

    (made,) = _plan(x, grouping)
    y, flat = torch.empty_like(x), triton_gpu._bytes(mask)
    total = None if addend is None else torch.empty_like(x)
    mean, var = _doubles(x, grouping.statistics), _doubles(x, grouping.statistics)
    weight, bias = triton_gpu.dense(weight, bias)
    affine = {"EPS": eps, "ACTIVATION": activation, "OFFSET": weight_offset}
    tensors = (x, addend, residual, flat, y, total, mean, var, weight, bias)
    if made.kind == "rows":
        sizes = (grouping.samples, grouping.groups, grouping.channels * grouping.inner, grouping.inner)
        _run(rows.forward, x, made, *tensors, *sizes, IS_CENTRED=is_centred, **affine)
    elif made.splits == 1:
        _run(samples.forward, x, made, *tensors, *_spans(grouping, made), IS_CENTRED=is_centred, **affine)
    else:
        left = (_doubles(x, 3, made.splits, grouping.statistics), grouping.statistics, *_spans(grouping, made))
        _run(samples.moments, x, made, x, addend, flat, total, *left, IS_CENTRED=is_centred)
        source = (x if total is None else total, residual, flat, y, mean, var, weight, bias)
        _run(samples.normalize, x, made, *source, *left, PARTS=_above(made.splits), **affine)
    return y, x if total is None else total, mean, var


def _above(number: int) -> int:
    from steadynorm.kernels.gpu.launch import above

    return above(number)


def sample_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    grouping: SampleGrouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
    needs_dresidual: bool = False,
    needs_affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `reference_sample.sample_backward`; dweight and dbias come in the dtypes of weight and bias."""
    wanted = needs_affine and weight is not None, needs_affine and bias is not None
    *before, made = _plan(total, grouping, sum(wanted))
    flat, dx = triton_gpu._bytes(mask), torch.empty_like(total)
    dresidual = torch.empty_like(total) if needs_dresidual else None
    width = grouping.groups * grouping.channels
    # Rounded where they are written: two casts afterwards would be two launches more.
    sums = [triton_gpu.gradient_of(t, total, width if needs_affine else 0) for t in (weight, bias)]
    parts: Sequence[Tensor] = sums  # one part is the sum itself
    if made.parts > 1:
        kept = torch.float64 if total.dtype == torch.float64 else torch.float32
        parts = torch.empty(2, made.parts, width, dtype=kept, device=total.device).unbind()
    dweights, dbiases = (part if is_wanted else None for part, is_wanted in zip(parts, wanted, strict=True))
    settings = {"EPS": eps, "ACTIVATION": activation, "IS_CENTRED": is_centred, "OFFSET": weight_offset}
    affine = triton_gpu.dense(mean, var, weight, bias)
    of_channels = (None, None) if before else (dweights, dbiases)
    left = _sums(before, made, (dy, total, residual, y, flat, *affine, *of_channels), grouping, settings)
    tensors = (dy, dtotal, total, residual, y, flat, dresidual, dx, *affine, dweights, dbiases)
    _finish(made, tensors, left, grouping, settings)
    if made.parts > 1 and any(wanted):
        _merge(total, dweights, dbiases, sums, made.parts)
    return dx, sums[0], sums[1], dresidual


def _sums(
    before: "list[Launch]",
    made: "Launch",
    tensors: tuple[Tensor | None, ...],
    grouping: SampleGrouping,
    settings: dict[str, Any],
) -> Tensor | None:
    """Parts of the sums of h·x̂ and h, where they have a launch of their own; it may leave those of channels as well."""
    from steadynorm.kernels.gpu import samples

    if not before and (made.kind != "samples" or made.splits == 1):
        return None
    (made,) = before or (made,)
    x, statistics = tensors[0], grouping.statistics
    assert x is not None
    left = _doubles(x, 3, made.splits, statistics)
    _run(samples.sums, x, made, *tensors, left, statistics, *_spans(grouping, made), **settings)
    return left


def _finish(
    made: "Launch",
    tensors: tuple[Tensor | None, ...],
    left: Tensor | None,
    grouping: SampleGrouping,
    settings: dict[str, Any],
) -> None:
    """The launch that writes dx and the parts of the sums of channels."""
    from steadynorm.kernels.gpu import columns, rows, samples

    x = tensors[0]
    assert x is not None
    sizes, statistics = (grouping.samples, grouping.groups, grouping.channels), grouping.statistics
    if made.kind == "rows":
        _run(rows.backward, x, made, *tensors, *sizes, made.chunks, made.splits, **settings)
    elif made.kind == "columns":
        splits = 0 if left is None else left.shape[1]
        rest = (left, statistics, splits, *sizes, made.chunks, made.splits)
        chunk = (1, made.step, *made.tile[2:])
        _run(columns.backward, x, made, *tensors, *rest, PARTS=splits and _above(splits), CHUNK=chunk, **settings)
    elif left is None:
        _run(samples.backward, x, made, *tensors, *_spans(grouping, made), **settings)
    else:
        spans = (left, statistics, *_spans(grouping, made))
        _run(samples.input_gradient, x, made, *tensors, *spans, PARTS=_above(made.splits), **settings)


def _merge(x: Tensor, dweights: Tensor | None, dbiases: Tensor | None, sums: Sequence[Tensor], parts: int) -> None:
    """Put the parts of sums of channels together, (parts, channels) of each."""
    from steadynorm.kernels.gpu.columns import merge

    width = sums[0].numel()
    blocks = -(-width // MERGED_CHANNELS)
    constants = {"PARTS": MERGED_PARTS, "CHANNELS": MERGED_CHANNELS, "num_warps": MERGED_WARPS}
    if parts > MERGED_AT_ONCE:
        splits = -(-parts // MERGED_AT_ONCE * 4)
        between = _doubles(x, 2, splits, width)
        start(merge, x, blocks * splits, dweights, dbiases, *between, parts, width, splits, **constants)
        dweights, dbiases = (None if t is None else b for t, b in zip((dweights, dbiases), between, strict=True))
        parts = splits
    start(merge, x, blocks, dweights, dbiases, *sums, parts, width, 1, **constants)
