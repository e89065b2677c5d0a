from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from steadynorm import grouping as grouping_
from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import numba_sample
from tests.cases import ACTIVATIONS
from tests.kernels import sample_contract
from tests.kernels.sample_contract import AFFINE, EVERYTHING, LAYOUTS, assert_close
from tests.kernels.sample_oracle import Call, expected


def needs(call: Call) -> None:
    reason = numba_sample.why_not(torch.ones(1), call.grouping, masked="mask" in call.has)
    if reason:
        pytest.skip(reason)


def run(call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
    return sample_contract.run(numba_sample, call, inputs)


def assert_right(call: Call) -> None:
    needs(call)
    sample_contract.assert_right(numba_sample, call)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    sizes, is_per_position = LAYOUTS[layout]
    for has in (frozenset(), AFFINE, EVERYTHING):
        for is_centred in (True, False):
            assert_right(Call(sizes, is_per_position, is_centred=is_centred, has=has))
            assert_right(Call(sizes, is_per_position, is_centred=is_centred, has=has | {"mask"}))


# Every dtype and every activation is a kernel of its own to compile, and so is every mask that runs along vectors.
DTYPES = (torch.float64, torch.bfloat16, torch.float16)
FEW = [("rows", dtype) for dtype in DTYPES]
MANY = [pytest.param(layout, dtype, marks=pytest.mark.slow) for layout in LAYOUTS for dtype in DTYPES]


@pytest.mark.parametrize(("layout", "dtype"), [*FEW, *MANY])
def test_every_dtype(layout, dtype):
    sizes, is_per_position = LAYOUTS[layout]
    for has in (frozenset(), AFFINE, EVERYTHING, EVERYTHING | {"mask"}):
        assert_right(Call(sizes, is_per_position, dtype, has=has))
    assert_right(Call(sizes, is_per_position, dtype, is_centred=False, has=frozenset({"weight"})))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("activation", "is_masked"),
    [
        ("relu", False),
        pytest.param("relu", True, marks=pytest.mark.slow),
        pytest.param("silu", False, marks=pytest.mark.slow),
        pytest.param("silu", True, marks=pytest.mark.slow),
    ],
)
def test_every_layout_with_an_activation(layout, activation, is_masked):
    sizes, is_per_position = LAYOUTS[layout]
    for has in (frozenset(), AFFINE, EVERYTHING):
        masked = frozenset({"mask"}) if is_masked else frozenset()
        assert_right(Call(sizes, is_per_position, activation=activation, has=has | masked))


QUICK = ("silu",)


@pytest.mark.parametrize(
    "activation", [*QUICK, *(pytest.param(a, marks=pytest.mark.slow) for a in ACTIVATIONS if a not in QUICK)]
)
def test_every_activation(activation):
    assert_right(Call((9, 1, 1, 70, 1), activation=activation, has=EVERYTHING))
    assert_right(Call((9, 1, 1, 70, 1), activation=activation))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_another_dtype_alone_and_with_an_offset(layout):
    sizes, is_per_position = LAYOUTS[layout]
    for parameter in (torch.float64, torch.bfloat16):
        assert_right(Call(sizes, is_per_position, parameter=parameter))
    for has in (frozenset({"weight"}), frozenset({"bias"})):
        assert_right(Call(sizes, is_per_position, has=has))
    assert_right(Call(sizes, is_per_position, offset=1.0))
    assert_right(Call(sizes, is_per_position, offset=1.0, has=frozenset({"weight"}), is_centred=False))


def test_every_width_of_a_row():
    for width in range(1, 71):
        assert_right(Call((3, 1, 1, width, 1), has=EVERYTHING))


def test_every_length_of_a_run():
    for length in range(2, 71):
        assert_right(Call((2, 1, 2, 3, length), has=EVERYTHING))
        assert_right(Call((2, 1, 2, 3, length), has=EVERYTHING | {"mask"}))


def test_every_number_of_channels_last():
    for width in range(1, 40):
        assert_right(Call((2, 19, 1, width, 1), has=EVERYTHING))
        assert_right(Call((2, 19, width, 1, 1), has=EVERYTHING | {"mask"}))


def test_every_number_of_positions():
    for length in range(2, 71):
        assert_right(Call((2, 1, 1, 5, length), True, has=EVERYTHING))
        assert_right(Call((2, 1, 1, 5, length), True, has=EVERYTHING | {"mask"}))


LARGE = {
    "rows": ((300, 1, 1, 301, 1), False),
    "a long row": ((3, 1, 1, 100_003, 1), False),
    "rows of groups": ((301, 1, 7, 43, 1), False),
    "short planes": ((40, 1, 8, 32, 9), False),
    "planes": ((7, 1, 5, 3, 1009), False),
    "a large group": ((1, 1, 1, 30, 9001), False),
    "a large plane": ((1, 1, 2, 1, 150_001), False),
    "last": ((3, 1013, 7, 5, 1), False),
    "last of instances": ((1, 2003, 70, 1, 1), False),
    "a large sample, channels last": ((1, 2003, 4, 40, 1), False),
    "positions": ((2, 1, 1, 97, 1013), True),
    "many channels at few positions": ((3, 1, 1, 5003, 7), True),
}


@pytest.mark.parametrize("layout", LARGE)
def test_large_and_with_a_large_mean(layout):
    sizes, is_per_position = LARGE[layout]
    assert_right(Call(sizes, is_per_position))
    assert_right(Call(sizes, is_per_position, is_centred=False, has=frozenset({"weight"})))
    assert_right(Call(sizes, is_per_position, mean=1e4))


@pytest.mark.parametrize("layout", LARGE)
def test_bits_do_not_depend_on_the_number_of_threads(layout, threads):
    sizes, is_per_position = LARGE[layout]
    call = Call(sizes, is_per_position)
    needs(call)
    inputs = call.inputs()
    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append(run(call, inputs))
    for other in found[1:]:
        for name, value in found[0].items():
            assert value is None or torch.equal(value, other[name]), name


@pytest.mark.parametrize("layout", [*LAYOUTS, "a long row", "planes of a large tensor", "a large plane"])
@pytest.mark.parametrize("outliers", [1, 64])
def test_outliers_cost_no_digits(layout, outliers):
    """They would if the pivot stayed among them: its distance from the mean enters the sum of squares twice."""
    sizes, is_per_position = (LAYOUTS | LARGE).get(layout, ((7, 1, 5, 3, 1009), False))
    call = Call(sizes, is_per_position)
    needs(call)
    inputs = call.inputs()
    inputs["x"].reshape(sizes[0], -1)[:, : min(outliers, sizes[4] * sizes[3] // 2 + 1)] = 1e4
    wanted = expected(call, inputs, inputs["x"])
    found = run(call, inputs)
    assert_close("var", found["var"], wanted.var, torch.float32, 0.0)
    assert_close("mean", found["mean"], wanted.mean, torch.float32, 0.0)
    assert_close("y", found["y"], wanted.y, torch.float32, 1.0)


def test_one_value_a_statistic():
    assert_right(Call((4, 1, 1, 1, 1), mean=3.0))
    assert_right(Call((4, 1, 6, 1, 1), mean=3.0))
    assert_right(Call((2, 1, 1, 1, 19), True, mean=3.0))


def test_values_that_are_all_the_same_have_no_noise():
    for sizes, is_per_position in LAYOUTS.values():
        call = Call(sizes, is_per_position, has=frozenset())
        needs(call)
        inputs = call.inputs()
        inputs["x"] = torch.full(sizes, 12345.678)
        found = run(call, inputs)
        assert found["var"].max() < 1e-9
        assert found["y"].abs().max() < 1e-3


def test_not_finite_values_stay_in_their_statistic():
    for bad in (torch.nan, torch.inf):
        for sizes, is_per_position in LAYOUTS.values():
            call = Call(sizes, is_per_position)
            needs(call)
            inputs = call.inputs()
            inputs["x"][1, 0, 0, 0, 0] = bad
            found = run(call, inputs)
            is_bad = torch.zeros(call.grouping.statistics, dtype=torch.bool)
            is_bad[1 * (sizes[4] if is_per_position else sizes[2])] = True
            assert torch.equal(~torch.isfinite(found["var"]), is_bad)
            is_bad = is_bad.reshape(call.grouping.statistics_shape).expand(sizes)
            assert torch.equal(torch.isnan(found["y"]), is_bad)
            assert torch.equal(torch.isnan(found["dx"]), is_bad)


def test_what_it_does_not_take():
    grouping = SampleGrouping(4, 1, 1, 8, 1)
    assert numba_sample.why_not(torch.ones(4, 8), grouping) == ""
    assert "empty" in numba_sample.why_not(torch.ones(0, 8), SampleGrouping(0, 1, 1, 8, 1))
    assert "int64" in numba_sample.why_not(torch.ones(4, 8, dtype=torch.int64), grouping)
    assert "meta" in numba_sample.why_not(torch.ones(4, 8, device="meta"), grouping)


FORK = """
import os, signal, torch
from steadynorm import grouping as grouping_
from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import numba_sample
torch.set_num_threads(2)
x = torch.randn(1, 1, 2, 1, 150_001)
def run():
    y, *_ = numba_sample.sample_forward(x, None, SampleGrouping(*x.shape))
    return y.numpy().tobytes()
expected = run()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if run() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_threads_it_does_not_have():
    needs(Call((1, 1, 2, 1, 150_001)))
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=100)


@pytest.mark.parametrize("rows", [4, 600], ids=["small", "large"])
def test_the_default_device_is_for_others(rows):
    """Scratch memory and results are on the CPU, whatever torch.set_default_device says."""
    x, dy, weight = torch.randn(rows, 256), torch.randn(rows, 256), torch.rand(256)

    def call():
        _, grouping = grouping_.layer(x, 1)
        y, _, mean, var = numba_sample.sample_forward(x, None, grouping, weight, weight)
        return y, mean, var, *numba_sample.sample_backward(dy, None, x, grouping, mean, var, weight, weight)[:3]

    expected = call()
    with torch.device("meta"):
        found = call()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
