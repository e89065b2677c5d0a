"""The Triton kernels: in Triton's interpreter on every push, and the same tests on a device with `-m gpu`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from steadynorm import functional
from steadynorm import grouping as grouping_
from steadynorm import moments as moments_
from steadynorm.errors import BackendError, InputError
from steadynorm.kernels import backend, backends, triton_gpu
from steadynorm.moments import Moments
from tests import cases
from tests.kernels.contract import assert_keeps_contract, everything

pytest.importorskip("triton")

# NumPy, which the interpreter computes with, warns of what a device does without a word.
pytestmark = [pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"), pytest.mark.usefixtures("rounding")]

# The interpreter takes a millisecond or more for each tile of each program: the cases of few.
QUICK = frozenset(
    {
        *("one sample", "one position", "one channel", "two values", "two values in one sample", "rows"),
        *("rows, one channel", "many rows, few channels", "images", "channels last", "strided", "transposed"),
        *("constant channel", "first sample zero", "one channel huge", "offset 1e4", "offset 1e4, rows"),
        *("bfloat16, rows", "float16", "float64", "add", "not affine", "lengths", "lost sample", "masked rows"),
        *("lengths, channels last", "lengths, add, relu", "lengths, offset 1e4", "lengths, bfloat16"),
        *(f"add, {name}, {where}" for name in ("relu", "silu") for where in ("rows", "channels last")),
        *(f"add, {name}" for name in cases.ACTIVATIONS),
    }
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if reason := triton_gpu.why_not(torch.ones(2, 2, device=request.param)):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["whole", "split"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """One program for a channel, and several, whatever its size."""
    from steadynorm.kernels.gpu import launch

    if request.param == "split":
        monkeypatch.setattr(launch, "WHOLE", 0)
        monkeypatch.setattr(launch, "UNITS", 1 << 30)
        monkeypatch.setattr(launch, "CHUNKS", 1)
        monkeypatch.setattr(launch, "TILE", 128)
    launch.plan.cache_clear()
    yield request.param
    launch.plan.cache_clear()


def _case(case: cases.Case) -> object:
    name = case.name.removesuffix(", evaluation")
    is_quick = name in QUICK and (case.training or name in ("rows", "add, relu", "lengths"))
    return pytest.param(case, id=str(case), marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("case", [_case(case) for case in cases.ALL])
def test_keeps_the_contract(case, device):
    assert_keeps_contract(triton_gpu, case, device)


SPLIT = ("one sample", "rows", "channels last", "lengths, offset 1e4", "lengths, add, relu", "lost sample", "add")


@pytest.mark.parametrize("name", [*SPLIT, *(f"{name}, evaluation" for name in ("rows", "add", "add, relu"))])
@pytest.mark.parametrize("launch", ["split"], indirect=True)
def test_keeps_the_contract_in_parts(name, launch, device):
    assert_keeps_contract(triton_gpu, cases.BY_NAME[name], device)


def test_quick_cases_exist():
    assert set(cases.BY_NAME) >= QUICK | set(SPLIT)


@pytest.mark.parametrize("broken", ["moments", "normalize", "backward_sums", "backward_input"])
def test_a_saboteur_is_caught(broken, device):
    """One function of the contract off by a thousandth."""
    names = ("moments", "normalize", "backward_sums", "backward_input", "forward", "backward")
    sound = {name: getattr(triton_gpu, name) for name in names}

    def off(*args):
        found = sound[broken](*args)
        return found * 1.001 if isinstance(found, torch.Tensor) else (found[0], found[1] * 1.001, *found[2:])

    assert_keeps_contract(SimpleNamespace(**sound), cases.BY_NAME["rows"], device)
    with pytest.raises(AssertionError, match="is off by"):
        assert_keeps_contract(SimpleNamespace(**(sound | {broken: off})), cases.BY_NAME["rows"], device)


@pytest.mark.parametrize("shape", [(6, 3, 130), (300, 5)])
def test_the_same_bits_every_time(shape, launch, device):
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    x, grouping = grouping_.batch(x)
    first = everything(triton_gpu, x, dy, grouping, activation="silu")
    for one, two in zip(first, everything(triton_gpu, x, dy, grouping, activation="silu"), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_values_reach_the_statistics_and_the_output(bad, launch, device):
    x = torch.randn(4, 3, 200, device=device)
    x[1, 1, 5] = bad
    x, grouping = grouping_.batch(x)
    y, mean, var = triton_gpu.forward(x, grouping)
    assert not mean[1].isfinite()
    assert var[1].isnan()
    assert y[:, 1].isnan().all()
    for t in (mean[[0, 2]], var[[0, 2]], y[:, [0, 2]]):
        assert t.isfinite().all()


@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_nan_is_not_swallowed_by_an_activation(activation, device):
    x = torch.randn(5, 3, device=device)
    x[0, 2] = torch.nan
    x, grouping = grouping_.batch(x)
    statistics = torch.zeros(3, device=device).double(), torch.ones(3, device=device).double()
    y = triton_gpu.normalize(x, grouping, *statistics, activation=activation)
    assert y[0, 2].isnan()
    assert y.isnan().sum() == 1


@pytest.mark.parametrize("expanded", [False, True])
def test_parameters_and_statistics_that_are_not_contiguous(expanded, device):
    x, dy = torch.randn(2, 5, 6, 20, device=device)
    x, grouping = grouping_.batch(x)
    numbers = torch.rand(2, 1 if expanded else 12, device=device) + 0.5
    weight, bias = numbers.expand(2, 6) if expanded else numbers[:, ::2]
    mean, var = (t.double().expand(6) if expanded else t.double().repeat_interleave(2)[::2] for t in (weight, bias))
    affine = {"weight": weight, "bias": bias}
    dense = {name: t.contiguous() for name, t in affine.items()}
    for one, two in zip(
        everything(triton_gpu, x, dy, grouping, **affine), everything(triton_gpu, x, dy, grouping, **dense), strict=True
    ):
        assert torch.equal(one, two)
    given = triton_gpu.normalize(x, grouping, mean, var, weight, bias)
    assert torch.equal(given, triton_gpu.normalize(x, grouping, mean.contiguous(), var.contiguous(), weight, bias))


def test_evaluation_reads_running_statistics_where_they_are(device, monkeypatch):
    """In float32, without a copy of them."""
    read, normalize = [], triton_gpu.normalize
    monkeypatch.setattr(triton_gpu, "normalize", lambda *args: read.extend(args[2:4]) or normalize(*args))
    x, mean, var = torch.randn(4, 3, 10, device=device), torch.randn(3, device=device), torch.rand(3, device=device)
    with backend("triton"):
        y = functional.normalize_running(x, mean, var)
        of_doubles = functional.normalize_running(x, mean.double(), var.double())
    assert torch.equal(y, of_doubles)
    assert [t.data_ptr() for t in read[:2]] == [mean.data_ptr(), var.data_ptr()]


def test_a_parameter_on_another_device_is_refused(device):
    x, grouping = grouping_.batch(torch.randn(5, 6, device=device))
    with pytest.raises(InputError, match=r"is on meta, expected all on .*: move it there"):
        triton_gpu.forward(x, grouping, torch.ones(6, device="meta"))


def test_a_channel_whose_variance_is_zero_has_no_noise(device):
    for x in (torch.full((32, 2, 49), 12345.678), torch.full((900, 5), 12345.678)):
        x, grouping = grouping_.batch(x.to(device))
        y, _, var = triton_gpu.forward(x, grouping)
        assert var.eq(0).all()
        assert y.abs().max() < 1e-3


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("what", ["finite", "nan", "inf", "empty", "counted", "counted, empty"])
def test_ema_is_that_of_moments(what, guard, momentum, device):
    group = 5
    mean, var = torch.randn(group, device=device).double(), torch.rand(group, device=device).double()
    if what in ("nan", "inf"):
        var[2] = float(what)
    count: int | torch.Tensor = 0 if what == "empty" else 7
    if what.startswith("counted"):
        count = torch.tensor(0 if "empty" in what else 7, device=device)
    ours, theirs = ([torch.full((group,), 0.3), torch.full((group,), 2.0), torch.tensor(4)] for _ in range(2))
    for tensors, ema in ((ours, triton_gpu.ema_), (theirs, moments_.ema_)):
        tensors[:] = [t.to(device) for t in tensors]
        running_mean, running_var, tracked = tensors
        batch = Moments(mean, var, count)
        ema(running_mean, running_var, batch, momentum, num_batches_tracked=tracked, guard=guard)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=0, equal_nan=True)


def test_ema_in_double_precision_takes_the_whole_momentum(device):
    running = [torch.zeros(3, device=device).double() for _ in range(2)]
    batch = Moments(torch.ones(3, device=device).double(), torch.ones(3, device=device).double(), 1 << 40)
    triton_gpu.ema_(*running, batch, 0.1)
    for t in running:
        torch.testing.assert_close(t, torch.full_like(t, 0.1), rtol=1e-12, atol=0)


def test_a_tensor_of_the_cpu_is_not_interpreted_unless_asked_for():
    x = torch.ones(4, 4)
    assert backends.choose(x, masked=True) is not triton_gpu
    assert backends.choose(x) is not triton_gpu
    if triton_gpu.is_interpreted():
        with backend("triton"):
            assert backends.choose(x) is triton_gpu


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(2, 2, dtype=torch.complex64), "the tensor is torch.complex64"),
        (torch.ones(0, 2), "the tensor is empty"),
        (torch.ones(2, 2, device="meta"), "the tensor is on meta"),
    ],
)
def test_what_it_cannot_take_is_said_where_it_was_asked_for(x, reason):
    if triton_gpu.why_not():
        pytest.skip(triton_gpu.why_not())
    with backend("triton"), pytest.raises(BackendError, match=f"'triton' was asked for .*: {reason}"):
        backends.choose(x)


def test_a_device_that_lacks_something(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index == 1 else (6, 1))
    triton_gpu._lacks.cache_clear()
    assert triton_gpu._lacks(torch.float16, 1) == ""
    assert "7.5, bfloat16 needs 8.0" in triton_gpu._lacks(torch.bfloat16, 1)
    assert "6.1, Triton needs 7.0" in triton_gpu._lacks(torch.float32, 0)
    triton_gpu._lacks.cache_clear()


@pytest.mark.parametrize(
    ("is_here", "compiler", "reason"),
    [(False, "gcc", "there is no CUDA device"), (True, None, "needs a C compiler"), (True, "gcc", "")],
)
def test_why_it_cannot_run_here(is_here, compiler, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_here)
    monkeypatch.setattr("shutil.which", lambda name: compiler and f"/usr/bin/{name}")
    assert reason in triton_gpu._missing.__wrapped__()
    assert bool(reason) == bool(triton_gpu._missing.__wrapped__())
