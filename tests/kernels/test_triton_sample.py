"""The Triton kernels within a sample: in Triton's interpreter on every push, and on a device with `-m gpu`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import backend, backends, triton_gpu, triton_sample
from tests.cases import ACTIVATIONS
from tests.kernels import sample_contract
from tests.kernels.sample_contract import EVERYTHING, assert_close
from tests.kernels.sample_oracle import Call, expected

pytest.importorskip("triton")

# NumPy, which the interpreter computes with, warns of what a device does without a word.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning"),
    pytest.mark.usefixtures("rounding"),
]

LAYOUTS = sample_contract.LAYOUTS | {"a run": ((3, 1, 2, 17, 49), False)}
# Few programs, also where tiles are small.
FOR_PARTS: dict[str, tuple[tuple[int, ...], bool]] = {
    "planes": ((2, 1, 2, 3, 53), False),
    "last": ((2, 19, 2, 5, 1), False),
    "positions": ((2, 1, 1, 11, 19), True),
}
MASKED = EVERYTHING | {"mask"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if reason := triton_gpu.why_not(torch.ones(2, 2, device=request.param)):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["whole", "in parts", "near", "far"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """As sizes have it; statistics of several programs; rows as if too wide for registers, by one launch and by two."""
    from steadynorm.kernels.gpu import launch, sample_launch

    if request.param != "whole":
        for name, value in {"WHOLE": 0, "UNITS": 1 << 30, "CHUNKS": 1, "TILE": 128}.items():
            monkeypatch.setattr(launch, name, value)
        far = {"HELD": 16, "HELD_BACKWARD": 16, "NEAR": 16, "PIECE": 16}
        near = {"HELD": 32, "HELD_BACKWARD": 32, "NEAR": 64, "STEP": 64}
        for name, value in {"in parts": {}, "near": near, "far": far}[request.param].items():
            monkeypatch.setattr(sample_launch, name, value)
        monkeypatch.setattr(triton_sample, "MERGED_AT_ONCE", 3)
        monkeypatch.setattr(triton_sample, "MERGED_PARTS", 2)
    sample_launch.plan.cache_clear()
    yield request.param
    sample_launch.plan.cache_clear()


def assert_right(call: Call, device: str, found: Any = triton_sample) -> None:
    sample_contract.assert_right(found, call, device, all_sums=False)


def run(call: Call, inputs: dict[str, Any], device: str) -> dict[str, Any]:
    moved = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    found = sample_contract.run(triton_sample, call, moved)
    return {name: None if t is None else t.cpu() for name, t in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, device):
    sizes, is_per_position = LAYOUTS[layout]
    assert_right(Call(sizes, is_per_position, mean=1e4), device)
    assert_right(Call(sizes, is_per_position, has=MASKED), device)
    assert_right(Call(sizes, is_per_position, has=MASKED, is_centred=False, activation="relu"), device)


@pytest.mark.parametrize("layout", FOR_PARTS)
@pytest.mark.parametrize("launch", ["in parts"], indirect=True)
def test_several_programs_for_a_statistic(layout, launch, device):
    sizes, is_per_position = FOR_PARTS[layout]
    assert_right(Call(sizes, is_per_position, mean=1e4), device)
    assert_right(Call(sizes, is_per_position, has=MASKED), device)


@pytest.mark.parametrize("launch", ["near", "far"], indirect=True)
def test_rows_that_registers_do_not_hold(launch, device):
    for sizes in ((3, 1, 1, 37, 1), (2, 1, 2, 19, 1)):
        assert_right(Call(sizes, mean=1e4), device)
        assert_right(Call(sizes, has=MASKED, activation="silu"), device)
        assert_right(Call(sizes, has=frozenset({"weight", "addend"}), is_centred=False, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("width", [8200, *(pytest.param(width, marks=pytest.mark.slow) for width in (16384, 17000))])
def test_wide_rows(width, device):
    assert_right(Call((2, 1, 1, width, 1)), device)
    assert_right(Call((2, 1, 1, width, 1), has=frozenset({"weight"}), is_centred=False, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout", ["rows", *(pytest.param(one, marks=pytest.mark.slow) for one in LAYOUTS if one != "rows")]
)
def test_every_dtype(layout, dtype, device):
    sizes, is_per_position = LAYOUTS[layout]
    for has in (frozenset(), MASKED):
        assert_right(Call(sizes, is_per_position, dtype, has=has), device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "layout", ["rows", *(pytest.param(one, marks=pytest.mark.slow) for one in LAYOUTS if one != "rows")]
)
def test_every_activation(layout, activation, device):
    sizes, is_per_position = LAYOUTS[layout]
    assert_right(Call(sizes, is_per_position, activation=activation, has=EVERYTHING), device)
    assert_right(Call(sizes, is_per_position, activation=activation), device)


def test_parameters_of_another_dtype_alone_and_with_an_offset(device):
    for parameter in (torch.float64, torch.bfloat16):
        assert_right(Call((5, 1, 1, 37, 1), parameter=parameter), device)
    for has in (frozenset({"weight"}), frozenset({"bias"})):
        assert_right(Call((3, 1, 2, 3, 53), has=has), device)
    for layout in ("rows", "planes"):
        sizes, _ = LAYOUTS[layout]
        assert_right(Call(sizes, offset=1.0, has=frozenset({"weight"}), is_centred=False), device)


@pytest.mark.parametrize("launch", ["far"], indirect=True)
def test_many_rows_whose_means_have_a_launch_of_their_own(launch, device):
    """It leaves nothing for channels: there are more rows than parts of the launch that does."""
    from steadynorm.kernels.gpu.sample_launch import plan

    sizes = (40, 1, 1, 100, 1)
    before, last = plan(SampleGrouping(*sizes, False), 4, 4, 2)
    *_, leaves_channels = before.tile
    assert last.parts < 40
    assert not leaves_channels
    assert_right(Call(sizes), device)


def test_parameters_that_are_not_contiguous(device):
    grouping = SampleGrouping(5, 1, 1, 12, 1, False)
    x, dy = torch.randn(2, 5, 12, device=device)
    weight, bias = torch.randn(2, 24, device=device)[:, ::2]
    found = []
    for parameters in ((weight, bias), (weight.contiguous(), bias.contiguous())):
        y, _, mean, var = triton_sample.sample_forward(x, None, grouping, *parameters)
        found.append((y, *triton_sample.sample_backward(dy, None, x, grouping, mean, var, *parameters)[:3]))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("width", [*range(1, 34), 100, 257, 1000, 4097])
def test_every_width_of_a_row(width, device):
    assert_right(Call((3, 1, 1, width, 1), has=MASKED), device)


@pytest.mark.slow
@pytest.mark.parametrize("length", [*range(2, 20), 49, 64, 65, 196, 1000])
def test_every_length(length, device):
    assert_right(Call((2, 1, 2, 3, length), has=MASKED), device)
    assert_right(Call((2, length, 2, 3, 1), has=MASKED), device)
    assert_right(Call((2, 1, 1, 5, length), True, has=MASKED), device)


LARGE = {
    "rows": ((300, 1, 1, 301, 1), False),
    "a long row": ((3, 1, 1, 100_003, 1), False),
    "rows of groups": ((301, 1, 7, 43, 1), False),
    "short planes": ((40, 1, 8, 32, 9), False),
    "planes": ((7, 1, 5, 3, 1009), False),
    "a large group": ((1, 1, 1, 30, 9001), False),
    "last": ((3, 1013, 7, 5, 1), False),
    "last of instances": ((1, 2003, 70, 1, 1), False),
    "positions": ((2, 1, 1, 97, 1013), True),
    "many channels at few positions": ((3, 1, 1, 5003, 7), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE)
def test_large_and_with_a_large_mean(layout, device):
    sizes, is_per_position = LARGE[layout]
    assert_right(Call(sizes, is_per_position, has=MASKED), device)
    assert_right(Call(sizes, is_per_position, mean=1e4), device)
    assert_right(Call(sizes, is_per_position, is_centred=False, has=frozenset({"weight"})), device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [(70_001, 1, 1, 3, 30), (70_001, 1, 1, 2049, 1), (1, 1, 70_001, 2, 9), (2, 70_001, 3, 2, 1)]
)
def test_more_than_65535_of_each(sizes):
    """A dimension of a grid ends there."""
    assert_right(Call(sizes), "cuda")


OUTPUTS = ("y", "mean", "var", "dx", "dweight", "dbias", "dresidual")


@pytest.mark.parametrize("broken", OUTPUTS)
def test_a_saboteur_is_caught(broken, device):
    """One result off by a thousandth."""

    def forward(*args):
        found = dict(zip(("y", "total", "mean", "var"), triton_sample.sample_forward(*args), strict=True))
        return tuple(t * 1.001 if name == broken else t for name, t in found.items())

    def backward(*args):
        names = ("dx", "dweight", "dbias", "dresidual")
        found = dict(zip(names, triton_sample.sample_backward(*args), strict=True))
        return tuple(t * 1.001 if name == broken else t for name, t in found.items())

    saboteur = SimpleNamespace(sample_forward=forward, sample_backward=backward)
    with pytest.raises(AssertionError, match="is off by"):
        assert_right(Call((5, 1, 1, 37, 1), has=EVERYTHING), device, saboteur)


@pytest.mark.parametrize(
    "layout", ["planes", *(pytest.param(one, marks=pytest.mark.slow) for one in ("rows", "last", "positions"))]
)
@pytest.mark.parametrize("launch", ["whole", "in parts"], indirect=True)
def test_the_same_bits_every_time(layout, launch, device):
    call = Call(*LAYOUTS[layout], activation="silu", has=EVERYTHING)
    inputs = call.inputs()
    first = run(call, inputs, device)
    for name, t in run(call, inputs, device).items():
        assert torch.equal(t, first[name]), name


@pytest.mark.parametrize("layout", ["rows", "a run", "planes", "last", "positions"])
def test_not_finite_values_stay_in_their_statistic(layout, device):
    sizes, is_per_position = LAYOUTS[layout]
    call = Call(sizes, is_per_position)
    inputs = call.inputs()
    inputs["x"][1, 0, 0, 0, 0] = torch.nan
    found = run(call, inputs, device)
    is_bad = torch.zeros(call.grouping.statistics, dtype=torch.bool)
    is_bad[1 * (sizes[4] if is_per_position else sizes[2])] = True
    assert torch.equal(~torch.isfinite(found["var"]), is_bad)
    is_bad = is_bad.reshape(call.grouping.statistics_shape).expand(sizes)
    assert torch.equal(torch.isnan(found["y"]), is_bad)
    assert torch.equal(torch.isnan(found["dx"]), is_bad)


@pytest.mark.parametrize("layout", ["rows", "a run", "planes", "last", "positions"])
def test_values_that_are_all_the_same_have_no_noise(layout, device):
    sizes, is_per_position = LAYOUTS[layout]
    call = Call(sizes, is_per_position, has=frozenset())
    found = run(call, call.inputs() | {"x": torch.full(sizes, 12345.678)}, device)
    assert found["var"].max() < 1e-9
    assert found["y"].abs().max() < 1e-3


@pytest.mark.parametrize("layout", ["rows", "a run", "last"])
def test_outliers_cost_no_digits(layout, device):
    sizes, is_per_position = LAYOUTS[layout]
    call = Call(sizes, is_per_position)
    inputs = call.inputs()
    inputs["x"].reshape(sizes[0], -1)[:, :5] = 1e4
    wanted = expected(call, inputs, inputs["x"])
    found = run(call, inputs, device)
    for name, scale in (("var", 0.0), ("mean", 0.0), ("y", 1.0)):
        assert_close(name, found[name], getattr(wanted, name), torch.float32, scale)


def test_one_value_a_statistic(device):
    assert_right(Call((4, 1, 6, 1, 1), mean=3.0), device)
    assert_right(Call((2, 1, 1, 1, 19), True, mean=3.0), device)


def test_sums_that_nobody_wants_are_not_computed(device):
    call = Call((5, 1, 1, 37, 1))
    x, grouping, mean = torch.randn(5, 37, device=device), call.grouping, torch.zeros(5, device=device).double()
    found = triton_sample.sample_backward(x, None, x, grouping, mean, mean + 1, needs_affine=False)
    assert found[1].numel() == found[2].numel() == 0
    assert found[3] is None


def test_it_is_chosen_where_it_is_asked_for():
    x, grouping = torch.ones(4, 8), SampleGrouping(4, 1, 1, 8, 1)
    assert backends.choose_sample(x, grouping) is not triton_sample
    if triton_gpu.is_interpreted():
        with backend("triton"):
            assert backends.choose_sample(x, grouping) is triton_sample
    assert triton_sample.why_not(torch.ones(4, 8, device="meta"), grouping)
