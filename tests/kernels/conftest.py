from __future__ import annotations

import numpy as np
import pytest
import torch

from steadynorm.kernels import triton_gpu


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 as a device has it, rounded to nearest even: Triton's interpreter cuts."""
    if not triton_gpu.is_interpreted():
        return
    from triton import language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values, given, wanted, mode):
        if (given, wanted) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return cut(values, given, wanted, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
