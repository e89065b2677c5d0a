from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from steadynorm import functional, kernels
from steadynorm.errors import BackendError, InputError
from steadynorm.kernels import numba_cpu, reference, reference_sample
from tests import cases
from tests.kernels.contract import Bench

OPS = torch.ops.steadynorm
SAMPLES = [
    cases.BY_NAME[name]
    for name in (
        "plain",
        "plain, evaluation",
        "rows",
        "channels last",
        "bfloat16",
        "not affine",
        "add, relu",
        "add, silu",
        "lengths, add, relu",
    )
]


def arguments(case: cases.Case) -> dict[str, tuple[Any, ...]]:
    """What each op is called with, for one case."""
    bench = Bench(case)
    x, view, mask = bench.x, tuple(bench.grouping), bench.mask
    affine = (bench.inputs.weight, bench.inputs.bias)
    statistics = (bench.mean, bench.var)
    settings = (mask, case.eps, case.activation)
    ahead = (bench.dy, x, *view, *statistics, *affine, bench.residual, None, *settings)
    return {
        "moments": (x, *view, mask),
        "normalize": (x, *view, *statistics, *affine, bench.residual, *settings),
        "forward": (x, *view, *affine, bench.residual, *settings),
        "backward_sums": ahead,
        "backward_input": (
            *(bench.g, x, *view, *statistics, affine[0], bench.dweight, bench.dbias, bench.count, mask, case.eps),
        ),
        "backward": (*ahead, not case.training, True, True),
        "update_running_": (
            *(torch.zeros(view[1]), torch.ones(view[1]), torch.tensor(3), *statistics, None, 7, 0.1, True),
        ),
    }


@pytest.mark.parametrize("name", sorted(arguments(SAMPLES[0])))
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck(name, case):
    """Schema (what is written to, what aliases), and that fake tensors have the form of the real ones."""
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name), arguments(case)[name], test_utils=utilities)


@pytest.mark.parametrize("case", ["plain", "not affine", "plain, evaluation"])
def test_opcheck_without_the_gradients_of_residual_and_parameters(case):
    ahead = arguments(cases.BY_NAME[case])["backward"][:-2]
    for needs in ((False, True), (True, False), (False, False)):
        torch.library.opcheck(OPS.backward, (*ahead, *needs), test_utils=("test_schema", "test_faketensor"))


def test_opcheck_with_a_count_on_the_device():
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for momentum, seen in ((0.1, None), (None, torch.tensor(3))):
        args = (torch.zeros(4), torch.ones(4), seen, mean, var, torch.tensor(9), 0, momentum, True)
        torch.library.opcheck(OPS.update_running_, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_the_ops_are_the_backend(case):
    for name, args in arguments(case).items():
        if name == "update_running_":
            continue
        with kernels.backend("reference"):
            found = getattr(OPS, name)(*args)
        again = getattr(OPS, name)(*args)
        for one, two in zip(_tuple(found), _tuple(again), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_status_tells_of_every_backend():
    lines = kernels.status()
    assert [line.name for line in lines] == list(kernels.BACKENDS)
    assert all(line.reason for line in lines)


def test_forcing_is_undone_after_the_block_and_after_an_error():
    x = torch.ones(4, 4)
    unforced = kernels.choose(x)
    with kernels.backend("reference"):
        assert kernels.choose(x) is reference
    with pytest.raises(ZeroDivisionError), kernels.backend("reference"):
        raise ZeroDivisionError
    assert kernels.choose(x) is unforced


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_backward_pass_runs_on_the_backend_of_its_forward_pass(norm, monkeypatch):
    """On a device autograd calls it from a thread of its own, which knows of no block."""
    ran = []
    name = "backward" if norm == "batch" else "sample_backward"
    module = reference if norm == "batch" else reference_sample
    backward = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: ran.append(threading.current_thread()) or backward(*args))
    x = torch.randn(4, 6, requires_grad=True)
    with kernels.backend("reference"):
        y = functional.normalize_batch(x)[0] if norm == "batch" else functional.layer_norm(x, (6,))
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
    assert ran == [thread]


def test_a_backend_that_does_not_exist():
    with (
        pytest.raises(InputError, match=r"got 'cuda', expected one of numba, triton, reference"),
        kernels.backend("cuda"),
    ):
        pass


def test_a_tensor_that_the_forced_backend_cannot_take():
    x = torch.ones(4, 4, dtype=torch.float64, device="meta")
    assert kernels.choose(x) is reference
    if numba_cpu.why_not():
        pytest.skip(numba_cpu.why_not())
    with kernels.backend("numba"), pytest.raises(BackendError, match="cannot take this tensor"):
        kernels.choose(x)


def test_the_meta_device_gives_shapes():
    x = torch.empty(4, 6, 5, 5, device="meta").to(memory_format=torch.channels_last)
    y, moments = functional.normalize_batch(x, residual=x, activation="relu")
    assert y.shape == x.shape
    assert y.stride() == x.stride()
    assert moments.mean.shape == (6,)


@pytest.mark.parametrize("shape", [(1,), (3,), (7,)])
def test_statistics_that_are_not_one_of_each_channel_are_refused(shape):
    x, statistics = torch.randn(4, 6), torch.ones(shape)
    for normalize in (functional.normalize_running, functional.batch_norm):
        with pytest.raises(InputError, match=r"mean got shape .*, expected \(6,\) for x of shape \(4, 6\)"):
            normalize(x, statistics, statistics)
