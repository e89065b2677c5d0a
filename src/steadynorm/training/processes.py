"""What the processes of a group know, told to one another."""

from typing import Any, TypeVar

import torch.distributed as dist

from steadynorm import ranks
from steadynorm.errors import DistributedError

T = TypeVar("T")


def gathered(value: T, group: Any, name: str) -> list[T]:
    """`value` of every process of the group, in the order of ranks: the same list on each.

    Args:
        group: None is all processes, or this one where torch.distributed is not initialised.
        name: what calls this, for errors.

    Raises:
        InputError: a group that is none, or that this process is not in.
        DistributedError: a process is gone, or did not come within the timeout of the group.
    """
    if group is None and not ranks.is_initialized():
        return [value]
    group = ranks.require_group(group, name)
    values: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(values, value, group)
    except RuntimeError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DistributedError(
            f"{name} waited for the other processes of its group, and one is gone or did not come within the timeout of"
            f" the group: look for the first error of another process (torch.distributed: {first})."
        ) from error
    return values
