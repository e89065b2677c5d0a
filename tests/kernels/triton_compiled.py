"""What the Triton kernels become on an H100 or H200, found out without one: `python -m tests.kernels.triton_compiled`.

The backends run on tensors without memory, in the shapes of real networks, and every launch is compiled for sm_90 as
Triton would compile it there. Printed is one line of JSON for each: registers, spills, and the loads by their width.
Not in Triton's interpreter, hence in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steadynorm import grouping as grouping_
from steadynorm.kernels import triton_gpu

HOPPER = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.uint8: "*u8", torch.int64: "*i64", torch.bool: "*i1"}
DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDTH = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16}

BATCHES: dict[str, tuple[tuple[int, ...], torch.dtype, str]] = {
    "112x112": ((256, 64, 112, 112), torch.float32, "plain"),
    "14x14": ((256, 1024, 14, 14), torch.float32, "plain"),
    "28x28, bfloat16": ((256, 512, 28, 28), torch.bfloat16, "plain"),
    "7x7": ((256, 2048, 7, 7), torch.float32, "plain"),
    "56x56, bfloat16, channels last": ((256, 256, 56, 56), torch.bfloat16, "channels_last"),
    "112x112, bfloat16, channels last": ((256, 64, 112, 112), torch.bfloat16, "channels_last"),
    "8x8, channels last": ((32, 64, 8, 8), torch.float32, "channels_last"),
    "rows": ((32, 256), torch.float32, "plain"),
}
"""By name: shape, dtype and memory order of a tensor that is normalised over the batch, with ReLU, in training."""


def launches(name: str) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches of a training step with and without a residual, and of a frozen one: kernel, arguments, options."""
    shape, dtype, layout = BATCHES[name]
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=order)
    x, grouping = grouping_.batch(x)
    weight, bias = torch.empty(2, shape[1], device="meta")
    mean, var = torch.empty(2, shape[1], device="meta", dtype=torch.float64)
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, _: Tensor, programs: int, *arguments: Any, **options: Any) -> None:
        found.append((kernel, arguments, options))

    start, count = triton_gpu.start, triton_gpu._multiprocessors
    triton_gpu.start, triton_gpu._multiprocessors = record, lambda index: MULTIPROCESSORS
    try:
        triton_gpu.forward(x, grouping, weight, bias, None, activation="relu")
        triton_gpu.forward(x, grouping, weight, bias, x, activation="relu")
        triton_gpu.backward(x, x, grouping, mean, var, weight, bias, None, None, activation="relu")
        triton_gpu.backward(x, x, grouping, mean, var, weight, bias, None, x, activation="relu", needs_dresidual=True)
        triton_gpu.backward(
            x, x, grouping, mean, var, weight, bias, activation="relu", is_given=True, needs_affine=False
        )
    finally:
        triton_gpu.start, triton_gpu._multiprocessors = start, count
    return iter(found)


def compiled(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A launch for sm_90, specialised as Triton does: what is None or 1 is a constant, 16 divides or does not."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = given[name]
        if name.isupper() or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    settings = {"num_warps": options["num_warps"], "enable_fp_fusion": True}
    return triton.compile(source, target=HOPPER, options=settings)


def look(binary: Any) -> dict[str, Any]:
    """Registers, bytes of stack and local memory of a thread, and loads from memory by their bytes, async ones too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        said = subprocess.run([DUMP, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    assert used, said
    loads: Counter[int] = Counter()
    for vector, width in re.findall(r"ld\.global(?:\.L1::\w+)?(?:\.L2::\w+)?(?:\.v(\d))?\.(b\d+)", binary.asm["ptx"]):
        loads[int(vector or 1) * WIDTH[width]] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^\n]*?, (0x\w+)", binary.asm["ptx"]):
        loads[int(size, 16)] += 1
    registers, stack, _, local = map(int, used.groups())
    return {"registers": registers, "stack": stack, "local": local, "loads": dict(sorted(loads.items()))}


def main() -> None:
    """Compile what is named, or all of it."""
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it.")
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or BATCHES:
        for kernel, arguments, options in launches(name):
            row = {"of": name, "kernel": kernel.fn.__name__, "warps": options["num_warps"]}
            sys.stdout.write(json.dumps(row | look(compiled(kernel, arguments, options))) + "\n")


if __name__ == "__main__":
    main()
