"""What the Triton kernels within a sample become on an H100 or H200: as `triton_compiled`, which compiles and looks.

`python -m tests.kernels.compiled_samples` prints one line of JSON for each kernel, some for calls that are named.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm import grouping as grouping_
from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import triton_gpu, triton_sample
from tests.kernels.triton_compiled import MULTIPROCESSORS, compiled, look

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Trained(NamedTuple):
    """A tensor of a network, and how it is normalised in training."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: Callable[[Tensor], tuple[Tensor, SampleGrouping]]
    is_centred: bool = True
    has_addend: bool = False
    activation: str | None = None
    is_channels_last: bool = False


def _layer(x: Tensor) -> tuple[Tensor, SampleGrouping]:
    return grouping_.layer(x, 1)


def _groups(x: Tensor) -> tuple[Tensor, SampleGrouping]:
    return grouping_.sample_groups(x, 32)


def _instances(x: Tensor) -> tuple[Tensor, SampleGrouping]:
    return grouping_.sample_groups(x, x.shape[1])


def _rows() -> Iterator[tuple[str, Trained]]:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (768, 1024, 2048, 4096, 8192, 16384, 32768):
            for is_centred in (True, False):
                for has_addend in (False, True):
                    name = f"{'layer' if is_centred else 'rms'} {width}{', addend' if has_addend else ''}, {dtype}"
                    yield name, Trained((8192, width), dtype, _layer, is_centred, has_addend)


IMAGES = (256, 256, 56, 56)
SAMPLES: dict[str, Trained] = {
    **dict(_rows()),
    "group": Trained(IMAGES, torch.float32, _groups, activation="relu"),
    "group, bfloat16": Trained(IMAGES, torch.bfloat16, _groups, activation="relu"),
    "group, channels last": Trained(IMAGES, torch.bfloat16, _groups, activation="relu", is_channels_last=True),
    "group, channels last, float32": Trained(IMAGES, torch.float32, _groups, is_channels_last=True),
    "group, one sample": Trained((1, 256, 256, 256), torch.bfloat16, _groups, activation="silu"),
    "group, one sample, channels last": Trained((1, 256, 256, 256), torch.bfloat16, _groups, is_channels_last=True),
    "group 7x7": Trained((256, 2048, 7, 7), torch.float32, _groups),
    "group (N, C)": Trained((8192, 2048), torch.bfloat16, _groups),
    "instance": Trained(IMAGES, torch.bfloat16, _instances, activation="relu"),
    "instance, channels last": Trained(IMAGES, torch.bfloat16, _instances, is_channels_last=True),
    "positions": Trained((64, 96, 56, 56), torch.bfloat16, grouping_.positions),
    "positions, channels last": Trained((64, 96, 56, 56), torch.bfloat16, grouping_.positions, is_channels_last=True),
}


def launches(name: str) -> list[Launch]:
    """The launches of a training step: kernel, arguments, options."""
    trained = SAMPLES[name]
    order = torch.channels_last if trained.is_channels_last else torch.contiguous_format
    x = torch.empty(trained.shape, dtype=trained.dtype, device="meta").to(memory_format=order)
    x, grouping = trained.group(x)
    weight = torch.empty(grouping.groups * grouping.channels, device="meta")
    mean, var = torch.empty(2, grouping.statistics, device="meta", dtype=torch.float64)
    addend = x if trained.has_addend else None
    bias = weight if trained.is_centred else None
    found: list[Launch] = []

    def record(kernel: Any, _: Tensor, programs: int, *arguments: Any, **options: Any) -> None:
        found.append((kernel, arguments, options | {"programs": programs}))

    start, count = triton_sample.start, triton_gpu._multiprocessors
    triton_sample.start, triton_gpu._multiprocessors = record, lambda index: MULTIPROCESSORS
    settings = (None, 1e-5, trained.activation, trained.is_centred)
    try:
        triton_sample.sample_forward(x, addend, grouping, weight, bias, None, *settings)
        triton_sample.sample_backward(x, addend, x, grouping, mean, var, weight, bias, None, None, *settings)
    finally:
        triton_sample.start, triton_gpu._multiprocessors = start, count
    return found


def rows(name: str) -> Iterator[dict[str, Any]]:
    """What a launch is, and what it becomes."""
    for kernel, arguments, options in launches(name):
        programs = options.pop("programs")
        file = kernel.fn.__module__.rpartition(".")[2]
        row = {
            "of": name,
            "kernel": f"{file}.{kernel.fn.__name__}",
            "programs": programs,
            "warps": options["num_warps"],
        }
        binary = compiled(kernel, arguments, options)
        yield row | look(binary) | {"shared": binary.metadata.shared}


def main() -> None:
    """Compile what is named, or all of it."""
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it.")
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or SAMPLES:
        for row in rows(name):
            sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
