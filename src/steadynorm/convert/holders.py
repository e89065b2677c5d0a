"""Who holds the parameters of a model besides it: its optimizer, and DistributedDataParallel."""

from collections.abc import Callable, Collection

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from steadynorm.errors import InputError


def remembered(optimizer: Optimizer) -> Callable[[], None]:
    """A function that puts the groups and the state of `optimizer` back as they are now."""
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state = dict(optimizer.state)

    def restore() -> None:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"][:] = parameters
        optimizer.state.clear()
        optimizer.state.update(state)

    return restore


def ensure_of(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise InputError where `optimizer` has no parameter of `model`."""
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"convert_ got optimizer= of {type(optimizer).__name__}, expected a torch.optim.Optimizer.")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise InputError("convert_ got an optimizer= that holds no parameter of the model.")


def take_out_(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> set[int]:
    """Take `parameters` out of `optimizer`, with their state.

    A group that is empty then stays, so that schedulers find theirs.

    Returns: the ids of those that were in it.
    """
    gone = {id(parameter) for parameter in parameters}
    found = set[int]()
    for group in optimizer.param_groups:
        found |= {id(parameter) for parameter in group["params"]} & gone
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    forget_(optimizer, parameters)
    return found


def forget_(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> set[int]:
    """Drop the state (momentum, averages) of `parameters`, which begins anew with the next step.

    Returns: the ids of those that had one.
    """
    return {id(parameter) for parameter in parameters if optimizer.state.pop(parameter, None)}


def ensure_unwrapped(model: nn.Module, paths: list[str], what: str) -> None:
    """Raise InputError where a wrapper reduces or broadcasts tensors of the layers at `paths`, which lose some."""
    is_wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    is_sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if paths and (is_wrapped or is_sharded):
        wrapper = "DistributedDataParallel" if is_wrapped else "FSDP"
        raise InputError(
            f"{what} takes parameters or buffers of {paths[0] or 'the model'} out of a model inside {wrapper}, which"
            " would go on waiting for them: convert before it is wrapped."
        )
