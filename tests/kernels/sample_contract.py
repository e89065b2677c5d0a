"""The contract of a backend within a sample (see steadynorm/kernels/reference_sample.py), held against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from steadynorm.kernels import FROM_OUTPUT
from tests.kernels.sample_oracle import Call, expected

AFFINE = frozenset({"weight", "bias"})
EVERYTHING = AFFINE | {"addend", "residual", "dtotal"}

# Error allowed, of the value itself and of the largest one: a rounding to the dtype, and sums of many values.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (2**-8, 2**-9),
    torch.float16: (2**-11, 2**-12),
}

LAYOUTS: dict[str, tuple[tuple[int, ...], bool]] = {
    "rows": ((5, 1, 1, 37, 1), False),
    "rows of groups": ((5, 1, 3, 19, 1), False),
    "short planes": ((3, 1, 2, 5, 7), False),
    "planes": ((3, 1, 2, 3, 53), False),
    "last": ((3, 29, 2, 5, 1), False),
    "last of instances": ((3, 29, 19, 1, 1), False),
    "positions": ((3, 1, 1, 11, 37), True),
}
"""By name: sizes of a grouping, and whether each position has a statistic."""


def run(backend: Any, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
    """Forward, then backward with the statistics it gave."""
    shared = (inputs["weight"], inputs["bias"], inputs["residual"])
    settings = (inputs["mask"], call.eps, call.activation, call.is_centred, call.offset)
    y, total, mean, var = backend.sample_forward(inputs["x"], inputs["addend"], call.grouping, *shared, *settings)
    has_residual = inputs["residual"] is not None
    takes_output = has_residual and call.activation in FROM_OUTPUT
    dx, dweight, dbias, dresidual = backend.sample_backward(
        inputs["dy"],
        inputs["dtotal"],
        total,
        call.grouping,
        mean,
        var,
        inputs["weight"],
        inputs["bias"],
        None if takes_output else inputs["residual"],
        y if takes_output else None,
        *settings,
        has_residual,
        True,
    )
    return {
        "y": y, "total": total, "mean": mean, "var": var,
        "dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual,
    }  # fmt: skip


def assert_close(name: str, found: torch.Tensor, wanted: np.ndarray, dtype: torch.dtype, scale: float) -> None:
    """Raise AssertionError where a result is off by more than its dtype and the number of values explain."""
    relative, absolute = TOLERANCE[dtype]
    if found.dtype is torch.float64 and dtype is not torch.float64:
        # Statistics and sums of values that are exact in their dtype: float32 arithmetic, whatever that is.
        relative, absolute = TOLERANCE[torch.float32]
    wanted = wanted.reshape(found.shape)
    error = np.abs(found.double().cpu().numpy() - wanted)
    allowed = relative * np.abs(wanted) + absolute * max(np.abs(wanted).max(initial=0.0), scale)
    assert (error <= allowed).all(), f"{name} is off by up to {np.nanmax(error / allowed):.1f} times what is allowed"


def assert_right(backend: Any, call: Call, device: str = "cpu", *, all_sums: bool = True) -> None:
    """Raise AssertionError where a backend does not give what the oracle says.

    all_sums: dweight is compared also without a weight, and dbias without a bias, where the contract says nothing.
    """
    inputs = call.inputs()
    total = inputs["x"] if inputs["addend"] is None else inputs["x"] + inputs["addend"]
    wanted = expected(call, inputs, total)
    inputs = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    before = {name: None if t is None else t.clone() for name, t in inputs.items()}
    found = run(backend, call, inputs)
    for name, t in before.items():
        if t is not None:
            assert torch.equal(torch.nan_to_num(t), torch.nan_to_num(inputs[name])), f"{name} was written to"
    assert (found["total"] is inputs["x"]) == (inputs["addend"] is None)
    assert torch.equal(torch.nan_to_num(found["total"].cpu()), torch.nan_to_num(total))
    for name in ("y", "dx"):
        assert found[name].dtype is call.dtype
        assert_close(name, found[name], getattr(wanted, name), call.dtype, 1.0)
    assert_close("mean", found["mean"], wanted.mean, call.dtype, 0.0)
    assert_close("var", found["var"], wanted.var, call.dtype, 0.0)
    count = inputs["x"].numel() // len(wanted.dbias)
    for name, parameter in (("dweight", "weight"), ("dbias", "bias")):
        given, sums = inputs[parameter], found[name].dtype
        is_rounded = sums is not torch.float64
        assert not is_rounded or (given is not None and sums is given.dtype)
        assert found[name].shape == wanted.dbias.shape
        if all_sums or given is not None:
            dtype = sums if is_rounded else call.dtype
            assert_close(name, found[name], getattr(wanted, name), dtype, count**0.5)
    if found["dresidual"] is not None:
        assert_close("dresidual", found["dresidual"], wanted.dresidual, call.dtype, 1.0)
