from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from steadynorm.kernels.cpu import memory


@pytest.mark.parametrize("values", [1, 1000, memory.LARGE // 4 + 12_345])
def test_fresh_memory_is_poisoned_in_tests_at_every_size(values):
    """Or the tests could not see an element that a kernel forgets to write."""
    assert memory.empty_like(torch.zeros(values)).isnan().all()


def test_the_form_is_that_of_the_input():
    x = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last).half()
    y = memory.empty_like(x)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_keeping_freed_memory_saves_the_page_faults():
    """Freed blocks of 64 MiB come back to the process: hardly a fault, where each 4 KiB was one."""
    code = (
        "import resource, torch; from steadynorm.kernels.cpu.memory import keep_freed_memory\n"
        "torch.set_num_threads(1)\n"
        "def faults():\n"
        "    x = torch.zeros(1 << 24)\n"
        "    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(4):\n"
        "        del x; x = torch.empty(1 << 24).fill_(1.0)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start\n"
        "before = faults(); print(keep_freed_memory()); faults(); faults(); print(before, faults())\n"
    )
    took, counts = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    before, after = map(int, counts.split())
    assert took == "True"
    assert after * 20 < before
