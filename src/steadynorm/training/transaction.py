"""transaction: running statistics go back where the step that moved them is not taken."""

from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy

from steadynorm import models
from steadynorm.errors import InputError

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _Saved(NamedTuple):
    """The buffers of one dtype on one device, and their values in one tensor."""

    places: list[tuple[nn.Module, str]]
    values: Tensor


class Transaction:
    """What `transaction` gives: a block that can be entered again and again, once for each step."""

    def __init__(self, model: nn.Module, scaler: GradScaler | None) -> None:
        self._model = model
        self._scaler = scaler
        self._saved: list[_Saved] | None = None
        self._scale: Tensor | float | None = None
        self._rejected: list[bool | Tensor] = []

    def reject(self, when: bool | Tensor = True) -> None:
        """Let the statistics go back at the end of the block.

        Args:
            when: whether to; a tensor of bools, any of which rejects, is not looked at but stays on its device:
                ``t.reject(~loss.isfinite())``.

        Raises:
            InputError: outside of the block.
        """
        if self._saved is None:
            raise InputError("reject() is for the inside of a transaction: with transaction(model) as t: t.reject().")
        self._rejected.append(when.detach().any() if isinstance(when, Tensor) else bool(when))

    def __enter__(self) -> Self:
        if self._saved is not None:
            raise InputError("this transaction is open already: one transaction(model) for each block inside another.")
        self._rejected = []
        self._scale = _scale(self._scaler)
        self._saved = _save(_places(self._model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        saved, self._saved = self._saved, None
        assert saved is not None
        flags = [flag for flag in self._rejected if isinstance(flag, Tensor)]
        if kind is not None or any(flag for flag in self._rejected if not isinstance(flag, Tensor)):
            _put_back(saved)
            return
        if self._scaler is not None:
            flags += _overflows(self._scaler, self._scale)
        if flags:
            _put_back_where(saved, flags)


def transaction(model: nn.Module, scaler: GradScaler | None = None) -> Transaction:
    """A block around one optimizer step: where the step is not taken, the running statistics do not move either.

        with transaction(model, scaler) as t:
            loss = criterion(model(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    They go back, bit for bit and with the count of batches, when `scaler` found gradients that are not finite and
    skipped the step, after ``t.reject()``, and when the block raises. Nothing waits for the device: what the scaler
    found stays there, and the statistics are chosen there. Several forward passes in one block, as in gradient
    accumulation, go back together.

    Args:
        model: any of its layers with a running mean and variance counts, torch.nn's and ours.
        scaler: a GradScaler whose `step` is inside the block; its `update` may be inside or after it. With several
            optimizers, a skipped step of any of them counts. Without a scaler: `reject` and exceptions.

    Raises:
        InputError: no layer has running statistics, or they have no values yet.
    """
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise InputError(f"transaction got a {type(scaler).__name__} as scaler, expected a torch.amp.GradScaler.")
    _places(model)
    return Transaction(model, scaler if scaler is not None and scaler.is_enabled() else None)


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the running statistics of a model are."""
    tracking = {path: module for path, module in model.named_modules() if models.has_running_statistics(module)}
    if not tracking:
        raise InputError("transaction got a model without running statistics, of which nothing could go back.")
    for path, module in tracking.items():
        if is_lazy(module.running_mean):
            raise InputError(
                f"transaction: {path or 'the model'}, a {type(module).__name__}, has no running statistics yet: run one"
                " batch through the model first."
            )
    return [
        (module, name)
        for module in tracking.values()
        for name in BUFFERS
        if isinstance(module._buffers.get(name), Tensor)
    ]


def _save(places: list[tuple[nn.Module, str]]) -> list[_Saved]:
    # Layers are many and their statistics small: one copy for all of a kind, instead of three for each layer.
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[nn.Module, str]]] = {}
    for module, name in places:
        buffer = _data((module, name))
        groups.setdefault((buffer.dtype, buffer.device), []).append((module, name))
    return [_Saved(group, torch.cat([_data(place).reshape(-1) for place in group])) for group in groups.values()]


def _data(place: tuple[nn.Module, str]) -> Tensor:
    # Apart from autograd's count of changes: a backward pass may still want the statistics that normalised.
    module, name = place
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer.data


def _put_back(saved: list[_Saved]) -> None:
    for group in saved:
        _write(group, group.values)


def _put_back_where(saved: list[_Saved], flags: list[Tensor]) -> None:
    """Put the values back if any of `flags` is true, without looking at them: true or not, the same is done."""
    flags = [_moved(flag, flags[0].device) for flag in flags]
    rejected = torch.stack(flags).any()
    for group in saved:
        now = torch.cat([_data(place).reshape(-1) for place in group.places])
        _write(group, torch.where(_moved(rejected, now.device), group.values, now))


def _write(group: _Saved, values: Tensor) -> None:
    buffers = [_data(place) for place in group.places]
    parts = values.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])


def _moved(flag: Tensor, device: torch.device) -> Tensor:
    # A copy to the CPU that is not waited for could be read before it is there.
    return flag.to(device, non_blocking=device.type != "cpu")


def _scale(scaler: GradScaler | None) -> Tensor | float | None:
    """What a scaler multiplies by, as it is now."""
    if scaler is None:
        return None
    scale = scaler._get_scale_async()
    # Until it has scaled something, it has no tensor yet.
    return scaler._init_scale if scale is None else scale.clone()


def _overflows(scaler: GradScaler, before: Tensor | float | None) -> list[Tensor]:
    """Whether a step was skipped, as scalar tensors on their devices.

    Before `update`, the scaler knows what each optimizer's gradients held. After it that is forgotten, and the scale is
    smaller than before: nothing else makes it so.
    """
    states = scaler._per_optimizer_states.values()
    flags = [found.reshape(()) > 0 for state in states for found in state["found_inf_per_device"].values()]
    scale = scaler._get_scale_async()
    if scale is not None and before is not None:
        flags.append(scale.reshape(()) < before)
    return flags
