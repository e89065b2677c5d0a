"""The kernels as torch ops, so that `torch.compile` and `torch.export` keep each as one node.

`torch.ops.steadynorm.*` picks a backend for every call; fake tensors get the shapes only. The ops know nothing of
autograd: functional differentiates around them, and outside of tracing calls a backend without them.
"""

import torch
from torch import Tensor

from steadynorm import kernels
from steadynorm.grouping import Grouping
from steadynorm.kernels.reference import statistics_dtype
from steadynorm.moments import Moments

# define + impl: the boundary costs 1.4 µs a call; torch.library.custom_op costs 6.7 µs.
LIBRARY = torch.library.Library("steadynorm", "DEF")
VIEW = "Tensor x, SymInt outer, SymInt group, SymInt inner"
AFFINE = "Tensor? weight, Tensor? bias"
STATISTICS = "Tensor mean, Tensor var"

LIBRARY.define(f"moments({VIEW}, Tensor? mask) -> (Tensor mean, Tensor var)")
LIBRARY.define(
    f"normalize({VIEW}, {STATISTICS}, {AFFINE}, Tensor? residual, Tensor? mask, float eps, str? activation) -> Tensor"
)
LIBRARY.define(
    f"forward({VIEW}, {AFFINE}, Tensor? residual, Tensor? mask, float eps, str? activation)"
    " -> (Tensor y, Tensor mean, Tensor var)"
)
LIBRARY.define(
    f"backward_sums(Tensor dy, {VIEW}, {STATISTICS}, {AFFINE}, Tensor? residual, Tensor? y, Tensor? mask, float eps,"
    " str? activation) -> (Tensor g, Tensor dweight, Tensor dbias)"
)
LIBRARY.define(
    f"backward_input(Tensor g, {VIEW}, {STATISTICS}, Tensor? weight, Tensor dweight, Tensor dbias, Tensor? count,"
    " Tensor? mask, float eps) -> Tensor"
)
LIBRARY.define(
    f"backward(Tensor dy, {VIEW}, {STATISTICS}, {AFFINE}, Tensor? residual, Tensor? y, Tensor? mask, float eps,"
    " str? activation, bool is_given, bool needs_dresidual, bool needs_affine)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor g)"
)
LIBRARY.define(
    "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked,"
    f" {STATISTICS}, Tensor? count, SymInt plain_count, float? momentum, bool guard) -> ()"
)


def is_traced(x: Tensor) -> bool:
    """Whether a call must be seen as an op: by a compiler, a dispatch mode, or the tensor's own class."""
    return (
        torch.compiler.is_compiling()
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def moments(x: Tensor, outer: int, group: int, inner: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and var of every group."""
    return kernels.choose(x, masked=mask is not None).moments(x, Grouping(outer, group, inner), mask)


def normalize(
    x: Tensor,
    outer: int,
    group: int,
    inner: int,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """y for given statistics."""
    backend = kernels.choose(x, masked=mask is not None)
    grouping = Grouping(outer, group, inner)
    return backend.normalize(x, grouping, mean, var, weight, bias, residual, mask, eps, activation)


def forward(
    x: Tensor,
    outer: int,
    group: int,
    inner: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var."""
    backend = kernels.choose(x, masked=mask is not None)
    return backend.forward(x, Grouping(outer, group, inner), weight, bias, residual, mask, eps, activation)


def backward_sums(
    dy: Tensor,
    x: Tensor,
    outer: int,
    group: int,
    inner: int,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """g, dweight and dbias."""
    backend = kernels.choose(x, masked=mask is not None)
    grouping = Grouping(outer, group, inner)
    return backend.backward_sums(dy, x, grouping, mean, var, weight, bias, residual, y, mask, eps, activation)


def backward_input(
    g: Tensor,
    x: Tensor,
    outer: int,
    group: int,
    inner: int,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    count: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    """dx."""
    backend = kernels.choose(x, masked=mask is not None)
    grouping = Grouping(outer, group, inner)
    return backend.backward_input(g, x, grouping, mean, var, weight, dweight, dbias, count, mask, eps)


def backward(
    dy: Tensor,
    x: Tensor,
    outer: int,
    group: int,
    inner: int,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    is_given: bool,
    needs_dresidual: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and g; sums in the dtypes of weight and bias, and g empty where it was not asked for."""
    backend = kernels.choose(x, masked=mask is not None)
    dx, dweight, dbias, g = backend.backward(
        dy,
        x,
        Grouping(outer, group, inner),
        mean,
        var,
        weight,
        bias,
        residual,
        y,
        mask,
        eps,
        activation,
        is_given,
        needs_dresidual,
        needs_affine,
    )
    return dx, dweight, dbias, x.new_empty(0) if g is None else g


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    plain_count: int,
    momentum: float | None,
    guard: bool,
) -> None:
    """`move_` as an op: the parts of the Moments one by one."""
    batch = Moments(mean, var, plain_count if count is None else count)
    move_(running_mean, running_var, batch, momentum, num_batches_tracked, guard)


def move_(
    running_mean: Tensor,
    running_var: Tensor,
    batch: Moments,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    guard: bool,
) -> None:
    """Move running statistics towards a batch, unless a backward pass is computing it again."""
    # Recomputation under activation checkpointing runs inside the backward pass, and its batch was counted already.
    if torch._C._current_graph_task_id() != -1:
        return
    backend = kernels.choose(batch.mean)
    backend.ema_(running_mean, running_var, batch, momentum, num_batches_tracked=num_batches_tracked, guard=guard)


def _statistics_like(x: Tensor, group: int) -> Tensor:
    return x.new_empty(group, dtype=statistics_dtype(x))


def gradient_like(x: Tensor, parameter: Tensor | None, count: int) -> Tensor:
    """What stands for the gradient of a weight or bias in a trace."""
    return x.new_empty(count, dtype=statistics_dtype(x) if parameter is None else parameter.dtype)


for _name, _implementation in {
    "moments": moments,
    "normalize": normalize,
    "forward": forward,
    "backward_sums": backward_sums,
    "backward_input": backward_input,
    "backward": backward,
    "update_running_": update_running_,
}.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")

torch.library.register_fake(
    "steadynorm::moments", lambda x, outer, group, inner, mask: (_statistics_like(x, group), _statistics_like(x, group))
)
torch.library.register_fake("steadynorm::normalize", lambda x, *rest: torch.empty_like(x))
torch.library.register_fake(
    "steadynorm::forward",
    lambda x, outer, group, *rest: (torch.empty_like(x), _statistics_like(x, group), _statistics_like(x, group)),
)
torch.library.register_fake(
    "steadynorm::backward_sums",
    lambda dy, x, outer, group, *rest: (torch.empty_like(x), _statistics_like(x, group), _statistics_like(x, group)),
)
torch.library.register_fake("steadynorm::backward_input", lambda g, x, *rest: torch.empty_like(x))
torch.library.register_fake(
    "steadynorm::backward",
    lambda dy, x, outer, group, inner, mean, var, weight, bias, *rest: (
        torch.empty_like(x),
        gradient_like(x, weight, group),
        gradient_like(x, bias, group),
        torch.empty_like(x) if rest[-2] else x.new_empty(0),
    ),
)
torch.library.register_fake("steadynorm::update_running_", lambda *rest: None)
