"""A launch of a kernel, and a short way to repeat it.

Triton looks at every argument of every launch, to find the compiled kernel that goes with them: that is 15 of the 22 µs
of a small forward pass on the host, and the device waits. What it found is kept here by what it depends on: 12 µs.
"""

from typing import Any

import torch
from torch import Tensor

from steadynorm.errors import InputError

# Bytes: what is aligned so is compiled with the widest loads, what is not without.
ALIGNED, UNALIGNED = 16, "unaligned"
# Launches that are remembered; sizes that change with every batch would fill the memory.
REMEMBERED = 4096

_found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def start(kernel: Any, x: Tensor, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch `programs` of a kernel on the device of `x`.

    Args:
        arguments: tensors, numbers and None, in the order of the kernel's parameters.
        options: the kernel's constants, which are its last parameters, and num_warps.

    Raises:
        InputError: a tensor is not on the device of `x`.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            _start(kernel, x, programs, arguments, options)
    else:
        _start(kernel, x, programs, arguments, options)


def _start(kernel: Any, x: Tensor, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    kinds: list[Any] = []
    device = x.device
    for value in arguments:
        if isinstance(value, Tensor):
            if value.device != device:
                raise InputError(f"a tensor is on {value.device}, expected all on {device}, where x is: move it there.")
            kinds.append((value.dtype, UNALIGNED) if value.data_ptr() % ALIGNED else value.dtype)
        else:
            kinds.append(float if isinstance(value, float) else value)
    # A kernel lives as long as its module; its own hash is slow.
    key = (id(kernel), device, programs, *kinds, *options.values())
    found = _found.get(key)
    if found is not None:
        run, constants = found
        run(*arguments, *constants)
        return
    compiled = _launch(kernel, programs, arguments, options)
    if compiled is None:  # the interpreter has none
        return
    if len(_found) >= REMEMBERED:
        _found.clear()
    constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
    _found[key] = compiled[(programs, 1, 1)], constants


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    # Products are added without a rounding between: said, since Triton's default is about to change.
    return kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)
