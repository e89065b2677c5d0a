"""What reaches the device when a launch is repeated, found out without one: `python -m tests.kernels.triton_started`.

Triton compiles for sm_90 and launches as it would there; where its driver is called, what it is called with is kept.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from steadynorm import grouping as grouping_
from steadynorm.kernels import triton_gpu
from steadynorm.kernels.gpu import start
from steadynorm.moments import Moments

launched: list[list[Any]] = []


class Launcher:
    """Keeps the grid and the arguments of each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *call: Any) -> None:
        grid, arguments = call[:3], call[9:]
        launched.append([*grid, *(f"tensor {a.data_ptr()}" if isinstance(a, Tensor) else str(a) for a in arguments)])


class Utilities:
    """Of a device that takes every kernel."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """As much of a driver as a launch asks for."""

    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    """Print the launches of calls that are made with and without what is remembered of the first."""
    driver.set_active(Driver())
    x, grouping = grouping_.batch(torch.randn(32, 64, 8, 8))
    half, _ = grouping_.batch(torch.randn(32, 64, 8, 8).bfloat16())
    unaligned = torch.randn(32 * 64 * 64 + 1)[1:].view(32, 64, 8, 8)
    other, smaller = grouping_.batch(torch.randn(16, 64, 8, 8))
    weight, bias, mean, var = torch.rand(64), torch.rand(64), torch.rand(64).double(), torch.rand(64).double()
    running = torch.zeros(64), torch.ones(64)
    calls = {
        "normalize": lambda: triton_gpu.normalize(x, grouping, mean, var, weight, bias, activation="relu"),
        "no bias": lambda: triton_gpu.normalize(x, grouping, mean, var, weight, activation="relu"),
        "gelu": lambda: triton_gpu.normalize(x, grouping, mean, var, weight, bias, activation="gelu"),
        "bfloat16": lambda: triton_gpu.normalize(half, grouping, mean, var, weight, bias, activation="relu"),
        "smaller": lambda: triton_gpu.normalize(other, smaller, mean, var, weight, bias, activation="relu"),
        "unaligned": lambda: triton_gpu.normalize(unaligned, grouping, mean, var, weight, bias, activation="relu"),
        "ema": lambda: triton_gpu.ema_(*running, Moments(mean, var, 100), 0.1),
        "another momentum": lambda: triton_gpu.ema_(*running, Moments(mean, var, 100), 0.2),
    }
    for name, call in calls.items():
        kept = len(start._found)
        for _ in range(2):
            call()
        added = len(start._found) - kept
        sys.stdout.write(json.dumps({"name": name, "remembered": added, "launches": launched}) + "\n")
        launched.clear()


if __name__ == "__main__":
    main()
