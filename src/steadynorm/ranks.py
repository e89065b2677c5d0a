"""Processes that compute one batch together: their Moments merged, their sums added, over torch.distributed.

`Ranks` is what `functional.normalize_together` calls a Reduction. Any backend will do: gloo on CPU, NCCL on GPU. In a
compiled graph the collectives are PyTorch's functional ones, which the compiler knows and keeps in order.
"""

import os
import re
import socket
from collections import deque
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from steadynorm.errors import DistributedError, InputError
from steadynorm.moments import Moments, merge_rows, on_device

REMEMBERED_CALLS = 32
"""Calls of a layer whose merged Moments are kept for a recomputation, the newest: 1 kB each at 32 channels."""

SAME_BATCH = 1e-3
"""How far from its first Moments a recomputed batch may be, in its deviation. Kernels that add up in another order each
time stay below 1e-5, batches of a thousand values are 3e-2 apart. Source: 1 / sqrt(n) for the latter."""

LIBRARY = torch.library.Library("steadynorm", "FRAGMENT")
# It takes what was sent too: a compiler that saw it unused would give its memory away before it has gone out.
LIBRARY.define("arrived(Tensor result, Tensor sent, str name) -> Tensor")


class Ranks:
    """The processes of a group, as a Reduction.

    Args:
        group: a process group that this process is in; None is all processes.
        name: what an error calls the layer.

    Raises:
        InputError: torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = None, name: str = "a layer") -> None:
        self.group = require_group(group, name)
        self.name = name
        self.size: int = self.group.size()
        self.group_name: str = self.group.group_name
        self.may_run_again = False
        self._calls = _Calls()

    def merge(self, local: Moments) -> Moments:
        """The Moments of all ranks, from those of each: the same on every rank, to the bit. No part of autograd.

        One collective: count, mean and var travel in one float64 buffer of 2·C + 1 numbers. It is gathered and not
        added up, since Chan's merge is no sum: a variance that is put together from Σx and Σx² loses everything to a
        large mean. Waits for nothing on the host; a count of 0 and counts from masks are numbers like others.

        In a backward pass the forward pass runs again only where activations are recomputed, and the other ranks may
        not be in it: the result of the first time is taken, and nothing is sent.

        Args:
            local: mean, var (C,), count an int, () or (C,).

        Raises:
            DistributedError: a rank is gone, or did not come within the timeout of the group; or, in a recomputation,
                the batch is another than the first time.
        """
        channels = local.mean.shape[0]
        count = local.count if isinstance(local.count, Tensor) else on_device(local.count, local.mean)
        sent = torch.cat([local.mean.double(), local.var.double(), count.reshape(-1).double()])
        is_eager = not torch.compiler.is_compiling()
        found = self._calls.find(sent, channels, self.name) if is_eager and _is_in_backward() else None
        if found is None:
            rows = self._gather(sent).view(self.size, -1)
            mean, var, counts = rows[:, :channels], rows[:, channels : 2 * channels], rows[:, 2 * channels :]
            merged = merge_rows(Moments(mean, var, counts))
            found = Moments(merged.mean, merged.var, on_device(merged.count, merged.mean).reshape(count.shape))
            if is_eager and self.may_run_again and not _is_in_backward():
                self._calls.remember(sent, found)
        return found

    def add(self, local: Tensor) -> Tensor:
        """The sum over all ranks, in one all-reduce; its own adjoint, so differentiable to any order.

        Raises:
            DistributedError: a rank is gone, or did not come within the timeout of the group.
        """
        if not torch.compiler.is_compiling():
            return _AddEagerly.apply(local, self)
        return _Add.apply(local, self) if torch.is_grad_enabled() and local.requires_grad else self._sum(local)

    def _gather(self, sent: Tensor) -> Tensor:
        """What every rank has sent (n,), one after the other (ranks · n,)."""
        start = torch.ops._c10d_functional.all_gather_into_tensor
        return self._collect(start, sent, self.size, self.group_name)

    def _sum(self, local: Tensor) -> Tensor:
        return self._collect(torch.ops._c10d_functional.all_reduce, local, "sum", self.group_name)

    def _collect(self, start: Any, sent: Tensor, *rest: Any) -> Tensor:
        """The result of a collective that is waited for."""
        sent = sent.contiguous()
        if torch.compiler.is_compiling():
            return torch.ops.steadynorm.arrived(start(sent, *rest), sent, self.name)
        try:
            return torch.ops._c10d_functional.wait_tensor(start(sent, *rest))
        except RuntimeError as error:
            raise DistributedError(_about_missing(self.name, error)) from error


class _Add(Function):
    """`Ranks.add` for autograd. Every rank has a cotangent of the same sum, and all of them add up."""

    @staticmethod
    def forward(local: Tensor, ranks: Ranks) -> Tensor:
        return ranks._sum(local)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Ranks], output: Tensor) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.add(cotangent), None


class _AddEagerly(_Add):
    """With forward-mode derivatives too, which the compiler does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return ctx.ranks.add(tangent)


class _Calls:
    """Merged Moments of calls that a backward pass may ask for again, by the local ones that they came from."""

    def __init__(self) -> None:
        self._kept: deque[_Call] = deque(maxlen=REMEMBERED_CALLS)

    def remember(self, sent: Tensor, merged: Moments) -> None:
        # A backward pass may come to a call more than once (nested checkpoints, a graph that is retained), but not
        # after the next forward pass.
        self._kept = deque((call for call in self._kept if not call.is_used), REMEMBERED_CALLS)
        self._kept.append(_Call(sent, merged))

    def find(self, sent: Tensor, channels: int, name: str) -> Moments | None:
        """The merged Moments of the call that had these local ones; None where no call is remembered.

        Waits for the device. Equal bits come first, the newest call not yet used first among them; else the nearest,
        for kernels that round in another way each time.
        """
        if not self._kept:
            return None
        newest_first = list(reversed(self._kept))
        candidates = sorted(newest_first, key=lambda call: call.is_used)
        for call in candidates:
            if torch.equal(call.sent.view(torch.int64), sent.view(torch.int64)):
                break
        else:
            distances = torch.stack([_distance(sent, call.sent, channels) for call in candidates]).tolist()
            nearest = min(range(len(distances)), key=lambda i: distances[i])
            if not distances[nearest] <= SAME_BATCH:
                raise DistributedError(_about_other_batch(name, distances[nearest]))
            call = candidates[nearest]
        call.is_used = True
        return call.merged


class _Call:
    def __init__(self, sent: Tensor, merged: Moments) -> None:
        self.sent, self.merged, self.is_used = sent, merged, False


def _distance(a: Tensor, b: Tensor, channels: int) -> Tensor:
    """How far the Moments in two buffers are apart: in deviations, the worst channel; inf where counts differ."""
    if not channels:
        return a.new_zeros(())
    mean, var = (a - b).abs()[:channels], (a - b).abs()[channels : 2 * channels]
    largest = torch.maximum(a.abs(), b.abs())
    # A channel that hardly varies is as exact as its mean: 1e-6 of it, in float32, are SAME_BATCH of this deviation.
    scale = torch.maximum(largest[channels : 2 * channels], (SAME_BATCH * largest[:channels]).square())
    scale = scale.clamp(min=torch.finfo(a.dtype).tiny)
    apart = torch.maximum(mean / scale.sqrt(), var / scale).max()
    is_same = (a[2 * channels :] == b[2 * channels :]).all() & ~torch.isnan(apart)
    return torch.where(is_same, apart, torch.inf)


def _is_in_backward() -> bool:
    """Whether this thread executes an autograd graph, as every recomputation of activations does."""
    return torch._C._current_graph_task_id() != -1


def may_run_again() -> bool:
    """Whether the forward pass may be of a checkpoint: those record nothing, or save tensors through hooks."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _arrived(result: Tensor, sent: Tensor, name: str) -> Tensor:
    try:
        return torch.ops._c10d_functional.wait_tensor(result).clone()
    except RuntimeError as error:
        raise DistributedError(_about_missing(name, error)) from error


LIBRARY.impl("arrived", _arrived, "CompositeExplicitAutograd")
torch.library.register_fake("steadynorm::arrived", lambda result, sent, name: torch.empty_like(result))


def _about_missing(name: str, error: RuntimeError) -> str:
    # "[file:line] What happened. What it may be due to.": the middle.
    reason = re.sub(r"^\[[^\]]*\] ", "", str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
    phase = "backward" if _is_in_backward() else "forward"
    return (
        f"{name} waited for the other ranks of its group in its {phase} pass, and a rank is gone or did not come within"
        " the timeout of the group: look for the first error of another rank; all have to call this layer equally"
        f" often, with an empty batch too (torch.distributed: {reason})."
    )


def _about_other_batch(name: str, distance: float) -> str:
    return (
        f"{name} was run again in a backward pass with a batch that none of its last {REMEMBERED_CALLS} calls had (the"
        f" nearest is {distance:.2g} deviations away, {SAME_BATCH:g} is allowed); other ranks do not wait there, so it"
        " cannot be joined to theirs: make the checkpointed function give the same output when it is run again."
    )


def is_initialized() -> bool:
    """Whether there are processes to be joined."""
    return dist.is_available() and dist.is_initialized()


def require_group(group: Any, name: str) -> Any:
    """The process group that is meant by `group`, None being that of all processes.

    Raises:
        InputError: torch.distributed is not initialised, `group` is none, or this process is not in it.
    """
    if not is_initialized():
        given = "no process group" if group is None else "a process group"
        raise InputError(
            f"{name} got {given}, and torch.distributed is not initialised: call torch.distributed.init_process_group"
            " first (torchrun sets what it needs)."
        )
    if group is None:
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError(f"{name} got a process group that rank {dist.get_rank()} is not in: give each rank its own.")
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(f"{name}: process_group must be a torch.distributed.ProcessGroup or None, got {group!r}.")
    return group


def sync_group(ranks: int | Literal["node"], timeout: timedelta | None = None) -> Any:
    """The process group of this rank, when all are split into groups that synchronise among themselves.

    Every rank has to call it, as it makes all the groups.

    Args:
        ranks: k for groups of k consecutive ranks, or "node" for those that run on one machine.
        timeout: how long a collective of the group waits; None is torch's default for the backend.

    Returns: the torch.distributed.ProcessGroup, for `process_group=`.

    Raises:
        InputError: torch.distributed is not initialised, or the ranks cannot be split like that.
    """
    require_group(None, "sync_group")
    world = dist.get_world_size()
    if ranks == "node":
        members = _by_node(world)
    elif isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1 or world % ranks:
        divisors = ", ".join(str(k) for k in range(1, world + 1) if world % k == 0)
        raise InputError(f'sync_group got {ranks!r}, expected "node" or, for {world} ranks, one of {divisors}.')
    else:
        members = [list(range(first, first + ranks)) for first in range(0, world, ranks)]
    groups = [dist.new_group(group, timeout=timeout) for group in members]
    return next(group for group, listed in zip(groups, members, strict=True) if dist.get_rank() in listed)


def _by_node(world: int) -> list[list[int]]:
    """The ranks of every machine: torchrun says which it is, and else the host name does."""
    nodes: list[Any] = [None] * world
    dist.all_gather_object(nodes, os.environ.get("GROUP_RANK", socket.gethostname()))
    return [[rank for rank in range(world) if nodes[rank] == node] for node in dict.fromkeys(nodes)]
